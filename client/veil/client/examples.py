# SPDX-License-Identifier: Apache-2.0
"""Examples: the records of a table as a model takes them, with their labels, units and sites.

Promises that every record is either read as the columns describe it or refused with its row named; the
messages may quote local values and stay on the owner's screen.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from veil.client.database import Query
from veil.client.template import MISSING_WORDS, Template, canonical, canonical_keys, require_columns
from veil.common import sound
from veil.common.errors import TableError
from veil.common.head import scaled
from veil.common.objective import Targets, in_range
from veil.common.plan_sections import STRUCTURED, Columns, Task
from veil.common.privacy import PrivacyUnit
from veil.common.truths import answer_truth, asked, box_truth, question_and_text, word_truth

if TYPE_CHECKING:
    import pandas as pd

Inputs = tuple[str, ...] | tuple[Path, ...] | npt.NDArray[np.float64]

LABELS_APART = "|"
"""What stands between the labels of a record in one cell."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Examples:
    """n labelled records.

    Attributes:
        inputs: n texts, n paths of images or sounds, or numbers [n, d] (columns with public bounds lie in [-1, 1]); a
            question and its text are one text, see `veil.common.truths.asked`.
        labels: [n], index into the plan's `task.labels`; for several labels [n, c], 1 where a record has one and else
            0; for a number [n], where it lies in its public range, 0 to 1; zeros where a truth has a structure.
        units: [n], the patient id, or for the record unit the row's number as text, counted from 1.
        sites: [n], the site's name, or None when the table has no site column.
        patients: [n], the patient id, or None when the table has no patient column; whatever the unit is, a
            patient is never divided between training and test.
        groups: [n], the group's name, empty where it is not known, or None when the table has no group column.
        truths: n truths with a structure, as `veil.common.truths` made them, or None for tasks of another form.

    Raises:
        ValueError: when the lengths differ.
    """

    inputs: Inputs
    labels: Targets
    units: npt.NDArray[np.str_]
    sites: npt.NDArray[np.str_] | None = None
    patients: npt.NDArray[np.str_] | None = None
    groups: npt.NDArray[np.str_] | None = None
    truths: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        parts = (self.inputs, self.labels, self.units, self.sites, self.patients, self.groups, self.truths)
        lengths = [len(part) for part in parts if part is not None]
        if len(set(lengths)) != 1:
            raise ValueError(f"inputs, labels, units and what stands beside them of lengths {lengths}; they must agree")

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: npt.NDArray[np.int64]) -> Examples:
        """The records at `indices` [m], in that order.

        Raises:
            IndexError: for an index that is not there.
        """
        inputs: Any = self.inputs
        return Examples(
            inputs=inputs[indices] if isinstance(inputs, np.ndarray) else tuple(inputs[i] for i in indices),
            labels=self.labels[indices],
            units=self.units[indices],
            sites=None if self.sites is None else self.sites[indices],
            patients=None if self.patients is None else self.patients[indices],
            groups=None if self.groups is None else self.groups[indices],
            truths=None if self.truths is None else tuple(self.truths[i] for i in indices),
        )


def read_examples(
    table: Path | Query, columns: Columns, task: Task, *, unit: PrivacyUnit, site_column: str | None = None
) -> Examples:
    """Read all records of a CSV, TSV or Parquet table, or of a database.

    Args:
        table: the file, or the query; paths of images and sounds in it are relative to its folder.
        columns: which column holds what.
        task: the classes, and the public bounds of numeric columns.
        unit: whom the promise protects; `PATIENT` needs `columns.patient`.
        site_column: the column with the site's name, when the table pools several.

    Returns:
        The records in the table's order.

    Raises:
        TableError: naming the column, the row (the first record is row 1) and the value that are not as said.
    """
    _check_roles(columns, task, unit)
    template = None if columns.text_template is None else Template.parse(columns)
    needed = named_columns(columns)
    frame = read_table(table, needed if site_column is None else (*needed, site_column))
    folder = table.folder if isinstance(table, Query) else table.parent
    rows = np.arange(1, len(frame) + 1).astype(np.str_)
    patients = None if columns.patient is None else _names(frame, columns.patient, "patient id")
    inputs = template.render(frame) if template else _inputs(frame, columns, task, folder)
    structured = task.form in STRUCTURED
    return Examples(
        inputs=inputs,
        labels=np.zeros(len(frame)) if structured else _labels(frame, columns, task),
        units=rows if patients is None or unit is PrivacyUnit.RECORD else patients,
        sites=None if site_column is None else _names(frame, site_column, "site"),
        patients=patients,
        groups=None if columns.group is None else _groups(frame, columns.group, columns.groups),
        truths=_truths(frame, columns, task, inputs) if structured else None,
    )


def named_columns(columns: Columns) -> tuple[str, ...]:
    """The columns that are read: those of the input, the label's, the patient's and the group's, each once.

    Raises:
        TableError: for a template that cannot be parsed, no input column, or the label among the input's.
    """
    names = (*_input_columns(columns), columns.question, columns.label, columns.patient, columns.group)
    return tuple(dict.fromkeys(name for name in names if name is not None))


def read_table(table: Path | Query, names: Iterable[str]) -> pd.DataFrame:
    """Read the named columns of a table, values raw: text as it stands in a CSV, typed in Parquet and databases.

    Raises:
        TableError: for a file that is missing, of another kind, damaged or empty; for a column that it lacks; for
            a database that does not answer.
    """
    wanted = list(dict.fromkeys(names))
    frame = table.read(wanted) if isinstance(table, Query) else _read_file(table, wanted)
    if frame.empty:
        raise TableError(f"{table}: no records", "at least one row", "check the export of the table")
    return frame


def _read_file(table: Path, wanted: list[str]) -> pd.DataFrame:
    kind = table.suffix.lower()
    read, form = _READERS.get(kind, (None, ""))
    if read is None:
        kinds = ", ".join(_READERS)
        raise TableError(f'{table}: a file of kind "{kind}"', f"one of {kinds}", "export the table as one of these")
    if not table.is_file():
        raise TableError(f"{table}: no such file", f"a table as {form}", "check the path")
    try:
        return read(table, wanted)
    except (OSError, ValueError) as error:  # what pandas and pyarrow raise on a damaged file
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise TableError(f"{table}: {reason}", form, "export the table again") from None


def _read_csv(table: Path, names: list[str], separator: str = ",") -> pd.DataFrame:
    import pandas as pd

    options: dict[str, Any] = {"header": None, "dtype": str, "keep_default_na": False}
    try:
        cells = pd.read_csv(table, sep=separator, encoding="utf-8-sig", **options)
    except pd.errors.EmptyDataError:
        return pd.DataFrame()
    header = [str(name).strip() for name in cells.iloc[0]]
    require_columns(names, header, str(table))
    frame: pd.DataFrame = cells.iloc[1:, [header.index(name) for name in names]].reset_index(drop=True)
    return frame.set_axis(names, axis="columns")


def _read_parquet(table: Path, names: list[str]) -> pd.DataFrame:
    import pyarrow.parquet

    require_columns(names, pyarrow.parquet.read_schema(table).names, str(table))
    cells: pd.DataFrame = pyarrow.parquet.read_table(table, columns=names).to_pandas(ignore_metadata=True)
    return cells[names]


_TEXT_FORM = "UTF-8 text with a header and equally many cells in every row"
_READERS: dict[str, tuple[Callable[[Path, list[str]], pd.DataFrame], str]] = {
    ".csv": (_read_csv, _TEXT_FORM),
    ".tsv": (functools.partial(_read_csv, separator="\t"), _TEXT_FORM),
    ".parquet": (_read_parquet, "Parquet"),
}


def _check_roles(columns: Columns, task: Task, unit: PrivacyUnit) -> None:
    if unit is PrivacyUnit.PATIENT and columns.patient is None:
        raise TableError(
            'the privacy unit is "patient" and no patient column is named',
            "the column that holds the patient id",
            "set patient, or protect single records instead",
        )
    for column in task.bounds:
        if column not in (columns.features or ()):
            raise TableError(
                f'task.bounds names "{column}", which is not a features column',
                f"one of features = {list(columns.features or ())}",
                "remove the bounds or add the column to features",
            )


def _input_columns(columns: Columns) -> tuple[str, ...]:
    if columns.text_template is not None:
        names = Template.parse(columns).columns
    else:
        one = columns.text or columns.image or columns.audio or ""
        names = columns.features if columns.features is not None else (one,)
    if columns.label in names or not names:
        raise TableError(
            f'the input columns are {list(names)} and the label column is "{columns.label}"',
            "at least one input column, and the label not among them",
            "take the label out of the input, or name a column to learn from",
        )
    return names


def _inputs(frame: pd.DataFrame, columns: Columns, task: Task, folder: Path) -> Inputs:
    if columns.features is not None:
        return np.stack([_feature(frame, name, task.bounds.get(name)) for name in columns.features], axis=1)
    if columns.image is not None:
        return _files(frame, columns.image, folder, "images")
    if columns.audio is not None:
        return _sounds(frame, columns.audio, folder)
    texts = _texts(frame, columns.text or "")
    if columns.question is None:
        return texts
    return tuple(asked(*both) for both in zip(_texts(frame, columns.question), texts, strict=True))


def _feature(frame: pd.DataFrame, name: str, bounds: tuple[float, float] | None) -> npt.NDArray[np.float64]:
    remedy = "leave these records out, fill the values in, or read the column through text_template"
    return scaled(_numbers(frame, name, "features", remedy), bounds)


def label_numbers(frame: pd.DataFrame, name: str) -> npt.NDArray[np.float64]:
    """The label column of a regression as it is, [n].

    Raises:
        TableError: for a row without a finite number.
    """
    return _numbers(frame, name, "regression's label", "leave these records out, or correct the values")


def _numbers(frame: pd.DataFrame, name: str, role: str, remedy: str) -> npt.NDArray[np.float64]:
    import pandas as pd

    cells = pd.Series(frame[name].tolist(), dtype=object)
    numbers: npt.NDArray[np.float64] = pd.to_numeric(cells, errors="coerce").to_numpy(np.float64)
    bad = np.flatnonzero(~np.isfinite(numbers))
    if bad.size:
        raise TableError(
            f'column "{name}", {_rows(bad)}: "{frame[name].iloc[bad[0]]}" is not a finite number',
            f"a number in every row of a {role} column",
            remedy,
        )
    return numbers


def _texts(frame: pd.DataFrame, name: str) -> tuple[str, ...]:
    cells = zip(frame[name].tolist(), frame[name].isna(), strict=True)
    texts = tuple("" if missing else str(cell) for cell, missing in cells)
    _refuse_missing([not text.strip() for text in texts], name, "text")
    return texts


def _sounds(frame: pd.DataFrame, name: str, folder: Path) -> tuple[Path, ...]:
    paths = _files(frame, name, folder, "sounds")
    other = np.array([row for row, path in enumerate(paths) if path.suffix.lower() not in sound.SUFFIXES])
    if other.size:
        raise TableError(
            f'column "{name}", {_rows(other)}: {paths[other[0]].name}',
            f"WAV files, named {' or '.join(sound.SUFFIXES)}",
            "convert them, for example with ffmpeg -i IN.flac OUT.wav, and correct the column",
        )
    return paths


def _files(frame: pd.DataFrame, name: str, folder: Path, what: str) -> tuple[Path, ...]:
    given = _texts(frame, name)
    paths = tuple(folder / path.strip() for path in given)
    absent = np.array([row for row, path in enumerate(paths) if not path.is_file()])
    if absent.size:
        raise TableError(
            f'column "{name}", {_rows(absent)}: no file {paths[absent[0]]}',
            f"paths relative to the table's folder {folder}",
            f"correct the paths, or put the {what} there",
        )
    return paths


def _names(frame: pd.DataFrame, name: str, role: str) -> npt.NDArray[np.str_]:
    keys = [canonical(cell) for cell in frame[name].tolist()]
    _refuse_missing([key in MISSING_WORDS for key in keys], name, role)
    return np.array(keys, dtype=np.str_)


def _groups(frame: pd.DataFrame, name: str, given: Mapping[str, str]) -> npt.NDArray[np.str_]:
    """A record's group is not what it is trained for: one that is missing or not named is in no group."""
    known = canonical_keys(given, "groups")
    keys = [canonical(cell) for cell in frame[name].tolist()]
    if known:
        return np.array([known.get(key, "") for key in keys], dtype=np.str_)
    return np.array(["" if key in MISSING_WORDS else key for key in keys], dtype=np.str_)


def _labels(frame: pd.DataFrame, columns: Columns, task: Task) -> Targets:
    if task.target is not None:
        return in_range(label_numbers(frame, columns.label), task.target)
    known = _label_indices(columns, task)
    if task.form == "multilabel":
        return _label_rows(frame[columns.label], known, len(task.labels))
    keys = [canonical(cell) for cell in frame[columns.label].tolist()]
    _refuse_missing([key in MISSING_WORDS and key not in known for key in keys], columns.label, "label")
    _refuse_unknown([[] if key in known else [key] for key in keys], columns.label, known)
    return np.array([known[key] for key in keys], dtype=np.int64)


def _truths(frame: pd.DataFrame, columns: Columns, task: Task, inputs: Inputs) -> tuple[str, ...]:
    """The label column's cells, read beside the records."""
    cells = [
        "" if missing else str(cell)
        for cell, missing in zip(frame[columns.label].tolist(), frame[columns.label].isna(), strict=True)
    ]
    if task.form == "generation":
        _refuse_missing([not cell.strip() for cell in cells], columns.label, "text")
        return tuple(cells)
    known = {raw: task.labels.index(label) for raw, label in _given_labels(columns, task).items()}
    truths = []
    for row, (told, cell) in enumerate(zip(inputs, cells, strict=True)):
        try:
            truths.append(_truth(task, str(told), cell, known))
        except ValueError as error:
            raise TableError(
                f'column "{columns.label}", {_rows(np.array([row]))}: {error}',
                _TRUTHS[task.form],
                "correct the table, or take the record out of it",
            ) from None
    return tuple(truths)


def _truth(task: Task, told: str, cell: str, known: Mapping[str, int]) -> str:
    if task.form == "tokens":
        return word_truth(told, cell, known)
    if task.form == "answers":
        return answer_truth(question_and_text(told)[1], cell)
    return box_truth(cell, known)


_TRUTHS: Mapping[str, str] = {
    "tokens": "a label of task.labels for each word of the text, with blanks between",
    "answers": "words that stand in the text",
    "detection": "JSON, a list of [label, left, top, right, bottom] with sides from 0 to 1",
}


def _label_rows(cells: pd.Series, known: Mapping[str, int], labels: int) -> npt.NDArray[np.float64]:
    """1 for each label that a cell names, [n, labels]; an empty cell names none."""
    named = [
        [] if missing else [canonical(one) for one in str(cell).split(LABELS_APART) if one.strip()]
        for cell, missing in zip(cells.tolist(), cells.isna(), strict=True)
    ]
    _refuse_unknown([[key for key in keys if key not in known] for keys in named], str(cells.name), known)
    rows = np.zeros((len(named), labels))
    for row, keys in zip(rows, named, strict=True):
        row[[known[key] for key in keys]] = 1.0
    return rows


def _refuse_unknown(unknown: list[list[str]], column: str, known: Mapping[str, int]) -> None:
    """Refuse rows with labels that no mapping knows: those of each row."""
    rows = np.array([row for row, keys in enumerate(unknown) if keys])
    if rows.size:
        values = ", ".join(f'"{value}"' for value in list(dict.fromkeys(key for keys in unknown for key in keys))[:3])
        raise TableError(
            f'column "{column}", {_rows(rows)}: label {values}',
            f"one of {sorted(known)}",
            "add the value to labels, correct the table, or add the class to task.labels",
        )


def _label_indices(columns: Columns, task: Task) -> Mapping[str, int]:
    """Canonical raw label → index into `task.labels`."""
    given = _given_labels(columns, task)
    return {key: task.labels.index(label) for key, label in canonical_keys(given, "labels").items()}


def _given_labels(columns: Columns, task: Task) -> Mapping[str, str]:
    """Raw label → the plan's label."""
    given = columns.labels or {label: label for label in task.labels}
    for raw, label in given.items():
        if label not in task.labels:
            expectation = f"one of task.labels = {list(task.labels)}"
            raise TableError(f'labels."{raw}" = "{label}"', expectation, "correct the mapping")
    return given


def _refuse_missing(missing: list[bool], column: str, role: str) -> None:
    rows = np.flatnonzero(missing)
    if rows.size:
        value = f'column "{column}", {_rows(rows)}: no {role}'
        raise TableError(value, f"a {role} in every row", "fill it in, or take the records out of the table")


def _rows(rows: npt.NDArray[Any]) -> str:
    return f"row {rows[0] + 1}" + (f" (and {len(rows) - 1} more)" if len(rows) > 1 else "")
