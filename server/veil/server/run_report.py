# SPDX-License-Identifier: Apache-2.0
"""report.json of a deployed run: what the coordinator knows, which is what the sites released.

Promises the keys of a simulation's report; what only a site knows (its records, its exact scores, its units unless it
declares them public) is null, and what the sites released of their scores stands with its error.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import numpy as np
from numpy.typing import NDArray

from veil.common.evaluation import CONFIDENCE
from veil.common.evaluation_forms import figures, vector_size
from veil.common.group_quality import groups_quality
from veil.common.mismatch import Mismatch
from veil.common.plan import RunPlan
from veil.common.privacy import Mechanism, NeighboringRelation, spent
from veil.common.schedule import ReleaseKind, schedule
from veil.server.state import RoundRecord, RunState


def build_run_report(plan: RunPlan, job: str, state: RunState, seconds: dict[str, float]) -> dict[str, Any]:
    """The document.

    Args:
        plan: what was run.
        job: the run's name.
        state: its end.
        seconds: time by phase.
    """
    names = sorted(set(state.cohort) | set(state.declined))
    return {
        "name": plan.name,
        "job": job,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "veil_version": version("veil"),
        "private": True,
        "plan": json.loads(plan.to_json()),
        "plan_sha256": plan.sha256,
        "backbone": backbone_report(plan),
        "privacy": {
            "unit": plan.privacy.unit.value,
            "relation": NeighboringRelation.ADD_OR_REMOVE_ONE.value,
            "target_epsilon": plan.privacy.target_epsilon,
            "target_delta": plan.privacy.target_delta,
        },
        "sites": [_site(plan, state, name) for name in names],
        "metrics": {},
        "per_site": [],
        "evaluation": evaluation_report(plan, state.evaluation, state.records),
        "mismatch": mismatch_report(plan, state.mismatch, state.records),
        "rounds": [
            {
                "round": record.round,
                "kind": record.kind.value,
                "sites": len(record.sites),
                "refusals": record.refusals,
                "seconds": record.seconds,
            }
            for record in state.records
        ],
        "estimated_units": state.descent.units,
        "timing": seconds,
        "bytes": wire_bytes(state.records),
    }


def backbone_report(plan: RunPlan) -> dict[str, str] | None:
    """Where the pretrained model comes from, as far as the plan says; None without one."""
    if plan.backbone is None:
        return None
    return plan.backbone.model_dump(include={"source", "sha256", "licence", "trained_on", "citation"})


def wire_bytes(records: Sequence[RoundRecord]) -> dict[str, int]:
    """What a site receives and sends: in a round, told by the last one that moved the model, and in all rounds."""
    last = [record for record in records if record.kind is not ReleaseKind.EVALUATION][-1]
    return {
        "per_round_per_site": last.bytes_down + last.bytes_up,
        "down": last.bytes_down,
        "up": last.bytes_up,
        "total_per_site": sum(record.bytes_down + record.bytes_up for record in records),
    }


def evaluation_report(
    plan: RunPlan, replies: Mapping[str, Sequence[int]], records: Sequence[RoundRecord]
) -> dict[str, Any] | None:
    """The model on held-out units, of all sites together and of each, every figure with its error; None without any.

    Sites' sums are added as they are: `cohort.aggregation` is about updates of the model.

    Args:
        plan: what was run.
        replies: site to the lattice points that it released, or the masked sum of all.
        records: the run's rounds.
    """
    releases = [one for one in schedule(plan) if one.kind is ReleaseKind.EVALUATION]
    if plan.evaluation is None or not releases or not replies:
        return None
    mechanism = releases[0].mechanism
    deviation = mechanism.noise_multiplier * mechanism.max_grad_norm
    sums = {name: np.array(points, dtype=np.float64) * releases[0].spacing for name, points in replies.items()}
    together = np.sum(list(sums.values()), axis=0)
    last = [record for record in records if record.kind is ReleaseKind.EVALUATION][-1]
    shares = last.shares(plan)
    return {
        "on": "units that each site held out from training, from noised sums that the sites released",
        "holdout": plan.evaluation.holdout,
        "sites": len(last.sites),
        "confidence": CONFIDENCE,
        **_told(together, deviation * math.sqrt(shares.excess if shares else len(sums)), plan),
        "per_site": []
        if shares
        else [{"name": name, **_told(numbers, deviation, plan)} for name, numbers in sorted(sums.items())],
    }


def mismatch_report(plan: RunPlan, found: Mapping[str, Mismatch], records: Sequence[RoundRecord]) -> dict[str, Any]:
    """How far each site's mean feature lies from the others'; `per_site` is null, with a reason, where nobody can tell.

    Args:
        plan: what was run.
        found: of each site that answered the centring round.
        records: the run's rounds.
    """
    return {
        "on": "the noised sums of the centring round, released anyway: at no further ε",
        "confidence": CONFIDENCE,
        "per_site": [{"name": name, **one.to_report()} for name, one in sorted(found.items())] or None,
        "reason": None if found else _no_mismatch(plan, records),
    }


def _no_mismatch(plan: RunPlan, records: Sequence[RoundRecord]) -> str:
    if not plan.training.centre:
        return "the plan has no centring round"
    if plan.privacy.noise == "distributed":
        return "masks hide every single site's sum"
    if len(records[0].sites) < 2:
        return "no other site to compare with"
    return "an earlier version took the centring round in"


def _told(sums: NDArray[np.float64], deviation: float, plan: RunPlan) -> dict[str, Any]:
    """What released sums say of the whole, of each class, and of each group that the plan names."""
    outcomes, by_group = np.split(sums, [vector_size(plan.task.form, len(plan.task.labels))])
    told = figures(outcomes, deviation, plan.task)
    return {**told, **groups_quality(by_group, deviation, plan.groups).to_report()} if plan.groups else told


def _unmasked(plan: RunPlan, records: Sequence[RoundRecord], name: str) -> Iterator[Mechanism]:
    """What a site's masked releases are for whoever takes its masks off; nothing where it added all its noise."""
    mechanisms = {release.round: release.mechanism for release in schedule(plan)}
    for record in records:
        shares = record.shares(plan)
        if shares is not None and name in record.sites:
            yield shares.unmasked(mechanisms[record.round])


def _site(plan: RunPlan, state: RunState, name: str) -> dict[str, Any]:
    """One site: ε of the replies the coordinator received, a lower bound on what the site's own ledger holds."""
    answered = {record.round for record in state.records if name in record.sites}
    done = [release.mechanism for release in schedule(plan) if release.round in answered]
    cost = spent(done, plan.privacy.target_delta).epsilon if done else 0.0
    alone = list(_unmasked(plan, state.records, name))
    refusals = {str(record.round): record.refusals[name] for record in state.records if name in record.refusals}
    return {
        "name": name,
        "records": None,
        "units": state.declared.get(name),
        "epsilon": cost,
        "epsilon_alone": spent(alone, plan.privacy.target_delta).epsilon if alone else None,
        "delta": plan.privacy.target_delta,
        "rounds": len(done),
        "refusals": {**({"offer": state.declined[name]} if name in state.declined else {}), **refusals},
    }
