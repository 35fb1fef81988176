# SPDX-License-Identifier: Apache-2.0
"""Tests of `veil.server.said`: every code has its words, and is among them."""

from __future__ import annotations

import pytest

from veil.common.errors import RefusalCode
from veil.common.exchange import Willingness
from veil.server.said import in_words


@pytest.mark.parametrize("code", list(RefusalCode))
def test_a_refusal_keeps_its_code_and_says_what_it_is(code: RefusalCode) -> None:
    found = in_words(code.value)
    assert found.startswith(f"refused ({code.value}: ") and found.endswith(")")


@pytest.mark.parametrize("word", [Willingness.PENDING, Willingness.LACKS_BACKBONE])
def test_who_waits_is_said(word: Willingness) -> None:
    assert in_words(word.value).startswith("waits for ")


@pytest.mark.parametrize("word", ["ready", "replied", "a word of a later version"])
def test_other_words_stay(word: str) -> None:
    assert in_words(word) == word
