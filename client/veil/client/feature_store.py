# SPDX-License-Identifier: Apache-2.0
"""A folder of features on disk: rows that are only ever appended, and an index from a record's digest to its row.

Promises that a row gets its index entry only once it is on the disk, that a row whose bytes changed since is not found
any more, that one process at a time appends, and that a kill at any moment loses at most what was added in the last
`COMMIT_S`.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import sqlite3
import time
import zlib
from collections.abc import Collection, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from io import RawIOBase
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from veil.client.feature_rows import StoredRows, packed, row_bytes
from veil.common.durable import sync_folder
from veil.common.errors import RunError
from veil.common.plan_sections import CachePrecision

COMMIT_S = 2.0
"""Seconds after which added rows are made durable."""

INDEX_BYTES: Final = 100
"""Room that a record takes in the index, rounded up."""

_ROWS, _INDEX, _NEW_INDEX, _LOCK = "rows.bin", "index.sqlite", "new.sqlite", "lock"
_SCHEMA = """
CREATE TABLE store (identity TEXT NOT NULL, width INTEGER NOT NULL) STRICT;
CREATE TABLE record (
    digest BLOB PRIMARY KEY, row INTEGER NOT NULL, crc INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
"""
_ENTRIES = "SELECT digest, CAST(ifnull(row, -1) AS INTEGER), CAST(ifnull(crc, 0) AS INTEGER) FROM record"
_ASKED_AT_ONCE: Final = 500
_SCANNED_PER_RECORD: Final = 8
"""Reading the whole index costs less than asking for each record, up to about this many entries a record."""

_DAMAGED: Final = {sqlite3.SQLITE_ERROR, sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}
"""What SQLite says of a file that is none of its own, or lacks the tables."""

_BUSY_S: Final = 60.0

_log = logging.getLogger(__name__)


class FeatureStore:
    """The rows of one encoder: weights, preprocessing and stored precision.

    Args:
        root: the folder of all stores; made when something is stored.
        identity: everything that the features depend on besides the record.
        precision: float32, or float16 with a float32 factor per row.
    """

    def __init__(self, root: Path, identity: str, precision: CachePrecision = "float32") -> None:
        self.root = root
        self.precision = precision
        self._identity = f"{identity}\n{precision}"
        self.folder = root / hashlib.sha256(self._identity.encode()).hexdigest()[:32]

    def find(self, digests: Collection[bytes]) -> StoredRows:
        """The rows of those records that are here and whole; costs about 5 µs a record.

        Raises:
            RunError: the folder cannot be read.
        """
        with _explained(self.folder):
            width, entries = self._lookup(set(digests))
            if width == 0:
                return StoredRows(precision=self.precision, width=0, row_of={}, raw=np.empty((0, 0), np.uint8))
            raw = self._map(width)
        view, size, count = raw.reshape(-1).data, raw.shape[1], len(raw)
        whole = {
            digest: row
            for digest, (row, crc) in entries.items()
            if 0 <= row < count and zlib.crc32(view[row * size : (row + 1) * size]) == crc
        }
        if len(whole) < len(entries):
            _log.warning("%d damaged rows in %s are computed again", len(entries) - len(whole), self.folder)
        return StoredRows(precision=self.precision, width=width, row_of=whole, raw=raw)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Be the only one who appends, among threads and processes; the kernel lets go for a process that dies.

        Raises:
            RunError: the folder cannot be made, or its disk has no locks.
        """
        with _explained(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            handle = os.open(self.folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            with _explained(self.folder):
                _take(handle, self.folder)
            yield
        finally:
            fcntl.flock(handle, fcntl.LOCK_UN)  # by name: a process forked meanwhile has the lock as well
            os.close(handle)

    @contextmanager
    def appending(self, width: int) -> Iterator[Appender]:
        """Add rows, within `held`; what was added is durable at the end, also when an error ends it.

        Args:
            width: features per record; a store of another width, or one that is damaged, starts over.

        Raises:
            RunError: the folder cannot be written.
        """
        with _explained(self.folder):
            start = self._ready(width)
            file = (self.folder / _ROWS).open("r+b", buffering=0)
        with file, closing(self._connect()) as db:
            appender = Appender(self.folder, self.precision, db, file, start)
            try:
                yield appender
            finally:
                appender.commit()

    def _lookup(self, digests: set[bytes]) -> tuple[int, dict[bytes, tuple[int, int]]]:
        """Features per record, 0 without a usable index, and the entries of the records."""
        if not (self.folder / _INDEX).exists():
            return 0, {}
        with closing(self._connect()) as db:
            try:
                width = self._stored_width(db)
                return width, _entries(db, digests) if width else {}
            except sqlite3.DatabaseError as error:
                if not _is_damage(error):
                    raise
                _log.warning("the index in %s is damaged (%s)", self.folder, error)
                return 0, {}

    def _connect(self) -> sqlite3.Connection:
        """The index as it is; it is never made here, since a reader may ask while the builder lays it out."""
        return sqlite3.connect(f"{(self.folder / _INDEX).absolute().as_uri()}?mode=rw", timeout=_BUSY_S, uri=True)

    def _stored_width(self, db: sqlite3.Connection) -> int:
        """Features per record; 0 where this is not the index of this very store."""
        said = db.execute("SELECT identity, CAST(width AS INTEGER) FROM store").fetchall()
        return max(int(said[0][1]), 0) if len(said) == 1 and said[0][0] == self._identity else 0

    def _map(self, width: int) -> NDArray[np.uint8]:
        """All whole rows of the file; a file that was cut has fewer."""
        path, size = self.folder / _ROWS, row_bytes(width, self.precision)
        count = path.stat().st_size // size if path.exists() else 0
        if count == 0:
            return np.empty((0, size), np.uint8)
        return np.memmap(path, dtype=np.uint8, mode="r", shape=(count, size))

    def _ready(self, width: int) -> int:
        """Lay out the files, and say which is the first row that may be written."""
        if not (self.folder / _INDEX).exists():
            self._start_over(width)
            return 0
        with closing(self._connect()) as db:
            try:
                if self._stored_width(db) == width:
                    return self._first_free(db, width)
                _log.warning("the features in %s are another encoder's and are computed again", self.folder)
            except sqlite3.DatabaseError as error:
                if not _is_damage(error):
                    raise
        self._start_over(width)
        return 0

    def _first_free(self, db: sqlite3.Connection, width: int) -> int:
        """Forget rows that are no longer in the file; a row that may be mapped somewhere is never written again."""
        with db:
            db.execute("DELETE FROM record WHERE row >= ?", (len(self._map(width)),))
        (last,) = db.execute("SELECT max(row) FROM record").fetchone()
        (self.folder / _ROWS).touch(mode=0o600)
        return 0 if last is None else int(last) + 1

    def _start_over(self, width: int) -> None:
        """New files in place of what is there; whoever has mapped the old ones keeps them.

        The index is made whole beside the old one and takes its name in one step: who reads meanwhile sees one or
        the other.
        """
        new = self.folder / _NEW_INDEX
        for path in [*self.folder.glob(f"{_INDEX}-*"), *self.folder.glob(f"{_NEW_INDEX}*"), self.folder / _ROWS]:
            path.unlink(missing_ok=True)
        (self.folder / _ROWS).touch(mode=0o600)
        with closing(sqlite3.connect(new)) as db:
            db.executescript(_SCHEMA)
            with db:
                db.execute("INSERT INTO store VALUES (?, ?)", (self._identity, width))
        new.replace(self.folder / _INDEX)
        sync_folder(self.folder)


class Appender:
    """Where new rows go; `FeatureStore.appending` makes one."""

    def __init__(
        self, folder: Path, precision: CachePrecision, db: sqlite3.Connection, file: RawIOBase, start: int
    ) -> None:
        self._folder, self._precision, self._db, self._file, self._next = folder, precision, db, file, start
        self._waiting: list[tuple[bytes, bytes]] = []
        self._committed = time.monotonic()

    def add(self, digests: Sequence[bytes], features: NDArray[np.float32]) -> None:
        """Take rows, float32 [n, width]; durable with the first added `COMMIT_S` later, or at the end.

        Raises:
            RunError: they cannot be written.
        """
        self._waiting += zip(digests, map(bytes, packed(features, self._precision)), strict=True)
        if time.monotonic() - self._committed >= COMMIT_S:
            self.commit()

    def commit(self) -> None:
        """Make what was added durable: first the rows, then their entries.

        Raises:
            RunError: they cannot be written.
        """
        waiting, self._waiting = self._waiting, []
        if not waiting:
            return
        entries = [(digest, self._next + at, zlib.crc32(row)) for at, (digest, row) in enumerate(waiting)]
        with _explained(self._folder):
            _write(self._file, self._next * len(waiting[0][1]), b"".join(row for _, row in waiting))
            with self._db:
                self._db.executemany("INSERT OR REPLACE INTO record VALUES (?, ?, ?)", entries)
        self._next += len(entries)
        self._committed = time.monotonic()


def _entries(db: sqlite3.Connection, wanted: set[bytes]) -> dict[bytes, tuple[int, int]]:
    """Row and checksum by digest."""
    (stored,) = db.execute("SELECT count(*) FROM record").fetchone()
    if stored <= _SCANNED_PER_RECORD * len(wanted):
        return {digest: (row, crc) for digest, row, crc in db.execute(_ENTRIES) if digest in wanted}
    asked, found = list(wanted), {}
    for start in range(0, len(asked), _ASKED_AT_ONCE):
        some = asked[start : start + _ASKED_AT_ONCE]
        places = ", ".join("?" * len(some))
        found.update({one[0]: one[1:] for one in db.execute(f"{_ENTRIES} WHERE digest IN ({places})", some)})
    return found


def _write(file: RawIOBase, place: int, content: bytes) -> None:
    """Put bytes at a place of a file, durably."""
    file.seek(place)
    rest = memoryview(content)
    while rest:
        rest = rest[file.write(rest) or 0 :]
    os.fsync(file.fileno())


def _take(handle: int, folder: Path) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(handle, 20, 0).decode("ascii", "replace").strip() or "unknown"
        _log.warning("waiting for process %s, which computes the features in %s", holder, folder)
        fcntl.flock(handle, fcntl.LOCK_EX)
    with suppress(OSError):  # for whoever waits
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)


def _is_damage(error: sqlite3.DatabaseError) -> bool:
    return getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF in _DAMAGED


@contextmanager
def _explained(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, sqlite3.Error) as error:
        raise RunError(
            f"features cannot be kept in {folder} ({error})",
            "a folder that can be written, on a local disk with room",
            "repair that and start again; what was computed before is kept",
        ) from error
