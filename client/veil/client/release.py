# SPDX-License-Identifier: Apache-2.0
"""Constrain, then noise, then release: the five things a site can send, each from its units to an Update.

Promises that nothing but lattice points with the mechanism's noise comes out, whatever the records are, also none.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
from numpy.typing import NDArray

from veil.client.gradient import clipped_head_sum, clipped_mean_sum, clipped_sum
from veil.client.head_batch import Batch
from veil.client.moment_sums import clipped_moment_sum
from veil.client.optimizer import LatticeOptimizer
from veil.client.units import Units
from veil.common.evaluation import EVALUATION
from veil.common.evaluation_forms import vector_rows, vector_size
from veil.common.exchange import RoundRequest
from veil.common.group_quality import group_rows
from veil.common.head import CENTRE, WEIGHT, predict
from veil.common.moments import STATISTICS, moments_size
from veil.common.noise import DrawnAhead, NoiseSource, clip_bound, privatize, spacing
from veil.common.objective import form_of
from veil.common.privacy import Mechanism
from veil.common.schedule import COUNT_WEIGHT, DEFAULT_LOCAL_RATE, DELTA_SPACING, Release, ReleaseKind
from veil.common.update import Adapter, Update


def draw(request: RoundRequest, release: Release, units: Units, noise: NoiseSource) -> Update:
    """Draw one release.

    Args:
        request: the round; its adapter is the starting point.
        release: the site's own schedule entry, already in the ledger.
        units: the site's records.
        noise: where randomness comes from.

    Raises:
        ValueError: for an evaluation without held-out units, as of a plan that has none.
    """
    if release.kind is ReleaseKind.CENTRE:
        return centre_update(units, release.mechanism, noise)
    if release.kind is ReleaseKind.EVALUATION:
        if units.held is None:
            raise ValueError("an evaluation of units none of which were held out; expected a plan with [evaluation]")
        groups = len(request.plan.groups)
        return evaluation_update(units.held, request.adapter, release.mechanism, noise, groups=groups)
    weight = request.adapter.tensors[WEIGHT].astype(np.float64)
    if release.kind is ReleaseKind.STATISTICS:
        return statistics_update(units, len(weight), release.mechanism, noise)
    batch = units.batch(request.adapter.tensors[CENTRE], classes=len(weight))
    if release.kind is ReleaseKind.GRADIENT:
        return gradient_update(weight, batch, release.mechanism, noise)
    return delta_update(
        weight,
        batch,
        release.mechanism,
        noise,
        learning_rate=request.plan.training.learning_rate or DEFAULT_LOCAL_RATE,
        nominal_units=request.nominal_units,
    )


def centre_update(units: Units, mechanism: Mechanism, noise: NoiseSource) -> Update:
    """The noised sum over units of [mean feature, 1/2], [d + 1]."""
    size = units.features.shape[1] + 1
    bound = clip_bound(mechanism.max_grad_norm, size)
    total = sum((clipped_mean_sum(piece.mean_rows(), COUNT_WEIGHT, bound) for piece in units.pieces()), np.zeros(size))
    return noised(CENTRE, total, mechanism, noise)


def statistics_update(units: Units, classes: int, mechanism: Mechanism, noise: NoiseSource) -> Update:
    """The noised sum over units of second moments and of features by class (one-shot), [`moments_size`]."""
    bound = clip_bound(mechanism.max_grad_norm, moments_size(units.features.shape[1], classes))
    return noised(STATISTICS, clipped_moment_sum(units, classes, bound), mechanism, noise)


def evaluation_update(
    held: Units,
    adapter: Adapter,
    mechanism: Mechanism,
    noise: NoiseSource,
    *,
    groups: int = 0,
    answer: Callable[[NDArray[np.floating]], NDArray[np.float64]] | None = None,
) -> Update:
    """The noised sum over held-out units of what the model gets right, gets wrong and loses on each, and of right and
    wrong answers by group, [`vector_size`]: see `vector_rows` and `group_rows`."""
    form = form_of(held.labels)
    size = vector_size(form, len(adapter.tensors[WEIGHT]), groups)
    bound, total = clip_bound(mechanism.max_grad_norm, size), np.zeros(size)
    answer = answer or partial(predict, adapter, form=form)
    for piece in held.pieces():
        answers = answer(piece.features)
        rows = vector_rows(answers, piece.labels)
        if groups and piece.groups is not None:
            rows = np.hstack([rows, group_rows(answers.argmax(axis=1) == piece.labels, piece.groups, groups)])
        means = piece.means(rows)
        total[: means.shape[1]] += clipped_sum(means, bound)
    return noised(EVALUATION, total, mechanism, noise)


def noised(name: str, total: NDArray[np.float64], mechanism: Mechanism, noise: NoiseSource) -> Update:
    """A clipped sum with the mechanism's noise, as the release's one tensor."""
    points = privatize(
        total,
        noise_multiplier=mechanism.noise_multiplier,
        max_grad_norm=mechanism.max_grad_norm,
        noise=noise,
    )
    return Update(points={name: points}, spacing=spacing(mechanism.max_grad_norm))


def gradient_update(weight: NDArray[np.float64], batch: Batch, mechanism: Mechanism, noise: NoiseSource) -> Update:
    """The noised sum over units, or a Poisson sample of them, of clipped gradients at `weight` (dp-fedsgd),
    [classes, d + 1]."""
    optimizer = LatticeOptimizer(weight, mechanism=mechanism, noise=noise)
    if mechanism.sample_rate < 1:
        batch = batch.take(noise.uniform(batch.count) < mechanism.sample_rate)
    _step(optimizer, batch, mechanism)
    _check_steps(optimizer, mechanism)
    return Update(points={WEIGHT: optimizer.points}, spacing=spacing(mechanism.max_grad_norm))


def delta_update(
    weight: NDArray[np.float64],
    batch: Batch,
    mechanism: Mechanism,
    noise: NoiseSource,
    *,
    learning_rate: float,
    nominal_units: float,
) -> Update:
    """What local DP-SGD on Poisson samples changed (dp-fedavg), [classes, d + 1].

    Every step counts, also one whose sample is empty: it adds its noise like any other.
    """
    noise = DrawnAhead(noise, normal=mechanism.steps * weight.size, uniform=mechanism.steps * batch.count)
    optimizer = LatticeOptimizer(
        weight,
        mechanism=mechanism,
        noise=noise,
        learning_rate=learning_rate,
        divisor=mechanism.sample_rate * nominal_units,
    )
    for _ in range(mechanism.steps):
        sampled = noise.uniform(batch.count) < mechanism.sample_rate
        _step(optimizer, batch.take(sampled), mechanism)
    _check_steps(optimizer, mechanism)
    change = optimizer.weight - weight
    return Update(points={WEIGHT: np.rint(change / DELTA_SPACING).astype(np.int64)}, spacing=DELTA_SPACING)


def _step(optimizer: LatticeOptimizer, batch: Batch, mechanism: Mechanism) -> None:
    bound = clip_bound(mechanism.max_grad_norm, optimizer.weight.size)
    optimizer.step(clipped_head_sum(optimizer.weight, batch, bound))


def _check_steps(optimizer: LatticeOptimizer, mechanism: Mechanism) -> None:
    if optimizer.steps_counted != mechanism.steps:
        raise RuntimeError(f"{optimizer.steps_counted} steps done; {mechanism.steps} were paid for")
