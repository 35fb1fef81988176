# SPDX-License-Identifier: Apache-2.0
"""What a mechanism costs at least: the ε that one particular observer reaches, in closed form.

Promises a true lower bound, computed from normal and binomial tails alone, by which an accountant's figure that is
too small is found out.
"""

from __future__ import annotations

import math

import numpy as np
from scipy.special import gammaln, log_ndtr

_SPREAD = 12.0
"""Standard deviations of the binomial number of appearances that are looked at; leaving some out lowers the bound."""

_HALVINGS = 60


def least_epsilon(sigma: float, q: float, steps: int, delta: float) -> float:
    """ε that an observer reaches who adds up all releases, or sees one alone, where that is more.

    With the unit the sum is N(k, steps·σ²) for a binomial number k of appearances, without it N(0, steps·σ²); their
    likelihood ratio rises with the sum, so thresholds are the best tests (Neyman & Pearson). For one step and for
    full batches this is the whole cost.

    Args:
        sigma: noise multiplier.
        q: sample rate.
        steps: releases.
        delta: δ.
    """
    return max(_threshold_test(sigma, q, count, delta) for count in {1, steps})


def _threshold_test(sigma: float, q: float, steps: int, delta: float) -> float:
    counts = _appearances(q, steps)
    log_weights = _log_binomial(counts, q, steps)
    deviation = sigma * math.sqrt(steps)
    shift = counts / deviation

    def log_ratio(threshold: float) -> float:
        return float(np.logaddexp.reduce(log_weights + shift * threshold - shift**2 / 2))

    def enough(threshold: float) -> bool:
        """Whether the test at this threshold shows ε = log_ratio at δ; thresholds in deviations of the noise."""
        with_unit = float(np.logaddexp.reduce(log_weights + log_ndtr(shift - threshold)))
        without = log_ratio(threshold) + float(log_ndtr(-threshold))
        return math.exp(min(with_unit, 0.0)) - math.exp(min(without, 0.0)) >= delta

    low, high = -40.0, float(shift[-1]) + 40.0
    if not enough(low):
        return 0.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if enough(middle) else (low, middle)
    return max(0.0, log_ratio(low))


def _appearances(q: float, steps: int) -> np.ndarray:
    if q == 1.0:
        return np.array([float(steps)])
    reach = _SPREAD * math.sqrt(steps * q * (1 - q)) + _SPREAD
    return np.arange(max(0, math.floor(steps * q - reach)), min(steps, math.ceil(steps * q + reach)) + 1.0)


def _log_binomial(counts: np.ndarray, q: float, steps: int) -> np.ndarray:
    if q == 1.0:
        return np.zeros(1)
    choices = gammaln(steps + 1.0) - gammaln(counts + 1) - gammaln(steps - counts + 1)
    return np.asarray(choices + counts * math.log(q) + (steps - counts) * math.log1p(-q))
