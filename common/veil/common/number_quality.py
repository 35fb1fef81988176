# SPDX-License-Identifier: Apache-2.0
"""How far a model's numbers are off, as one release: absolute and squared errors on held-out units, with error bars.

Promises that one unit's vector is no longer than `NUMBER_NORM`, that an interval counts the privacy noise and the
chance of which units were held out, and that a figure the noise outweighs is None.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from veil.common.evaluation import Figure, NoisyCounts, times

ERROR_CAP = 0.5
"""The error from which on a record counts no more, as a part of the public range: an answer in its middle is never
further off, and half the cap means half the noise."""

COUNT_WEIGHT = 0.5
"""Weight of the number of units beside the errors in units of the cap."""

NUMBER_SIZE = 3
"""How many numbers an evaluation of a number releases."""

NUMBER_NORM = math.sqrt(2 + COUNT_WEIGHT**2)
"""L2 bound of one unit's vector; the mean of such vectors, of a unit with several records, is no longer."""


def number_rows(answers: NDArray[np.float64], targets: NDArray[np.float64]) -> NDArray[np.float64]:
    """Each record's vector, of length at most `NUMBER_NORM`.

    Args:
        answers: predicted, as parts of the public range, [n, 1].
        targets: the truth, likewise, [n].

    Returns:
        the weight of one unit, its error in units of the cap, and that squared, [n, 3].
    """
    errors = np.minimum(np.abs(answers[:, 0] - targets) / ERROR_CAP, 1.0)
    return np.stack([np.full(len(errors), COUNT_WEIGHT), errors, errors**2], axis=1)


@dataclass(frozen=True, kw_only=True, slots=True)
class NumberQuality:
    """A model on held-out units, as far as the noise lets it be known; in the number's own unit.

    Errors are those of the noise and of which units were held out; the spread of the errors is taken at the largest
    that their mean allows, so that an interval is rather too wide.

    Attributes:
        count: number of held-out units; error: the noise alone.
        mae: mean absolute error, each record's cut at `error_cap`.
        rmse: root of the mean squared error, each record's cut likewise.
        error_cap: half the public range.
    """

    count: Figure
    mae: Figure
    rmse: Figure
    error_cap: float

    def to_report(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def number_quality(sums: NDArray[np.float64], deviation: float, target: tuple[float, float]) -> NumberQuality:
    """What released sums say.

    Args:
        sums: the released numbers, added over sites, [3].
        deviation: standard deviation of their noise, each number's.
        target: the public range of the number.
    """
    scale, cap = np.array([COUNT_WEIGHT, 1.0, 1.0]), ERROR_CAP * (target[1] - target[0])
    sought = NoisyCounts(counted=sums / scale, covariance=np.diag((deviation / scale) ** 2))
    units, errors, squares = np.eye(NUMBER_SIZE)
    return NumberQuality(
        count=sought.number(units),
        mae=times(sought.share(errors, units), cap),
        rmse=times(_root(sought.share(squares, units)), cap),
        error_cap=cap,
    )


def _root(figure: Figure) -> Figure:
    if figure.value is None or figure.low is None or figure.high is None:
        return figure
    low, value, high = (math.sqrt(one) for one in (figure.low, figure.value, figure.high))
    spread = (figure.standard_error or 0.0) / (2 * value) if value else high
    return Figure(value=value, standard_error=spread, low=low, high=high)
