# SPDX-License-Identifier: Apache-2.0
"""A plan's rounds on pooled units: the sites' and the coordinator's own code, and the noise of all sites at once.

Promises what a federation would reach, without its wires: sums do not see who has which unit.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from veil.client.release import draw
from veil.client.units import Units
from veil.common.exchange import RoundRequest
from veil.common.head import initial_adapter, predict
from veil.common.noise import SharedNoise
from veil.common.plan import RunPlan
from veil.common.privacy import NoiseShares
from veil.common.schedule import Release, ReleaseKind, schedule
from veil.common.update import Adapter
from veil.server.descent import Descent
from veil.simulations.evaluation import non_private
from veil.simulations.made_up import TEST_RECORDS, MadeUpTask, Sizes
from veil.simulations.unprivate_noise import FixedNoise

MOST_NUMBERS, MOST_RECORDS = 1_000_000, 5_000
"""Features and records that are made up, at most: with more units, each stands for several."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """Made-up records of one seed.

    Attributes:
        sizes: which they stand for.
        seed: of the noise.
        stands_for: units that each made-up one stands for.
        units: those that train.
        test: features and classes of records to judge by.
    """

    sizes: Sizes
    seed: int
    stands_for: float
    units: Units
    test: tuple[NDArray[np.float64], NDArray[np.int64]]

    @classmethod
    def draw(cls, task: MadeUpTask, sizes: Sizes, training: int, seed: int) -> Trial:
        """Records for so many training units of all sites."""
        random = np.random.default_rng(seed)
        count = made(training, sizes.width)
        features, labels = task.records(count, random)
        units = Units(features=features, labels=labels, unit=np.arange(count), count=count)
        test = task.records(TEST_RECORDS, random)
        return cls(sizes=sizes, seed=seed, stands_for=training / count, units=units, test=test)

    @cached_property
    def not_private(self) -> float:
        """Accuracy of a head trained on all units without privacy."""
        trained = self.units.features, self.units.labels
        return non_private(*trained, *self.test, classes=len(self.sizes.shares)).headline

    def run(self, plan: RunPlan) -> float:
        """Accuracy that the plan reaches."""
        adapter = train(plan, self.units, sites=self.sizes.sites, stands_for=self.stands_for, seed=self.seed)
        features, labels = self.test
        return float((predict(adapter, features).argmax(axis=1) == labels).mean())


def made(training: int, width: int) -> int:
    """Records made up for so many training units."""
    return max(2, min(training, MOST_RECORDS, MOST_NUMBERS // width))


def train(plan: RunPlan, units: Units, *, sites: int, stands_for: float = 1.0, seed: int = 0) -> Adapter:
    """Run a plan on pooled units, with the noise that so many sites add.

    Args:
        plan: with dp-fedsgd and plain sums.
        units: of all sites.
        sites: among which they are divided evenly.
        stands_for: units that each stands for: sums are as much longer.
        seed: of the noise, and of who is asked.
    """
    state = Descent.start(plan, initial_adapter(plan, units.features.shape[1]), sites)
    lots = np.random.default_rng(seed)
    for release in schedule(plan):
        if release.kind is ReleaseKind.EVALUATION:
            continue
        asked = sites if release.kind is ReleaseKind.CENTRE else state.asked
        shares = _shares(plan, asked)
        seen = units if asked == sites else units.only(lots.random(units.count) < asked / sites)
        noise = SharedNoise(FixedNoise(seed, "forecast", release.round), np.sqrt(shares.excess) / stands_for)
        update = draw(_request(plan, state, release), release, seen, noise)
        state.apply(release, [replace(update, spacing=update.spacing * stands_for)], shares)
    return state.adapter


def _shares(plan: RunPlan, asked: int) -> NoiseShares:
    """Who adds noise to a sum: where each site adds all of it, that is as if no other one's counted."""
    distributed = plan.privacy.noise == "distributed"
    return NoiseShares(sites=asked, colluding=plan.cohort.colluding(asked) if distributed else asked - 1)


def _request(plan: RunPlan, state: Descent, release: Release) -> RoundRequest:
    return RoundRequest(
        plan=plan,
        job="forecast",
        round=release.round,
        kind=release.kind,
        adapter=state.adapter,
        nominal_units=state.nominal_units,
    )
