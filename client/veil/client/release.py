# SPDX-License-Identifier: Apache-2.0
"""Constrain, then noise, then release: the four things a site can send, each from its units to an Update.

Promises that nothing but lattice points with the mechanism's noise comes out, whatever the records are, also none.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from veil.client.gradient import clipped_head_sum, clipped_mean_sum, clipped_sum
from veil.client.head_batch import Batch
from veil.client.optimizer import LatticeOptimizer
from veil.client.units import Units
from veil.common.evaluation import EVALUATION, outcome_rows, released_size
from veil.common.exchange import RoundRequest
from veil.common.head import CENTRE, WEIGHT, predict
from veil.common.noise import DrawnAhead, NoiseSource, clip_bound, privatize, spacing
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
        return evaluation_update(units.held, request.adapter, release.mechanism, noise)
    weight = request.adapter.tensors[WEIGHT].astype(np.float64)
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
    return _noised(CENTRE, total, mechanism, noise)


def evaluation_update(held: Units, adapter: Adapter, mechanism: Mechanism, noise: NoiseSource) -> Update:
    """The noised sum over held-out units of what the model gets right, gets wrong and loses on each,
    [2 classes + 3]: see `outcome_rows`."""
    size = released_size(len(adapter.tensors[WEIGHT]))
    bound, total = clip_bound(mechanism.max_grad_norm, size), np.zeros(size)
    for piece in held.pieces():
        rows = outcome_rows(predict(adapter, piece.features), piece.labels)
        total += clipped_sum(piece.means(rows), bound)
    return _noised(EVALUATION, total, mechanism, noise)


def _noised(name: str, total: NDArray[np.float64], mechanism: Mechanism, noise: NoiseSource) -> Update:
    points = privatize(
        total,
        noise_multiplier=mechanism.noise_multiplier,
        max_grad_norm=mechanism.max_grad_norm,
        noise=noise,
    )
    return Update(points={name: points}, spacing=spacing(mechanism.max_grad_norm))


def gradient_update(weight: NDArray[np.float64], batch: Batch, mechanism: Mechanism, noise: NoiseSource) -> Update:
    """The noised sum over units of clipped gradients at `weight` (dp-fedsgd), [classes, d + 1]."""
    optimizer = LatticeOptimizer(weight, mechanism=mechanism, noise=noise)
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
