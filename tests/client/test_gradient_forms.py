# SPDX-License-Identifier: Apache-2.0
"""Tests of `veil.client.gradient` for several labels and for numbers: Opacus' sum, and no unit beyond the bound."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from veil.client.exact_products import error_steps
from veil.client.gradient import clipped_head_sum
from veil.client.head_batch import HeadBatch, HeadStream
from veil.client.reference import opacus_clipped_sum
from veil.client.units import Units
from veil.common.objective import Targets

Floats = NDArray[np.float64]
FORMS = ["multilabel", "regression"]
LABELS, WIDTH = 3, 4


def rows_of(form: str) -> int:
    return LABELS if form == "multilabel" else 1


def truths(form: str, count: int, seed: int = 0) -> Targets:
    random = np.random.default_rng(seed)
    if form == "multilabel":
        return random.integers(0, 2, size=(count, LABELS)).astype(np.float64)
    return random.random(count)


def some_units(form: str, make_units: Callable[..., Units], count: int = 25, most: int = 5) -> Units:
    units = make_units(count, most=most, seed=5, width=WIDTH)
    return replace(units, labels=truths(form, len(units.unit)))


def weight_of(form: str, scale: float) -> Floats:
    weight: Floats = scale * np.random.default_rng(7).normal(size=(rows_of(form), WIDTH + 1))
    return weight


@pytest.mark.parametrize("most", [1, 5], ids=["record", "patient"])
@pytest.mark.parametrize("bound", [0.05, 0.4, 100.0], ids=["all clipped", "some clipped", "none clipped"])
@pytest.mark.parametrize("scale", [0.0, 3.0])
@pytest.mark.parametrize("form", FORMS)
def test_equal_to_opacus(form: str, scale: float, bound: float, most: int, make_units: Callable[..., Units]) -> None:
    units, weight = some_units(form, make_units, most=most), weight_of(form, scale)
    centre = 0.2 * np.random.default_rng(3).normal(size=WIDTH)
    total = np.zeros_like(weight)
    for one in np.eye(units.count, dtype=np.bool_):
        alone = units.only(one)
        found = clipped_head_sum(weight, HeadBatch.of(alone, centre), bound)
        apart = float(np.linalg.norm(found - opacus_clipped_sum(weight, alone, centre, bound)))
        step = float(error_steps(bound, len(weight), np.ones(1))[0])
        assert apart <= math.sqrt(len(weight)) * step + 0.003
        total += found
    np.testing.assert_array_equal(clipped_head_sum(weight, HeadBatch.of(units, centre), bound), total)


@pytest.mark.parametrize("form", FORMS)
def test_blocks_samples_and_no_records(form: str, make_units: Callable[..., Units]) -> None:
    units, weight, centre = some_units(form, make_units), weight_of(form, 1.0), np.zeros(WIDTH)
    whole, stream = HeadBatch.of(units, centre), HeadStream(units=units, centre=centre, most=7)
    expected = clipped_head_sum(weight, whole, 0.2)
    np.testing.assert_array_equal(clipped_head_sum(weight, stream, 0.2), expected)
    chosen = np.random.default_rng(1).random(25) < 0.4
    parts = [clipped_head_sum(weight, whole.take(mask), 0.2) for mask in (chosen, ~chosen)]
    np.testing.assert_array_equal(sum(parts), expected)
    nobody = whole.take(np.zeros(25, np.bool_))
    assert not clipped_head_sum(weight, nobody, 0.2).any()


odd = st.sampled_from([0.0, 1.0, -1.0, 1e30, -1e30, np.nan, np.inf, 0.3])
features = st.lists(odd, min_size=WIDTH, max_size=WIDTH)
truth = st.lists(st.sampled_from([0.0, 1.0]), min_size=LABELS, max_size=LABELS)
person = st.lists(st.tuples(features, truth), min_size=1, max_size=4)


def units_from(people: list[Any], form: str) -> Units:
    rows = [row for one in people for row in one]
    labels = np.array([truth for _, truth in rows], dtype=np.float64).reshape(-1, LABELS)
    return Units(
        features=np.array([features for features, _ in rows], dtype=np.float64).reshape(-1, WIDTH),
        labels=labels if form == "multilabel" else labels[:, 0],
        unit=np.array([number for number, one in enumerate(people) for _ in one], dtype=np.int64),
        count=len(people),
    )


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=60, deadline=None)
@given(
    people=st.lists(person, max_size=4),
    added=person,
    scale=st.sampled_from([0.0, 1.0, 1e6, 1e30]),
    bound=st.sampled_from([0.01, 0.25, 3.0]),
)
def test_one_unit_moves_the_sum_by_at_most_the_bound(
    form: str, people: list[Any], added: Any, scale: float, bound: float
) -> None:
    """Whatever its records and the head are."""
    weight, centre = weight_of(form, scale), np.full(WIDTH, 0.4)
    without, with_one = (
        clipped_head_sum(weight, HeadBatch.of(units_from(rows, form), centre), bound)
        for rows in (people, [*people, added])
    )
    assert np.isfinite(with_one).all()
    assert np.linalg.norm(with_one - without) <= bound * (1 + 1e-9)
