# SPDX-License-Identifier: Apache-2.0
"""Rows of features as bytes: single precision, or half precision with a factor per row.

Promises that half precision neither overflows nor loses a row of small numbers, and that a row that is not finite
stays so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from veil.common.plan_sections import CachePrecision

_SCALE_BYTES: Final = 4


def row_bytes(width: int, precision: CachePrecision) -> int:
    """Bytes of one stored row of `width` features."""
    return 4 * width if precision == "float32" else _SCALE_BYTES + 2 * width


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredRows:
    """Rows of a store, mapped from its file.

    Attributes:
        precision: how they are stored.
        width: features per record, 0 in an empty store.
        row_of: place of each record's row in `raw`, by its digest.
        raw: the file's rows as bytes, [rows, bytes of a row], read-only.
    """

    precision: CachePrecision
    width: int
    row_of: Mapping[bytes, int]
    raw: NDArray[np.uint8]

    def features(self, digests: Sequence[bytes]) -> NDArray[np.float32]:
        """The records' features, float32 [n, width].

        Rows that lie one behind the other as float32 stay in the file, mapped read-only; others are copied.
        """
        rows = np.array([self.row_of[digest] for digest in digests], dtype=np.int64)
        if self.precision == "float32" and len(rows) > 0 and (np.diff(rows) == 1).all():
            return np.asarray(self.raw[rows[0] : rows[-1] + 1]).view(np.float32)
        return unpacked(self.raw[rows], self.precision)


def packed(features: NDArray[np.float32], precision: CachePrecision) -> NDArray[np.uint8]:
    """Rows as bytes, [n, bytes of a row].

    Half precision is of a row divided by its largest absolute value, kept beside it in float32: nothing overflows,
    and a row of small numbers keeps as many digits as any.
    """
    exact = np.ascontiguousarray(features, np.float32)
    if precision == "float32":
        return exact.view(np.uint8)
    scale = np.abs(exact).max(axis=1, keepdims=True)
    scale[scale == 0] = 1
    with np.errstate(invalid="ignore"):  # a row that is not finite stays so
        halves = (exact / scale).astype(np.float16)
    return np.hstack([scale.view(np.uint8), halves.view(np.uint8)])


def unpacked(raw: NDArray[np.uint8], precision: CachePrecision) -> NDArray[np.float32]:
    """What `packed` gave, float32 [n, width]."""
    if precision == "float32":
        return np.ascontiguousarray(raw).view(np.float32)
    scale = np.ascontiguousarray(raw[:, :_SCALE_BYTES]).view(np.float32)
    halves = np.ascontiguousarray(raw[:, _SCALE_BYTES:]).view(np.float16)
    with np.errstate(invalid="ignore"):
        features: NDArray[np.float32] = halves.astype(np.float32) * scale
    return features
