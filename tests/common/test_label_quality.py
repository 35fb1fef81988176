# SPDX-License-Identifier: Apache-2.0
"""Tests of `veil.common.label_quality`: a unit's vector is bounded, an interval holds the truth as often as it says."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import binomtest
from sklearn.metrics import f1_score

from veil.common.evaluation import Figure
from veil.common.label_quality import LabelsQuality, label_rows, labels_norm, labels_quality, labels_size
from veil.common.noise import OSNoise, privatize, spacing

Floats = NDArray[np.float64]
LABELS = ("pain", "fever", "rash")


def records(count: int, random: np.random.Generator) -> tuple[Floats, Floats]:
    """Answers and truth; the labels of a record err together."""
    truth = (random.random((count, 3)) < (0.5, 0.3, 0.2)).astype(np.float64)
    sure = np.where(random.random((count, 1)) < 0.8, 0.85, 0.35)
    return np.where(truth > 0, sure, 1 - sure), truth


@given(
    raw=st.lists(st.lists(st.floats(0, 1), min_size=3, max_size=3), min_size=1, max_size=4),
    truth=st.lists(st.booleans(), min_size=3, max_size=3),
)
def test_one_unit_s_vector_is_no_longer_than_the_bound(raw: list[list[float]], truth: list[bool]) -> None:
    rows = label_rows(np.array(raw), np.tile(np.array(truth, dtype=np.float64), (len(raw), 1)))
    assert rows.shape == (len(raw), labels_size(3))
    assert np.linalg.norm(rows, axis=1).max() <= labels_norm(3) * (1 + 1e-12)
    assert np.linalg.norm(rows.mean(axis=0)) <= labels_norm(3) * (1 + 1e-12)


def test_the_bound_is_met() -> None:
    rows = label_rows(np.zeros((1, 3)), np.ones((1, 3)))
    assert np.linalg.norm(rows) == pytest.approx(labels_norm(3))


def test_without_noise_the_figures_are_scikit_learn_s() -> None:
    answers, truth = records(400, np.random.default_rng(0))
    told = labels_quality(label_rows(answers, truth).sum(axis=0), 1e-9, LABELS)
    said = answers >= 0.5
    assert told.count.value == pytest.approx(400)
    assert told.accuracy.value == pytest.approx((said == truth).mean())
    assert told.micro_f1.value == pytest.approx(f1_score(truth, said, average="micro"))
    assert told.macro_f1.value == pytest.approx(f1_score(truth, said, average="macro"))
    right = np.where(truth > 0, answers, 1 - answers)
    assert told.loss.value == pytest.approx(float(-np.log(right).mean()))
    one = told.labels["fever"]
    expected = {"count": truth[:, 1].sum(), "share": truth[:, 1].mean(), "accuracy": (said == truth)[:, 1].mean()}
    assert {name: getattr(one, name).value for name in expected} == pytest.approx(expected)


def test_without_noise_a_recall_s_interval_is_wilson_s() -> None:
    answers, truth = records(400, np.random.default_rng(0))
    told = labels_quality(label_rows(answers, truth).sum(axis=0), 1e-9, LABELS).labels["rash"]
    hits, there = int((truth * (answers >= 0.5))[:, 2].sum()), int(truth[:, 2].sum())
    known = binomtest(hits, there).proportion_ci(0.95, method="wilson")
    assert (told.recall.low, told.recall.high) == pytest.approx((known.low, known.high))


def test_what_the_noise_outweighs_is_not_told() -> None:
    answers, truth = records(5, np.random.default_rng(0))
    told = labels_quality(label_rows(answers, truth).sum(axis=0), 100.0, LABELS)
    for figure in (told.accuracy, told.micro_f1, told.labels["pain"].recall):
        assert figure == Figure(reason="the noise outweighs what was counted")
    assert told.macro_f1.value is None and told.macro_f1.reason == "the noise outweighs what was counted of pain"
    json.dumps(told.to_report(), allow_nan=False)


@given(sums=st.lists(st.floats(-1e6, 1e6), min_size=11, max_size=11), deviation=st.floats(1e-3, 1e5))
def test_a_figure_is_within_its_interval_and_possible_or_none(sums: list[float], deviation: float) -> None:
    told = labels_quality(np.array(sums), deviation, LABELS)
    shares = (told.accuracy, told.micro_f1, told.macro_f1, *(one.f1 for one in told.labels.values()))
    for figure in shares:
        if figure.value is None:
            assert figure.reason
        else:
            assert figure.low is not None and figure.high is not None
            assert 0 <= figure.low <= figure.high <= 1 and 0 <= figure.value <= 1


@dataclass(frozen=True, kw_only=True)
class Clinic:
    """Held-out units and the noise on their sum."""

    units: int
    sigma: float

    @property
    def deviation(self) -> float:
        return self.sigma * labels_norm(3)

    def released(self, random: np.random.Generator) -> Floats:
        clean = label_rows(*records(self.units, random)).sum(axis=0)
        points = privatize(clean, noise_multiplier=self.sigma, max_grad_norm=labels_norm(3), noise=OSNoise())
        return np.asarray(points * spacing(labels_norm(3)), dtype=np.float64)


def figures(told: LabelsQuality) -> dict[str, Figure]:
    one = told.labels["fever"]
    return {
        "accuracy": told.accuracy,
        "micro_f1": told.micro_f1,
        "macro_f1": told.macro_f1,
        "loss": told.loss,
        "share": one.share,
        "recall": one.recall,
        "label f1": one.f1,
    }


def truths() -> dict[str, float]:
    """Of all such units: each decision is right with chance 0.8."""
    each = [2 * 0.8 * p / (0.8 * p + 0.2 * (1 - p) + p) for p in (0.5, 0.3, 0.2)]
    return {
        "accuracy": 0.8,
        "micro_f1": 2 * 0.8 / (0.8 + 0.4 + 1.0),
        "macro_f1": sum(each) / 3,
        "loss": -0.8 * math.log(0.85) - 0.2 * math.log(0.35),
        "share": 0.3,
        "recall": 0.8,
        "label f1": each[1],
    }


def coverage(clinic: Clinic, part: float, times: int) -> dict[str, float]:
    """How often each interval holds what is true, when it counts a part of the noise."""
    random, held, truth = np.random.default_rng(), Counter[str](), truths()
    for _ in range(times):
        told = labels_quality(clinic.released(random), part * clinic.deviation, LABELS)
        for name, figure in figures(told).items():
            held[name] += (
                figure.low is not None and figure.high is not None and figure.low <= truth[name] <= figure.high
            )
    return {name: held[name] / times for name in truth}


@pytest.mark.statistical
def test_an_interval_holds_the_truth_as_often_as_it_says() -> None:
    """95 %, found between 92 and 98: a false alarm once in 50,000 a figure. Those over all labels may be wider."""
    found = coverage(Clinic(units=1200, sigma=5.0), 1.0, times=1000)
    assert all(share >= 0.92 for share in found.values()), found
    exact = ("share", "recall", "label f1")
    assert all(found[name] <= 0.98 for name in exact), found


@pytest.mark.statistical
def test_an_interval_that_leaves_half_of_the_noise_out_is_noticed() -> None:
    found = coverage(Clinic(units=1200, sigma=14.0), 0.5, times=400)
    assert all(found[name] < 0.92 for name in ("accuracy", "recall", "label f1", "loss")), found


@pytest.mark.statistical
def test_decisions_that_err_together_do_not_count_as_many() -> None:
    """With next to no noise: as one trial a unit the accuracy's interval holds; as three it would hold too seldom."""
    clinic, random, truth = Clinic(units=500, sigma=0.01), np.random.default_rng(), truths()["accuracy"]
    held, too_narrow = 0, 0
    for _ in range(600):
        told = labels_quality(clinic.released(random), clinic.deviation, LABELS).accuracy
        assert told.value is not None and told.low is not None and told.high is not None
        held += told.low <= truth <= told.high
        middle, half = told.value, (told.high - told.low) / 2 / math.sqrt(3)
        too_narrow += middle - half <= truth <= middle + half
    assert held / 600 >= 0.92 > too_narrow / 600
