# SPDX-License-Identifier: Apache-2.0
"""The combinations of mode, family of models and task that the matrix holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

from tests.families import IMAGE_MODELS, SOUND_MODELS, TEXT_MODELS

from veil.common.plan_sections import TransferMode

MODES: tuple[str, ...] = get_args(TransferMode)
REAL = {"MiniLM": "text", "Lite0": "image", "GE2E": "audio"}
"""Families whose cells run on real weights, out of packages."""

FAMILIES: dict[str, str] = {
    **dict.fromkeys(TEXT_MODELS, "text"),
    **dict.fromkeys(IMAGE_MODELS, "image"),
    **dict.fromkeys(SOUND_MODELS, "audio"),
    **REAL,
    "numeric columns": "tabular",
}
"""Every family and what its records are."""

_OTHER_TASKS = (
    ("BERT", "text-multilabel"),
    ("BERT", "text-regression"),
    ("BERT", "text-tokens"),
    ("BERT", "text-answers"),
    ("Llama", "text-generation"),
    ("ViT", "image-multilabel"),
    ("ViT", "image-regression"),
    ("YOLOS", "image-detection"),
    ("wav2vec2", "audio-multilabel"),
    ("numeric columns", "tabular-multilabel"),
    ("numeric columns", "tabular-regression"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """One combination."""

    family: str
    task: str
    mode: str

    @property
    def name(self) -> str:
        """As the matrix names it."""
        return f"{self.family} | {self.task} | {self.mode}"


CELLS: tuple[Cell, ...] = tuple(
    Cell(family=family, task=task, mode=mode)
    for family, task in (
        *((family, f"{modality}-classification") for family, modality in FAMILIES.items()),
        *_OTHER_TASKS,
    )
    for mode in MODES
)
