# SPDX-License-Identifier: Apache-2.0
"""A plan's releases: which mechanism runs in which round, calibrated to the budget of the whole run.

Promises that coordinator and site, each computing it from the plan alone, agree; a site follows its own. An evaluation
is charged like any release, though units that never train pay for it alone and the others for training alone: the
ledger, which knows no single unit, over-counts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache

from veil.common.errors import PlanError
from veil.common.evaluation_forms import vector_norm
from veil.common.moments import MOMENTS_NORM
from veil.common.noise import spacing
from veil.common.plan import RunPlan
from veil.common.plan_sections import Algorithm
from veil.common.privacy import Mechanism, calibrate, gaussian_sigma

CENTRE_SHARE = 0.12
"""Part of the run's μ² that the centring round may use."""

HEAD_SHARE = 0.25
"""Part of the run's μ² that rounds of the head alone may use, where more than it is tuned."""

COUNT_WEIGHT = 0.5
"""The constant released beside each unit's mean feature, whose noisy sum estimates the number of units."""

CENTRE_NORM = math.sqrt(1 + COUNT_WEIGHT**2)
"""L2 bound of one unit's [mean feature, COUNT_WEIGHT]."""


DELTA_SPACING = 2.0**-24
"""Grid of a dp-fedavg update, which is already private when it is rounded."""

DEFAULT_LOCAL_RATE = 4.0
"""dp-fedavg's rate where the plan names none (facts: 20 rounds, one epoch, centred features)."""


class ReleaseKind(StrEnum):
    """What a round asks of a site."""

    CENTRE = "centre"
    GRADIENT = "gradient"
    DELTA = "delta"
    STATISTICS = "statistics"
    EVALUATION = "evaluation"


_TRAINING: Mapping[Algorithm, ReleaseKind] = {
    "dp-fedsgd": ReleaseKind.GRADIENT,
    "dp-fedavg": ReleaseKind.DELTA,
    "one-shot": ReleaseKind.STATISTICS,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Release:
    """One round of one site.

    Attributes:
        round: 0 for the centring round, then 1, 2, …; an evaluation comes last.
        kind: what is released.
        mechanism: how it is protected.
        update_bits: of the integers that leave. What comes once a run is 32 wide, and then exact up to thousands of
            units: error bars and bounds are made of it.
    """

    round: int
    kind: ReleaseKind
    mechanism: Mechanism
    update_bits: int = 32

    @property
    def spacing(self) -> float:
        """Distance of the release's lattice points as they are drawn."""
        return DELTA_SPACING if self.kind is ReleaseKind.DELTA else spacing(self.mechanism.max_grad_norm)


def schedule(plan: RunPlan) -> tuple[Release, ...]:
    """All releases of a run, in order.

    Raises:
        PlanError: when no noise keeps the promise.
    """
    return _schedule(plan.public().to_json())


@lru_cache(maxsize=64)
def _schedule(plan_json: str) -> tuple[Release, ...]:
    plan = RunPlan.from_json(plan_json)
    try:
        return _releases(plan)
    except ValueError as error:
        raise PlanError(
            f"privacy.target_epsilon = {plan.privacy.target_epsilon} for {plan.training.rounds} rounds ({error})",
            "a budget that some amount of noise keeps",
            "raise target_epsilon or lower training.rounds",
        ) from None


def _releases(plan: RunPlan) -> tuple[Release, ...]:
    budget = plan.privacy.budget
    heads, last = _head_rounds(plan), _evaluations(plan)
    first = (*_centring(plan), *heads)
    spare = [release.mechanism for release in heads[:1]] * spare_rounds(plan)
    decided = [*(release.mechanism for release in (*first, *last)), *spare]
    fedavg, one_shot = (plan.training.algorithm == name for name in ("dp-fedavg", "one-shot"))
    rate = 1.0 if one_shot else plan.training.sampling
    per_round = local_steps(plan) if fedavg else 1
    whole = calibrate(
        budget,
        steps=(plan.training.rounds - plan.transfer.head_rounds + spare_rounds(plan)) * per_round,
        sample_rate=rate,
        max_grad_norm=MOMENTS_NORM if one_shot else plan.privacy.max_grad_norm,
        unit=plan.privacy.unit,
        alongside=decided,
    )
    each = Mechanism(
        noise_multiplier=whole.noise_multiplier,
        max_grad_norm=whole.max_grad_norm,
        sample_rate=rate,
        steps=per_round,
        unit=whole.unit,
    )
    kind = _TRAINING[plan.training.algorithm]
    training = (
        Release(round=r, kind=kind, mechanism=each, update_bits=plan.wire.update_bits)
        for r in range(plan.transfer.head_rounds + 1, plan.training.rounds + 1)
    )
    return (*first, *training, *last)


def _centring(plan: RunPlan) -> tuple[Release, ...]:
    if not plan.training.centre:
        return ()
    return (Release(round=0, kind=ReleaseKind.CENTRE, mechanism=_single(plan, CENTRE_SHARE, CENTRE_NORM)),)


def _head_rounds(plan: RunPlan) -> tuple[Release, ...]:
    """The rounds before what is below the head trains: full batches, each of an equal part of their share."""
    rounds = plan.transfer.head_rounds
    if not rounds:
        return ()
    each = _single(plan, HEAD_SHARE / (rounds + spare_rounds(plan)), plan.privacy.max_grad_norm)
    return tuple(
        Release(round=one, kind=ReleaseKind.GRADIENT, mechanism=each, update_bits=plan.wire.update_bits)
        for one in range(1, rounds + 1)
    )


def _evaluations(plan: RunPlan) -> tuple[Release, ...]:
    if plan.evaluation is None:
        return ()
    norm = vector_norm(plan.task.form, len(plan.task.labels), len(plan.groups))
    mechanism = _single(plan, plan.evaluation.share, norm)
    return (Release(round=plan.training.rounds + 1, kind=ReleaseKind.EVALUATION, mechanism=mechanism),)


def _single(plan: RunPlan, share: float, norm: float) -> Mechanism:
    """One full-batch release for a part of the run's μ²."""
    sigma = gaussian_sigma(plan.privacy.budget) / math.sqrt(share)
    return Mechanism(noise_multiplier=sigma, max_grad_norm=norm, unit=plan.privacy.unit)


def spare_rounds(plan: RunPlan) -> int:
    """Training rounds that the noise is sized for beyond those planned: a masked sum that fails is asked anew.

    One message has none to spare: noise for two more would be √3 times as large.
    """
    if plan.privacy.noise == "local" or plan.training.algorithm == "one-shot":
        return 0
    return plan.cohort.retries


def local_steps(plan: RunPlan) -> int:
    """Steps of one dp-fedavg round: as many as pass over the records `local_epochs` times on average."""
    return max(1, round(plan.training.local_epochs / plan.training.sampling))
