# SPDX-License-Identifier: Apache-2.0
"""Tests of `veil.client.moment_sums`: equal to the plain sums, and never moved by a unit by more than the bound."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from veil.client import moment_sums
from veil.client.moment_sums import clipped_moment_sum
from veil.client.units import Units
from veil.common.head import unit_rows
from veil.common.moments import MOMENTS_NORM, Moments

CLASSES, WIDTH = 3, 6


def plainly(units: Units) -> NDArray[np.float64]:
    """One record after the other."""
    total = Moments(products=np.zeros((WIDTH, WIDTH)), sums=np.zeros((CLASSES, WIDTH)), counts=np.zeros(CLASSES))
    for row, label, unit in zip(unit_rows(units.features), units.labels, units.unit, strict=True):
        part = 1.0 / units.sizes[unit]
        total.products[...] += part * np.outer(row, row)
        total.sums[label] += part * row
        total.counts[label] += part
    return total.to_vector()


def joined(first: Units, second: Units) -> Units:
    return Units(
        features=np.concatenate([first.features, second.features]),
        labels=np.concatenate([first.labels, second.labels]),
        unit=np.concatenate([first.unit, first.count + second.unit]),
        count=first.count + second.count,
    )


@pytest.mark.parametrize("most", [1, 4])
@pytest.mark.parametrize("at_once", [7, 4096])
def test_they_are_the_sums_over_units_of_the_mean_over_records(
    most: int, at_once: int, make_units: Callable[..., Units], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(moment_sums, "_AT_ONCE", at_once)
    units = make_units(40, most=most)
    np.testing.assert_allclose(clipped_moment_sum(units, CLASSES, MOMENTS_NORM), plainly(units), atol=1e-12)


def test_a_smaller_bound_makes_every_unit_as_much_smaller(make_units: Callable[..., Units]) -> None:
    units = make_units(40, most=4)
    half = clipped_moment_sum(units, CLASSES, MOMENTS_NORM / 2)
    np.testing.assert_allclose(half, plainly(units) / 2, atol=1e-12)


def test_no_records_give_zeros(make_units: Callable[..., Units]) -> None:
    assert not clipped_moment_sum(make_units(0), CLASSES, 1.0).any()


ROWS = {
    "plain": np.arange(1.0, WIDTH + 1),
    "huge": np.full(WIDTH, 1e300),
    "so small that its length is lost": np.array([2.7e-162, *[1.5e-162] * (WIDTH - 1)]),
    "zero": np.zeros(WIDTH),
    "not a number": np.array([np.nan, *np.ones(WIDTH - 1)]),
    "infinite": np.array([np.inf, *np.ones(WIDTH - 1)]),
}


@pytest.mark.parametrize("records", [1, 5])
@pytest.mark.parametrize("row", list(ROWS.values()), ids=list(ROWS))
@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")
def test_one_more_unit_moves_the_sum_by_at_most_the_bound(
    row: NDArray[np.float64], records: int, make_units: Callable[..., Units]
) -> None:
    """Also one that was there already, several times, and one that turns others' products around."""
    bound = 0.99 * MOMENTS_NORM
    one = Units(
        features=np.tile(row, (records, 1)),
        labels=np.full(records, 1),
        unit=np.zeros(records, np.int64),
        count=1,
    )
    for others in (make_units(0), make_units(30, most=3), joined(one, one), replace(one, features=-one.features)):
        moved = clipped_moment_sum(joined(others, one), CLASSES, bound) - clipped_moment_sum(others, CLASSES, bound)
        assert np.isfinite(moved).all() and np.linalg.norm(moved) <= bound * (1 + 1e-12)
