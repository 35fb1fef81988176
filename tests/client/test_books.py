# SPDX-License-Identifier: Apache-2.0
"""Tests of `veil.client.books`: a line that is not understood is an error; unprivate noise makes the cost infinite."""

from __future__ import annotations

import math
from typing import Any

import pytest

from veil.client.books import WRITE_OFF, Books, Entry, total, total_alone, without_masks
from veil.client.chain import genesis, seal
from veil.common.keys import NodeKey
from veil.common.privacy import Mechanism, NoiseShares, spent, spent_over_runs
from veil.common.schedule import Release, ReleaseKind

MECHANISM = Mechanism(noise_multiplier=8.0, max_grad_norm=0.5)
RELEASE = Release(round=1, kind=ReleaseKind.GRADIENT, mechanism=MECHANISM)
SPEND = {
    "kind": "spend",
    "job": "job",
    "round": 1,
    "release": "gradient",
    "attempt": 0,
    "mechanism": MECHANISM.to_record(),
    "noise": "os",
    "plan": "p",
}


@pytest.fixture
def books() -> Books:
    return Books(heads=[genesis("Ulm").hash])


def enter(books: Books, key: NodeKey, **fields: Any) -> int:
    line = seal(fields, books.head, key)
    books.add(line)
    return line.seq


def test_a_spend_is_a_mechanism_done(books: Books, key: NodeKey) -> None:
    enter(books, key, **SPEND)
    assert books.entries == [Entry(job="job", round=1, mechanism=MECHANISM, noise="os", plan="p")]
    assert (books.head.seq, len(books.heads)) == (1, 2)


def test_a_release_is_answered_once_one_of_its_spends_has_a_reply(books: Books, key: NodeKey) -> None:
    first, second = enter(books, key, **SPEND), enter(books, key, **SPEND)
    assert books.answered("job", RELEASE) is None
    assert books.answered_already(first) is None
    enter(books, key, kind="reply", spend=second, sha256="5" * 64)
    assert books.answered("job", RELEASE) == second
    assert books.answered_already(first) == books.answered_already(second) == second
    assert len(books.entries) == 2


@pytest.mark.parametrize(
    "other",
    [{"job": "another"}, {"round": 2}, {"release": "delta"}],
    ids=["job", "round", "kind"],
)
def test_an_answer_counts_for_its_release_alone(other: dict[str, Any], books: Books, key: NodeKey) -> None:
    mine, elsewhere = enter(books, key, **SPEND), enter(books, key, **{**SPEND, **other})
    enter(books, key, kind="reply", spend=elsewhere, sha256="5" * 64)
    assert books.answered("job", RELEASE) is None
    assert books.answered_already(mine) is None


def test_a_write_off_is_private_noise_of_no_job(books: Books, key: NodeKey) -> None:
    enter(books, key, kind="write-off", mechanism=MECHANISM.to_record(), reason="fire", covers=["7" * 64])
    assert books.entries == [Entry(job=WRITE_OFF, round=0, mechanism=MECHANISM, noise="os", plan="")]
    assert books.covered == {"7" * 64}
    assert total(books.entries, 1e-5) == spent([MECHANISM], 1e-5)


@pytest.mark.parametrize(
    "fields",
    [
        {"kind": "gift"},
        {},
        {"kind": "reply"},
        {"kind": "write-off", "covers": []},
        {**SPEND, "mechanism": {}},
        {**SPEND, "mechanism": {**MECHANISM.to_record(), "unit": "household"}},
        {**SPEND, "mechanism": {**MECHANISM.to_record(), "noise_multiplier": (0.0).hex()}},
        {name: value for name, value in SPEND.items() if name != "noise"},
    ],
    ids=["kind", "empty", "reply", "write-off", "mechanism", "unit", "no noise", "no source"],
)
def test_a_line_that_is_not_understood_is_an_error(fields: dict[str, Any], books: Books, key: NodeKey) -> None:
    with pytest.raises((LookupError, ValueError)):
        enter(books, key, **fields)
    assert books.head == genesis("Ulm")


def test_the_cost_is_that_of_the_lines_of_a_job_or_of_all() -> None:
    entries = [Entry(job=job, round=1, mechanism=MECHANISM, noise="os", plan="") for job in ("a", "a", "b")]
    assert total(entries, 1e-5) == spent([MECHANISM] * 3, 1e-5)
    assert total(entries, 1e-5, "a") == spent([MECHANISM] * 2, 1e-5)
    assert total(entries, 1e-5, "c").epsilon == 0.0


def test_sampled_runs_compose_by_the_rule_for_plans_that_followed_from_answers() -> None:
    """A run is a job's lines of one plan: a write-off is another, also for a job that took its name."""
    sample = Mechanism(noise_multiplier=1.5, max_grad_norm=0.5, sample_rate=0.03, steps=50)
    one = [Entry(job="a", round=index, mechanism=sample, noise="os", plan="p") for index in (1, 2)]
    other = Entry(job="b", round=1, mechanism=MECHANISM, noise="os", plan="p")
    lost = Entry(job=WRITE_OFF, round=0, mechanism=MECHANISM, noise="os", plan="")
    taken = Entry(job=WRITE_OFF, round=1, mechanism=sample, noise="os", plan="p")
    assert total(one, 1e-5) == spent([sample, sample], 1e-5)
    assert total([*one, other], 1e-5) == spent_over_runs([[sample, sample], [MECHANISM]], 1e-5)
    assert total([lost, *one], 1e-5) == spent_over_runs([[MECHANISM], [sample, sample]], 1e-5)
    assert total([lost, taken], 1e-5) == spent_over_runs([[MECHANISM], [sample]], 1e-5)
    assert total([lost, taken], 1e-5).epsilon > 1.05 * spent([MECHANISM, sample], 1e-5).epsilon
    assert total([*one, other], 1e-5, "a") == spent([sample, sample], 1e-5)


@pytest.mark.parametrize("noise", ["fixed", "none", "", "OS"])
def test_one_line_without_private_noise_makes_the_cost_infinite(noise: str) -> None:
    entries = [Entry(job=job, round=1, mechanism=MECHANISM, noise=n, plan="") for job, n in (("a", "os"), ("b", noise))]
    assert total(entries, 1e-5).epsilon == total(entries, 1e-5, "b").epsilon == math.inf
    assert total(entries, 1e-5, "a").epsilon < math.inf


def test_what_holds_without_masks_is_told_of_runs_that_had_them() -> None:
    bare = Entry(job="bare", round=1, mechanism=MECHANISM, noise="os", plan="p")
    masked = Entry(
        job="masked", round=1, mechanism=MECHANISM, noise="os", plan="q", shares=NoiseShares(sites=4, colluding=1)
    )
    assert without_masks([bare], 1e-5) is None
    assert without_masks([bare, masked], 1e-5, "bare") is None
    assert without_masks([bare, masked], 1e-5) == total_alone([bare, masked], 1e-5)
    alone = without_masks([bare, masked], 1e-5, "masked")
    assert alone is not None and alone.epsilon > total([masked], 1e-5).epsilon
