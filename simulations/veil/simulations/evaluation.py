# SPDX-License-Identifier: Apache-2.0
"""How good a model is on held-out records, and what it is compared with.

Promises that the records judged were never trained on. Only a simulation can look at everybody's held-out records at
once; nothing here exists in a deployed run.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, f1_score, log_loss

from veil.common.head import predict, unit_rows
from veil.common.update import Adapter

PENALTY = 10.0
"""Inverse strength of the reference's L2 penalty, as scikit-learn's C."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Scores:
    """Quality on held-out records.

    Attributes:
        accuracy: share of right answers, 0 to 1.
        macro_f1: mean over classes of the F1 score, 0 to 1.
        loss: mean cross-entropy, nats.
    """

    accuracy: float
    macro_f1: float
    loss: float


def score(probabilities: NDArray[np.floating], labels: NDArray[np.int64]) -> Scores:
    """Judge probabilities [n, classes] against labels [n]."""
    classes = np.arange(probabilities.shape[1])
    guess = probabilities.argmax(axis=1)
    clipped = np.clip(probabilities, 1e-15, 1.0)
    clipped /= clipped.sum(axis=1, keepdims=True)
    return Scores(
        accuracy=float(accuracy_score(labels, guess)),
        macro_f1=float(f1_score(labels, guess, average="macro", labels=classes, zero_division=0)),
        loss=float(log_loss(labels, clipped, labels=classes)),
    )


def score_adapter(adapter: Adapter, features: NDArray[np.floating], labels: NDArray[np.int64]) -> Scores:
    """Judge an adapter on records it was not trained on."""
    return score(predict(adapter, features), labels)


def mean_scores(scores: list[Scores]) -> Scores:
    """The mean of several models' scores."""
    return Scores(
        accuracy=float(np.mean([s.accuracy for s in scores])),
        macro_f1=float(np.mean([s.macro_f1 for s in scores])),
        loss=float(np.mean([s.loss for s in scores])),
    )


def non_private(
    features: NDArray[np.floating],
    labels: NDArray[np.int64],
    test_features: NDArray[np.floating],
    test_labels: NDArray[np.int64],
    classes: int,
) -> Scores:
    """The ceiling: scikit-learn's logistic regression on all training records in one place, without privacy."""
    present = np.unique(labels)
    probabilities = np.zeros((len(test_labels), classes))
    if len(present) == 1:
        probabilities[:, present[0]] = 1.0
        return score(probabilities, test_labels)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = LogisticRegression(C=PENALTY, max_iter=2000).fit(unit_rows(features), labels)
    probabilities[:, model.classes_] = model.predict_proba(unit_rows(test_features))
    return score(probabilities, test_labels)
