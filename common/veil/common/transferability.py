# SPDX-License-Identifier: Apache-2.0
"""How well frozen features suit some labels: LogME, a cross-validated linear probe, and the features' own spread.

Promises figures of features and labels alone, with nothing drawn at random that a seed in here does not fix. Neither
is private: a figure tells of the records it is computed from.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold

from veil.common.errors import InputError

FOLDS: Final = 5
"""Parts of the probe's cross-validation."""

_BOUND: Final = 1e9
"""How far α/β may go from the largest squared singular value, either way: where features fit the labels exactly, or not
at all, the evidence has no maximum."""
_CLOSE: Final = 1e-9
_ITERATIONS: Final = 5_000


def logme(features: NDArray[np.floating], labels: NDArray[np.int64]) -> float:
    """LogME: largest log evidence per record of a Bayesian linear model, mean over the classes, one against the rest.

    For one class, y = F w + ε with w ~ N(0, 1/α) and ε ~ N(0, 1/β); α and β are those of the largest evidence. A higher
    value promises a better head. Of the same records only; it says nothing in percent.

    Args:
        features: what the head would read, [n, d]; d may be above n. No intercept is added.
        labels: class of each record, [n].

    Returns:
        nats per record; the same for the features times any number, and for any order of the records.

    Raises:
        InputError: shapes that do not agree, a feature that is not finite, or fewer than two classes.

    Source: You et al., "LogME: Practical Assessment of Pre-trained Models for Transfer Learning", ICML 2021, §4.
    """
    rows = _checked(features, labels)
    left, singular, _ = np.linalg.svd(rows, full_matrices=False)
    rank = int((singular > singular.max(initial=0.0) * max(rows.shape) * np.finfo(np.float64).eps).sum())
    squares = singular[:rank] ** 2
    evidences = []
    for one in np.unique(labels):
        target = (labels == one).astype(np.float64)
        shares = (left[:, :rank].T @ target) ** 2
        evidences.append(_evidence(squares, shares, max(0.0, float(target.sum() - shares.sum())), len(target)))
    return float(np.mean(evidences))


def _evidence(squares: NDArray[np.float64], shares: NDArray[np.float64], outside: float, n: int) -> float:
    """Largest log evidence per record, by the paper's fixed point, which is written for the ratio α/β alone.

    Args:
        squares: σ, the squared singular values above zero, [k].
        shares: z², the target's squared coordinates along the left singular vectors, [k].
        outside: squared length of the part of the target that no weights can fit.
        n: records.
    """
    if not len(squares):
        return _at(1.0, squares, shares, outside, n)
    low, high = float(squares.max()) / _BOUND, float(squares.max()) * _BOUND
    ratio = float(squares.mean())
    for _ in range(_ITERATIONS):
        before, ratio = ratio, min(high, max(low, _next(ratio, squares, shares, outside, n)))
        if abs(math.log(ratio / before)) < _CLOSE:
            break
    return _at(ratio, squares, shares, outside, n)


def _next(ratio: float, squares: NDArray[np.float64], shares: NDArray[np.float64], outside: float, n: int) -> float:
    """α/β after α ← γ / |m|² and β ← (n - γ) / |F m - y|², with γ the number of weights that the labels decide."""
    shrunk = ratio + squares
    decided = float((squares / shrunk).sum())
    weights = float((squares * shares / shrunk**2).sum())
    residual = float((shares * (ratio / shrunk) ** 2).sum()) + outside
    if weights <= 0.0 or n <= decided:
        return math.inf if weights <= 0.0 else 0.0
    return decided / weights * residual / (n - decided)


def _at(ratio: float, squares: NDArray[np.float64], shares: NDArray[np.float64], outside: float, n: int) -> float:
    """Log evidence per record at a ratio α/β and the best β for it."""
    kept = ratio / (ratio + squares)
    noise = (outside + float((shares * kept).sum())) / n
    return -0.5 * (math.log(2 * math.pi * math.e * noise) - float(np.log(kept).sum()) / n)


def spread(rows: NDArray[np.floating]) -> float:
    """How far rows lie from their mean: root of the mean squared distance.

    Of rows of length 1 it is 0 where all are alike and at most 1. What a private run's noise hides is measured against
    it, not against the rows' length; neither LogME nor the probe sees that.

    Args:
        rows: [n, d].
    """
    return float(np.sqrt(np.square(rows - rows.mean(axis=0)).sum(axis=1).mean()))


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Probe:
    """Which records a linear model got right that it was not trained on.

    Attributes:
        right: 1 where the answer was right, else 0, [n].
        groups: patient of each record, or another thing that is never divided between training and test, [n].
    """

    right: NDArray[np.float64]
    groups: NDArray[np.int64]

    @property
    def accuracy(self) -> float:
        """Share of right answers, 0 to 1."""
        return float(self.right.mean())

    @property
    def standard_error(self) -> float:
        """Of the accuracy, over groups; the chance of the training records is not in it."""
        return _standard_error(self.right, self.groups)

    def behind(self, other: Probe) -> tuple[float, float]:
        """How far this accuracy lies below another's on the same records, and the standard error of that difference.

        Raises:
            ValueError: for another number of records.
        """
        difference = other.right - self.right
        return float(difference.mean()), _standard_error(difference, self.groups)


def linear_probe(
    features: NDArray[np.floating],
    labels: NDArray[np.int64],
    *,
    penalty: float,
    groups: NDArray[np.int64] | None = None,
) -> Probe:
    """Cross-validated logistic regression, `FOLDS` parts, the classes divided evenly among them.

    Args:
        features: [n, d].
        labels: class of each record, [n].
        penalty: inverse strength of the L2 penalty, as scikit-learn's C.
        groups: index of what is never divided, [n]; every record by itself without it.

    Raises:
        InputError: as `logme`, or fewer groups than parts.
    """
    rows = _checked(features, labels)
    groups = np.arange(len(rows)) if groups is None else groups
    if (count := len(np.unique(groups))) < FOLDS:
        raise InputError(f"{count} groups of records", f"at least {FOLDS}, one a part", "give more records")
    right = np.zeros(len(rows))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of classes with fewer records than parts, and of iterations
        folds = StratifiedGroupKFold(FOLDS, shuffle=True, random_state=0)
        for train, test in folds.split(rows, labels, groups):
            right[test] = _answers(rows[train], labels[train], rows[test], penalty) == labels[test]
    return Probe(right=right, groups=np.asarray(groups, dtype=np.int64))


def _answers(
    rows: NDArray[np.float64], labels: NDArray[np.int64], asked: NDArray[np.float64], penalty: float
) -> NDArray[np.int64]:
    if len(present := np.unique(labels)) == 1:
        return np.full(len(asked), present[0])
    answers: NDArray[np.int64] = LogisticRegression(C=penalty, max_iter=2000).fit(rows, labels).predict(asked)
    return answers


def _standard_error(values: NDArray[np.float64], groups: NDArray[np.int64]) -> float:
    """Of the mean of values [n] that are independent from group to group, not within one."""
    _, place = np.unique(groups, return_inverse=True)
    sums = np.bincount(place, values - values.mean())
    return float(np.sqrt((sums**2).sum() * len(sums) / (len(sums) - 1)) / len(values))


def _checked(features: NDArray[np.floating], labels: NDArray[np.int64]) -> NDArray[np.float64]:
    rows = np.asarray(features, dtype=np.float64)
    if rows.ndim != 2 or labels.shape != rows.shape[:1]:
        raise InputError(
            f"features of shape {list(rows.shape)} with labels of shape {list(labels.shape)}",
            "features [n, d] and labels [n]",
            "give a row of features and a label for each record",
        )
    if unusable := int((~np.isfinite(rows).all(axis=1)).sum()):
        raise InputError(
            f"{unusable} of {len(rows)} records with features that are not finite",
            "finite features",
            "choose another backbone, or leave these records out",
        )
    if (classes := len(np.unique(labels))) < 2:
        raise InputError(
            f"{len(rows)} records of {classes} class{'es' * (classes != 1)}",
            "records of at least two classes",
            "give more records, or records of another class",
        )
    return rows
