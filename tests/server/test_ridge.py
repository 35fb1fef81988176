# SPDX-License-Identifier: Apache-2.0
"""Tests of `veil.server.ridge`: without noise the head is scikit-learn's, with noise it is cautious."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.linear_model import Ridge, RidgeClassifier

from veil.common.head import CENTRE, WEIGHT, predict, unit_rows
from veil.common.moments import Moments
from veil.common.update import Adapter
from veil.server.ridge import PENALTY, class_shares, ridge, ridge_head

Floats = NDArray[np.float64]
COUNT, WIDTH, CLASSES = 300, 6, 3


def records(seed: int = 0) -> tuple[Floats, NDArray[np.int64]]:
    """Three classes of different size around means of their own, far from the origin."""
    random = np.random.default_rng(seed)
    labels = random.choice(CLASSES, size=COUNT, p=[0.6, 0.3, 0.1])
    means = random.normal(size=(CLASSES, WIDTH)) + 2.0
    return means[labels] + random.normal(size=(COUNT, WIDTH)), labels


def moments_of(features: Floats, labels: NDArray[np.int64]) -> Moments:
    rows, chosen = unit_rows(features), np.eye(CLASSES)[labels]
    return Moments(products=rows.T @ rows, sums=chosen.T @ rows, counts=chosen.sum(axis=0))


def head(features: Floats, labels: NDArray[np.int64], deviation: float) -> Adapter:
    moments = moments_of(features, labels)
    mean = moments.sums.sum(axis=0) / COUNT
    weight = ridge_head(moments, mean, count=COUNT, deviation=deviation)
    return Adapter(tensors={WEIGHT: weight.astype(np.float32), CENTRE: np.zeros(WIDTH, np.float32)})


def penalty_of(deviation: float) -> float:
    return PENALTY * deviation * math.sqrt(2 * WIDTH)


def test_a_ridge_without_noise_is_scikit_learns() -> None:
    features, labels = records()
    rows = unit_rows(features)
    centred, targets = rows - rows.mean(axis=0), np.eye(CLASSES)[labels]
    weights = ridge(centred.T @ centred, (centred.T @ (targets - targets.mean(axis=0))).T, level=0.0, penalty=2.5)
    np.testing.assert_allclose(weights, Ridge(alpha=2.5).fit(rows, targets).coef_, rtol=1e-9)


def test_the_head_answers_as_scikit_learns_classifier_and_its_logits_are_the_regression() -> None:
    """With noise so small that level and penalty differ from λ = 1e-7 by as little."""
    features, labels = records()
    adapter, rows = head(features, labels, 1e-7), unit_rows(features)
    probabilities = predict(adapter, features)
    theirs = RidgeClassifier(alpha=penalty_of(1e-7)).fit(rows, labels)
    assert np.array_equal(probabilities.argmax(axis=1), theirs.predict(rows))
    regression = Ridge(alpha=penalty_of(1e-7)).fit(rows, np.eye(CLASSES)[labels]).predict(rows)
    logits = np.log(probabilities)
    expected = CLASSES * regression
    np.testing.assert_allclose(
        logits - logits.mean(axis=1, keepdims=True), expected - expected.mean(axis=1, keepdims=True), atol=1e-4
    )


def test_a_level_lowers_every_eigenvalue_and_their_sum_stays() -> None:
    """8, 2 and -1 become 5, 0 and 0; of their sum of 9, 4 are missing."""
    weights = ridge(np.diag([8.0, 2.0, -1.0]), np.ones((2, 3)), level=3.0, penalty=0.5)
    np.testing.assert_allclose(1 / weights, [[5 + 4 / 3 + 0.5, 4 / 3 + 0.5, 4 / 3 + 0.5]] * 2)
    weights = ridge(np.diag([8.0, 2.0, -20.0]), np.ones((1, 3)), level=3.0, penalty=0.5)
    np.testing.assert_allclose(1 / weights, [[5.5, 0.5, 0.5]])


def test_noise_alone_leaves_the_shares_of_the_classes() -> None:
    """However large it is: the head then knows how frequent classes are, and no more."""
    features, labels = records()
    adapter = head(features, labels, 1e6)
    shares = np.bincount(labels) / COUNT
    expected = np.exp(CLASSES * shares) / np.exp(CLASSES * shares).sum()
    np.testing.assert_allclose(predict(adapter, features), np.tile(expected, (COUNT, 1)), rtol=1e-3)


@pytest.mark.parametrize("deviation", [1.0, 10.0, 100.0])
def test_more_noise_than_is_there_gives_a_finite_head(deviation: float) -> None:
    random = np.random.default_rng(1)
    noise = random.normal(size=(WIDTH, WIDTH)) * deviation
    moments = Moments(
        products=(noise + noise.T) / 2,
        sums=random.normal(size=(CLASSES, WIDTH)) * deviation,
        counts=random.normal(size=CLASSES) * deviation,
    )
    weight = ridge_head(moments, np.zeros(WIDTH), count=1.0, deviation=deviation)
    slopes = weight[:, :WIDTH] / (CLASSES * math.sqrt(1 + 0.25**2))
    assert np.linalg.norm(slopes, axis=1).max() < 9.0, "weights do not grow with the noise"


def test_counts_that_tell_nothing_are_even() -> None:
    assert class_shares(np.array([3.0, 1.0, -2.0])) == pytest.approx([0.75, 0.25, 0.0])
    assert class_shares(np.array([-3.0, -1.0])) == pytest.approx([0.5, 0.5])
