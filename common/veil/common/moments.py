# SPDX-License-Identifier: Apache-2.0
"""All that least squares needs of labelled unit rows: their second moments, and their sums and numbers by class.

Promises that what one unit adds has a length of at most `MOMENTS_NORM`, and that a vector and its parts are the same
numbers: nothing is sent twice. The mean over all classes is in the sums, so that features can be centred afterwards.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

STATISTICS = "statistics"

CLASS_WEIGHT = 0.5
"""The constant released in its class's place beside each unit's products and features; its sums count the classes."""

MOMENTS_NORM = math.sqrt(2 + CLASS_WEIGHT**2)
"""L2 bound of one unit's [products, features by class, CLASS_WEIGHT by class], each of the first two of length 1."""


def moments_size(width: int, classes: int) -> int:
    """How many numbers a release of moments holds."""
    return width * (width + 1) // 2 + classes * (width + 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class Moments:
    """Sums over units of the mean over each unit's records.

    Attributes:
        products: of u uᵀ for unit rows u, [d, d], symmetric.
        sums: of u in the row of its class, [classes, d].
        counts: of 1 in the place of its class, [classes].
    """

    products: NDArray[np.float64]
    sums: NDArray[np.float64]
    counts: NDArray[np.float64]

    def to_vector(self) -> NDArray[np.float64]:
        """What is released, [`moments_size`]: the products' upper triangle by rows, √2 times what is off the diagonal,
        so that it is as long as the whole matrix; the sums by rows; `CLASS_WEIGHT` times the counts."""
        upper, scale = _triangle(len(self.products))
        return np.concatenate([self.products[upper] * scale, self.sums.ravel(), CLASS_WEIGHT * self.counts])

    @classmethod
    def from_vector(cls, vector: NDArray[np.float64], *, width: int, classes: int) -> Self:
        """The inverse of `to_vector`.

        Raises:
            ValueError: for a vector of another size.
        """
        if vector.shape != (moments_size(width, classes),):
            raise ValueError(f"moments of shape {vector.shape}; expected {moments_size(width, classes)} numbers")
        upper, scale = _triangle(width)
        products = np.zeros((width, width))
        products[upper] = vector[: len(scale)] / scale
        products.T[upper] = products[upper]
        sums = vector[len(scale) : len(scale) + classes * width].reshape(classes, width)
        return cls(products=products, sums=sums, counts=vector[len(scale) + classes * width :] / CLASS_WEIGHT)


def _triangle(width: int) -> tuple[tuple[NDArray[np.intp], NDArray[np.intp]], NDArray[np.float64]]:
    """Where the upper triangle is, and what its numbers are multiplied by."""
    rows, columns = np.triu_indices(width)
    return (rows, columns), np.where(rows == columns, 1.0, math.sqrt(2.0))
