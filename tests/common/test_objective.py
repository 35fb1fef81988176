# SPDX-License-Identifier: Apache-2.0
"""Tests of `veil.common.objective`: errors are the losses' gradients, none longer than its bound; ranges map back."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.optimize import approx_fprime

from veil.common.objective import OBJECTIVES, Targets, form_of, from_range, in_range
from veil.common.plan_sections import Form

Floats = NDArray[np.float64]
LABELS = 3
TRUTHS: dict[Form, Targets] = {
    "classification": np.array([0, 2, 1]),
    "multilabel": np.array([[0.0, 1, 1], [0, 0, 0], [1, 1, 1]]),
    "regression": np.array([0.0, 1.0, 0.3]),
}
FORMS = list(TRUTHS)


def scores_of(form: Form, seed: int = 0) -> Floats:
    return np.random.default_rng(seed).normal(size=(3, 1 if form == "regression" else LABELS)) * 2


@pytest.mark.parametrize("form", FORMS)
def test_the_truth_shows_its_form(form: Form) -> None:
    assert form_of(TRUTHS[form]) == form
    assert form_of(TRUTHS[form][:0]) == form


@pytest.mark.parametrize("form", FORMS)
def test_errors_are_the_gradient_of_the_loss(form: Form) -> None:
    """Of one decision; of several labels the loss is their mean, and the gradient that of their sum."""
    objective, truth, scores = OBJECTIVES[form], TRUTHS[form], scores_of(form)
    labels = scores.shape[1] if form == "multilabel" else 1

    def loss(flat: Floats) -> float:
        return labels * float(objective.losses(objective.answers(flat.reshape(scores.shape).copy()), truth).sum())

    expected = approx_fprime(scores.ravel(), loss, 1e-7).reshape(scores.shape)
    np.testing.assert_allclose(objective.errors(scores.copy(), truth), expected, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_the_curvature_is_that_at_scores_of_zero(form: Form) -> None:
    """The largest eigenvalue of the loss' second derivative."""
    objective, labels = OBJECTIVES[form], scores_of(form).shape[1]
    truth, zero = TRUTHS[form][:1], np.zeros((1, labels))
    step = 1e-5
    hessian = np.array(
        [
            (objective.errors(zero + step * way, truth) - objective.errors(zero.copy(), truth))[0] / step
            for way in np.eye(labels)
        ]
    )
    assert np.linalg.eigvalsh(hessian).max() == pytest.approx(objective.curvature(labels), rel=1e-3)


wild = st.floats(-1e300, 1e300)


@given(scores=st.lists(wild, min_size=LABELS, max_size=LABELS), place=st.integers(0, LABELS - 1), part=st.floats(0, 1))
def test_no_record_pulls_harder_than_the_bound(scores: list[float], place: int, part: float) -> None:
    """Whatever the scores are."""
    row = np.array([scores])
    truths: dict[Form, Targets] = {
        "classification": np.array([place]),
        "multilabel": np.eye(LABELS)[[place]],
        "regression": np.array([part]),
    }
    for form, truth in truths.items():
        one = row[:, :1] if form == "regression" else row
        error = OBJECTIVES[form].errors(one.copy(), truth)
        assert np.linalg.norm(error) <= OBJECTIVES[form].longest(one.shape[1]) * (1 + 1e-12)
        answers = OBJECTIVES[form].answers(one.copy())
        assert np.isfinite(OBJECTIVES[form].losses(answers, truth)).all() and (answers >= 0).all()


@pytest.mark.parametrize("form", FORMS)
def test_the_bound_is_met(form: Form) -> None:
    objective, labels = OBJECTIVES[form], scores_of(form).shape[1]
    far: dict[Form, Targets] = {
        "classification": np.array([1]),
        "multilabel": np.zeros((1, labels)),
        "regression": np.zeros(1),
    }
    scores = np.full((1, labels), 50.0)
    if form == "classification":
        scores[0, 1:] = -50.0
    assert np.linalg.norm(objective.errors(scores, far[form])) == pytest.approx(objective.longest(labels))


def test_a_record_s_loss_does_not_see_the_others() -> None:
    for form in FORMS:
        scores, truth = scores_of(form), TRUTHS[form]
        together = OBJECTIVES[form].errors(scores.copy(), truth)
        alone = [OBJECTIVES[form].errors(scores[[row]], truth[[row]])[0] for row in range(3)]
        np.testing.assert_allclose(together, alone, atol=1e-15)


@given(numbers=st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=5))
def test_numbers_are_cut_to_the_range_and_mapped_back(numbers: list[float]) -> None:
    told, target = np.array(numbers), (20.0, 90.0)
    parts = in_range(told, target)
    assert ((parts >= 0) & (parts <= 1)).all()
    np.testing.assert_allclose(from_range(parts, target), np.clip(told, *target), atol=1e-9)
