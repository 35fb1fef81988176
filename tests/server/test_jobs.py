# SPDX-License-Identifier: Apache-2.0
"""Tests of `veil.server.jobs`: a run's folder appears whole, its status is replaced whole, and it keeps its name."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from veil.common.errors import InputError
from veil.common.plan import RunPlan
from veil.server.jobs import Job, Phase, Status

MakePlan = Callable[..., RunPlan]


class Crash(BaseException):
    """The power goes."""


@pytest.fixture
def job(tmp_path: Path, make_plan: MakePlan) -> Job:
    return Job.submit(tmp_path / "runs", make_plan(), ("Ulm", "Bonn"))


def test_a_submitted_run_holds_its_public_plan_and_its_sites(tmp_path: Path, make_plan: MakePlan) -> None:
    simulation = {"path": "t.csv", "features": ["x"], "label": "y", "sites": 2}
    job = Job.submit(tmp_path, make_plan(simulation=simulation), ("Ulm", "Bonn"))
    assert job.plan == make_plan()
    assert job.sites == ("Ulm", "Bonn")
    assert job.status == Status()
    assert (job.status.phase, job.beat_at, job.stop_wanted) == (Phase.SUBMITTED, 0.0, False)
    assert job.name.startswith("server-")


def test_a_run_is_named_anew_each_time(tmp_path: Path, make_plan: MakePlan) -> None:
    assert Job.submit(tmp_path, make_plan(), ()).name != Job.submit(tmp_path, make_plan(), ()).name


def test_a_run_that_was_not_submitted_to_the_end_is_not_there(
    tmp_path: Path, make_plan: MakePlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(*args: object, **options: object) -> None:
        raise Crash

    monkeypatch.setattr(os, "rename", crash)
    with pytest.raises(Crash):
        Job.submit(tmp_path, make_plan(), ())
    assert [path.name[0] for path in tmp_path.iterdir()] == ["."]
    assert Job.all(tmp_path) == []


def test_runs_are_listed_from_the_oldest_on(tmp_path: Path, make_plan: MakePlan) -> None:
    assert Job.all(tmp_path / "none") == []
    jobs = [Job.submit(tmp_path, make_plan(), ()) for _ in range(4)]
    for age, job in enumerate(jobs):
        os.utime(job.folder / "plan.json", (1000 - age, 1000 - age))
    assert Job.all(tmp_path) == jobs[::-1]


def test_a_run_is_found_by_its_name_or_the_beginning_of_it(tmp_path: Path, make_plan: MakePlan) -> None:
    one, other = Job.submit(tmp_path, make_plan(name="heart"), ()), Job.submit(tmp_path, make_plan(name="lung"), ())
    assert Job.find(tmp_path, one.name) == one
    assert Job.find(tmp_path, "l") == other
    one.folder.rename(tmp_path / "lun")
    assert Job.find(tmp_path, "lun").name == "lun"
    with pytest.raises(InputError, match=f"2 runs named lu. Expected: one of: .*{other.name}"):
        Job.find(tmp_path, "lu")
    with pytest.raises(InputError, match="0 runs named heart"):
        Job.find(tmp_path, "heart")
    with pytest.raises(InputError, match="one of: none"):
        Job.find(tmp_path / "empty", "heart")


def test_a_note_changes_what_it_names(job: Job) -> None:
    before = time.time()
    job.note(phase=Phase.TRAINING, rounds=4, sites={"Ulm": "replied", "Bonn": "budget"})
    job.note(rounds_done=2)
    status = job.status
    assert before <= status.updated <= time.time()
    assert status == Status(
        phase=Phase.TRAINING,
        rounds_done=2,
        rounds=4,
        sites={"Ulm": "replied", "Bonn": "budget"},
        updated=status.updated,
    )
    assert type(status.phase) is Phase


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_crash_while_noting_leaves_the_status_as_it_was(job: Job, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    job.note(rounds_done=1)
    before = job.status

    def crash(*args: object, **options: object) -> None:
        raise Crash

    with monkeypatch.context() as patch:
        patch.setattr(os, call, crash)
        with pytest.raises(Crash):
            job.note(rounds_done=2)
    assert job.status == before
    job.note(rounds_done=3)
    assert job.status.rounds_done == 3


def test_a_runner_says_that_it_is_at_work(job: Job) -> None:
    job.beat()
    os.utime(job.folder / "beat", (1000, 1000))
    assert job.beat_at == 1000
    job.beat()
    assert job.beat_at > 1000


@pytest.mark.parametrize("phase", [Phase.FAILED, Phase.STOPPED])
def test_a_run_that_ended_early_goes_on_when_asked(job: Job, phase: Phase) -> None:
    job.stop()
    assert job.stop_wanted
    job.note(phase=phase, message="a site refused", rounds_done=2)
    job.resume()
    assert not job.stop_wanted
    assert (job.status.phase, job.status.message, job.status.rounds_done) == (Phase.SUBMITTED, "", 2)


@pytest.mark.parametrize("phase", [phase for phase in Phase if phase not in (Phase.FAILED, Phase.STOPPED)])
def test_a_run_under_way_or_finished_is_not_resumed(job: Job, phase: Phase) -> None:
    job.note(phase=phase)
    with pytest.raises(InputError, match=f"is {phase}"):
        job.resume()
    assert job.status.phase is phase


@pytest.mark.parametrize("phase", [phase for phase in Phase if phase.over])
def test_a_run_that_is_over_is_not_stopped(job: Job, phase: Phase) -> None:
    job.note(phase=phase)
    with pytest.raises(InputError, match=f"is {phase}"):
        job.stop()
    assert not job.stop_wanted


def test_three_phases_are_the_end() -> None:
    assert {phase for phase in Phase if phase.over} == {Phase.FINISHED, Phase.FAILED, Phase.STOPPED}
