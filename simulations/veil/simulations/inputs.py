# SPDX-License-Identifier: Apache-2.0
"""What `veil predict` is asked about: a text, an image, a sound, a folder of either, a file of texts, a table.

Promises a name for every record, and an error with a remedy, which names the file, for anything else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from veil.common.errors import InputError
from veil.common.head import scaled
from veil.common.plan_sections import Modality, Task
from veil.common.sound import SUFFIXES as SOUNDS
from veil.common.truths import asked

_TABLES: Final[dict[str, Callable[[Path], pd.DataFrame]]] = {".csv": pd.read_csv, ".parquet": pd.read_parquet}
_IMAGES: Final = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
_FILES: Final[dict[Modality, tuple[str, ...]]] = {"image": _IMAGES, "audio": SOUNDS}
_COLUMN: Final[dict[Modality, str]] = {"text": "text", "image": "path", "audio": "path"}
"""The input column where none is named."""
_QUESTION: Final = "question"
"""The column with the question of answers, before that of the text."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Inputs:
    """Records, and what each is called in an answer.

    Attributes:
        names: the text itself, a file's name, or the number of a line or a row, from 1.
        records: as `TunedModel.predict` takes them.
        passed_over: files of a folder that are of another kind.
    """

    names: tuple[str, ...]
    records: tuple[str, ...] | tuple[Path, ...] | NDArray[np.float64]
    passed_over: int = 0


def read_inputs(source: str, task: Task, columns: Sequence[str]) -> Inputs:
    """Turn the command line's INPUT into what the model reads.

    Raises:
        InputError: for a missing file, column or value, or something a model of this kind cannot read.
    """
    path = Path(source)
    if path.suffix.lower() in _TABLES:
        return _from_table(path, task, columns)
    if task.modality == "tabular":
        raise InputError(f"INPUT {source}", "a .csv or .parquet table", "give a table and its --column names")
    if task.modality in _FILES:
        if path.is_dir():
            return _from_folder(path, task.modality)
        return Inputs(names=(path.name,), records=(_existing(path),))
    if task.form == "answers" and "\n" not in source:
        raise InputError(
            f"INPUT {source[:60]}",
            "a table with a question and its text in each row, or a question, a line's end and the text",
            "give a .csv or .parquet with the columns question and text, or name them with --column, question first",
        )
    if path.suffix.lower() == ".txt":
        return _from_lines(path)
    if source and _is_there(path):
        raise InputError(
            f"INPUT {source} is a folder, or a file of another kind",
            "a text, a .txt with a text a line, or a .csv or .parquet table",
            "save the texts as one of these; a text that is a file's name too goes into a .txt",
        )
    if len(source.split()) == 1 and any(path.suffix.lower() in kinds for kinds in _FILES.values()):
        raise InputError(
            f"INPUT {source}, by its name a picture or sound, for a model of texts",
            "a text, a .txt with a text a line, or a .csv or .parquet table",
            "name what the model reads; a text that looks like a file's name goes into a .txt",
        )
    return Inputs(names=(source,), records=(source,))


def _from_folder(folder: Path, modality: Modality) -> Inputs:
    """Its files of the kind, by name; hidden ones and folders in it are not looked at."""
    files = sorted(one for one in folder.iterdir() if one.is_file() and not one.name.startswith("."))
    wanted = tuple(one for one in files if one.suffix.lower() in _FILES[modality])
    if not wanted:
        raise InputError(
            f"{folder} holds {len(files)} files and none that is known as {modality}",
            f"files named *{', *'.join(_FILES[modality])}",
            "name the folder that holds them; folders in it are not searched",
        )
    return Inputs(names=tuple(one.name for one in wanted), records=wanted, passed_over=len(files) - len(wanted))


def _from_lines(path: Path) -> Inputs:
    try:
        lines = _existing(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise InputError(f"{path}: {reason}", "a readable file, a text a line", "save it as UTF-8") from None
    texts = {str(number): line for number, line in enumerate(lines, 1) if line.strip()}
    if not texts:
        raise InputError(f"{path} is empty", "a text a line", "write texts into it")
    return Inputs(names=tuple(texts), records=tuple(texts.values()))


def _from_table(path: Path, task: Task, columns: Sequence[str]) -> Inputs:
    try:
        frame = _TABLES[path.suffix.lower()](_existing(path))
    except (ValueError, OSError) as error:
        raise InputError(f"{path} ({error})", "a readable table", "check the file") from None
    wanted = list(columns) or [*([_QUESTION] if task.form == "answers" else []), _COLUMN.get(task.modality, "")]
    missing = [name for name in wanted if name not in frame.columns]
    if missing:
        raise InputError(
            f"{path} has no column {missing[0]}" if missing[0] else f"{path} without --column",
            f"one of {', '.join(map(str, frame.columns))}",
            "name the input column with --column; numeric ones each, in the order they were trained in",
        )
    rows = tuple(str(number) for number in range(1, len(frame) + 1))
    if task.modality == "tabular":
        numbers = [scaled(_numbers(frame[name], path), task.bounds.get(name)) for name in wanted]
        return Inputs(names=rows, records=np.stack(numbers, axis=1))
    values = _texts(frame[wanted[-1]], path)
    if task.form == "answers":
        questions = _texts(frame[wanted[0]], path)
        return Inputs(names=questions, records=tuple(asked(*both) for both in zip(questions, values, strict=True)))
    if task.modality == "text":
        return Inputs(names=rows, records=values)
    return Inputs(names=values, records=tuple(_existing(path.parent / value) for value in values))


def _numbers(column: pd.Series, path: Path) -> NDArray[np.float64]:
    """A column's numbers: one that is missing would be answered like no record at all."""
    numbers = pd.to_numeric(column, errors="coerce").to_numpy(np.float64)
    _refuse(~np.isfinite(numbers), column, path, "a number")
    return numbers


def _texts(column: pd.Series, path: Path) -> tuple[str, ...]:
    _refuse(column.isna().to_numpy(np.bool_), column, path, "a value")
    return tuple(str(value) for value in column)


def _refuse(bad: NDArray[np.bool_], column: pd.Series, path: Path, wanted: str) -> None:
    rows = np.flatnonzero(bad)
    if rows.size:
        found = str(column.iloc[rows[0]])
        raise InputError(
            f"{path}: row {rows[0] + 1} of column {column.name} is {found!r}; {rows.size} such rows",
            f"{wanted} in every row",
            "fill them in or leave the rows out",
        )


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise InputError(f"{path} is not there", "an existing file", "check the path")
    return path


def _is_there(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a text, longer than a name can be or with letters that none can have
        return False
