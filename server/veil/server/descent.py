# SPDX-License-Identifier: Apache-2.0
"""From the sum of the sites' updates to the next adapter: pure functions of released and public numbers.

Promises that nothing here needs to be private any more: everything is post-processing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from veil.common.evaluation import EVALUATION
from veil.common.evaluation_forms import vector_size
from veil.common.head import CENTRE, WEIGHT
from veil.common.moments import MOMENTS_NORM, STATISTICS, Moments, moments_size
from veil.common.plan import RunPlan
from veil.common.privacy import NoiseShares, gaussian_sigma
from veil.common.schedule import CENTRE_NORM, COUNT_WEIGHT, Release, ReleaseKind, schedule
from veil.common.trained import GRADIENT, is_tuned, of_head, parted, rate_left, rate_of, trained_in
from veil.common.trained import released_size as gradient_size
from veil.common.update import Adapter, Update
from veil.server.aggregation import aggregate
from veil.server.anomaly import AnomalyModel
from veil.server.ridge import ridge_head
from veil.server.steps import Steps, public_steps


@dataclass(kw_only=True)
class Descent:
    """The coordinator's state of a run.

    Attributes:
        plan: the run's plan.
        sites: sites that the run started with.
        weight: the head in float64, [classes, d + 1].
        centre: the released mean of unit rows, [d].
        units: public or released estimate of all units of all sites.
        velocity: Nesterov's, of dp-fedsgd's rounds, [classes, d + 1].
        tuned: tensors below the head by the adapter's name, float64; empty where only the head is tuned.
        tuned_velocity: theirs.
        anomaly: the distribution of unit rows; None before one-shot's message, and of other algorithms.
    """

    plan: RunPlan
    sites: int
    weight: NDArray[np.float64]
    centre: NDArray[np.float64]
    velocity: NDArray[np.float64]
    units: float = field(default=1.0)
    tuned: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    tuned_velocity: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    anomaly: AnomalyModel | None = None

    @classmethod
    def start(cls, plan: RunPlan, adapter: Adapter, sites: int) -> Descent:
        """The state before the first round."""
        tuned = {name: one.astype(np.float64) for name, one in adapter.tensors.items() if is_tuned(name)}
        return cls(
            plan=plan,
            sites=sites,
            weight=adapter.tensors[WEIGHT].astype(np.float64),
            centre=adapter.tensors[CENTRE].astype(np.float64),
            velocity=np.zeros(adapter.tensors[WEIGHT].shape),
            units=float(plan.cohort.nominal_units or 1) * sites,
            tuned=tuned,
            tuned_velocity={name: np.zeros_like(one) for name, one in tuned.items()},
        )

    @property
    def adapter(self) -> Adapter:
        """What the sites get next."""
        tensors = {WEIGHT: self.weight, CENTRE: self.centre, **self.tuned}
        return Adapter(tensors={name: one.astype(np.float32) for name, one in tensors.items()})

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each tensor that trains in some round."""
        return {WEIGHT: self.weight.shape, **{name: one.shape for name, one in self.tuned.items()}}

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
            return EVALUATION, (vector_size(self.plan.task.form, len(self.weight), len(self.plan.groups)),)
        if release.kind is ReleaseKind.STATISTICS:
            return STATISTICS, (moments_size(self.centre.size, len(self.weight)),)
        if self.tuned and not of_head(self.plan, release.round):
            return GRADIENT, (gradient_size(self.shapes, trained_in(self.plan, release.round, self.tuned)),)
        return WEIGHT, (self.weight.shape[0], self.weight.shape[1])

    def apply(self, release: Release, updates: list[Update], shares: NoiseShares | None = None) -> None:
        """Take one training round's updates in; their order does not matter. With shares, it is one: the masked sum.

        A change (dp-fedavg) is counted from the adapter as it travelled, and added to the exact one: what
        `wire.adapter_bits` rounds away is then missing in one round only, and does not add up over rounds.
        """
        sums = aggregate(updates, self.plan.cohort)
        replies = len(updates) if shares is None else shares.sites
        noises = replies if shares is None else shares.excess
        if release.kind is ReleaseKind.CENTRE:
            self._set_centre(release, sums[CENTRE], replies, noises)
        elif release.kind is ReleaseKind.STATISTICS:
            self._set_head(release, sums[STATISTICS], replies, noises)
        elif release.kind is ReleaseKind.GRADIENT and self.tuned and not of_head(self.plan, release.round):
            trained = trained_in(self.plan, release.round, self.tuned)
            parts = parted(sums[GRADIENT], self.shapes, trained)
            self._step(release, parts[WEIGHT])
            self._step_below(release, {name: parts[name] for name in trained})
        elif release.kind is ReleaseKind.GRADIENT:
            self._step(release, sums[WEIGHT])
        else:
            self.weight = self.weight + sums[WEIGHT] / len(updates)

    def seen(self, round_: int) -> float:
        """How many units a round's sum stands for: those of the sites that were asked, as far as they are sampled."""
        sampling = 1.0 if of_head(self.plan, round_) else self.plan.training.sampling
        return self.units * self.asked / self.sites * sampling

    def _step_below(self, release: Release, totals: dict[str, NDArray[np.float64]]) -> None:
        """Descend below the head, each tensor at its part of the head's rate, of which less is left in each round."""
        steps, seen = steps_of(self.plan, self, release.round), self.seen(release.round)
        left = rate_left(self.plan, release.round)
        for name, total in totals.items():
            rate, mean = steps.rate * left * rate_of(self.plan.transfer, name), total / seen
            self.tuned_velocity[name] = steps.momentum * self.tuned_velocity[name] + mean
            self.tuned[name] = self.tuned[name] - rate * (mean + steps.momentum * self.tuned_velocity[name])

    def _step(self, release: Release, total: NDArray[np.float64]) -> None:
        """Descend on a round's sum, which stands for all units in proportion to the sites that were asked."""
        steps, seen = steps_of(self.plan, self, release.round), self.seen(release.round)
        self.velocity = steps.momentum * self.velocity + total / seen
        self.weight = self.weight - steps.rate * (total / seen + steps.momentum * self.velocity)

    def _set_centre(self, release: Release, sums: NDArray[np.float64], replies: int, noises: float) -> None:
        """`noises` is the variance of the sum's noise in units of the mechanism's."""
        counted = self._counted(float(sums[-1]) / COUNT_WEIGHT, replies)
        mean = sums[:-1] / counted
        deviation = release.mechanism.noise_multiplier * CENTRE_NORM * math.sqrt(noises) / counted
        self.centre = shrink(mean, deviation)

    def _set_head(self, release: Release, sums: NDArray[np.float64], replies: int, noises: float) -> None:
        """From one message of every site; the centre stays 0, as the intercept holds it."""
        classes, width = len(self.weight), self.centre.size
        moments = Moments.from_vector(sums, width=width, classes=classes)
        counted = self._counted(float(moments.counts.sum()), replies)
        deviation = release.mechanism.noise_multiplier * MOMENTS_NORM * math.sqrt(noises)
        mean = shrink(moments.sums.sum(axis=0) / counted, deviation * math.sqrt(classes) / counted)
        self.weight = ridge_head(moments, mean, count=counted, deviation=deviation)
        self.anomaly = AnomalyModel.from_moments(moments, mean, count=counted, deviation=deviation)

    def _counted(self, units: float, replies: int) -> float:
        """A noisy number of units, one a site at least; it stands for all sites where no public number does."""
        counted = max(float(replies), units)
        if self.plan.cohort.nominal_units is None:
            self.units = counted * self.sites / replies
        return counted


def shrink(mean: NDArray[np.float64], deviation: float) -> NDArray[np.float64]:
    """Positive-part James-Stein estimate of a mean seen under noise (James & Stein 1961).

    Args:
        mean: noised mean, [d].
        deviation: standard deviation of its noise in each coordinate.
    """
    length = float(mean @ mean)
    noise = deviation**2 * max(0, mean.size - 2)
    return mean * (max(0.0, 1.0 - noise / length) if length > 0 else 0.0)


def steps_of(plan: RunPlan, state: Descent, round_: int) -> Steps:
    """The plan's own rate, or the public rule for a round that asks some of the sites; the rounds of the head alone and
    those after them each go their own way."""
    if plan.training.learning_rate is not None:
        return Steps(rate=plan.training.learning_rate)
    asked, first = state.asked, plan.transfer.head_rounds
    honest = asked - plan.cohort.colluding(asked) if plan.privacy.noise == "distributed" else 1
    return public_steps(
        units=state.seen(round_),
        classes=len(state.weight),
        bound=plan.privacy.max_grad_norm,
        sigma=_sigma_of_one(plan, round_),
        noises=asked / honest,
        rounds=first if of_head(plan, round_) else plan.training.rounds - first,
        form=plan.task.form,
    )


def _sigma_of_one(plan: RunPlan, round_: int) -> float:
    """σ of the one release that would spend the budget; of rounds that are sampled or have a part of it, what theirs
    amount to."""
    first = plan.transfer.head_rounds
    if plan.training.sampling == 1 and not first:
        return gaussian_sigma(plan.privacy.budget)
    each = next(one for one in schedule(plan) if one.kind is ReleaseKind.GRADIENT and one.round == round_)
    return each.mechanism.noise_multiplier / math.sqrt(first if of_head(plan, round_) else plan.training.rounds - first)
