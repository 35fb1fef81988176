# SPDX-License-Identifier: Apache-2.0
"""The Ledger: every mechanism that ever touched a site's records, written before it runs, and every reply's bytes.

Promises that a crash over-counts and never under-counts: a spend is durable before training starts, a reply is stored
before it can leave, and a release that was charged but never stored is charged again when it is drawn again. Promises
also that a ledger that was changed, cut or put back to an older copy is refused, not continued.
"""

from __future__ import annotations

import hashlib
import math
import secrets
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from veil.client.anchor import Anchor, disagreement
from veil.client.books import Books, Entry, Extract, total, total_alone, without_masks
from veil.client.chain import Line, examine, genesis, seal
from veil.client.lines import FileLock, LineFile
from veil.common.errors import InputError, RefusalCode, RefusalError
from veil.common.keys import NodeKey
from veil.common.privacy import (
    Mechanism,
    NoiseShares,
    PrivacyBudget,
    PrivacySpent,
    PrivacyUnit,
    gaussian_sigma,
)
from veil.common.privacy.mechanism import MIN_NOISE_MULTIPLIER
from veil.common.schedule import Release

__all__ = [
    "Claim",
    "Entry",
    "Ledger",
    "Masking",
    "entries_by_site",
    "entries_of",
    "total",
    "total_alone",
    "without_masks",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class Claim:
    """The right to draw one release, paid for: or the bytes it was answered with before.

    Attributes:
        seq: the ledger's line.
        reply: the recorded answer, when this release was drawn already.
    """

    seq: int
    reply: bytes | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Masking:
    """The masked sum that a release goes into.

    Attributes:
        session: what its masks are derived for, 64 hexadecimal digits.
        shares: how its noise is shared.
    """

    session: str
    shares: NoiseShares

    def to_record(self) -> dict[str, Any]:
        """Plain values for the ledger's line."""
        return {"session": self.session, "sites": self.shares.sites, "colluding": self.shares.colluding}


class Ledger:
    """One site's lines of an SQLite file.

    Args:
        path: the file, made when missing.
        site: whose lines; a simulation keeps many sites in one file.
        key: the site's; signs every line.
        anchor: a file elsewhere that remembers the last line, by which an older copy of the ledger is found out;
            made for an empty ledger. Implies `exclusive`.
        exclusive: let no other such process at the file while it is open.
        recovering: open although the anchor disagrees, for `write_off`; until then nothing can be spent.
        file: the open file at `path`, when ledgers of several sites share one; who opened it closes it.

    Raises:
        RefusalError: with the code `ledger`, for lines that were tampered with, an older copy, a missing anchor, or
            a disk that does not work.
        InputError: when another process has it.
    """

    def __init__(
        self,
        path: Path,
        site: str,
        key: NodeKey,
        *,
        anchor: Path | None = None,
        exclusive: bool = False,
        recovering: bool = False,
        file: LineFile | None = None,
    ) -> None:
        self._path, self._site, self._key, self._public_pem = path, site, key, key.public_pem
        self._mutex = threading.RLock()
        self._books = Books(heads=[genesis(site).hash])
        self._anchor = None if anchor is None else Anchor(anchor, key)
        self._lock = FileLock(path) if exclusive or anchor is not None else None
        self._file, self._shared = file, file is not None
        self._seen: tuple[int, int] | None = None
        try:
            if not recovering and not path.exists():
                self._check_anchor()
            self._file = self._file or LineFile(path)
            self._catch_up()
            if not recovering:
                self._check_anchor()
                self._renew_anchor()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the file and let others in."""
        if self._file is not None and not self._shared:
            self._file.close()
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def copy_to(self, path: Path) -> None:
        """Write all lines, of every site of the file, to a new file without side files."""
        with self._mutex:
            self._open_file.copy_to(path)

    def entries(self) -> tuple[Entry, ...]:
        """All mechanisms of this site, oldest first."""
        with self._mutex:
            self._catch_up()
            return tuple(self._books.entries)

    def extract(self, job: str) -> Extract:
        """What the lines say of one run and of everything, at one moment."""
        with self._mutex:
            self._catch_up()
            return self._books.extract(job)

    @property
    def key(self) -> NodeKey:
        """The site's, which signs the lines and what is said about them."""
        return self._key

    def head(self) -> str:
        """Hash of the last line, 64 hexadecimal digits; before the first line a constant of the site's name."""
        with self._mutex:
            self._catch_up()
            return self._books.head.hash

    def knows(self, head: str) -> bool:
        """Whether this was ever this ledger's head, or is a lost line's that a write-off stands for."""
        with self._mutex:
            self._catch_up()
            return head in self._books.heads or head in self._books.covered

    def spend(
        self,
        job: str,
        release: Release,
        *,
        noise: str,
        plan: str,
        review: Callable[[Sequence[Entry]], None],
        masking: Masking | None = None,
    ) -> Claim:
        """Write a release down, durably, before anything touches a record.

        Args:
            job: the run.
            release: what is about to happen.
            noise: name of the noise source.
            plan: SHA-256 of the plan.
            review: raises `RefusalError` when the lines so far do not leave room; called inside the transaction.
            masking: of a masked sum, its session and how its noise is shared; another session is another release.

        Returns:
            a claim; with `reply` set, the release was drawn before and must not be drawn again.

        Raises:
            RefusalError: with the code `ledger`, when the line cannot be written or the ledger is not the newest.
        """
        with self._transaction() as added:
            self._check_anchor()
            session = "" if masking is None else masking.session
            answered = self._books.answered(job, release, session)
            if answered is not None:
                return Claim(seq=answered, reply=self._recorded(answered))
            review(tuple(self._books.entries))
            key = (job, release.round, release.kind.value, session)
            fields: dict[str, Any] = {
                "kind": "spend",
                "job": job,
                "round": release.round,
                "release": release.kind.value,
                "attempt": len(self._books.attempts.get(key, [])),
                "mechanism": release.mechanism.to_record(),
                "noise": noise,
                "plan": plan,
            }
            if masking is not None:
                fields["masking"] = masking.to_record()
            return Claim(seq=self._add(added, fields))

    def record_reply(self, claim: Claim, reply: bytes) -> bytes:
        """Store a reply's exact bytes, durably, before it leaves; the first reply of a release stays.

        Returns:
            what may leave: `reply`, or what was recorded for the same release while this one was drawn.

        Raises:
            RefusalError: with the code `ledger`, when it cannot be stored: then it must not leave.
        """
        with self._transaction() as added:
            answered = self._books.answered_already(claim.seq)
            if answered is not None:
                return self._recorded(answered)
            self._open_file.add_reply(self._site, claim.seq, reply)
            self._add(added, {"kind": "reply", "spend": claim.seq, "sha256": hashlib.sha256(reply).hexdigest()})
        return reply

    def write_off(
        self, epsilon: float, delta: float, reason: str, *, unit: PrivacyUnit, covers: Sequence[str] = ()
    ) -> None:
        """Count what lost lines may have cost, and start over from here: the operator's word, never automatic.

        Args:
            epsilon: the most that the lost lines can have cost, usually the lifetime limit.
            delta: the δ it is meant at.
            reason: what happened, for whoever reads the ledger.
            unit: whom the lost lines protected.
            covers: hashes of lost lines that others remember; the anchor's is added.

        Raises:
            InputError: for an ε or δ that no Gaussian mechanism costs.
            RefusalError: with the code `ledger`, when the line cannot be written.
        """
        mechanism = _costing(epsilon, delta, unit)
        with self._transaction() as added:
            lost = sorted({*covers, *self._anchored_hash()} - set(self._books.heads))
            fields = {"mechanism": mechanism.to_record(), "reason": reason, "covers": lost}
            self._add(added, {"kind": "write-off", **fields})

    def spent(self, delta: float, job: str | None = None) -> PrivacySpent:
        """What all lines (of one job, if named) cost one unit; infinite when a line's noise was not private."""
        return total(self.entries(), delta, job)

    @property
    def _open_file(self) -> LineFile:
        if self._file is None:
            raise ValueError("a ledger that was never opened; expected an open one")
        return self._file

    def _recorded(self, spend: int) -> bytes:
        """A recorded reply, checked against its line, which the anchor must know before the reply leaves."""
        self._renew_anchor()
        reply = self._open_file.reply(self._site, spend)
        if reply is None or hashlib.sha256(reply).hexdigest() != self._books.replies[spend]:
            raise _damage(self._path, f"the reply to line {spend} is not what was stored")
        return reply

    def _catch_up(self) -> None:
        """Read what was added since, by whomever: from the last known line on, which must be there unchanged."""
        version = self._open_file.version(self._site)
        if version == self._seen:
            return
        known = self._books.head
        lines = self._open_file.lines(self._site, known.seq or None)
        if known.seq and (not lines or lines.pop(0).head != known):
            raise _damage(self._path, f"line {known.seq} is not what was written")
        for finding in examine(lines, after=known, public_pem=self._public_pem):
            raise _damage(self._path, str(finding))
        try:
            for line in lines:
                self._books.add(line)
        except (LookupError, TypeError, ValueError) as error:
            raise _damage(self._path, f"a line of another version ({error})") from error
        self._seen = version

    @contextmanager
    def _transaction(self) -> Iterator[list[Line]]:
        """One at a time, on the newest lines; the anchor follows when the lines are on the disk."""
        added: list[Line] = []
        with self._mutex:
            with self._open_file.transaction():
                self._catch_up()
                yield added
                if added and self._anchor is not None:
                    self._anchor.prepare(added[-1].head)
                seen = self._open_file.version(self._site)
            self._seen = seen
            for line in added:
                self._books.add(line)
            if added and self._anchor is not None:
                self._anchor.publish()

    def _add(self, added: list[Line], fields: Mapping[str, Any]) -> int:
        salted = {**fields, "at": datetime.now(UTC).isoformat(), "salt": secrets.token_hex(16)}
        line = seal(salted, self._books.head, self._key)
        self._open_file.add(self._site, line)
        added.append(line)
        return line.seq

    def _check_anchor(self) -> None:
        """The anchored line must be one of these."""
        if self._anchor is None:
            return
        fault = disagreement(self._anchor.read(), self._books.heads)
        if fault is not None:
            raise RefusalError(
                RefusalCode.LEDGER,
                f"ledger {self._path}: {fault}",
                "a ledger with every line this site ever wrote, and its anchor",
                "restore the newest copy of both; if it is lost, count what it may have held with"
                " veil site ledger write-off",
            )

    def _anchored_hash(self) -> Iterator[str]:
        """What the anchor remembers, if it can still be read."""
        with suppress(RefusalError):
            if self._anchor is not None and (anchored := self._anchor.read()) is not None:
                yield anchored.hash

    def _renew_anchor(self) -> None:
        """Make the first anchor, or follow lines that a crash or a disk left unanchored."""
        if self._anchor is not None and self._anchor.read() != self._books.head:
            self._anchor.prepare(self._books.head)
            self._anchor.publish()


def _damage(path: Path, what: str) -> RefusalError:
    return RefusalError(
        RefusalCode.LEDGER,
        f"ledger {path}: {what}",
        "every line as this site wrote it",
        "veil site ledger verify lists all that is wrong; restore the newest copy, or, without one, move the file"
        " away and count what is lost with veil site ledger write-off",
    )


def _costing(epsilon: float, delta: float, unit: PrivacyUnit) -> Mechanism:
    """Full-batch Gaussian releases that cost at least (ε, δ): one, or several where σ would be below its range."""
    if not (math.isfinite(epsilon) and epsilon > 0 and 0 < delta < 1):
        raise InputError(f"epsilon = {epsilon}, delta = {delta}", "both above 0, delta below 1", "give the limit's")
    sigma = gaussian_sigma(PrivacyBudget(target_epsilon=epsilon, target_delta=delta))
    steps = max(1, math.ceil((MIN_NOISE_MULTIPLIER / sigma) ** 2))
    try:
        return Mechanism(noise_multiplier=sigma * math.sqrt(steps), max_grad_norm=1.0, steps=steps, unit=unit)
    except ValueError as error:
        raise InputError(f"epsilon = {epsilon} ({error})", "a cost that noise can have", "give the limit's") from None


def entries_of(path: Path, site: str) -> tuple[Entry, ...]:
    """A site's mechanisms as a file states them, unchecked (`verification.py` checks); reads while an agent writes.

    Raises:
        RefusalError: when the file cannot be read, or holds what is no line.
    """
    with closing(LineFile(path, reading=True)) as file:
        return _stated(file, site)


def entries_by_site(path: Path) -> dict[str, tuple[Entry, ...]]:
    """The same of every site with lines in the file.

    Raises:
        RefusalError: when the file cannot be read, or holds what is no line.
    """
    with closing(LineFile(path, reading=True)) as file:
        return {site: _stated(file, site) for site in file.sites()}


def _stated(file: LineFile, site: str) -> tuple[Entry, ...]:
    books = Books(heads=[genesis(site).hash])
    try:
        for line in file.lines(site):
            books.add(line)
    except (LookupError, TypeError, ValueError) as error:
        raise _damage(file.path, f"a line that says nothing this version knows ({error})") from error
    return tuple(books.entries)
