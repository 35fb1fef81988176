# SPDX-License-Identifier: Apache-2.0
"""Tests of `veil.client.tuned_release`: what leaves is the sampled units' clipped sum with the mechanism's noise."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import binomtest

from veil.client import tuned_release
from veil.client.release import centre_update, draw, evaluation_update
from veil.client.tuned_gradient import clipped_tuned_sum
from veil.client.tuned_release import draw_tuned
from veil.client.tuned_units import TunedUnits
from veil.client.units import Units
from veil.common.evaluation import EVALUATION
from veil.common.exchange import RoundRequest
from veil.common.head import CENTRE, WEIGHT
from veil.common.noise import NoiseSource, OSNoise, clip_bound
from veil.common.schedule import Release, ReleaseKind, schedule
from veil.common.trained import GRADIENT, gradient_scale, released_size, trained_in
from veil.common.update import Adapter, Update
from veil.simulations.unprivate_noise import FixedNoise, NoNoise

SAYINGS = ["mild cough and fever", "well", "a severe rash since day two", "no pain", "zebra of the day", "two of two"]
FIVE = 5.0
"""Standard deviations; false alarm 6e-7."""


def rows_of(places: list[int]) -> Units:
    return Units(
        features=np.array(places, dtype=np.float64)[:, None],
        labels=np.array(places) % 3,
        unit=np.arange(len(places)),
        count=len(places),
    )


def scene(one: Any, *, held: bool = False) -> TunedUnits:
    """Four units that train; two more that are held out."""
    rows = rows_of([0, 1, 2, 3])
    if held:
        rows = Units(features=rows.features, labels=rows.labels, unit=rows.unit, count=rows.count, held=rows_of([4, 5]))
    features = np.random.default_rng(2).normal(size=(4, 8))
    pooled = Units(features=features, labels=rows.labels, unit=rows.unit, count=4)
    return TunedUnits(pooled=pooled, rows=rows, inputs=SAYINGS, model=one.model)


def request_of(one: Any, round_: int, kind: ReleaseKind | None = None) -> tuple[RoundRequest, Release]:
    release = next(found for found in schedule(one.plan) if found.round == round_)
    random = np.random.default_rng(4)
    adapter = Adapter(
        tensors={
            name: tensor + np.float32(0.1) * random.normal(size=tensor.shape).astype(np.float32)
            for name, tensor in one.model.initial().tensors.items()
        }
    )
    return (
        RoundRequest(
            plan=one.plan, job="job", round=round_, kind=kind or release.kind, adapter=adapter, nominal_units=50.0
        ),
        release,
    )


def drawn(one: Any, round_: int, noise: NoiseSource, **scenery: Any) -> Update:
    request, release = request_of(one, round_)
    return draw_tuned(request, release, scene(one, **scenery), noise)


class Chosen(NoNoise):
    """No noise; the units at these places are below any rate."""

    def __init__(self, *places: int) -> None:
        self._places = places

    def uniform(self, count: int) -> NDArray[np.float64]:
        return np.array([0.0 if place in self._places else math.nextafter(1, 0) for place in range(count)])


def sampled(release: Release, rate: float) -> Release:
    """At another rate than the plan's, whose noise is calibrated in a while."""
    return replace(release, mechanism=replace(release.mechanism, sample_rate=rate))


def silent() -> NoiseSource:
    return NoNoise(0, "site", 0)


def test_a_gradient_is_the_clipped_sum_on_the_lattice(tuned: Callable[..., Any]) -> None:
    one = tuned("bert", "lora")
    request, release = request_of(one, 2)
    trained = trained_in(one.plan, 2, one.model.shapes)
    update = drawn(one, 2, silent())
    size, bound = released_size(one.model.shapes, trained), release.mechanism.max_grad_norm
    assert {name: points.shape for name, points in update.points.items()} == {GRADIENT: (size,)}
    scale = gradient_scale(one.plan)
    everyone = np.ones(4, bool)
    expected = clipped_tuned_sum(scene(one), request.adapter, trained, everyone, clip_bound(bound, size), scale)
    assert scale < 1
    assert np.array_equal(update.points[GRADIENT], np.rint(expected / update.spacing))


def test_gradually_more_leaves_from_round_to_round(tuned: Callable[..., Any]) -> None:
    one = tuned("bert", "gradual")
    sizes = [drawn(one, round_, silent()).points[GRADIENT].size for round_ in (1, 2, 3)]
    head, names = int(np.prod(one.model.shapes[WEIGHT])), [trained_in(one.plan, r, one.model.shapes) for r in (2, 3)]
    assert sizes == [head, *(released_size(one.model.shapes, trained) for trained in names)]
    assert sizes[0] < sizes[1] < sizes[2]


def test_a_round_of_the_head_alone_is_that_of_a_plan_that_tunes_the_head(tuned: Callable[..., Any]) -> None:
    """The same bytes as in head mode, from all units, whatever the sample rate is; then everything trains."""
    one = tuned("bert", "lora", head_rounds=1)
    training = one.plan.training.model_copy(update={"sample_rate": 0.5})
    one = replace(one, plan=one.plan.model_copy(update={"training": training}))
    request, release = request_of(one, 1)
    assert release.mechanism.sample_rate == 1.0 and request_of(one, 2)[1].mechanism.sample_rate == 0.5
    update = draw_tuned(request, release, scene(one), silent())
    expected = draw(request, release, scene(one).pooled, silent())
    assert np.array_equal(update.points[WEIGHT], expected.points[WEIGHT]) and expected.points[WEIGHT].any()
    assert set(update.points) == {WEIGHT}
    assert drawn(one, 2, silent()).points[GRADIENT].size > update.points[WEIGHT].size


def test_a_sampled_round_holds_the_sampled_units_alone(tuned: Callable[..., Any]) -> None:
    one = tuned("bert", "last-layers")
    request, release = request_of(one, 1)
    trained = trained_in(one.plan, 1, one.model.shapes)
    bound = clip_bound(release.mechanism.max_grad_norm, released_size(one.model.shapes, trained))
    for places in ((), (0, 2), (3,), (0, 1, 2, 3)):
        update = draw_tuned(request, sampled(release, 0.3), scene(one), Chosen(*places))
        chosen = np.isin(np.arange(4), places)
        scale = gradient_scale(one.plan)
        expected = clipped_tuned_sum(scene(one), request.adapter, trained, chosen, bound, scale)
        assert np.array_equal(update.points[GRADIENT], np.rint(expected / update.spacing))
        assert update.points[GRADIENT].any() == bool(places)


@pytest.mark.statistical
@pytest.mark.parametrize(("rate", "right"), [(0.3, True), (0.24, False), (1.0, False)])
def test_inclusions_are_binomial_at_the_rate_that_is_charged(
    rate: float, right: bool, tuned: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """2000 rounds of 4 units at 0.3, in all and each unit. False alarm: 5 tests at 1e-9. A rate a fifth lower, and one
    of all units, are noticed."""
    one = tuned("bert", "lora")
    request, release = request_of(one, 1)
    taken: list[NDArray[np.bool_]] = []

    def summed(units: TunedUnits, adapter: object, trained: object, chosen: NDArray[np.bool_], *how: float) -> Any:
        taken.append(chosen)
        return np.zeros(1)

    class Biased(OSNoise):
        def uniform(self, count: int) -> NDArray[np.float64]:
            return super().uniform(count) * 0.3 / rate

    monkeypatch.setattr(tuned_release, "clipped_tuned_sum", summed)
    units = scene(one)
    for _ in range(2000):
        draw_tuned(request, sampled(release, 0.3), units, Biased())
    counts = np.array(taken).sum(axis=0)
    tests = [(int(counts.sum()), 8000), *((int(count), 2000) for count in counts)]
    assert all(binomtest(count, of, 0.3).pvalue > 1e-9 for count, of in tests) is right


@pytest.mark.statistical
def test_every_number_carries_the_mechanism_s_noise(tuned: Callable[..., Any]) -> None:
    """Mean 0 and variance 1 in units of σC, over a vector; half the noise is noticed."""
    one = tuned("bert", "last-layers")
    clean = drawn(one, 1, silent())
    update = drawn(one, 1, FixedNoise(1, "site", 1))
    mechanism = request_of(one, 1)[1].mechanism
    scale = mechanism.noise_multiplier * mechanism.max_grad_norm / update.spacing
    added = (update.points[GRADIENT] - clean.points[GRADIENT]) / scale

    def is_unit(sample: NDArray[np.float64]) -> bool:
        centred = abs(sample.mean()) < FIVE / math.sqrt(sample.size)
        return bool(centred and abs(np.mean(sample**2) - 1) < FIVE * math.sqrt(2 / sample.size))

    assert added.size > 500
    assert is_unit(added) and not is_unit(added / 2)


def test_noise_is_added_though_nobody_was_sampled(tuned: Callable[..., Any]) -> None:
    one = tuned("bert", "lora")
    request, release = request_of(one, 1)

    class Nobody(FixedNoise):
        def uniform(self, count: int) -> NDArray[np.float64]:
            return np.ones(count)

    found = draw_tuned(request, sampled(release, 0.5), scene(one), Nobody(1, "site", 1)).points[GRADIENT]
    assert np.count_nonzero(found) > 0.99 * found.size


def test_a_centring_round_is_that_of_the_pretrained_features(tuned: Callable[..., Any]) -> None:
    one = tuned("bert", "lora", training={"centre": True})
    mechanism = schedule(one.plan)[0].mechanism
    expected = centre_update(scene(one).pooled, mechanism, silent())
    assert np.array_equal(drawn(one, 0, silent()).points[CENTRE], expected.points[CENTRE])


def test_an_evaluation_asks_the_tuned_model_of_the_request(tuned: Callable[..., Any]) -> None:
    """Of the held-out units alone; another adapter says something else."""
    one = tuned("bert", "full", evaluation={"holdout": 0.2})
    request, release = request_of(one, 4)
    assert release.kind is ReleaseKind.EVALUATION
    units = scene(one, held=True)
    assert units.rows.held is not None
    with one.model.at(request.adapter):
        answers = one.model.probabilities(SAYINGS[4:])
    expected = evaluation_update(
        units.rows.held, request.adapter, release.mechanism, silent(), answer=lambda places: answers
    )
    found = draw_tuned(request, release, units, silent())
    assert np.array_equal(found.points[EVALUATION], expected.points[EVALUATION])
    turned = Adapter(tensors={**request.adapter.tensors, WEIGHT: -request.adapter.tensors[WEIGHT]})
    other = draw_tuned(replace(request, adapter=turned), release, units, silent())
    assert not np.array_equal(found.points[EVALUATION], other.points[EVALUATION])


@pytest.mark.parametrize("kind", [ReleaseKind.EVALUATION, ReleaseKind.DELTA, ReleaseKind.STATISTICS])
def test_what_no_plan_of_such_a_model_has_is_an_error(kind: ReleaseKind, tuned: Callable[..., Any]) -> None:
    """Also an evaluation where nobody was held out."""
    one = tuned("bert", "lora")
    request, release = request_of(one, 1, kind)
    with pytest.raises(ValueError, match=f"kind {kind}"):
        draw_tuned(request, Release(round=1, kind=kind, mechanism=release.mechanism), scene(one), silent())
