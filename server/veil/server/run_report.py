# SPDX-License-Identifier: Apache-2.0
"""report.json of a deployed run: what the coordinator knows, which is what the sites released.

Promises the keys of a simulation's report; what only a site knows (its records, its exact scores, its units unless it
declares them public) is null, and what the sites released of their scores stands with its error.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import numpy as np

from veil.common.evaluation import CONFIDENCE, loss_cap, quality
from veil.common.plan import RunPlan
from veil.common.privacy import NeighboringRelation, spent
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
        "backbone": plan.backbone.model_dump(include={"source", "sha256", "licence"}) if plan.backbone else None,
        "privacy": {
            "unit": plan.privacy.unit.value,
            "relation": NeighboringRelation.ADD_OR_REMOVE_ONE.value,
            "target_epsilon": plan.privacy.target_epsilon,
            "target_delta": plan.privacy.target_delta,
        },
        "sites": [_site(plan, state, name) for name in names],
        "metrics": {},
        "per_site": [],
        "evaluation": evaluation_report(plan, state.evaluation),
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


def wire_bytes(records: Sequence[RoundRecord]) -> dict[str, int]:
    """What a site receives and sends: in a round, told by the last one that moved the model, and in all rounds."""
    last = [record for record in records if record.kind is not ReleaseKind.EVALUATION][-1]
    return {
        "per_round_per_site": last.bytes_down + last.bytes_up,
        "down": last.bytes_down,
        "up": last.bytes_up,
        "total_per_site": sum(record.bytes_down + record.bytes_up for record in records),
    }


def evaluation_report(plan: RunPlan, replies: Mapping[str, Sequence[int]]) -> dict[str, Any] | None:
    """The model on held-out units, of all sites together and of each, every figure with its error; None without any.

    Sites' sums are added as they are: `cohort.aggregation` is about updates of the model.

    Args:
        plan: what was run.
        replies: site to the lattice points that it released.
    """
    releases = [one for one in schedule(plan) if one.kind is ReleaseKind.EVALUATION]
    if plan.evaluation is None or not releases or not replies:
        return None
    mechanism, labels = releases[0].mechanism, plan.task.labels
    deviation = mechanism.noise_multiplier * mechanism.max_grad_norm
    sums = {name: np.array(points, dtype=np.float64) * releases[0].spacing for name, points in replies.items()}
    together = np.sum(list(sums.values()), axis=0)
    return {
        "on": "units that each site held out from training, from noised sums that the sites released",
        "holdout": plan.evaluation.holdout,
        "sites": len(sums),
        "confidence": CONFIDENCE,
        "loss_cap": loss_cap(len(labels)),
        **quality(together, deviation * math.sqrt(len(sums)), labels).to_report(),
        "per_site": [
            {"name": name, **quality(numbers, deviation, labels).to_report()} for name, numbers in sorted(sums.items())
        ],
    }


def _site(plan: RunPlan, state: RunState, name: str) -> dict[str, Any]:
    """One site: ε of the replies the coordinator received, a lower bound on what the site's own ledger holds."""
    answered = {record.round for record in state.records if name in record.sites}
    done = [release.mechanism for release in schedule(plan) if release.round in answered]
    cost = spent(done, plan.privacy.target_delta).epsilon if done else 0.0
    refusals = {str(record.round): record.refusals[name] for record in state.records if name in record.refusals}
    return {
        "name": name,
        "records": None,
        "units": state.declared.get(name),
        "epsilon": cost,
        "delta": plan.privacy.target_delta,
        "rounds": len(done),
        "refusals": {**({"offer": state.declined[name]} if name in state.declined else {}), **refusals},
    }
