# SPDX-License-Identifier: Apache-2.0
"""The three ways `veil predict` answers, for every form of task."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from veil.common.errors import InputError
from veil.common.plan_sections import Task
from veil.simulations.answers import check_new, document, lines, write_csv

ONE = Task(kind="text-classification", labels=("no", "yes"))
SEVERAL = Task(kind="text-multilabel", labels=("rash", "pain", "fever"))
NUMBER = Task(kind="text-regression", labels=("days",), target=(10, 30))

ANSWERS = {
    "one": (ONE, [[0.75, 0.25]], ["no\t0.7500\ta b"], [{"input": "a\n b", "label": "no"}]),
    "several": (SEVERAL, [[0.5, 0.25, 0.75]], ["rash, fever\t0.5000, 0.7500\ta b"], [{"labels": "rash, fever"}]),
    "none": (SEVERAL, [[0.1, 0.2, 0.3]], ["-\t-\ta b"], [{"labels": "", "probability of fever": "0.3"}]),
    "number": (NUMBER, [[0.25]], ["15\ta b"], [{"input": "a\n b", "value": "15.0"}]),
}


@pytest.mark.parametrize(("task", "answers", "expected", "rows"), ANSWERS.values(), ids=ANSWERS)
def test_lines_and_table_say_what_the_document_says(
    tmp_path: Path, task: Task, answers: Any, expected: list[str], rows: list[dict[str, str]]
) -> None:
    told = document(task, ["a\n b"], np.array(answers))
    assert list(lines(told)) == expected
    write_csv(tmp_path / "a.csv", told)
    with (tmp_path / "a.csv").open(encoding="utf-8", newline="") as file:
        (found,) = csv.DictReader(file)
    assert rows[0].items() <= found.items()


def test_the_document_has_every_probability() -> None:
    (told,) = document(SEVERAL, ["x"], np.array([[0.5, 0.25, 0.75]]))
    assert told == {
        "input": "x",
        "labels": ["rash", "fever"],
        "probabilities": {"rash": 0.5, "pain": 0.25, "fever": 0.75},
    }


def test_a_file_that_is_there_is_left_as_it_is(tmp_path: Path) -> None:
    taken = tmp_path / "a.csv"
    taken.write_text("mine")
    with pytest.raises(InputError, match="exists"):
        check_new(taken)
    with pytest.raises(InputError, match="not there yet"):
        write_csv(taken, document(ONE, ["x"], np.array([[0.5, 0.5]])))
    assert taken.read_text() == "mine"


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="in a folder that is"):
        write_csv(tmp_path / "none" / "a.csv", [])
