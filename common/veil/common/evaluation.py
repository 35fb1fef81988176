# SPDX-License-Identifier: Apache-2.0
"""How good a model is, as one release: what is counted on held-out units, and what the noisy sums say, with error bars.

Promises that one unit's vector is no longer than `evaluation_norm`, that an interval counts the privacy noise and the
chance of which units were held out, from public numbers alone, and that a figure the noise outweighs is None.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

EVALUATION = "evaluation"
"""Name of the released tensor."""

TOTAL_WEIGHT = 0.5
"""Weight of the two totals beside the counts of each class: with it, the accuracy of ten classes has a third of the
noise that their counts alone would give it, and a class' recall about as much."""

LOSS_WEIGHT = 0.5
"""Weight of the scaled loss."""

GROUP_WEIGHT = 1.0
"""Weight of the counts by group, where a plan names groups: as loud as a class' own."""

EVALUATION_NORM = math.sqrt(1 + TOTAL_WEIGHT**2 + LOSS_WEIGHT**2)
"""L2 bound of one unit's vector without groups."""

CONFIDENCE = 0.95
"""Of each interval by itself."""

_QUANTILE = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
DROWNED = "the noise outweighs what was counted"


def released_size(classes: int, groups: int = 0) -> int:
    """How many numbers an evaluation releases."""
    return 2 * classes + 3 + 2 * groups


def evaluation_norm(groups: int = 0) -> float:
    """L2 bound of one unit's vector: its outcome, and beside it, where there are groups, one more entry of
    `GROUP_WEIGHT` at most. The mean of such vectors, of a unit with several records, is no longer."""
    return math.sqrt(EVALUATION_NORM**2 + GROUP_WEIGHT**2) if groups else EVALUATION_NORM


def loss_cap(classes: int) -> float:
    """The loss from which on a record counts no more, nats: twice what a guess among all classes has, and 2."""
    return 2 * (1 + math.log(classes))


def design(classes: int) -> NDArray[np.float64]:
    """From what is counted to what is released, [2 classes + 3, 2 classes + 1].

    Counted of each record: its class when the answer is right (one-hot), its class when it is wrong (one-hot), its
    loss in units of `loss_cap`. Released: these, the loss weighted, and the weighted totals of right and wrong. Right
    and wrong apart are shorter than class and right would be: √1 against √2.
    """
    counts = np.eye(2 * classes, 2 * classes + 1)
    totals = np.zeros((2, 2 * classes + 1))
    totals[0, :classes] = totals[1, classes:-1] = TOTAL_WEIGHT
    loss = np.zeros((1, 2 * classes + 1))
    loss[0, -1] = LOSS_WEIGHT
    return np.vstack([counts, totals, loss])


def outcome_rows(probabilities: NDArray[np.float64], labels: NDArray[np.int64]) -> NDArray[np.float64]:
    """Each record's vector, of length at most `EVALUATION_NORM`.

    Args:
        probabilities: predicted, [n, classes].
        labels: the truth, [n].

    Returns:
        [n, 2 classes + 3].
    """
    (count, classes), rows = probabilities.shape, np.arange(len(labels))
    wrong = probabilities.argmax(axis=1) != labels
    least = math.exp(-loss_cap(classes))
    counted = np.zeros((count, 2 * classes + 1))
    counted[rows, labels + classes * wrong] = 1.0
    counted[:, -1] = -np.log(np.maximum(probabilities[rows, labels], least)) / loss_cap(classes)
    return counted @ design(classes).T


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """A number with its error; all None, and a reason, where nothing can be said.

    Attributes:
        value: the estimate.
        standard_error: half the interval's width over 1.96, before the interval is cut to what is possible.
        low: lower end of the 95 % interval.
        high: its upper end.
        reason: why there is no value.
    """

    value: float | None = None
    standard_error: float | None = None
    low: float | None = None
    high: float | None = None
    reason: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassQuality:
    """One class.

    Attributes:
        count: held-out units of it; error: the noise.
        share: of all held-out units; error: the noise, and which units were held out.
        recall: share of its units that the model knows; error: as above.
    """

    count: Figure
    share: Figure
    recall: Figure


@dataclass(frozen=True, kw_only=True, slots=True)
class Quality:
    """A model on held-out units, as far as the noise lets it be known.

    Attributes:
        count: number of held-out units; error: the noise.
        accuracy: share of right answers; error: the noise, and which units were held out.
        loss: mean cross-entropy, each record's cut at `loss_cap`, nats; error: as above, the spread of the loss taken
            at its largest.
        classes: by label.
    """

    count: Figure
    accuracy: Figure
    loss: Figure
    classes: Mapping[str, ClassQuality]

    def to_report(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def quality(sums: NDArray[np.float64], deviation: float, labels: Sequence[str]) -> Quality:
    """What released sums say.

    Args:
        sums: the released numbers, added over sites, [2 classes + 3].
        deviation: standard deviation of their noise, each number's.
        labels: the classes.
    """
    classes, released = len(labels), design(len(labels))
    sought = NoisyCounts(
        counted=np.linalg.pinv(released) @ sums,
        covariance=np.asarray(deviation**2 * np.linalg.inv(released.T @ released), dtype=np.float64),
    )
    right, wrong = np.eye(2 * classes + 1)[:classes], np.eye(2 * classes + 1)[classes:-1]
    loss, everyone = np.eye(2 * classes + 1)[-1], right.sum(axis=0) + wrong.sum(axis=0)
    return Quality(
        count=sought.number(everyone),
        accuracy=sought.share(right.sum(axis=0), everyone),
        loss=times(sought.share(loss, everyone), loss_cap(classes)),
        classes={
            label: ClassQuality(
                count=sought.number(right[index] + wrong[index]),
                share=sought.share(right[index] + wrong[index], everyone),
                recall=sought.share(right[index], right[index] + wrong[index]),
            )
            for index, label in enumerate(labels)
        },
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class NoisyCounts:
    """Least squares of what was counted, [m], and the covariance of its noise, [m, m]."""

    counted: NDArray[np.float64]
    covariance: NDArray[np.float64]

    def number(self, of: NDArray[np.float64]) -> Figure:
        """A count, of which only the noise is unknown."""
        value, error = float(of @ self.counted), math.sqrt(of @ self.covariance @ of)
        ends = (value - _QUANTILE * error, value, value + _QUANTILE * error)
        low, middle, high = (max(0.0, end) for end in ends)
        return Figure(value=middle, standard_error=error, low=low, high=high)

    def share(self, part: NDArray[np.float64], whole: NDArray[np.float64], quantile: float = _QUANTILE) -> Figure:
        """The chance r of which part/whole is a sample: all r in [0, 1] that neither noise nor sampling rules out.

        (part - r·whole)² ≤ 1.96² (noise variance of part - r·whole + whole·r(1 - r)), a quadratic in r. It is Fieller's
        interval (1954) where sampling is nothing, and Wilson's (1927) where noise is nothing.

        Args:
            part: what is counted of the sample, as weights of `counted`, [m].
            whole: the sample, likewise.
            quantile: of the standard normal law; 1.96 for `CONFIDENCE`.
        """
        above, below = float(part @ self.counted), float(whole @ self.counted)
        square, trials = quantile**2, max(0.0, below)
        second = below**2 + square * (trials - float(whole @ self.covariance @ whole))
        first = -2 * above * below + square * (2 * float(part @ self.covariance @ whole) - trials)
        last = above**2 - square * float(part @ self.covariance @ part)
        inside = first**2 - 4 * second * last
        if below <= 0 or second <= 0 or inside < 0:
            return Figure(reason=DROWNED)
        ends = [(-first + sign * math.sqrt(inside)) / (2 * second) for sign in (-1, 1)]
        low, high = max(0.0, ends[0]), min(1.0, ends[1])
        if low >= high or (low, high) == (0.0, 1.0):
            return Figure(reason=DROWNED)
        error = (ends[1] - ends[0]) / (2 * quantile)
        value = min(1.0, max(0.0, above / below))
        return Figure(value=value, standard_error=error, low=min(low, value), high=max(high, value))


def times(figure: Figure, factor: float) -> Figure:
    """The figure in another unit."""
    if figure.value is None or figure.standard_error is None or figure.low is None or figure.high is None:
        return figure
    return Figure(
        value=factor * figure.value,
        standard_error=factor * figure.standard_error,
        low=factor * figure.low,
        high=factor * figure.high,
    )
