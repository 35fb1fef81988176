# SPDX-License-Identifier: Apache-2.0
"""Tests of `veil.client.workbench`: an executor that hangs, ends or does not start costs one answer, not the agent."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from veil.client import workbench as module
from veil.client.workbench import ExecutorLostError, Workbench

LONG_S = 30.0
SHORT_S = 0.3


@pytest.fixture
def open_bench(
    tmp_path: Path, fake_executor: str, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Workbench]]:
    """Workbenches with an executor that does what a frame tells it."""
    monkeypatch.setattr(module, "_RESTART_S", 0.0)
    opened: list[Workbench] = []

    def make(limit_s: float = LONG_S, name: str = fake_executor) -> Workbench:
        opened.append(Workbench(tmp_path / "site.toml", limit_s, name))
        return opened[-1]

    yield make
    for bench in opened:
        bench.close()


def is_gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def test_a_question_is_answered_by_one_executor_that_stays(open_bench: Callable[..., Workbench]) -> None:
    bench = open_bench()
    assert bench.pid is None
    assert bench.ask(b"abc") == b"cba"
    pid = bench.pid
    assert bench.ask(b"\x00" * 100_000 + b"1") == b"1" + b"\x00" * 100_000
    assert bench.pid == pid is not None


def test_an_executor_begun_is_the_one_that_answers(open_bench: Callable[..., Workbench]) -> None:
    bench = open_bench()
    bench.begin()
    pid = bench.pid
    assert bench.ask(b"abc") == b"cba"
    assert bench.pid == pid is not None


def test_one_begun_that_ended_before_it_answered_is_lost_once(open_bench: Callable[..., Workbench]) -> None:
    """A site that cannot be opened says so once: nothing is started behind the first failure."""
    bench = open_bench()
    bench.begin()
    pid = bench.pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    assert not bench.works()
    assert bench.pid is None
    assert bench.ask(b"abc") == b"cba"


def test_the_executor_is_told_which_site(open_bench: Callable[..., Workbench], tmp_path: Path) -> None:
    assert open_bench().ask(b"site") == str(tmp_path / "site.toml").encode()


@pytest.mark.parametrize(
    ("frame", "stopped"),
    [(b"hang", False), (b"stall", False), (b"x", True), (bytes(8 << 20), True)],
    ids=["hung", "hung in mid-answer", "stopped", "stopped before a large question"],
)
def test_a_hung_executor_is_ended_and_the_next_question_finds_a_new_one(
    frame: bytes, stopped: bool, open_bench: Callable[..., Workbench]
) -> None:
    bench = open_bench(SHORT_S)
    bench.ask(b"x")
    pid = bench.pid
    assert pid is not None
    if stopped:
        os.kill(pid, signal.SIGSTOP)
    with pytest.raises(ExecutorLostError, match="no answer within"):
        bench.ask(frame)
    assert is_gone(pid)
    assert bench.pid is None
    assert bench.ask(b"ab") == b"ba"
    assert bench.pid != pid


@pytest.mark.parametrize("how", [b"crash", b"close", b"half"])
def test_an_executor_that_ends_is_replaced(how: bytes, open_bench: Callable[..., Workbench]) -> None:
    bench = open_bench()
    with pytest.raises(ExecutorLostError):
        bench.ask(how)
    assert bench.pid is None
    assert bench.ask(b"ab") == b"ba"


def test_an_executor_killed_between_two_questions_is_replaced(open_bench: Callable[..., Workbench]) -> None:
    bench = open_bench()
    bench.ask(b"x")
    pid = bench.pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    assert bench.ask(b"ab") == b"ba"
    assert bench.pid != pid


def test_an_executor_that_does_not_start_is_lost(open_bench: Callable[..., Workbench], tmp_path: Path) -> None:
    (tmp_path / "modules" / "ends_at_once.py").write_text("raise SystemExit(4)\n", encoding="utf-8")
    bench = open_bench(name="ends_at_once")
    assert not bench.works()
    with pytest.raises(ExecutorLostError):
        bench.ask(b"x")


def test_a_new_executor_is_not_started_at_once_after_the_last(
    open_bench: Callable[..., Workbench], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A site that cannot be opened must not be opened a hundred times a second."""
    monkeypatch.setattr(module, "_RESTART_S", 1000.0)
    waited: list[float] = []
    monkeypatch.setattr(module, "time", SimpleNamespace(sleep=waited.append, monotonic=time.monotonic))
    bench = open_bench()
    for _ in range(2):
        with pytest.raises(ExecutorLostError):
            bench.ask(b"crash")
    assert waited[-1] > 900.0


def test_it_works_when_the_executor_answers(open_bench: Callable[..., Workbench]) -> None:
    bench = open_bench()
    assert bench.works()
    bench.close()
    assert bench.pid is None
    assert bench.works()


def test_it_works_while_at_work_and_no_longer_when_lost(open_bench: Callable[..., Workbench]) -> None:
    bench, lost = open_bench(), threading.Event()
    bench.ask(b"x")
    pid = bench.pid
    assert pid is not None

    def ask() -> None:
        try:
            bench.ask(b"hang")
        except ExecutorLostError:
            lost.set()

    thread = threading.Thread(target=ask)
    thread.start()
    while bench.busy_since is None:
        time.sleep(0.001)
    assert bench.works()
    os.kill(pid, signal.SIGKILL)
    thread.join()
    assert lost.is_set()
    assert bench.busy_since is None


def test_it_does_not_work_beyond_its_limit(
    open_bench: Callable[..., Workbench], monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = open_bench(limit_s=LONG_S)
    bench.ask(b"x")
    with bench._lock:
        bench.busy_since = time.monotonic() - LONG_S - 1
        seen: list[bool] = []
        other = threading.Thread(target=lambda: seen.append(bench.works()))
        other.start()
        other.join()
    assert seen == [False]


def test_closing_ends_the_executor(open_bench: Callable[..., Workbench]) -> None:
    bench = open_bench()
    bench.ask(b"x")
    pid = bench.pid
    assert pid is not None
    bench.close()
    bench.close()
    assert is_gone(pid)
