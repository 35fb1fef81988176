# SPDX-License-Identifier: Apache-2.0
"""`report.json`: what a run was, what it cost, how good it is.

Promises keys that are only ever added, an ε that comes from the ledgers, and the word `private` wherever it is not.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

from veil.client.comparison import Estimate
from veil.client.personal import EPSILON, Origin
from veil.common.mismatch import Mismatch
from veil.common.plan import RunPlan
from veil.common.privacy import NeighboringRelation, PrivacySpent
from veil.server.run_report import backbone_report, evaluation_report, mismatch_report, wire_bytes
from veil.server.state import RoundRecord
from veil.simulations.evaluation import Scores
from veil.simulations.selection import Overall, SiteSelection

_SELECTOR = (
    "Each site compared the federated head with its own and with a correction of it, on its own records and without "
    "noise. Neither heads nor figures of it left a site, so that it costs no privacy."
)


@dataclass(frozen=True, kw_only=True, slots=True)
class SiteResult:
    """One site's line.

    Attributes:
        name: of the site.
        records: that the run has; an evaluation holds some of them out of training.
        test_records: that it does not have, for the exact scores below.
        units: of `records` (records or patients).
        spent: what the run cost one unit, from the site's ledger.
        unmasked: the same if the site's masks were taken off; None where it shared no noise.
        rounds: releases in the ledger.
        refusals: reasons by round.
        federated: the common model on the site's held-out records.
        local_only: its own model on them, where asked for.
        local_only_everywhere: its own model on all sites' held-out records.
        selection: which head it keeps, where asked for.
    """

    name: str
    records: int
    test_records: int
    units: int
    spent: PrivacySpent
    unmasked: PrivacySpent | None
    rounds: int
    refusals: dict[int, str]
    federated: Scores
    local_only: Scores | None
    local_only_everywhere: Scores | None
    selection: SiteSelection | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Curve:
    """The run after each round, for the picture.

    Attributes:
        round: 0 for the centring round.
        scores: of the common model on held-out records.
        epsilon: spent so far at the site that spent most; infinite when not private.
    """

    round: int
    scores: Scores
    epsilon: float


@dataclass(frozen=True, kw_only=True, slots=True)
class SimulationResult:
    """Everything a finished simulation knows."""

    plan: RunPlan
    sites: tuple[SiteResult, ...]
    metrics: dict[str, Scores]
    curve: tuple[Curve, ...]
    records: tuple[RoundRecord, ...]
    timing: dict[str, float]
    engine: str
    estimated_units: float
    evaluation: dict[str, tuple[int, ...]]
    mismatch: dict[str, Mismatch]
    groups: dict[str, Any] | None = None

    @property
    def private(self) -> bool:
        """Whether the noise came from the operating system."""
        return self.plan.simulation is not None and self.plan.simulation.noise == "os"

    @property
    def selections(self) -> tuple[SiteSelection, ...]:
        """What the sites chose, where they were asked."""
        return tuple(site.selection for site in self.sites if site.selection)


def build_report(result: SimulationResult) -> dict[str, Any]:
    """The document; infinite ε is null, as JSON has no infinity."""
    plan = result.plan
    return {
        "name": plan.name,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "veil_version": version("veil"),
        "private": result.private,
        "statement": _statement(result),
        "simulation": {
            "engine": result.engine,
            "metrics_on": "all sites' held-out records, which only a simulation can see at once",
        },
        "plan": json.loads(plan.to_json()),
        "plan_sha256": plan.sha256,
        "backbone": backbone_report(plan),
        "privacy": {
            "unit": plan.privacy.unit.value,
            "relation": NeighboringRelation.ADD_OR_REMOVE_ONE.value,
            "target_epsilon": plan.privacy.target_epsilon,
            "target_delta": plan.privacy.target_delta,
            "noise": plan.simulation.noise if plan.simulation else "os",
        },
        "sites": [_site(site) for site in result.sites],
        "metrics": {name: scores.to_report() for name, scores in result.metrics.items()},
        "per_site": [_per_site(site) for site in result.sites],
        "selector": _selector(result),
        "groups": result.groups,
        "evaluation": evaluation_report(plan, result.evaluation, result.records),
        "mismatch": mismatch_report(plan, result.mismatch, result.records),
        "rounds": [_round(record, point) for record, point in zip(result.records, result.curve, strict=True)],
        "estimated_units": result.estimated_units,
        "timing": result.timing,
        "bytes": wire_bytes(result.records),
    }


def _statement(result: SimulationResult) -> str:
    privacy = result.plan.privacy
    if not result.private:
        return "NOT PRIVATE: a simulation without the operating system's noise; its ε is unbounded."
    worst = max(site.spent.epsilon for site in result.sites)
    unmasked = max((site.unmasked.epsilon for site in result.sites if site.unmasked), default=None)
    instead = "" if unmasked is None else f" If its masks were taken off, ε would be {unmasked:.4g} instead."
    return (
        f"All that left a site is ({worst:.4g}, {privacy.target_delta:g})-differentially private "
        f"with respect to adding or removing one {privacy.unit.value} of that site.{instead}"
    )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _site(site: SiteResult) -> dict[str, Any]:
    return {
        "name": site.name,
        "records": site.records,
        "test_records": site.test_records,
        "units": site.units,
        "epsilon": site.spent.finite_epsilon,
        "epsilon_alone": site.unmasked.finite_epsilon if site.unmasked else None,
        "delta": site.spent.delta,
        "accountants": dict(site.spent.by_accountant),
        "rounds": site.rounds,
        "refusals": {str(round_): reason for round_, reason in site.refusals.items()},
    }


def _per_site(site: SiteResult) -> dict[str, Any]:
    return {
        "name": site.name,
        "federated": site.federated.to_report(),
        "local_only": site.local_only.to_report() if site.local_only else None,
        "local_only_everywhere": site.local_only_everywhere.to_report() if site.local_only_everywhere else None,
        "selector": _site_selector(site.selection) if site.selection else None,
    }


def _site_selector(selection: SiteSelection) -> dict[str, Any]:
    held_out = {origin.value: asdict(selection.accuracy(origin)) for origin in selection.right}
    return {
        "chosen": selection.chosen.value,
        "strength": selection.strength,
        "epsilon": EPSILON,
        "cross_validated": {origin.value: asdict(found) for origin, found in selection.cross_validated.items()},
        "held_out": {**held_out, "chosen": held_out[selection.chosen.value]},
        "gain": _interval(selection.gain),
        "federated_gain": _interval(selection.federated_gain),
        "label_shift": selection.label_shift,
        "findings": [finding.value for finding in selection.findings],
    }


def _interval(found: Estimate) -> dict[str, float]:
    return {**asdict(found), "low": found.low, "high": found.high}


def _selector(result: SimulationResult) -> dict[str, Any] | None:
    """Over all sites; None where no site was asked."""
    selections = result.selections
    if not selections:
        return None
    overall = Overall.of(selections)
    return {
        "statement": _SELECTOR,
        "epsilon": EPSILON,
        "chosen": {origin.value: sum(one.chosen is origin for one in selections) for origin in Origin},
        "held_out": {name: asdict(found) for name, found in overall.accuracies.items()},
        "gain": _interval(overall.gain),
    }


def _round(record: RoundRecord, point: Curve) -> dict[str, Any]:
    return {
        "round": record.round,
        "kind": record.kind.value,
        "sites": len(record.sites),
        "refusals": record.refusals,
        "seconds": record.seconds,
        "accuracy": point.scores.accuracy,
        **({} if point.scores.r2 is None else {"r2": point.scores.r2}),
        "epsilon": _finite(point.epsilon),
    }


def refusals_of(records: Sequence[RoundRecord], site: str) -> dict[int, str]:
    """Rounds in which a site refused, and why."""
    return {record.round: record.refusals[site] for record in records if site in record.refusals}
