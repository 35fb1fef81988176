# SPDX-License-Identifier: Apache-2.0
"""Tests of `veil.client.ledger`: whatever happens, no answer leaves without its line, and no line is ever lost."""

from __future__ import annotations

import hashlib
import math
import os
import random
import signal
import sqlite3
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from veil.client.ledger import Claim, Entry, Ledger
from veil.client.ledger import total as total_of
from veil.common.errors import RefusalCode, RefusalError
from veil.common.privacy import Mechanism, spent
from veil.common.schedule import Release, ReleaseKind

MECHANISM = Mechanism(noise_multiplier=8.0, max_grad_norm=0.5)


def release(round_: int = 1, *, kind: ReleaseKind = ReleaseKind.GRADIENT, sigma: float = 8.0) -> Release:
    return Release(round=round_, kind=kind, mechanism=Mechanism(noise_multiplier=sigma, max_grad_norm=0.5))


def allow(_: Sequence[Entry]) -> None:
    """A review that finds nothing."""


def spend(ledger: Ledger, round_: int = 1, *, job: str = "job", noise: str = "os", sigma: float = 8.0) -> Claim:
    return ledger.spend(job, release(round_, sigma=sigma), noise=noise, plan="0" * 64, review=allow)


def lines(path: Path) -> list[tuple[str, str, int, str, int, str, bytes | None]]:
    """The file as another program reads it."""
    with sqlite3.connect(path) as other:
        found = other.execute("SELECT site, job, round, kind, attempt, noise, reply FROM spend ORDER BY seq").fetchall()
    other.close()
    return found


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.sqlite"


@pytest.fixture
def ledger(open_ledger: Callable[..., Ledger]) -> Ledger:
    return open_ledger()


def test_a_spend_is_there_for_others_before_it_returns(ledger: Ledger, path: Path) -> None:
    claim = spend(ledger)
    assert claim.reply is None
    assert lines(path) == [("Ulm", "job", 1, "gradient", 0, "os", None)]


def test_the_file_is_synced_at_every_commit(ledger: Ledger) -> None:
    """WAL with synchronous = FULL (2): a commit survives a power cut."""
    assert ledger._db.execute("PRAGMA synchronous").fetchone() == (2,)
    assert ledger._db.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_the_same_round_gets_the_same_bytes_and_no_second_spend(ledger: Ledger, path: Path) -> None:
    first = spend(ledger)
    ledger.record_reply(first, b"noised")
    again = spend(ledger)
    assert (again.seq, again.reply) == (first.seq, b"noised")
    assert len(lines(path)) == 1


def test_a_replay_outlives_the_process_and_needs_no_review(
    ledger: Ledger, open_ledger: Callable[..., Ledger], path: Path
) -> None:
    ledger.record_reply(spend(ledger), b"noised")
    ledger.close()

    def refuse(_: Sequence[Entry]) -> None:
        raise AssertionError("an answer that was paid for needs no budget")

    again = open_ledger().spend("job", release(), noise="os", plan="0" * 64, review=refuse)
    assert again.reply == b"noised"


def test_a_crash_between_spend_and_reply_burns_the_line(ledger: Ledger, path: Path) -> None:
    """The second attempt is a second spend; both count for ever."""
    lost = spend(ledger)
    second = spend(ledger)
    assert second.reply is None
    assert second.seq != lost.seq
    assert [(line[4], line[6]) for line in lines(path)] == [(0, None), (1, None)]
    assert ledger.spent(1e-5).epsilon == spent([MECHANISM] * 2, 1e-5).epsilon
    ledger.record_reply(second, b"noised")
    assert spend(ledger).reply == b"noised"
    assert ledger.spent(1e-5).epsilon == spent([MECHANISM] * 2, 1e-5).epsilon


def test_a_reply_is_stored_once(ledger: Ledger, path: Path) -> None:
    claim = spend(ledger)
    ledger.record_reply(claim, b"first")
    ledger.record_reply(claim, b"second")
    assert spend(ledger).reply == b"first"


def test_an_empty_reply_is_a_reply(ledger: Ledger) -> None:
    ledger.record_reply(spend(ledger), b"")
    assert spend(ledger).reply == b""


def test_a_refusal_leaves_the_ledger_as_it_was(ledger: Ledger, path: Path) -> None:
    spend(ledger, 1)
    before = lines(path)
    seen: list[Entry] = []

    def refuse(entries: Sequence[Entry]) -> None:
        seen.extend(entries)
        raise RefusalError(RefusalCode.BUDGET, "too much", "less", "fewer rounds")

    with pytest.raises(RefusalError):
        ledger.spend("job", release(2), noise="os", plan="0" * 64, review=refuse)
    assert lines(path) == before
    assert seen == [Entry(job="job", round=1, mechanism=MECHANISM, noise="os", plan="0" * 64)]
    assert spend(ledger, 2).reply is None


@pytest.mark.parametrize(
    "other",
    [
        {"job": "another"},
        {"release": release(2)},
        {"release": release(kind=ReleaseKind.DELTA)},
        {"site": "Graz"},
    ],
    ids=["job", "round", "kind", "site"],
)
def test_another_release_is_another_spend(
    other: dict[str, object], ledger: Ledger, open_ledger: Callable[..., Ledger], path: Path
) -> None:
    ledger.record_reply(spend(ledger), b"noised")
    elsewhere = open_ledger(str(other.get("site", "Ulm")))
    which = other.get("release", release())
    assert isinstance(which, Release)
    claim = elsewhere.spend(str(other.get("job", "job")), which, noise="os", plan="0" * 64, review=allow)
    assert claim.reply is None
    assert len(lines(path)) == 2


def test_entries_come_back_in_order_and_to_the_last_bit(ledger: Ledger, open_ledger: Callable[..., Ledger]) -> None:
    odd = Mechanism(noise_multiplier=math.pi, max_grad_norm=0.1, sample_rate=1 / 3, steps=7)
    ledger.spend("b", Release(round=4, kind=ReleaseKind.DELTA, mechanism=odd), noise="os", plan="", review=allow)
    spend(ledger, 1, job="a")
    spend(open_ledger("Graz"), 1, job="a")
    assert open_ledger().entries() == (
        Entry(job="b", round=4, mechanism=odd, noise="os", plan=""),
        Entry(job="a", round=1, mechanism=MECHANISM, noise="os", plan="0" * 64),
    )


def test_the_cost_is_that_of_the_lines(ledger: Ledger) -> None:
    for round_ in range(1, 6):
        spend(ledger, round_, job="a")
    spend(ledger, 1, job="b", sigma=4.0)
    other = Mechanism(noise_multiplier=4.0, max_grad_norm=0.5)
    assert ledger.spent(1e-5).epsilon == spent([MECHANISM] * 5 + [other], 1e-5).epsilon
    assert ledger.spent(1e-5, "a").epsilon == spent([MECHANISM] * 5, 1e-5).epsilon
    assert ledger.spent(1e-5, "b").epsilon == spent([other], 1e-5).epsilon
    assert ledger.spent(1e-5, "never").epsilon == 0.0
    assert total_of(ledger.entries(), 1e-5, "a") == ledger.spent(1e-5, "a")


@pytest.mark.parametrize("noise", ["fixed", "none", "", "OS"])
def test_one_line_without_private_noise_makes_the_cost_infinite(noise: str, ledger: Ledger) -> None:
    spend(ledger, 1, job="a")
    spend(ledger, 1, job="b", noise=noise)
    assert ledger.spent(1e-5).epsilon == math.inf
    assert ledger.spent(1e-5, "b").epsilon == math.inf
    assert ledger.spent(1e-5, "a").epsilon < math.inf


def test_a_copy_holds_every_line_of_every_site(
    ledger: Ledger, open_ledger: Callable[..., Ledger], path: Path, tmp_path: Path
) -> None:
    ledger.record_reply(spend(ledger), b"noised")
    spend(open_ledger("Graz"))
    ledger.copy_to(tmp_path / "copy.sqlite")
    assert lines(tmp_path / "copy.sqlite") == lines(path)
    assert sorted(file.name for file in tmp_path.glob("copy*")) == ["copy.sqlite"]


def answers(path: Path, rounds: int) -> list[str]:
    """One site process: draws each round's answer, gives what it may give."""
    ledger, given = Ledger(path, "Ulm"), []
    for round_ in range(rounds):
        claim = spend(ledger, round_)
        reply = claim.reply
        if reply is None:
            reply = os.urandom(16)
            ledger.record_reply(claim, reply)
        given.append(f"{round_} {reply.hex()}")
    ledger.close()
    return given


def check_race(path: Path, given: Sequence[str], racers: int, rounds: int) -> None:
    """Distinct answers of a round are at most its lines, and each answer that left was paid for."""
    assert len(given) == racers * rounds
    spends = [line[2] for line in lines(path)]
    for round_ in range(rounds):
        distinct = {one for one in given if one.startswith(f"{round_} ")}
        assert 1 <= len(distinct) <= spends.count(round_)
    stored = {f"{line[2]} {line[6].hex()}" for line in lines(path) if line[6] is not None}
    assert set(given) <= stored


def test_threads_that_race_for_a_round_pay_for_every_answer(ledger: Ledger, path: Path) -> None:
    """Four connections, ten rounds, one gate."""
    gate, given = threading.Barrier(4), []

    def racer() -> None:
        gate.wait()
        given.extend(answers(path, 10))

    threads = [threading.Thread(target=racer) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    check_race(path, given, 4, 10)


def forked(work: Callable[[int], None]) -> tuple[int, int]:
    """A child process that writes to the returned pipe; it never returns into the test."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        try:
            work(writing)
        finally:
            os._exit(0)
    os.close(writing)
    return child, reading


def read_all(reading: int) -> list[str]:
    with os.fdopen(reading, "rb") as pipe:
        return [line for line in pipe.read().decode().split("\n")[:-1] if line]


def test_processes_that_race_for_a_round_pay_for_every_answer(ledger: Ledger, path: Path) -> None:
    start = time.monotonic() + 0.05

    def racer(writing: int) -> None:
        time.sleep(max(0.0, start - time.monotonic()))
        os.write(writing, "".join(f"{one}\n" for one in answers(path, 10)).encode())

    children = [forked(racer) for _ in range(4)]
    given = [line for _, reading in children for line in read_all(reading)]
    for child, _ in children:
        os.waitpid(child, 0)
    check_race(path, given, 4, 10)


def test_one_connection_shared_by_threads_pays_for_every_answer(ledger: Ledger, path: Path) -> None:
    """Threads wait for each other; without that, a statement's error can be lost and an answer leave unpaid."""
    gate, given, failed = threading.Barrier(4), [], []

    def racer() -> None:
        gate.wait()
        for round_ in range(20):
            try:
                claim = spend(ledger, round_)
                reply = claim.reply or os.urandom(16)
                ledger.record_reply(claim, reply)
            except (sqlite3.Error, SystemError) as error:
                failed.append(repr(error))
                continue
            given.append((round_, reply))

    threads = [threading.Thread(target=racer) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    spends = [line[2] for line in lines(path)]
    for round_ in range(20):
        assert len({reply for one, reply in given if one == round_}) <= spends.count(round_)


def test_kill_9_at_any_instant_loses_no_line(ledger: Ledger, path: Path) -> None:
    """Forty processes killed while they draw and answer: every answer that got out has its line and its bytes."""
    random_ = random.Random(0)  # noqa: S311
    out, reached = [], []

    def site(job: str) -> Callable[[int], None]:
        def work(writing: int) -> None:
            mine = Ledger(path, "Ulm")
            os.write(writing, b"ready\n")
            for round_ in range(10_000):
                claim = spend(mine, round_, job=job)
                reply = hashlib.sha256(os.urandom(8)).digest()
                mine.record_reply(claim, reply)
                os.write(writing, f"{job} {round_} {reply.hex()}\n".encode())

        return work

    for attempt in range(40):
        child, reading = forked(site(f"job{attempt}"))
        assert os.read(reading, 6) == b"ready\n"
        time.sleep(random_.uniform(0.0, 0.03))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        said = read_all(reading)
        out += said
        reached.append(len(said))
    stored = {f"{line[1]} {line[2]} {line[6].hex()}" for line in lines(path) if line[6] is not None}
    assert set(out) <= stored
    assert len(set(reached)) > 3
    assert len(out) <= len(lines(path))
    unanswered = [line for line in lines(path) if line[6] is None]
    for _, job, round_, *_ in unanswered:
        assert spend(ledger, round_, job=job).reply is None
    assert len(ledger.entries()) == len(stored) + 2 * len(unanswered)


def test_a_ledger_that_answers_first_and_writes_later_fails_the_same_check(ledger: Ledger, path: Path) -> None:
    """The near lie: the order answer, spend."""

    def site(writing: int) -> None:
        mine = Ledger(path, "Ulm")
        for round_ in range(10_000):
            os.write(writing, f"{round_}\n".encode())
            time.sleep(5.0)
            spend(mine, round_)

    child, reading = forked(site)
    assert os.read(reading, 2) == b"0\n"
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(reading)
    assert lines(path) == []
