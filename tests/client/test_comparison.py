# SPDX-License-Identifier: Apache-2.0
"""Tests of `veil.client.comparison`: error bars that cover, and units that count once."""

from __future__ import annotations

import numpy as np
import pytest

from veil.client.comparison import accuracy, gain


def test_values_are_shares_and_their_difference() -> None:
    one, other, unit = np.array([1, 1, 0, 1], bool), np.array([0, 1, 0, 0], bool), np.arange(4)
    assert accuracy(one, unit).value == 0.75
    assert gain(one, other, unit).value == accuracy(one, unit).value - accuracy(other, unit).value
    assert gain(one, other, unit).low < 0.5 < gain(one, other, unit).high


def test_records_of_one_unit_count_as_one_observation() -> None:
    random = np.random.default_rng(0)
    right = random.random(80) < 0.7
    single = accuracy(right, np.arange(80))
    repeated = accuracy(np.repeat(right, 9), np.repeat(np.arange(80), 9))
    assert repeated.value == pytest.approx(single.value)
    assert repeated.standard_error == pytest.approx(single.standard_error)


@pytest.mark.parametrize("count", [1, 2, 10])
def test_agreement_on_a_few_records_is_not_certainty(count: int) -> None:
    all_right = np.ones(count, bool)
    assert accuracy(all_right, np.zeros(count)).standard_error > 0.3
    assert gain(all_right, all_right, np.arange(count)).low < 0 < gain(all_right, all_right, np.arange(count)).high


@pytest.mark.parametrize(("units", "each"), [(30, 1), (200, 1), (60, 4)])
def test_heads_that_are_equally_good_are_rarely_told_apart(units: int, each: int) -> None:
    """4000 draws: an interval of 95 % misses 200 ± 14 of them; more than 300 is a chance below 1e-10."""
    random = np.random.default_rng(1)
    missed = 0
    for _ in range(4000):
        one, other = np.repeat(random.random((2, units)) < 0.8, each, axis=1)
        found = gain(one, other, np.repeat(np.arange(units), each))
        missed += not found.low <= 0 <= found.high
    assert 80 < missed < 300


def test_heads_that_differ_are_told_apart() -> None:
    random = np.random.default_rng(2)
    one, other = random.random(400) < 0.9, random.random(400) < 0.7
    assert gain(one, other, np.arange(400)).low > 0
