# SPDX-License-Identifier: Apache-2.0
"""Tests of `veil.server.descent` below the head, by hand: Nesterov's step at each tensor's part of the head's rate."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from veil.common.errors import RunError
from veil.common.head import CENTRE, WEIGHT
from veil.common.plan import RunPlan
from veil.common.schedule import Release, ReleaseKind, schedule
from veil.common.trained import GRADIENT, is_tuned, parted, rate_left, rate_of, released_size, trained_in, tuned_name
from veil.common.update import Adapter, Update
from veil.server.descent import Descent, steps_of
from veil.server.state import RunState

WIDTH, SITES, UNITS = 3, 4, 50
TOP, LOWER, ABOVE = tuned_name(1, "layer.1.weight"), tuned_name(2, "layer.0.weight"), tuned_name(0, "norm.bias")
SHAPES: dict[str, tuple[int, ...]] = {WEIGHT: (2, WIDTH + 1), CENTRE: (WIDTH,), TOP: (2, 3), LOWER: (5,), ABOVE: (4,)}
SPACING = 2.0**-20

MakePlan = Callable[..., RunPlan]


def deep(make_plan: MakePlan, transfer: dict[str, Any], **sections: Any) -> RunPlan:
    return make_plan(
        backbone={"source": "path:m", "sha256": "a" * 64},
        task={"kind": "text-classification", "labels": ["a", "b"]},
        transfer=transfer,
        training={"rounds": 3, "centre": False, **sections.pop("training", {})},
        cohort={"nominal_units": UNITS, **sections.pop("cohort", {})},
        **sections,
    )


def adapter() -> Adapter:
    random = np.random.default_rng(0)
    return Adapter(tensors={name: random.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()})


def updates(descent: Descent, release: Release, count: int = SITES, seed: int = 1) -> list[Update]:
    name, shape = descent.expected_shape(release)
    random = np.random.default_rng(seed + release.round)
    return [Update(points={name: random.integers(-9999, 9999, shape)}, spacing=SPACING) for _ in range(count)]


def mean_of(replies: list[Update], trained: tuple[str, ...], units: float) -> dict[str, NDArray[np.float64]]:
    total = sum(one.points[GRADIENT] for one in replies) * SPACING
    return parted(np.asarray(total, dtype=np.float64) / units, SHAPES, trained)


def state_of(descent: Descent) -> dict[str, NDArray[np.float64]]:
    return {WEIGHT: descent.weight.copy(), **{name: one.copy() for name, one in descent.tuned.items()}}


def test_it_starts_from_the_adapter(make_plan: MakePlan) -> None:
    descent = Descent.start(deep(make_plan, {"mode": "lora"}), adapter(), SITES)
    assert set(descent.tuned) == {TOP, LOWER, ABOVE}
    assert descent.adapter.to_bytes() == adapter().to_bytes()
    assert all(one.dtype == np.float64 and not velocity.any() for one, velocity in pairs(descent))


def pairs(descent: Descent) -> list[tuple[NDArray[np.float64], NDArray[np.float64]]]:
    return [(descent.tuned[name], descent.tuned_velocity[name]) for name in descent.tuned]


@pytest.mark.parametrize(
    "transfer",
    [
        {"mode": "full"},
        {"mode": "lora"},
        {"mode": "adapter", "pretrained_rate": 0.5},
        {"mode": "last-layers", "layers": 2, "layer_decay": 0.25},
    ],
)
def test_two_steps_are_nesterov_s_at_each_tensor_s_own_rate(transfer: dict[str, Any], make_plan: MakePlan) -> None:
    plan = deep(make_plan, transfer)
    descent = Descent.start(plan, adapter(), SITES)
    expected = state_of(descent)
    velocity = {name: np.zeros_like(one) for name, one in expected.items()}
    for release in schedule(plan)[:2]:
        trained = trained_in(plan, release.round, SHAPES)
        assert trained == (ABOVE, TOP, LOWER)
        replies, steps = updates(descent, release), steps_of(plan, descent, release.round)
        assert steps.momentum > 0
        for name, mean in mean_of(replies, trained, SITES * UNITS).items():
            below = rate_of(plan.transfer, name) * rate_left(plan, release.round) if name != WEIGHT else 1.0
            rate = steps.rate * below
            velocity[name] = steps.momentum * velocity[name] + mean
            expected[name] = expected[name] - rate * (mean + steps.momentum * velocity[name])
        descent.apply(release, replies)
    found = state_of(descent)
    assert all(np.allclose(found[name], expected[name], rtol=1e-12, atol=0) for name in expected)
    assert all(np.allclose(descent.tuned_velocity[name], velocity[name], rtol=1e-12) for name in descent.tuned)
    moved = {name: float(np.abs(found[name] - adapter().tensors[name]).max()) for name in (TOP, LOWER)}
    assert 0 < moved[LOWER] < 1 and moved[TOP] > 0


def test_rounds_of_the_head_alone_are_those_of_a_head_and_leave_the_rest_as_it_was(make_plan: MakePlan) -> None:
    plan = deep(make_plan, {"mode": "lora", "head_rounds": 2}, training={"learning_rate": 2.0})
    descent = Descent.start(plan, adapter(), SITES)
    expected, before = descent.weight, state_of(descent)
    for release in schedule(plan)[:2]:
        assert descent.expected_shape(release) == (WEIGHT, SHAPES[WEIGHT])
        replies = updates(descent, release)
        expected = expected - 2.0 * sum(one.points[WEIGHT] for one in replies) * SPACING / (SITES * UNITS)
        descent.apply(release, replies)
    assert np.allclose(descent.weight, expected, rtol=1e-12)
    assert all(np.array_equal(descent.tuned[name], before[name]) for name in descent.tuned)
    last = schedule(plan)[2]
    assert descent.expected_shape(last)[0] == GRADIENT
    descent.apply(last, updates(descent, last))
    assert not np.array_equal(descent.tuned[TOP], before[TOP])


def test_a_plan_s_own_rate_is_the_head_s(make_plan: MakePlan) -> None:
    plan = deep(make_plan, {"mode": "bias", "pretrained_rate": 0.5}, training={"learning_rate": 2.0})
    descent = Descent.start(plan, adapter(), SITES)
    release = schedule(plan)[0]
    replies = updates(descent, release)
    mean = mean_of(replies, trained_in(plan, 1, SHAPES), SITES * UNITS)
    momentum = steps_of(plan, descent, 1).momentum
    descent.apply(release, replies)
    for name, rate in ((WEIGHT, 2.0), (TOP, 1.0)):
        step = rate * (1 + momentum) * mean[name]
        assert np.allclose(state_of(descent)[name], adapter().tensors[name] - step, rtol=1e-12)


def test_the_order_of_sites_does_not_matter(make_plan: MakePlan) -> None:
    plan = deep(make_plan, {"mode": "full"})
    one, other = (Descent.start(plan, adapter(), SITES) for _ in range(2))
    replies = updates(one, schedule(plan)[0])
    one.apply(schedule(plan)[0], replies)
    other.apply(schedule(plan)[0], replies[::-1])
    assert one.adapter.to_bytes() == other.adapter.to_bytes()


def test_a_sampled_round_counts_for_the_units_that_are_likely_in_it(make_plan: MakePlan) -> None:
    """A sum of a quarter of the units is a quarter as long: the step's mean is over a quarter of them."""
    whole = deep(make_plan, {"mode": "lora"}, training={"learning_rate": 1.0})
    quarter = deep(make_plan, {"mode": "lora"}, training={"learning_rate": 1.0, "sample_rate": 0.25})
    release = schedule(whole)[0]
    moved = []
    for plan in (whole, quarter):
        descent = Descent.start(plan, adapter(), SITES)
        descent.apply(release, updates(descent, release))
        moved.append({name: one - adapter().tensors[name] for name, one in state_of(descent).items()})
    assert all(np.allclose(moved[1][name], 4 * moved[0][name], rtol=1e-9) for name in moved[0])


def test_gradually_frozen_tensors_do_not_move_and_are_not_asked_for(make_plan: MakePlan) -> None:
    plan = deep(make_plan, {"mode": "gradual"})
    descent = Descent.start(plan, adapter(), SITES)
    for release, moving in zip(schedule(plan), [{WEIGHT}, {WEIGHT, ABOVE, TOP}, set(SHAPES) - {CENTRE}], strict=True):
        before = state_of(descent)
        size = released_size(SHAPES, sorted(moving - {WEIGHT}))
        assert descent.expected_shape(release) == (GRADIENT, (size,))
        descent.apply(release, updates(descent, release))
        after = state_of(descent)
        assert {name for name in after if not np.array_equal(after[name], before[name])} == moving


def test_an_evaluation_s_shape_is_as_ever(make_plan: MakePlan) -> None:
    plan = deep(make_plan, {"mode": "lora"}, evaluation={"holdout": 0.2})
    heads = make_plan(evaluation={"holdout": 0.2})
    found = [Descent.start(one, adapter(), SITES).expected_shape(schedule(one)[-1]) for one in (plan, heads)]
    assert schedule(plan)[-1].kind is ReleaseKind.EVALUATION
    assert found[0] == found[1]


@pytest.fixture
def state(make_plan: MakePlan) -> RunState:
    """A deep run after two rounds."""
    plan = deep(make_plan, {"mode": "gradual"})
    made = RunState.start(plan, adapter(), SITES)
    for release in schedule(plan)[:2]:
        made.descent.apply(release, updates(made.descent, release))
    return made


def test_a_checkpoint_brings_tuned_tensors_and_their_velocities_back(state: RunState, tmp_path: Path) -> None:
    state.save(tmp_path / "checkpoint")
    back = RunState.load(tmp_path / "checkpoint", state.descent.plan)
    for name in ("tuned", "tuned_velocity"):
        one, other = getattr(state.descent, name), getattr(back.descent, name)
        assert one.keys() == other.keys() == {TOP, LOWER, ABOVE}
        assert all(np.array_equal(one[key], other[key]) and other[key].dtype == np.float64 for key in one)
    assert state.descent.tuned_velocity[TOP].any() and not state.descent.tuned_velocity[LOWER].any()
    assert back.descent.adapter.to_bytes() == state.descent.adapter.to_bytes()


def test_a_resumed_run_goes_on_to_the_very_same(state: RunState, tmp_path: Path) -> None:
    """Also when it was saved between two rounds of the frozen and the unfrozen."""
    state.save(tmp_path / "checkpoint")
    back = RunState.load(tmp_path / "checkpoint", state.descent.plan)
    release = schedule(state.descent.plan)[2]
    for one in (state, back):
        one.descent.apply(release, updates(one.descent, release))
    assert back.descent.adapter.to_bytes() == state.descent.adapter.to_bytes()
    assert all(np.array_equal(back.descent.tuned[name], state.descent.tuned[name]) for name in back.descent.tuned)


@pytest.mark.parametrize("bit", [0, 7])
def test_a_checkpoint_with_a_changed_tuned_tensor_is_refused(state: RunState, tmp_path: Path, bit: int) -> None:
    path = tmp_path / "checkpoint"
    state.save(path)
    content = bytearray(path.read_bytes())
    place = content.index(state.descent.tuned[LOWER].tobytes())
    content[place] ^= 1 << bit
    path.write_bytes(content)
    with pytest.raises(RunError, match="SHA-256"):
        RunState.load(path, state.descent.plan)


def test_a_head_s_run_has_none(make_plan: MakePlan) -> None:
    heads = Adapter(tensors={name: one for name, one in adapter().tensors.items() if not is_tuned(name)})
    descent = Descent.start(make_plan(), heads, SITES)
    assert descent.tuned == {} == descent.tuned_velocity
    release = next(one for one in schedule(make_plan()) if one.kind is ReleaseKind.GRADIENT)
    assert descent.expected_shape(release) == (WEIGHT, (2, WIDTH + 1))
