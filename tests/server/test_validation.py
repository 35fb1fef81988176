# SPDX-License-Identifier: Apache-2.0
"""Tests of `veil.server.validation`: an honest reply passes, and nothing that weighs more than an honest one does."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import binom, chi, norm

from veil.client.gradient import clipped_head_sum
from veil.client.head_batch import HeadBatch
from veil.client.release import delta_update
from veil.client.units import Units
from veil.common.errors import RefusalCode
from veil.common.evaluation import EVALUATION_NORM
from veil.common.exchange import RoundReply
from veil.common.head import CENTRE, WEIGHT, initial_adapter
from veil.common.moments import CLASS_WEIGHT, MOMENTS_NORM, STATISTICS, moments_size
from veil.common.noise import clip_bound, privatize
from veil.common.plan import RunPlan
from veil.common.privacy import Mechanism, NoiseShares
from veil.common.schedule import CENTRE_NORM, COUNT_WEIGHT, Release, ReleaseKind
from veil.common.update import Update
from veil.common.wire import WireError
from veil.server.descent import Descent
from veil.server.validation import counted_together, counted_units, longest, most_held_out, validate

WIDTH, UNITS, CLASSES = 3, 20, 2
GRADIENT = Release(round=1, kind=ReleaseKind.GRADIENT, mechanism=Mechanism(noise_multiplier=2.0, max_grad_norm=0.5))
MEAN = Release(round=0, kind=ReleaseKind.CENTRE, mechanism=Mechanism(noise_multiplier=2.0, max_grad_norm=CENTRE_NORM))
DELTA = Release(
    round=1,
    kind=ReleaseKind.DELTA,
    mechanism=Mechanism(noise_multiplier=1.0, max_grad_norm=0.1, sample_rate=0.5, steps=4),
)
MOMENTS = Release(
    round=1, kind=ReleaseKind.STATISTICS, mechanism=Mechanism(noise_multiplier=2.0, max_grad_norm=MOMENTS_NORM)
)
SHAPES = {
    GRADIENT: (WEIGHT, (CLASSES, WIDTH + 1)),
    MEAN: (CENTRE, (WIDTH + 1,)),
    DELTA: (WEIGHT, (CLASSES, WIDTH + 1)),
    MOMENTS: (STATISTICS, (moments_size(WIDTH, CLASSES),)),
}
EACH_KIND = pytest.mark.parametrize("release", list(SHAPES), ids=lambda release: release.kind.value)


class LargestNoise:
    """The noise of one day in a billion: its length is √d + 5.9 σ, all of it in one direction."""

    name, private = "largest", False

    def __init__(self, direction: NDArray[np.float64]) -> None:
        flat = direction.ravel()
        self._draws = flat / np.linalg.norm(flat) * (math.sqrt(flat.size) + 5.9)

    def gaussian(self, count: int) -> NDArray[np.float64]:
        assert count % self._draws.size == 0
        return np.resize(self._draws, count)

    def uniform(self, count: int) -> NDArray[np.float64]:
        return np.zeros(count)


@pytest.fixture
def descent(make_plan: Callable[..., RunPlan]) -> Descent:
    return started(make_plan())


def started(plan: RunPlan) -> Descent:
    """A run whose sites have a public number of units."""
    cohort = plan.cohort.model_copy(update={"nominal_units": UNITS, "max_units": UNITS})
    plan = plan.model_copy(update={"cohort": cohort})
    return Descent.start(plan, initial_adapter(plan, WIDTH), sites=2)


def reply(update: Update, release: Release, **change: Any) -> RoundReply:
    return RoundReply(**{"site": "s", "job": "j", "round": release.round, "update": update, **change})


def filled(release: Release, *points: int) -> Update:
    """All of its length in the first numbers, as it would be sent."""
    name, shape = SHAPES[release]
    tensor = np.zeros(shape, np.int64)
    tensor.flat[: len(points)] = points
    return Update(points={name: tensor}, spacing=release.spacing).narrowed(release.update_bits)


def check(update: Update, release: Release, descent: Descent, units: float | None = None) -> Update | None:
    return validate(reply(update, release), "j", release, descent, units=units)


@EACH_KIND
@pytest.mark.parametrize("units", [None, 7.5, 1e9])
def test_the_bound_is_met_to_the_point(release: Release, descent: Descent, units: float | None) -> None:
    size = math.prod(SHAPES[release][1])
    most = math.floor(longest(release, descent, size, units) / release.spacing)
    for sign in (1, -1):
        assert check(filled(release, sign * most), release, descent, units) is not None
        with pytest.raises(WireError, match="an update of length"):
            check(filled(release, sign * (most + 1)), release, descent, units)


def test_the_bound_by_hand(descent: Descent) -> None:
    """C (units + σ (√d + 6)); a local step moves by rate / (q · nominal units) of it."""
    assert longest(GRADIENT, descent, 16, None) == pytest.approx(0.5 * (20 + 2 * (4 + 6)))
    assert longest(GRADIENT, descent, 16, 10.0) == pytest.approx(0.5 * (10 + 2 * (4 + 6)))
    assert longest(GRADIENT, descent, 16, 1e9) == longest(GRADIENT, descent, 16, None)
    assert longest(DELTA, descent, 16, None) == pytest.approx(4 * 4.0 * 0.1 * (20 + 1 * (4 + 6)) / (0.5 * 20))


@pytest.mark.parametrize("bits", [8, 16, 32])
@pytest.mark.parametrize("release", [GRADIENT, MEAN, MOMENTS], ids=lambda release: release.kind.value)
def test_an_honest_extreme_passes(release: Release, bits: int, descent: Descent) -> None:
    """Every unit pulls in one direction, as far as clipping lets it, and the noise does the same."""
    name, shape = SHAPES[release]
    direction = np.arange(1.0, 1.0 + math.prod(shape)).reshape(shape)
    bound = release.mechanism.max_grad_norm
    clipped = direction / np.linalg.norm(direction) * clip_bound(bound, direction.size) * UNITS
    points = privatize(
        clipped,
        noise_multiplier=release.mechanism.noise_multiplier,
        max_grad_norm=bound,
        noise=LargestNoise(direction),
    )
    update = Update(points={name: points}, spacing=release.spacing).narrowed(bits)
    release = replace(release, update_bits=bits)
    assert check(update, release, descent) is update
    with pytest.raises(WireError):
        check(update, release, descent, units=UNITS / 2)


def test_an_honest_extreme_of_local_steps_passes(make_plan: Callable[..., RunPlan]) -> None:
    """The client's own steps, small enough to be clipped each, every unit sampled, the noise along the gradient."""
    descent = started(make_plan(training={"learning_rate": 0.5}))
    units = Units(
        features=np.ones((UNITS, WIDTH)),
        labels=np.zeros(UNITS, np.int64),
        unit=np.arange(UNITS),
        count=UNITS,
    )
    batch = HeadBatch.of(units, descent.centre)
    update = delta_update(
        descent.weight,
        batch,
        DELTA.mechanism,
        LargestNoise(clipped_head_sum(descent.weight, batch, 1.0)),
        learning_rate=0.5,
        nominal_units=descent.nominal_units,
    ).narrowed(DELTA.update_bits)
    assert check(update, DELTA, descent) is update
    length = float(np.linalg.norm(update.points[WEIGHT])) * update.spacing
    assert 0.95 < length / longest(DELTA, descent, 8, None) < 1
    longer = Update(points={WEIGHT: update.points[WEIGHT] * 5 // 4}, spacing=update.spacing)
    with pytest.raises(WireError, match="an update of length"):
        check(longer, DELTA, descent)


JUDGED = Release(
    round=4, kind=ReleaseKind.EVALUATION, mechanism=Mechanism(noise_multiplier=6.0, max_grad_norm=EVALUATION_NORM)
)


@pytest.mark.parametrize("holdout", [0.05, 0.2, 0.5])
@pytest.mark.parametrize("training", [1, 40, 10_000])
def test_the_bound_on_units_held_out_is_met_by_no_honest_site(holdout: float, training: int) -> None:
    """Of whatever number of units, so few train and so many are held out with a chance below 1e-8."""
    most = most_held_out(training, holdout)
    for units in np.unique(np.geomspace(1, 10 * most + 10 * training, 60).astype(np.int64)):
        assert binom.sf(max(most, units - training - 1), units, holdout) < 1e-8
    assert most < 1.5 * training * holdout / (1 - holdout) + 12 * math.sqrt(training) + 40


def test_an_evaluation_is_bounded_by_the_units_a_site_can_hold_out(make_plan: Callable[..., RunPlan]) -> None:
    descent = started(make_plan(evaluation={"holdout": 0.2}))
    noise = 6.0 * (math.sqrt(7) + 6.0)
    assert longest(JUDGED, descent, 7, None) == pytest.approx(EVALUATION_NORM * (UNITS + noise))
    assert longest(JUDGED, descent, 7, 2.0) == pytest.approx(EVALUATION_NORM * (most_held_out(2.0, 0.2) + noise))
    assert longest(JUDGED, descent, 7, 1e9) == longest(JUDGED, descent, 7, None)


@pytest.mark.parametrize("size", [1, 2, 10, 770, 10**4, 10**7])
def test_noise_alone_exceeds_the_bound_less_than_once_in_a_hundred_million(size: int) -> None:
    assert chi.sf(math.sqrt(size) + 6.0, df=size) < 1e-8
    assert norm.sf(6.0) < 1e-8


@EACH_KIND
@pytest.mark.parametrize("change", [{"job": "other"}, {"round": 2}, {"round": -1}])
def test_a_reply_to_something_else_is_refused(release: Release, descent: Descent, change: dict[str, Any]) -> None:
    with pytest.raises(WireError, match="a reply to round"):
        validate(reply(filled(release, 1), release, **change), "j", release, descent, units=None)


@pytest.mark.parametrize(
    ("release", "sent"), [(GRADIENT, MEAN), (MEAN, GRADIENT), (DELTA, MEAN)], ids=["gradient", "centre", "delta"]
)
def test_a_release_of_another_kind_is_refused(release: Release, sent: Release, descent: Descent) -> None:
    with pytest.raises(WireError, match="an update of other tensors"):
        check(filled(sent, 1), release, descent)


@EACH_KIND
@pytest.mark.parametrize("shape", [(), (0,), (4, 2), (2, 5), (5,), (1, 4), (8,)])
def test_another_shape_is_refused(release: Release, descent: Descent, shape: tuple[int, ...]) -> None:
    name, _ = SHAPES[release]
    with pytest.raises(WireError, match="an update of other tensors"):
        check(Update(points={name: np.zeros(shape, np.int32)}, spacing=release.spacing), release, descent)


@EACH_KIND
def test_a_tensor_too_few_or_too_many_is_refused(release: Release, descent: Descent) -> None:
    name, shape = SHAPES[release]
    for names in ([], [name, "extra"], ["backbone"]):
        points = {one: np.zeros(shape, np.int32) for one in names}
        with pytest.raises(WireError, match="an update of other tensors"):
            check(Update(points=points, spacing=release.spacing), release, descent)


@EACH_KIND
@pytest.mark.parametrize("spacing", [math.nan, math.inf, -1.0, 0.0, 5 * 2.0**-10, 2.0**-70, 2.0**60])
def test_another_lattice_is_refused(release: Release, descent: Descent, spacing: float) -> None:
    """Points are integers, so that NaN and infinity could only come in as their unit."""
    name, shape = SHAPES[release]
    with pytest.raises(WireError, match="another lattice"):
        check(Update(points={name: np.zeros(shape, np.int32)}, spacing=spacing), release, descent)


@EACH_KIND
@pytest.mark.parametrize("width", ["float32", "float64", "int8", "int16", "int64", "uint32", ">i4"])
def test_numbers_of_another_width_are_refused(release: Release, descent: Descent, width: str) -> None:
    """Should the wire ever let them through."""
    name, shape = SHAPES[release]
    tensor: Any = np.ones(shape, width)
    with pytest.raises(WireError, match="expected int32"):
        check(Update(points={name: tensor}, spacing=release.spacing), release, descent)


@EACH_KIND
@pytest.mark.parametrize("bits", [8, 16, 32])
def test_a_coarse_lattice_wins_a_liar_nothing_but_rounding(release: Release, bits: int, descent: Descent) -> None:
    """Points whose numbers would fit a finer lattice are refused, and the others are judged by what they round."""
    name, shape = SHAPES[release]
    release = replace(release, update_bits=bits)
    bound = longest(release, descent, math.prod(shape), None)
    longest_taken = 0.0
    for k in range(63):
        spacing, largest = math.ldexp(release.spacing, k), 2 ** (bits - 1) - 1
        for points in {1, largest // 2, largest // 2 + 1, largest, min(largest, math.floor(bound / spacing) - 1)}:
            tensor = np.ones(shape, f"int{bits}")
            tensor.flat[0] = points
            update = Update(points={name: tensor}, spacing=spacing)
            with suppress(WireError):
                check(update, release, descent)
                assert k == 0 or points >= 2 ** (bits - 2)
                longest_taken = max(longest_taken, float(np.linalg.norm(tensor.astype(float))) * spacing)
    assert bound / 3 < longest_taken < bound * (1 + 2.0 ** (3 - bits))


@EACH_KIND
@pytest.mark.parametrize("points", [-(2**31), 2**31 - 1])
def test_the_largest_integers_do_not_wrap_round(release: Release, descent: Descent, points: int) -> None:
    name, shape = SHAPES[release]
    with pytest.raises(WireError, match="an update of length"):
        check(Update(points={name: np.full(shape, points, np.int32)}, spacing=release.spacing), release, descent)


def test_a_refusal_is_no_update(descent: Descent) -> None:
    refusal = RoundReply(site="s", job="j", round=1, refusal=RefusalCode.BUDGET)
    assert validate(refusal, "j", GRADIENT, descent, units=None) is None


@pytest.mark.parametrize("units", [1, 40, 10_000])
@pytest.mark.parametrize("luck", [-5.9, 0.0, 5.9])
def test_the_counted_units_are_no_fewer_than_there_are(units: int, luck: float) -> None:
    """However the noise fell; and the excess is twelve deviations of it at most."""
    deviation = MEAN.mechanism.noise_multiplier * CENTRE_NORM
    released = COUNT_WEIGHT * units + luck * deviation
    counted = counted_units(filled_last(round(released / MEAN.spacing)), MEAN, CLASSES)
    assert counted is not None
    assert units <= counted <= units + 12 * deviation / COUNT_WEIGHT


@pytest.mark.parametrize("luck", [-5.9, 0.0, 5.9])
def test_the_classes_of_one_message_are_counted_together(luck: float) -> None:
    """Ten units of one class and thirty of the other; the noise of both adds up."""
    deviation = MOMENTS.mechanism.noise_multiplier * MOMENTS_NORM * math.sqrt(CLASSES)
    points = np.zeros(SHAPES[MOMENTS][1], np.int64)
    points[-2:] = np.rint((CLASS_WEIGHT * np.array([10, 30]) + luck * deviation / CLASSES) / MOMENTS.spacing)
    one = Update(points={STATISTICS: points}, spacing=MOMENTS.spacing)
    counted = counted_units(one, MOMENTS, CLASSES)
    together = counted_together(one, MOMENTS, NoiseShares(sites=3, colluding=0), CLASSES)
    assert counted is not None and together == pytest.approx(counted, rel=1e-5)
    assert 40 <= counted <= 40 + 12 * deviation / CLASS_WEIGHT


def test_a_negative_count_leaves_one_unit() -> None:
    assert counted_units(filled_last(-(2**62)), MEAN, CLASSES) == 1.0


@pytest.mark.parametrize("release", [GRADIENT, DELTA], ids=lambda release: release.kind.value)
def test_no_other_kind_counts(release: Release) -> None:
    assert counted_units(filled(release, 1), release, CLASSES) is None


def filled_last(points: int) -> Update:
    """A centring release that says no more than a count."""
    tensor = np.zeros(WIDTH + 1, np.int64)
    tensor[-1] = points
    return Update(points={CENTRE: tensor}, spacing=MEAN.spacing).narrowed(MEAN.update_bits)
