# SPDX-License-Identifier: Apache-2.0
"""Tests of `veil.server.aggregation`: each rule by hand, and what a liar can do to it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from veil.common.plan_sections import Cohort
from veil.common.update import Update
from veil.server.aggregation import aggregate

SPACING = 0.5
ROBUST = ("median", "trimmed-mean", "krum")


def cohort(rule: str, malicious: int = 0) -> Cohort:
    fields: dict[str, Any] = {"aggregation": rule, "malicious_sites": malicious, "min_sites": 2 * malicious + 3}
    return Cohort.model_validate(fields)


def updates(*rows: tuple[float, ...]) -> list[Update]:
    """One site a row; numbers are multiples of the spacing."""
    points = (np.rint(np.array(row) / SPACING).astype(np.int64) for row in rows)
    return [Update(points={"t": one}, spacing=SPACING) for one in points]


def total(rule: str, malicious: int, *rows: tuple[float, ...]) -> list[float]:
    result: NDArray[np.float64] = aggregate(updates(*rows), cohort(rule, malicious))["t"]
    assert result.dtype == np.float64
    return [float(number) for number in result]


def test_the_sum() -> None:
    assert total("sum", 0, (1, 2.5), (3, -1), (5, 0)) == [9, 1.5]


def test_the_median_stands_for_every_site() -> None:
    assert total("median", 0, (1, 2), (3, -1), (5, 0)) == [3 * 3, 3 * 0]
    assert total("median", 0, (1, 0), (2, 0), (4, 1), (9, 8)) == [4 * 3, 4 * 0.5]


def test_the_trimmed_mean_leaves_out_as_many_at_either_end() -> None:
    rows = ((0, 9), (1, -50), (2, 8), (3, 7), (100, 6))
    assert total("trimmed-mean", 1, *rows) == [5 * 2, 5 * 7]
    assert total("trimmed-mean", 0, *rows) == [106, -20]
    assert total("trimmed-mean", 2, *rows) == [5 * 2, 5 * 7]


@pytest.mark.parametrize("sites", range(3, 60))
def test_the_trimmed_mean_leaves_out_no_fewer_for_any_number_of_sites(sites: int) -> None:
    """Flower's rule takes a fraction: 1 / 49 · 49 is less than one."""
    liar, honest = (2.0**30,), [(1.0,)] * (sites - 1)
    assert total("trimmed-mean", 1, liar, *honest) == [sites]


def test_krum_leaves_out_the_one_who_stands_apart() -> None:
    rows = ((0, 0), (1, 0), (0, 1), (1, 1), (100, 100))
    assert total("krum", 1, *rows) == [2 * 5 / 4, 2 * 5 / 4]
    assert total("krum", 0, *rows) == [102, 102]


def test_krum_judges_a_site_by_all_its_numbers() -> None:
    """Each number of the last site is within the others' range; the site as a whole is not."""
    rows = ((8, 0), (8, 0.5), (9, 0), (0, 8), (0, 0))
    kept = aggregate(updates(*rows[:3], *rows[:2], rows[3], rows[4]), cohort("krum", 2))["t"]
    assert kept.tolist() == [(8 + 8 + 9 + 8 + 8) * 7 / 5, (0.5 + 0.5) * 7 / 5]


@pytest.mark.parametrize("rule", ROBUST)
@pytest.mark.parametrize("lie", [(1e6, -1e6), (-1e6, -1e6), (2.0**40, 0)])
def test_two_liars_among_seven_stay_within_the_honest(rule: str, lie: tuple[float, float]) -> None:
    honest = ((1, -1), (1.5, -1.5), (2, -2), (1.5, -1), (1, -2))
    per_site = np.array(total(rule, 2, *honest, lie, lie)) / 7
    assert (np.min(honest, axis=0) <= per_site).all()
    assert (per_site <= np.max(honest, axis=0)).all()


def test_one_liar_moves_the_plain_sum_anywhere() -> None:
    assert total("sum", 0, (1, -1), (1.5, -1.5), (1e6, -1e6)) == [1_000_002.5, -1_000_002.5]


@pytest.mark.parametrize("rule", ROBUST)
def test_without_liars_a_rule_is_near_the_sum(rule: str) -> None:
    rows = ((10, -3), (10.5, -3), (9.5, -3.5), (10, -2.5), (10, -3))
    assert np.allclose(total(rule, 1, *rows), total("sum", 0, *rows), rtol=0.1)


@pytest.mark.parametrize("rule", ["sum", *ROBUST])
def test_equal_sites_stand_for_their_sum(rule: str) -> None:
    assert total(rule, 1, *[(2.5, -1)] * 6) == [15, -6]


@pytest.mark.parametrize("rule", ["sum", *ROBUST])
@settings(max_examples=40, deadline=None)
@given(order=st.permutations(range(7)))
def test_the_order_of_sites_does_not_matter(rule: str, order: list[int]) -> None:
    random = np.random.default_rng(0)
    sites = [Update(points={"t": random.integers(-(2**40), 2**40, (2, 3))}, spacing=SPACING) for _ in range(7)]
    given_order = aggregate([sites[one] for one in order], cohort(rule, 2))["t"]
    assert np.allclose(given_order, aggregate(sites, cohort(rule, 2))["t"], rtol=1e-12)


@pytest.mark.parametrize("rule", ["sum", *ROBUST])
@settings(max_examples=20, deadline=None)
@given(order=st.permutations(range(7)))
def test_sites_on_lattices_of_different_width_count_by_their_numbers(rule: str, order: list[int]) -> None:
    """8 bits and a site's own step each: as if the same numbers had come in 64 bits, whatever the order."""
    random = np.random.default_rng(0)
    drawn = [Update(points={"t": random.integers(-(2 ** (8 + k)), 2 ** (8 + k), 6)}, spacing=0.7) for k in range(7)]
    coarse = [one.narrowed(8) for one in drawn]
    assert len({one.spacing for one in coarse}) > 4
    fine = [
        Update(points={"t": one.points["t"].astype(np.int64) * round(one.spacing / 0.7)}, spacing=0.7) for one in coarse
    ]
    total = aggregate([coarse[one] for one in order], cohort(rule, 2))["t"]
    np.testing.assert_allclose(total, aggregate(fine, cohort(rule, 2))["t"], rtol=1e-12)
    if rule != "krum":
        assert total.tobytes() == aggregate(coarse, cohort(rule, 2))["t"].tobytes()


@pytest.mark.parametrize("rule", ["sum", "median", "trimmed-mean"])
def test_every_tensor_keeps_its_name_and_shape(rule: str) -> None:
    sites = [
        Update(points={"a": np.full((2, 3), k, np.int64), "b": np.array(k, np.int64)}, spacing=1.0) for k in range(3)
    ]
    found = aggregate(sites, cohort(rule))
    assert {name: tensor.shape for name, tensor in found.items()} == {"a": (2, 3), "b": ()}
    assert float(found["b"]) == 3.0
