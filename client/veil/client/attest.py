# SPDX-License-Identifier: Apache-2.0
"""A site's statement of a run, made from its ledger.

Promises that it follows from plan, ledger, limits and the installed software: no record is read, and no exact count
stands in it.
"""

from __future__ import annotations

import hashlib
import json
import math
import platform
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from functools import cache, lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import veil
from veil.client.books import Entry, Extract, total, total_alone
from veil.client.policy import Limits, SitePolicy
from veil.common.errors import RefusalCode, RefusalError
from veil.common.exchange import Offer
from veil.common.privacy import NeighboringRelation
from veil.common.statement import (
    Cost,
    LedgerRun,
    Releases,
    Shared,
    StatedLimits,
    Statement,
    noise_of,
    sampler_of,
    summed_up,
)

AUDIT_FILE = "audit.json"
"""In an agent's state folder: the record of the site's last empirical audit."""

_AUDIT_BYTES = 64 * 2**10
_ACCOUNTANTS = ("veil", "dp-accounting", "numpy", "scipy")


def make_statement(
    policy: SitePolicy, extract: Extract, offer: Offer, *, audit: Path | None = None, simulation: bool = False
) -> Statement:
    """State what a site did in a run.

    Args:
        policy: the site's.
        extract: what its books say of the run.
        offer: the run and its plan.
        audit: the record of the last empirical audit; it need not be there.
        simulation: whether the site is a simulated one.

    Raises:
        RefusalError: when the ledger holds nothing of the run, or the run with another plan.
    """
    _check_run(extract, offer)
    plan, limits, mechanisms = offer.plan, policy.limits, [entry.mechanism for _, entry in extract.run]
    return Statement(
        simulation=simulation,
        site=policy.name,
        job=offer.job,
        plan_sha256=plan.sha256,
        unit=plan.privacy.unit,
        relation=NeighboringRelation.ADD_OR_REMOVE_ONE,
        sampler=sampler_of(mechanisms),
        noise=noise_of(entry.noise for _, entry in extract.run),
        releases=tuple(_releases(extract.run)),
        ledger=tuple(_ledger_runs(extract.entries, offer.job)),
        ledger_head=extract.head.hash,
        ledger_lines=extract.head.seq,
        delta=limits.delta,
        this_run=Cost.of(total(extract.entries, limits.delta, offer.job)),
        lifetime=Cost.of(total(extract.entries, limits.delta)),
        this_run_alone=_alone([entry for _, entry in extract.run], limits.delta, offer.job),
        lifetime_alone=_alone(extract.entries, limits.delta, None),
        limits=_stated(limits),
        backbone_sha256=None if plan.backbone is None else plan.backbone.sha256,
        code_sha256=code_sha256(),
        versions=_versions(),
        audit=None if audit is None else read_audit(audit, plan.sha256),
        time=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _alone(entries: Sequence[Entry], delta: float, job: str | None) -> Cost | None:
    """What they cost where no mask held; None where there were none."""
    if all(entry.shares is None for entry in entries):
        return None
    return Cost.of(total_alone(entries, delta, job))


@cache
def _versions() -> dict[str, str]:
    """Of what works the figures out, in this process."""
    return {**{name: version(name) for name in _ACCOUNTANTS}, "python": platform.python_version()}


def _check_run(extract: Extract, offer: Offer) -> None:
    if not extract.run:
        raise RefusalError(
            RefusalCode.APPROVAL,
            f"a statement of run {offer.job}, of which the ledger holds nothing",
            "a run that this site took part in",
            "the coordinator can ask for the runs that it ran",
        )
    if any(entry.plan != offer.plan.sha256 for _, entry in extract.run):
        raise RefusalError(
            RefusalCode.PLAN_CHANGED,
            f"a statement of run {offer.job} with another plan than its rounds had",
            "the plan that the run began with",
            "the coordinator can ask with that plan",
        )


def _releases(run: Sequence[tuple[str, Entry]]) -> Iterator[Releases]:
    """What left, in order; a round that was drawn again counts once more."""
    group: list[Entry] = []
    before = ""
    for kind, entry in run:
        if group and (kind != before or not _follows(group[-1], entry)):
            yield _summary(before, group)
            group = []
        group.append(entry)
        before = kind
    yield _summary(before, group)


def _follows(before: Entry, entry: Entry) -> bool:
    """Whether it is the same round once more, or the next one, protected alike."""
    alike = (entry.mechanism, entry.shares) == (before.mechanism, before.shares)
    return alike and entry.round - before.round in (0, 1)


def _summary(kind: str, group: Sequence[Entry]) -> Releases:
    first, last = group[0], group[-1]
    return Releases(
        first=first.round,
        last=last.round,
        kind=kind,
        mechanism=first.mechanism,
        count=len(group),
        shared=Shared.of(first.shares),
    )


def _ledger_runs(entries: Sequence[Entry], job: str) -> Iterator[LedgerRun]:
    """All runs in order of their first line, without their names."""
    runs: dict[tuple[str, str], list[Entry]] = {}
    for entry in entries:
        runs.setdefault((entry.job, entry.plan), []).append(entry)
    for (name, _), lines in runs.items():
        done = [(entry.mechanism, entry.shares) for entry in lines]
        noise = noise_of(entry.noise for entry in lines)
        yield LedgerRun(this_run=name == job, noise=noise, mechanisms=summed_up(done))


def _stated(limits: Limits) -> StatedLimits:
    return StatedLimits(
        epsilon_per_run=limits.epsilon_per_run if math.isfinite(limits.epsilon_per_run) else None,
        epsilon_lifetime=limits.epsilon_lifetime if math.isfinite(limits.epsilon_lifetime) else None,
        unit=limits.unit,
    )


def read_audit(path: Path, plan_sha256: str) -> dict[str, Any] | None:
    """The record of an audit of a plan; None where there is none that can be read.

    An audit of another plan says nothing about this run, and would name another coordinator's.
    """
    try:
        with path.open("rb") as file:
            record = json.loads(file.read(_AUDIT_BYTES))
        json.dumps(record, allow_nan=False)
    except (OSError, ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and record.get("plan_sha256") == plan_sha256 else None


@lru_cache(maxsize=1)
def code_sha256() -> str:
    """SHA-256 over the names and digests of the installed source files of Veil, as `sha256sum` prints them.

    The same for a wheel and for a checkout of the same version: names start below the package.
    """
    files = {
        path.relative_to(root).as_posix(): path for root in map(Path, veil.__path__) for path in root.rglob("*.py")
    }
    lines = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {name}\n" for name, path in sorted(files.items())]
    return hashlib.sha256("".join(lines).encode()).hexdigest()
