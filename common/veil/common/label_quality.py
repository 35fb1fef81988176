# SPDX-License-Identifier: Apache-2.0
"""How good a model of several labels is, as one release: hits, false alarms and misses of each label, with error bars.

Promises that one unit's vector is no longer than `labels_norm`, that an interval counts the privacy noise and the
chance of which units were held out, and that a figure the noise outweighs is None.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from veil.common.evaluation import DROWNED, Figure, NoisyCounts, loss_cap, times

THRESHOLD = 0.5
"""Probability from which on a label is said to be there."""

TOTAL_WEIGHT = 0.5
"""Weight of the number of units and of the scaled loss, beside the square root of the number of labels: both stand for
all labels at once, and are as loud as these."""


def labels_size(labels: int) -> int:
    """How many numbers an evaluation of so many labels releases."""
    return 3 * labels + 2


def labels_norm(labels: int) -> float:
    """L2 bound of one unit's vector: each label counts once at most, both totals by their weights. The mean of such
    vectors, of a unit with several records, is no longer."""
    return math.sqrt(labels * (1 + 2 * TOTAL_WEIGHT**2))


def label_rows(answers: NDArray[np.float64], targets: NDArray[np.float64]) -> NDArray[np.float64]:
    """Each record's vector, of length at most `labels_norm`.

    Args:
        answers: predicted probability of each label, [n, c].
        targets: the truth, 0 or 1, [n, c].

    Returns:
        by label whether it was rightly said to be there, wrongly said, and wrongly not said; the weight of one unit;
        the weighted loss, mean over labels, each cut at `loss_cap(2)`. [n, 3 c + 2]
    """
    said, there = answers >= THRESHOLD, targets > THRESHOLD
    right = np.where(there, answers, 1 - answers)
    lost = -np.log(np.maximum(right, math.exp(-loss_cap(2)))) / loss_cap(2)
    weight = TOTAL_WEIGHT * math.sqrt(targets.shape[1])
    total = np.full((len(targets), 1), weight)
    return np.hstack([said & there, said & ~there, there & ~said, total, weight * lost.mean(axis=1, keepdims=True)])


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelQuality:
    """One label; errors: the noise, and, but for the count, which units were held out.

    Attributes:
        count: held-out units that have it.
        share: of all held-out units.
        accuracy: share of units of which the model rightly says whether they have it.
        precision: share of units that have it among those of which the model says so.
        recall: share of units of which the model says so among those that have it.
        f1: harmonic mean of the two.
    """

    count: Figure
    share: Figure
    accuracy: Figure
    precision: Figure
    recall: Figure
    f1: Figure


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelsQuality:
    """A model of several labels on held-out units, as far as the noise lets it be known.

    Decisions about one unit may err together: figures over all labels have the errors of as many independent trials as
    there are units, however many labels each has.

    Attributes:
        count: number of held-out units; error: the noise.
        accuracy: share of right decisions, one for each label of each unit (micro).
        micro_f1: of all decisions together.
        macro_f1: mean over labels; its error is as if all labels erred together.
        loss: mean cross-entropy of a decision, each cut at `loss_cap(2)`, nats.
        labels: by label.
    """

    count: Figure
    accuracy: Figure
    micro_f1: Figure
    macro_f1: Figure
    loss: Figure
    labels: Mapping[str, LabelQuality]

    def to_report(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "loss_cap": loss_cap(2)}


def labels_quality(sums: NDArray[np.float64], deviation: float, labels: Sequence[str]) -> LabelsQuality:
    """What released sums say.

    Args:
        sums: the released numbers, added over sites, [3 c + 2].
        deviation: standard deviation of their noise, each number's.
        labels: the labels.
    """
    many = len(labels)
    scale = np.r_[np.ones(3 * many), np.full(2, TOTAL_WEIGHT * math.sqrt(many))]
    sought = NoisyCounts(counted=sums / scale, covariance=np.diag((deviation / scale) ** 2))
    each = np.eye(3 * many + 2)
    hits, alarms, misses = each[:many], each[many : 2 * many], each[2 * many : 3 * many]
    everyone, loss = each[-2], each[-1]
    found = {
        label: _label(sought, hits[index], alarms[index], misses[index], everyone) for index, label in enumerate(labels)
    }
    hit, missed = hits.sum(axis=0) / many, (alarms + misses).sum(axis=0) / many
    return LabelsQuality(
        count=sought.number(everyone),
        accuracy=sought.share(everyone - missed, everyone),
        micro_f1=_f1(sought.share(hit, hit + missed)),
        macro_f1=_mean({label: one.f1 for label, one in found.items()}),
        loss=times(sought.share(loss, everyone), loss_cap(2)),
        labels=found,
    )


def _label(
    sought: NoisyCounts,
    hit: NDArray[np.float64],
    alarm: NDArray[np.float64],
    miss: NDArray[np.float64],
    everyone: NDArray[np.float64],
) -> LabelQuality:
    return LabelQuality(
        count=sought.number(hit + miss),
        share=sought.share(hit + miss, everyone),
        accuracy=sought.share(everyone - alarm - miss, everyone),
        precision=sought.share(hit, hit + alarm),
        recall=sought.share(hit, hit + miss),
        f1=_f1(sought.share(hit, hit + alarm + miss)),
    )


def _f1(jaccard: Figure) -> Figure:
    """F₁ = 2J / (1 + J) of J = hits / (hits + false alarms + misses), which is a plain share and rises with it."""
    if jaccard.value is None or jaccard.low is None or jaccard.high is None:
        return jaccard
    low, value, high = (2 * one / (1 + one) for one in (jaccard.low, jaccard.value, jaccard.high))
    wide = jaccard.standard_error or 0.0
    return Figure(value=value, standard_error=2 * wide / (1 + jaccard.value) ** 2, low=low, high=high)


def _mean(figures: Mapping[str, Figure]) -> Figure:
    lows, values, highs, errors = [], [], [], []
    for label, one in figures.items():
        if one.value is None or one.low is None or one.high is None or one.standard_error is None:
            return Figure(reason=f"{DROWNED} of {label}")
        lows.append(one.low)
        values.append(one.value)
        highs.append(one.high)
        errors.append(one.standard_error)
    low, value, high, error = (sum(some) / len(figures) for some in (lows, values, highs, errors))
    return Figure(value=value, standard_error=error, low=low, high=high)
