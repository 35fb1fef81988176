# SPDX-License-Identifier: Apache-2.0
"""No mistake is made here, each would be seen if it were, and PRIVACY.md lists exactly these."""

from __future__ import annotations

import pytest
from tests.privacy import accounting, clipping, frozen, ledger, randomness, sampling, wire
from tests.privacy.mistakes import DOCUMENT, MISTAKES, Mistake, found, table


@pytest.mark.statistical
@pytest.mark.parametrize("mistake", MISTAKES, ids=[mistake.name for mistake in MISTAKES])
def test_a_mistake_is_not_made_and_would_be_seen(mistake: Mistake) -> None:
    """False alarm: some sixty checks of 5e-8 in guards that draw noise, 3e-6 in all; none in the others."""
    mistake.guard()
    with mistake.broken(), pytest.raises(AssertionError, match=mistake.seen):
        mistake.guard()


def test_nothing_stays_broken() -> None:
    """A variant's parts are gone when its block ends: the guard that it failed passes again."""
    for mistake in MISTAKES[:3]:
        with mistake.broken():
            pass
        mistake.guard()


def test_every_guard_has_a_mistake_and_every_mistake_a_test_of_its_own() -> None:
    names = [mistake.name for mistake in MISTAKES]
    assert len(set(names)) == len(names) == len({mistake.variant for mistake in MISTAKES})
    modules = (accounting, clipping, frozen, ledger, randomness, sampling, wire)
    guards = {part for module in modules for name, part in vars(module).items() if name.startswith("guard_")}
    assert guards == {mistake.guard for mistake in MISTAKES}


def test_privacy_md_lists_exactly_these_mistakes() -> None:
    remedy = "the table of PRIVACY.md is not tests/privacy/mistakes.py's; run: python -m tests.privacy.mistakes"
    assert found(DOCUMENT.read_text(encoding="utf-8")) == table(), remedy
