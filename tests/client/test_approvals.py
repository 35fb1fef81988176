# SPDX-License-Identifier: Apache-2.0
"""Tests of `veil.client.approvals`: what the operator said holds for one job and one plan, whoever writes at once."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from veil.client import approvals as module
from veil.client.approvals import Approvals, Decision
from veil.common.errors import InputError, RefusalCode, RefusalError
from veil.common.plan import RunPlan

MakePlan = Callable[..., RunPlan]


@pytest.fixture
def approvals(tmp_path: Path) -> Approvals:
    return Approvals(tmp_path / "state" / "runs")


def test_a_run_waits_until_the_operator_decides(approvals: Approvals, make_plan: MakePlan, tmp_path: Path) -> None:
    plan = make_plan()
    assert approvals.runs() == ()
    assert approvals.decision("job", plan.sha256) == "pending"
    asked = approvals.note("job", plan)
    assert asked.plan == plan
    assert approvals.note("job", plan) == asked
    assert approvals.decision("job", plan.sha256) == "pending"
    approvals.decide("job", approve=True, plan_sha256=plan.sha256)
    assert approvals.decision("job", plan.sha256) == "approved"
    assert Approvals(tmp_path / "state" / "runs").decision("job", plan.sha256) == "approved"
    approvals.decide("job", approve=False, plan_sha256=plan.sha256)
    assert approvals.decision("job", plan.sha256) == "refused"


def test_asking_again_keeps_the_decision_and_the_time(approvals: Approvals, make_plan: MakePlan) -> None:
    first = approvals.note("job", make_plan())
    approvals.decide("job", approve=True, plan_sha256=first.plan_sha256)
    again = approvals.note("job", make_plan())
    assert again.decision is Decision.APPROVED
    assert again.first_seen == first.first_seen
    assert again.decided >= first.first_seen


def test_an_approval_holds_for_one_job_only(approvals: Approvals, make_plan: MakePlan) -> None:
    plan = make_plan()
    approvals.note("job", plan)
    approvals.decide("job", approve=True, plan_sha256=plan.sha256)
    assert approvals.decision("other", plan.sha256) == "pending"


@pytest.mark.parametrize("approve", [True, False])
def test_another_plan_does_not_wipe_out_the_operators_word(
    approvals: Approvals, make_plan: MakePlan, approve: bool
) -> None:
    plan, other = make_plan(), make_plan(target_epsilon=2.0)
    approvals.note("job", plan)
    approvals.decide("job", approve=approve, plan_sha256=plan.sha256)
    with pytest.raises(RefusalError) as caught:
        approvals.note("job", other)
    assert caught.value.code is RefusalCode.PLAN_CHANGED
    assert approvals.decision("job", other.sha256) == "pending"
    assert approvals.note("job", plan).decision == ("approved" if approve else "refused")


def test_a_plan_that_was_swapped_while_the_operator_read_is_not_approved(
    approvals: Approvals, make_plan: MakePlan
) -> None:
    shown, swapped = make_plan(), make_plan(target_epsilon=100.0)
    approvals.note("job", shown)
    approvals.note("job", swapped)
    with pytest.raises(InputError, match="another plan"):
        approvals.decide("job", approve=True, plan_sha256=shown.sha256)
    assert approvals.decision("job", swapped.sha256) == "pending"


def test_only_a_run_that_asked_can_be_decided(approvals: Approvals) -> None:
    with pytest.raises(InputError, match="never asked"):
        approvals.decide("job", approve=True, plan_sha256="0" * 64)


@pytest.mark.parametrize("job", ["../../evil", "/etc/passwd", "a/b", "", ".", "x\0y", "n" * 10_000, "é\n\ud800"])
def test_a_job_s_name_reaches_no_path(job: str, approvals: Approvals, make_plan: MakePlan, tmp_path: Path) -> None:
    plan = make_plan()
    approvals.note(job, plan)
    approvals.decide(job, approve=True, plan_sha256=plan.sha256)
    assert approvals.decision(job, plan.sha256) == "approved"
    assert [asked.job for asked in approvals.runs()] == [job]
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.parent for path in files} == {tmp_path / "state" / "runs"}
    assert all(len(path.stem) == 64 for path in files if path.suffix == ".json")


def test_runs_are_listed_oldest_first(approvals: Approvals, make_plan: MakePlan) -> None:
    for job in ("c", "a", "b"):
        approvals.note(job, make_plan())
    seen = [(asked.first_seen, asked.job) for asked in approvals.runs()]
    assert seen == sorted(seen)
    assert {job for _, job in seen} == {"a", "b", "c"}


def test_no_more_than_so_many_wait(approvals: Approvals, make_plan: MakePlan, monkeypatch: pytest.MonkeyPatch) -> None:
    assert module.MAX_PENDING == 1000
    monkeypatch.setattr(module, "MAX_PENDING", 3)
    plan = make_plan()
    for job in ("a", "b", "c"):
        approvals.note(job, plan)
    with pytest.raises(RefusalError) as caught:
        approvals.note("d", plan)
    assert caught.value.code is RefusalCode.APPROVAL
    assert len(approvals.runs()) == 3
    approvals.note("a", make_plan(target_epsilon=2.0))
    approvals.decide("b", approve=False, plan_sha256=plan.sha256)
    approvals.note("d", plan)
    with pytest.raises(RefusalError):
        approvals.note("b", make_plan(target_epsilon=2.0))


def test_a_plan_that_nobody_can_read_is_refused(
    approvals: Approvals, make_plan: MakePlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_PLAN_BYTES", 100)
    with pytest.raises(RefusalError) as caught:
        approvals.note("job", make_plan())
    assert caught.value.code is RefusalCode.MALFORMED
    assert approvals.runs() == ()


def test_a_damaged_or_foreign_file_approves_nothing(approvals: Approvals, make_plan: MakePlan, tmp_path: Path) -> None:
    plan = make_plan()
    approvals.note("job", plan)
    approvals.decide("job", approve=True, plan_sha256=plan.sha256)
    (path,) = (tmp_path / "state" / "runs").glob("*.json")
    good = path.read_text(encoding="utf-8")
    fields = json.loads(good)
    for text in (
        good[:-5],
        "[]",
        "{}",
        json.dumps({**fields, "plan_sha256": "0" * 64}),
        json.dumps({**fields, "job": "other"}),
        json.dumps({**fields, "decision": "yes"}),
    ):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(InputError, match="remove the file"):
            approvals.decision("job", plan.sha256)
        with pytest.raises(InputError, match="remove the file"):
            approvals.runs()
    path.write_text(good, encoding="utf-8")
    assert approvals.decision("job", plan.sha256) == "approved"


def test_threads_that_ask_at_once_write_every_run_once(approvals: Approvals, make_plan: MakePlan) -> None:
    plan = make_plan()
    with ThreadPoolExecutor(8) as pool:
        asked = list(pool.map(lambda number: approvals.note(f"job {number % 5}", plan), range(40)))
    assert len(approvals.runs()) == 5
    assert set(asked) == set(approvals.runs())


def test_the_command_line_s_process_decides_for_the_agent_s(
    approvals: Approvals, make_plan: MakePlan, tmp_path: Path
) -> None:
    plan = make_plan()
    approvals.note("job", plan)
    code = (
        "import sys; from pathlib import Path; from veil.client.approvals import Approvals\n"
        "one = Approvals(Path(sys.argv[1])); run, = one.runs()\n"
        "one.decide(run.job, approve=True, plan_sha256=run.plan_sha256)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "state" / "runs")], check=True)
    assert approvals.decision("job", plan.sha256) == "approved"
