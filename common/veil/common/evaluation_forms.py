# SPDX-License-Identifier: Apache-2.0
"""What an evaluation releases and says, by form of task: one door for those who schedule, draw, check and report it.

Promises that coordinator and site, each from the plan alone, agree on the size of the vector and on its bound.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from veil.common.evaluation import evaluation_norm, loss_cap, outcome_rows, quality, released_size
from veil.common.label_quality import label_rows, labels_norm, labels_quality, labels_size
from veil.common.number_quality import NUMBER_NORM, NUMBER_SIZE, number_quality, number_rows
from veil.common.objective import Targets, classes_of, form_of
from veil.common.plan_sections import STRUCTURED, Form, Task
from veil.common.structured_quality import (
    SHARES_NORM,
    SHARES_SIZE,
    WORDS_NORM,
    share_quality,
    share_rows,
    word_quality,
    word_rows,
    words_size,
)


def vector_size(form: Form, labels: int, groups: int = 0) -> int:
    """How many numbers an evaluation releases."""
    if form == "multilabel":
        return labels_size(labels)
    if form in STRUCTURED:
        return words_size(labels) if form == "tokens" else SHARES_SIZE
    return NUMBER_SIZE if form == "regression" else released_size(labels, groups)


def vector_norm(form: Form, labels: int, groups: int = 0) -> float:
    """L2 bound of one unit's vector."""
    if form == "multilabel":
        return labels_norm(labels)
    if form in STRUCTURED:
        return WORDS_NORM if form == "tokens" else SHARES_NORM
    return NUMBER_NORM if form == "regression" else evaluation_norm(groups)


def vector_rows(answers: NDArray[np.float64], targets: Targets) -> NDArray[np.float64]:
    """Each record's vector without groups, no longer than `vector_norm`.

    Args:
        answers: the model's, [n, c].
        targets: the truth, of the same form.
    """
    if form_of(targets) == "classification":
        return outcome_rows(answers, classes_of(targets))
    rows = label_rows if targets.ndim == 2 else number_rows
    return rows(answers, np.asarray(targets, dtype=np.float64))


def outcome_vectors(outcomes: NDArray[np.float64], form: Form, labels: int) -> NDArray[np.float64]:
    """The same of answers with a structure, from what `veil.common.task_heads` finds of each record, [n, m]."""
    return word_rows(outcomes, labels) if form == "tokens" else share_rows(outcomes)


def figures(sums: NDArray[np.float64], deviation: float, task: Task) -> dict[str, Any]:
    """What released sums say, as a report holds it.

    Args:
        sums: the released numbers without groups, added over sites.
        deviation: standard deviation of their noise, each number's.
        task: what was asked.
    """
    if task.form == "multilabel":
        return labels_quality(sums, deviation, task.labels).to_report()
    if task.form in STRUCTURED:
        words = task.form == "tokens"
        return word_quality(sums, deviation, task.labels) if words else share_quality(sums, deviation, task.form)
    if task.target is not None:
        return number_quality(sums, deviation, task.target).to_report()
    return {"loss_cap": loss_cap(len(task.labels)), **quality(sums, deviation, task.labels).to_report()}
