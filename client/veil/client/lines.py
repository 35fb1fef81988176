# SPDX-License-Identifier: Apache-2.0
"""The ledger's SQLite file: lines and replies that are only ever added, and the lock that keeps others off.

Promises that a transaction is on the disk when it returns, and that a disk that is full, read-only or broken is a
refusal that leaves the file as it was.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from veil.client.chain import Line
from veil.common.errors import InputError, RefusalCode, RefusalError

_SCHEMA = """
CREATE TABLE IF NOT EXISTS line (
    site TEXT NOT NULL, seq INTEGER NOT NULL, body TEXT NOT NULL, prev TEXT NOT NULL, hash TEXT NOT NULL,
    signature BLOB NOT NULL,
    PRIMARY KEY (site, seq)
) STRICT, WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS reply (
    site TEXT NOT NULL, spend INTEGER NOT NULL, bytes BLOB NOT NULL,
    PRIMARY KEY (site, spend)
) STRICT;
CREATE TRIGGER IF NOT EXISTS line_stays BEFORE UPDATE ON line BEGIN SELECT RAISE(ABORT, 'lines are only added'); END;
CREATE TRIGGER IF NOT EXISTS line_kept BEFORE DELETE ON line BEGIN SELECT RAISE(ABORT, 'lines are only added'); END;
CREATE TRIGGER IF NOT EXISTS reply_stays BEFORE UPDATE ON reply BEGIN SELECT RAISE(ABORT, 'replies stay'); END;
CREATE TRIGGER IF NOT EXISTS reply_kept BEFORE DELETE ON reply BEGIN SELECT RAISE(ABORT, 'replies stay'); END;
"""
_LINES = """
SELECT CAST(ifnull(seq, 0) AS INTEGER), CAST(ifnull(body, '') AS BLOB), CAST(ifnull(prev, '') AS BLOB),
    CAST(ifnull(hash, '') AS BLOB), CAST(ifnull(signature, '') AS BLOB)
FROM line WHERE site = ? AND seq >= ? ORDER BY seq
"""
_REPLIES = """
SELECT CAST(ifnull(spend, 0) AS INTEGER), CAST(ifnull(bytes, '') AS BLOB)
FROM reply WHERE site = ? AND spend BETWEEN ? AND ?
"""
"""A damaged file holds anything anywhere: what is read has its type all the same."""

_LEAST, _MOST = -(2**63), 2**63 - 1
"""Of SQLite's integers."""

_BUSY_S = 60.0


class LineFile:
    """An open file of lines, which several ledgers may share: their transactions wait for one another.

    Args:
        path: the file, made when missing.
        reading: only read it, and leave it as it is.
        durable: wait for the disk. Without it, what is added survives the end of the process, not that of the machine:
            for the ledgers of a simulation, whose folder a crash leaves unfinished anyway.
    """

    def __init__(self, path: Path, *, reading: bool = False, durable: bool = True) -> None:
        self.path = path
        self._mutex = threading.RLock()
        self._added: dict[str, int] = {}
        mode = "ro" if reading else "rwc"
        with self._refused():
            self._db = sqlite3.connect(
                f"{path.absolute().as_uri()}?mode={mode}",
                uri=True,
                timeout=_BUSY_S,
                isolation_level=None,
                check_same_thread=False,
            )
            try:
                if not reading:
                    self._db.execute("PRAGMA journal_mode=WAL")
                    self._db.execute(f"PRAGMA synchronous={'EXTRA' if durable else 'OFF'}")
                    self._db.executescript(_SCHEMA)
            except BaseException:
                self._db.close()
                raise

    def close(self) -> None:
        """Close it."""
        self._db.close()

    def copy_to(self, path: Path) -> None:
        """Write everything to a new file without side files."""
        with self._refused():
            self._db.execute("VACUUM INTO ?", (str(path),))

    def absorb(self, path: Path) -> None:
        """Add everything of another such file, of sites that have nothing here."""
        with self._refused():
            self._db.execute("ATTACH DATABASE ? AS part", (str(path),))
            self._db.executescript(
                "BEGIN; INSERT INTO main.line SELECT * FROM part.line; INSERT INTO main.reply SELECT * FROM part.reply;"
                " COMMIT; DETACH DATABASE part;"
            )

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All that is added inside is on the disk afterwards, or none of it; other processes wait.

        Raises:
            RefusalError: when the disk does not take it.
        """
        with self._refused():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

    @contextmanager
    def snapshot(self) -> Iterator[None]:
        """All that is read inside is of one moment, whatever others add meanwhile.

        Raises:
            RefusalError: when the file cannot be read.
        """
        with self._refused():
            self._db.execute("BEGIN")
            try:
                yield
            finally:
                self._db.execute("ROLLBACK")

    def faults(self) -> list[str]:
        """What SQLite finds wrong with its file, such as an index that does not lead to its rows."""
        with self._refused():
            said = [str(row[0]) for row in self._db.execute("PRAGMA integrity_check")]
        return [] if said == ["ok"] else said

    def version(self, site: str) -> tuple[int, int]:
        """Two numbers of which one changes when anybody, in any process, may have changed a site's lines."""
        with self._refused():
            (elsewhere,) = self._db.execute("PRAGMA data_version").fetchone()
        return int(elsewhere), self._added.get(site, 0)

    def sites(self) -> list[str]:
        """Whose lines are here."""
        with self._refused():
            return [str(row[0]) for row in self._db.execute("SELECT DISTINCT site FROM line ORDER BY site")]

    def lines(self, site: str, since: int | None = None) -> list[Line]:
        """A site's lines by number, from `since` on. Whatever was written into the file comes back as bytes."""
        with self._refused():
            rows = self._db.execute(_LINES, (site, _LEAST if since is None else since)).fetchall()
        return [
            Line(
                seq=seq,
                body=body,
                prev=prev.decode("ascii", "replace"),
                hash=hash_.decode("ascii", "replace"),
                signature=signature,
            )
            for seq, body, prev, hash_, signature in rows
        ]

    def add(self, site: str, line: Line) -> None:
        """Add a line."""
        self._added[site] = self._added.get(site, 0) + 1
        with self._refused():
            self._db.execute(
                "INSERT INTO line (site, seq, body, prev, hash, signature) VALUES (?, ?, ?, ?, ?, ?)",
                (site, line.seq, line.body.decode(), line.prev, line.hash, line.signature),
            )

    def reply(self, site: str, spend: int) -> bytes | None:
        """The bytes stored for a spend."""
        with self._refused():
            row = self._db.execute(_REPLIES, (site, spend, spend)).fetchone()
        return None if row is None else bytes(row[1])

    def reply_digests(self, site: str) -> dict[int, str]:
        """SHA-256 of all stored bytes, by the spend's number."""
        with self._refused():
            rows = self._db.execute(_REPLIES, (site, _LEAST, _MOST))
            return {spend: hashlib.sha256(content).hexdigest() for spend, content in rows}

    def add_reply(self, site: str, spend: int, reply: bytes) -> None:
        """Store a spend's bytes."""
        with self._refused():
            self._db.execute("INSERT INTO reply (site, spend, bytes) VALUES (?, ?, ?)", (site, spend, reply))

    @contextmanager
    def _refused(self) -> Iterator[None]:
        """One thread at a time: another's transaction would be read from, and end what is being read."""
        try:
            with self._mutex:
                yield
        except sqlite3.ProgrammingError:
            raise
        except sqlite3.OperationalError as error:
            raise RefusalError(
                RefusalCode.LEDGER,
                f"the ledger {self.path} cannot be used ({error})",
                "a disk with room, in a folder that can be written",
                "repair that; nothing is lost, and the next round is answered again",
            ) from error
        except (sqlite3.Error, UnicodeDecodeError) as error:  # SQLite's message may quote bytes that are no text
            raise RefusalError(
                RefusalCode.LEDGER,
                f"the ledger {self.path} is damaged ({error})",
                "the file as this site wrote it",
                "restore its newest copy; if there is none, count what is lost with veil site ledger write-off",
            ) from error


class FileLock:
    """The right to be the only process at a ledger, until it is released or the process ends.

    Args:
        path: the ledger.

    Raises:
        InputError: naming the process that has it.
        RefusalError: when the disk takes no lock.
    """

    def __init__(self, path: Path) -> None:
        ledger = path.resolve()
        beside = ledger.with_name(f"{ledger.name}.lock")
        with _lockable(beside):
            self._handle = os.open(beside, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            with _lockable(beside):
                self._take(path)
        except BaseException:
            os.close(self._handle)
            raise

    def _take(self, path: Path) -> None:
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(self._handle, 20, 0).decode("ascii", "replace").strip() or "unknown"
            raise InputError(
                f"ledger {path} is in use by process {holder}",
                "one process at a time",
                f"stop process {holder}, or wait until it is done",
            ) from None
        with suppress(OSError):
            os.ftruncate(self._handle, 0)
            os.pwrite(self._handle, f"{os.getpid()}\n".encode(), 0)

    def release(self) -> None:
        """Let others in."""
        os.close(self._handle)


@contextmanager
def _lockable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RefusalError(
            RefusalCode.LEDGER,
            f"the ledger's lock {path} cannot be made ({error.strerror})",
            "a folder that can be written",
            "repair that and start again",
        ) from error
