# SPDX-License-Identifier: Apache-2.0
"""What `veil predict` is asked about: a text, an image, a file of texts, a table.

Promises an error with a remedy for anything else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from veil.common.errors import InputError
from veil.common.head import scaled
from veil.common.plan import Task

_TABLES: dict[str, Callable[[Path], pd.DataFrame]] = {".csv": pd.read_csv, ".parquet": pd.read_parquet}


def read_inputs(
    source: str, task: Task, columns: Sequence[str]
) -> tuple[str, ...] | tuple[Path, ...] | NDArray[np.float64]:
    """Turn the command line's INPUT into what the model reads.

    Raises:
        InputError: for a missing file or column, or something a model of this kind cannot read.
    """
    path = Path(source)
    if path.suffix.lower() in _TABLES:
        return _from_table(path, task, columns)
    if task.kind == "tabular-classification":
        raise InputError(f"INPUT {source}", "a .csv or .parquet table", "give a table and its --column names")
    if task.kind == "image-classification":
        return (_existing(path),)
    if path.suffix.lower() == ".txt":
        lines = _existing(path).read_text(encoding="utf-8").splitlines()
        return tuple(line for line in lines if line.strip())
    return (source,)


def _from_table(
    path: Path, task: Task, columns: Sequence[str]
) -> tuple[str, ...] | tuple[Path, ...] | NDArray[np.float64]:
    try:
        frame = _TABLES[path.suffix.lower()](_existing(path))
    except (ValueError, OSError) as error:
        raise InputError(f"{path} ({error})", "a readable table", "check the file") from None
    wanted = list(columns) or ["text" if task.kind == "text-classification" else "path"]
    missing = [name for name in wanted if name not in frame.columns]
    if missing:
        raise InputError(
            f"{path} has no column {missing[0]}",
            f"one of {', '.join(map(str, frame.columns))}",
            "name the input column with --column",
        )
    if task.kind == "tabular-classification":
        return np.stack([scaled(frame[name].to_numpy(np.float64), task.bounds.get(name)) for name in wanted], axis=1)
    values = [str(value) for value in frame[wanted[0]]]
    if task.kind == "image-classification":
        return tuple(_existing(path.parent / value) for value in values)
    return tuple(values)


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise InputError(f"{path} is not there", "an existing file", "check the path")
    return path
