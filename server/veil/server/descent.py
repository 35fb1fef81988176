# SPDX-License-Identifier: Apache-2.0
"""From the sum of the sites' updates to the next adapter: pure functions of released and public numbers.

Promises that nothing here needs to be private any more: everything is post-processing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from veil.common.evaluation import EVALUATION, released_size
from veil.common.head import CENTRE, WEIGHT
from veil.common.plan import RunPlan
from veil.common.privacy import gaussian_sigma
from veil.common.schedule import CENTRE_NORM, COUNT_WEIGHT, Release, ReleaseKind
from veil.common.update import Adapter, Update
from veil.server.aggregation import aggregate

WEIGHT_NOISE = 30.0
"""κ of the learning-rate rule: length of the noise that the weights accumulate over the run."""

RATE_CAP = 32.0
"""Largest rate for clipping bounds up to 1; above, it falls in inverse proportion, down to `RATE_FLOOR`."""

RATE_FLOOR = 16.0
"""Cap where nothing is clipped: plain descent on the cross-entropy of unit rows is stable there."""


@dataclass(kw_only=True)
class Descent:
    """The coordinator's state of a run.

    Attributes:
        plan: the run's plan.
        sites: sites that the run started with.
        weight: the head in float64, [classes, d + 1].
        centre: the released mean of unit rows, [d].
        units: public or released estimate of all units of all sites.
    """

    plan: RunPlan
    sites: int
    weight: NDArray[np.float64]
    centre: NDArray[np.float64]
    units: float = field(default=1.0)

    @classmethod
    def start(cls, plan: RunPlan, adapter: Adapter, sites: int) -> Descent:
        """The state before the first round."""
        return cls(
            plan=plan,
            sites=sites,
            weight=adapter.tensors[WEIGHT].astype(np.float64),
            centre=adapter.tensors[CENTRE].astype(np.float64),
            units=float(plan.cohort.nominal_units or 1) * sites,
        )

    @property
    def adapter(self) -> Adapter:
        """What the sites get next."""
        tensors = {WEIGHT: self.weight.astype(np.float32), CENTRE: self.centre.astype(np.float32)}
        return Adapter(tensors=tensors)

    @property
    def nominal_units(self) -> float:
        """Public number of units per site."""
        return max(1.0, self.units / self.sites)

    @property
    def asked(self) -> int:
        """How many sites a training round asks."""
        return min(self.sites, self.plan.cohort.sites_per_round or self.sites)

    def expected_shape(self, release: Release) -> tuple[str, tuple[int, ...]]:
        """Name and shape of the one tensor that an update of this release holds."""
        if release.kind is ReleaseKind.CENTRE:
            return CENTRE, (self.centre.size + 1,)
        if release.kind is ReleaseKind.EVALUATION:
            return EVALUATION, (released_size(len(self.weight)),)
        return WEIGHT, (self.weight.shape[0], self.weight.shape[1])

    def apply(self, release: Release, updates: list[Update]) -> None:
        """Take one training round's updates in; their order does not matter.

        A change (dp-fedavg) is counted from the adapter as it travelled, and added to the exact one: what
        `wire.adapter_bits` rounds away is then missing in one round only, and does not add up over rounds.
        """
        sums = aggregate(updates, self.plan.cohort)
        if release.kind is ReleaseKind.CENTRE:
            self._set_centre(release, sums[CENTRE], len(updates))
        elif release.kind is ReleaseKind.GRADIENT:
            seen = self.units * self.asked / self.sites
            self.weight = self.weight - learning_rate(self.plan, self) / seen * sums[WEIGHT]
        else:
            self.weight = self.weight + sums[WEIGHT] / len(updates)

    def _set_centre(self, release: Release, sums: NDArray[np.float64], replies: int) -> None:
        counted = max(float(replies), float(sums[-1]) / COUNT_WEIGHT)
        if self.plan.cohort.nominal_units is None:
            self.units = counted * self.sites / replies
        mean = sums[:-1] / counted
        deviation = release.mechanism.noise_multiplier * CENTRE_NORM * math.sqrt(replies) / counted
        self.centre = shrink(mean, deviation)


def shrink(mean: NDArray[np.float64], deviation: float) -> NDArray[np.float64]:
    """Positive-part James-Stein estimate of a mean seen under noise (James & Stein 1961).

    Args:
        mean: noised mean, [d].
        deviation: standard deviation of its noise in each coordinate.
    """
    length = float(mean @ mean)
    noise = deviation**2 * max(0, mean.size - 2)
    return mean * (max(0.0, 1.0 - noise / length) if length > 0 else 0.0)


def learning_rate(plan: RunPlan, state: Descent) -> float:
    """The plan's rate, or the public rule: as large as keeps the weights' accumulated noise at κ, but capped.

    After T rounds with per-round noise C·σ₁√T on the sums of k out of K sites, the weights carry noise of length
    rate/units · C·σ₁·K/√k·T·√(classes·(d+1)); σ₁ is the σ of a single release for the same budget.
    """
    if plan.training.learning_rate is not None:
        return plan.training.learning_rate
    bound = plan.privacy.max_grad_norm
    cap = min(RATE_CAP, max(RATE_FLOOR, RATE_CAP / bound))
    sites = state.sites**2 / state.asked
    noise = bound * gaussian_sigma(plan.privacy.budget) * math.sqrt(sites * state.weight.size)
    return min(cap, WEIGHT_NOISE * state.units / (noise * plan.training.rounds))
