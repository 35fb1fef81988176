# SPDX-License-Identifier: Apache-2.0
"""`veil predict` and `veil export` on numeric records: a table in, a label a row out, clear answers to what it cannot
read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from veil.common.head import HEAD_FILE
from veil.common.update import Adapter

Veil = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the first test that needs a finished run leaves it for the others."""
    return tmp_path_factory.mktemp("finished") / "run"


@pytest.fixture
def model(veil: Veil, write_plan: Callable[..., Path], tmp_path: Path, finished: Path) -> Path:
    if not finished.exists():
        plan = write_plan(simulation={"baselines": []})
        assert veil("simulate", plan, "--output", finished)[0] == 0
    shutil.copytree(finished, tmp_path / "out")
    return tmp_path / "out" / "model"


def test_a_table_of_numbers(veil: Veil, model: Path, tmp_path: Path) -> None:
    pd.DataFrame({"a": [3.0, -3.0], "b": [0.0, 0.0]}).to_csv(tmp_path / "new.csv", index=False)
    code, out, _ = veil("predict", model, tmp_path / "new.csv", "--column", "a", "--column", "b", "--json")
    assert code == 0
    assert [row["label"] for row in json.loads(out)] == ["ill", "well"]


def test_plain_lines_without_json(veil: Veil, model: Path, tmp_path: Path) -> None:
    pd.DataFrame({"a": [3.0], "b": [0.0]}).to_csv(tmp_path / "new.csv", index=False)
    code, out, _ = veil("predict", model, tmp_path / "new.csv", "--column", "a", "--column", "b")
    label, probability, name = out.split("\t")
    assert code == 0 and (label, name) == ("ill", "1\n") and 0.5 < float(probability) <= 1


def test_the_csv_says_what_json_says(veil: Veil, model: Path, tmp_path: Path) -> None:
    table, output = tmp_path / "new.csv", tmp_path / "answers.csv"
    pd.DataFrame({"a": [3.0, -3.0], "b": [0.0, 0.0]}).to_csv(table, index=False)
    words = ("predict", model, table, "--column", "a", "--column", "b", "--output", output)
    code, out, _ = veil(*words, "--json")
    assert code == 0
    written, told = pd.read_csv(output, dtype={"input": str}), json.loads(out)
    assert list(written.columns) == ["input", "label", "probability of well", "probability of ill"]
    assert list(written["input"]) == [one["input"] for one in told] == ["1", "2"]
    assert list(written["probability of ill"]) == [one["probabilities"]["ill"] for one in told]
    assert veil(*words)[0] == 2, "it is not written over"


def test_a_value_that_is_no_number_is_named(veil: Veil, model: Path, tmp_path: Path) -> None:
    (tmp_path / "new.csv").write_text("a,b\n1,2\n3,much\n")
    code, _, err = veil("predict", model, tmp_path / "new.csv", "--column", "a", "--column", "b")
    assert code == 2 and "row 2 of column b" in err


def test_a_table_without_named_columns_is_told_to_name_them(veil: Veil, model: Path, tmp_path: Path) -> None:
    (tmp_path / "new.csv").write_text("a,b\n1,2\n")
    code, _, err = veil("predict", model, tmp_path / "new.csv")
    assert code == 2 and "without --column" in err and "a, b" in err


def test_an_export_is_written_once_and_tells_its_cost(veil: Veil, model: Path, tmp_path: Path) -> None:
    output = tmp_path / "exported"
    code, out, _ = veil("export", model, "--to", "onnx", "--output", output)
    assert code == 0 and out.endswith("README.md, head.onnx, usage.py\n"), "numeric columns: the whole model"
    card = (output / "README.md").read_text(encoding="utf-8")
    assert "computed anew: valid" in card and "SIMULATION" in card and "Bern" in card
    before = {path: path.read_bytes() for path in output.iterdir()}
    code, _, err = veil("export", model, "--to", "safetensors", "--output", output)
    assert code == 2 and "exists" in err
    assert {path: path.read_bytes() for path in output.iterdir()} == before


def test_an_export_that_cannot_be_leaves_nothing(veil: Veil, model: Path, tmp_path: Path) -> None:
    code, _, err = veil("export", model, "--to", "hf", "--output", tmp_path / "exported")
    assert code == 2 and "--to onnx" in err
    assert not [path for path in tmp_path.iterdir() if "exported" in path.name]


def test_an_export_in_json(veil: Veil, model: Path, tmp_path: Path) -> None:
    code, out, _ = veil("export", model, "--to", "safetensors", "--output", tmp_path / "exported", "--json")
    assert code == 0
    document = json.loads(out)
    assert (document["files"], document["missing"]) == (["README.md", "adapter.safetensors", "usage.py"], None)


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


def test_an_export_believes_no_certificate_of_another_model(veil: Veil, model: Path, tmp_path: Path) -> None:
    file = model / HEAD_FILE
    tensors = {name: one + 1 for name, one in Adapter.from_bytes(file.read_bytes()).tensors.items()}
    file.write_bytes(Adapter(tensors=tensors).to_bytes())
    words = ("export", model, "--to", "onnx", "--output", tmp_path / "exported")
    assert veil(*words)[0] == 2, "the report's columns are not believed either, and the plan has bounds"
    assert veil(*words, "--column", "a", "--column", "b")[0] == 0
    card = (tmp_path / "exported" / "README.md").read_text(encoding="utf-8")
    assert "Bern" not in card and "What was spent is not known" in card
