# SPDX-License-Identifier: Apache-2.0
"""Tests of `veil.client.verification`: whatever was done to a ledger's file, it is found, and nothing else is."""

from __future__ import annotations

import random
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from veil.client.chain import Fault
from veil.client.ledger import Entry, Ledger
from veil.client.lines import LineFile
from veil.client.site_file import read_site_file
from veil.client.verification import verify
from veil.common.errors import InputError, RefusalError
from veil.common.keys import NodeKey
from veil.common.privacy import Mechanism
from veil.common.schedule import Release, ReleaseKind

SEED = 7
CHANGES = 600
MECHANISM = Mechanism(noise_multiplier=8.0, max_grad_norm=0.5)
ROUNDS = 3


def allow(_: Sequence[Entry]) -> None:
    """A review that finds nothing."""


def answer(ledger: Ledger, round_: int) -> None:
    release = Release(round=round_, kind=ReleaseKind.GRADIENT, mechanism=MECHANISM)
    claim = ledger.spend("job", release, noise="os", plan="0" * 64, review=allow)
    ledger.record_reply(claim, b"noised %d" % round_)


@pytest.fixture
def path(tmp_path: Path, key: NodeKey) -> Path:
    """A closed ledger of three answered rounds and six lines, with its anchor; the last line is a reply's."""
    with closing(Ledger(tmp_path / "ledger.sqlite", "Ulm", key, anchor=tmp_path / "anchor.json")) as ledger:
        for round_ in range(ROUNDS):
            answer(ledger, round_)
    return tmp_path / "ledger.sqlite"


@pytest.fixture
def faults(path: Path, key: NodeKey) -> Callable[..., list[tuple[int, Fault]]]:
    def found(*, anchor: bool = True) -> list[tuple[int, Fault]]:
        where = path.with_name("anchor.json") if anchor else None
        findings = verify(path, "Ulm", key.public_pem, anchor=where).findings
        return [(finding.seq, finding.fault) for finding in findings]

    return found


def tamper(path: Path, *changes: str) -> None:
    """Someone with the file and another program."""
    with closing(sqlite3.connect(path)) as other, other:
        for trigger in ("line_stays", "line_kept", "reply_stays", "reply_kept"):
            other.execute(f"DROP TRIGGER IF EXISTS {trigger}")
        for change in changes:
            other.execute(change)


def rows(path: Path) -> tuple[Any, ...]:
    """All that a site's ledger says."""
    with closing(LineFile(path, reading=True)) as file:
        lines = file.lines("Ulm")
        return lines, [file.reply("Ulm", line.seq) for line in lines], file.reply_digests("Ulm")


def test_an_untouched_ledger_has_no_findings(path: Path, key: NodeKey) -> None:
    found = verify(path, "Ulm", key.public_pem, anchor=path.with_name("anchor.json"))
    assert found.findings == ()
    assert found.lines == 2 * ROUNDS
    with closing(Ledger(path, "Ulm", key)) as ledger:
        assert found.head == ledger.head()


def test_it_is_checked_beside_a_running_agent(path: Path, key: NodeKey) -> None:
    anchor = path.with_name("anchor.json")
    with closing(Ledger(path, "Ulm", key, anchor=anchor)) as ledger:
        for round_ in range(ROUNDS, 8):
            answer(ledger, round_)
            assert verify(path, "Ulm", key.public_pem, anchor=anchor).findings == ()


def test_an_answer_that_is_recorded_during_the_check_is_no_finding(
    path: Path, key: NodeKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the reading of the lines and that of the replies."""
    real = LineFile.lines

    def slow(file: LineFile, site: str, since: int | None = None) -> Any:
        lines = real(file, site, since)
        with monkeypatch.context() as patch:
            patch.setattr(LineFile, "lines", real)
            with closing(Ledger(path, "Ulm", key)) as ledger:
                answer(ledger, 77)
        return lines

    with closing(Ledger(path, "Ulm", key)):
        monkeypatch.setattr(LineFile, "lines", slow)
        assert verify(path, "Ulm", key.public_pem).findings == ()


def test_a_copy_is_checked_without_the_agents_files(path: Path, key: NodeKey, tmp_path: Path) -> None:
    with closing(Ledger(path, "Ulm", key)) as ledger:
        ledger.copy_to(tmp_path / "copy.sqlite")
    assert verify(tmp_path / "copy.sqlite", "Ulm", key.public_pem).findings == ()


def test_checking_changes_nothing(path: Path, key: NodeKey) -> None:
    before = {file: file.read_bytes() for file in path.parent.iterdir()}
    verify(path, "Ulm", key.public_pem, anchor=path.with_name("anchor.json"))
    assert all(file.read_bytes() == content for file, content in before.items())


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("UPDATE line SET body = replace(body, '\"round\":1', '\"round\":2') WHERE seq = 3", [(3, Fault.CHANGED)]),
        ("UPDATE line SET body = body || ' ' WHERE seq = 6", [(6, Fault.CHANGED)]),
        ("UPDATE line SET prev = hash WHERE seq = 2", [(2, Fault.CHANGED)]),
        ("UPDATE line SET hash = prev WHERE seq = 5", [(5, Fault.CHANGED)]),
        ("UPDATE line SET signature = x'' WHERE seq = 1", [(1, Fault.SIGNATURE)]),
        ("DELETE FROM line WHERE seq = 1", [(1, Fault.REMOVED)]),
        ("DELETE FROM line WHERE seq = 3", [(3, Fault.REMOVED)]),
        ("DELETE FROM line WHERE seq = 5", [(5, Fault.REMOVED)]),
        ("UPDATE reply SET bytes = x'00' WHERE spend = 3", [(4, Fault.REPLY)]),
        ("DELETE FROM reply WHERE spend = 1", [(2, Fault.REPLY)]),
        ("INSERT INTO reply VALUES ('Ulm', 6, x'00')", [(6, Fault.REPLY)]),
        ("UPDATE reply SET site = 'Graz' WHERE spend = 5", [(6, Fault.REPLY)]),
    ],
)
def test_what_was_done_is_named_with_its_line(
    change: str, expected: list[tuple[int, Fault]], path: Path, faults: Callable[..., Any]
) -> None:
    tamper(path, change)
    assert faults() == expected


def test_exchanged_lines_are_found(path: Path, faults: Callable[..., Any]) -> None:
    tamper(
        path,
        "UPDATE line SET seq = 99 WHERE seq = 2",
        "UPDATE line SET seq = 2 WHERE seq = 3",
        "UPDATE line SET seq = 3 WHERE seq = 99",
    )
    assert (2, Fault.REORDERED) in faults()
    assert (3, Fault.REORDERED) in faults()


@pytest.mark.parametrize("after", range(1, 2 * ROUNDS))
def test_a_line_that_was_doubled_is_found(after: int, path: Path, faults: Callable[..., Any]) -> None:
    tamper(
        path,
        *(f"UPDATE line SET seq = {seq + 1} WHERE seq = {seq}" for seq in range(2 * ROUNDS, after, -1)),
        f"INSERT INTO line SELECT site, {after + 1}, body, prev, hash, signature FROM line WHERE seq = {after}",
    )
    assert faults(anchor=False)


@pytest.mark.parametrize("kept", range(2 * ROUNDS))
def test_lines_cut_off_at_the_end_are_found_by_the_anchor(kept: int, path: Path, faults: Callable[..., Any]) -> None:
    tamper(path, f"DELETE FROM line WHERE seq > {kept}", f"DELETE FROM reply WHERE spend >= {kept}")
    assert faults() == [(kept, Fault.ANCHOR)]
    assert faults(anchor=False) == []


def test_a_lost_anchor_is_found(path: Path, faults: Callable[..., Any]) -> None:
    path.with_name("anchor.json").unlink()
    assert faults() == [(2 * ROUNDS, Fault.ANCHOR)]


def test_another_key_signed_none_of_the_lines(path: Path) -> None:
    found = verify(path, "Ulm", NodeKey.generate().public_pem).findings
    assert [finding.fault for finding in found] == [Fault.SIGNATURE] * 2 * ROUNDS


def test_another_sites_name_has_no_lines_and_the_anchor_tells(path: Path, key: NodeKey) -> None:
    found = verify(path, "Graz", key.public_pem, anchor=path.with_name("anchor.json"))
    assert [finding.fault for finding in found.findings] == [Fault.ANCHOR]


def test_any_changed_byte_of_the_file_is_found(path: Path, faults: Callable[..., Any], tmp_path: Path) -> None:
    """Or the ledger says the same as before, to the byte: SQLite has room that holds nothing, and counters."""
    content, before = path.read_bytes(), rows(path)
    chosen = random.Random(SEED)  # noqa: S311
    used = [at for at, byte in enumerate(content) if byte]
    seen = {"found": 0, "refused": 0, "same": 0}
    for _ in range(CHANGES):
        at, by = chosen.choice(used), chosen.randint(1, 255)
        path.write_bytes(content[:at] + bytes([content[at] ^ by]) + content[at + 1 :])
        for side in ("-wal", "-shm"):
            path.with_name(path.name + side).unlink(missing_ok=True)
        try:
            outcome = "found" if faults() else "same"
        except RefusalError:
            outcome = "refused"
        seen[outcome] += 1
        assert outcome != "same" or rows(path) == before, f"byte {at} by {by}"
    assert seen["found"] > CHANGES / 2, f"seed {SEED}: {seen}"
    assert seen["refused"] > 0, f"seed {SEED}: {seen}"


def test_a_missing_ledger_is_an_error(tmp_path: Path, key: NodeKey) -> None:
    with pytest.raises(InputError, match="is missing"):
        verify(tmp_path / "ledger.sqlite", "Ulm", key.public_pem)


def test_what_is_no_ledger_is_refused(tmp_path: Path, key: NodeKey) -> None:
    (tmp_path / "ledger.sqlite").write_bytes(b"no database at all, of whatever length")
    with pytest.raises(RefusalError):
        verify(tmp_path / "ledger.sqlite", "Ulm", key.public_pem)


HEAVY = ("torch", "flwr", "opacus", "transformers", "pandas", "pyarrow", "sqlalchemy", "httpx", "dp_accounting")
WITHOUT = f"""
import sys
HEAVY = {HEAVY!r}
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in HEAVY:
            raise ModuleNotFoundError(name + " is not installed", name=name)
sys.meta_path.insert(0, Absent())
from veil.simulations.cli import main
main()
"""


def test_the_command_needs_no_torch_flower_or_transformers(make_home: Callable[..., Path], key: NodeKey) -> None:
    home = make_home()
    file = read_site_file(home / "site.toml")
    file.agent.state.mkdir(parents=True)
    with closing(Ledger(file.agent.ledger, file.name, key, anchor=file.agent.anchor)) as ledger:
        answer(ledger, 0)
    words = [sys.executable, "-c", WITHOUT, "site", "ledger", "verify", "--home", str(home)]
    done = subprocess.run(words, capture_output=True, text=True, env={})
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
