# SPDX-License-Identifier: Apache-2.0
"""Tests of `veil rehearse`: processes over TLS compute what the simulation computes, and say it was not private."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from veil.client.ledger import entries_of, total
from veil.client.site_file import read_site_file
from veil.common.errors import InputError, PlanError
from veil.common.plan import RunPlan
from veil.common.update import Adapter
from veil.server.state import RunState
from veil.simulations.demo import dealt_demo_plan
from veil.simulations.rehearsal import difference, rehearse


class Silent:
    """Progress that nobody watches."""

    def stage(self, name: str, total: int) -> Callable[[int], None]:
        return lambda steps: None


def short_demo() -> RunPlan:
    plan = dealt_demo_plan(sites=3)
    return plan.model_copy(update={"training": plan.training.model_copy(update={"rounds": 6})})


@pytest.mark.long
def test_three_agents_over_tls_give_the_adapter_of_the_simulation(tmp_path: Path) -> None:
    output = tmp_path / "federation"
    shown = rehearse(short_demo(), base=Path.cwd(), output=output, progress=Silent(), repeatable=True)
    assert shown.same_adapter
    assert shown.largest_difference == 0.0
    assert (shown.sites, shown.rounds, shown.private) == (("site-1", "site-2", "site-3"), 7, False)
    (job,) = (output / "coordinator" / "runs").iterdir()
    assert "not-private" in job.name
    plan = RunPlan.from_json((job / "plan.json").read_text())
    state = RunState.load(job / "checkpoint.safetensors", plan)
    assert np.any(state.descent.weight), "an adapter that never moved would be the same anywhere"
    for name in shown.sites:
        file = read_site_file(output / "sites" / name / "site.toml")
        entries = entries_of(file.agent.ledger, name)
        assert [entry.noise for entry in entries] == ["fixed"] * 7
        assert math.isinf(total(entries, file.limits.delta).epsilon)
    assert json.loads((output / "rehearsal.json").read_text())["private"] is False


def test_a_difference_in_any_number_is_seen() -> None:
    tensors = {"a": np.zeros(3, np.float32), "b": np.ones((2, 2), np.float32)}
    changed = {**tensors, "b": np.array([[1, 1], [1, 1 + 2e-7]], np.float32)}
    assert difference(Adapter(tensors=tensors), Adapter(tensors=tensors)) == 0.0
    assert difference(Adapter(tensors=tensors), Adapter(tensors=changed)) > 0.0


def test_what_cannot_be_rehearsed_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="no \\[simulation\\]"):
        rehearse(short_demo().public(), base=tmp_path, output=tmp_path / "o", progress=Silent(), repeatable=True)
    assert not (tmp_path / "o").exists()
    with pytest.raises(InputError, match="exists"):
        rehearse(short_demo(), base=tmp_path, output=tmp_path, progress=Silent(), repeatable=True)
