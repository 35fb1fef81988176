# SPDX-License-Identifier: Apache-2.0
"""Tests of `veil.client.examples`: what is read from small tables, and each way a table is refused.

The tables are written to a temporary folder; none comes with the repository.
"""

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

TASK = Task(kind="text-classification", labels=("healthy", "ill"))
RECORD, PATIENT = PrivacyUnit.RECORD, PrivacyUnit.PATIENT


def write(folder: Path, text: str, name: str = "t.csv") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def read(
    table: Path, unit: PrivacyUnit = RECORD, site: str | None = None, task: Task = TASK, **columns: Any
) -> Examples:
    if not columns.keys() & {"text", "text_template", "image", "audio", "features"}:
        columns["text"] = "body"
    return read_examples(table, Columns(label="label", **columns), task, unit=unit, site_column=site)


def refusal(*arguments: Any, **options: Any) -> str:
    with pytest.raises(TableError) as caught:
        read(*arguments, **options)
    assert all((caught.value.value, caught.value.expectation, caught.value.remedy))
    return str(caught.value)


def test_text_labels_units_and_sites(tmp_path: Path) -> None:
    table = write(tmp_path, 'body,label,mrn,where\n"a, ""b""\nc",ill,007,Bern\nNA,healthy,7.0,Ulm\n')
    examples = read(table, PATIENT, "where", patient="mrn")
    assert examples.inputs == ('a, "b"\nc', "NA")
    assert examples.labels.tolist() == [1, 0]
    assert examples.labels.dtype == np.int64
    assert examples.units.tolist() == ["007", "7"]
    assert examples.sites is not None
    assert examples.sites.tolist() == ["Bern", "Ulm"]
    assert len(examples) == 2


def test_cells_of_a_csv_stay_as_they_are_written_whatever_the_header(tmp_path: Path) -> None:
    assert read(write(tmp_path, "1,label\n007,ill\n1e3,ill\n"), text="1").inputs == ("007", "1e3")


def test_the_record_unit_is_the_row_counted_from_one_and_needs_no_patient(tmp_path: Path) -> None:
    examples = read(write(tmp_path, "body,label\na,ill\nb,ill\n"))
    assert examples.units.tolist() == ["1", "2"]
    assert examples.sites is None
    assert examples.patients is None


def test_the_record_unit_keeps_the_patients_of_a_named_column(tmp_path: Path) -> None:
    examples = read(write(tmp_path, "body,label,mrn\na,ill,p\nb,ill,p\n"), patient="mrn")
    assert examples.units.tolist() == ["1", "2"]
    assert examples.patients is not None
    assert examples.patients.tolist() == ["p", "p"]


@pytest.mark.parametrize("raw", [[0, 1, 4], [0.0, 1.0, 4.0], ["0", "1.0", "4"]])
@pytest.mark.parametrize("kind", ["csv", "tsv", "parquet"])
def test_labels_are_found_however_they_are_written(tmp_path: Path, raw: list[object], kind: str) -> None:
    table = tmp_path / f"t.{kind}"
    frame = pd.DataFrame({"body": ["a", "b", "c"], "label": raw, "unused": [[1], [2], [3]]})
    if kind == "parquet":
        frame.to_parquet(table)
    else:
        frame.to_csv(table, sep="\t" if kind == "tsv" else ",", index=False)
    examples = read(table, labels={"0": "healthy", "1": "ill", "4": "ill"})
    assert examples.labels.tolist() == [0, 1, 1]
    assert examples.inputs == ("a", "b", "c")


def test_truth_values_and_the_word_none_can_be_labels(tmp_path: Path) -> None:
    table = write(tmp_path, "body,label\na,TRUE\nb,None\n")
    assert read(table, labels={"true": "ill", "None": "healthy"}).labels.tolist() == [1, 0]


def test_a_template_is_rendered(tmp_path: Path) -> None:
    table = write(tmp_path, "age,sex,label\n63,1,ill\n,0,healthy\n")
    examples = read(table, text_template="{age:.0f} years, {sex}", values={"sex": {"1": "man", "0": "woman"}})
    assert examples.inputs == ("63 years, man", "woman")


@pytest.mark.parametrize(("kind", "name"), [("image", "x.png"), ("audio", "x.WAV")])
def test_paths_are_relative_to_the_table_and_no_file_is_opened(tmp_path: Path, kind: str, name: str) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    (folder / name).write_bytes(b"neither an image nor a sound")
    columns: dict[str, Any] = {kind: "path"}
    examples = read(write(tmp_path, f"path,label\nfiles/{name},ill\n"), **columns)
    assert examples.inputs == (folder / name,)


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_features_with_bounds_are_clamped_and_mapped(tmp_path: Path, kind: str) -> None:
    frame = pd.DataFrame({"age": [0, 50, 75, 400], "raw": [1.5, -2, 3, 4], "label": ["ill"] * 4})
    table = tmp_path / f"t.{kind}"
    if kind == "csv":
        frame.to_csv(table, index=False)
    else:
        frame.to_parquet(table)
    task = Task(kind="tabular-classification", labels=TASK.labels, bounds={"age": (0, 100)})
    inputs = read(table, task=task, features=("raw", "age")).inputs
    assert isinstance(inputs, np.ndarray)
    assert inputs.dtype == np.float64
    assert inputs.tolist() == [[1.5, -1.0], [-2.0, 0.0], [3.0, 0.5], [4.0, 1.0]]


def test_parquet_categories_and_decimals_are_read(tmp_path: Path) -> None:
    frame = pd.DataFrame({"body": ["a", "b"], "x": [1, 2], "label": ["ill", "healthy"]})
    table = tmp_path / "t.parquet"
    frame.astype({"body": "category", "x": "category", "label": "category"}).to_parquet(table)
    assert read(table).inputs == ("a", "b")
    inputs = read(table, features=("x",)).inputs
    assert isinstance(inputs, np.ndarray)
    assert inputs.tolist() == [[1.0], [2.0]]


def test_take_keeps_the_order_asked_for(tmp_path: Path) -> None:
    table = write(tmp_path, "body,x,label,w\na,1,ill,p\nb,2,healthy,q\nc,3,ill,r\n")
    chosen = read(table, site="w").take(np.array([2, 0]))
    assert (chosen.inputs, chosen.labels.tolist(), chosen.units.tolist()) == (("c", "a"), [1, 1], ["3", "1"])
    assert chosen.sites is not None
    assert chosen.sites.tolist() == ["r", "p"]
    numbers = read(table, features=("x",)).take(np.array([1])).inputs
    assert isinstance(numbers, np.ndarray)
    assert numbers.tolist() == [[2.0]]
    assert len(read(table).take(np.array([], dtype=np.int64))) == 0


def test_parts_of_different_lengths_are_not_examples() -> None:
    with pytest.raises(ValueError, match="lengths"):
        Examples(inputs=("a",), labels=np.array([0, 1]), units=np.array(["1", "2"]))


def test_refused_file_missing(tmp_path: Path) -> None:
    assert "gone.csv: no such file" in refusal(tmp_path / "gone.csv")
    folder = tmp_path / "folder.csv"
    folder.mkdir()
    assert "no such file" in refusal(folder)


@pytest.mark.parametrize("name", ["t.xlsx", "t", "t.csv.gz"])
def test_refused_other_kind_of_file(tmp_path: Path, name: str) -> None:
    assert "one of .csv, .tsv, .parquet" in refusal(write(tmp_path, "body,label\na,ill\n", name))


def test_refused_damaged_file(tmp_path: Path) -> None:
    assert "Expected 2 fields in line 3, saw 3" in refusal(write(tmp_path, "body,label\na,ill\nb,c,ill\n"))
    assert "Expected: Parquet" in refusal(write(tmp_path, "body,label\na,ill\n", "t.parquet"))
    (tmp_path / "latin.csv").write_bytes("body,label\nMüller,ill\n".encode("latin-1"))
    assert "utf-8" in refusal(tmp_path / "latin.csv")


@pytest.mark.parametrize("text", ["", "body,label\n"])
def test_refused_empty_table(tmp_path: Path, text: str) -> None:
    assert "no records" in refusal(write(tmp_path, text))


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_refused_missing_column(tmp_path: Path, kind: str) -> None:
    table = tmp_path / f"t.{kind}"
    frame = pd.DataFrame({"Boddy": ["a"], "label": ["ill"]})
    frame.to_csv(table, index=False) if kind == "csv" else frame.to_parquet(table)
    message = refusal(table)
    assert 'no column "body"' in message
    assert '"Boddy", "label"' in message
    assert 'did you mean "Boddy"?' in message


def test_refused_column_that_the_header_has_twice(tmp_path: Path) -> None:
    assert 'column "body" 2 times' in refusal(write(tmp_path, "body,label,body\na,ill,b\n"))


def test_refused_unknown_labels_up_to_three_of_them(tmp_path: Path) -> None:
    table = write(tmp_path, "body,label\na,ill\nb,sick\nc,sick\nd,dead\ne,lost\nf,moved\n")
    message = refusal(table)
    assert 'column "label", row 2 (and 4 more): label "sick", "dead", "lost".' in message
    assert "moved" not in message
    assert "['healthy', 'ill']" in message


def test_refused_plan_label_that_is_no_raw_label(tmp_path: Path) -> None:
    message = refusal(write(tmp_path, "body,label\na,ill\n"), labels={"1": "ill"})
    assert "label \"ill\". Expected: one of ['1']" in message


def test_refused_mapping_to_an_unknown_or_to_two_classes(tmp_path: Path) -> None:
    table = write(tmp_path, "body,label\na,1\n")
    assert 'labels."1" = "sick"' in refusal(table, labels={"1": "sick"})
    assert 'labels."1.0" = "healthy" and elsewhere "ill"' in refusal(table, labels={"1": "ill", "1.0": "healthy"})


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_refused_missing_label_patient_site_and_text(tmp_path: Path, kind: str) -> None:
    full: dict[str, list[str | None]] = {
        "body": ["a", "b"],
        "label": ["ill"] * 2,
        "mrn": ["1", "2"],
        "w": ["p", "q"],
    }
    for column, role in {"body": "text", "label": "label", "mrn": "patient id", "w": "site"}.items():
        frame = pd.DataFrame(full | {column: [full[column][0], None]})
        table = tmp_path / f"t.{kind}"
        frame.to_csv(table, index=False) if kind == "csv" else frame.to_parquet(table)
        assert f'column "{column}", row 2: no {role}.' in refusal(table, PATIENT, "w", patient="mrn")


def test_refused_text_of_blanks_only(tmp_path: Path) -> None:
    assert 'column "body", row 1 (and 1 more): no text' in refusal(write(tmp_path, 'body,label\n" ",ill\n"",ill\n'))


@pytest.mark.parametrize(("kind", "end"), [("image", "png"), ("audio", "wav")])
def test_refused_file_that_is_not_there(tmp_path: Path, kind: str, end: str) -> None:
    (tmp_path / f"a.{end}").touch()
    message = refusal(write(tmp_path, f"path,label\na.{end},ill\nb/c.{end},ill\n"), **{kind: "path"})
    assert f'column "path", row 2: no file {tmp_path / "b" / f"c.{end}"}' in message


@pytest.mark.parametrize("name", ["a.flac", "a.ogg", "a.mp3", "a"])
def test_refused_sound_that_is_no_wav_file(tmp_path: Path, name: str) -> None:
    for one in ("a.wav", name):
        (tmp_path / one).touch()
    message = refusal(write(tmp_path, f"path,label\na.wav,ill\n{name},ill\n"), audio="path")
    assert f'column "path", row 2: {name}' in message
    assert "WAV" in message and "ffmpeg" in message


@pytest.mark.parametrize("bad", ["", "high", "inf", "NaN"])
def test_refused_feature_that_is_not_a_finite_number(tmp_path: Path, bad: str) -> None:
    table = write(tmp_path, f"x,y,label\n1,2,ill\n3,{bad},ill\n5,{bad},ill\n")
    assert f'column "y", row 2 (and 1 more): "{bad}" is not a finite number' in refusal(table, features=("x", "y"))


def test_refused_bounds_of_a_column_that_is_no_feature(tmp_path: Path) -> None:
    table = write(tmp_path, "x,age,body,label\n1,2,a,ill\n")
    task = Task(kind="tabular-classification", labels=TASK.labels, bounds={"age": (0, 100)})
    assert 'task.bounds names "age"' in refusal(table, task=task, features=("x",))
    assert 'task.bounds names "age"' in refusal(table, task=task)


def test_refused_label_as_input_and_no_input(tmp_path: Path) -> None:
    table = write(tmp_path, "x,label\n1,ill\n")
    assert 'the label column is "label"' in refusal(table, features=("x", "label"))
    assert 'the label column is "label"' in refusal(table, text_template="{x}, {label}")
    assert "at least one input column" in refusal(table, features=())


def test_refused_patient_unit_without_a_patient_column(tmp_path: Path) -> None:
    assert "no patient column is named" in refusal(write(tmp_path, "body,label\na,ill\n"), PATIENT)
