# SPDX-License-Identifier: Apache-2.0
"""Clipping: the sum over units of each unit's gradient, none longer than the bound.

Promises that adding or removing one unit moves the sum by at most the bound, in the arithmetic that is done, and that a
unit whose gradient is not finite counts as zero. Equal to Opacus' per-sample hooks but for the grid (tested), without
per-sample tensors.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from veil.client.exact_products import error_steps, exact_products, exact_scores, total_of
from veil.client.head_batch import Batch, HeadBatch
from veil.common.objective import OBJECTIVES, form_of, row_sums

_FLOAT32 = 2.0**-22
"""Twice the rounding of a factor and of its product with an error, as a part of the product."""

_LONGEST = 4.0
"""Of the mean square of an error's numbers: more comes of a truth that is out of range, and counts as nothing."""


def clipped_head_sum(weight: NDArray[np.float64], batch: Batch, bound: float) -> NDArray[np.float64]:
    """Sum over units of the clipped mean cross-entropy gradient of a linear head.

    A unit's gradient is the mean over its records of e_i x_iᵀ with e_i = answer - truth (`veil.common.objective`); its
    squared length is Σ_ij (e_i·e_j)(x_i·x_j) / k², taken from the pairs of its records. Clipped errors are rounded to a
    grid, and summed without rounding (`exact_products`).

    Args:
        weight: [labels, d + 1].
        batch: the units' records.
        bound: L2 bound of one unit's gradient.

    Returns:
        [labels, d + 1], zero for an empty batch.
    """
    products = (_clipped_products(weight, block, bound) for block in batch.blocks())
    return total_of(itertools.chain.from_iterable(products), weight.shape)


def _clipped_products(weight: NDArray[np.float64], block: HeadBatch, bound: float) -> Iterator[NDArray[np.floating]]:
    steps = error_steps(bound, len(weight), block.share)
    return exact_products(_clipped_errors(weight, block, bound, steps), block.inputs, steps, block.largest)


def _clipped_errors(
    weight: NDArray[np.float64], block: HeadBatch, bound: float, steps: NDArray[np.float64]
) -> NDArray[np.float32]:
    """What each record's input is multiplied by, [n, labels], each record's on the grid of its step [n]."""
    errors = OBJECTIVES[form_of(block.labels)].errors(exact_scores(weight, block.inputs), block.labels)
    wide = errors.astype(np.float64)
    own = row_sums(wide * wide)
    broken = ~(own <= _LONGEST * len(weight))
    if broken.any():
        errors[broken] = wide[broken] = own[broken] = 0.0
    within = np.maximum(bound - _strayed(own, block, steps, len(weight)), 0.0)
    factors = np.minimum(1.0, within / np.maximum(_norms(wide, own, block), 1e-300))
    errors *= (factors[block.unit] * block.share / steps).astype(np.float32)[:, None]
    np.rint(errors, out=errors)
    errors *= steps.astype(np.float32)[:, None]
    return errors


def _strayed(
    own: NDArray[np.float64], block: HeadBatch, steps: NDArray[np.float64], classes: int
) -> NDArray[np.float64]:
    """How much longer a unit's gradient may become when its errors are rounded, to float32 and to their grid, [count].

    The former is a part of each record's own error, which may be long where the unit's gradient is short.
    """
    moved = math.sqrt(classes) / 2 * steps + _FLOAT32 * np.sqrt(own) * block.share
    lengths = np.bincount(block.unit, weights=moved * np.sqrt(block.squares), minlength=block.count)
    return np.asarray(lengths, dtype=np.float64)


def _norms(errors: NDArray[np.float64], own: NDArray[np.float64], block: HeadBatch) -> NDArray[np.float64]:
    """Length of each unit's gradient, [count]; `own` are the squared lengths of the errors, [n]."""
    weights = own * block.squares * block.share**2
    squared = np.bincount(block.unit, weights=weights, minlength=block.count)
    if block.pairs.shape[1]:
        first, second = block.pairs
        by_label = errors.T
        products = by_label.take(first, axis=1) * by_label.take(second, axis=1)
        cross = 2.0 * row_sums(products.T) * block.dots
        squared += np.bincount(block.unit[first], weights=cross * block.share[first] ** 2, minlength=block.count)
    norms: NDArray[np.float64] = np.sqrt(np.maximum(squared, 0.0))
    return norms


def clipped_mean_sum(rows: NDArray[np.float64], constant: float, bound: float) -> NDArray[np.float64]:
    """Sum over units of the clipped vector [mean feature, constant].

    Args:
        rows: one mean feature per unit, [units, d], each of length at most 1.
        constant: appended to each; its sum is the constant times the number of units.
        bound: L2 bound of one unit's vector.

    Returns:
        [d + 1].
    """
    return clipped_sum(np.hstack([rows, np.full((len(rows), 1), constant)]), bound)


def clipped_sum(vectors: NDArray[np.float64], bound: float) -> NDArray[np.float64]:
    """Sum over units of their vectors [units, m], none longer than the bound; [m]."""
    norms = np.linalg.norm(vectors, axis=1)
    total: NDArray[np.float64] = np.minimum(1.0, bound / np.maximum(norms, 1e-300)) @ vectors
    return total
