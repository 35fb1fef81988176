# SPDX-License-Identifier: Apache-2.0
"""From noised second moments and class sums to a head, in one step: ridge regression of the classes on the features.

Promises that all it reads was released or is public, and that the head reads unit rows as `veil predict` does: features
are centred after the fact, by the mean that the class sums hold, and the centre is folded into the intercept.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from veil.common.head import INTERCEPT
from veil.common.moments import Moments

PENALTY = 0.25
"""λ of the ridge, as a part of the noise's level in the scatter.

Of a class's sum b = G w + e, with e of length σ√d, directions in which the scatter G is below σ√d / |w| give more noise
than weight; a quarter of the level stands for weights of length 2√2, which turn from one class to the other within a
third of a unit. Chosen among 0.18 to 1.4 on digits, their random features, breast-cancer and ade_corpus_v2.
"""


def ridge_head(moments: Moments, mean: NDArray[np.float64], *, count: float, deviation: float) -> NDArray[np.float64]:
    """The head's weight for a zero centre, [classes, d + 1].

    The regression's value of class k at a unit row u, p_k + w_k·(u - m), estimates the class's probability. Its logit
    is as many times that as there are classes: to first order around an even guess, the softmax then is the estimate.

    Args:
        moments: noised sums over units.
        mean: estimate of the mean unit row m, [d].
        count: estimate of the number of units, above 0.
        deviation: of the noise in each released number.
    """
    classes, width = moments.sums.shape
    shares = class_shares(moments.counts)
    crossed = np.outer(moments.sums.sum(axis=0), mean)
    scatter = moments.products - crossed - crossed.T + count * np.outer(mean, mean)
    moved = moments.sums - count * np.outer(shares, mean)
    cross = moved - np.outer(shares, moved.sum(axis=0))
    level = deviation * math.sqrt(2 * width)
    slopes = ridge(scatter, cross, level=level, penalty=PENALTY * level)
    intercepts = shares - slopes @ mean
    scale = classes * math.sqrt(1 + INTERCEPT**2)
    weight: NDArray[np.float64] = scale * np.hstack([slopes, intercepts[:, None] / INTERCEPT])
    return weight


def class_shares(counts: NDArray[np.float64]) -> NDArray[np.float64]:
    """The part of each class, [classes], from noised counts of units; even where they tell nothing."""
    known = np.maximum(counts, 0.0)
    return known / known.sum() if known.any() else np.full(len(counts), 1.0 / len(counts))


def ridge(
    scatter: NDArray[np.float64], cross: NDArray[np.float64], *, level: float, penalty: float
) -> NDArray[np.float64]:
    """Weights (scatter + λ)⁻¹ cross, [classes, d], with a scatter whose eigenvalues stand out of the noise.

    Every eigenvalue is lowered by the level, down to 0; what that takes from their sum, which noise hardly moves, goes
    back to all of them evenly.

    Args:
        scatter: noised sum of z zᵀ, [d, d], symmetric.
        cross: noised sums of z times each class's target, [classes, d].
        level: the largest eigenvalue of the noise: symmetric noise of variance s² off the diagonal reaches 2s√d
            (Füredi & Komlós 1981).
        penalty: λ, above 0.
    """
    values, vectors = np.linalg.eigh(scatter)
    lowered = np.maximum(values - level, 0.0)
    even = max(0.0, float(values.sum() - lowered.sum())) / len(values)
    weights: NDArray[np.float64] = (cross @ vectors / (lowered + even + penalty)) @ vectors.T
    return weights
