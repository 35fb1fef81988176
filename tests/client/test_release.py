# SPDX-License-Identifier: Apache-2.0
"""Tests of `veil.client.release` and its optimizer: each kind of release carries the noise that was paid for.

Each statistical check passes on the real code (false alarms: below once in 10⁶ runs) and fails on a broken variant.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import binomtest

from veil.client import release
from veil.client.gradient import clipped_head_sum, clipped_mean_sum
from veil.client.head_batch import HeadBatch
from veil.client.optimizer import LatticeOptimizer
from veil.client.release import (
    centre_update,
    delta_update,
    draw,
    evaluation_update,
    gradient_update,
    statistics_update,
)
from veil.client.units import Units
from veil.common.evaluation import EVALUATION, EVALUATION_NORM
from veil.common.exchange import RoundRequest
from veil.common.head import CENTRE, WEIGHT, unit_rows
from veil.common.moments import MOMENTS_NORM, STATISTICS, Moments
from veil.common.noise import NoiseSource, OSNoise, clip_bound, spacing
from veil.common.plan import RunPlan
from veil.common.plan_sections import Evaluation
from veil.common.privacy import Mechanism
from veil.common.schedule import COUNT_WEIGHT, ReleaseKind, schedule
from veil.common.update import Adapter, Update
from veil.simulations.unprivate_noise import NoNoise

Floats = NDArray[np.float64]
Release = Callable[[NoiseSource], Update]
FIVE = 5.1
"""Standard errors allowed: beyond them once in 3·10⁶."""

CLASSES, WIDTH = 5, 200
ONE_SHOT = {"algorithm": "one-shot", "rounds": 1}


class Halved(OSNoise):
    """A broken source: half the noise that is paid for."""

    def gaussian(self, count: int) -> Floats:
        return 0.5 * super().gaussian(count)


class Weaker(OSNoise):
    """A near lie."""

    def gaussian(self, count: int) -> Floats:
        return 0.97 * super().gaussian(count)


def silent() -> NoiseSource:
    return NoNoise(0, "site", 0)


def residuals(release_: Release, noise: NoiseSource, name: str, scale: float, times: int) -> Floats:
    """What was added to the clean sum, over what should have been its standard deviation."""
    clean = release_(silent()).points[name]
    added: list[Floats] = []
    for _ in range(times):
        update = release_(noise)
        added.append(np.asarray((update.points[name] - clean).ravel() * update.spacing / scale, np.float64))
    return np.concatenate(added)


def has_unit_noise(added: Floats) -> bool:
    """Mean 0 and variance 1."""
    centred = abs(added.mean()) < FIVE / math.sqrt(len(added))
    return bool(centred and abs(np.mean(added**2) - 1) < FIVE * math.sqrt(2 / len(added)))


def mechanism(sigma: float = 2.0, **change: Any) -> Mechanism:
    return Mechanism(**{"noise_multiplier": sigma, "max_grad_norm": 0.5, **change})


def weight_at(scale: float) -> Floats:
    weight: Floats = scale * np.random.default_rng(4).normal(size=(CLASSES, WIDTH + 1))
    return weight


@pytest.fixture(params=[0, 7], ids=["empty", "seven units"])
def records(request: pytest.FixtureRequest, make_units: Callable[..., Units]) -> Units:
    return make_units(request.param, most=3, width=WIDTH)


@pytest.mark.statistical
def test_a_centre_carries_its_noise(records: Units) -> None:
    """False alarm: 7e-7 a case. No noise, half of it and 97 % of it are noticed."""
    paid = mechanism(3.0, max_grad_norm=1.2)

    def centre(noise: NoiseSource) -> Update:
        return centre_update(records, paid, noise)

    for noise, right in ((OSNoise(), True), (Weaker(), False), (Halved(), False), (silent(), False)):
        assert has_unit_noise(residuals(centre, noise, CENTRE, 3.0 * 1.2, times=400)) is right


@pytest.mark.statistical
def test_a_gradient_carries_its_noise(records: Units) -> None:
    """False alarm: 7e-7 a case. No noise, half of it and 97 % of it are noticed."""
    paid, batch, weight = mechanism(), HeadBatch.of(records, np.zeros(WIDTH)), weight_at(1.0)

    def gradient(noise: NoiseSource) -> Update:
        return gradient_update(weight, batch, paid, noise)

    for noise, right in ((OSNoise(), True), (Weaker(), False), (Halved(), False), (silent(), False)):
        assert has_unit_noise(residuals(gradient, noise, WEIGHT, 2.0 * 0.5, times=80)) is right


@pytest.mark.statistical
def test_one_message_carries_its_noise(records: Units) -> None:
    """False alarm: 7e-7 a case. No noise, half of it and 97 % of it are noticed."""
    paid = mechanism(3.0, max_grad_norm=MOMENTS_NORM)

    def message(noise: NoiseSource) -> Update:
        return statistics_update(records, CLASSES, paid, noise)

    for noise, right in ((OSNoise(), True), (Weaker(), False), (Halved(), False), (silent(), False)):
        assert has_unit_noise(residuals(message, noise, STATISTICS, 3.0 * MOMENTS_NORM, times=4)) is right


def test_without_noise_one_message_is_the_moments_of_all_units(make_units: Callable[..., Units]) -> None:
    """But for what the lattice takes: less than a thousandth of a unit."""
    units = make_units(50, most=4)
    update = statistics_update(units, 3, mechanism(max_grad_norm=MOMENTS_NORM), silent())
    numbers = np.asarray(update.points[STATISTICS] * update.spacing, np.float64)
    moments = Moments.from_vector(numbers, width=6, classes=3)
    means = units.means(np.einsum("nd,ne->nde", unit_rows(units.features), unit_rows(units.features)).reshape(-1, 36))
    np.testing.assert_allclose(moments.products.ravel(), means.sum(axis=0), atol=1e-3)
    np.testing.assert_allclose(moments.sums.sum(axis=0), units.mean_rows().sum(axis=0), atol=1e-3)
    assert moments.counts.sum() == pytest.approx(50, abs=1e-2)


def delta(batch: HeadBatch, paid: Mechanism, variant: Callable[..., Update] = delta_update) -> Release:
    """dp-fedavg from a zero head, rate 1, nominal size 50."""

    def local(noise: NoiseSource) -> Update:
        return variant(np.zeros((CLASSES, WIDTH + 1)), batch, paid, noise, learning_rate=1.0, nominal_units=50.0)

    return local


def skipping_empty_batches(
    weight: Floats, batch: HeadBatch, paid: Mechanism, noise: NoiseSource, **public: float
) -> Update:
    """A broken variant: a step whose sample is empty is left out, as a loop over a loader would."""
    optimizer = LatticeOptimizer(
        weight,
        mechanism=paid,
        noise=noise,
        learning_rate=public["learning_rate"],
        divisor=paid.sample_rate * public["nominal_units"],
    )
    for _ in range(paid.steps):
        sampled = noise.uniform(batch.count) < paid.sample_rate
        if sampled.any():
            release._step(optimizer, batch.take(sampled), paid)
    change = optimizer.weight - weight
    return Update(points={WEIGHT: np.rint(change * 2**24).astype(np.int64)}, spacing=2.0**-24)


@pytest.mark.statistical
@pytest.mark.parametrize("count", [0, 3])
def test_every_local_step_adds_its_noise_also_an_empty_one(count: int, make_units: Callable[..., Units]) -> None:
    """Samples of 3 units at a rate of 1e-9 are empty: the change is 9 steps of noise. False alarm: 7e-7 a case."""
    paid = mechanism(sample_rate=1e-9, steps=9)
    batch = HeadBatch.of(make_units(count, width=WIDTH), np.zeros(WIDTH))
    scale = math.sqrt(9) * 2.0 * 0.5 / (1e-9 * 50.0)
    for noise, right in ((OSNoise(), True), (Weaker(), False), (Halved(), False)):
        assert has_unit_noise(residuals(delta(batch, paid), noise, WEIGHT, scale, times=80)) is right
    broken = delta(batch, paid, skipping_empty_batches)
    assert not has_unit_noise(residuals(broken, OSNoise(), WEIGHT, scale, times=80))


@pytest.mark.statistical
@pytest.mark.parametrize("fraction", [8 / 9, 1.0])
def test_one_step_too_few_is_noticed(fraction: float, make_units: Callable[..., Units]) -> None:
    """Noise of 8 steps where 9 were paid for fails the check above. False alarm: 7e-7."""
    paid = mechanism(sample_rate=1e-9, steps=round(9 * fraction))
    batch = HeadBatch.of(make_units(0, width=WIDTH), np.zeros(WIDTH))
    scale = math.sqrt(9) * 2.0 * 0.5 / (1e-9 * 50.0)
    assert has_unit_noise(residuals(delta(batch, paid), OSNoise(), WEIGHT, scale, times=80)) is (fraction == 1.0)


def evaluated(units: Units, noise: NoiseSource, paid: Mechanism) -> Update:
    """What a head of a hundred classes says of the units, in 203 numbers."""
    weight = np.random.default_rng(4).normal(size=(100, WIDTH + 1)).astype(np.float32)
    tensors = {WEIGHT: weight, CENTRE: np.zeros(WIDTH, np.float32)}
    return evaluation_update(units, Adapter(tensors=tensors), paid, noise)


@pytest.mark.statistical
def test_an_evaluation_carries_its_noise(records: Units) -> None:
    """False alarm: 7e-7 a case. No noise, half of it and 97 % of it are noticed."""
    paid = mechanism(3.0, max_grad_norm=EVALUATION_NORM)
    for noise, right in ((OSNoise(), True), (Weaker(), False), (Halved(), False), (silent(), False)):
        added = residuals(partial(evaluated, records, paid=paid), noise, EVALUATION, 3.0 * EVALUATION_NORM, times=400)
        assert has_unit_noise(added) is right


class Samples:
    """Writes down which units each local step read."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.taken: list[NDArray[np.bool_]] = []
        original = HeadBatch.take

        def spying(batch: HeadBatch, chosen: NDArray[np.bool_]) -> HeadBatch:
            self.taken.append(chosen.copy())
            return original(batch, chosen)

        monkeypatch.setattr(HeadBatch, "take", spying)

    def fit(self, rate: float) -> bool:
        """Inclusions are binomial in all, per unit and per step, and two steps share units as by chance."""
        masks = np.array(self.taken)
        steps, units = masks.shape

        def plausible(count: int, of: int, chance: float) -> bool:
            return bool(binomtest(int(count), int(of), chance).pvalue > 1e-9)

        both = masks[1:] & masks[:-1]
        return (
            plausible(masks.sum(), masks.size, rate)
            and all(plausible(count, steps, rate) for count in masks.sum(axis=0))
            and all(plausible(count, units, rate) for count in masks.sum(axis=1))
            and plausible(both.sum(), both.size, rate**2)
        )


class Eager(OSNoise):
    """A broken sampler: units come a fifth too often."""

    def uniform(self, count: int) -> Floats:
        return super().uniform(count) / 1.2


class Stuck(OSNoise):
    """A broken sampler: the same units in every step."""

    def __init__(self) -> None:
        self._first = super().uniform(100)

    def uniform(self, count: int) -> Floats:
        return np.resize(self._first, count)


@pytest.mark.statistical
@pytest.mark.parametrize(("source", "right"), [(OSNoise, True), (Eager, False), (Stuck, False)])
def test_inclusions_are_binomial_at_the_rate_that_was_paid_for(
    source: Callable[[], NoiseSource],
    right: bool,
    make_units: Callable[..., Units],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """300 steps of 100 units at 0.1. False alarm: 402 tests at 1e-9, below 5e-7."""
    samples = Samples(monkeypatch)
    paid = mechanism(sample_rate=0.1, steps=300)
    batch = HeadBatch.of(make_units(100, width=3), np.zeros(3))
    delta_update(np.zeros((3, 4)), batch, paid, source(), learning_rate=0.1, nominal_units=100.0)
    assert np.array(samples.taken).shape == (300, 100)
    assert samples.fit(0.1) is right


def test_another_sample_rate_than_paid_for_is_noticed(
    make_units: Callable[..., Units], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A site that reads everyone, or twice as many, while the ledger says 0.1."""
    batch = HeadBatch.of(make_units(100, width=3), np.zeros(3))
    for rate in (0.2, 1.0):
        samples = Samples(monkeypatch)
        paid = mechanism(sample_rate=rate, steps=30)
        delta_update(np.zeros((3, 4)), batch, paid, OSNoise(), learning_rate=0.1, nominal_units=100.0)
        assert samples.fit(rate)
        assert not samples.fit(0.1)


def test_the_sums_behind_the_noise_are_the_clipped_ones(records: Units) -> None:
    """With silent noise: exactly the clipped sum, rounded to the lattice."""
    paid, batch, weight = mechanism(), HeadBatch.of(records, np.full(WIDTH, 0.05)), weight_at(1.0)
    update = gradient_update(weight, batch, paid, silent())
    expected = clipped_head_sum(weight, batch, clip_bound(0.5, weight.size)) / spacing(0.5)
    assert np.array_equal(update.points[WEIGHT], np.rint(expected))
    for norm in (0.4, 1.2):
        centre = centre_update(records, mechanism(max_grad_norm=norm), silent())
        expected = clipped_mean_sum(records.mean_rows(), COUNT_WEIGHT, clip_bound(norm, WIDTH + 1)) / spacing(norm)
        assert np.array_equal(centre.points[CENTRE], np.rint(expected))


def test_local_training_is_gradient_descent_when_nothing_is_hidden(make_units: Callable[..., Units]) -> None:
    """Rate 1, silent noise: `steps` plain descents on the clipped sums over a public divisor."""
    batch = HeadBatch.of(make_units(20, most=2, width=WIDTH), np.zeros(WIDTH))
    paid = mechanism(sample_rate=1.0, steps=5)
    update = delta(batch, paid)(silent())
    weight = np.zeros((CLASSES, WIDTH + 1))
    for _ in range(5):
        total = clipped_head_sum(weight, batch, clip_bound(0.5, weight.size))
        weight -= np.rint(total / spacing(0.5)) * spacing(0.5) / 50.0
    np.testing.assert_allclose(update.points[WEIGHT] * update.spacing, weight, atol=2**-24)


def neighbours_distance(release_: Callable[[HeadBatch], Update], units: Units) -> float:
    """The furthest that leaving one unit out moves the released numbers, over C."""

    def numbers(chosen: NDArray[np.bool_]) -> Floats:
        update = release_(HeadBatch.of(units, np.zeros(WIDTH)).take(chosen))
        return np.asarray(update.points[WEIGHT] * update.spacing, np.float64)

    everyone = np.ones(units.count, np.bool_)
    distances = []
    for gone in range(units.count):
        mask = everyone.copy()
        mask[gone] = False
        distances.append(float(np.linalg.norm(numbers(everyone) - numbers(mask))))
    return max(distances) / 0.5


def test_no_unit_moves_a_release_by_more_than_c(
    make_units: Callable[..., Units], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without noise, on the lattice; a gradient without clipping per unit fails the same check."""
    units, weight = make_units(6, most=3, width=WIDTH), weight_at(2.0)

    def gradient(batch: HeadBatch) -> Update:
        return gradient_update(weight, batch, mechanism(), silent())

    assert 0.9 < neighbours_distance(gradient, units) <= 1.0
    monkeypatch.setattr(release, "clip_bound", lambda norm, size: 100 * norm)
    assert neighbours_distance(gradient, units) > 1.1


def test_no_unit_moves_an_evaluation_by_more_than_its_bound(make_units: Callable[..., Units]) -> None:
    """A patient of many records counts as one of few does; counted by record, it would move the sum by far more."""
    units, paid = make_units(12, most=5, width=WIDTH), mechanism(max_grad_norm=EVALUATION_NORM)

    def numbers(rows: NDArray[np.bool_], unit: NDArray[np.int64]) -> Floats:
        _, again = np.unique(unit[rows], return_inverse=True)
        some = Units(features=units.features[rows], labels=units.labels[rows], unit=again, count=len(np.unique(again)))
        update = evaluated(some, silent(), paid)
        return np.asarray(update.points[EVALUATION] * update.spacing, np.float64)

    everyone, by_record = np.ones(len(units.unit), np.bool_), np.arange(len(units.unit))
    moved = [
        [float(np.linalg.norm(numbers(everyone, kind) - numbers(units.unit != gone, kind))) for gone in range(12)]
        for kind in (units.unit, by_record)
    ]
    assert 0.8 * EVALUATION_NORM < max(moved[0]) <= EVALUATION_NORM
    assert max(moved[1]) > 2 * EVALUATION_NORM


@pytest.mark.parametrize("rate", [1.0, 0.3, 1e-9])
@pytest.mark.parametrize("steps", [1, 7])
def test_the_steps_that_were_paid_for_are_counted(rate: float, steps: int, make_units: Callable[..., Units]) -> None:
    paid = mechanism(sample_rate=rate, steps=steps)
    optimizer = LatticeOptimizer(np.zeros((3, 4)), mechanism=paid, noise=OSNoise())
    batch = HeadBatch.of(make_units(5, width=3), np.zeros(3))
    for done in range(1, steps + 1):
        release._step(optimizer, batch.take(np.zeros(5, np.bool_)), paid)
        assert optimizer.steps_counted == done
    release._check_steps(optimizer, paid)


def test_a_release_with_another_number_of_steps_does_not_leave(
    make_units: Callable[..., Units], monkeypatch: pytest.MonkeyPatch
) -> None:
    batch, weight = HeadBatch.of(make_units(5, width=3), np.zeros(3)), np.zeros((3, 4))
    with pytest.raises(RuntimeError, match="1 steps done; 2 were paid for"):
        gradient_update(weight, batch, mechanism(steps=2), OSNoise())
    monkeypatch.setattr(release, "_step", lambda *_: None)
    with pytest.raises(RuntimeError, match="0 steps done; 7 were paid for"):
        delta_update(weight, batch, mechanism(steps=7), OSNoise(), learning_rate=1.0, nominal_units=5.0)


@pytest.mark.parametrize("odd", [np.nan, np.inf, -np.inf, 1e150, 0.0])
@pytest.mark.parametrize("weight", [0.0, 3e38, -3e38])
def test_no_record_and_no_adapter_makes_an_evaluation_fail(odd: float, weight: float) -> None:
    """An error would tell of the record; whatever the model says of it, it counts as one answer."""
    held = Units(features=np.full((1, WIDTH), odd), labels=np.array([1]), unit=np.array([0]), count=1)
    head = np.zeros((3, WIDTH + 1), np.float32)
    head[0], head[2] = weight, -weight
    adapter = Adapter(tensors={WEIGHT: head, CENTRE: np.full(WIDTH, 3e38, np.float32)})
    update = evaluation_update(held, adapter, mechanism(max_grad_norm=EVALUATION_NORM), silent())
    sums = update.points[EVALUATION] * update.spacing
    assert sums[:6].sum() == pytest.approx(1.0, rel=1e-5)
    assert np.linalg.norm(sums) <= EVALUATION_NORM


def test_an_evaluation_reads_the_units_held_out_and_no_others(
    make_plan: Callable[..., RunPlan], make_request: Callable[..., RoundRequest], make_units: Callable[..., Units]
) -> None:
    plan = make_plan().model_copy(update={"evaluation": Evaluation()})
    request, planned = make_request(plan, 4), schedule(plan)[-1]
    held = make_units(9, seed=1)
    few, many = (draw(request, planned, replace(make_units(count), held=held), silent()) for count in (0, 50))
    assert np.array_equal(few.points[EVALUATION], many.points[EVALUATION])
    sums = few.points[EVALUATION] * few.spacing
    assert sums[:6].sum() == pytest.approx(9, rel=1e-4)
    training = draw(make_request(plan, 1), schedule(plan)[1], replace(make_units(9), held=held), silent())
    alone = draw(make_request(plan, 1), schedule(plan)[1], make_units(9), silent())
    assert np.array_equal(training.points[WEIGHT], alone.points[WEIGHT])
    with pytest.raises(ValueError, match="none of which were held out"):
        draw(request, planned, make_units(9), silent())


@pytest.mark.parametrize("count", [0, 1, 30])
@pytest.mark.parametrize(
    ("training", "evaluation"),
    [({}, None), ({}, Evaluation()), ({"algorithm": "dp-fedavg", "sample_rate": 0.2}, None), (ONE_SHOT, Evaluation())],
    ids=["fedsgd", "evaluated", "fedavg", "one-shot"],
)
def test_every_round_sends_lattice_points_of_a_public_shape_only(
    training: dict[str, Any],
    evaluation: Evaluation | None,
    count: int,
    make_plan: Callable[..., RunPlan],
    make_request: Callable[..., RoundRequest],
    make_units: Callable[..., Units],
) -> None:
    plan = make_plan(training).model_copy(update={"evaluation": evaluation})
    units = replace(make_units(count, most=2), held=make_units(count, most=2))
    shapes = {
        ReleaseKind.CENTRE: (CENTRE, (7,)),
        ReleaseKind.EVALUATION: (EVALUATION, (9,)),
        ReleaseKind.STATISTICS: (STATISTICS, (42,)),
    }
    for planned in schedule(plan):
        update = draw(make_request(plan, planned.round), planned, units, OSNoise())
        name, shape = shapes.get(planned.kind, (WEIGHT, (3, 7)))
        assert {key: (value.dtype, value.shape) for key, value in update.points.items()} == {
            name: (np.dtype(np.int64), shape)
        }
        assert update.spacing in (spacing(planned.mechanism.max_grad_norm), 2.0**-24)
        assert len(np.unique(update.points[name])) > 1


def test_the_centre_of_the_request_is_used(
    make_plan: Callable[..., RunPlan], make_request: Callable[..., RoundRequest], make_units: Callable[..., Units]
) -> None:
    plan, units = make_plan(), make_units(10)
    request = make_request(plan, 1)
    moved = dict(request.adapter.tensors)
    moved[CENTRE] = np.full(6, 0.3, np.float32)
    elsewhere = make_request(plan, 1, adapter=type(request.adapter)(tensors=moved))
    first, second = (draw(one, schedule(plan)[1], units, silent()).points[WEIGHT] for one in (request, elsewhere))
    assert not np.array_equal(first, second)


def test_a_weight_that_lies_column_by_column_descends_as_any_other() -> None:
    weight = np.arange(12.0).reshape(3, 4)
    descended = []
    for start in (weight, np.asfortranarray(weight)):
        descent = LatticeOptimizer(start, mechanism=mechanism(), noise=silent(), learning_rate=0.5)
        descent.step(np.full((3, 4), 0.25))
        descended.append(descent.weight)
    np.testing.assert_array_equal(descended[0], descended[1])
    np.testing.assert_allclose(descended[0], weight - 0.125, atol=1e-5)
