# SPDX-License-Identifier: Apache-2.0
"""The Roster: whom the coordinator's operator invited, which sites are enrolled, and which were turned out.

Promises that a secret admits one key and only one, that Flower's link state knows a node only for a site that stands
here, and that whatever crashes between the two is put right by doing the same thing again.
"""

from __future__ import annotations

import hmac
import logging
import secrets
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Protocol

from pydantic import ValidationError

from veil.common.errors import InputError, RunError
from veil.common.invitation import Invitation, digest, problems
from veil.common.keys import KEY_KINDS, canonical_pem

_log = logging.getLogger(__name__)

_SCHEMA = """
CREATE TABLE IF NOT EXISTS invitation (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    site TEXT NOT NULL, secret_sha256 BLOB NOT NULL UNIQUE, expires TEXT NOT NULL, public_pem BLOB, used_at TEXT
) STRICT;
CREATE TABLE IF NOT EXISTS site (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    name TEXT NOT NULL, public_pem BLOB NOT NULL UNIQUE, node_id TEXT, enrolled_at TEXT NOT NULL, revoked_at TEXT
) STRICT;
CREATE UNIQUE INDEX IF NOT EXISTS one_active_site_of_a_name ON site (name) WHERE revoked_at IS NULL;
"""
_BUSY_S = 60.0
_SECRET_BYTES = 32
_ASK_AGAIN = "ask the coordinator's operator for a new invitation"


class Nodes(Protocol):
    """What the roster needs of Flower's `LinkState`."""

    def create_node(
        self, owner_aid: str, owner_name: str, public_key: bytes, heartbeat_interval: float, *, name: str | None = None
    ) -> int:
        """Let a key in; 0 when that failed, `ValueError` for a key that was ever known."""

    def delete_node(self, owner_aid: str, node_id: int) -> None:
        """Let it in no longer."""

    def get_node_id_by_public_key(self, public_key: bytes) -> int | None:
        """The node of a key that is let in."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EnrolledSite:
    """A line of the roster.

    Attributes:
        name: unique among the sites that are not revoked.
        public_pem: the key the site proves its identity with.
        node_id: Flower's number for it; None while its admission is half done.
        enrolled_at: when it was admitted.
        revoked_at: when it was turned out; None while it is welcome.
    """

    name: str
    public_pem: bytes
    node_id: int | None
    enrolled_at: datetime
    revoked_at: datetime | None


class Roster:
    """The coordinator's SQLite file of invitations and sites; several threads and processes may use it at once.

    Args:
        path: a file of its own, made when missing; not the link state's.
        nodes: Flower's link state.
        clock: the time of day, with a zone.
    """

    def __init__(self, path: Path, nodes: Nodes, clock: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self._nodes, self._clock = nodes, clock
        self._lock = threading.RLock()
        self._db = sqlite3.connect(path, timeout=_BUSY_S, isolation_level=None, check_same_thread=False)
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=FULL")
        self._db.executescript(_SCHEMA)

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    def invite(self, name: str, url: str, ca_pem: str, valid_days: int) -> Invitation:
        """Write an invitation down; an unused earlier one for the same name is withdrawn.

        Args:
            name: the site's name to be.
            url: the coordinator, as the site reaches it: https://host:port.
            ca_pem: the certificates that may vouch for it, PEM.
            valid_days: how long it may be used.

        Returns:
            the invitation, with the secret of which only the hash is kept.

        Raises:
            InputError: when a value is unusable or a site of that name is enrolled.
        """
        invitation = self._draft(name, url, ca_pem, valid_days)
        with self._transaction():
            if self._active_key(name) is not None:
                raise InputError(f"site {name} is enrolled", "a new name", f"choose another name, or revoke {name}")
            self._withdraw(name)
            self._db.execute(
                "INSERT INTO invitation (site, secret_sha256, expires) VALUES (?, ?, ?)",
                (name, digest(invitation.secret), invitation.expires.isoformat()),
            )
        return invitation

    def admit(self, secret: str, public_pem: bytes) -> str:
        """Enrol a key with the secret of an invitation.

        The same key with the same secret gets the same answer again, for as long as the site is not revoked; this also
        completes an admission that a crash cut in two.

        Args:
            secret: the invitation's.
            public_pem: a P-256 or P-384 public key in PEM, whose private half the caller has seen proven.

        Returns:
            the site's name.

        Raises:
            InputError: when the secret is unknown, spent or expired, or the key unusable, known or revoked.
            RunError: when Flower does not take the key.
        """
        key = _canonical(public_pem)
        with self._transaction():
            name = self._spend(secret, key)
        with self._transaction():
            self._register(name, key)
        return name

    def revoke(self, name: str) -> None:
        """Turn a site out, and withdraw an unused invitation for it. Its key is never admitted again.

        Raises:
            InputError: when there is neither.
        """
        with self._transaction():
            withdrawn, key = self._withdraw(name), self._active_key(name)
            if key is None and not withdrawn:
                raise InputError(f"site {name!r}", "an enrolled or invited site", "look its name up in the list")
            if key is not None:
                node_id = self._nodes.get_node_id_by_public_key(key)
                if node_id is not None:
                    from flwr.common.constant import NOOP_FLWR_AID

                    self._nodes.delete_node(NOOP_FLWR_AID, node_id)
                self._db.execute("UPDATE site SET revoked_at = ? WHERE public_pem = ?", (self._now(), key))
        _log.info("site %s revoked", name)

    def sites(self) -> tuple[EnrolledSite, ...]:
        """All sites that were ever admitted, oldest first."""
        with self._lock:
            return _sites(self._db)

    def name_of(self, node_id: int) -> str | None:
        """The site behind one of Flower's nodes; None when there is none, or none any more."""
        with self._lock:
            row = self._db.execute(
                "SELECT name FROM site WHERE node_id = ? AND revoked_at IS NULL", (str(node_id),)
            ).fetchone()
        return None if row is None else str(row[0])

    def _draft(self, name: str, url: str, ca_pem: str, valid_days: int) -> Invitation:
        try:
            expires = self._clock().replace(microsecond=0) + timedelta(days=valid_days)
            secret = secrets.token_urlsafe(_SECRET_BYTES)
            return Invitation(site=name, url=url, secret=secret, expires=expires, ca=ca_pem)
        except ValidationError as error:
            found = problems(error)
        except OverflowError:
            found = f"{valid_days} days"
        raise InputError(f"no invitation can be made ({found})", "values within their ranges", "correct them")

    def _spend(self, secret: str, key: bytes) -> str:
        """The name a secret stands for; from here on it stands for this key alone."""
        seq, name, expires, spender = self._find(secret)
        if spender is None:
            if datetime.fromisoformat(expires) <= self._clock():
                raise InputError(f"the invitation for {name} ended on {expires}", "one that has not", _ASK_AGAIN)
            self._refuse_known(key)
            self._db.execute("UPDATE invitation SET public_pem = ?, used_at = ? WHERE seq = ?", (key, self._now(), seq))
            self._db.execute(
                "INSERT INTO site (name, public_pem, enrolled_at) VALUES (?, ?, ?)", (name, key, self._now())
            )
        elif spender != key:
            raise InputError(f"the invitation for {name} is spent", "one that nobody used", _ASK_AGAIN)
        return str(name)

    def _register(self, name: str, key: bytes) -> None:
        """Let Flower know the key, unless it does; the roster knows it already, so that it can be revoked."""
        if self._active_key(name) != key:
            raise InputError(f"site {name} with this key was revoked", "a key never used before", _ASK_AGAIN)
        node_id = self._nodes.get_node_id_by_public_key(key)
        if node_id is None:
            node_id = self._create_node(name, key)
        self._db.execute("UPDATE site SET node_id = ? WHERE public_pem = ?", (str(node_id), key))
        _log.info("site %s enrolled as node %d", name, node_id)

    def _create_node(self, name: str, key: bytes) -> int:
        from flwr.common.constant import HEARTBEAT_DEFAULT_INTERVAL, NOOP_ACCOUNT_NAME, NOOP_FLWR_AID

        try:
            node_id = self._nodes.create_node(
                NOOP_FLWR_AID, NOOP_ACCOUNT_NAME, key, HEARTBEAT_DEFAULT_INTERVAL, name=name
            )
        except ValueError:
            node_id = 0
        if not node_id:
            remedy = f"revoke {name}, have the site make a new key, and invite it again"
            raise RunError(f"Flower does not take the key of {name}", "a key it never saw", remedy)
        return node_id

    def _find(self, secret: str) -> tuple[int, str, str, bytes | None]:
        """The invitation of a secret; every hash is compared, in constant time."""
        wanted = digest(secret)
        rows = self._db.execute("SELECT secret_sha256, seq, site, expires, public_pem FROM invitation").fetchall()
        found = [row[1:] for row in rows if hmac.compare_digest(row[0], wanted)]
        if not found:
            raise InputError("the secret is unknown", "the secret of an invitation", _ASK_AGAIN)
        seq, name, expires, spender = found[0]
        return seq, name, expires, spender

    def _refuse_known(self, key: bytes) -> None:
        row = self._db.execute("SELECT name FROM site WHERE public_pem = ?", (key,)).fetchone()
        if row is not None:
            remedy = "make a new key for this enrolment"
            raise InputError(f"the key is or was that of site {row[0]}", "a key never used before", remedy)

    def _active_key(self, name: str) -> bytes | None:
        row = self._db.execute("SELECT public_pem FROM site WHERE name = ? AND revoked_at IS NULL", (name,)).fetchone()
        return None if row is None else bytes(row[0])

    def _withdraw(self, name: str) -> bool:
        cursor = self._db.execute("DELETE FROM invitation WHERE site = ? AND public_pem IS NULL", (name,))
        return cursor.rowcount > 0

    def _now(self) -> str:
        return self._clock().isoformat()

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        """One transaction at a time, over all threads and processes."""
        with self._lock:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
            except BaseException:
                self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")


def enrolled_sites(path: Path) -> tuple[EnrolledSite, ...]:
    """All sites that a roster's file ever admitted, oldest first; reads only, and loads nothing of Flower.

    Args:
        path: the roster's file; without one nobody is enrolled.
    """
    if not path.exists():
        return ()
    with closing(sqlite3.connect(path, timeout=_BUSY_S)) as opened:
        opened.execute("PRAGMA query_only = ON")
        return _sites(opened)


def _sites(db: sqlite3.Connection) -> tuple[EnrolledSite, ...]:
    rows = db.execute("SELECT name, public_pem, node_id, enrolled_at, revoked_at FROM site ORDER BY seq").fetchall()
    return tuple(
        EnrolledSite(
            name=name,
            public_pem=public_pem,
            node_id=None if node_id is None else int(node_id),
            enrolled_at=datetime.fromisoformat(enrolled),
            revoked_at=None if revoked is None else datetime.fromisoformat(revoked),
        )
        for name, public_pem, node_id, enrolled, revoked in rows
    )


def _canonical(public_pem: bytes) -> bytes:
    """The key as Flower compares it, byte for byte."""
    pem = canonical_pem(public_pem)
    if pem is None:
        raise InputError("the key cannot be used", f"a {KEY_KINDS} public key in PEM", "veil site init makes one")
    return pem
