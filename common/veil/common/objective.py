# SPDX-License-Identifier: Apache-2.0
"""What a head's scores mean, by form of task: which answers they give, how wrong those are, and how hard that pulls.

Promises that one record's pull has a public bound whatever scores and truth are, that no record's loss looks at another
record, and that gradients need no plan: the truth itself shows of which form it is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

from veil.common.plan_sections import Form

Targets = NDArray[np.int64] | NDArray[np.float64]
"""The truth of n records: classes, whole numbers [n]; labels, 0 or 1 [n, c]; or numbers between 0 and 1, [n]."""

F = TypeVar("F", np.float32, np.float64)

_LEAST: Final = 1e-15
"""Probability below which a loss grows no further: 35 nats."""


class Objective(Protocol):
    """One form of task; scores are [n, c] of c labels, answers are as many numbers from 0 to 1."""

    def answers(self, scores: NDArray[F]) -> NDArray[F]:
        """What the scores say; `scores` is overwritten. [n, c]"""
        ...

    def errors(self, scores: NDArray[F], targets: Targets) -> NDArray[F]:
        """Gradient of each record's loss in its scores: answer minus truth; `scores` is overwritten. [n, c]"""
        ...

    def losses(self, answers: NDArray[np.float64], targets: Targets) -> NDArray[np.float64]:
        """How wrong each record's answers are, nats: their cross-entropy, the mean over single labels. [n]"""
        ...

    def longest(self, labels: int) -> float:
        """L2 bound of one record's error."""
        ...

    def curvature(self, labels: int) -> float:
        """The largest second derivative of one record's loss along any direction of its scores, at scores of zero."""
        ...


class _OneClass:
    """Softmax and cross-entropy: one of c classes."""

    def answers(self, scores: NDArray[F]) -> NDArray[F]:
        scores -= scores.max(axis=1, keepdims=True)
        np.exp(scores, out=scores)
        scores /= row_sums(scores)[:, None]
        return scores

    def errors(self, scores: NDArray[F], targets: Targets) -> NDArray[F]:
        errors = self.answers(scores)
        errors[np.arange(len(targets)), targets] -= 1.0
        return errors

    def losses(self, answers: NDArray[np.float64], targets: Targets) -> NDArray[np.float64]:
        own = answers[np.arange(len(targets)), targets]
        return np.asarray(-np.log(np.maximum(own, _LEAST)), dtype=np.float64)

    def longest(self, labels: int) -> float:
        return math.sqrt(2.0)

    def curvature(self, labels: int) -> float:
        return 1 / labels


class _EachForItself:
    """Sigmoids and binary cross-entropy: each of c labels is there or not; or one number between 0 and 1.

    For a number it is the quasi-likelihood of Papke & Wooldridge (1996): the answer estimates its mean, is never out of
    range, and one record pulls by at most the range however far off it is.
    """

    def answers(self, scores: NDArray[F]) -> NDArray[F]:
        expit(scores, out=scores)
        return scores

    def errors(self, scores: NDArray[F], targets: Targets) -> NDArray[F]:
        errors = self.answers(scores)
        errors -= targets.reshape(errors.shape)
        return errors

    def losses(self, answers: NDArray[np.float64], targets: Targets) -> NDArray[np.float64]:
        truth, sure = targets.reshape(answers.shape), np.clip(answers, _LEAST, 1 - _LEAST)
        lost = truth * np.log(sure) + (1 - truth) * np.log1p(-sure)
        return np.asarray(-lost.mean(axis=1), dtype=np.float64)

    def longest(self, labels: int) -> float:
        return math.sqrt(labels)

    def curvature(self, labels: int) -> float:
        return 1 / 4


OBJECTIVES: Final[Mapping[Form, Objective]] = {
    "classification": _OneClass(),
    "multilabel": _EachForItself(),
    "regression": _EachForItself(),
}
"""By form of task."""


def row_sums(numbers: NDArray[F]) -> NDArray[F]:
    """Sum of each row of [n, c]; bits follow from the row alone, however many stand beside it, where rows are columns
    in memory: numpy adds up a row that stands alone in another order than rows that stand together."""
    if len(numbers) == 1:
        return np.asarray(numbers.cumsum(axis=1)[:, -1])
    return np.asarray(numbers.sum(axis=1))


def form_of(targets: Targets) -> Form:
    """The form that a truth is of: whole numbers are classes, rows are labels, other numbers are numbers."""
    if targets.ndim == 2:
        return "multilabel"
    return "classification" if np.issubdtype(targets.dtype, np.integer) else "regression"


def classes_of(targets: Targets) -> NDArray[np.int64]:
    """The truth of a classification, [n].

    Raises:
        ValueError: for another form.
    """
    if (form := form_of(targets)) != "classification":
        raise ValueError(f"the truth of a {form}; expected classes")
    return np.asarray(targets, dtype=np.int64)


def in_range(numbers: NDArray[np.float64], target: tuple[float, float]) -> NDArray[np.float64]:
    """Numbers [n] cut to a public range, as parts of it: 0 at its low end, 1 at its high end."""
    low, high = target
    return np.asarray((np.clip(numbers, low, high) - low) / (high - low), dtype=np.float64)


def from_range(parts: NDArray[np.float64], target: tuple[float, float]) -> NDArray[np.float64]:
    """The inverse of `in_range` for what was not cut."""
    low, high = target
    return np.asarray(low + parts * (high - low), dtype=np.float64)
