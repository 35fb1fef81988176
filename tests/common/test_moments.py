# SPDX-License-Identifier: Apache-2.0
"""Tests of `veil.common.moments`: a vector and its parts are the same numbers, and of the same length."""

from __future__ import annotations

import math

import numpy as np
import pytest

from veil.common.moments import CLASS_WEIGHT, MOMENTS_NORM, Moments, moments_size


def of_one(row: list[float], label: int, classes: int = 3) -> Moments:
    unit = np.array(row) / np.linalg.norm(row)
    chosen = np.eye(classes)[label]
    return Moments(products=np.outer(unit, unit), sums=np.outer(chosen, unit), counts=chosen)


def test_by_hand() -> None:
    """Of the row (0.6, 0.8) in the second of three classes."""
    vector = of_one([3.0, 4.0], 1).to_vector()
    expected = [0.36, 0.48 * math.sqrt(2), 0.64, 0, 0, 0.6, 0.8, 0, 0, 0, CLASS_WEIGHT, 0]
    assert vector == pytest.approx(expected)
    assert moments_size(2, 3) == len(expected)


def test_the_vector_of_a_unit_row_is_as_long_as_is_promised() -> None:
    random = np.random.default_rng(0)
    for width in (1, 7):
        vector = of_one(random.normal(size=width).tolist(), 2).to_vector()
        assert np.linalg.norm(vector) == pytest.approx(MOMENTS_NORM, rel=1e-12)


def test_there_and_back() -> None:
    vector = np.random.default_rng(0).normal(size=moments_size(5, 2))
    moments = Moments.from_vector(vector, width=5, classes=2)
    assert np.array_equal(moments.products, moments.products.T)
    np.testing.assert_allclose(moments.to_vector(), vector, rtol=1e-14)
    with pytest.raises(ValueError, match="expected 35 numbers"):
        Moments.from_vector(vector, width=6, classes=2)
