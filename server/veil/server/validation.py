# SPDX-License-Identifier: Apache-2.0
"""Whether a reply may touch the model: its job, round, tensor, shape, lattice and length.

Promises that no reply weighs more than the largest site the plan allows for, but for the rounding that such a site's
own update would see (at most twice as much), and that an honest reply passes: the chance that its noise alone exceeds
the bound is below 1e-8.
"""

from __future__ import annotations

import math

import numpy as np

from veil.common.errors import RunError
from veil.common.exchange import RoundReply
from veil.common.moments import CLASS_WEIGHT
from veil.common.noise import clip_bound
from veil.common.privacy import NoiseShares
from veil.common.schedule import COUNT_WEIGHT, DEFAULT_LOCAL_RATE, Release, ReleaseKind
from veil.common.update import MaskedUpdate, Points, Update, doublings
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
    if reply.refusal is not None:
        return None
    if reply.update is None:
        raise WireError("masked numbers where single updates were asked for")
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


def validate_masked(reply: RoundReply, job: str, release: Release, descent: Descent) -> MaskedUpdate | None:
    """A masked reply, or None for a refusal; what is behind the masks, only the sum of all shows.

    Raises:
        WireError: for another job or round, a tensor that is not the one asked for, or another lattice.
    """
    if reply.refusal is not None:
        return None
    if reply.masked is None:
        raise WireError("an update without masks")
    if (reply.job, reply.round) != (job, release.round):
        raise WireError(f"a reply to round {reply.round} of {reply.job}")
    name, shape = descent.expected_shape(release)
    if set(reply.masked.words) != {name} or reply.masked.words[name].shape != shape:
        raise WireError(f"masked numbers of other tensors than {name} {shape}")
    if reply.masked.spacing != release.spacing:
        raise WireError(f"masked numbers on a lattice of spacing {reply.masked.spacing:g}")
    return reply.masked


def check_sum(total: Update, release: Release, descent: Descent, shares: NoiseShares, *, units: float | None) -> None:
    """Refuse a masked sum that is longer than honest sites' could be: somebody in the cohort did not clip, or lied.

    Who it was stays hidden; the model was not touched.

    Args:
        total: the sum.
        release: its round.
        descent: for the divisor of local steps.
        shares: how the noise was shared.
        units: upper bound on the units of all members; the plan's `cohort.max_units` each where None.

    Raises:
        RunError: naming the length and the bound.
    """
    (points,) = total.points.values()
    mechanism = release.mechanism
    most = shares.sites * float(descent.plan.cohort.max_units) if units is None else units
    if release.kind is ReleaseKind.EVALUATION and units is not None and descent.plan.evaluation is not None:
        most = most_held_out(units, descent.plan.evaluation.holdout)
    noise = mechanism.noise_multiplier * math.sqrt(shares.excess) * (math.sqrt(points.size) + _DEVIATIONS)
    bound = mechanism.max_grad_norm * (most + noise)
    length = float(np.linalg.norm(points.astype(np.float64))) * total.spacing
    if not length <= bound:
        raise RunError(
            f"the masked sum of round {release.round} has length {length:.4g}",
            f"at most {bound:.4g}, as {shares.sites} honest sites' has",
            'a site sent what it must not; privacy.noise = "local" shows single updates, and which one it is',
        )


def counted_together(total: Update, release: Release, shares: NoiseShares, classes: int) -> float | None:
    """The members' noisy number of units plus what noise may hide, from their masked sum; None for kinds without."""
    return _counted(total, release, classes, noises=shares.excess, rounded=0.0)


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


def counted_units(update: Update, release: Release, classes: int) -> float | None:
    """A site's noisy number of units plus what noise and rounding may hide, from its first release; None for other
    kinds than those that count."""
    return _counted(update, release, classes, noises=1.0, rounded=0.5)


def _counted(update: Update, release: Release, classes: int, *, noises: float, rounded: float) -> float | None:
    """`noises` is the variance of the noise in units of the mechanism's, `rounded` how far a number may be from its
    point."""
    counting = {ReleaseKind.CENTRE: (1, COUNT_WEIGHT), ReleaseKind.STATISTICS: (classes, CLASS_WEIGHT)}
    if release.kind not in counting:
        return None
    (points,) = update.points.values()
    last, weight = counting[release.kind]
    mechanism = release.mechanism
    deviation = mechanism.noise_multiplier * mechanism.max_grad_norm * math.sqrt(last * noises)
    counted = (float(points[-last:].sum(dtype=np.int64)) + rounded * last) * update.spacing
    clipped = clip_bound(mechanism.max_grad_norm, points.size) / mechanism.max_grad_norm
    return max(1.0, (counted + _DEVIATIONS * deviation) / (weight * clipped))


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
