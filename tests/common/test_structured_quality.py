# SPDX-License-Identifier: Apache-2.0
"""What an evaluation of answers with a structure releases is bounded, and says what was counted."""

from __future__ import annotations

import numpy as np
import pytest

from veil.common.evaluation_forms import figures, outcome_vectors, vector_norm, vector_size
from veil.common.plan_sections import Form, Task
from veil.common.structured_quality import TOKEN_LOSS_CAP, answer_shares, word_outcome

LABELS = ("O", "DRUG", "DOSE")


def words(said: list[int], truth: list[int], loss: float = 0.5) -> np.ndarray:
    return word_outcome(said, truth, len(LABELS), loss)


def hostile(form: Form, random: np.random.Generator) -> np.ndarray:
    if form == "tokens":
        count = int(random.integers(1, 9))
        loss = random.choice([0.0, 1.0, 1e9, np.inf, np.nan])
        return words(random.integers(0, 3, count).tolist(), random.integers(0, 3, count).tolist(), float(loss))
    return random.choice([0.0, 0.3, 1.0, 1e6, -5.0, np.nan], size=3)


@pytest.mark.parametrize("form", ["tokens", "answers", "generation", "detection"])
def test_no_record_s_vector_is_longer_than_the_public_bound(form: Form) -> None:
    random = np.random.default_rng(0)
    labels = 3 if form == "tokens" else 0
    outcomes = np.stack([hostile(form, random) for _ in range(500)])
    lengths = np.linalg.norm(outcome_vectors(outcomes, form, labels), axis=1)
    assert lengths.shape == (500,)
    assert lengths.max() <= vector_norm(form, labels) * (1 + 1e-12)
    assert lengths.max() > 0.9 * vector_norm(form, labels)
    assert outcome_vectors(outcomes, form, labels).shape[1] == vector_size(form, labels)


def test_without_noise_the_figures_of_words_are_the_means_over_records() -> None:
    outcomes = np.stack([words([0, 1, 0, 0], [0, 1, 1, 0]), words([2], [2], 1.5)] * 50)
    task = Task(kind="text-tokens", labels=LABELS)
    told = figures(outcome_vectors(outcomes, "tokens", 3).sum(axis=0), 1e-9, task)
    assert told["accuracy"]["value"] == pytest.approx((0.75 + 1) / 2)
    assert told["loss"]["value"] == pytest.approx(1.0)
    assert told["classes"]["DRUG"]["recall"]["value"] == pytest.approx(0.5)
    assert told["count"]["value"] == pytest.approx(100)


def test_without_noise_two_shares_are_their_means() -> None:
    outcomes = np.array([[1.0, 0.5, 3.0], [0.0, 0.1, 2.0]] * 50)
    task = Task(kind="text-generation")
    told = figures(outcome_vectors(outcomes, "generation", 0).sum(axis=0), 1e-9, task)
    assert told["accuracy"]["value"] == pytest.approx(0.5)
    assert told["token_loss"]["value"] == pytest.approx(0.3 * TOKEN_LOSS_CAP)
    assert told["count"]["value"] == pytest.approx(100)


def test_a_figure_that_noise_outweighs_is_none() -> None:
    told = figures(np.array([1.0, 1.0, 1.0]), 50.0, Task(kind="text-answers"))
    assert told["accuracy"]["value"] is None


@pytest.mark.parametrize(
    ("said", "truth", "shares"),
    [
        ("The aspirin.", "aspirin", (1.0, 1.0)),
        ("took aspirin", "aspirin", (0.0, 2 / 3)),
        ("rash", "fever", (0.0, 0.0)),
        ("", "fever", (0.0, 0.0)),
        ("", "the", (1.0, 1.0)),
    ],
)
def test_answers_are_compared_as_squad_does(said: str, truth: str, shares: tuple[float, float]) -> None:
    assert answer_shares(said, truth) == pytest.approx(shares)


def test_a_record_counts_the_same_however_many_words_it_has() -> None:
    assert words([0] * 9, [0] * 9)[:-1].sum() == pytest.approx(1)
    assert words([0], [0])[:-1].sum() == pytest.approx(1)
    assert words([], [])[:-1].sum() == 0
