# SPDX-License-Identifier: Apache-2.0
"""Tests of `veil.client.gradient`: the clipped sum is Opacus', and no unit moves it further than the bound."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch.nn.functional import cross_entropy

from veil.client.exact_products import error_steps
from veil.client.gradient import clipped_head_sum, clipped_mean_sum
from veil.client.head_batch import HeadBatch, HeadStream
from veil.client.reference import opacus_clipped_sum
from veil.client.units import Units
from veil.common.head import head_inputs

Floats = NDArray[np.float64]
ClippedSum = Callable[[Floats, HeadBatch, float], Floats]
CLASSES = 3
WIDTH = 4


def grid(bound: float) -> float:
    """By how much grids may move a unit's gradient: errors are clipped for their rounding, and rounded; and inputs."""
    return math.sqrt(CLASSES) * float(error_steps(bound, CLASSES, np.ones(1))[0]) + 0.003


def random_weight(seed: int, scale: float, width: int = WIDTH) -> Floats:
    weight: Floats = scale * np.random.default_rng(seed).normal(size=(CLASSES, width + 1))
    return weight


def slow(weight: Floats, units: Units, centre: Floats, bound: float) -> Floats:
    """One unit after the other, by autograd."""
    inputs = torch.from_numpy(head_inputs(units.features, centre))
    total = np.zeros_like(weight)
    for number in range(units.count):
        rows = torch.from_numpy(np.flatnonzero(units.unit == number))
        if len(rows) == 0:
            continue
        parameter = torch.nn.Parameter(torch.from_numpy(weight.copy()))
        labels = torch.from_numpy(units.labels)[rows]
        cross_entropy(inputs[rows] @ parameter.T, labels, reduction="mean").backward()
        assert parameter.grad is not None
        gradient = parameter.grad.numpy()
        total += gradient * min(1.0, bound / max(float(np.linalg.norm(gradient)), 1e-300))
    return total


@pytest.mark.parametrize("most", [1, 5], ids=["record", "patient"])
@pytest.mark.parametrize("bound", [0.05, 0.5, 100.0], ids=["all clipped", "some clipped", "none clipped"])
@pytest.mark.parametrize("scale", [0.0, 1.0, 10.0])
@pytest.mark.parametrize("reference", [slow, opacus_clipped_sum])
def test_equal_to_the_reference(
    reference: Callable[..., Floats], scale: float, bound: float, most: int, make_units: Callable[..., Units]
) -> None:
    units = make_units(25, most=most, seed=5, width=WIDTH)
    weight, centre = random_weight(2, scale), 0.2 * np.random.default_rng(3).normal(size=WIDTH)
    total = np.zeros_like(weight)
    for one in np.eye(units.count, dtype=np.bool_):
        alone = units.only(one)
        found = clipped_head_sum(weight, HeadBatch.of(alone, centre), bound)
        apart = float(np.linalg.norm(found - reference(weight, alone, centre, bound)))
        assert apart <= grid(bound)
        total += found
    np.testing.assert_array_equal(clipped_head_sum(weight, HeadBatch.of(units, centre), bound), total)


@pytest.mark.parametrize("most", [1, 5], ids=["record", "patient"])
@pytest.mark.parametrize("block", [1, 7, 1000])
def test_a_stream_of_blocks_gives_the_same_sum(block: int, most: int, make_units: Callable[..., Units]) -> None:
    """Of all units and of a sample; a block that divided a patient would clip its parts instead of their mean."""
    units = make_units(25, most=most, seed=5, width=WIDTH)
    weight, centre = random_weight(2, 3.0), 0.2 * np.random.default_rng(3).normal(size=WIDTH)
    whole, stream = HeadBatch.of(units, centre), HeadStream(units=units, centre=centre, most=block)
    assert stream.count == whole.count
    chosen = np.random.default_rng(1).random(25) < 0.4
    for streamed, kept in ((stream, whole), (stream.take(chosen), whole.take(chosen))):
        found, expected = clipped_head_sum(weight, streamed, 0.2), clipped_head_sum(weight, kept, 0.2)
        np.testing.assert_array_equal(found, expected)


def test_the_sum_of_a_patient_with_opposite_records_is_that_of_their_mean() -> None:
    """Clipping each record first would give something else."""
    features = np.array([[1.0, 0, 0, 0], [1.0, 0, 0, 0], [0, 1.0, 0, 0]])
    units = Units(features=features, labels=np.array([0, 1, 2]), unit=np.zeros(3, np.int64), count=1)
    weight, centre = np.zeros((CLASSES, WIDTH + 1)), np.zeros(WIDTH)
    found = clipped_head_sum(weight, HeadBatch.of(units, centre), 0.1)
    assert np.linalg.norm(found - slow(weight, units, centre, 0.1)) <= grid(0.1)
    assert 0.099 < np.linalg.norm(found) <= 0.1


def test_one_class_only() -> None:
    units = Units(
        features=np.random.default_rng(0).normal(size=(10, WIDTH)),
        labels=np.ones(10, np.int64),
        unit=np.arange(10) // 2,
        count=5,
    )
    weight, centre = random_weight(1, 1.0), np.zeros(WIDTH)
    found = clipped_head_sum(weight, HeadBatch.of(units, centre), 0.5)
    assert np.linalg.norm(found - slow(weight, units, centre, 0.5)) <= units.count * grid(0.5)


def test_an_empty_batch_is_zero(make_units: Callable[..., Units]) -> None:
    weight = random_weight(0, 1.0)
    empty = HeadBatch.of(make_units(0, width=WIDTH), np.zeros(WIDTH))
    none_chosen = HeadBatch.of(make_units(8, most=3, width=WIDTH), np.zeros(WIDTH)).take(np.zeros(8, np.bool_))
    for batch in (empty, none_chosen):
        assert clipped_head_sum(weight, batch, 0.5).tolist() == np.zeros_like(weight).tolist()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_head_that_is_not_finite_counts_nobody(value: float, make_units: Callable[..., Units]) -> None:
    """As after local steps that diverged: zero, not NaN, whoever takes part."""
    weight = random_weight(0, 1.0)
    weight[1, :] = value
    batch = HeadBatch.of(make_units(8, most=3, width=WIDTH), np.zeros(WIDTH))
    with np.errstate(all="ignore"):
        found = clipped_head_sum(weight, batch, 0.5)
    assert np.isfinite(found).all()
    assert value is not np.nan or not found.any()


def test_taking_units_gives_the_sum_over_them(make_units: Callable[..., Units]) -> None:
    units, weight, centre = make_units(12, most=4, width=WIDTH), random_weight(0, 1.0), np.zeros(WIDTH)
    batch = HeadBatch.of(units, centre)
    chosen = np.random.default_rng(0).random(12) < 0.5
    parts = [clipped_head_sum(weight, batch.take(mask), 0.3) for mask in (chosen, ~chosen)]
    np.testing.assert_array_equal(sum(parts), clipped_head_sum(weight, batch, 0.3))


def test_no_noise_and_no_bound_recover_plain_training(make_units: Callable[..., Units]) -> None:
    """Bound ∞: the sum of the units' gradients, as torch computes it for the whole batch."""
    units, weight, centre = make_units(30, width=WIDTH), random_weight(4, 0.5), np.zeros(WIDTH)
    parameter = torch.nn.Parameter(torch.from_numpy(weight.copy()))
    inputs = torch.from_numpy(head_inputs(units.features, centre))
    cross_entropy(inputs @ parameter.T, torch.from_numpy(units.labels), reduction="sum").backward()
    assert parameter.grad is not None
    found = clipped_head_sum(weight, HeadBatch.of(units, centre), 1e9)
    assert np.linalg.norm(found - parameter.grad.numpy()) <= math.sqrt(units.count) * grid(1.0)


# Sensitivity: the data set with and without one unit, whatever the unit holds.

odd = st.sampled_from([0.0, 1.0, -1.0, 1e30, -1e30, 1e-30, np.nan, np.inf, -np.inf, 0.3])
record = st.tuples(st.lists(odd, min_size=WIDTH, max_size=WIDTH), st.integers(0, CLASSES - 1))
person = st.lists(record, min_size=1, max_size=4)


def units_from(people: list[list[tuple[list[float], int]]]) -> Units:
    rows = [row for one in people for row in one]
    return Units(
        features=np.array([features for features, _ in rows], dtype=np.float64).reshape(-1, WIDTH),
        labels=np.array([label for _, label in rows], dtype=np.int64),
        unit=np.array([number for number, one in enumerate(people) for _ in one], dtype=np.int64),
        count=len(people),
    )


def moved(sums: ClippedSum, people: list[Any], added: Any, weight: Floats, centre: Floats, bound: float) -> float:
    """How far one more unit moves a sum."""
    without, with_one = (HeadBatch.of(units_from(rows), centre) for rows in (people, [*people, added]))
    return float(np.linalg.norm(sums(weight, with_one, bound) - sums(weight, without, bound)))


@settings(max_examples=200, deadline=None)
@given(
    people=st.lists(person, max_size=5),
    added=person,
    scale=st.sampled_from([0.0, 1.0, 30.0, 1e6, 1e30]),
    bound=st.sampled_from([0.01, 0.5, 3.0]),
    centred=st.booleans(),
)
@example(people=[], added=[([1e30] * WIDTH, 0)], scale=1.0, bound=0.5, centred=True)
@example(people=[], added=[([np.nan] * WIDTH, 0)], scale=1.0, bound=0.5, centred=False)
def test_one_unit_moves_the_sum_by_at_most_the_bound(
    people: list[Any], added: Any, scale: float, bound: float, centred: bool
) -> None:
    """Huge, not finite, zero, repeated, alone: always finite and within the bound."""
    weight = random_weight(7, scale)
    centre = np.full(WIDTH, 0.4 if centred else 0.0)
    assert moved(clipped_head_sum, people, added, weight, centre, bound) <= bound * (1 + 1e-9)


@settings(max_examples=100, deadline=None)
@given(people=st.lists(person, max_size=5), added=person, bound=st.sampled_from([0.01, 1.0, 1.2]))
def test_one_unit_moves_the_mean_sum_by_at_most_the_bound(people: list[Any], added: Any, bound: float) -> None:
    without, with_one = (units_from(rows).mean_rows() for rows in (people, [*people, added]))
    difference = clipped_mean_sum(with_one, 0.5, bound) - clipped_mean_sum(without, 0.5, bound)
    assert np.linalg.norm(difference) <= bound * (1 + 1e-9)


def test_a_repeated_unit_adds_the_same_again() -> None:
    one = [([0.3, 1.0, -1.0, 0.0], 1), ([1.0, 0.0, 0.3, 0.3], 2)]
    weight, centre = random_weight(7, 1.0), np.zeros(WIDTH)
    single, twice = (clipped_head_sum(weight, HeadBatch.of(units_from([one] * k), centre), 0.2) for k in (1, 2))
    np.testing.assert_array_equal(twice, 2 * single)


def per_batch(weight: Floats, batch: HeadBatch, bound: float) -> Floats:
    """The classic mistake: the batch's gradient is clipped, not each unit's."""
    total = clipped_head_sum(weight, batch, 1e6)
    return total * min(1.0, bound / max(float(np.linalg.norm(total)), 1e-300))


def per_record(weight: Floats, batch: HeadBatch, bound: float) -> Floats:
    """Another: each record is clipped, and a patient's records are added up."""
    alone = HeadBatch(
        inputs=batch.inputs,
        labels=batch.labels,
        unit=np.arange(len(batch.labels)),
        count=len(batch.labels),
        share=np.ones(len(batch.labels)),
        pairs=np.zeros((2, 0), np.int64),
        dots=np.zeros(0),
        squares=batch.squares,
        largest=batch.largest,
    )
    return clipped_head_sum(weight, alone, bound)


def not_clipped(weight: Floats, batch: HeadBatch, bound: float) -> Floats:
    return clipped_head_sum(weight, batch, 1e6)


def worst_move(sums: ClippedSum, bound: float) -> float:
    """The furthest that one of many random units moves the sum of a small data set."""
    random = np.random.default_rng(0)
    weight, centre = random_weight(7, 3.0), np.zeros(WIDTH)

    def someone(records: int) -> list[tuple[list[float], int]]:
        return [(list(random.normal(size=WIDTH)), int(random.integers(CLASSES))) for _ in range(records)]

    return max(
        moved(sums, [someone(1) for _ in range(k % 3)], someone(1 + k % 4), weight, centre, bound) for k in range(100)
    )


def test_wrong_clipping_is_seen() -> None:
    """The same check that the real sum passes."""
    bound = 0.3
    assert worst_move(clipped_head_sum, bound) <= bound * (1 + 1e-9)
    for wrong in (per_batch, per_record, not_clipped):
        assert worst_move(wrong, bound) > bound * 1.1, wrong.__name__


@pytest.mark.parametrize("bound", [0.5, 1e-3])
def test_records_that_nearly_cancel_stay_within_the_bound(bound: float) -> None:
    """Two all but equal records of opposite classes: the squared length is a small difference of large numbers."""
    random = np.random.default_rng(0)
    for _ in range(200):
        features = random.normal(size=WIDTH)
        near = features + 1e-9 * random.normal(size=WIDTH)
        people = [[(list(features), 0), (list(near), 1)]]
        weight, centre = np.zeros((2, WIDTH + 1)), np.zeros(WIDTH)
        found = clipped_head_sum(weight, HeadBatch.of(units_from(people), centre), bound)
        assert np.linalg.norm(found) <= bound * (1 + 1e-9)


@pytest.mark.parametrize("records", [8, 64, 511, 3000])
@pytest.mark.parametrize("classes", [2, 10, 100])
def test_a_patient_of_many_records_counts_as_one_of_few_does(records: int, classes: int) -> None:
    """Equal records: each one's part of the mean is small, and its grid as fine."""
    weight, row = np.zeros((classes, WIDTH + 1)), [0.3, 1.0, -1.0, 0.2]
    one, many = (
        clipped_head_sum(weight, HeadBatch.of(units_from([[(row, 1)] * count]), np.zeros(WIDTH)), 0.4999)
        for count in (1, records)
    )
    assert 0.4999 * 0.98 < np.linalg.norm(many) <= 0.4999
    assert np.linalg.norm(many - one) < 0.02 * 0.4999


@pytest.mark.parametrize("bound", [1e-3, 1.0379619281762013e-3, 1e-2, 0.3])
def test_rounding_to_float32_is_within_the_bound_where_records_all_but_cancel(bound: float) -> None:
    """A unit's errors are long and its gradient is short: roundings of the first are no part of the second."""
    random = np.random.default_rng(0)
    worst = 0.0
    for turn in range(400):
        features = np.repeat(random.normal(size=(1, WIDTH)), 2, axis=0)
        if turn == 0:
            features[:] = [0.345584192064786, 0.8216181435011584, 0.33043707618338714, -1.303157231604361]
        labels = random.random(2) if turn else np.array([0.09578405563999337, 0.9010710541138621])
        units = Units(features=features, labels=labels, unit=np.zeros(2, np.int64), count=1)
        found = clipped_head_sum(np.zeros((1, WIDTH + 1)), HeadBatch.of(units, np.zeros(WIDTH)), bound)
        worst = max(worst, float(np.linalg.norm(found)))
    assert 0.98 * bound < worst <= bound * (1 + 1e-12)


@pytest.mark.parametrize("far", [1e3, 1e20, 1e35, -1e30])
def test_a_number_far_out_of_range_counts_as_nothing(far: float) -> None:
    units = Units(features=np.ones((2, WIDTH)), labels=np.array([far, 0.2]), unit=np.arange(2), count=2)
    alone = replace(units, features=units.features[1:], labels=units.labels[1:], unit=np.zeros(1, np.int64), count=1)
    weight = np.zeros((1, WIDTH + 1))
    both, one = (clipped_head_sum(weight, HeadBatch.of(some, np.zeros(WIDTH)), 0.1) for some in (units, alone))
    np.testing.assert_array_equal(both, one)
