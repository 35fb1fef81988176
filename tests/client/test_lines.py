# SPDX-License-Identifier: Apache-2.0
"""Tests of `veil.client.lines`: a transaction is on the disk or did not happen; whoever is second waits or is told."""

from __future__ import annotations

import errno
import fcntl
import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from veil.client.chain import Line, genesis, seal
from veil.client.lines import FileLock, LineFile
from veil.common.errors import InputError, RefusalCode, RefusalError
from veil.common.keys import NodeKey


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.sqlite"


@pytest.fixture
def file(path: Path) -> Iterator[LineFile]:
    with closing(LineFile(path)) as opened:
        yield opened


@pytest.fixture
def lines(key: NodeKey) -> list[Line]:
    first = seal({"kind": "spend"}, genesis("Ulm"), key)
    return [first, seal({"kind": "reply"}, first.head, key)]


def add(file: LineFile, *lines: Line) -> None:
    with file.transaction():
        for line in lines:
            file.add("Ulm", line)


def test_a_commit_is_synced(file: LineFile) -> None:
    """EXTRA (3): the log at every commit; and, where a file system has no WAL, the journal's folder too."""
    assert file._db.execute("PRAGMA synchronous").fetchone() == (3,)
    assert file._db.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_what_was_added_comes_back_to_the_byte(file: LineFile, path: Path, lines: list[Line]) -> None:
    add(file, *lines)
    with closing(LineFile(path, reading=True)) as other:
        assert other.lines("Ulm") == lines
        assert other.lines("Ulm", 2) == lines[1:]
        assert other.lines("Graz") == []


def test_a_reply_comes_back_to_the_byte(file: LineFile, path: Path) -> None:
    with file.transaction():
        file.add_reply("Ulm", 1, bytes(range(256)))
        file.add_reply("Graz", 1, b"")
    assert (file.reply("Ulm", 1), file.reply("Graz", 1), file.reply("Ulm", 2)) == (bytes(range(256)), b"", None)
    assert list(file.reply_digests("Ulm")) == [1]


def test_an_error_inside_a_transaction_undoes_it(file: LineFile, lines: list[Line]) -> None:
    def fail() -> None:
        with file.transaction():
            file.add("Ulm", lines[0])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert file.lines("Ulm") == []
    add(file, *lines)
    assert file.lines("Ulm") == lines


@pytest.mark.parametrize(
    "change",
    ["UPDATE line SET body = ''", "DELETE FROM line", "UPDATE reply SET bytes = x'00'", "DELETE FROM reply"],
)
def test_lines_and_replies_are_only_added(change: str, file: LineFile, path: Path, lines: list[Line]) -> None:
    add(file, *lines)
    with file.transaction():
        file.add_reply("Ulm", 1, b"noised")
    with closing(sqlite3.connect(path)) as other, pytest.raises(sqlite3.IntegrityError):
        other.execute(change)


@pytest.mark.parametrize("what", ["line", "reply"])
def test_nothing_is_written_twice(what: str, file: LineFile, lines: list[Line]) -> None:
    add(file, *lines)
    with file.transaction():
        file.add_reply("Ulm", 1, b"noised")
    with pytest.raises(RefusalError, match="damaged"), file.transaction():
        if what == "line":
            file.add("Ulm", lines[0])
        else:
            file.add_reply("Ulm", 1, b"other")
    assert (file.lines("Ulm"), file.reply("Ulm", 1)) == (lines, b"noised")


def test_a_snapshot_does_not_see_what_is_added_meanwhile(file: LineFile, path: Path, lines: list[Line]) -> None:
    with closing(LineFile(path, reading=True)) as other:
        with other.snapshot():
            assert other.lines("Ulm") == []
            add(file, *lines)
            assert other.lines("Ulm") == []
        assert other.lines("Ulm") == lines


def test_reading_makes_no_file_and_changes_none(path: Path) -> None:
    with pytest.raises(RefusalError, match="cannot be used"):
        LineFile(path, reading=True)
    assert list(path.parent.iterdir()) == []


def test_reading_cannot_write(file: LineFile, path: Path, lines: list[Line]) -> None:
    with closing(LineFile(path, reading=True)) as other, pytest.raises(RefusalError, match="readonly"):
        add(other, *lines)


@pytest.mark.parametrize("content", [b"no database at all", b"SQLite format 3\0" + bytes(2000)])
def test_what_is_no_ledger_is_refused(content: bytes, path: Path) -> None:
    path.write_bytes(content)
    with pytest.raises(RefusalError) as caught:
        LineFile(path)
    assert caught.value.code is RefusalCode.LEDGER
    assert path.read_bytes() == content


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RefusalError, match=r"cannot be used.*a disk with room, in a folder that can be written"):
        LineFile(tmp_path / "unmounted" / "ledger.sqlite")


def test_a_copy_is_one_file_with_everything(file: LineFile, lines: list[Line], tmp_path: Path) -> None:
    add(file, *lines)
    file.copy_to(tmp_path / "copy.sqlite")
    with closing(LineFile(tmp_path / "copy.sqlite", reading=True)) as copy:
        assert copy.lines("Ulm") == lines
    assert [one.name for one in tmp_path.glob("copy*")] == ["copy.sqlite"]


def test_a_lock_names_its_holder_until_it_is_released(path: Path) -> None:
    first = FileLock(path)
    with pytest.raises(InputError, match=f"in use by process {os.getpid()}"):
        FileLock(path)
    first.release()
    FileLock(path).release()


def test_a_lock_holds_for_other_names_of_the_ledger(path: Path) -> None:
    (path.parent / "alias").symlink_to(path)
    first = FileLock(path)
    with pytest.raises(InputError, match="in use"):
        FileLock(path.parent / "alias")
    first.release()


def test_a_lock_that_is_refused_leaves_no_file_open(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    before = len(list(Path("/proc/self/fd").iterdir()))
    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", fail)
        with pytest.raises(RefusalError, match="No locks available"):
            FileLock(path)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_a_lock_in_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RefusalError, match="cannot be made"):
        FileLock(tmp_path / "unmounted" / "ledger.sqlite")
