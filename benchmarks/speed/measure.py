# SPDX-License-Identifier: Apache-2.0
"""Running one program and watching what its whole tree of processes holds in memory.

Promises to count detached descendants too, and to leave none behind.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

MARK = "VEIL_SPEED_RUN"
INTERVAL_S = 0.05
SHARE = 0.1
_PROC = Path("/proc")


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """What running a program showed.

    Attributes:
        code: its exit status; None when it was stopped at the limit.
        stdout: the last lines it wrote.
        stderr: the end of what it wrote there.
        process_seconds: from start to exit, imports included.
        peak_mb: largest sum of proportional set sizes (PSS) over all processes at one moment, in MiB.
        samples: how often that sum was taken.
    """

    code: int | None
    stdout: str
    stderr: str
    process_seconds: float
    peak_mb: float
    samples: int


class Tree:
    """A program's processes: its children and theirs, and whoever carries its mark in the environment.

    A daemon that leaves the tree keeps the mark; one that overwrites its environment was in the tree before. Process
    ids are kept with their start time, so that a number used again is not mistaken.
    """

    def __init__(self, root: int, mark: str) -> None:
        self._root = root
        self._mark = f"{MARK}={mark}".encode()
        self._members: set[tuple[int, str]] = set()
        self._strangers: set[tuple[int, str]] = set()

    def members(self) -> list[int]:
        """Ids of the processes that live now."""
        living = {pid: stat for pid in _pids() if (stat := _stat(pid)) is not None}
        known = {(pid, stat.started) for pid, stat in living.items()}
        self._members &= known
        self._strangers &= known
        inside = {pid for pid, _ in self._members}
        fresh = sorted(living.items(), key=lambda item: int(item[1].started))
        for pid, stat in fresh:
            identity = (pid, stat.started)
            if pid == self._root or stat.parent in inside or self._marked(identity):
                self._members.add(identity)
                inside.add(pid)
        return sorted(inside)

    def stop(self, patience_s: float = 5.0) -> None:
        """End every member that still lives, by its id."""
        deadline = time.monotonic() + patience_s
        while left := self.members():
            for pid in left:
                _send(pid, signal.SIGTERM if time.monotonic() < deadline else signal.SIGKILL)
            time.sleep(INTERVAL_S)

    def _marked(self, identity: tuple[int, str]) -> bool:
        if identity in self._strangers:
            return False
        try:
            environment = (_PROC / str(identity[0]) / "environ").read_bytes()
        except OSError:
            return False
        if self._mark in environment.split(b"\0"):
            return True
        if environment:
            self._strangers.add(identity)
        return False


@dataclass(frozen=True, slots=True)
class _Stat:
    parent: int
    started: str


def _pids() -> list[int]:
    return [int(entry.name) for entry in _PROC.iterdir() if entry.name.isdigit()]


def _stat(pid: int) -> _Stat | None:
    """Parent and start time of a process that lives; None for one that ended, or waits to be collected."""
    try:
        text = (_PROC / str(pid) / "stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    state, parent, *others = text[text.rindex(")") + 2 :].split()
    return None if state in "ZX" else _Stat(int(parent), others[17])


def held_kb(pid: int) -> int:
    """Proportional set size of one process: its own memory and its part of what it shares; 0 once it is gone."""
    try:
        lines = (_PROC / str(pid) / "smaps_rollup").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("Pss:")), 0)


def _send(pid: int, sign: signal.Signals) -> None:
    try:
        os.kill(pid, sign)
    except ProcessLookupError:
        return


def measure(
    command: Sequence[str], *, environment: Mapping[str, str], folder: Path, limit_s: float = 900.0
) -> Measured:
    """Run a program in a session of its own and sample the memory of its tree.

    Every 50 ms, or so much more seldom that sampling takes at most 10 % of one core.

    Args:
        command: the program and its arguments.
        environment: all that it sees of the environment.
        folder: an existing folder for what it writes to stdout and stderr.
        limit_s: it is stopped after so many seconds.
    """
    mark = uuid.uuid4().hex
    out, err = folder / "stdout.txt", folder / "stderr.txt"
    peak, samples = 0, 0
    started = time.monotonic()
    with out.open("wb") as stdout, err.open("wb") as stderr:
        child = subprocess.Popen(
            list(command), env={**environment, MARK: mark}, stdout=stdout, stderr=stderr, start_new_session=True
        )
        tree = Tree(child.pid, mark)
        try:
            while child.poll() is None and time.monotonic() - started < limit_s:
                before = time.thread_time()
                peak = max(peak, sum(held_kb(pid) for pid in tree.members()))
                samples += 1
                time.sleep(max(INTERVAL_S, (time.thread_time() - before) / SHARE))
            code = child.poll()
            seconds = time.monotonic() - started
        finally:
            tree.stop()
            child.wait()
    return Measured(
        code=code,
        stdout=_end(out),
        stderr=_end(err),
        process_seconds=round(seconds, 3),
        peak_mb=round(peak / 1024, 1),
        samples=samples,
    )


def _end(path: Path, size: int = 20_000) -> str:
    return path.read_bytes()[-size:].decode("utf-8", errors="replace")
