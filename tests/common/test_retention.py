# SPDX-License-Identifier: Apache-2.0
"""Tests of `veil.common.retention`: 1 for the same model, near chance for another, less the more it changed."""

from __future__ import annotations

import math
from dataclasses import astuple
from itertools import pairwise

import numpy as np
import pytest
from numpy.typing import NDArray

from veil.common.retention import linear_cka, neighbour_overlap, perplexities, retention

Floats = NDArray[np.float64]


def features(seed: int = 0, records: int = 400, width: int = 16) -> Floats:
    """Directions that are not equally long, as features are."""
    return np.random.default_rng(seed).normal(size=(records, width)) * np.linspace(0.5, 2.0, width)


def test_a_model_that_did_not_change_keeps_everything() -> None:
    told = retention(features(), features())
    assert astuple(told) == pytest.approx((400, 1.0, 1.0, 1.0, 10))


def test_another_model_is_near_chance() -> None:
    """400 records of 16 features: CKA of independent ones is about d/n, the overlap nearest/(n - 1)."""
    told = retention(features(), features(seed=1))
    assert told.cka < 0.1
    assert abs(told.cosine) < 0.05
    assert told.neighbours == pytest.approx(10 / 399, abs=0.02)


def test_the_more_it_changed_the_less_is_left() -> None:
    before, noise = features(), features(seed=1)
    told = [retention(before, before + amount * noise) for amount in (0.0, 0.1, 0.3, 1.0, 3.0, 10.0)]
    for name in ("cka", "cosine", "neighbours"):
        left = [getattr(one, name) for one in told]
        assert all(more > less for more, less in pairwise(left)), (name, left)
        assert left[0] == pytest.approx(1.0)


def test_a_rotation_keeps_what_is_near_what_and_moves_every_record() -> None:
    """CKA and neighbours ask what the model tells apart, the cosine whether an old head would still fit."""
    rotation = np.linalg.qr(np.random.default_rng(2).normal(size=(16, 16)))[0]
    told = retention(features(), 3.0 * features() @ rotation)
    assert (told.cka, told.neighbours) == pytest.approx((1.0, 1.0))
    assert told.cosine < 0.5


@pytest.mark.parametrize("records", [10, 400])
def test_cka_is_the_papers_from_either_side(records: int) -> None:
    """Against the definition by HSIC, for few records and for many."""
    one, other = features(records=records), features(seed=3, records=records, width=9)
    centring = np.eye(records) - 1 / records
    grams = [centring @ rows @ rows.T @ centring for rows in (one, other)]
    expected = np.trace(grams[0] @ grams[1]) / math.sqrt(np.trace(grams[0] @ grams[0]) * np.trace(grams[1] @ grams[1]))
    assert linear_cka(one, other) == pytest.approx(expected)


def test_a_model_that_tells_nothing_apart_any_more_keeps_nothing() -> None:
    assert linear_cka(features(), np.ones((400, 16))) == 0.0
    assert linear_cka(np.ones((4, 2)), np.ones((4, 2))) == 1.0


def test_neighbours_are_counted_by_hand() -> None:
    """Four records on a circle; after tuning, the last two have changed places."""
    before = np.array([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [-1.0, 0.0]])
    after = before[[0, 1, 3, 2]]
    assert neighbour_overlap(before, after, 1) == pytest.approx(2 / 4)
    assert neighbour_overlap(before, after, 3) == 1.0


def test_few_records_have_fewer_neighbours() -> None:
    assert retention(features(records=5), features(records=5)).nearest == 4


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        (features(), features(records=399), "shapes"),
        (features(records=2), features(records=2), "n >= 3"),
        (features(), np.full((400, 16), np.nan), "not finite"),
    ],
)
def test_what_cannot_be_compared_is_refused(before: Floats, after: Floats, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        retention(before, after)


def test_no_neighbours_are_refused() -> None:
    with pytest.raises(ValueError, match="nearest = 0"):
        retention(features(), features(), nearest=0)


def test_a_language_model_that_did_not_change_has_ratio_one() -> None:
    losses = np.random.default_rng(4).exponential(2.0, 1000)
    told = perplexities(losses, losses)
    assert told.before == told.after == pytest.approx(math.exp(losses.mean()))
    assert (told.ratio, told.standard_error) == (1.0, 0.0)


def test_the_ratio_grows_with_what_was_forgotten_and_its_error_holds_the_truth() -> None:
    """A mean change of 0.05 nats under a spread of 1: the truth lies within five errors, half of it does not."""
    random = np.random.default_rng(5)
    before = 5.0 + random.normal(size=40_000).clip(-4, 4)
    told = perplexities(before, before + 0.05 + random.normal(size=40_000).clip(-0.9, 0.9))
    off = abs(math.log(told.ratio) - 0.05) / told.standard_error
    lie = abs(math.log(told.ratio) - 0.025) / told.standard_error
    assert off < 5 < lie
    assert told.after == pytest.approx(told.ratio * told.before)


@pytest.mark.parametrize("after", [[1.0], [1.0, -1.0], [1.0, math.inf]])
def test_losses_that_are_none_are_refused(after: list[float]) -> None:
    with pytest.raises(ValueError, match="losses"):
        perplexities(np.array([1.0, 2.0]), np.array(after))
