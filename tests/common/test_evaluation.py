# SPDX-License-Identifier: Apache-2.0
"""Tests of `veil.common.evaluation`: a unit's vector is bounded, an interval holds the truth as often as it says."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import binomtest

from veil.common.evaluation import (
    EVALUATION_NORM,
    Figure,
    Quality,
    design,
    loss_cap,
    outcome_rows,
    quality,
    released_size,
)
from veil.common.noise import OSNoise, privatize, spacing
from veil.common.privacy import PrivacyBudget, gaussian_sigma

Floats = NDArray[np.float64]
LABELS = ("well", "ill")


def counted(right: list[int], wrong: list[int], loss: float) -> Floats:
    """What would be released of these counts without noise."""
    released: Floats = design(len(right)) @ np.array([*right, *wrong, loss / loss_cap(len(right))], dtype=np.float64)
    return released


def figures(one: Quality) -> dict[str, Figure]:
    first = one.classes[LABELS[0]]
    return {
        "count": one.count,
        "accuracy": one.accuracy,
        "loss": one.loss,
        "share": first.share,
        "recall": first.recall,
        "class count": first.count,
    }


@given(
    raw=st.lists(st.lists(st.floats(0, 1), min_size=3, max_size=3), min_size=1, max_size=4),
    label=st.integers(0, 2),
)
def test_one_unit_s_vector_is_no_longer_than_the_bound(raw: list[list[float]], label: int) -> None:
    """Whatever is predicted of each of its records, also nothing at all."""
    rows = outcome_rows(np.array(raw), np.full(len(raw), label))
    assert rows.shape == (len(raw), released_size(3))
    assert np.linalg.norm(rows, axis=1).max() <= EVALUATION_NORM * (1 + 1e-12)
    assert np.linalg.norm(rows.mean(axis=0)) <= EVALUATION_NORM * (1 + 1e-12)


def test_the_bound_is_met() -> None:
    rows = outcome_rows(np.array([[0.0, 1.0]]), np.array([0]))
    assert np.linalg.norm(rows) == pytest.approx(EVALUATION_NORM)


def test_right_and_wrong_answers_and_their_loss_are_counted() -> None:
    probabilities = np.array([[0.9, 0.1], [0.4, 0.6], [0.3, 0.7], [1.0, 0.0]])
    found = outcome_rows(probabilities, np.array([0, 0, 1, 1])).sum(axis=0)
    loss = -math.log(0.9) - math.log(0.4) - math.log(0.7) + loss_cap(2)
    np.testing.assert_allclose(found, counted([1, 1], [1, 1], loss))


def test_without_noise_the_figures_are_the_counts() -> None:
    told = figures(quality(counted([30, 50], [10, 10], 45.0), 1e-9, LABELS))
    values = {name: one.value for name, one in told.items()}
    expected = {"count": 100, "accuracy": 0.8, "loss": 0.45, "share": 0.4, "recall": 0.75, "class count": 40}
    assert values == pytest.approx(expected)


def test_without_noise_the_interval_is_wilson_s() -> None:
    """A known limit, from scipy; the loss' is Wilson's too, as wide as a loss of this mean can spread."""
    told = figures(quality(counted([30, 50], [10, 10], 0.0), 1e-9, LABELS))
    for name, right, of in (("accuracy", 80, 100), ("share", 40, 100), ("recall", 30, 40)):
        known = binomtest(right, of).proportion_ci(0.95, method="wilson")
        assert (told[name].low, told[name].high) == pytest.approx((known.low, known.high))


def test_noise_widens_every_interval() -> None:
    quiet, loud = (figures(quality(counted([300, 500], [100, 100], 450.0), noise, LABELS)) for noise in (1.0, 20.0))
    for name, figure in quiet.items():
        more = loud[name]
        assert None not in (figure.standard_error, more.standard_error, figure.low, more.low, figure.high, more.high)
        assert float(more.standard_error or 0) > float(figure.standard_error or 0)
        assert float(more.low or 0) < float(figure.low or 0) < float(figure.high or 0) < float(more.high or 0)


@pytest.mark.parametrize(
    ("right", "wrong"), [([0, 0], [0, 0]), ([2, 1], [1, 1]), ([-40, 10], [5, -30])], ids=["none", "few", "negative"]
)
def test_what_the_noise_outweighs_is_not_told(right: list[int], wrong: list[int]) -> None:
    told = quality(counted(right, wrong, 3.0), 10.0, LABELS)
    for name in ("accuracy", "loss", "share", "recall"):
        assert figures(told)[name] == Figure(reason="the noise outweighs what was counted")
    assert told.count.low == 0.0 and told.count.high is not None
    assert "NaN" not in json.dumps(told.to_report(), allow_nan=False)


def test_a_rare_class_is_not_told_where_the_rest_is() -> None:
    told = quality(counted([3, 900], [2, 95], 450.0), 10.0, LABELS)
    assert told.classes["well"].recall.value is None
    assert told.accuracy.value == pytest.approx(0.903)
    assert told.classes["ill"].recall.value is not None


@given(sums=st.lists(st.floats(-1e6, 1e6), min_size=7, max_size=7), deviation=st.floats(1e-3, 1e5))
def test_a_figure_is_within_its_interval_and_possible_or_none(sums: list[float], deviation: float) -> None:
    told = figures(quality(np.array(sums), deviation, LABELS))
    for name, figure in told.items():
        if figure.value is None:
            assert figure.reason and figure.low is figure.high is figure.standard_error is None
            continue
        assert figure.low is not None and figure.high is not None and figure.reason is None
        most = math.inf if "count" in name else loss_cap(2) if name == "loss" else 1.0
        assert 0.0 <= figure.low <= figure.high <= most
        assert 0.0 <= figure.value <= most


@pytest.mark.parametrize("classes", [2, 3, 10, 100])
def test_totals_beside_the_classes_are_worth_their_noise(classes: int) -> None:
    """Against the counts of each class alone: the accuracy has less variance, a class at most a fifth more."""
    sought = np.linalg.inv(design(classes).T @ design(classes)) * EVALUATION_NORM**2
    alone = 1 + 0.5**2
    total = np.r_[np.ones(classes), np.zeros(classes + 1)]
    assert total @ sought @ total <= 0.81 * alone * classes
    assert sought[0, 0] <= 1.2 * alone


@dataclass(frozen=True, kw_only=True)
class Population:
    """Units of two classes, 40 and 60 % of them, of which a model knows 70 and 90 %."""

    sites: int
    units: int
    epsilon: float

    @cached_property
    def sigma(self) -> float:
        return gaussian_sigma(PrivacyBudget(target_epsilon=self.epsilon, target_delta=1e-5)) / math.sqrt(0.05)

    @property
    def deviation(self) -> float:
        return self.sigma * EVALUATION_NORM * math.sqrt(self.sites)

    def released(self, random: np.random.Generator) -> tuple[Floats, dict[str, float]]:
        """The sites' noised sums, added; and what is true of these units, and of all like them."""
        labels = (random.random(self.sites * self.units) < 0.6).astype(np.int64)
        right = random.random(len(labels)) < np.where(labels == 1, 0.9, 0.7)
        own = np.where(right, 0.8, 0.3)
        probabilities = np.where(np.arange(2) == labels[:, None], own[:, None], 1 - own[:, None])
        sites = outcome_rows(probabilities, labels).reshape(self.sites, self.units, -1).sum(axis=1)
        paid = {"noise_multiplier": self.sigma, "max_grad_norm": EVALUATION_NORM}
        total = np.sum([privatize(clean, **paid, noise=OSNoise()) for clean in sites], axis=0)
        truth = {"accuracy": 0.82, "share": 0.4, "recall": 0.7, "loss": -0.82 * math.log(0.8) - 0.18 * math.log(0.3)}
        here = {"count": len(labels), "class count": int((labels == 0).sum())}
        return total * spacing(EVALUATION_NORM), {**truth, **here}


def coverage(population: Population, interval: Callable[[Floats], Quality], times: int = 1500) -> dict[str, float]:
    """How often each figure's interval holds what is true."""
    random, held = np.random.default_rng(), Counter[str]()
    for _ in range(times):
        sums, truth = population.released(random)
        for name, figure in figures(interval(sums)).items():
            low, high = figure.low, figure.high
            held[name] += low is not None and high is not None and low <= truth[name] <= high
    return {name: count / times for name, count in held.items()}


@pytest.mark.statistical
@pytest.mark.parametrize(
    "population",
    [
        Population(sites=4, units=100, epsilon=3.0),
        Population(sites=3, units=400, epsilon=1.0),
        Population(sites=1, units=300, epsilon=8.0),
    ],
    ids=["four clinics", "strict", "one site"],
)
def test_an_interval_holds_the_truth_as_often_as_it_says(population: Population) -> None:
    """95 %, found between 92 and 98: a false alarm once in 10⁷ a figure. The loss' may be wider than it need be.

    What it rejects stands in the next test.
    """
    deviation = population.deviation
    found = coverage(population, lambda sums: quality(sums, deviation, LABELS))
    assert found.pop("loss") > 0.92
    assert all(0.92 <= share <= 0.98 for share in found.values()), found


@pytest.mark.statistical
def test_an_interval_that_leaves_something_out_is_noticed() -> None:
    """The same check on broken variants: without the noise's part, with two thirds of it, without sampling's part."""
    population = Population(sites=4, units=100, epsilon=3.0)
    deviation = population.deviation

    def unsampled(sums: Floats) -> Quality:
        """As if ever so many units had been held out."""
        return quality(sums * 1e6, deviation * 1e6, LABELS)

    for part in (1e-9, 2 / 3):
        found = coverage(population, lambda sums, part=part: quality(sums, part * deviation, LABELS), times=600)  # type: ignore[misc]
        assert all(found[name] < 0.92 for name in ("count", "accuracy", "recall", "class count")), found
    many = Population(sites=1, units=300, epsilon=8.0)
    deviation = many.deviation
    found = coverage(many, unsampled, times=600)
    assert found["accuracy"] < 0.92 and found["share"] < 0.92, found
