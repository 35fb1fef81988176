# SPDX-License-Identifier: Apache-2.0
"""Cells of MODELS.md, played again: each runs as it says there, or is refused for the reason that stands there.

All refusals, all modes of one family of each kind of record, and every eighth of the rest; `page.py` plays all.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.matrix.cells import CELLS, Cell
from tests.matrix.page import DOCUMENT, recorded, written
from tests.matrix.play import RUNS, play

_WHOLE = ("BERT | text-classification", "ViT | image-classification", "wav2vec2 | audio-classification")


def played() -> list[Cell]:
    said = recorded()
    others = [cell for cell in CELLS if said.get(cell.name) == RUNS and not cell.name.startswith(_WHOLE)]
    left_out = {cell.name for index, cell in enumerate(others) if index % 8}
    return [cell for cell in CELLS if cell.name not in left_out]


@pytest.mark.parametrize("cell", played(), ids=lambda cell: cell.name)
def test_cell(cell: Cell, tmp_path: Path) -> None:
    assert play(cell, tmp_path / "cell") == recorded()[cell.name]


def test_the_page_shows_what_is_recorded() -> None:
    document = DOCUMENT.read_text(encoding="utf-8")
    assert set(recorded()) == {cell.name for cell in CELLS}
    assert written(document, recorded()) == document
