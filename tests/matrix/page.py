# SPDX-License-Identifier: Apache-2.0
"""MODELS.md and benchmarks/matrix.json: what the cells of the matrix said when they were played.

python -m tests.matrix.page     plays all cells and writes both
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from tests.matrix.cells import CELLS, FAMILIES, MODES, REAL
from tests.matrix.play import RUNS, play

ROOT = Path(__file__).parents[2]
DOCUMENT, SCRIPTS = ROOT / "MODELS.md", ROOT / "benchmarks" / "matrix.json"
_BEGIN, _END = "<!-- matrix -->\n", "<!-- end of matrix -->\n"


def tables(found: Mapping[str, str]) -> str:
    """The matrix as Markdown: a table for each task, then the reasons."""
    reasons: dict[str, int] = {}
    parts = []
    for task in dict.fromkeys(cell.task for cell in CELLS):
        rows = [f"\n### {task}\n", f"| family | weights | {' | '.join(MODES)} |", "|---" * (len(MODES) + 2) + "|"]
        for family in dict.fromkeys(cell.family for cell in CELLS if cell.task == task):
            marks = [_mark(found[f"{family} | {task} | {mode}"], reasons) for mode in MODES]
            rows.append(f"| {family} | {_weights(family)} | {' | '.join(marks)} |")
        parts.append("\n".join(rows))
    listed = "\n".join(f"{number}. {reason}" for reason, number in reasons.items())
    return f"{_BEGIN}{chr(10).join(parts)}\n\n### Why not\n\n{listed}\n{_END}"


def _weights(family: str) -> str:
    if FAMILIES[family] == "tabular":
        return "none"
    return "real" if family in REAL else "random, tiny"


def _mark(said: str, reasons: dict[str, int]) -> str:
    return "yes" if said == RUNS else f"no ({reasons.setdefault(said, len(reasons) + 1)})"


def written(document: str, found: Mapping[str, str]) -> str:
    """The document with the tables in their place."""
    before, _, rest = document.partition(_BEGIN)
    return before + tables(found) + rest.partition(_END)[2]


def recorded() -> dict[str, str]:
    """What stands in the file for scripts."""
    return dict(json.loads(SCRIPTS.read_text(encoding="utf-8")))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        folders = [Path(folder) / str(index) for index in range(len(CELLS))]
        played = dict(zip((cell.name for cell in CELLS), pool.map(play, CELLS, folders), strict=True))
    SCRIPTS.write_text(json.dumps(played, indent=2) + "\n", encoding="utf-8")
    DOCUMENT.write_text(written(DOCUMENT.read_text(encoding="utf-8"), played), encoding="utf-8")
