# SPDX-License-Identifier: Apache-2.0
"""How much of what a pretrained model knew is still there after tuning: its features and losses on public records.

Promises 1 for a model that did not change, less the more it did, from public records alone: nothing here may read a
site's own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

NEIGHBOURS = 10
"""Neighbours of a record that are compared, where there are so many."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Retention:
    """A tuned encoder beside the one it was made from, on the same public records.

    Attributes:
        records: how many.
        cka: linear centred kernel alignment, 0 to 1: 1 for features that are the same up to rotation and scale.
        cosine: mean over records of the cosine between its two features, -1 to 1: 1 for the same directions.
        neighbours: mean share of a record's nearest records that are still among its nearest, 0 to 1.
        nearest: how many nearest records that share is of.
    """

    records: int
    cka: float
    cosine: float
    neighbours: float
    nearest: int


def retention(before: NDArray[np.floating], after: NDArray[np.floating], *, nearest: int = NEIGHBOURS) -> Retention:
    """Compare two models' features of the same public records.

    Args:
        before: of the pretrained model, [n, d].
        after: of the tuned model, [n, d].
        nearest: neighbours to compare; fewer where there are not so many records.

    Raises:
        ValueError: for other shapes, fewer than three records, or numbers that are not finite.
    """
    first, second = np.asarray(before, dtype=np.float64), np.asarray(after, dtype=np.float64)
    if first.ndim != 2 or first.shape != second.shape or len(first) < 3:
        raise ValueError(f"features of shapes {first.shape} and {second.shape}; expected the same [n >= 3, d]")
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        raise ValueError("features that are not finite; expected numbers")
    within = min(nearest, len(first) - 1)
    if within < 1:
        raise ValueError(f"nearest = {nearest}; expected at least 1")
    return Retention(
        records=len(first),
        cka=linear_cka(first, second),
        cosine=float(np.einsum("nd,nd->n", _directions(first), _directions(second)).mean()),
        neighbours=neighbour_overlap(first, second, within),
        nearest=within,
    )


def linear_cka(one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    """Linear CKA (Kornblith et al. 2019, eq. 3): ‖XᵀY‖² / (‖XᵀX‖ ‖YᵀY‖) of column-centred features, 0 to 1.

    Two encoders that tell no records apart at all are alike, 1; one that does and one that does not are not, 0.

    Args:
        one: [n, d].
        other: [n, e].
    """
    first, second = one - one.mean(axis=0), other - other.mean(axis=0)
    if len(first) < first.shape[1] + second.shape[1]:  # the same numbers from [n, n] instead of [d, e]
        grams = (first @ first.T, second @ second.T)
        shared = float(np.vdot(*grams))
        lengths = [float(np.linalg.norm(gram)) for gram in grams]
    else:
        shared = float(np.linalg.norm(first.T @ second)) ** 2
        lengths = [float(np.linalg.norm(rows.T @ rows)) for rows in (first, second)]
    if min(lengths) == 0.0:
        return float(max(lengths) == 0.0)
    return min(1.0, max(0.0, shared / math.prod(lengths)))


def neighbour_overlap(one: NDArray[np.float64], other: NDArray[np.float64], nearest: int) -> float:
    """Mean share of each record's `nearest` records by cosine that both encoders agree on, 0 to 1.

    By chance, nearest/(n - 1) of them are shared.

    Args:
        one: [n, d].
        other: [n, e].
        nearest: 1 to n - 1.
    """
    first, second = (_neighbours(_directions(rows), nearest) for rows in (one, other))
    shared = [len(np.intersect1d(a, b, assume_unique=True)) for a, b in zip(first, second, strict=True)]
    return float(np.mean(shared)) / nearest


@dataclass(frozen=True, kw_only=True, slots=True)
class Perplexities:
    """A tuned language model beside the one it was made from, on the same public tokens.

    Attributes:
        before: of the pretrained model: exp of the mean loss.
        after: of the tuned model.
        ratio: after over before: 1 for a model that did not change, above 1 for one that forgot.
        standard_error: of the logarithm of the ratio, tokens taken as independent, which they are not quite.
    """

    before: float
    after: float
    ratio: float
    standard_error: float


def perplexities(before: NDArray[np.floating], after: NDArray[np.floating]) -> Perplexities:
    """Compare two language models' losses on the same public tokens.

    Args:
        before: cross-entropy of each token under the pretrained model, nats, [n].
        after: under the tuned model, [n].

    Raises:
        ValueError: for other shapes, fewer than two tokens, or losses that are negative or not finite.
    """
    first, second = np.asarray(before, dtype=np.float64), np.asarray(after, dtype=np.float64)
    if first.ndim != 1 or first.shape != second.shape or len(first) < 2:
        raise ValueError(f"losses of shapes {first.shape} and {second.shape}; expected the same [n >= 2]")
    if not all(np.isfinite(losses).all() and (losses >= 0).all() for losses in (first, second)):
        raise ValueError("losses that are negative or not finite; expected cross-entropies in nats")
    change = second - first
    return Perplexities(
        before=math.exp(first.mean()),
        after=math.exp(second.mean()),
        ratio=math.exp(change.mean()),
        standard_error=float(change.std(ddof=1)) / math.sqrt(len(change)),
    )


def _directions(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    """Rows of length 1; a zero row stays zero, [n, d]."""
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    directions: NDArray[np.float64] = rows / np.where(lengths > 0, lengths, 1.0)
    return directions


def _neighbours(directions: NDArray[np.float64], nearest: int) -> NDArray[np.int64]:
    """Each record's nearest others, itself left out, ties by place, [n, nearest]."""
    alike = directions @ directions.T
    np.fill_diagonal(alike, -np.inf)
    return np.argsort(-alike, axis=1, kind="stable")[:, :nearest]
