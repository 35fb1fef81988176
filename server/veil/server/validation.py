# SPDX-License-Identifier: Apache-2.0
"""Whether a reply may touch the model: its job, round, tensor, shape, lattice and length.

Promises that no reply weighs more than the largest site the plan allows for, but for the rounding that such a site's
own update would see (at most twice as much), and that an honest reply passes: the chance that its noise alone exceeds
the bound is below 1e-8.
"""

from __future__ import annotations

import math

import numpy as np

from veil.common.exchange import RoundReply
from veil.common.schedule import CENTRE_NORM, COUNT_WEIGHT, DEFAULT_LOCAL_RATE, Release, ReleaseKind
from veil.common.update import Points, Update, doublings
from veil.common.wire import WireError
from veil.server.descent import Descent

_DEVIATIONS = 6.0
"""A Gaussian leaves ±6σ with chance 2e-9; the length of a Gaussian vector exceeds σ(√d + 6) with less (Laurent and
Massart 2000)."""


def validate(reply: RoundReply, job: str, release: Release, descent: Descent, *, units: float | None) -> Update | None:
    """A reply's update, or None for a refusal.

    Args:
        reply: what a site sent.
        job: the run.
        release: the round.
        descent: the state; knows tensor and shape.
        units: the site's own noisy count of units, None when it released none.

    Raises:
        WireError: for another job or round, a tensor that is not the one asked for, integers of another width, a
            lattice that is not the plan's or coarser than it need be, or an update that is too long.
    """
    if reply.update is None:
        return None
    if (reply.job, reply.round) != (job, release.round):
        raise WireError(f"a reply to round {reply.round} of {reply.job}")
    name, shape = descent.expected_shape(release)
    if set(reply.update.points) != {name} or reply.update.points[name].shape != shape:
        raise WireError(f"an update of other tensors than {name} {shape}")
    length = shortest(reply.update.points[name], reply.update.spacing, release)
    bound = longest(release, descent, math.prod(shape), units)
    if not length <= bound:
        raise WireError(f"an update of length {length:.4g}, above {bound:.4g}")
    return reply.update


def shortest(points: Points, spacing: float, release: Release) -> float:
    """Length of the shortest update that `Update.narrowed` turns into these points.

    A coarse lattice wins nothing: no number was further than half a step from its point, and the largest one did not
    fit on a lattice half as wide.

    Raises:
        WireError: for points that it cannot have made.
    """
    if points.dtype != np.dtype(f"int{release.update_bits}"):
        raise WireError(f"an update of {points.dtype}; expected int{release.update_bits}")
    try:
        k = doublings(spacing, release.spacing)
    except ValueError as error:
        raise WireError(f"an update on another lattice: {error}") from None
    sizes = np.abs(points.astype(np.float64))
    if k and sizes.max(initial=0.0) < 2 ** (release.update_bits - 2):
        raise WireError(f"an update on a lattice {2**k} times as wide, which its numbers do not need")
    return float(np.linalg.norm(np.maximum(sizes - 0.5, 0.0) if k else sizes)) * spacing


def counted_units(update: Update, release: Release) -> float | None:
    """A site's noisy number of units plus what noise and rounding may hide, from its centring release; None for other
    kinds."""
    if release.kind is not ReleaseKind.CENTRE:
        return None
    (points,) = update.points.values()
    deviation = release.mechanism.noise_multiplier * CENTRE_NORM
    return max(1.0, ((float(points[-1]) + 0.5) * update.spacing + _DEVIATIONS * deviation) / COUNT_WEIGHT)


def longest(release: Release, descent: Descent, size: int, units: float | None) -> float:
    """The largest length an honest update of a site with so many units has.

    Args:
        release: its kind and mechanism.
        descent: for the divisor of local steps.
        size: how many numbers it holds.
        units: upper bound on the site's units that train; the plan's `cohort.max_units` where None.
    """
    mechanism, cohort, evaluation = release.mechanism, descent.plan.cohort, descent.plan.evaluation
    if release.kind is ReleaseKind.EVALUATION and units is not None and evaluation is not None:
        units = most_held_out(units, evaluation.holdout)
    most = min(float(cohort.max_units), math.inf if units is None else units)
    noise = mechanism.noise_multiplier * (math.sqrt(size) + _DEVIATIONS)
    total = mechanism.max_grad_norm * (most + noise)
    if release.kind is not ReleaseKind.DELTA:
        return total
    rate = descent.plan.training.learning_rate or DEFAULT_LOCAL_RATE
    return mechanism.steps * rate * total / (mechanism.sample_rate * descent.nominal_units)


def most_held_out(training: float, holdout: float) -> float:
    """The most units a site holds out of which so many train, each held out with the same chance: 1e-8 have more.

    By Hoeffding (1963), of n units less than n·holdout + d√n are held out, with d² = ln(10⁸)/2.

    Args:
        training: how many train, at most.
        holdout: chance of a unit to be held out.
    """
    deviation = math.sqrt(math.log(1e8) / 2)
    root = deviation + math.sqrt(deviation**2 + 4 * (1 - holdout) * training)
    units = (root / (2 * (1 - holdout))) ** 2
    return holdout * units + deviation * math.sqrt(units)
