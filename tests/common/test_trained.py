# SPDX-License-Identifier: Apache-2.0
"""Tests of `veil.common.trained`: what trains when, how fast, and in which order it leaves."""

from __future__ import annotations

import json
from typing import Any, get_args

import numpy as np
import pytest

from veil.common.head import CENTRE, WEIGHT
from veil.common.plan import RunPlan
from veil.common.plan_sections import Transfer, TransferMode
from veil.common.trained import (
    depth_of,
    gradient_scale,
    is_tuned,
    parameter_of,
    parted,
    rate_left,
    rate_of,
    released_size,
    trained_in,
    trained_words,
    tuned_name,
    unfrozen_blocks,
)

TOP, MIDDLE, BOTTOM, ABOVE = (
    tuned_name(1, "layer.2.weight"),
    tuned_name(2, "layer.1.weight"),
    tuned_name(3, "layer.0.weight"),
    tuned_name(0, "norm.bias"),
)
NAMES = (MIDDLE, WEIGHT, TOP, CENTRE, ABOVE)
SHAPES: dict[str, tuple[int, ...]] = {WEIGHT: (2, 4), CENTRE: (3,), TOP: (2, 3), MIDDLE: (5,), ABOVE: ()}


def plan(transfer: dict[str, Any], rounds: int = 6) -> RunPlan:
    return RunPlan.model_validate(
        {
            "name": "p",
            "backbone": {"source": "path:m", "sha256": "a" * 64},
            "task": {"kind": "text-classification", "labels": ["no", "yes"]},
            "transfer": transfer,
            "training": {"rounds": rounds},
            "privacy": {"target_epsilon": 3.0},
        }
    )


@pytest.mark.parametrize("depth", [0, 1, 12, 999])
@pytest.mark.parametrize("parameter", ["veil_prompt", "encoder.layer.0.output.dense.weight"])
def test_a_name_says_depth_and_parameter(depth: int, parameter: str) -> None:
    name = tuned_name(depth, parameter)
    assert (depth_of(name), parameter_of(name)) == (depth, parameter)
    assert is_tuned(name)
    assert not is_tuned(parameter) and not is_tuned(WEIGHT) and not is_tuned(CENTRE)


@pytest.mark.parametrize(
    ("layers", "rounds", "expected"),
    [(2, 6, [0, 0, 1, 1, 2, 2]), (1, 4, [0, 0, 1, 1]), (3, 8, [0, 0, 1, 1, 2, 2, 3, 3]), (2, 1, [0])],
)
def test_gradual_unfreezing_divides_the_rounds_evenly(layers: int, rounds: int, expected: list[int]) -> None:
    one = plan({"mode": "gradual", "layers": layers}, rounds)
    assert [unfrozen_blocks(one, round_) for round_ in range(1, rounds + 1)] == expected


def test_gradual_unfreezing_goes_down_from_the_top() -> None:
    """What stands above all blocks comes with the first of them."""
    one = plan({"mode": "gradual", "layers": 2})
    stages = [trained_in(one, round_, NAMES) for round_ in (1, 3, 5)]
    assert stages == [(), (ABOVE, TOP), (ABOVE, TOP, MIDDLE)]


@pytest.mark.parametrize("mode", [mode for mode in get_args(TransferMode) if mode not in ("head", "gradual")])
def test_otherwise_all_that_is_tuned_trains_in_every_round(mode: str) -> None:
    for round_ in (1, 6):
        assert trained_in(plan({"mode": mode}), round_, NAMES) == (ABOVE, TOP, MIDDLE)
        assert trained_in(plan({"mode": mode}), round_, reversed(NAMES)) == (ABOVE, TOP, MIDDLE)


@pytest.mark.parametrize("mode", [mode for mode in get_args(TransferMode) if mode != "head"])
def test_every_mode_has_a_rate_below_the_head_s(mode: TransferMode) -> None:
    assert 0 < rate_of(Transfer(mode=mode), TOP) <= 0.1
    assert rate_of(Transfer(mode=mode, pretrained_rate=0.25), TOP) == 0.25


def test_full_tunes_what_is_pretrained_ten_to_a_hundred_times_slower_or_more() -> None:
    assert rate_of(Transfer(mode="full"), TOP) <= 0.1
    assert rate_of(Transfer(mode="full"), TOP) < rate_of(Transfer(mode="bias"), TOP)


@pytest.mark.parametrize(("head_rounds", "left"), [(0, [1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]), (4, [1, 1 / 2])])
def test_the_rate_falls_evenly_over_the_rounds_that_train_below_the_head(head_rounds: int, left: list[float]) -> None:
    one = plan({"mode": "lora", "head_rounds": head_rounds})
    assert [rate_left(one, round_) for round_ in range(head_rounds + 1, 7)] == pytest.approx(left)


@pytest.mark.parametrize("mode", [mode for mode in get_args(TransferMode) if mode != "head"])
def test_gradients_below_the_head_are_shortened_the_more_the_more_trains(mode: TransferMode) -> None:
    assert gradient_scale(plan({"mode": "full"})) <= gradient_scale(plan({"mode": mode})) < 1


def test_where_no_head_stands_alone_gradients_are_left_as_they_are() -> None:
    document = json.loads(plan({"mode": "lora"}).to_json())
    document |= {"task": {"kind": "text-tokens", "labels": ["drug", "dose"]}, "training": {"centre": False}}
    document["cohort"] = {"nominal_units": 100}
    assert gradient_scale(RunPlan.model_validate(document)) == 1


def test_a_model_that_writes_on_gets_no_new_output_layer() -> None:
    document = json.loads(plan({"mode": "lora", "layers": 2}).to_json())
    assert trained_words(RunPlan.model_validate(document)).startswith("a new output layer and changes of rank 8")
    document |= {"task": {"kind": "text-generation"}, "cohort": {"nominal_units": 100}}
    document["training"] = {"centre": False, "learning_rate": 30.0}
    assert trained_words(RunPlan.model_validate(document)).startswith("changes of rank 8 in the attention of the top 2")


def test_the_rate_falls_from_each_block_to_the_one_below_it() -> None:
    transfer = Transfer(mode="full", pretrained_rate=0.8, layer_decay=0.5)
    assert [rate_of(transfer, name) for name in (ABOVE, TOP, MIDDLE, BOTTOM)] == [0.8, 0.8, 0.4, 0.2]


def test_a_vector_is_the_head_and_then_the_tensors_in_order() -> None:
    trained = trained_in(plan({"mode": "full"}), 1, SHAPES)
    size = released_size(SHAPES, trained)
    assert size == 8 + 1 + 6 + 5
    vector = np.arange(float(size))
    parts = parted(vector, SHAPES, trained)
    assert list(parts) == [WEIGHT, ABOVE, TOP, MIDDLE]
    assert {name: part.shape for name, part in parts.items()} == {name: SHAPES[name] for name in parts}
    assert np.array_equal(np.concatenate([part.ravel() for part in parts.values()]), vector)


def test_a_vector_without_tuned_tensors_is_the_head() -> None:
    assert released_size(SHAPES, ()) == 8
    assert list(parted(np.zeros(8), SHAPES, ())) == [WEIGHT]


@pytest.mark.parametrize("shape", [(19,), (21,), (20, 1), (8,)])
def test_a_vector_of_another_size_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="expected"):
        parted(np.zeros(shape), SHAPES, (ABOVE, TOP, MIDDLE))
