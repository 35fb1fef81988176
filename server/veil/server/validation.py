# SPDX-License-Identifier: Apache-2.0
"""Whether a reply may touch the model: its job, round, tensor, shape, lattice and length.

Promises that no reply weighs more than the largest site the plan allows for, and that an honest reply passes: the
chance that its noise alone exceeds the bound is below 1e-8.
"""

from __future__ import annotations

import math

import numpy as np

from veil.common.exchange import RoundReply
from veil.common.schedule import CENTRE_NORM, COUNT_WEIGHT, DEFAULT_LOCAL_RATE, Release, ReleaseKind
from veil.common.update import Update
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
        WireError: for another job or round, a tensor that is not the one asked for, or one that is too long.
    """
    if reply.update is None:
        return None
    if (reply.job, reply.round) != (job, release.round):
        raise WireError(f"a reply to round {reply.round} of {reply.job}")
    name, shape = descent.expected_shape(release)
    if set(reply.update.points) != {name} or reply.update.points[name].shape != shape:
        raise WireError(f"an update of other tensors than {name} {shape}")
    if reply.update.spacing != release.spacing:
        raise WireError("an update on another lattice")
    numbers = reply.update.points[name].astype(np.float64) * reply.update.spacing
    bound = longest(release, descent, numbers.size, units)
    if not float(np.linalg.norm(numbers)) <= bound:
        raise WireError(f"an update of length {float(np.linalg.norm(numbers)):.4g}, above {bound:.4g}")
    return reply.update


def counted_units(update: Update, release: Release) -> float | None:
    """A site's noisy number of units plus what its noise may hide, from its centring release; None for other kinds."""
    if release.kind is not ReleaseKind.CENTRE:
        return None
    (points,) = update.points.values()
    deviation = release.mechanism.noise_multiplier * CENTRE_NORM
    return max(1.0, (float(points[-1]) * update.spacing + _DEVIATIONS * deviation) / COUNT_WEIGHT)


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
