# SPDX-License-Identifier: Apache-2.0
"""Tests of `veil.server.steps`: every form of task descends, and without noise none runs away."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from numpy.typing import NDArray

from veil.client.gradient import clipped_head_sum
from veil.client.head_batch import HeadBatch
from veil.client.units import Units
from veil.common.head import scores
from veil.common.objective import OBJECTIVES, Targets, form_of
from veil.common.plan_sections import Form, clipping_bound
from veil.server.steps import largest_rate, public_steps

Floats = NDArray[np.float64]
UNITS = 400
FORMS: list[Form] = ["classification", "multilabel", "regression"]


def units_of(form: Form, width: int) -> Units:
    """Records of one direction: the steepest there are."""
    random = np.random.default_rng(1)
    way = random.normal(size=UNITS)
    features = way[:, None] * np.ones(width) + 0.01 * random.normal(size=(UNITS, width))
    labels: dict[Form, Targets] = {
        "classification": (way > 0).astype(np.int64),
        "multilabel": np.stack([way > 0, way + random.normal(size=UNITS) > 0.5], axis=1).astype(np.float64),
        "regression": np.clip(0.5 + 0.1 * np.sign(way) + 0.03 * random.normal(size=UNITS), 0, 1),
    }
    return Units(features=features, labels=labels[form], unit=np.arange(UNITS), count=UNITS)


def losses(form: Form, rate: float | None = None, rounds: int = 60) -> list[float]:
    """Mean loss after each round, by the rule for next to no noise, or with the rate given."""
    units = units_of(form, width=3)
    labels = 1 if form == "regression" else 2
    bound = clipping_bound(labels, form)
    steps = public_steps(units=UNITS, classes=labels, bound=bound, sigma=1e-3, noises=1.0, rounds=rounds, form=form)
    batch = HeadBatch.of(units, np.zeros(3))
    weight, velocity, found = np.zeros((labels, 4)), np.zeros((labels, 4)), []
    for _ in range(rounds):
        mean = clipped_head_sum(weight, batch, bound) / UNITS
        velocity = steps.momentum * velocity + mean
        weight = weight - (rate or steps.rate) * (mean + steps.momentum * velocity)
        objective = OBJECTIVES[form_of(units.labels)]
        answers = objective.answers(scores(weight, batch.inputs.astype(np.float64)))
        found.append(float(objective.losses(answers, units.labels).mean()))
    return found


@pytest.mark.parametrize("form", FORMS)
def test_without_noise_every_form_stays_below_where_it_began(form: Form) -> None:
    """Also on the steepest records there are, where labels that cannot all be known swing to and fro."""
    assert max(losses(form)[-10:]) < 0.98 * np.log(2)


def test_a_number_comes_to_rest_and_at_sixteen_times_the_rate_runs_away() -> None:
    """At momentum 0.9 Nesterov's step is stable below 1.36 / curvature, on the steepest records there are."""
    calm, wild = losses("regression"), losses("regression", rate=64.0)
    assert max(after - before for before, after in pairwise(calm)) < 0.02
    assert max(calm[-10:]) - min(calm[-10:]) < 1e-3
    assert max(wild) > np.log(2) > max(calm)


def test_the_rate_falls_with_the_curvature_and_where_nothing_is_clipped() -> None:
    assert largest_rate("classification", 10, 0.5) == 160.0
    assert largest_rate("multilabel", 3, 0.5) == largest_rate("multilabel", 30, 0.5) == 32.0
    assert largest_rate("regression", 1, 0.1) == 4.0
    for form in FORMS:
        assert largest_rate(form, 2, 100.0) == largest_rate(form, 2, 0.1) / 2


def test_a_number_s_answers_are_moved_less_by_noise() -> None:
    """The noise of each weight at the end is ν: 1, and a quarter for a number."""
    rates = [
        public_steps(units=100, classes=2, bound=0.2, sigma=5.0, noises=1.0, rounds=10, form=form).rate
        for form in ("classification", "regression")
    ]
    assert rates[1] == pytest.approx(rates[0] / 4)
