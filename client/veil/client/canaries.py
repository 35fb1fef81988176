# SPDX-License-Identifier: Apache-2.0
"""Artificial records that betray themselves as loudly as a record can, sent through the site's own release code.

Promises that every record here is made up: unit rows that share no coordinate, so that each moves numbers of its own,
at a head that a hostile coordinator chose for the longest gradients. Method: Nasr et al. 2023, Andrew et al. 2024.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from veil.client.release import draw
from veil.client.units import Units, bounded_units
from veil.common.exchange import RoundRequest
from veil.common.head import CENTRE, INTERCEPT, WEIGHT, initial_adapter
from veil.common.moments import STATISTICS, Moments
from veil.common.noise import NoiseSource, OSNoise
from veil.common.objective import OBJECTIVES, Targets
from veil.common.plan import RunPlan
from veil.common.privacy import PrivacyUnit
from veil.common.schedule import DEFAULT_LOCAL_RATE, Release, ReleaseKind
from veil.common.update import Adapter, Update

CANARIES = 500
"""Canaries of one play, half of them included on average."""

PULL = 30.0
"""Weight that makes every canary look like class 0; its label is class 1, and its gradient as long as can be. Of
several labels, or of a number, the weight that makes it look like all of them, or like the highest number: it has none,
or the lowest."""

RECORDS = 4
"""Patient unit: records of one canary, before the plan's limit."""

LONGEST = math.sqrt(2.0)
"""Length of what a canary adds to moments in places of its own: to one product and to one feature of its class."""

_OWN = 1 / math.sqrt(1 + INTERCEPT**2)
_STEP = 0.01


@dataclass(frozen=True, kw_only=True, slots=True)
class Play:
    """One run with its own canaries.

    Attributes:
        included: which took part, [canaries].
        rows: what each release holds along each canary's gradient, in standard deviations of the paid noise,
            [releases, canaries].
        gaps: how much an included canary is expected to move each row, [releases].
    """

    included: NDArray[np.bool_]
    rows: NDArray[np.float64]
    gaps: NDArray[np.float64]

    @property
    def scores(self) -> NDArray[np.float64]:
        """Every release weighed by what it tells; noise of standard deviation 1, [canaries]."""
        scores: NDArray[np.float64] = self.gaps @ self.rows / np.linalg.norm(self.gaps)
        return scores

    @property
    def threshold(self) -> float:
        """The score above which a canary is called a member: half of what one is expected to add."""
        return float(np.linalg.norm(self.gaps)) / 2


def play(plan: RunPlan, releases: Sequence[Release], noise: NoiseSource) -> Play:
    """Include canaries at random and draw every release of a run.

    Args:
        plan: the run's plan.
        releases: its training rounds; an evaluation reads units that never train, and no canary is among them.
        noise: what the releases get; who takes part is always the operating system's choice.
    """
    included = OSNoise().uniform(CANARIES) < 0.5
    units = canary_units(plan, included)
    rows = [_along(draw(_request(plan, one), one, units, noise), one, plan) for one in releases]
    return Play(included=included, rows=np.array(rows), gaps=np.array([_gap(one, plan) for one in releases]))


def canary_units(plan: RunPlan, included: NDArray[np.bool_]) -> Units:
    """The included canaries as the site's records; patients have several records each."""
    patients = plan.privacy.unit is PrivacyUnit.PATIENT
    rows = np.repeat(np.flatnonzero(included), RECORDS if patients else 1)
    return bounded_units(
        np.eye(len(included))[rows],
        _truth(plan, len(rows)),
        rows.astype(np.str_),
        max_records=plan.privacy.max_records_per_patient if patients else 1,
        key=os.urandom(32),
    )


def longest(plan: RunPlan) -> float:
    """Length of the longest gradient of a record."""
    return OBJECTIVES[plan.task.form].longest(len(plan.task.labels))


def _truth(plan: RunPlan, count: int) -> Targets:
    """What is as far as can be from the answers to canaries."""
    if plan.task.form == "classification":
        return np.ones(count, dtype=np.int64)
    return np.zeros((count, len(plan.task.labels))) if plan.task.form == "multilabel" else np.zeros(count)


def _pull(plan: RunPlan) -> NDArray[np.float64]:
    """The error of a canary's scores, [labels]."""
    if plan.task.form == "classification":
        return np.array([1.0, -1.0, *[0.0] * (len(plan.task.labels) - 2)])
    return np.ones(len(plan.task.labels))


def _request(plan: RunPlan, release: Release) -> RoundRequest:
    """What a hostile coordinator asks: the same head in every round, and local steps too short to leave it."""
    adapter = initial_adapter(plan, CANARIES)
    weight = adapter.tensors[WEIGHT].copy()
    weight[_pull(plan) > 0, :CANARIES] = PULL
    return RoundRequest(
        plan=plan,
        job="audit",
        round=release.round,
        kind=release.kind,
        adapter=Adapter(tensors={WEIGHT: weight, CENTRE: adapter.tensors[CENTRE]}),
        nominal_units=_local_rate(plan) * _noise(release) / (release.mechanism.sample_rate * _STEP),
    )


def _local_rate(plan: RunPlan) -> float:
    return plan.training.learning_rate or DEFAULT_LOCAL_RATE


def _noise(release: Release) -> float:
    """Standard deviation of one step's noise, in the unit of the clipped values."""
    return release.mechanism.noise_multiplier * release.mechanism.max_grad_norm


def _along(update: Update, release: Release, plan: RunPlan) -> NDArray[np.float64]:
    """The released numbers along every canary's own gradient, over the paid noise, [canaries]."""
    if release.kind is ReleaseKind.CENTRE:
        return np.asarray(update.points[CENTRE][:CANARIES] * (update.spacing / _noise(release)))
    if release.kind is ReleaseKind.STATISTICS:
        numbers = np.asarray(update.points[STATISTICS] * (update.spacing / _noise(release)), np.float64)
        moments = Moments.from_vector(numbers, width=CANARIES, classes=len(plan.task.labels))
        return np.asarray((np.diagonal(moments.products) + moments.sums[1]) / LONGEST)
    along = _pull(plan) @ (update.points[WEIGHT][:, :CANARIES] * update.spacing) / longest(plan)
    if release.kind is ReleaseKind.DELTA:
        along *= -_noise(release) / (_STEP * math.sqrt(release.mechanism.steps))
    return np.asarray(along / _noise(release))


def _gap(release: Release, plan: RunPlan) -> float:
    mechanism = release.mechanism
    if release.kind is ReleaseKind.CENTRE:
        return 1.0 / _noise(release)
    if release.kind is ReleaseKind.STATISTICS:
        return LONGEST / _noise(release)
    reach = _OWN * min(1.0, longest(plan) / mechanism.max_grad_norm)
    return reach * mechanism.sample_rate * math.sqrt(mechanism.steps) / mechanism.noise_multiplier
