# SPDX-License-Identifier: Apache-2.0
"""Tests of `veil.server.result` and `veil.server.model` below the head: where a run starts, and the folder that answers
as the run's model did."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from veil.common.errors import InputError, PlanError
from veil.common.head import WEIGHT
from veil.common.lazy_backbone import find_backbone
from veil.common.plan import RunPlan
from veil.common.plan_sections import Backbone
from veil.common.trained import is_tuned
from veil.common.update import Adapter
from veil.common.weights import fingerprint
from veil.server.delivery import BackboneShelf
from veil.server.model import TunedModel
from veil.server.result import initial_state

SAYINGS = ["mild cough and fever", "well", "a severe rash since day two"]


@pytest.fixture
def pinned(tiny: Callable[[str], Backbone]) -> Backbone:
    """With the hashes of all its files, as a deployed plan has them."""
    one = tiny("bert")
    return one.model_copy(update={"files_sha256": fingerprint(one.source, base=Path()).files_sha256})


@pytest.fixture
def plan_of(pinned: Backbone) -> Callable[..., RunPlan]:
    from tests.tiny_models import deep_plan

    return lambda **transfer: deep_plan(pinned, "bert", transfer).model_copy(update={"backbone": pinned})


def test_a_deployed_run_starts_from_what_is_pretrained_and_a_zero_head(
    pinned: Backbone, plan_of: Callable[..., RunPlan], tuned: Callable[..., Any], tmp_path: Path
) -> None:
    """The very adapter that a simulation starts from, on every machine and each time."""
    plan = plan_of(mode="lora")
    BackboneShelf(tmp_path / "shelf").manifest(pinned, base=Path())
    one, again = (initial_state(plan, tmp_path / "shelf", 3).descent.adapter for _ in range(2))
    assert one.to_bytes() == again.to_bytes() == tuned("bert", "lora").model.initial().to_bytes()
    assert not one.tensors[WEIGHT].any()
    assert {name.split(".lora_")[1][0] for name in one.tensors if is_tuned(name)} == {"A", "B"}


def test_a_mode_that_does_not_fit_ends_before_anybody_is_asked(
    pinned: Backbone, plan_of: Callable[..., RunPlan], tmp_path: Path
) -> None:
    BackboneShelf(tmp_path / "shelf").manifest(pinned, base=Path())
    with pytest.raises(PlanError, match="3 blocks"):
        initial_state(plan_of(mode="last-layers", layers=4), tmp_path / "shelf", 3)


@pytest.mark.parametrize("mode", ["last-layers", "lora", "prompt"])
def test_a_saved_model_loads_again_and_says_the_same(
    mode: str, tiny: Callable[[str], Backbone], tuned: Callable[..., Any], tmp_path: Path
) -> None:
    """From its folder alone, wherever that is moved; and not what it said before it was tuned."""
    one, random = tuned("bert", mode), np.random.default_rng(1)
    moved = {
        name: tensor + np.float32(0.2) * random.normal(size=tensor.shape).astype(np.float32)
        for name, tensor in one.model.initial().tensors.items()
    }
    adapter = Adapter(tensors=moved)
    backbone = find_backbone(tiny("bert"), one.plan.task, base=Path(), device="cpu")
    made = TunedModel(plan=one.plan, adapter=adapter, backbone=backbone)
    expected = made.predict(SAYINGS)
    with one.model.at(adapter):
        assert np.array_equal(expected, one.model.probabilities(SAYINGS))
    made.save(tmp_path / "model")
    shutil.move(tmp_path / "model", tmp_path / "elsewhere")
    back = TunedModel.load(tmp_path / "elsewhere")
    assert back.plan.transfer == one.plan.transfer
    assert back.adapter.to_bytes() == adapter.to_bytes()
    assert np.array_equal(back.predict(SAYINGS), expected)
    heads = {name: moved[name] if not is_tuned(name) else start for name, start in one.model.initial().tensors.items()}
    untuned = TunedModel(plan=one.plan, adapter=Adapter(tensors=heads), backbone=backbone)
    assert np.abs(untuned.predict(SAYINGS) - expected).max() > 1e-3
    assert len(back.predict([])) == 0
    (tmp_path / "elsewhere").rename(tmp_path / "model")
    with pytest.raises(InputError, match=re.escape(f"give {tmp_path / 'model'}")):
        TunedModel.load(tmp_path)
    with pytest.raises(InputError, match=r"none \(not there\).*of a finished run"):
        TunedModel.load(tmp_path / "none")
