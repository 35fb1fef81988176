# SPDX-License-Identifier: Apache-2.0
"""Tests of `veil.client.exact_products`: nothing is rounded in a product, and no row's bits depend on another row."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.special import expit

from veil.client import exact_products
from veil.client.exact_products import error_steps, exact_scores, input_step, on_grid, total_of
from veil.client.gradient import clipped_head_sum
from veil.client.head_batch import HeadBatch
from veil.client.units import Units
from veil.common.objective import Targets, row_sums

Floats = NDArray[np.float64]
SHAPES = [(1, 1, 1), (1, 9, 40), (7, 3, 5), (64, 10, 385), (300, 100, 33), (700, 2, 769)]


def rows_on_grid(rows: int, width: int, seed: int = 0) -> NDArray[np.float32]:
    found = np.random.default_rng(seed).normal(size=(rows, width))
    found /= np.linalg.norm(found, axis=1, keepdims=True)
    return on_grid(found, input_step(width))


def error_step(bound: float, classes: int) -> float:
    return float(error_steps(bound, classes, np.ones(1))[0])


def largest(inputs: NDArray[np.float32]) -> float:
    return float(np.abs(inputs).max(initial=0.0))


def exactly(left: NDArray[np.floating], right: NDArray[np.floating]) -> list[list[Fraction]]:
    return [
        [sum((Fraction(float(a)) * Fraction(float(b)) for a, b in zip(row, column, strict=True)), Fraction())
         for column in right.T]
        for row in left
    ]  # fmt: skip


@pytest.mark.parametrize("power", [-20, 0, 3, 9, 50])
@pytest.mark.parametrize(("rows", "classes", "width"), [(1, 3, 5), (6, 3, 40), (3, 2, 385)])
def test_scores_are_those_of_the_rounded_operands_to_the_last_bit(
    rows: int, classes: int, width: int, power: int
) -> None:
    """Against fractions; the weight is rounded by a few millionths of its longest row, whatever its size."""
    weight = math.ldexp(1.0, power) * np.random.default_rng(1).normal(size=(classes, width))
    inputs, rounded = rows_on_grid(rows, width), exact_products._weight_on_grid(weight)
    assert exact_scores(weight, inputs).tolist() == [
        [float(score) for score in row] for row in exactly(inputs, rounded.T)
    ]
    longest = float(np.linalg.norm(weight, axis=1).max())
    assert np.abs(exact_scores(weight, inputs) - inputs @ weight.T).max() < 1e-3 * longest
    assert np.abs(rounded - weight).max() < 3e-4 * longest


@pytest.mark.parametrize(("rows", "classes", "width"), SHAPES)
@pytest.mark.parametrize("bound", [1e-3, 0.4999, 3.0])
def test_a_sum_of_products_is_whole_however_it_is_divided(rows: int, classes: int, width: int, bound: float) -> None:
    """As int64 has it; divided so far that some parts are a single row."""
    step, inputs = error_step(bound, classes), rows_on_grid(rows, width)
    errors = on_grid(min(bound, 1.0) * np.random.default_rng(2).normal(size=(rows, classes)), step)
    whole = np.rint(errors / step).astype(np.int64).T @ np.rint(inputs / input_step(width)).astype(np.int64)
    for bounded in (largest(inputs), 1.0, 1e6):
        found = total_of(exact_products.exact_products(errors, inputs, np.full(rows, step), bounded), (classes, width))
        np.testing.assert_array_equal(found, whole * (step * input_step(width)))


def test_what_would_not_fit_is_divided() -> None:
    """Equal rows, whose sum passes 2²⁴ steps: one product in float32 is wrong, the parts are not."""
    step, inputs = error_step(0.5, 2), on_grid(np.full((100_001, 3), 0.577), input_step(3))
    errors = on_grid(np.full((100_001, 2), 0.2431), step)
    whole = 100_001 * np.outer(errors[0].astype(np.float64), inputs[0].astype(np.float64))
    parts = list(exact_products.exact_products(errors, inputs, np.full(len(inputs), step), largest(inputs)))
    assert len(parts) > 1
    np.testing.assert_array_equal(total_of(parts, (2, 3)), whole)
    assert (errors.T @ inputs != whole).any()


def test_no_rows_are_zero() -> None:
    inputs = np.zeros((0, 3), np.float32)
    assert (
        total_of(exact_products.exact_products(np.zeros((0, 2), np.float32), inputs, np.zeros(0), 0.0), (2, 3)).tolist()
        == [[0.0] * 3] * 2
    )
    assert total_of([], (2, 3)).tolist() == [[0.0] * 3] * 2


@pytest.mark.parametrize("width", [1, 3, 100, 385, 513, 1281, 4097])
def test_a_row_is_moved_by_half_a_hundredth(width: int) -> None:
    rows = np.random.default_rng(0).normal(size=(200, width))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    moved = np.linalg.norm(on_grid(rows, input_step(width)) - rows, axis=1)
    assert moved.max() < 0.0075
    assert math.log2(input_step(width)).is_integer()


@pytest.mark.parametrize("classes", [1, 2, 3, 10, 100, 1000])
@pytest.mark.parametrize("bound", [1e-3, 0.49999, 0.5, 1.0, 40.0])
def test_the_grid_of_errors_costs_a_hundredth_of_the_bound_at_most(classes: int, bound: float) -> None:
    step = error_step(bound, classes)
    assert math.sqrt(classes) * step / 2 <= 0.006 * min(bound, 1.0)
    assert math.log2(step).is_integer()


def test_a_head_that_diverged_has_scores_that_are_not_numbers() -> None:
    for value in (np.nan, np.inf, 1e200, 1e25):
        assert np.isnan(exact_scores(np.array([[value, value], [0.0, 1.0]]), rows_on_grid(4, 2))).all()
    for value in (0.0, 1e-30, 1e-300):
        assert not exact_scores(np.full((3, 2), value), rows_on_grid(4, 2)).any()


# Bits of a row: alone, and beside others.


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(2, 70),
    classes=st.integers(1, 40),
    width=st.sampled_from([3, 64, 385]),
    kept=st.integers(1, 69),
    seed=st.integers(0, 99),
)
def test_sums_over_rows_that_are_columns_in_memory_are_the_rows_own(
    rows: int, classes: int, width: int, kept: int, seed: int
) -> None:
    numbers = np.asfortranarray(np.random.default_rng(seed).normal(size=(rows, classes)).astype(np.float32))
    for some in (slice(0, 1), slice(rows - 1, rows), slice(0, min(kept, rows)), slice(kept % rows, rows)):
        part = np.asfortranarray(numbers[some])
        assert row_sums(part).tolist() == row_sums(numbers)[some].tolist()
    one_by_one = [np.float32(0.0)] * rows
    for column in numbers.T:
        one_by_one = [total + number for total, number in zip(one_by_one, column, strict=True)]
    assert row_sums(numbers).tolist() == [float(total) for total in one_by_one]


@pytest.mark.parametrize("form", ["classification", "multilabel", "regression"])
@pytest.mark.parametrize(("classes", "width"), [(2, 5), (10, 384), (37, 100), (130, 1280)])
@pytest.mark.parametrize("most", [1, 4], ids=["record", "patient"])
def test_a_unit_adds_the_same_bits_whoever_stands_beside_it(
    form: str, classes: int, width: int, most: int, make_units: Callable[..., Units]
) -> None:
    """The whole sum is the sum of every unit's alone, of halves, and of all in another order: to the last bit."""
    random = np.random.default_rng(3)
    units = make_units(40, most=most, width=width)
    truths: dict[str, Targets] = {
        "classification": random.integers(0, classes, len(units.unit)),
        "multilabel": random.integers(0, 2, (len(units.unit), classes)).astype(np.float64),
        "regression": random.random(len(units.unit)),
    }
    rows = 1 if form == "regression" else classes
    weight, centre = 2.0 * random.normal(size=(rows, width + 1)), 0.05 * random.normal(size=width)
    units = Units(features=units.features, labels=truths[form], unit=units.unit, count=units.count)

    def total(of: Units) -> Floats:
        return clipped_head_sum(weight, HeadBatch.of(of, centre), 0.3)

    whole, half = total(units), random.random(units.count) < 0.5
    alone = [total(units.only(one)) for one in np.eye(units.count, dtype=np.bool_)]
    np.testing.assert_array_equal(np.sum(alone, axis=0), whole)
    np.testing.assert_array_equal(total(units.only(half)) + total(units.only(~half)), whole)
    order = random.permutation(len(units.unit))
    shuffled = Units(
        features=units.features[order], labels=truths[form][order], unit=units.unit[order], count=units.count
    )
    if most == 1:
        np.testing.assert_array_equal(total(shuffled), whole)


@pytest.mark.parametrize(("rows", "classes"), [(2, 1000), (3, 513), (4096, 2)])
def test_sums_of_long_and_of_many_rows_run_from_left_to_right(rows: int, classes: int) -> None:
    for kind in (np.float32, np.float64):
        numbers = np.asfortranarray(np.random.default_rng(5).normal(size=(rows, classes)).astype(kind))
        running = np.zeros(rows, kind)
        for column in numbers.T:
            running = np.add(running, column)
        assert row_sums(numbers).tolist() == running.tolist()
        assert [row_sums(row[None])[0] for row in numbers] == running.tolist()


@pytest.mark.parametrize("function", [np.exp, expit], ids=["exp", "expit"])
def test_a_function_of_a_number_has_the_same_bits_in_every_place(function: Callable[..., Any]) -> None:
    numbers = -20 * np.random.default_rng(6).random(2011).astype(np.float32)
    whole = function(numbers)
    for start in range(40):
        piece = slice(start, start + 1 + 3 * start)
        assert function(numbers[piece].copy()).tolist() == whole[piece].tolist()
    inside = np.asfortranarray(np.repeat(numbers[:, None], 3, axis=1))
    function(inside, out=inside)
    assert inside[:, 2].tolist() == whole.tolist()


def test_ordinary_products_would_be_seen() -> None:
    """The same comparison with float32 products of numbers that lie on no grid: bits differ."""
    random = np.random.default_rng(0)
    inputs, weight = random.normal(size=(300, 385)).astype(np.float32), random.normal(size=(10, 385)).astype(np.float32)
    errors = inputs @ weight.T
    alone = sum(np.outer(error, row).astype(np.float64) for error, row in zip(errors, inputs, strict=True))
    assert (errors.T @ inputs != alone).any()
