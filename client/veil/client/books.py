# SPDX-License-Identifier: Apache-2.0
"""The books: what a ledger's lines mean, as mechanisms done and releases answered.

Promises that a line it does not understand is an error, and that one line without private noise makes the cost
infinite.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from veil.client.chain import Head, Line
from veil.common.privacy import Mechanism, NoiseShares, PrivacySpent, spent_over_runs
from veil.common.schedule import Release

WRITE_OFF = "write-off"
"""The job of lines that stand for what a lost ledger may have held."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One mechanism of the ledger.

    Attributes:
        job: the run.
        round: its round.
        mechanism: what was done.
        noise: the name of the noise source; only `os` is private.
        plan: SHA-256 of the plan.
        shares: how the noise of a masked sum was shared; None where this site added all of it.
    """

    job: str
    round: int
    mechanism: Mechanism
    noise: str
    plan: str
    shares: NoiseShares | None = None

    @property
    def alone(self) -> Entry:
        """The same as it was for whoever took this site's mask off."""
        if self.shares is None:
            return self
        return replace(self, mechanism=self.shares.unmasked(self.mechanism), shares=None)


@dataclass(frozen=True, kw_only=True, slots=True)
class Extract:
    """What the books say of one run and of everything, at one moment.

    Attributes:
        run: the run's mechanisms with the kind of each release, oldest first.
        entries: all mechanisms, oldest first.
        head: the last line's place.
    """

    run: tuple[tuple[str, Entry], ...]
    entries: tuple[Entry, ...]
    head: Head


@dataclass(kw_only=True, slots=True)
class Books:
    """What a site's lines say, as far as they are read.

    Attributes:
        heads: hash of each line, by number; the genesis first.
        entries: the mechanisms, oldest first.
        attempts: numbers of a release's spends, by (job, round, kind, session); the session is "" without masks.
        replies: SHA-256 of the reply, by its spend's number.
        covered: hashes of lost lines that a write-off stands for.
    """

    heads: list[str]
    entries: list[Entry] = field(default_factory=list)
    attempts: dict[tuple[str, int, str, str], list[int]] = field(default_factory=dict)
    replies: dict[int, str] = field(default_factory=dict)
    covered: set[str] = field(default_factory=set)

    @property
    def head(self) -> Head:
        """The last line's place."""
        return Head(seq=len(self.heads) - 1, hash=self.heads[-1])

    def add(self, line: Line) -> None:
        """Enter the next line.

        Raises:
            LookupError, ValueError: for a line that this version does not understand.
        """
        fields = line.fields
        match fields["kind"]:
            case "spend":
                session = fields["masking"]["session"] if "masking" in fields else ""
                key = (fields["job"], fields["round"], fields["release"], session)
                self.attempts.setdefault(key, []).append(line.seq)
                self.entries.append(_entry(fields))
            case "reply":
                self.replies[fields["spend"]] = fields["sha256"]
            case "write-off":
                self.covered.update(fields["covers"])
                self.entries.append(_entry({**fields, "job": WRITE_OFF, "round": 0, "noise": "os", "plan": ""}))
            case other:
                raise ValueError(f"a line of kind {other}; expected spend, reply or write-off")
        self.heads.append(line.hash)

    def extract(self, job: str) -> Extract:
        """What they say of one run and of everything."""
        spends = sorted((seq, kind) for (of, _, kind, _), seqs in self.attempts.items() if of == job for seq in seqs)
        own = (entry for entry in self.entries if entry.job == job)
        run = tuple((kind, entry) for (_, kind), entry in zip(spends, own, strict=True))
        return Extract(run=run, entries=tuple(self.entries), head=self.head)

    def answered(self, job: str, release: Release, session: str = "") -> int | None:
        """The release's spend that has a reply; of a masked sum, the one of that session."""
        attempts = self.attempts.get((job, release.round, release.kind.value, session), [])
        return self._answered(attempts)

    def answered_already(self, spend: int) -> int | None:
        """The spend of the same release as this one, or this one, that has a reply."""
        return next((self._answered(attempts) for attempts in self.attempts.values() if spend in attempts), None)

    def _answered(self, attempts: Sequence[int]) -> int | None:
        return next((seq for seq in attempts if seq in self.replies), None)


def _entry(fields: Mapping[str, Any]) -> Entry:
    return Entry(
        job=fields["job"],
        round=fields["round"],
        mechanism=Mechanism.from_record(fields["mechanism"]),
        noise=fields["noise"],
        plan=fields["plan"],
        shares=None
        if "masking" not in fields
        else NoiseShares(sites=fields["masking"]["sites"], colluding=fields["masking"]["colluding"]),
    )


def total(entries: Sequence[Entry], delta: float, job: str | None = None) -> PrivacySpent:
    """What ledger lines cost one unit at `delta`; the lines of one job and one plan are one run, write-offs another."""
    counted = [entry for entry in entries if job is None or entry.job == job]
    if any(entry.noise != "os" for entry in counted):
        return PrivacySpent(epsilon=math.inf, delta=delta, by_accountant={})
    runs: dict[tuple[str, str], list[Mechanism]] = {}
    for entry in counted:
        runs.setdefault((entry.job, entry.plan), []).append(entry.mechanism)
    return spent_over_runs(runs.values(), delta)


def total_alone(entries: Sequence[Entry], delta: float, job: str | None = None) -> PrivacySpent:
    """What ledger lines cost if every mask had been taken off: the site's own noise alone; arguments as in `total`."""
    return total([entry.alone for entry in entries], delta, job)


def without_masks(entries: Sequence[Entry], delta: float, job: str | None = None) -> PrivacySpent | None:
    """`total_alone`, or None where no noise was shared and it would be `total`."""
    shared = any(entry.shares is not None for entry in entries if job in (None, entry.job))
    return total_alone(entries, delta, job) if shared else None
