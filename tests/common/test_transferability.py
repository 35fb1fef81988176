# SPDX-License-Identifier: Apache-2.0
"""Tests of `veil.common.transferability`: LogME is the largest evidence, and both figures follow the features."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from veil.common.errors import InputError
from veil.common.transferability import FOLDS, linear_probe, logme, spread

Rows = NDArray[np.float64]
Labels = NDArray[np.int64]


def separated(distance: float, *, n: int = 60, d: int = 4, classes: int = 2, seed: int = 0) -> tuple[Rows, Labels]:
    """Normal features whose first `classes` columns tell the class, and a constant column."""
    random = np.random.default_rng(seed)
    labels = np.arange(n) % classes
    rows = random.normal(size=(n, d))
    rows[np.arange(n), labels] += distance
    return np.hstack([rows, np.ones((n, 1))]), labels.astype(np.int64)


def log_evidence(rows: Rows, target: Rows, alpha: float, beta: float) -> float:
    """Of y = F w + ε from its definition: y is normal with covariance F Fᵀ / α + I / β."""
    covariance = rows @ rows.T / alpha + np.eye(len(rows)) / beta
    volume = np.linalg.slogdet(2 * math.pi * covariance).logabsdet
    return float(-0.5 * (target @ np.linalg.solve(covariance, target) + volume))


def largest_on_a_grid(rows: Rows, target: Rows) -> float:
    grid = np.exp(np.linspace(-4, 12, 65))
    return max(log_evidence(rows, target, alpha, beta) for alpha in grid for beta in grid)


@pytest.mark.parametrize(("distance", "n", "d"), [(2.0, 24, 3), (0.7, 18, 5), (1.5, 8, 12)])
def test_logme_is_the_largest_evidence_over_a_grid_of_alpha_and_beta(distance: float, n: int, d: int) -> None:
    rows, labels = separated(distance, n=n, d=d)
    values = [largest_on_a_grid(rows, (labels == one).astype(float)) / n for one in (0, 1)]
    found = logme(rows, labels)
    assert np.mean(values) - 1e-9 <= found <= np.mean(values) + 5e-3


def test_it_is_the_mean_over_classes_one_against_the_rest() -> None:
    rows, labels = separated(1.0, n=24, classes=3)
    values = [largest_on_a_grid(rows, (labels == one).astype(float)) / 24 for one in (0, 1, 2)]
    assert len({round(value, 3) for value in values}) == 3
    assert logme(rows, labels) == pytest.approx(np.mean(values), abs=5e-3)


def test_neither_order_scale_nor_rotation_matters() -> None:
    rows, labels = separated(1.0)
    random = np.random.default_rng(1)
    order = random.permutation(len(rows))
    turn = np.linalg.qr(random.normal(size=(5, 5)))[0]
    expected = logme(rows, labels)
    assert logme(rows[order], labels[order]) == pytest.approx(expected, abs=1e-9)
    assert logme(1000 * rows, labels) == pytest.approx(expected, abs=1e-9)
    assert logme(rows @ turn, labels) == pytest.approx(expected, abs=1e-9)
    assert logme(rows[order], labels) < expected - 0.01


def test_better_separated_features_score_higher() -> None:
    values = [logme(*separated(distance)) for distance in (0.0, 1.0, 2.0, 4.0)]
    assert values == sorted(values) and values[-1] - values[0] > 0.5
    accuracies = [linear_probe(*separated(distance), penalty=10.0).accuracy for distance in (0.0, 1.0, 4.0)]
    assert accuracies == sorted(accuracies) and accuracies[0] < 0.7 < 0.95 < accuracies[-1]


def test_features_of_noise_do_not_pay_for_their_number() -> None:
    rows, labels = separated(2.0, n=40)
    noise = np.random.default_rng(2).normal(size=(40, 200))
    assert logme(np.hstack([rows, noise]), labels) < logme(rows, labels)


@pytest.mark.parametrize("rows", [np.zeros((10, 3)), np.ones((10, 3)), np.ones((10, 40))])
def test_constant_features_tell_no_more_than_the_share_of_a_class(rows: Rows) -> None:
    labels = np.array([0, 1] * 5)
    value = logme(rows, labels)
    assert math.isfinite(value) and value < logme(*separated(2.0, n=10))
    assert linear_probe(rows, labels, penalty=10.0).accuracy <= 0.5


def test_more_features_than_records_and_an_exact_fit_stay_finite() -> None:
    labels = np.array([0, 1] * 6)
    exact = np.stack([labels, 1 - labels], axis=1).astype(float)
    wide = np.random.default_rng(3).normal(size=(12, 500))
    assert math.isfinite(logme(wide, labels)) and math.isfinite(logme(exact, labels))
    assert logme(wide, labels) < logme(exact, labels)


@pytest.mark.parametrize(
    ("rows", "labels", "words"),
    [
        (np.ones((6, 2)), np.zeros(6, np.int64), "6 records of 1 class"),
        (np.ones((0, 2)), np.zeros(0, np.int64), "0 records of 0 classes"),
        (np.array([[1.0], [np.nan], [np.inf]]), np.array([0, 1, 1]), "2 of 3 records with features that are not"),
        (np.ones(4), np.array([0, 1, 0, 1]), r"shape \[4\]"),
        (np.ones((4, 2)), np.array([0, 1, 0]), r"labels of shape \[3\]"),
    ],
)
def test_what_cannot_be_judged_is_an_error(rows: Rows, labels: Labels, words: str) -> None:
    with pytest.raises(InputError, match=words):
        logme(rows, labels)
    with pytest.raises(InputError, match=words):
        linear_probe(rows, labels, penalty=1.0)


def test_the_probe_needs_a_group_for_each_part() -> None:
    rows, labels = separated(1.0, n=20)
    with pytest.raises(InputError, match="4 groups of records"):
        linear_probe(rows, labels, penalty=1.0, groups=np.arange(20) % (FOLDS - 1))


def test_the_probe_never_trains_on_a_patient_it_judges() -> None:
    random = np.random.default_rng(4)
    patients = np.repeat(np.arange(40), 4)
    rows = 5 * random.normal(size=(40, 60))[patients] + 0.01 * random.normal(size=(160, 60))
    labels = random.permutation(np.arange(40) % 2)[patients]
    divided = linear_probe(rows, labels, penalty=10.0)
    whole = linear_probe(rows, labels, penalty=10.0, groups=patients)
    assert divided.accuracy == 1.0 and whole.accuracy < 0.75


def test_the_standard_error_is_over_groups() -> None:
    rows, labels = separated(1.0, n=200)
    single = linear_probe(rows, labels, penalty=10.0)
    p = single.accuracy
    assert single.standard_error == pytest.approx(math.sqrt(p * (1 - p) / 199))
    fourfold = linear_probe(np.repeat(rows, 4, axis=0), np.repeat(labels, 4), penalty=10.0, groups=np.arange(800) // 4)
    assert fourfold.standard_error == pytest.approx(single.standard_error, rel=0.2)


def test_two_probes_are_compared_record_by_record() -> None:
    rows, labels = separated(2.0, n=200)
    better, worse = (linear_probe(one, labels, penalty=10.0) for one in (rows, rows[:, 1:]))
    behind, error = worse.behind(better)
    assert behind == pytest.approx(better.accuracy - worse.accuracy) and behind > 0
    assert 0 < error < math.hypot(better.standard_error, worse.standard_error)
    assert better.behind(better) == (0.0, 0.0)


def test_a_class_that_is_missing_from_a_part_is_no_error() -> None:
    rows, labels = separated(3.0, n=40)
    labels[:] = 0
    labels[7] = 1
    assert linear_probe(rows, labels, penalty=10.0).accuracy == pytest.approx(39 / 40)


def test_the_spread_is_the_distance_from_the_mean() -> None:
    corners = np.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    assert spread(corners) == pytest.approx(1.0)
    assert spread(np.ones((5, 3)) / math.sqrt(3)) == pytest.approx(0.0, abs=1e-12)
    assert spread(corners[:2] * 0.6 + np.array([0.0, 0.8])) == pytest.approx(0.6)
