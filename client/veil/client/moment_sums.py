# SPDX-License-Identifier: Apache-2.0
"""Sums of second moments and of features by class over units, none adding more than the bound.

Promises that adding or removing one unit moves the sum by at most the bound, in float64, whatever its features are,
and that memory holds a few thousand records at a time, never a matrix for each.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from veil.client.units import Units
from veil.common.head import unit_rows
from veil.common.moments import CLASS_WEIGHT, Moments, moments_size

_AT_ONCE = 4096
"""Records of a piece, more only where one unit has more."""


def clipped_moment_sum(units: Units, classes: int, bound: float) -> NDArray[np.float64]:
    """Sum over units of the mean over each unit's records of their clipped moments, [`moments_size`].

    Records are clipped and not units: the mean of vectors within the bound is within it, and needs no matrix of its
    own. A unit row's moments all have one length, so that clipping only makes room for the lattice.

    Args:
        units: the records.
        classes: how many there are.
        bound: L2 bound of one record's moments, and so of one unit's.
    """
    total = np.zeros(moments_size(units.features.shape[1], classes))
    for piece in units.pieces(_AT_ONCE):
        total += _moments(piece, classes, bound).to_vector()
    return total


def _moments(piece: Units, classes: int, bound: float) -> Moments:
    rows = unit_rows(piece.features)
    squares = np.einsum("nd,nd->n", rows, rows)
    lengths = np.sqrt(squares**2 + squares + CLASS_WEIGHT**2)
    share = np.minimum(1.0, bound / lengths) / np.maximum(piece.sizes, 1)[piece.unit]
    by_class = np.zeros((len(rows), classes))
    by_class[np.arange(len(rows)), piece.labels] = share
    half = rows * np.sqrt(share)[:, None]
    return Moments(products=half.T @ half, sums=by_class.T @ rows, counts=by_class.sum(axis=0))
