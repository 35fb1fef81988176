# SPDX-License-Identifier: Apache-2.0
"""Tests of `veil.common.number_quality`: a unit's vector is bounded, an interval holds the truth as often as said."""

from __future__ import annotations

import json
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from veil.common.noise import OSNoise, privatize, spacing
from veil.common.number_quality import ERROR_CAP, NUMBER_NORM, NUMBER_SIZE, number_quality, number_rows

Floats = NDArray[np.float64]
AGE = (20.0, 90.0)


def records(count: int, random: np.random.Generator) -> tuple[Floats, Floats]:
    """Answers that are off by a tenth of the range or not at all, truths in the middle."""
    truth = random.uniform(0.3, 0.7, size=count)
    return (truth + random.choice([-0.1, 0.0, 0.1, 0.1], size=count))[:, None], truth


MAE, RMSE = 70 * 0.075, 70 * math.sqrt(0.0075)


@given(answers=st.lists(st.floats(0, 1), min_size=1, max_size=4), truth=st.floats(0, 1))
def test_one_unit_s_vector_is_no_longer_than_the_bound(answers: list[float], truth: float) -> None:
    rows = number_rows(np.array(answers)[:, None], np.full(len(answers), truth))
    assert rows.shape == (len(answers), NUMBER_SIZE)
    assert np.linalg.norm(rows, axis=1).max() <= NUMBER_NORM * (1 + 1e-12)
    assert np.linalg.norm(rows.mean(axis=0)) <= NUMBER_NORM * (1 + 1e-12)


def test_the_bound_is_met() -> None:
    assert np.linalg.norm(number_rows(np.ones((1, 1)), np.zeros(1))) == pytest.approx(NUMBER_NORM)


def test_without_noise_the_figures_are_the_errors_in_the_number_s_own_unit() -> None:
    answers, truth = records(300, np.random.default_rng(0))
    told = number_quality(number_rows(answers, truth).sum(axis=0), 1e-9, AGE)
    off = 70 * (answers[:, 0] - truth)
    assert told.count.value == pytest.approx(300)
    assert told.mae.value == pytest.approx(np.abs(off).mean())
    assert told.rmse.value == pytest.approx(math.sqrt(np.square(off).mean()))
    assert told.error_cap == 35.0


def test_an_error_beyond_the_cap_counts_as_the_cap() -> None:
    told = number_quality(number_rows(np.ones((50, 1)), np.full(50, 0.2)).sum(axis=0), 1e-9, AGE)
    assert told.mae.value == told.rmse.value == pytest.approx(70 * ERROR_CAP)


def test_what_the_noise_outweighs_is_not_told() -> None:
    answers, truth = records(5, np.random.default_rng(0))
    told = number_quality(number_rows(answers, truth).sum(axis=0), 200.0, AGE)
    for figure in (told.mae, told.rmse):
        assert figure.value is None and figure.reason == "the noise outweighs what was counted"
    json.dumps(told.to_report(), allow_nan=False)


@given(sums=st.lists(st.floats(-1e6, 1e6), min_size=3, max_size=3), deviation=st.floats(1e-3, 1e5))
def test_a_figure_is_within_its_interval_and_possible_or_none(sums: list[float], deviation: float) -> None:
    told = number_quality(np.array(sums), deviation, AGE)
    for figure in (told.mae, told.rmse):
        if figure.value is None:
            assert figure.reason
        else:
            assert figure.low is not None and figure.high is not None and figure.standard_error is not None
            assert 0 <= figure.low <= figure.high <= 35 * (1 + 1e-9) and 0 <= figure.value <= 35 * (1 + 1e-9)


def coverage(part: float, *, units: int, sigma: float, times: int) -> dict[str, float]:
    """How often each interval holds what is true, when it counts a part of the noise."""
    random, held = np.random.default_rng(), Counter[str]()
    for _ in range(times):
        clean = number_rows(*records(units, random)).sum(axis=0)
        points = privatize(clean, noise_multiplier=sigma, max_grad_norm=NUMBER_NORM, noise=OSNoise())
        sums: Floats = np.asarray(points * spacing(NUMBER_NORM), dtype=np.float64)
        deviation = part * sigma * NUMBER_NORM
        told = number_quality(sums, deviation, AGE)
        for name, figure, true in (
            ("mae", told.mae, MAE),
            ("rmse", told.rmse, RMSE),
            ("count", told.count, units),
        ):
            held[name] += figure.low is not None and figure.high is not None and figure.low <= true <= figure.high
    return {name: held[name] / times for name in ("mae", "rmse", "count")}


@pytest.mark.statistical
def test_an_interval_holds_the_truth_as_often_as_it_says() -> None:
    """95 %, found above 92 %: a false alarm once in 50,000 a figure. Errors' intervals may be wider than need be."""
    for sigma in (0.1, 8.0):
        found = coverage(1.0, units=1200, sigma=sigma, times=1000)
        assert all(share >= 0.92 for share in found.values()), (sigma, found)
        assert found["count"] <= 0.98


@pytest.mark.statistical
def test_an_interval_that_leaves_half_of_the_noise_out_is_noticed() -> None:
    found = coverage(0.5, units=1200, sigma=14.0, times=500)
    assert all(share < 0.92 for share in found.values()), found
