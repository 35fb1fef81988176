# SPDX-License-Identifier: Apache-2.0
"""Truths with a structure are read whole or refused by what is wrong in them."""

from __future__ import annotations

import pytest

from veil.common.truths import answer_truth, asked, box_truth, boxes_of, question_and_text, word_truth, words_of

KNOWN = {"O": 0, "DRUG": 1}


def test_a_label_for_each_word() -> None:
    assert words_of(word_truth("took  aspirin\ttoday", "O DRUG O", KNOWN)) == (0, 1, 0)


@pytest.mark.parametrize(("cell", "message"), [("O DRUG", "2 labels for 3 words"), ("O DOSE O", 'label "DOSE"')])
def test_words_refused(cell: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        word_truth("took aspirin today", cell, KNOWN)


def test_an_answer_stands_in_its_text() -> None:
    assert answer_truth("he took aspirin", " aspirin ") == "aspirin"


@pytest.mark.parametrize("cell", ["ibuprofen", "", "  "])
def test_an_answer_that_does_not_is_refused(cell: str) -> None:
    with pytest.raises(ValueError, match="not in the text"):
        answer_truth("he took aspirin", cell)


def test_a_question_and_its_text_are_one_record() -> None:
    record = asked("which\ndrug?", "he took\naspirin")
    assert question_and_text(record) == ("which drug?", "he took\naspirin")


def test_boxes() -> None:
    first, second = boxes_of(box_truth('[["DRUG", 0, 0, 0.5, 1], ["O", 0.1, 0.2, 0.3, 0.4]]', KNOWN))
    assert (first.label, first.sides) == (1, (0, 0, 0.5, 1))
    assert second.sides == (0.1, 0.2, 0.3, 0.4)
    assert boxes_of(box_truth("", KNOWN)) == ()


@pytest.mark.parametrize(
    "cell",
    [
        "{",
        "3",
        '[["DOSE", 0, 0, 1, 1]]',
        '[["O", 0, 0, 1]]',
        '[["O", 0.5, 0, 0.5, 1]]',
        '[["O", 0, 0, 1.5, 1]]',
        '[["O", 0, 0, NaN, 1]]',
        '[["O", 0, "0", 1, 1]]',
        '["O"]',
    ],
)
def test_boxes_refused(cell: str) -> None:
    with pytest.raises(ValueError, match=r"box|JSON"):
        box_truth(cell, KNOWN)
