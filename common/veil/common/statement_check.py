# SPDX-License-Identifier: Apache-2.0
"""What can be wrong with a site's statement that can be read: against the plan, its own ledger, its limits, arithmetic.

Promises that every ε is computed again from the listed mechanisms, and that a hostile list costs bounded time.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from veil.common.certificate import RunFacts
from veil.common.noise import OSNoise
from veil.common.plan import RunPlan
from veil.common.privacy import Mechanism, NeighboringRelation, PrivacySpent, spent, spent_over_runs
from veil.common.schedule import Release, schedule
from veil.common.statement import (
    Cost,
    Releases,
    Repeated,
    Shared,
    Statement,
    expanded,
    expanded_alone,
    sampler_of,
)

LESS, MORE = 1e-6, 1e-3
"""Relative differences by which a claimed ε may be below, and above, what its mechanisms cost."""

_SAME_SIGMA = 1e-9
"""Relative difference of a σ that two machines calibrate from one plan."""

Place = tuple[int, str]
"""A release's round and kind."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckedSite:
    """What a site's statement comes to.

    Attributes:
        statement: what it says.
        this_run: what its run cost, computed again.
        lifetime: what its ledger cost, computed again.
        this_run_alone: what its run cost if its masks were taken off; None without masked sums.
        lifetime_alone: the same of its ledger.
        rounds: in how many rounds the certificate says its update was used.
    """

    statement: Statement
    this_run: PrivacySpent
    lifetime: PrivacySpent
    rounds: int
    this_run_alone: PrivacySpent | None = None
    lifetime_alone: PrivacySpent | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Planned:
    """What the certificate's plan comes to; nothing where it cannot be read."""

    plan: RunPlan | None
    releases: Mapping[Place, Release]

    @property
    def last(self) -> int:
        """The last round's number."""
        return max((number for number, _ in self.releases), default=-1)


def read_plan(run: RunFacts) -> tuple[Planned, tuple[str, ...]]:
    """The plan of a run, and what is wrong with it and with the rounds.

    Raises:
        PlanError: when it is no plan.
    """
    plan = RunPlan.from_json(json.dumps(run.plan))
    releases = {(one.round, one.kind.value): one for one in schedule(plan)}
    places = [(one.round, one.kind) for one in run.rounds]
    faults = {
        "plan: not in canonical form": json.loads(plan.public().to_json()) != run.plan,
        "plan_sha256: it is not the plan's": plan.sha256 != run.plan_sha256,
        "rounds: not the plan's, each once and in order": places != [one for one in releases if one in set(places)],
    }
    return Planned(plan=plan, releases=releases), tuple(what for what, faulty in faults.items() if faulty)


def check_costs(statement: Statement, *, rounds: int) -> CheckedSite:
    """Compute a statement's costs again."""
    runs = [list(expanded(run.mechanisms)) for run in statement.ledger]
    private = all(run.noise == OSNoise.name for run in statement.ledger)
    infinite = PrivacySpent(epsilon=math.inf, delta=statement.delta, by_accountant={})
    return CheckedSite(
        statement=statement,
        this_run=spent(statement.mechanisms(), statement.delta) if statement.private else infinite,
        lifetime=spent_over_runs(runs, statement.delta) if private else infinite,
        rounds=rounds,
        this_run_alone=_costs_alone([statement.releases], statement.delta, private=statement.private),
        lifetime_alone=_costs_alone([run.mechanisms for run in statement.ledger], statement.delta, private=private),
    )


def _costs_alone(runs: Sequence[Sequence[Repeated]], delta: float, *, private: bool) -> PrivacySpent | None:
    """What runs cost where no mask held; None where there were none."""
    if all(one.shared is None for run in runs for one in run):
        return None
    if not private:
        return PrivacySpent(epsilon=math.inf, delta=delta, by_accountant={})
    return spent_over_runs([list(expanded_alone(run)) for run in runs], delta)


def statement_faults(
    name: str, site: CheckedSite, run: RunFacts, planned: Planned, used: Sequence[Place]
) -> Iterator[str]:
    """What is wrong with a statement.

    Args:
        name: whose it is to be.
        site: the statement and its costs.
        run: what the coordinator says was run.
        planned: its plan.
        used: the rounds in which the coordinator used an update of this site.
    """
    said = site.statement
    yield from _identity_faults(name, said, run, planned.plan)
    yield from _release_faults(said, planned)
    yield from _sharing_faults(said, run, planned.plan)
    yield from _ledger_faults(said)
    yield from _cost_faults("this_run", said.this_run, site.this_run)
    yield from _cost_faults("lifetime", said.lifetime, site.lifetime)
    yield from _alone_faults("this_run_alone", said.this_run_alone, site.this_run_alone)
    yield from _alone_faults("lifetime_alone", said.lifetime_alone, site.lifetime_alone)
    yield from _limit_faults("epsilon_per_run", said.limits.epsilon_per_run, site.this_run)
    yield from _limit_faults("epsilon_lifetime", said.limits.epsilon_lifetime, site.lifetime)
    if said.audit is not None and said.audit.get("passed") is not True:
        yield "audit: it did not pass"
    done = {place for one in said.releases if one.last <= planned.last for place in _places(one)}
    for number, kind in used:
        if (number, kind) not in done:
            yield f"releases: none of round {number} ({kind}), of which the run used an update"


def _places(one: Releases) -> Iterator[Place]:
    return ((number, one.kind) for number in range(one.first, one.last + 1))


def _identity_faults(name: str, said: Statement, run: RunFacts, plan: RunPlan | None) -> Iterator[str]:
    pairs: dict[str, tuple[object, object]] = {
        "site": (said.site, name),
        "job": (said.job, run.job),
        "plan_sha256": (said.plan_sha256, run.plan_sha256),
        "simulation": (said.simulation, run.simulation),
    }
    if plan is not None:
        pairs["unit"] = (said.unit.value, plan.privacy.unit.value)
        pairs["backbone_sha256"] = (said.backbone_sha256, plan.backbone.sha256 if plan.backbone else None)
    for key, (stated, expected) in pairs.items():
        if stated != expected:
            yield f"{key}: {stated}, where the certificate has {expected}"


def _release_faults(said: Statement, planned: Planned) -> Iterator[str]:
    for one in said.releases:
        if one.last > planned.last:
            yield f"releases: round {one.last}, which the plan does not have"
            continue
        due = [planned.releases.get(place) for place in _places(one)]
        if any(release is None or not _same(one.mechanism, release.mechanism) for release in due):
            yield f"releases: rounds {one.first} to {one.last} ({one.kind}) are not the plan's"
    done = list(said.mechanisms())
    if {mechanism.unit for mechanism in done} - {said.unit}:
        yield f"unit: a release protects another unit than the {said.unit}"
    if said.sampler != sampler_of(done):
        yield f"sampler: {said.sampler}, where the releases say {sampler_of(done)}"


def _sharing_faults(said: Statement, run: RunFacts, plan: RunPlan | None) -> Iterator[str]:
    """Noise is shared as the plan says, and by as many sites as the coordinator's round had, at the least once."""
    if plan is None:
        return
    if plan.privacy.noise == "local":
        if any(one.shared is not None for one in said.releases):
            yield "releases: noise that was shared, where the plan has every site add all of it"
        return
    for one in said.releases:
        if one.shared is None or one.shared.colluding != plan.cohort.colluding(one.shared.sites):
            yield f"releases: the noise of rounds {one.first} to {one.last} was not shared as the plan says"
    for done in run.rounds:
        sums = {one.shared.sites for one in said.releases if one.shared and (done.round, one.kind) in _places(one)}
        if said.site in done.sites and len(done.sites) not in sums:
            yield f"releases: none of round {done.round} in a sum of its {len(done.sites)} sites"


def _same(stated: Mechanism, planned: Mechanism) -> bool:
    """Whether two mechanisms are one, up to the last digits of a calibrated σ."""
    close = math.isclose(stated.noise_multiplier, planned.noise_multiplier, rel_tol=_SAME_SIGMA)
    record, other = stated.to_record(), planned.to_record()
    return close and {**record, "noise_multiplier": ""} == {**other, "noise_multiplier": ""}


def _ledger_faults(said: Statement) -> Iterator[str]:
    own = [run for run in said.ledger if run.this_run]
    if len(own) != 1 or _counted(own[0].mechanisms) != _counted(said.releases):
        yield "ledger: its lines of this run are not the releases"
    elif own[0].noise != said.noise:
        yield f"noise: {said.noise}, where the ledger says {own[0].noise}"
    lines = sum(one.count for run in said.ledger for one in run.mechanisms)
    if said.ledger_lines < lines:
        yield f"ledger_lines: {said.ledger_lines} for {lines} mechanisms"
    every = [one.mechanism for run in said.ledger for one in run.mechanisms]
    if {mechanism.unit for mechanism in every} - {said.limits.unit}:
        yield "ledger: mechanisms of another unit than limits.unit, whose costs do not add up"
    if {mechanism.relation for mechanism in every} - {said.relation}:
        yield "relation: a mechanism has another one"
    if said.relation is not NeighboringRelation.ADD_OR_REMOVE_ONE:
        yield f"relation: {said.relation}"


def _counted(listed: Sequence[Repeated]) -> Counter[tuple[Mechanism, Shared | None]]:
    counts: Counter[tuple[Mechanism, Shared | None]] = Counter()
    for one in listed:
        counts[one.mechanism, one.shared] += one.count
    return counts


def _cost_faults(name: str, claimed: Cost, cost: PrivacySpent) -> Iterator[str]:
    yield from _figure_faults(name, claimed.epsilon, cost.epsilon)
    for accountant, figure in claimed.by_accountant.items():
        if accountant not in cost.by_accountant:
            yield f"{name}: {accountant} is no accountant of these mechanisms"
        else:
            yield from _figure_faults(f"{name}: {accountant}", figure, cost.by_accountant[accountant])


def _alone_faults(name: str, claimed: Cost | None, cost: PrivacySpent | None) -> Iterator[str]:
    if claimed is not None and cost is not None:
        yield from _cost_faults(name, claimed, cost)
    elif claimed is not None or cost is not None:
        yield f"{name}: stated with and only with masked sums"


def _figure_faults(name: str, claimed: float | None, cost: float) -> Iterator[str]:
    stated = math.inf if claimed is None else claimed
    if stated != cost and not cost * (1 - LESS) <= stated <= cost * (1 + MORE):
        yield f"{name}: epsilon {stated:.6g} is claimed, its mechanisms cost {cost:.6g}"


def _limit_faults(name: str, limit: float | None, cost: PrivacySpent) -> Iterator[str]:
    if limit is not None and math.isfinite(cost.epsilon) and cost.epsilon > limit:
        yield f"limits: epsilon {cost.epsilon:.6g} passes {name} = {limit:g}"
