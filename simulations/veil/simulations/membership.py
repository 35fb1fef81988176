# SPDX-License-Identifier: Apache-2.0
"""The attack that tuned models are feared for: was this record in the training data? Played on made-up records.

Promises a report and no verdict: heads are tuned as a plan says, by the site's and the coordinator's own code, once
with the plan's noise and once without any, so that it shows whether the attack works at all. Method: LiRA, Carlini et
al. 2022, in its online form, each head attacked in turn with the others as shadows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from veil.client.release import draw
from veil.client.units import Units
from veil.common.exchange import RoundRequest
from veil.common.head import initial_adapter, predict
from veil.common.noise import NoiseSource, OSNoise
from veil.common.objective import OBJECTIVES, Targets, form_of
from veil.common.plan import RunPlan
from veil.common.plan_sections import Cohort, Form
from veil.common.privacy.auditing import Separation
from veil.common.schedule import schedule
from veil.common.update import Adapter
from veil.server.descent import Descent
from veil.simulations.unprivate_noise import NoNoise

HEADS = 32
"""Tuned heads, each on a random half of the records."""

RECORDS = 400
"""Made-up records, the members and the others together."""

WIDTH = 64
"""Features of each."""

_SEPARATION = 1.5
_FLOOR = 1e-12


@dataclass(frozen=True, kw_only=True, slots=True)
class MembershipReport:
    """How well members are told from the rest by looking at the tuned head.

    Attributes:
        heads: how many were tuned and attacked.
        records: made-up records, half of them members of each head.
        private: with the plan's noise.
        without_noise: with none.
    """

    heads: int
    records: int
    private: Separation
    without_noise: Separation

    def to_record(self) -> dict[str, Any]:
        """Plain values: `heads`, `records`, `private` and `without_noise`, each {`auc`, `found_at_one_percent`}."""
        return {
            "heads": self.heads,
            "records": self.records,
            "private": self.private.to_record(),
            "without_noise": self.without_noise.to_record(),
        }


def attack_membership(
    plan: RunPlan, *, heads: int = HEADS, advance: Callable[[int], None] = lambda done: None
) -> MembershipReport:
    """Tune heads as the plan says on made-up records, and attack every one of them.

    Args:
        plan: the plan; one site of made-up records stands for all of them.
        heads: how many heads, 4 or more.
        advance: called with 1 after each of the 2 · `heads` heads.
    """
    alone = plan.model_copy(
        update={
            "cohort": Cohort(min_sites=1, nominal_units=RECORDS // 2),
            "privacy": plan.privacy.model_copy(update={"noise": "local"}),  # one site has nobody to share it with
            "evaluation": None,
            "simulation": None,
        }
    )
    population = _population(plan.task.form, len(plan.task.labels))
    members = _halves(heads)

    def separation(noise: Callable[[], NoiseSource]) -> Separation:
        confidence = []
        for chosen in members:
            confidence.append(_confidence(_tune(alone, _some(population, chosen), noise()), population))
            advance(1)
        return Separation.of(_likelihood_ratios(np.array(confidence), members).ravel(), members.ravel())

    return MembershipReport(
        heads=heads,
        records=RECORDS,
        private=separation(OSNoise),
        without_noise=separation(lambda: NoNoise(0, "attack", 0)),
    )


def _population(form: Form, labels: int) -> Units:
    """Records around one mean for each class, so close that some can only be learnt by heart; around the sum of the
    means of the labels that a record has, or so far along one as its number is large."""
    random = np.random.default_rng()
    means = random.normal(size=(labels, WIDTH)) * _SEPARATION / np.sqrt(WIDTH)
    truth: Targets = random.integers(0, labels, size=RECORDS)
    if form == "multilabel":
        truth = random.integers(0, 2, size=(RECORDS, labels)).astype(np.float64)
    elif form == "regression":
        truth = random.random(RECORDS)
    middle = means[truth] if form == "classification" else truth.reshape(RECORDS, labels) @ means
    features = middle + random.normal(size=(RECORDS, WIDTH))
    return Units(features=features, labels=truth, unit=np.arange(RECORDS), count=RECORDS)


def _halves(heads: int) -> NDArray[np.bool_]:
    """Which records are members of each head: a half, drawn anew, [heads, records]."""
    random = np.random.default_rng()
    return np.array([random.permutation(RECORDS) < RECORDS // 2 for _ in range(heads)])


def _some(population: Units, chosen: NDArray[np.bool_]) -> Units:
    count = int(chosen.sum())
    return Units(
        features=population.features[chosen], labels=population.labels[chosen], unit=np.arange(count), count=count
    )


def _tune(plan: RunPlan, units: Units, noise: NoiseSource) -> Adapter:
    """A whole run of one site, without transport."""
    descent = Descent.start(plan, initial_adapter(plan, WIDTH), sites=1)
    for release in schedule(plan):
        request = RoundRequest(
            plan=plan,
            job="attack",
            round=release.round,
            kind=release.kind,
            adapter=descent.adapter,
            nominal_units=descent.nominal_units,
        )
        descent.apply(release, [draw(request, release, units, noise)])
    return descent.adapter


def _confidence(adapter: Adapter, population: Units) -> NDArray[np.float64]:
    """Logit of the probability of each record's own label, [records]; of several labels, or of a number, of the one
    whose logarithm is their mean loss."""
    form = form_of(population.labels)
    right = np.exp(-OBJECTIVES[form].losses(predict(adapter, population.features, form), population.labels))
    logits: NDArray[np.float64] = np.log(right + _FLOOR) - np.log(1 - right + _FLOOR)
    return logits


def _likelihood_ratios(confidence: NDArray[np.float64], members: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Log of how much likelier a head's confidence is for a member; normal, fitted on the other heads.

    Both arguments and the answer are [heads, records].
    """
    ratios = []
    for head in range(len(confidence)):
        others = np.delete(confidence, head, axis=0)
        inside = np.delete(members, head, axis=0)
        mean_in = _mean(others, inside)
        mean_out = _mean(others, ~inside)
        spread = np.mean((others - np.where(inside, mean_in, mean_out)) ** 2, axis=0) + _FLOOR
        ratios.append(((confidence[head] - mean_out) ** 2 - (confidence[head] - mean_in) ** 2) / (2 * spread))
    return np.array(ratios)


def _mean(values: NDArray[np.float64], where: NDArray[np.bool_]) -> NDArray[np.float64]:
    counts = np.maximum(where.sum(axis=0), 1)
    means: NDArray[np.float64] = np.where(where, values, 0.0).sum(axis=0) / counts
    return means
