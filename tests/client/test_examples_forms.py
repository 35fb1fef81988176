# SPDX-License-Identifier: Apache-2.0
"""Tests of `veil.client.examples` for several labels and for numbers: what a cell says, and what is refused by row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from veil.client.examples import Examples, read_examples
from veil.common.errors import TableError
from veil.common.plan_sections import Columns, Task
from veil.common.privacy import PrivacyUnit

LABELS = Task(kind="tabular-multilabel", labels=("pain", "fever"))
AGE = Task(kind="tabular-regression", labels=("age",), target=(20.0, 90.0))


def read(path: Path, cells: list[Any], task: Task, **columns: Any) -> Examples:
    frame = pd.DataFrame({"x": np.arange(len(cells)), "said": cells})
    if path.suffix == ".csv":
        frame.to_csv(path, index=False)
    else:
        frame.to_parquet(path, index=False)
    said = Columns.model_validate({"features": ["x"], "label": "said", "form": task.form, **columns})
    return read_examples(path, said, task, unit=PrivacyUnit.RECORD)


@pytest.mark.parametrize("name", ["table.csv", "table.parquet"])
def test_a_cell_names_any_of_the_labels_or_none(name: str, tmp_path: Path) -> None:
    found = read(tmp_path / name, ["pain", "fever|pain", None, " fever | ", "pain|pain"], LABELS).labels
    assert found.dtype == np.float64
    assert found.tolist() == [[1, 0], [1, 1], [0, 0], [0, 1], [1, 0]]


def test_raw_labels_are_mapped_each_for_itself(tmp_path: Path) -> None:
    found = read(tmp_path / "t.csv", ["1|2.0", "2"], LABELS, labels={"1": "pain", "2": "fever"})
    assert found.labels.tolist() == [[1, 1], [0, 1]]


def test_a_label_that_nobody_knows_is_refused_with_its_row(tmp_path: Path) -> None:
    with pytest.raises(TableError, match=r'column "said", row 2 \(and 1 more\): label "rash", "NA"'):
        read(tmp_path / "t.csv", ["pain", "pain|rash", "NA"], LABELS)


def test_numbers_are_parts_of_the_public_range(tmp_path: Path) -> None:
    found = read(tmp_path / "t.csv", [20, 55, "90.0", 200, -5], AGE).labels
    assert found.tolist() == [0.0, 0.5, 1.0, 1.0, 0.0]


@pytest.mark.parametrize("cell", ["", "old", "nan", "inf"])
def test_what_is_no_number_is_refused_with_its_row(cell: str, tmp_path: Path) -> None:
    with pytest.raises(TableError, match=r'column "said", row 2: "\w*" is not a finite number'):
        read(tmp_path / "t.csv", ["30", cell], AGE)


def test_records_are_taken_with_their_labels(tmp_path: Path) -> None:
    taken = read(tmp_path / "t.csv", ["pain", "fever|pain", "fever"], LABELS).take(np.array([2, 0]))
    assert taken.labels.tolist() == [[0, 1], [1, 0]] and len(taken) == 2
