# SPDX-License-Identifier: Apache-2.0
"""Tests of `veil.client.ledger`: whatever happens, no answer leaves without its line, and no line is ever lost."""

from __future__ import annotations

import json
import math
import os
import resource
import signal
import sqlite3
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from datetime import UTC, datetime, tzinfo
from pathlib import Path
from typing import Any

import pytest

from veil.client import ledger as module
from veil.client.anchor import Anchor, read_anchor
from veil.client.books import WRITE_OFF
from veil.client.ledger import Claim, Entry, Ledger, entries_by_site, entries_of
from veil.client.ledger import total as total_of
from veil.client.lines import LineFile
from veil.client.verification import verify
from veil.common.errors import InputError, RefusalCode, RefusalError
from veil.common.keys import NodeKey
from veil.common.privacy import Mechanism, PrivacyUnit, spent
from veil.common.schedule import Release, ReleaseKind

MECHANISM = Mechanism(noise_multiplier=8.0, max_grad_norm=0.5)


def release(round_: int = 1, *, kind: ReleaseKind = ReleaseKind.GRADIENT, sigma: float = 8.0) -> Release:
    return Release(round=round_, kind=kind, mechanism=Mechanism(noise_multiplier=sigma, max_grad_norm=0.5))


def allow(_: Sequence[Entry]) -> None:
    """A review that finds nothing."""


def spend(ledger: Ledger, round_: int = 1, *, job: str = "job", noise: str = "os", sigma: float = 8.0) -> Claim:
    return ledger.spend(job, release(round_, sigma=sigma), noise=noise, plan="0" * 64, review=allow)


def lines(path: Path) -> list[tuple[str, str, int, str, int, str, bytes | None]]:
    """The spends and their replies, as another program reads the file."""
    with closing(sqlite3.connect(path)) as other:
        bodies = [
            (site, json.loads(body)) for site, body in other.execute("SELECT site, body FROM line ORDER BY site, seq")
        ]
        replies = {(site, spend): content for site, spend, content in other.execute("SELECT * FROM reply")}
    return [
        (
            site,
            *(body[name] for name in ("job", "round", "release", "attempt", "noise")),
            replies.get((site, body["seq"])),
        )
        for site, body in bodies
        if body["kind"] == "spend"
    ]


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


def test_of_two_draws_at_the_same_time_one_leaves(ledger: Ledger, path: Path) -> None:
    """A second delivery while the first is being worked on: both are paid, and both are answered alike."""
    first, second = spend(ledger), spend(ledger)
    assert ledger.record_reply(second, b"second's") == b"second's"
    assert ledger.record_reply(first, b"first's") == b"second's"
    assert spend(ledger).reply == b"second's"
    assert [line[6] for line in lines(path)] == [None, b"second's"]


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


def answers(path: Path, key: NodeKey, rounds: int) -> list[str]:
    """One site process: draws each round's answer, gives what it may give."""
    ledger, given = Ledger(path, "Ulm", key), []
    for round_ in range(rounds):
        claim = spend(ledger, round_)
        reply = claim.reply
        if reply is None:
            reply = ledger.record_reply(claim, os.urandom(16))
        given.append(f"{round_} {reply.hex()}")
    ledger.close()
    return given


def check_race(path: Path, given: Sequence[str], racers: int, rounds: int) -> None:
    """All racers gave the same answer to a round, and it was paid for."""
    assert len(given) == racers * rounds
    spends = [line[2] for line in lines(path)]
    for round_ in range(rounds):
        distinct = {one for one in given if one.startswith(f"{round_} ")}
        assert len(distinct) == 1 <= spends.count(round_)
    stored = {f"{line[2]} {line[6].hex()}" for line in lines(path) if line[6] is not None}
    assert set(given) <= stored


def test_threads_that_race_for_a_round_pay_for_every_answer(ledger: Ledger, path: Path, key: NodeKey) -> None:
    """Four connections, ten rounds, one gate."""
    gate, given = threading.Barrier(4), []

    def racer() -> None:
        gate.wait()
        given.extend(answers(path, key, 10))

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


def test_processes_that_race_for_a_round_pay_for_every_answer(ledger: Ledger, path: Path, key: NodeKey) -> None:
    start = time.monotonic() + 0.05

    def racer(writing: int) -> None:
        time.sleep(max(0.0, start - time.monotonic()))
        os.write(writing, "".join(f"{one}\n" for one in answers(path, key, 10)).encode())

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
                reply = claim.reply or ledger.record_reply(claim, os.urandom(16))
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
        assert len({reply for one, reply in given if one == round_}) == 1 <= spends.count(round_)


def test_an_agent_that_is_there_keeps_others_out(path: Path, key: NodeKey, tmp_path: Path) -> None:
    """Also under another name of the file; the message says whom to stop."""
    with closing(Ledger(path, "Ulm", key, anchor=tmp_path / "anchor.json")):
        (tmp_path / "alias.sqlite").symlink_to(path)
        for name in (path, tmp_path / "alias.sqlite"):
            with pytest.raises(InputError, match=f"in use by process {os.getpid()}"):
                Ledger(name, "Ulm", key, anchor=tmp_path / "anchor.json")
    Ledger(path, "Ulm", key, anchor=tmp_path / "anchor.json").close()


def test_a_killed_agent_keeps_nobody_out(path: Path, key: NodeKey, tmp_path: Path) -> None:
    def site(writing: int) -> None:
        mine = Ledger(path, "Ulm", key, anchor=tmp_path / "anchor.json")
        mine.record_reply(spend(mine), b"noised")
        os.write(writing, b"ready\n")
        signal.pause()

    child, reading = forked(site)
    assert os.read(reading, 6) == b"ready\n"
    with pytest.raises(InputError, match=f"in use by process {child}"):
        Ledger(path, "Ulm", key, anchor=tmp_path / "anchor.json")
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(reading)
    with closing(Ledger(path, "Ulm", key, anchor=tmp_path / "anchor.json")) as successor:
        assert spend(successor).reply == b"noised"


class Clock:
    """A clock that shows what it is told."""

    def __init__(self, *shows: datetime) -> None:
        self._shows = list(shows)

    def now(self, zone: tzinfo) -> datetime:
        return self._shows.pop(0).astimezone(zone)


def test_a_clock_that_jumps_changes_nothing(
    ledger: Ledger, path: Path, key: NodeKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lines count by their number; the time is told and never relied on."""
    today, past = datetime(2026, 1, 1, tzinfo=UTC), datetime(1970, 1, 1, tzinfo=UTC)
    monkeypatch.setattr(module, "datetime", Clock(today, past, datetime(9999, 12, 31, tzinfo=UTC), past, past))
    for round_ in range(5):
        spend(ledger, round_)
    assert [entry.round for entry in ledger.entries()] == list(range(5))
    assert verify(path, "Ulm", key.public_pem).findings == ()


@pytest.fixture
def anchored(path: Path, tmp_path: Path, key: NodeKey) -> Callable[..., Ledger]:
    """The ledger with its anchor, opened anew."""

    def connect(**options: Any) -> Ledger:
        return Ledger(path, "Ulm", key, anchor=tmp_path / "anchor.json", **options)

    return connect


def copied(path: Path) -> dict[Path, bytes]:
    """The ledger's files as a backup has them."""
    return {file: file.read_bytes() for file in path.parent.glob(f"{path.name}*")}


def put_back(path: Path, copy: dict[Path, bytes]) -> None:
    for file in path.parent.glob(f"{path.name}*"):
        file.unlink()
    for file, content in copy.items():
        file.write_bytes(content)


def grow(connect: Callable[..., Ledger], rounds: Sequence[int]) -> None:
    with closing(connect()) as ledger:
        for round_ in rounds:
            ledger.record_reply(spend(ledger, round_), b"noised")


def test_an_older_copy_is_refused_and_not_continued(anchored: Callable[..., Ledger], path: Path) -> None:
    grow(anchored, [1])
    copy = copied(path)
    grow(anchored, [2])
    put_back(path, copy)
    with pytest.raises(RefusalError, match="ends at line 2, and its anchor remembers line 4") as caught:
        anchored()
    assert caught.value.code is RefusalCode.LEDGER
    assert len(lines(path)) == 1


def test_an_older_copy_that_grew_elsewhere_is_refused(
    anchored: Callable[..., Ledger], path: Path, key: NodeKey
) -> None:
    """It has the number that the anchor remembers, and another line there."""
    grow(anchored, [1])
    copy = copied(path)
    grow(anchored, [2])
    put_back(path, copy)
    grow(lambda: Ledger(path, "Ulm", key), [3, 4])
    with pytest.raises(RefusalError, match="line 4 is not the one that its anchor remembers"):
        anchored()


@pytest.mark.parametrize("lost", ["ledger.sqlite", "anchor.json"])
def test_a_lost_ledger_or_anchor_is_refused_and_not_made_anew(
    lost: str, anchored: Callable[..., Ledger], tmp_path: Path
) -> None:
    grow(anchored, [1])
    (tmp_path / lost).unlink()
    with pytest.raises(RefusalError):
        anchored()
    assert not (tmp_path / lost).exists()


def test_lines_that_were_cut_off_under_a_running_agent_are_found_at_the_next_spend(
    anchored: Callable[..., Ledger], path: Path
) -> None:
    with closing(anchored()) as ledger:
        spend(ledger, 1)
        spend(ledger, 2)
        with closing(sqlite3.connect(path)) as other, other:
            other.execute("DROP TRIGGER line_kept")
            other.execute("DELETE FROM line WHERE seq = 2")
        with pytest.raises(RefusalError, match="line 2 is not what was written"):
            spend(ledger, 3)


def test_an_anchor_that_a_crash_left_behind_follows(
    anchored: Callable[..., Ledger], path: Path, tmp_path: Path, key: NodeKey
) -> None:
    grow(anchored, [1])
    behind = (tmp_path / "anchor.json").read_bytes()
    grow(anchored, [2])
    (tmp_path / "anchor.json").write_bytes(behind)
    anchored().close()
    assert verify(path, "Ulm", key.public_pem, anchor=tmp_path / "anchor.json").findings == ()
    assert (tmp_path / "anchor.json").read_bytes() != behind


def test_a_recorded_reply_leaves_only_once_the_anchor_knows_it(
    anchored: Callable[..., Ledger], tmp_path: Path, key: NodeKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The anchor's disk fails after the commit: no answer, and none at the second delivery until it is back."""

    def fail(_: Anchor) -> None:
        raise RefusalError(RefusalCode.LEDGER, "the anchor's disk", "one that is there", "repair it")

    with closing(anchored()) as ledger:
        claim = spend(ledger)
        with monkeypatch.context() as patch:
            patch.setattr(Anchor, "publish", fail)
            with pytest.raises(RefusalError):
                ledger.record_reply(claim, b"noised")
            with pytest.raises(RefusalError):
                spend(ledger)
        assert spend(ledger).reply == b"noised"
        anchor = read_anchor(tmp_path / "anchor.json", key.public_pem)
        assert anchor is not None
        assert anchor.hash == ledger.head()


def test_a_write_off_counts_what_was_lost_and_starts_over(anchored: Callable[..., Ledger], path: Path) -> None:
    """Also for heads that others remember: the anchor's, and those that are named."""
    grow(anchored, [1])
    copy = copied(path)
    grow(anchored, [2, 3])
    with closing(anchored()) as ledger:
        lost = ledger.head()
    put_back(path, copy)
    with closing(anchored(recovering=True)) as ledger:
        with pytest.raises(RefusalError, match="its anchor remembers line 6"):
            spend(ledger, 9)
        ledger.write_off(2.0, 1e-5, "the disk broke", unit=PrivacyUnit.RECORD, covers=["5" * 64])
        assert ledger.knows(lost)
        assert ledger.knows("5" * 64)
        assert not ledger.knows("6" * 64)
        assert ledger.spent(1e-5, WRITE_OFF).epsilon >= 2.0
        assert ledger.spent(1e-5).epsilon > 2.0
    grow(anchored, [9])


@pytest.mark.parametrize("epsilon", [1e-3, 0.5, 8.0, 100.0])
@pytest.mark.parametrize("delta", [1e-9, 1e-5])
def test_a_write_off_costs_no_less_than_it_says(epsilon: float, delta: float, ledger: Ledger) -> None:
    ledger.write_off(epsilon, delta, "", unit=PrivacyUnit.PATIENT)
    assert epsilon <= ledger.spent(delta).epsilon < 1.001 * epsilon


@pytest.mark.parametrize(("epsilon", "delta"), [(0.0, 1e-5), (-1.0, 1e-5), (math.nan, 1e-5), (math.inf, 1e-5), (1, 0)])
def test_a_write_off_of_nothing_that_noise_can_cost_is_an_error(epsilon: float, delta: float, ledger: Ledger) -> None:
    with pytest.raises(InputError):
        ledger.write_off(epsilon, delta, "", unit=PrivacyUnit.RECORD)
    assert ledger.entries() == ()


def test_a_ledger_knows_its_heads_and_no_others(ledger: Ledger, open_ledger: Callable[..., Ledger]) -> None:
    heads = [ledger.head()]
    for round_ in range(3):
        spend(ledger, round_)
        heads.append(ledger.head())
    assert len(set(heads)) == 4
    assert all(open_ledger().knows(head) for head in heads)
    assert not open_ledger("Graz").knows(heads[-1])


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE line SET body = replace(body, '\"round\":1', '\"round\":2') WHERE seq = 1",
        "UPDATE line SET body = 'nothing' WHERE seq = 1",
        "DELETE FROM line WHERE seq = 1",
        "UPDATE line SET signature = x'00' WHERE seq = 2",
        "UPDATE line SET seq = 9 WHERE seq = 2",
    ],
)
def test_a_ledger_that_was_changed_is_not_continued(
    change: str, ledger: Ledger, open_ledger: Callable[..., Ledger], path: Path
) -> None:
    ledger.record_reply(spend(ledger, 1), b"noised")
    spend(ledger, 2)
    tamper(path, change)
    with pytest.raises(RefusalError, match="veil site ledger verify") as caught:
        open_ledger()
    assert caught.value.code is RefusalCode.LEDGER


@pytest.mark.parametrize("change", ["UPDATE reply SET bytes = x'00'", "DELETE FROM reply"])
def test_a_reply_that_was_changed_does_not_leave(change: str, ledger: Ledger, path: Path) -> None:
    ledger.record_reply(spend(ledger), b"noised")
    tamper(path, change)
    with pytest.raises(RefusalError, match="is not what was stored"):
        spend(ledger)


def test_lines_are_read_unchecked_and_refused_when_they_are_none(ledger: Ledger, path: Path) -> None:
    spend(ledger)
    assert entries_of(path, "Ulm") == ledger.entries()
    tamper(path, "UPDATE line SET body = 'nothing'")
    with pytest.raises(RefusalError, match="a line that says nothing"):
        entries_of(path, "Ulm")


def test_ledgers_of_many_sites_share_one_open_file(path: Path, key: NodeKey) -> None:
    """Threads at work on several sites at once: every chain is whole, and a line added elsewhere is seen."""
    with closing(LineFile(path, durable=False)) as file:
        sites = {name: Ledger(path, name, key, file=file) for name in ("Graz", "Linz", "Ulm")}

        def work(name: str) -> None:
            for round_ in range(1, 9):
                claim = spend(sites[name], round_)
                sites[name].record_reply(claim, name.encode())

        with ThreadPoolExecutor(3) as pool:
            list(pool.map(work, sites))
        with closing(Ledger(path, "Ulm", key)) as elsewhere:
            spend(elsewhere, 9)
        assert {name: len(one.entries()) for name, one in sites.items()} == {"Graz": 8, "Linz": 8, "Ulm": 9}
        for name, one in sites.items():
            one.close()
            assert spend(sites[name], 10).seq == 2 * 8 + 1 + (name == "Ulm")
    assert entries_by_site(path) == {name: entries_of(path, name) for name in sites}


def tamper(path: Path, change: str) -> None:
    """Someone with the file and another program."""
    with closing(sqlite3.connect(path)) as other, other:
        for trigger in ("line_stays", "line_kept", "reply_stays", "reply_kept"):
            other.execute(f"DROP TRIGGER {trigger}")
        other.execute(change)


@pytest.mark.parametrize("room", range(42_000, 90_000, 4_777))
def test_a_full_disk_lets_nothing_out_and_loses_nothing(
    room: int, anchored: Callable[..., Ledger], path: Path, tmp_path: Path, key: NodeKey
) -> None:
    """No file may grow beyond `room` bytes, as the system enforces it; then there is room again."""

    def site(writing: int) -> None:
        with closing(anchored()) as ledger:
            _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, most))
            try:
                for round_ in range(100):
                    os.write(writing, f"asked {round_}\n".encode())
                    reply = ledger.record_reply(spend(ledger, round_), os.urandom(1500))
                    os.write(writing, f"answered {round_} {reply.hex()}\n".encode())
            except RefusalError as error:
                os.write(writing, f"refused {error.code}\n".encode())
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
            ledger.record_reply(spend(ledger, 1000), b"")
            os.write(writing, b"answered 1000 \n")

    child, reading = forked(site)
    said = read_all(reading)
    os.waitpid(child, 0)
    assert said[-2:] == ["refused ledger", "answered 1000 "]
    stored = {f"answered {line[2]} {line[6].hex()}" for line in lines(path) if line[6] is not None}
    assert {one for one in said if one.startswith("answered")} <= stored
    assert verify(path, "Ulm", key.public_pem, anchor=tmp_path / "anchor.json").findings == ()
    grow(anchored, [1001])


@pytest.mark.parametrize("step", ["spend", "reply"])
def test_a_database_without_room_refuses_each_step(step: str, ledger: Ledger, path: Path) -> None:
    """SQLite's own limit of pages: the step is refused, and done once there is room."""
    database = ledger._open_file._db
    claim = spend(ledger)
    (pages,) = database.execute("PRAGMA page_count").fetchone()
    database.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(RefusalError, match=r"disk is full.*a disk with room") as caught:
        for round_ in range(2, 100):
            if step == "spend":
                spend(ledger, round_)
            else:
                ledger.record_reply(claim, bytes(100_000))
    assert caught.value.code is RefusalCode.LEDGER
    before = lines(path)
    database.execute("PRAGMA max_page_count = 1000000")
    ledger.record_reply(claim, b"noised")
    assert [line[6] for line in lines(path)] == [b"noised", *(line[6] for line in before[1:])]


def test_an_anchor_without_room_refuses_before_the_line(
    anchored: Callable[..., Ledger], path: Path, tmp_path: Path
) -> None:
    with closing(anchored()) as ledger:
        claim = spend(ledger, 1)
        (tmp_path / "anchor.json.new").mkdir()
        with pytest.raises(RefusalError, match="anchor"):
            spend(ledger, 2)
        with pytest.raises(RefusalError, match="anchor"):
            ledger.record_reply(claim, b"noised")
        assert [(line[2], line[6]) for line in lines(path)] == [(1, None)]
        (tmp_path / "anchor.json.new").rmdir()
        ledger.record_reply(claim, b"noised")
        assert spend(ledger, 1).reply == b"noised"
