# SPDX-License-Identifier: Apache-2.0
"""Tests of `veil.common.mismatch`: sites that are alike are not called apart, one that is apart is found."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np
import pytest
from numpy.typing import NDArray

from veil.common.mismatch import FURTHEST, TOO_FEW, Likeness, Mismatch, NoisySum, mismatch, mismatches
from veil.common.schedule import COUNT_WEIGHT

Floats = NDArray[np.float64]
Judge = Callable[[dict[str, Floats], float], Mismatch]


def summed(mean: list[float], units: float) -> Floats:
    return np.array([*(np.array(mean) * units), COUNT_WEIGHT * units])


def test_without_noise_it_is_the_distance_of_the_means() -> None:
    """Of as many units that what chance does is nothing."""
    found = mismatches({"a": summed([1.0, 0.0], 10**9), "b": summed([0.0, 1.0], 3 * 10**9)}, 0.0)
    for one in found.values():
        distance = one.distance
        assert distance.value == distance.low == distance.high == pytest.approx(math.sqrt(2))
        assert one.verdict is Likeness.APART


def test_the_others_are_pooled_by_their_units() -> None:
    sums = {"a": summed([0.6, 0.0], 10**9), "b": summed([0.2, 0.0], 10**9), "c": summed([0.4, 0.8], 3 * 10**9)}
    assert mismatches(sums, 0.0)["a"].distance.value == pytest.approx(math.hypot(0.6 - 0.35, 0.6), rel=1e-3)


def test_what_noise_adds_to_a_squared_distance_is_subtracted() -> None:
    """By hand: variance (2/100)² + (3/200)² in each of two coordinates, and of each count four times that along the
    mean; 1 - length over units less one, of each, for which units there are."""
    own = NoisySum(numbers=summed([0.9, 0.0], 100), deviation=2.0)
    others = NoisySum(numbers=summed([0.0, 0.9], 200), deviation=3.0)
    lengths = [0.81 - 2 * (2 / 100) ** 2, 0.81 - 2 * (3 / 200) ** 2]
    assert (own.length, others.length) == pytest.approx(lengths)
    stretched = 4 * (lengths[0] * (2 / 100) ** 2 + lengths[1] * (3 / 200) ** 2)
    drawn = (1 - lengths[0]) / 99 + (1 - lengths[1]) / 199
    noise = 2 * ((2 / 100) ** 2 + (3 / 200) ** 2)
    found = mismatch(own, others).distance
    assert found.value == pytest.approx(math.sqrt(2 * 0.81 - noise - stretched - drawn), rel=1e-12)
    assert found.low is not None and found.high is not None and found.value is not None
    assert 0 < found.low < found.value < found.high < FURTHEST


@pytest.mark.parametrize("units", [-40.0, 0.0, 0.5, 9.9])
def test_a_number_of_units_that_noise_may_have_made_says_nothing(units: float) -> None:
    """One deviation of the count is 2: five are 10."""
    small, large = summed([0.5, 0.5], units), summed([0.5, 0.5], 1000)
    for found in mismatches({"small": small, "large": large}, 1.0).values():
        assert found == Mismatch(distance=found.distance, verdict=Likeness.UNKNOWN)
        assert found.distance.value is None and found.distance.reason == TOO_FEW


def test_noise_so_large_that_anything_may_be_says_nothing() -> None:
    same = summed([0.6] + [0.0] * 383, 100)
    found = mismatches({"a": same, "b": same}, 6.0)["a"]
    assert found.verdict is Likeness.UNKNOWN and found.distance.low == 0
    assert found.distance.high is not None and 0.5 < found.distance.high <= FURTHEST


def test_means_that_agree_better_than_noise_lets_them_are_not_apart() -> None:
    same = summed([0.0] * 20, 300)
    found = mismatches({"a": same, "b": same}, 10.0)["a"]
    assert found.distance.value == found.distance.low == 0 and found.verdict is not Likeness.APART


def test_nobody_is_compared_with_nobody() -> None:
    assert mismatches({}, 1.0) == mismatches({"": summed([0.5], 100)}, 1.0) == {}


def test_it_comes_back_from_json_to_the_last_bit() -> None:
    sums = {"a": summed([0.6, 0.0], 100), "b": summed([0.2, 0.1], 300), "c": summed([0.1, 0.1], 3)}
    for one in mismatches(sums, 1 / 3).values():
        assert Mismatch.from_report(json.loads(json.dumps(one.to_report()))) == one
    report = mismatches(sums, 1 / 3)["a"].to_report()
    for wrong in ({}, {**report, "verdict": "odd"}, {**report, "distance": {"mean": 1.0}}):
        with pytest.raises((KeyError, ValueError, TypeError)):
            Mismatch.from_report(wrong)


@dataclass(frozen=True, kw_only=True)
class Sites:
    """Sites that draw their units' rows from a few equally likely ones; the first has its own where `away` is not 0.

    Attributes:
        width: of a row.
        units: of each site.
        sites: how many.
        deviation: of the noise.
        spread: length of what a row adds to the first unit vector, before it is made a unit row.
        away: how far the first site's rows are moved, before they are made no longer than 1.
        line: whether rows differ in one direction only.
    """

    width: int
    units: int
    sites: int
    deviation: float
    spread: float
    away: float = 0.0
    line: bool = False

    def atoms(self) -> tuple[Floats, Floats]:
        """Rows of the first site and of the others, [100, d]."""
        random = np.random.default_rng(1)
        more = random.normal(size=(100, self.width))
        if self.line:
            more[:, 1:-1] = 0
        rows = self.spread * more / np.linalg.norm(more, axis=1, keepdims=True)
        rows[:, 0] += 1
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        moved = rows + self.away * np.eye(self.width)[-1]
        return moved / np.maximum(1, np.linalg.norm(moved, axis=1, keepdims=True)), rows

    @property
    def truth(self) -> float:
        """Distance of the first site's distribution from the others'."""
        own, others = self.atoms()
        return float(np.linalg.norm(own.mean(axis=0) - others.mean(axis=0)))

    def judged(self, judge: Judge, times: int) -> tuple[dict[Likeness, float], float]:
        """How often the first site gets each verdict, and how often the interval holds the truth."""
        random, (own, others), truth = np.random.default_rng(2), self.atoms(), self.truth
        verdicts, held = Counter[Likeness](), 0
        for _ in range(times):
            sums = {}
            for site in range(self.sites):
                drawn = random.multinomial(self.units, np.full(100, 0.01)) @ (others if site else own)
                noise = random.normal(size=self.width + 1) * self.deviation
                sums[str(site)] = np.append(drawn, COUNT_WEIGHT * self.units) + noise
            found = judge(sums, self.deviation)
            verdicts[found.verdict] += 1
            low, high = found.distance.low, found.distance.high
            held += low is not None and high is not None and low <= truth <= high
        return {word: verdicts[word] / times for word in Likeness}, held / times


def first(sums: dict[str, Floats], deviation: float) -> Mismatch:
    return mismatches(sums, deviation)["0"]


LOUD = Sites(width=384, units=200, sites=4, deviation=4.3, spread=1.5)
LINE = Sites(width=16, units=400, sites=2, deviation=0.5, spread=1.5, line=True)
COUNTED = Sites(width=2, units=100, sites=2, deviation=4.3, spread=0.02)
FEW = 0.07
"""Alarms that 5.3 % of true ones may come to in 1500 runs: 2·10⁻³ by chance, were another seed taken."""


@pytest.mark.statistical
@pytest.mark.parametrize("same", [LOUD, LINE, COUNTED], ids=["noise", "which units", "counts"])
def test_sites_with_the_same_distribution_are_rarely_called_apart(same: Sites) -> None:
    """5.3 % at most, each part of the variance being the largest in turn; seeded, another seed errs once in 500.

    What it rejects stands in the next test.
    """
    found, _ = same.judged(first, times=1500)
    assert found[Likeness.APART] < FEW, found


class AnyUnits(NoisySum):
    """As if a site's units were all there are."""

    drawn = 0.0


class ExactCount(NoisySum):
    """As if the count had no noise."""

    stretched = 0.0


def of_two(kind: type[NoisySum]) -> Judge:
    def judge(sums: dict[str, Floats], deviation: float) -> Mismatch:
        own, other = (kind(numbers=sums[name], deviation=deviation) for name in "01")
        return mismatch(own, other)

    return judge


@pytest.mark.statistical
@pytest.mark.parametrize(
    ("same", "lie"),
    [
        (LOUD, lambda sums, deviation: first(sums, 0.95 * deviation)),
        (LINE, of_two(AnyUnits)),
        (COUNTED, of_two(ExactCount)),
    ],
    ids=["noise", "which units", "counts"],
)
def test_a_variance_that_leaves_something_out_is_noticed(same: Sites, lie: Judge) -> None:
    """The same check on near lies, with 5 % less noise or one of the other parts left out: 27 % or more are called
    apart. Seeded, and missed with a chance below 10⁻⁹, were another seed taken."""
    found, _ = same.judged(lie, times=500)
    assert found[Likeness.APART] > FEW, found


@pytest.mark.statistical
def test_a_site_that_is_apart_is_found_and_the_interval_holds_how_far() -> None:
    """Found in more than 99 % of runs; held in all, as the worst case is not this one. Below 92 % of 400 not once in
    10⁶, were another seed taken."""
    away = Sites(**{**asdict(LOUD), "away": 0.4})
    assert 0.3 < away.truth < 0.4
    found, held = away.judged(first, times=400)
    assert found[Likeness.APART] > 0.92 and held > 0.92, (found, held)
