# SPDX-License-Identifier: Apache-2.0
"""Tests of `veil.client.feature_rows`: what half precision costs, and what it must not."""

from __future__ import annotations

import numpy as np
import pytest

from veil.client.feature_rows import packed, row_bytes, unpacked
from veil.common.plan_sections import CachePrecision


def test_half_precision_neither_overflows_nor_loses_small_rows() -> None:
    exact = np.random.default_rng(2).normal(size=(7, 384)).astype(np.float32)
    exact *= np.array([1, 1e30, 1e-30, 1e-44, 0, 1, 1], np.float32)[:, None]
    exact[5, 3], exact[6, 3] = np.inf, np.nan
    half = unpacked(packed(exact, "float16"), "float16")
    assert half.dtype == np.float32
    for row, stored in zip(exact[:3], half[:3], strict=True):
        assert np.abs(stored - row).max() <= 2**-11 * np.abs(row).max()
    assert np.abs(half[3] - exact[3]).max() <= 1e-44
    assert not half[4].any()
    assert not np.isfinite(half[5]).all()
    assert not np.isfinite(half[6]).all()


def test_single_precision_is_exact() -> None:
    exact = np.array([[1, -0.0, np.inf, 1e-45], [np.pi, 3e38, -1, np.nan]], np.float32)
    assert unpacked(packed(exact[:, ::-1], "float32"), "float32").tobytes() == exact[:, ::-1].tobytes()


@pytest.mark.parametrize(("precision", "size"), [("float32", 1536), ("float16", 772)])
def test_bytes_of_a_row(precision: CachePrecision, size: int) -> None:
    assert row_bytes(384, precision) == size
    assert packed(np.ones((3, 384), np.float32), precision).shape == (3, size)
