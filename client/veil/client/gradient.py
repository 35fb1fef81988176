# SPDX-License-Identifier: Apache-2.0
"""Clipping: the sum over units of each unit's gradient, none longer than the bound.

Promises that adding or removing one unit moves the sum by at most the bound, in float64, and that a unit whose
gradient is not finite counts as zero. Equal to Opacus' per-sample hooks (tested), without per-sample tensors.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from veil.client.head_batch import Batch, HeadBatch
from veil.common.head import scores
from veil.common.objective import OBJECTIVES, form_of


def clipped_head_sum(weight: NDArray[np.floating], batch: Batch, bound: float) -> NDArray[np.float64]:
    """Sum over units of the clipped mean cross-entropy gradient of a linear head.

    A unit's gradient is the mean over its records of e_i x_iᵀ with e_i = answer - truth (`veil.common.objective`); its
    squared length is Σ_ij (e_i·e_j)(x_i·x_j) / k², taken from the pairs of its records.

    Args:
        weight: [labels, d + 1].
        batch: the units' records.
        bound: L2 bound of one unit's gradient.

    Returns:
        [labels, d + 1], zero for an empty batch.
    """
    total = np.zeros(weight.shape)
    for block in batch.blocks():
        total += _clipped_block(weight, block, bound)
    return total


def _clipped_block(weight: NDArray[np.floating], block: HeadBatch, bound: float) -> NDArray[np.float64]:
    errors = OBJECTIVES[form_of(block.labels)].errors(scores(weight, block.inputs), block.labels)
    own = np.einsum("nc,nc->n", errors, errors)
    broken = ~np.isfinite(own)
    if broken.any():
        errors[broken] = own[broken] = 0.0
    norms = _norms(errors, own, block)
    factors = np.minimum(1.0, bound / np.maximum(norms, 1e-300))
    errors *= (factors[block.unit] * block.share)[:, None]
    total: NDArray[np.float64] = errors.T @ block.inputs
    return total


def _norms(errors: NDArray[np.float64], own: NDArray[np.float64], block: HeadBatch) -> NDArray[np.float64]:
    """Length of each unit's gradient, [count]; `own` are the squared lengths of the errors, [n]."""
    weights = own * block.squares * block.share**2
    squared = np.bincount(block.unit, weights=weights, minlength=block.count)
    if block.pairs.shape[1]:
        first, second = block.pairs
        cross = 2.0 * np.einsum("mc,mc->m", errors[first], errors[second]) * block.dots
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
