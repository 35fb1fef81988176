# SPDX-License-Identifier: Apache-2.0
"""Tests of `veil.client.holdout`: who never trains is a matter of the unit and the site's key alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from veil.client.examples import Examples, Inputs
from veil.client.holdout import held_out, identities

KEY = bytes(range(32))
NAMES = np.array([f"patient {number}" for number in range(5000)])


def examples(inputs: Inputs, patients: list[str] | None = None) -> Examples:
    count = len(inputs)
    return Examples(
        inputs=inputs,
        labels=np.zeros(count, np.int64),
        units=np.arange(1, count + 1).astype(np.str_),
        patients=None if patients is None else np.array(patients),
    )


def chosen(texts: list[str], part: float = 0.5) -> dict[str, bool]:
    """Whether a text is held out."""
    held = held_out(identities(examples(tuple(texts))), KEY, part)
    return dict(zip(texts, held.tolist(), strict=True))


@given(texts=st.lists(st.text("abc", max_size=4), max_size=20, unique=True), gone=st.integers(0, 19))
def test_no_record_that_goes_changes_another_s_place(texts: list[str], gone: int) -> None:
    """What add-or-remove-one rests on: by row number, all records after it would change sides."""
    rest = [text for index, text in enumerate(texts) if index != gone]
    everyone = chosen(texts)
    assert chosen(rest) == {text: everyone[text] for text in rest}


def test_by_row_number_others_would_change_sides() -> None:
    """The mistake that the test above is about."""
    rows = np.arange(1, 101).astype(np.str_)
    assert held_out(rows, KEY, 0.5)[1:].tolist() != held_out(rows[:-1], KEY, 0.5).tolist()


@pytest.mark.parametrize("part", [0.01, 0.2, 0.5])
def test_about_the_part_asked_for_is_held_out(part: float) -> None:
    """Fixed keys and names: nothing here is left to chance."""
    found = float(held_out(NAMES, KEY, part).mean())
    assert abs(found - part) < 4 * np.sqrt(part * (1 - part) / len(NAMES))


def test_the_same_key_holds_out_the_same_and_another_key_others() -> None:
    first = held_out(NAMES, KEY, 0.2)
    assert np.array_equal(first, held_out(NAMES, KEY, 0.2))
    other = held_out(NAMES, bytes(32), 0.2)
    assert 0.02 < float((first & other).mean()) < 0.06


def test_a_larger_part_holds_out_more_and_none_less() -> None:
    small, large = held_out(NAMES, KEY, 0.1), held_out(NAMES, KEY, 0.3)
    assert not np.any(small & ~large)


def test_all_records_of_a_patient_are_on_one_side_whatever_the_unit() -> None:
    patients = [f"p{number % 40}" for number in range(400)]
    texts = tuple(f"text {number}" for number in range(400))
    held = held_out(identities(examples(texts, patients)), KEY, 0.5)
    sides = {name: set(held[np.array(patients) == name].tolist()) for name in set(patients)}
    assert all(len(side) == 1 for side in sides.values())
    assert {side.pop() for side in sides.values()} == {True, False}


def test_a_record_is_what_it_holds(tmp_path: Path) -> None:
    """A text, the numbers of a row, or an image's content wherever it lies; equal ones are one."""
    texts = identities(examples(("a", "b", "a")))
    assert texts[0] == texts[2] != texts[1]
    numbers = identities(examples(np.array([[1.0, 2.0], [2.0, 1.0], [1.0, 2.0]])))
    assert numbers[0] == numbers[2] != numbers[1]
    paths = tuple(tmp_path / name for name in ("one", "two", "three"))
    for path, content in zip(paths, (b"x", b"y", b"x"), strict=True):
        path.write_bytes(content)
    images = identities(examples(paths))
    assert images[0] == images[2] != images[1]


def test_no_record_at_all_is_no_mistake() -> None:
    assert held_out(identities(examples(())), KEY, 0.2).shape == (0,)
