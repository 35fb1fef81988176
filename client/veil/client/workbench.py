# SPDX-License-Identifier: Apache-2.0
"""The agent's side of its executor: starts it, asks it, and ends it when it hangs.

Promises that a question takes bounded time, and that after a lost or hung executor the next question finds a new one.
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path

from veil.common.supervision import Child

EXECUTOR = "veil.client.deployed"
"""The module that an agent's executor runs."""

PING = b"ping"
"""A frame that is answered by itself, from the very loop that answers messages."""

MEMORY_BACK = {"MALLOC_MMAP_THRESHOLD_": str(2**20)}
"""glibc gives blocks from a megabyte back to the system at once. By itself it comes to keep those of up to 32 MB:
gradients that came and went were 300 MB of an executor's gigabyte (measured on 2026-11-22, Lite0, `last-layers`)."""

_START_S = 120.0
_PING_S = 10.0
_RESTART_S = 2.0

_log = logging.getLogger(__name__)


class ExecutorLostError(Exception):
    """The executor ended or hung before it answered."""


class Workbench:
    """An executor process that is there when needed.

    Args:
        site_file: what the executor opens.
        limit_s: longest time one answer may take.
        module: what it runs; only rehearsals name another than the site's own.
    """

    def __init__(self, site_file: Path, limit_s: float, module: str = EXECUTOR) -> None:
        self._site_file, self._limit_s, self._module = site_file, limit_s, module
        self._lock = threading.Lock()
        self._child: Child | None = None
        self._pipe: Connection | None = None
        self._greeted = False
        self._started_at = 0.0
        self.busy_since: float | None = None

    def begin(self) -> None:
        """Start the executor and do not wait: its libraries load while the agent loads its own."""
        with self._lock:
            self._start()

    def ask(self, frame: bytes) -> bytes:
        """One frame's answer.

        Raises:
            ExecutorLostError: when there is none within the limit; the executor was ended then.
        """
        with self._lock:
            self.busy_since = time.monotonic()
            try:
                return self._exchange(frame, self._limit_s)
            finally:
                self.busy_since = None

    def works(self) -> bool:
        """Whether the executor answers, or is at work within its limit."""
        if not self._lock.acquire(blocking=False):
            since = self.busy_since
            return since is not None and time.monotonic() - since < self._limit_s and self._alive()
        try:
            return self._exchange(PING, _PING_S) == PING
        except ExecutorLostError:
            return False
        finally:
            self._lock.release()

    def close(self) -> None:
        """End the executor."""
        with self._lock:
            self._end()

    @property
    def pid(self) -> int | None:
        """Process id of the executor, None while there is none."""
        return self._child.pid if self._child else None

    def _alive(self) -> bool:
        return self._child is not None and self._child.exit_code is None

    def _exchange(self, frame: bytes, limit_s: float) -> bytes:
        try:
            child, pipe = self._open()
            with _ended_after(limit_s, child):
                pipe.send_bytes(frame)
                return pipe.recv_bytes()
        except (ExecutorLostError, EOFError, OSError) as error:
            _log.error("the executor was lost: %s", error or type(error).__name__)
            self._end()
            raise ExecutorLostError(str(error)) from None

    def _open(self) -> tuple[Child, Connection]:
        """A running executor and its pipe; a lost one is replaced, but not more often than every few seconds."""
        if self._child is None or self._pipe is None or (self._greeted and not self._alive()):
            self._end()
            time.sleep(max(0.0, self._started_at + _RESTART_S - time.monotonic()))
            child, pipe = self._start()
        else:
            child, pipe = self._child, self._pipe
        if not self._greeted:
            with _ended_after(_START_S, child):
                pipe.send_bytes(PING)
                pipe.recv_bytes()
            self._greeted = True
        return child, pipe

    def _start(self) -> tuple[Child, Connection]:
        ours, theirs = socket.socketpair()
        with theirs:
            arguments = [str(theirs.fileno()), str(self._site_file)]
            self._child = Child(self._module, arguments, keep=[theirs.fileno()], variables=MEMORY_BACK)
        self._started_at = time.monotonic()
        self._pipe = Connection(ours.detach())
        return self._child, self._pipe

    def _end(self) -> None:
        if self._pipe is not None:
            self._pipe.close()
        if self._child is not None:
            self._child.kill()
        self._pipe = self._child = None
        self._greeted = False


@contextmanager
def _ended_after(limit_s: float, child: Child) -> Iterator[None]:
    """End an executor when what is inside takes longer: also a frame that is read or written halfway and no further.

    Raises:
        ExecutorLostError: when it was ended.
    """
    late = threading.Event()

    def end() -> None:
        late.set()
        child.kill()

    timer = threading.Timer(limit_s, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    except (EOFError, OSError):
        if late.is_set():
            raise ExecutorLostError(f"no answer within {limit_s:g} s") from None
        raise
    finally:
        timer.cancel()
