# SPDX-License-Identifier: Apache-2.0
"""What `veil predict` is asked about is read or refused by name, and every record has a name of its own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from veil.common.errors import InputError
from veil.common.plan_sections import Task
from veil.simulations.inputs import read_inputs

TEXT = Task(kind="text-classification", labels=("no", "yes"))
IMAGE = Task(kind="image-classification", labels=("no", "yes"))
SOUND = Task(kind="audio-classification", labels=("no", "yes"))
TABLE = Task(kind="tabular-classification", labels=("no", "yes"), bounds={"a": (0, 10)})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("b.PNG", "a.jpg", "c.wav", "d.Wav", "notes.txt", ".hidden.png"):
        (tmp_path / name).touch()
    (tmp_path / "e.png").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("task", "names", "others"),
    [(IMAGE, ("a.jpg", "b.PNG"), 3), (SOUND, ("c.wav", "d.Wav"), 3)],
    ids=["image", "sound"],
)
def test_a_folder_gives_its_files_of_the_kind_sorted(folder: Path, task: Task, names: tuple[str], others: int) -> None:
    found = read_inputs(str(folder), task, [])
    assert (found.names, found.passed_over) == (names, others)
    assert found.records == tuple(folder / name for name in names)


def test_a_folder_without_any_says_what_is_looked_for(tmp_path: Path) -> None:
    (tmp_path / "scan.heic").touch()
    with pytest.raises(InputError, match=r"holds 1 files and none.*\*\.png"):
        read_inputs(str(tmp_path), IMAGE, [])


@pytest.mark.parametrize(("task", "name"), [(IMAGE, "a.jpg"), (SOUND, "c.wav")], ids=["image", "sound"])
def test_one_file(folder: Path, task: Task, name: str) -> None:
    found = read_inputs(str(folder / name), task, [])
    assert (found.names, found.records) == ((name,), (folder / name,))
    with pytest.raises(InputError, match="missing is not there"):
        read_inputs(str(folder / "missing"), task, [])


@pytest.mark.parametrize("text", ["pain", "a rash. " * 1000, "a\0b", "/" + "x" * 300])
def test_a_text_is_its_own_name(text: str) -> None:
    found = read_inputs(text, TEXT, [])
    assert (found.names, found.records) == ((text,), (text,))


@pytest.mark.parametrize("name", ["", "c.wav"])
def test_a_folder_or_another_file_is_not_taken_for_a_text(folder: Path, name: str) -> None:
    with pytest.raises(InputError, match=r"is a folder, or a file of another kind.*\.txt"):
        read_inputs(str(folder / name), TEXT, [])


def test_a_text_a_line_with_the_line_s_number(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("pain\n\n  \nno event\n")
    found = read_inputs(str(tmp_path / "notes.txt"), TEXT, [])
    assert (found.names, found.records) == (("1", "4"), ("pain", "no event"))


@pytest.mark.parametrize(("content", "told"), [(b"\xff\xfe\x00", "not UTF-8"), (b"\n \n", "is empty")])
def test_a_file_of_texts_that_cannot_be_read(tmp_path: Path, content: bytes, told: str) -> None:
    (tmp_path / "notes.txt").write_bytes(content)
    with pytest.raises(InputError, match=rf"notes\.txt.*{told}"):
        read_inputs(str(tmp_path / "notes.txt"), TEXT, [])


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_a_table_of_texts(tmp_path: Path, ending: str) -> None:
    table = tmp_path / f"t.{ending}"
    frame = pd.DataFrame({"text": ["pain", "no event"], "other": ["x", "y"]})
    frame.to_csv(table, index=False) if ending == "csv" else frame.to_parquet(table)
    assert read_inputs(str(table), TEXT, []).records == ("pain", "no event")
    assert read_inputs(str(table), TEXT, ["other"]).records == ("x", "y")
    assert read_inputs(str(table), TEXT, []).names == ("1", "2")


def test_a_table_of_files_names_each_as_the_table_does(folder: Path) -> None:
    (folder / "t.csv").write_text("path\nb.PNG\na.jpg\n")
    found = read_inputs(str(folder / "t.csv"), IMAGE, [])
    assert (found.names, found.records) == (("b.PNG", "a.jpg"), (folder / "b.PNG", folder / "a.jpg"))


def test_numbers_are_mapped_by_their_bounds(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("b,a\n7,5\n8,99\n")
    found = read_inputs(str(tmp_path / "t.csv"), TABLE, ["a", "b"])
    assert np.array_equal(np.asarray(found.records), [[0, 7], [1, 8]])


@pytest.mark.parametrize(("task", "cells"), [(TEXT, "text,x\npain,1\n,2\n"), (TABLE, "a,x\n1,1\n,2\n")])
def test_a_missing_value_is_named_and_not_answered(tmp_path: Path, task: Task, cells: str) -> None:
    (tmp_path / "t.csv").write_text(cells)
    with pytest.raises(InputError, match=r"t\.csv: row 2 of column (text|a) is 'nan'; 1 such rows"):
        read_inputs(str(tmp_path / "t.csv"), task, [cells.partition(",")[0]])


def test_a_damaged_table_is_named(tmp_path: Path) -> None:
    (tmp_path / "t.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputError, match=r"t\.parquet"):
        read_inputs(str(tmp_path / "t.parquet"), TEXT, [])


def test_a_text_that_is_named_like_a_picture_is_no_text() -> None:
    for name in ("photo.png", "scans/a.JPG", "cough.wav"):
        with pytest.raises(InputError, match="a picture or sound"):
            read_inputs(name, TEXT, ())
    assert read_inputs("see photo.png", TEXT, ()).names == ("see photo.png",)
