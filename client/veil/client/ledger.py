# SPDX-License-Identifier: Apache-2.0
"""The Ledger: every mechanism that ever touched a site's records, written before it runs, and every reply's bytes.

Promises that a crash over-counts and never under-counts: a spend is durable before training starts, a reply is stored
before it can leave, and a release that was charged but never stored is charged again when it is drawn again.
"""

from __future__ import annotations

import json
import math
import sqlite3
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from veil.common.privacy import Mechanism, PrivacySpent, spent
from veil.common.schedule import Release

_SCHEMA = """
CREATE TABLE IF NOT EXISTS spend (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    site TEXT NOT NULL, job TEXT NOT NULL, round INTEGER NOT NULL, kind TEXT NOT NULL, attempt INTEGER NOT NULL,
    mechanism TEXT NOT NULL, noise TEXT NOT NULL, plan TEXT NOT NULL, at TEXT NOT NULL, reply BLOB,
    UNIQUE (site, job, round, kind, attempt)
) STRICT
"""
_BUSY_S = 60.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One line of the ledger.

    Attributes:
        job: the run.
        round: its round.
        mechanism: what was done.
        noise: the name of the noise source; only `os` is private.
        plan: SHA-256 of the plan.
    """

    job: str
    round: int
    mechanism: Mechanism
    noise: str
    plan: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Claim:
    """The right to draw one release, paid for: or the bytes it was answered with before.

    Attributes:
        seq: the ledger's line.
        reply: the recorded answer, when this release was drawn already.
    """

    seq: int
    reply: bytes | None = None


class Ledger:
    """One site's lines of an SQLite file.

    Args:
        path: the file, made when missing.
        site: whose lines; a simulation keeps many sites in one file.
    """

    def __init__(self, path: Path, site: str) -> None:
        self._site = site
        self._lock = threading.RLock()
        self._db = sqlite3.connect(path, timeout=_BUSY_S, isolation_level=None, check_same_thread=False)
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=FULL")
        self._db.execute(_SCHEMA)

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    def copy_to(self, path: Path) -> None:
        """Write all lines, of every site of the file, to a new file without side files."""
        with self._lock:
            self._db.execute("VACUUM INTO ?", (str(path),))

    def entries(self) -> tuple[Entry, ...]:
        """All lines of this site, oldest first."""
        with self._lock:
            rows = self._db.execute(
                "SELECT job, round, mechanism, noise, plan FROM spend WHERE site = ? ORDER BY seq", (self._site,)
            ).fetchall()
        return tuple(
            Entry(job=job, round=round_, mechanism=Mechanism.from_record(json.loads(text)), noise=noise, plan=plan)
            for job, round_, text, noise, plan in rows
        )

    def spend(
        self,
        job: str,
        release: Release,
        *,
        noise: str,
        plan: str,
        review: Callable[[Sequence[Entry]], None],
    ) -> Claim:
        """Write a release down, durably, before anything touches a record.

        Args:
            job: the run.
            release: what is about to happen.
            noise: name of the noise source.
            plan: SHA-256 of the plan.
            review: raises `RefusalError` when the lines so far do not leave room; called inside the transaction.

        Returns:
            a claim; with `reply` set, the release was drawn before and must not be drawn again.
        """
        with self._transaction():
            attempt, recorded = self._last(job, release)
            if recorded is not None:
                return recorded
            review(self.entries())
            cursor = self._db.execute(
                "INSERT INTO spend (site, job, round, kind, attempt, mechanism, noise, plan, at)"
                " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    self._site,
                    job,
                    release.round,
                    release.kind.value,
                    attempt,
                    json.dumps(release.mechanism.to_record(), sort_keys=True),
                    noise,
                    plan,
                    datetime.now(UTC).isoformat(),
                ),
            )
            return Claim(seq=int(cursor.lastrowid or 0))

    def record_reply(self, claim: Claim, reply: bytes) -> None:
        """Store a reply's exact bytes, durably, before it leaves."""
        with self._transaction():
            self._db.execute("UPDATE spend SET reply = ? WHERE seq = ? AND reply IS NULL", (reply, claim.seq))

    def spent(self, delta: float, job: str | None = None) -> PrivacySpent:
        """What all lines (of one job, if named) cost one unit; infinite when a line's noise was not private."""
        return total(self.entries(), delta, job)

    def _last(self, job: str, release: Release) -> tuple[int, Claim | None]:
        row = self._db.execute(
            "SELECT seq, attempt, reply FROM spend WHERE site = ? AND job = ? AND round = ? AND kind = ?"
            " ORDER BY attempt DESC LIMIT 1",
            (self._site, job, release.round, release.kind.value),
        ).fetchone()
        if row is None:
            return 0, None
        seq, attempt, reply = row
        return attempt + 1, None if reply is None else Claim(seq=seq, reply=reply)

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        """One transaction at a time: threads would share the connection's, and its error codes."""
        with self._lock:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
            except BaseException:
                self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")


def total(entries: Sequence[Entry], delta: float, job: str | None = None) -> PrivacySpent:
    """What ledger lines cost one unit at `delta`."""
    counted = [entry for entry in entries if job is None or entry.job == job]
    if any(entry.noise != "os" for entry in counted):
        return PrivacySpent(epsilon=math.inf, delta=delta, by_accountant={})
    return spent([entry.mechanism for entry in counted], delta)
