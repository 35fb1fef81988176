# SPDX-License-Identifier: Apache-2.0
"""Whether a site's records are like the other sites': how far its mean feature lies from theirs, from noised sums.

Promises that it reads released numbers alone, and so costs no privacy; that the interval counts the noise of the sums,
that of the counts which they are divided by, and the chance of which units a site happens to have; and that two sites
with the same distribution of records are called apart at most about one time in twenty.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from statistics import NormalDist
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from veil.common.evaluation import CONFIDENCE, Figure
from veil.common.schedule import COUNT_WEIGHT

_QUANTILE = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)

FURTHEST = 2.0
"""Distance of two opposite unit rows: no two means lie further apart."""

WIDE = 0.5
"""An interval that is wider, and has 0 in it, says nothing."""

ENOUGH = 5.0
"""A noisy number of units below so many of its standard deviations is nothing to divide by."""

TOO_FEW = "too few units for the noise of their number"


class Likeness(StrEnum):
    """What the interval of a distance says."""

    ALIKE = "alike"
    APART = "apart"
    UNKNOWN = "unknown"


@dataclass(frozen=True, kw_only=True, slots=True)
class Mismatch:
    """One site beside the others.

    Attributes:
        distance: of its mean unit row from that of all others' units: 0 for the same centre, √2 for orthogonal ones,
            `FURTHEST` at most. The interval is of the distributions that the units were drawn from, by itself.
        verdict: `APART` where the interval ends above 0; `UNKNOWN` where it includes 0 and is wider than `WIDE`, or
            there is none; `ALIKE` otherwise, which is to say that nothing was found.
    """

    distance: Figure
    verdict: Likeness

    def to_report(self) -> dict[str, Any]:
        """Plain values, which JSON brings back to the last bit."""
        return {"distance": asdict(self.distance), "verdict": self.verdict.value}

    @classmethod
    def from_report(cls, report: Mapping[str, Any]) -> Self:
        """The inverse of `to_report`.

        Raises:
            ValueError, KeyError, TypeError: for anything else.
        """
        return cls(distance=Figure(**report["distance"]), verdict=Likeness(report["verdict"]))


@dataclass(frozen=True, kw_only=True, slots=True)
class NoisySum:
    """The sum over units of [mean unit row, `COUNT_WEIGHT`], released.

    Attributes:
        numbers: [d + 1].
        deviation: standard deviation of the noise in each.
    """

    numbers: NDArray[np.float64]
    deviation: float

    @property
    def units(self) -> float:
        """Their noisy number."""
        return float(self.numbers[-1]) / COUNT_WEIGHT

    @property
    def enough(self) -> bool:
        """Whether there is something to divide by."""
        return self.units > ENOUGH * self.deviation / COUNT_WEIGHT and self.units >= 1

    @property
    def mean(self) -> NDArray[np.float64]:
        """Of the units' rows, [d]."""
        return self.numbers[:-1] / self.units

    @property
    def variance(self) -> float:
        """Of the mean's noise in each coordinate: exact, as the noise of the count is another draw."""
        return (self.deviation / self.units) ** 2

    @property
    def length(self) -> float:
        """Estimate of the squared length of the mean without noise, 0 to 1."""
        mean = self.mean
        return min(1.0, max(0.0, float(mean @ mean) - mean.size * self.variance))

    @property
    def stretched(self) -> float:
        """Variance of the mean along itself, which the noise of the count stretches or shortens (delta method)."""
        return self.length * self.variance / COUNT_WEIGHT**2

    @property
    def drawn(self) -> float:
        """Most that the variances of the mean's coordinates, over units drawn anew, add up to: rows of length at most
        1 with mean μ scatter by E‖row - μ‖² ≤ 1 - ‖μ‖², one unit less for the mean being theirs. Pooled sites that
        differ have less (Jensen)."""
        return (1 - self.length) / max(1.0, self.units - 1)


def mismatches(released: Mapping[str, NDArray[np.float64]], deviation: float) -> dict[str, Mismatch]:
    """Each site beside all others; nothing of fewer than two, as of a masked sum.

    A site that is unlike the others draws their mean towards it, so that each of few others has some distance too; the
    largest one tells which it is.

    Args:
        released: site to its noised sum, [d + 1].
        deviation: standard deviation of the noise in each number, σ·C.
    """
    if len(released) < 2:
        return {}
    total = np.sum(list(released.values()), axis=0)
    others = deviation * math.sqrt(len(released) - 1)
    return {
        name: mismatch(
            NoisySum(numbers=numbers, deviation=deviation), NoisySum(numbers=total - numbers, deviation=others)
        )
        for name, numbers in released.items()
    }


def mismatch(own: NoisySum, others: NoisySum) -> Mismatch:
    """One site beside the others.

    The squared distance Q of two noisy means is a noncentral χ² of d coordinates: with variance v in each, its mean is
    ‖δ‖² + d·v and its variance 2d·v² + 4v·‖δ‖² (Johnson, Kotz & Balakrishnan 1995, chapter 29). The noise of the
    counts, and which units a site happens to have, add to the covariance; of the latter no more is known than that its
    trace is at most `drawn`, so that the worst case is taken: all of it is subtracted for the estimate and the lower
    end and none for the upper, and it may lie in one direction. Two sites with the same distribution then differ by
    nothing that is not subtracted, and the lower end is above 0 in some 5.3 % of cases at most, as of a χ² of few
    coordinates, and in 3 % of many; in up to 8 % at a site of a handful of units. The ends are where ‖δ‖² makes Q lie
    1.96 standard deviations away (Wilson 1927), and no nearer than were the estimate 0.
    """
    if not (own.enough and others.enough):
        return Mismatch(distance=Figure(reason=TOO_FEW), verdict=Likeness.UNKNOWN)
    apart, noise = own.mean - others.mean, own.variance + others.variance
    besides = own.stretched + own.drawn + others.stretched + others.drawn
    seen = float(apart @ apart) - apart.size * noise
    null = 2 * (apart.size * noise**2 + 2 * noise * besides + besides**2)
    each = noise + besides
    low, _ = _ends(max(0.0, seen - besides), null, each)
    _, high = _ends(max(0.0, seen), null, each)
    return _told(seen - besides, low, high)


def _ends(seen: float, null: float, each: float) -> tuple[float, float]:
    """The two x with (seen - x)² = z²·(null + 4·each·x); the lower may be negative."""
    middle = seen + 2 * each * _QUANTILE**2
    width = _QUANTILE * math.sqrt(null + 4 * each * seen + (2 * each * _QUANTILE) ** 2)
    return middle - width, middle + width


def _told(squared: float, low_squared: float, high_squared: float) -> Mismatch:
    value, low, high = (min(FURTHEST, math.sqrt(max(0.0, one))) for one in (squared, low_squared, high_squared))
    known = Likeness.UNKNOWN if high - low > WIDE else Likeness.ALIKE
    figure = Figure(value=value, standard_error=(high - low) / (2 * _QUANTILE), low=low, high=high)
    return Mismatch(distance=figure, verdict=Likeness.APART if low > 0 else known)
