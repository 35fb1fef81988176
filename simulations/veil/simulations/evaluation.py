# SPDX-License-Identifier: Apache-2.0
"""How good a model is on held-out records, and what it is compared with.

Promises that the records judged were never trained on. Only a simulation can look at everybody's held-out records at
once; nothing here exists in a deployed run.
"""

from __future__ import annotations

import warnings
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import accuracy_score, f1_score, log_loss

from veil.common.head import predict, unit_rows
from veil.common.label_quality import THRESHOLD
from veil.common.objective import OBJECTIVES, Targets, classes_of, form_of
from veil.common.plan_sections import Form, Task
from veil.common.structured_quality import SECOND
from veil.common.update import Adapter

PENALTY = 10.0
"""Inverse strength of the reference's L2 penalty, as scikit-learn's C."""

HEADLINES: dict[Form, str] = {
    "classification": "accuracy",
    "multilabel": "accuracy of single labels",
    "regression": "variance explained",
    "tokens": "accuracy of words",
    "answers": "exact matches",
    "generation": "tokens foreseen",
    "detection": "objects found",
}
"""What `Scores.headline` is."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Scores:
    """Quality on held-out records.

    Attributes:
        accuracy: share of right answers, 0 to 1; of several labels, share of right decisions, one for each label of
            each record; None for a number.
        macro_f1: mean over labels of the F1 score, 0 to 1; None for a number.
        loss: mean cross-entropy, nats; of several labels, of one decision.
        mae: of a number, mean absolute error in its own unit.
        rmse: of a number, root of the mean squared error in its own unit.
        r2: of a number, share of its variance that is explained; below 0 where its mean would be a better answer.
        second: what else there is of answers with a structure, by name: see `veil.common.structured_quality.SECOND`.
    """

    accuracy: float | None
    macro_f1: float | None
    loss: float
    mae: float | None = None
    rmse: float | None = None
    r2: float | None = None
    second: tuple[str, float] | None = None

    @property
    def headline(self) -> float:
        """The figure that is shown first: accuracy, or of a number the variance explained; see `HEADLINES`."""
        return (self.r2 or 0.0) if self.accuracy is None else self.accuracy

    def to_report(self) -> dict[str, Any]:
        """Plain values; those of a number only where it is one."""
        told = asdict(self)
        second = told.pop("second")
        if second is not None:
            return {"accuracy": self.accuracy, "macro_f1": None, "loss": self.loss, second[0]: second[1]}
        return told if self.accuracy is None else {name: told[name] for name in ("accuracy", "macro_f1", "loss")}


def score(answers: NDArray[np.floating], targets: Targets, target: tuple[float, float] | None = None) -> Scores:
    """Judge answers [n, c] against the truth.

    Args:
        answers: of a head, each from 0 to 1.
        targets: the truth, [n] or [n, c].
        target: public range of a number.
    """
    found = np.asarray(answers, dtype=np.float64)
    if form_of(targets) == "classification":
        return _of_classes(found, classes_of(targets))
    loss = float(OBJECTIVES["multilabel"].losses(found, targets).mean())
    if targets.ndim == 2:
        return _of_labels(found >= THRESHOLD, targets > THRESHOLD, loss)
    low, high = target or (0.0, 1.0)
    return _of_a_number(found[:, 0] - targets, targets, loss, unit=high - low)


def _of_labels(said: NDArray[np.bool_], there: NDArray[np.bool_], loss: float) -> Scores:
    hits = (said & there).sum(axis=0)
    named = said.sum(axis=0) + there.sum(axis=0)
    each = np.divide(2 * hits, named, out=np.zeros(len(hits)), where=named > 0)
    return Scores(accuracy=float((said == there).mean()), macro_f1=float(each.mean()), loss=loss)


def _of_a_number(off: NDArray[np.float64], targets: Targets, loss: float, *, unit: float) -> Scores:
    spread = float(np.square(targets - targets.mean()).sum())
    return Scores(
        accuracy=None,
        macro_f1=None,
        loss=loss,
        mae=unit * float(np.abs(off).mean()),
        rmse=unit * float(np.sqrt(np.square(off).mean())),
        r2=1 - float(np.square(off).sum()) / spread if spread else 0.0,
    )


def _of_classes(probabilities: NDArray[np.float64], labels: NDArray[np.int64]) -> Scores:
    classes = np.arange(probabilities.shape[1])
    guess = probabilities.argmax(axis=1)
    clipped = np.clip(probabilities, 1e-15, 1.0)
    clipped /= clipped.sum(axis=1, keepdims=True)
    return Scores(
        accuracy=float(accuracy_score(labels, guess)),
        macro_f1=float(f1_score(labels, guess, average="macro", labels=classes, zero_division=0)),
        loss=float(log_loss(labels, clipped, labels=classes)),
    )


def score_outcomes(outcomes: NDArray[np.float64], task: Task) -> Scores:
    """Judge answers with a structure; every record counts the same, however many words or objects it has.

    Args:
        outcomes: as `veil.common.tunable` gives them, [n, m].
        task: what was asked.
    """
    loss = float(outcomes[:, -1].mean())
    if task.form != "tokens":
        name, unit = SECOND[task.form]
        first, second = outcomes[:, :2].mean(axis=0)
        return Scores(accuracy=float(first), macro_f1=None, loss=loss, second=(name, unit * float(second)))
    found = outcomes[:, :-1].sum(axis=0).reshape(len(task.labels), -1)
    named = found.sum(axis=0) + found.sum(axis=1)
    each = np.divide(2 * np.diag(found), named, out=np.zeros(len(found)), where=named > 0)
    whole = float(found.sum())
    return Scores(accuracy=float(np.trace(found)) / whole if whole else 0.0, macro_f1=float(each.mean()), loss=loss)


def score_adapter(
    adapter: Adapter, features: NDArray[np.floating], targets: Targets, target: tuple[float, float] | None = None
) -> Scores:
    """Judge an adapter on records it was not trained on; `target` is the public range of a number."""
    return score(predict(adapter, features, form_of(targets)), targets, target)


def mean_scores(scores: list[Scores]) -> Scores:
    """The mean of several models' scores."""

    def mean(name: str) -> float | None:
        values = [getattr(one, name) for one in scores]
        return None if None in values else float(np.mean(values))

    return Scores(
        accuracy=mean("accuracy"),
        macro_f1=mean("macro_f1"),
        loss=float(np.mean([s.loss for s in scores])),
        mae=mean("mae"),
        rmse=mean("rmse"),
        r2=mean("r2"),
        second=_mean_second(scores),
    )


def _mean_second(scores: list[Scores]) -> tuple[str, float] | None:
    found = [one.second for one in scores if one.second is not None]
    return (found[0][0], float(np.mean([value for _, value in found]))) if found else None


def non_private(
    features: NDArray[np.floating],
    targets: Targets,
    test_features: NDArray[np.floating],
    test_targets: Targets,
    classes: int,
    target: tuple[float, float] | None = None,
) -> Scores:
    """The ceiling: scikit-learn's logistic regression (for a number ridge regression) on all training records in one
    place, without privacy.

    Args:
        features: [n, d].
        targets: their truth.
        test_features: [m, d].
        test_targets: likewise.
        classes: how many labels there are.
        target: public range of a number.
    """
    rows, asked = unit_rows(features), unit_rows(test_features)
    if form_of(targets) == "classification":
        return score(_chances(rows, classes_of(targets), asked, classes), test_targets)
    if targets.ndim == 2:
        each = [_chances(rows, one.astype(np.int64), asked, 2)[:, 1] for one in targets.T]
        return score(np.stack(each, axis=1), test_targets)
    told = Ridge(alpha=1 / PENALTY).fit(rows, targets).predict(asked)
    return score(np.clip(told, 0.0, 1.0)[:, None], test_targets, target)


def _chances(
    rows: NDArray[np.float64], labels: NDArray[np.int64], asked: NDArray[np.float64], classes: int
) -> NDArray[np.float64]:
    """Probability of each class of the rows that are asked about, [m, classes]."""
    present = np.unique(labels)
    probabilities = np.zeros((len(asked), classes))
    if len(present) == 1:
        probabilities[:, present[0]] = 1.0
        return probabilities
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = LogisticRegression(C=PENALTY, max_iter=2000).fit(rows, labels)
    probabilities[:, model.classes_] = model.predict_proba(asked)
    return probabilities
