# SPDX-License-Identifier: Apache-2.0
"""`veil predict` on numeric records: a table in, a label a row out, clear answers to what it cannot read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

Veil = Callable[..., tuple[int, str, str]]


@pytest.fixture
def model(veil: Veil, write_plan: Callable[..., Path], tmp_path: Path) -> Path:
    plan = write_plan(simulation={"baselines": []})
    assert veil("simulate", plan, "--output", tmp_path / "out")[0] == 0
    return tmp_path / "out" / "model"


def test_a_table_of_numbers(veil: Veil, model: Path, tmp_path: Path) -> None:
    pd.DataFrame({"a": [3.0, -3.0], "b": [0.0, 0.0]}).to_csv(tmp_path / "new.csv", index=False)
    code, out, _ = veil("predict", model, tmp_path / "new.csv", "--column", "a", "--column", "b", "--json")
    assert code == 0
    assert [row["label"] for row in json.loads(out)] == ["ill", "well"]


def test_plain_lines_without_json(veil: Veil, model: Path, tmp_path: Path) -> None:
    pd.DataFrame({"a": [3.0], "b": [0.0]}).to_csv(tmp_path / "new.csv", index=False)
    code, out, _ = veil("predict", model, tmp_path / "new.csv", "--column", "a", "--column", "b")
    label, probability = out.split()
    assert code == 0 and label == "ill" and 0.5 < float(probability) <= 1


@pytest.mark.parametrize("source", ["a text", "missing.csv"])
def test_input_it_cannot_read(veil: Veil, model: Path, source: str) -> None:
    code, _, err = veil("predict", model, source)
    assert code == 2 and "Remedy" in err


def test_a_missing_column_is_named(veil: Veil, model: Path, tmp_path: Path) -> None:
    pd.DataFrame({"a": [3.0]}).to_csv(tmp_path / "new.csv", index=False)
    code, _, err = veil("predict", model, tmp_path / "new.csv", "--column", "c")
    assert code == 2 and "no column c" in err


def test_a_folder_that_is_no_model(veil: Veil, tmp_path: Path) -> None:
    code, _, err = veil("predict", tmp_path, "a text")
    assert code == 2 and "veil.json" in err
