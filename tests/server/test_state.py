# SPDX-License-Identifier: Apache-2.0
"""Tests of `veil.server.state`: a checkpoint is replaced whole, and gives the very state that was saved."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from veil.common.errors import RunError
from veil.common.evaluation import Figure
from veil.common.head import initial_adapter
from veil.common.mismatch import Likeness, Mismatch
from veil.common.plan import RunPlan
from veil.common.schedule import ReleaseKind
from veil.server.state import RoundRecord, RunState

MakePlan = Callable[..., RunPlan]
RECORD = RoundRecord(
    round=0,
    kind=ReleaseKind.CENTRE,
    sites=("Bonn", "Ulm"),
    refusals={"Köln": "budget"},
    bytes_down=1234,
    bytes_up=567,
    seconds=0.1 + 0.2,
)


class Crash(BaseException):
    """The power goes."""


@pytest.fixture
def state(make_plan: MakePlan) -> RunState:
    """A run in its midst, with numbers that no decimal notation holds."""
    plan, random = make_plan(), np.random.default_rng(0)
    made = RunState.start(plan, initial_adapter(plan, 3), sites=2)
    made.descent.weight = random.normal(size=(2, 4))
    made.descent.centre = random.normal(size=3)
    made.descent.velocity = random.normal(size=(2, 4))
    made.descent.units = 100 / 3
    made.records = [RECORD]
    made.heads = {"Ulm": "ab" * 32}
    made.units = {"Ulm": 0.1 + 0.2, "Bonn": 5e-324}
    made.evaluation = {"Bonn": (2**52 + 1, -7, 0), "Ulm": (1, 2, 3)}
    made.declared = {"Bonn": 17}
    distance = Figure(value=1 / 3, standard_error=0.1, low=0.1 + 0.2, high=0.5)
    made.mismatch = {"Bonn": Mismatch(distance=distance, verdict=Likeness.APART)}
    made.cohort, made.declined = ("Bonn", "Ulm"), {"Köln": "budget"}
    return made


def same(one: RunState, other: RunState) -> bool:
    arrays = all(
        np.array_equal(getattr(one.descent, name), getattr(other.descent, name))
        and getattr(one.descent, name).dtype == getattr(other.descent, name).dtype
        for name in ("weight", "centre", "velocity")
    )
    return arrays and all(
        getattr(one, name) == getattr(other, name)
        for name in ("records", "heads", "units", "evaluation", "declared", "mismatch", "cohort", "declined")
    )


def rewrite(path: Path, **change: object) -> None:
    """The same tensors under another header, with the digest that belongs to it; None takes a key away."""
    with safe_open(path, framework="numpy") as file:
        header = {**json.loads(file.metadata()["veil"]), **change}
        tensors = {name: file.get_tensor(name) for name in ("weight", "centre", "velocity")}
    kept = {key: value for key, value in header.items() if value is not None}
    text = json.dumps(kept)
    content = text.encode() + b"".join(tensors[name].tobytes() for name in sorted(tensors))
    save_file(tensors, path, metadata={"veil": text, "sha256": hashlib.sha256(content).hexdigest()})


def test_a_state_comes_back_to_the_last_bit(tmp_path: Path, state: RunState) -> None:
    state.save(tmp_path / "checkpoint")
    back = RunState.load(tmp_path / "checkpoint", state.descent.plan)
    assert same(back, state)
    assert back.descent.weight.dtype == back.descent.centre.dtype == np.float64
    assert (back.descent.sites, back.descent.units) == (2, 100 / 3)
    assert isinstance(back.records[0].kind, ReleaseKind)


def test_a_resumed_run_asks_for_the_very_same(tmp_path: Path, state: RunState) -> None:
    state.save(tmp_path / "checkpoint")
    back = RunState.load(tmp_path / "checkpoint", state.descent.plan)
    assert back.descent.adapter.to_bytes() == state.descent.adapter.to_bytes()
    assert back.descent.nominal_units == state.descent.nominal_units


def test_a_loaded_state_can_go_on(tmp_path: Path, state: RunState) -> None:
    state.save(tmp_path / "checkpoint")
    back = RunState.load(tmp_path / "checkpoint", state.descent.plan)
    back.descent.weight += 1.0
    back.records.append(RECORD)
    back.save(tmp_path / "checkpoint")
    assert same(RunState.load(tmp_path / "checkpoint", state.descent.plan), back)


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_crash_while_saving_leaves_the_earlier_checkpoint(
    tmp_path: Path, state: RunState, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    path, plan = tmp_path / "checkpoint", state.descent.plan
    state.save(path)
    before = RunState.load(path, plan)

    def crash(*args: object, **options: object) -> None:
        raise Crash

    state.descent.weight = state.descent.weight + 1.0
    with monkeypatch.context() as patch:
        patch.setattr(os, call, crash)
        with pytest.raises(Crash):
            state.save(path)
    assert same(RunState.load(path, plan), before)
    state.save(path)
    assert same(RunState.load(path, plan), state)
    assert [one.name for one in tmp_path.iterdir()] == ["checkpoint"]


def test_the_content_is_on_the_disk_before_its_name(
    tmp_path: Path, state: RunState, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    for call in ("fsync", "replace"):
        real = getattr(os, call)

        def record(*args: object, call: str = call, real: Callable[..., object] = real) -> object:
            order.append(call)
            return real(*args)

        monkeypatch.setattr(os, call, record)
    state.save(tmp_path / "checkpoint")
    assert order == ["fsync", "replace", "fsync"]


def test_the_checkpoint_of_another_plan_is_refused(tmp_path: Path, state: RunState, make_plan: MakePlan) -> None:
    state.save(tmp_path / "checkpoint")
    with pytest.raises(RunError, match="another plan"):
        RunState.load(tmp_path / "checkpoint", make_plan(seed=1))


def test_a_checkpoint_cut_anywhere_is_refused(tmp_path: Path, state: RunState) -> None:
    path = tmp_path / "checkpoint"
    state.save(path)
    whole = path.read_bytes()
    for length in [*range(0, len(whole), 97), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(RunError, match=r"restore it from a backup, or start a new run"):
            RunState.load(path, state.descent.plan)


def test_a_missing_checkpoint_is_named(tmp_path: Path, state: RunState) -> None:
    with pytest.raises(RunError, match="none"):
        RunState.load(tmp_path / "none", state.descent.plan)


@pytest.mark.parametrize(
    "change",
    [
        {"plan": None},
        {"sites": None},
        {"sites": "two"},
        {"estimated-units": "many"},
        {"records": [{"round": 0}]},
        {"records": 7},
        {"heads": 7},
        {"units": {"Ulm": 7}},
        {"units": None},
        {"evaluation": None},
        {"evaluation": {"Ulm": 7}},
        {"evaluation": {"Ulm": ["many"]}},
        {"declined": None},
        {"cohort": 7},
        {"mismatch": 7},
        {"mismatch": {"Ulm": {"verdict": "alike"}}},
        {"mismatch": {"Ulm": {"verdict": "odd", "distance": {}}}},
    ],
)
def test_a_header_that_is_not_ours_is_refused(tmp_path: Path, state: RunState, change: dict[str, object]) -> None:
    state.save(tmp_path / "checkpoint")
    rewrite(tmp_path / "checkpoint", **change)
    with pytest.raises(RunError, match="the checkpoint of this plan"):
        RunState.load(tmp_path / "checkpoint", state.descent.plan)


def test_tensors_without_our_header_are_refused(tmp_path: Path, state: RunState) -> None:
    save_file({"weight": np.zeros(2), "centre": np.zeros(2), "velocity": np.zeros(2)}, tmp_path / "checkpoint")
    with pytest.raises(RunError):
        RunState.load(tmp_path / "checkpoint", state.descent.plan)


def test_a_header_that_is_ours_is_taken(tmp_path: Path, state: RunState) -> None:
    """So that what the other headers are refused for is not how they were written here."""
    state.save(tmp_path / "checkpoint")
    rewrite(tmp_path / "checkpoint")
    assert same(RunState.load(tmp_path / "checkpoint", state.descent.plan), state)


def test_a_checkpoint_of_before_mismatches_goes_on_without(tmp_path: Path, state: RunState) -> None:
    state.save(tmp_path / "checkpoint")
    rewrite(tmp_path / "checkpoint", mismatch=None)
    back = RunState.load(tmp_path / "checkpoint", state.descent.plan)
    assert back.mismatch == {}
    state.mismatch = {}
    assert same(back, state)


def test_a_flipped_bit_anywhere_is_refused(tmp_path: Path, state: RunState) -> None:
    """Header, tensors and all: nothing of a damaged checkpoint is believed."""
    path, plan = tmp_path / "checkpoint", state.descent.plan
    state.save(path)
    whole = path.read_bytes()
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        try:
            back = RunState.load(path, plan)
        except RunError:
            continue
        assert same(back, state), f"byte {place}: {whole[place]} read as {damaged[place]}"


def test_a_checkpoint_without_a_digest_is_refused(tmp_path: Path, state: RunState) -> None:
    path = tmp_path / "checkpoint"
    state.save(path)
    with safe_open(path, framework="numpy") as file:
        header, tensors = (
            file.metadata()["veil"],
            {name: file.get_tensor(name) for name in ("weight", "centre", "velocity")},
        )
    save_file(tensors, path, metadata={"veil": header})
    with pytest.raises(RunError, match="sha256"):
        RunState.load(path, state.descent.plan)
