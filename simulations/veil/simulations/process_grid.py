# SPDX-License-Identifier: Apache-2.0
"""The in-process Grid spread over processes of this machine, each of which answers for its share of the sites.

Promises what the in-process Grid promises, to the bit, that a process which is lost ends the run with an error, and
that none outlives the run or the process that started it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from types import TracebackType

from flwr.app import Message
from flwr.clientapp import ClientApp

from veil.common.errors import RunError
from veil.simulations.grid import InProcessGrid

_END_S = 10.0


class ProcessGrid(InProcessGrid):
    """`nodes` sites served by one ClientApp in forked processes; ends them when its context ends.

    Args:
        client_app: what answers.
        nodes: number of sites; node i has partition-id i.
        processes: how many; a node is always answered by the same one, which keeps what it prepared.
        begin: called first in each process, with its number.
    """

    def __init__(self, client_app: ClientApp, nodes: int, *, processes: int, begin: Callable[[int], None]) -> None:
        super().__init__(client_app, nodes)
        self._begin = begin
        self._workers = [_Worker(self, number) for number in range(min(processes, nodes))]

    def __enter__(self) -> ProcessGrid:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for worker in self._workers:
            worker.close()
        for worker in self._workers:
            worker.join()

    def answer(self, messages: list[Message]) -> list[Message]:
        """All replies, in the order of the messages."""
        shares: list[list[int]] = [[] for _ in self._workers]
        for place, message in enumerate(messages):
            shares[message.metadata.dst_node_id % len(shares)].append(place)
        for worker, places in zip(self._workers, shares, strict=True):
            worker.ask([messages[place] for place in places])
        replies: dict[int, Message] = {}
        for worker, places in zip(self._workers, shares, strict=True):
            replies.update(zip(places, worker.replies(), strict=True))
        return [replies[place] for place in range(len(messages))]

    def serve(self, pipe: Connection, number: int) -> None:
        """Answer what comes through a pipe, until its other end is closed: the work of one process."""
        self._begin(number)
        while True:
            pipe.send(super().answer(pipe.recv()))


class _Worker:
    """One process and the pipe to it."""

    def __init__(self, grid: ProcessGrid, number: int) -> None:
        context = get_context("fork")
        self._pipe, theirs = context.Pipe()
        self._process: BaseProcess = context.Process(
            target=_serve, args=(grid, number, self._pipe, theirs), daemon=True
        )
        self._process.start()
        theirs.close()

    def ask(self, messages: list[Message]) -> None:
        with _lost(self._process):
            self._pipe.send(messages)

    def replies(self) -> list[Message]:
        with _lost(self._process):
            answered: list[Message] = self._pipe.recv()
            return answered

    def close(self) -> None:
        """Its sign to end, seen once every process that was forked later has closed its copy of this end."""
        self._pipe.close()

    def join(self) -> None:
        self._process.join(_END_S)
        if self._process.exitcode is None:
            self._process.kill()
            self._process.join()


def _serve(grid: ProcessGrid, number: int, ours: Connection, pipe: Connection) -> None:
    """`ours` is the asking end, of which a fork has a copy: open, it would hide that the other process is gone."""
    ours.close()
    try:
        grid.serve(pipe, number)
    except (EOFError, OSError, KeyboardInterrupt):
        os._exit(0)


@contextmanager
def _lost(process: BaseProcess) -> Iterator[None]:
    """Turn a broken pipe into an error for a person."""
    try:
        yield
    except (EOFError, OSError) as error:
        process.join(1.0)
        raise RunError(
            f"a process of the simulation ended (exit code {process.exitcode})",
            "all of them to the end of the run",
            "look at the lines above, or use --engine inprocess",
        ) from error
