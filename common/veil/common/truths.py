# SPDX-License-Identifier: Apache-2.0
"""Records and truths with a structure, as text: words and their labels, a question on a text, boxes in an image.

Promises that what a table says is either read whole or refused by the place that is wrong; no torch here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from veil.common.plan_sections import Form

SAID: Final[Mapping[Form, str]] = {
    "tokens": "each word with one of: {}",
    "answers": "a question on a text with the place of its answer",
    "generation": "a text with how it goes on",
    "detection": "where in an image there are: {}",
}
"""What a model of a form with a structure answers, around its labels."""


def asked(question: str, text: str) -> str:
    """A question on a text as one record: the question, a line's end, the text."""
    return f"{' '.join(question.split())}\n{text}"


def question_and_text(record: str) -> tuple[str, str]:
    """The inverse of `asked`; a record of one line has no text."""
    question, _, text = record.partition("\n")
    return question, text


def word_truth(text: str, cell: str, known: Mapping[str, int]) -> str:
    """A label for each word, as places in the plan's list with blanks between.

    Args:
        text: words with blanks between.
        cell: as many labels, likewise.
        known: label to its place.

    Raises:
        ValueError: for another number of labels, or one that is not known.
    """
    labels, words = cell.split(), text.split()
    if len(labels) != len(words):
        raise ValueError(f"{len(labels)} labels for {len(words)} words")
    if unknown := [label for label in labels if label not in known]:
        raise ValueError(f'label "{unknown[0]}"')
    return " ".join(str(known[label]) for label in labels)


def words_of(truth: str) -> tuple[int, ...]:
    """What `word_truth` made."""
    return tuple(map(int, truth.split()))


def answer_truth(text: str, cell: str) -> str:
    """An answer that stands in its text.

    Raises:
        ValueError: when it does not.
    """
    if not cell.strip() or cell.strip() not in text:
        raise ValueError(f'the answer "{cell[:40]}" is not in the text')
    return cell.strip()


@dataclass(frozen=True, kw_only=True, slots=True)
class Box:
    """One object.

    Attributes:
        label: its class, a place in the plan's list.
        sides: left, top, right, bottom, from 0 to 1.
    """

    label: int
    sides: tuple[float, float, float, float]


def box_truth(cell: str, known: Mapping[str, int]) -> str:
    """Boxes as JSON, the label's place in the place of its name.

    Args:
        cell: JSON, a list of [label, left, top, right, bottom]; "" or [] where nothing is to be seen.
        known: label to its place.

    Raises:
        ValueError: naming the entry that is not one.
    """
    try:
        entries = json.loads(cell) if cell.strip() else []
    except ValueError:
        raise ValueError("not JSON") from None
    if not isinstance(entries, list):
        raise ValueError("not a list of boxes")
    return json.dumps([[known[str(one[0])], *one[1:]] for one in entries if _is_box(one, known)])


def _is_box(entry: object, known: Mapping[str, int]) -> bool:
    """True, or an error that names the entry."""
    if isinstance(entry, Sequence) and not isinstance(entry, str) and len(entry) == 5 and str(entry[0]) in known:
        sides = entry[1:]
        if all(isinstance(side, int | float) and math.isfinite(side) for side in sides):
            left, top, right, bottom = sides
            if 0 <= left < right <= 1 and 0 <= top < bottom <= 1:
                return True
    raise ValueError(f"the box {json.dumps(entry)[:60]}")


def boxes_of(truth: str) -> tuple[Box, ...]:
    """What `box_truth` made."""
    return tuple(Box(label=int(label), sides=(x0, y0, x1, y1)) for label, x0, y0, x1, y1 in json.loads(truth))
