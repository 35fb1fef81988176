# SPDX-License-Identifier: Apache-2.0
"""Rényi divergences of the sampled Gaussian mechanism, and the ε that follows from their sum.

Promises sums of positive terms alone, so that nothing cancels: a divergence is right to ten digits however small, and
never negative (dp-accounting's is, for σ = 10⁶ and q = 10⁻³, and its ε is then 0).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.special import gammaln

ORDERS = (*range(2, 66), 80, 96, 129, 160, 192, 257, 384, 513, 768, 1025)
"""Orders α at which divergences are computed: whole numbers, for which the sum below is finite."""

FILTER_ORDERS = (2, 3, 4, 5, 7, 10, 14, 20, 32, 64, 257)
"""The few of them that an adaptive composition may end at: denser where divergences of a sampled release turn up."""


@lru_cache(maxsize=1024)
def renyi(sigma: float, q: float) -> NDArray[np.float64]:
    """Divergence of one Poisson-sampled Gaussian release, the larger of adding and removing a unit.

    Mironov, Talwar & Zhang 2019, §3.3: (α−1)·D(α) = log Σᵢ C(α,i) (1−q)^(α−i) qⁱ exp((i²−i)/2σ²). As the binomial
    weights add up to one, that is log(1 + Σ_{i≥2} weight·(exp(…) − 1)).

    Args:
        sigma: noise multiplier.
        q: sample rate, above 0 and below 1.

    Returns:
        D(α), shape [len(ORDERS)].
    """
    orders, i, log_binomial, starts = _table()
    exponent = (i * i - i) / (2 * sigma**2)
    log_terms = log_binomial + i * math.log(q) + (orders - i) * math.log1p(-q)
    log_terms += np.where(exponent > 1, exponent, 0) + np.log(
        np.where(exponent > 1, -np.expm1(-exponent), np.expm1(np.minimum(exponent, 1)))
    )
    largest = np.maximum.reduceat(log_terms, starts)
    sums = np.add.reduceat(np.exp(log_terms - np.repeat(largest, np.diff([*starts, len(i)]))), starts)
    divergences: NDArray[np.float64] = np.logaddexp(0, largest + np.log(sums)) / (np.array(ORDERS) - 1)
    divergences.flags.writeable = False
    return divergences


def epsilon_at(divergences: NDArray[np.float64], delta: float, orders: Sequence[int] = ORDERS) -> float:
    """The least ε over some orders α: D(α) + log(1 − 1/α) − log(α·δ)/(α − 1), at least 0.

    Canonne, Kamath & Steinke 2020, proposition 12.

    Args:
        divergences: sums of divergences, shape [len(ORDERS)].
        delta: δ.
        orders: which of `ORDERS` count.
    """
    best = min(
        float(divergences[ORDERS.index(order)]) + math.log1p(-1 / order) - math.log(order * delta) / (order - 1)
        for order in orders
    )
    return max(0.0, best)


@lru_cache(maxsize=1)
def _table() -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64], NDArray[np.intp]]:
    """For every order α the terms i = 2 … α, end to end: α, i, log C(α,i), and where each order begins."""
    orders = np.concatenate([np.full(order - 1, order, dtype=np.float64) for order in ORDERS])
    i = np.concatenate([np.arange(2, order + 1, dtype=np.float64) for order in ORDERS])
    starts = np.cumsum([0, *(order - 1 for order in ORDERS[:-1])])
    return orders, i, gammaln(orders + 1) - gammaln(i + 1) - gammaln(orders - i + 1), starts
