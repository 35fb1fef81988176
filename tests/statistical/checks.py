# SPDX-License-Identifier: Apache-2.0
"""Judgements on numbers that should be noise: each accepts the truth and rejects a near lie.

Every check errs on true noise at most once in 2·10⁷ (`ALARM`), and says in its text how far the numbers are off.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binom, chi2, kstest, norm

Floats = NDArray[np.float64]
ALARM = 5e-8
"""Chance of one check to reject the truth."""

ENOUGH = 80_000
"""Numbers by which σ is told from 0.97 σ: the variance's two intervals, each 5.5 standard errors wide, lie apart."""


def check_scale(draws: Floats) -> None:
    """Variance 1, by the χ² interval of Σx²."""
    low, high = chi2.ppf([ALARM / 2, 1 - ALARM / 2], draws.size)
    found = float(np.sum(draws**2))
    assert low <= found <= high, f"noise of {math.sqrt(found / draws.size):.3f} times what was charged"


def check_shape(draws: Floats) -> None:
    """Standard normal, by Kolmogorov & Smirnov."""
    chance = float(kstest(draws, "norm").pvalue)
    assert chance > ALARM, f"noise that is not normal (p = {chance:.1e})"


def check_tails(draws: Floats, beyond: float = 3.0) -> None:
    """As many numbers beyond ±3 σ as a normal law has there."""
    count, chance = int(np.sum(np.abs(draws) > beyond)), 2 * norm.sf(beyond)
    low, high = binom.ppf([ALARM / 2, 1 - ALARM / 2], draws.size, chance)
    assert low <= count <= high, f"{count} numbers beyond {beyond} σ; expected {draws.size * chance:.0f}"


def check_unrelated(first: Floats, second: Floats) -> None:
    """Correlation 0."""
    bound = float(norm.isf(ALARM / 2)) / math.sqrt(first.size)
    found = float(np.corrcoef(first, second)[0, 1])
    assert abs(found) < bound, f"noise correlated by {found:.3f}; expected below {bound:.3f}"


def check_count(count: int, of: int, chance: float) -> None:
    """A binomial number of successes, by its exact interval."""
    low, high = binom.ppf([ALARM / 2, 1 - ALARM / 2], of, chance)
    assert low <= count <= high, f"{count} of {of}; expected {of * chance:.1f}, between {low:.0f} and {high:.0f}"


def check_dispersion(counts: NDArray[np.integer], of: int, chance: float) -> None:
    """Counts as scattered as independent binomial ones, by a χ² interval, ten times wider than `ALARM` asks for, as
    they are only nearly normal."""
    statistic = float(np.sum((counts - of * chance) ** 2) / (of * chance * (1 - chance)))
    low, high = chi2.ppf([ALARM / 20, 1 - ALARM / 20], counts.size)
    assert low <= statistic <= high, f"dispersion {statistic / counts.size:.2f}; expected 1 for independent draws"
