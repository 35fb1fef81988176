# SPDX-License-Identifier: Apache-2.0
"""Constrain, then noise, then release, for a model that is tuned below its head.

Promises what `veil.client.release` promises, with the same mechanisms.
"""

from __future__ import annotations

import numpy as np

from veil.client.gradient import clipped_sum
from veil.client.release import centre_update, draw, evaluation_update, noised
from veil.client.tuned_gradient import clipped_tuned_sum
from veil.client.tuned_units import TunedUnits
from veil.client.units import Units
from veil.common.evaluation import EVALUATION
from veil.common.evaluation_forms import outcome_vectors, vector_size
from veil.common.exchange import RoundRequest
from veil.common.noise import NoiseSource, clip_bound
from veil.common.plan_sections import Task
from veil.common.privacy import Mechanism
from veil.common.schedule import Release, ReleaseKind
from veil.common.trained import GRADIENT, gradient_scale, of_head, released_size, trained_in
from veil.common.update import Update

_PIECE = 1024
"""Records that are judged at once."""


def draw_tuned(request: RoundRequest, release: Release, units: TunedUnits, noise: NoiseSource) -> Update:
    """Draw one release.

    Args:
        request: the round; its adapter is the starting point.
        release: the site's own schedule entry, already in the ledger.
        units: the site's records, and the model.
        noise: where randomness comes from.

    Raises:
        ValueError: for an evaluation without held-out units, or a kind that no plan of such a model has.
    """
    match release.kind:
        case ReleaseKind.CENTRE:
            return centre_update(units.pooled, release.mechanism, noise)
        case ReleaseKind.GRADIENT if of_head(request.plan, release.round):
            return draw(request, release, units.pooled, noise)
        case ReleaseKind.GRADIENT:
            return tuned_gradient_update(request, release, units, noise)
        case ReleaseKind.EVALUATION if units.rows.held is not None:
            with units.model.at(request.adapter):
                if units.truths is not None:
                    return outcome_update(units.rows.held, units, request.plan.task, release.mechanism, noise)
                return evaluation_update(
                    units.rows.held,
                    request.adapter,
                    release.mechanism,
                    noise,
                    groups=len(request.plan.groups),
                    answer=lambda places: units.model.probabilities(units.at(places), zero_unreadable=True),
                )
    raise ValueError(f"a release of kind {release.kind} of a tuned model; expected centre, gradient or evaluation")


def outcome_update(held: Units, units: TunedUnits, task: Task, mechanism: Mechanism, noise: NoiseSource) -> Update:
    """The noised sum over held-out units of how good the model's answers with a structure are, [`vector_size`]."""
    labels = len(task.labels)
    total = np.zeros(vector_size(task.form, labels))
    bound = clip_bound(mechanism.max_grad_norm, total.size)
    for piece in held.pieces(_PIECE):
        outcomes = units.model.outcomes(units.at(piece.features), units.truths_at(piece.features))
        total += clipped_sum(piece.means(outcome_vectors(outcomes, task.form, labels)), bound)
    return noised(EVALUATION, total, mechanism, noise)


def tuned_gradient_update(request: RoundRequest, release: Release, units: TunedUnits, noise: NoiseSource) -> Update:
    """The noised sum over sampled units of clipped gradients, as one vector: see `veil.common.trained`."""
    mechanism = release.mechanism
    trained = trained_in(request.plan, release.round, units.model.shapes)
    size = released_size(units.model.shapes, trained)
    sampled = noise.uniform(units.count) < mechanism.sample_rate
    bound = clip_bound(mechanism.max_grad_norm, size)
    scale = gradient_scale(request.plan)
    total = clipped_tuned_sum(units, request.adapter, trained, sampled, bound, scale)
    return noised(GRADIENT, total, mechanism, noise)
