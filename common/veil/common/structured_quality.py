# SPDX-License-Identifier: Apache-2.0
"""How good answers with a structure are, as one release: labels of words, answers in a text, texts written, objects.

Promises that one unit's vector is no longer than a public bound, that every record counts the same however many words
or objects it has, and that a figure the noise outweighs is None.
"""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from veil.common.evaluation import EVALUATION_NORM, NoisyCounts, design, loss_cap, quality, released_size, times
from veil.common.plan_sections import Form, Task

WORDS_NORM: Final = EVALUATION_NORM
"""L2 bound of one unit's vector of labelled words."""

COUNT_WEIGHT: Final = 0.5
"""Weight of the number of units beside the two shares."""

SHARES_SIZE: Final = 3
"""How many numbers an evaluation by two shares releases."""

SHARES_NORM: Final = math.sqrt(2 + COUNT_WEIGHT**2)
"""L2 bound of one unit's vector of two shares; the mean of such vectors, of several records, is no longer."""

TOKEN_LOSS_CAP: Final = 10.0
"""The mean loss of a continuation's tokens from which on a record counts no more, nats; a guess among 22 000 tokens."""

SECOND: Final[Mapping[Form, tuple[str, float]]] = {
    "answers": ("token_f1", 1.0),
    "generation": ("token_loss", TOKEN_LOSS_CAP),
    "detection": ("precision", 1.0),
}
"""The second share of a record by form, and its unit; the first is `accuracy`: exact matches, tokens foreseen, objects
found."""

_ARTICLES: Final = re.compile(r"\b(a|an|the)\b")
_UNPUNCTUATED: Final = str.maketrans("", "", string.punctuation)


def outcome_size(task: Task) -> int:
    """How many numbers are kept of a record: see `word_outcome`; of two shares, these and the loss."""
    return len(task.labels) ** 2 + 1 if task.form == "tokens" else SHARES_SIZE


def words_size(labels: int) -> int:
    """How many numbers an evaluation of words releases."""
    return released_size(labels)


def word_outcome(said: Sequence[int], truth: Sequence[int], labels: int, loss: float) -> NDArray[np.float64]:
    """One record: which part of its words is of class i and was taken for j, and its loss, [labels² + 1].

    Args:
        said: the model's labels of its words.
        truth: as many.
        labels: how many there are.
        loss: nats, the mean over its words.
    """
    found = np.zeros((labels, labels))
    np.add.at(found, (np.array(truth, dtype=np.int64), np.array(said, dtype=np.int64)), 1 / max(1, len(truth)))
    return np.append(found, loss)


def word_rows(outcomes: NDArray[np.float64], labels: int) -> NDArray[np.float64]:
    """Each record's vector, [n, `words_size`], of length at most `WORDS_NORM`: as of a class whose answers are right or
    wrong in parts."""
    found = outcomes[:, :-1].reshape(-1, labels, labels)
    right = np.einsum("nii->ni", found)
    lost = np.clip(np.nan_to_num(outcomes[:, -1:] / loss_cap(labels), nan=1.0), 0.0, 1.0)
    counted = np.hstack([right, found.sum(axis=2) - right, lost])
    return np.asarray(counted @ design(labels).T, dtype=np.float64)


def share_rows(outcomes: NDArray[np.float64]) -> NDArray[np.float64]:
    """Each record's vector, [n, `SHARES_SIZE`], of length at most `SHARES_NORM`: a half, and its two shares.

    Args:
        outcomes: two shares, from 0 to 1, and a loss, [n, 3].
    """
    shares = np.clip(np.nan_to_num(outcomes[:, :2], nan=1.0), 0.0, 1.0)
    return np.hstack([np.full((len(outcomes), 1), COUNT_WEIGHT), shares])


def word_quality(sums: NDArray[np.float64], deviation: float, labels: Sequence[str]) -> dict[str, Any]:
    """What released sums of `word_rows` say; accuracy is the mean over records of the share of words that are right."""
    return {"loss_cap": loss_cap(len(labels)), **quality(sums, deviation, labels).to_report()}


def share_quality(sums: NDArray[np.float64], deviation: float, form: Form) -> dict[str, Any]:
    """What released sums of `share_rows` say.

    Args:
        sums: added over sites, [3].
        deviation: standard deviation of their noise, each number's.
        form: of the task.
    """
    scale = np.array([COUNT_WEIGHT, 1.0, 1.0])
    sought = NoisyCounts(counted=sums / scale, covariance=np.diag((deviation / scale) ** 2))
    units, first, second = np.eye(SHARES_SIZE)
    name, unit = SECOND[form]
    return {
        "count": asdict(sought.number(units)),
        "accuracy": asdict(sought.share(first, units)),
        name: asdict(times(sought.share(second, units), unit)),
    }


def normalised(answer: str) -> list[str]:
    """An answer's words without case, articles and punctuation (Rajpurkar et al. 2016)."""
    return _ARTICLES.sub(" ", answer.lower().translate(_UNPUNCTUATED)).split()


def answer_shares(said: str, truth: str) -> tuple[float, float]:
    """Whether an answer is the true one, 1 or 0, and the F1 score of its words."""
    ours, theirs = normalised(said), normalised(truth)
    common = sum((Counter(ours) & Counter(theirs)).values())
    f1 = 2 * common / (len(ours) + len(theirs)) if common else float(ours == theirs)
    return float(ours == theirs), f1
