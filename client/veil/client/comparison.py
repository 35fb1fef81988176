# SPDX-License-Identifier: Apache-2.0
"""Accuracies with their error bars, and whether one head is better than another on the same records.

Promises that records of one unit count as one observation when an error is worked out, and that no error is zero,
however few the records are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

CONFIDENCE = 0.95
"""Of each interval by itself."""

_QUANTILE = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """A share of records, or a difference of two, with its error.

    Attributes:
        value: -1 to 1.
        standard_error: of `value`.
    """

    value: float
    standard_error: float

    @property
    def low(self) -> float:
        """Lower end of the 95 % interval."""
        return self.value - _QUANTILE * self.standard_error

    @property
    def high(self) -> float:
        """Its upper end."""
        return self.value + _QUANTILE * self.standard_error


def accuracy(right: NDArray[np.bool_], unit: NDArray[np.generic]) -> Estimate:
    """Share of records that are known.

    Args:
        right: whether each record is known, [n], not empty.
        unit: the unit of each record, by any name, [n].
    """
    return _mean(right.astype(np.float64), unit)


def gain(right: NDArray[np.bool_], other: NDArray[np.bool_], unit: NDArray[np.generic]) -> Estimate:
    """How much larger the share known to one head is than that known to another, paired by record.

    Args:
        right: whether each record is known to the one, [n], not empty.
        other: whether it is known to the other, [n].
        unit: the unit of each record, by any name, [n].
    """
    return _mean(right.astype(np.float64) - other, unit)


def _mean(values: NDArray[np.float64], unit: NDArray[np.generic]) -> Estimate:
    """Mean over records, its error from the spread of whole units (Liang & Zeger 1986).

    The error counts two further units, as far apart as heads that disagree about one of them each way (Agresti & Min
    2005): without them it would be zero where a few records happen to agree.
    """
    distinct, of_record = np.unique(unit, return_inverse=True)
    size, count = len(values) / len(distinct), len(distinct)
    mean = float(values.mean())
    sums = np.bincount(of_record, weights=values - mean)
    spread = float(sums @ sums) * count / max(count - 1, 1) + size**2
    return Estimate(value=mean, standard_error=math.sqrt(spread) / (len(values) + 2 * size))
