# SPDX-License-Identifier: Apache-2.0
"""What `veil predict` says: one answer a record, as JSON, as lines, as a table.

Promises that the three say the same, and that each answer stands beside its record's name.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from veil.common.errors import InputError
from veil.common.objective import from_range
from veil.common.plan_sections import Task

THERE = 0.5
"""Probability from which one of several labels is said to be there."""


def document(task: Task, names: Sequence[str], answers: NDArray[np.float64]) -> list[dict[str, Any]]:
    """One object a record: `input` and `probabilities`, with `label`, or `labels` where there can be several; or the
    `value` of a number.

    Args:
        task: the form of its answers.
        names: of n records.
        answers: as `TunedModel.predict` gives them, each from 0 to 1, [n, labels].
    """
    if task.target is not None:
        values = from_range(answers[:, 0], task.target).tolist()
        return [{"input": name, "value": value} for name, value in zip(names, values, strict=True)]
    return [
        {"input": name, **_said(task, row), "probabilities": dict(zip(task.labels, row.tolist(), strict=True))}
        for name, row in zip(names, answers, strict=True)
    ]


def structured(names: Sequence[str], said: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One object a record: `input`, and what `TunedModel.say` says: `labels`, an `answer`, a `text` or `boxes`."""
    return [{"input": name, **one} for name, one in zip(names, said, strict=True)]


def with_anomaly(told: Sequence[dict[str, Any]], scores: NDArray[np.float64]) -> list[dict[str, Any]]:
    """The same objects, each with `anomaly`.

    Args:
        told: of n records.
        scores: as `AnomalyModel.scores` gives them, [n].
    """
    return [{**one, "anomaly": score} for one, score in zip(told, scores.tolist(), strict=True)]


def _said(task: Task, row: NDArray[np.float64]) -> dict[str, Any]:
    if task.form == "classification":
        return {"label": task.labels[int(row.argmax())]}
    return {"labels": [label for label, chance in zip(task.labels, row, strict=True) if chance >= THERE]}


def lines(told: Sequence[dict[str, Any]]) -> Iterator[str]:
    """A line a record: what is said, its probability, its anomaly if it has one, its name, with tabs between."""
    for one in told:
        name = " ".join(one["input"].split())
        name = f"{one['anomaly']:.2f}\t{name}" if "anomaly" in one else name
        if "value" in one:
            yield f"{one['value']:.6g}\t{name}"
            continue
        if "probabilities" not in one:
            yield f"{_plain(one)}\t{name}"
            continue
        said = [one["label"]] if "label" in one else one["labels"]
        chances = ", ".join(f"{one['probabilities'][label]:.4f}" for label in said)
        yield f"{', '.join(said) or '-'}\t{chances or '-'}\t{name}"


def _plain(one: dict[str, Any]) -> str:
    """An answer with a structure on one line."""
    (said,) = (value for key, value in one.items() if key != "input")
    if isinstance(said, str):
        return " ".join(said.split()) or "-"
    return " ".join("-" if label is None else str(label) for label in said) if "labels" in one else json.dumps(said)


def check_new(path: Path) -> None:
    """Look before the model is asked.

    Raises:
        InputError: when the file is there already.
    """
    if path.exists():
        raise InputError(f"--output {path} exists", "a file that is not there yet", "choose another, or remove it")


def write_csv(path: Path, told: Sequence[dict[str, Any]]) -> None:
    """A row a record, with a column for each probability.

    Raises:
        InputError: when the file cannot be written.
    """
    rows = [_row(one) for one in told]
    try:
        with path.open("x", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]) if rows else ["input"])
            writer.writeheader()
            writer.writerows(rows)
    except OSError as error:
        raise InputError(
            f"--output {path} ({error.strerror})", "a file that is not there yet, in a folder that is", "choose another"
        ) from None


def _row(one: dict[str, Any]) -> dict[str, Any]:
    said: dict[str, Any] = {key: one[key] for key in ("input", "label", "value", "anomaly") if key in one}
    if "probabilities" not in one and "value" not in one:
        return {**said, next(key for key in one if key != "input"): _plain(one)}
    if "labels" in one:
        said["labels"] = ", ".join(one["labels"])
    chances = {f"probability of {label}": chance for label, chance in one.get("probabilities", {}).items()}
    return {**said, **chances}
