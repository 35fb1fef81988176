# SPDX-License-Identifier: Apache-2.0
"""Explanations for a person: coloured words, a grid of numbers, lines of columns, a JSON document, a picture.

Promises that what is coloured also stands there as a number, and that a sum that does not add up is said.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import numpy as np
from PIL import Image
from rich.console import Console
from rich.text import Text

from veil.simulations.explain import CELLS, Explanation

SHOWN: Final = 12
"""Parts that are listed, the largest first; the JSON document has all."""

_FOR, _AGAINST = (36, 87, 166), (217, 119, 43)
"""Blue and orange, which also the colour-blind tell apart."""

_STRONGEST: Final = 0.75
"""How much of its colour the largest part gets."""

DOCUMENT: Final = "explanations.json"


def document(names: Sequence[str], explanations: Sequence[Explanation]) -> list[dict[str, Any]]:
    """Plain values, one an explanation."""
    return [
        {"input": name, **asdict(one), "gap": one.gap, "complete": one.complete}
        for name, one in zip(names, explanations, strict=True)
    ]


def show(name: str, one: Explanation, console: Console) -> None:
    """Print one explanation."""
    title = "text" if one.kind == "words" else name
    console.print(f"{title}: {one.label} {one.answer:.4f}", highlight=False, markup=False)
    if one.kind == "words":
        console.print(coloured(one))
    for line in (*_grid(one), *_parts(one), _sum(one)):
        console.print(line, highlight=False, markup=False)


def coloured(one: Explanation) -> Text:
    """The words in their order; blue speaks for the label, orange against, the more the stronger."""
    line, largest = Text(), max(map(abs, one.added), default=0.0)
    for word, added in zip(one.parts, one.added, strict=True):
        share = _STRONGEST * abs(added) / largest if largest else 0.0
        red, green, blue = (round(255 + share * (hue - 255)) for hue in (_FOR if added > 0 else _AGAINST))
        line.append(word, style=f"black on rgb({red},{green},{blue})").append(" ")
    return line


def write(folder: Path, names: Sequence[str], explanations: Sequence[Explanation], records: Iterable[object]) -> None:
    """Write the JSON document, and beside it each image with its cells coloured.

    Args:
        folder: it is there.
        names: of the records.
        explanations: of them.
        records: the records; a path is an image.
    """
    (folder / DOCUMENT).write_text(json.dumps(document(names, explanations), indent=2) + "\n", encoding="utf-8")
    for number, (one, record) in enumerate(zip(explanations, records, strict=True), 1):
        if isinstance(record, Path):
            overlay(one, record).save(folder / f"{number}.png")


def overlay(one: Explanation, path: Path, side: int = 448) -> Image.Image:
    """The image as the model sees it, a square, its cells coloured as words are."""
    with Image.open(path) as image:
        square = image.convert("RGBA").resize((side, side), Image.Resampling.BILINEAR)
    added = np.array(one.added).reshape(CELLS, CELLS)
    largest = np.abs(added).max() or 1.0
    cells = np.where(added[..., None] > 0, np.array(_FOR), np.array(_AGAINST))
    strength = np.rint(255 * _STRONGEST * np.abs(added) / largest)[..., None]
    layer = Image.fromarray(np.concatenate([cells, strength], axis=2).astype(np.uint8), "RGBA")
    rows = np.arange(side) * CELLS // side
    return Image.alpha_composite(square, Image.fromarray(np.asarray(layer)[rows][:, rows], "RGBA")).convert("RGB")


def _grid(one: Explanation) -> Iterator[str]:
    if one.kind == "cells":
        for row in np.array(one.added).reshape(CELLS, CELLS):
            yield " ".join(f"{added:+7.2f}" for added in row)


def _parts(one: Explanation) -> Iterator[str]:
    """The largest parts; a grid has shown them all."""
    if one.kind == "cells":
        return
    order = sorted(range(len(one.parts)), key=lambda place: -abs(one.added[place]))
    for place in order[:SHOWN]:
        yield f"{one.added[place]:+8.3f}  {one.parts[place]}"
    if len(order) > SHOWN:
        yield f"{sum(one.added[place] for place in order[SHOWN:]):+8.3f}  the {len(order) - SHOWN} others together"


def _sum(one: Explanation) -> str:
    error = f", each part ± {1.96 * one.error:.3f} at most" if one.error else ""
    if one.complete:
        return f"score {one.score:+.3f} = blank record {one.blank:+.3f} and the parts{error}"
    return (
        f"score {one.score:+.3f}, blank record {one.blank:+.3f}: the parts do NOT add up, {one.gap:+.3f} is not "
        "explained; take them as a rough order"
    )
