# SPDX-License-Identifier: Apache-2.0
"""Tests of `veil.client.standing`: what a site says of itself, with an agent, without one, and after one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from veil.client.agent import Tally
from veil.client.approvals import Approvals
from veil.client.ledger import Ledger
from veil.client.site_file import SiteFile, read_site_file
from veil.client.standing import standing
from veil.common.errors import RefusalCode, RefusalError
from veil.common.keys import NodeKey
from veil.common.plan import RunPlan
from veil.common.schedule import schedule

MakePlan = Callable[..., RunPlan]
MakeFile = Callable[..., SiteFile]


@pytest.fixture
def make_file(make_home: Callable[..., Path]) -> MakeFile:
    """A site that has a folder for its state."""

    def make(**tables: Any) -> SiteFile:
        file = read_site_file(make_home(**tables) / "site.toml")
        file.agent.state.mkdir()
        return file

    return make


def spend(file: SiteFile, key: NodeKey, plan: RunPlan, job: str, rounds: int, noise: str = "os") -> None:
    with closing(Ledger(file.agent.ledger, file.name, key, anchor=file.agent.anchor)) as ledger:
        for release in schedule(plan)[:rounds]:
            ledger.spend(job, release, noise=noise, plan=plan.sha256, review=lambda entries: None)


def dead_pid() -> int:
    with subprocess.Popen([sys.executable, "-S", "-c", ""]) as ended:
        pass
    return ended.pid


def test_a_new_site_spent_nothing_and_waits_for_nothing(make_file: MakeFile) -> None:
    file = make_file()
    found = standing(file)
    assert (found.agent, found.answered, found.waiting, found.runs) == ("stopped", 0, (), {})
    assert found.spent.epsilon == 0.0
    assert found.unmasked is None
    assert list(file.agent.state.iterdir()) == [], "looking must change nothing"
    assert list(found.lines()) == [
        "Ulm at https://127.0.0.1:1: agent stopped",
        "answered 0 rounds since its start",
        "everything so far: ε 0 of 8 at δ = 1e-05",
    ]


def test_an_agent_is_connected_not_connected_or_stopped(make_file: MakeFile) -> None:
    file = make_file()
    tally = Tally(connected=True)
    tally.write(file.agent.status)
    assert standing(file).agent == "connected"
    Tally(connected=False, since=time.time() - 3600).write(file.agent.status)
    assert standing(file).agent.startswith("not connected for 36")
    said = json.loads(file.agent.status.read_text(encoding="utf-8"))
    file.agent.status.write_text(json.dumps({**said, "connected": True, "pid": dead_pid()}), encoding="utf-8")
    assert standing(file).agent == "stopped"


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"pid": "x"}'])
def test_a_status_file_that_says_nothing_is_a_stopped_agent(content: str, make_file: MakeFile) -> None:
    file = make_file()
    file.agent.status.write_text(content, encoding="utf-8")
    assert standing(file).agent == "stopped"


def test_every_refusal_is_told_in_plain_words(make_file: MakeFile) -> None:
    file = make_file()
    Tally(connected=True, released=2, refused={code.value: 3 for code in RefusalCode}).write(file.agent.status)
    found = standing(file)
    text = "\n".join(found.lines())
    assert found.answered == 2
    assert found.refused == {code.value: 3 for code in RefusalCode}
    for code in RefusalCode:
        assert f"refused 3 ({code.value}): " in text


def test_only_undecided_runs_wait_and_only_where_the_operator_is_asked(
    make_file: MakeFile, make_plan: MakePlan
) -> None:
    file, plan = make_file(), make_plan()
    approvals = Approvals(file.agent.runs)
    for job in ("first", "second", "third"):
        approvals.note(job, plan)
    approvals.decide("first", approve=True, plan_sha256=plan.public().sha256)
    approvals.decide("third", approve=False, plan_sha256=plan.public().sha256)
    assert standing(file).waiting == ("second",)
    assert "waits for your word: second" in "\n".join(standing(file).lines())
    automatic = file.model_copy(update={"limits": file.limits.model_copy(update={"approval": "auto-within-limits"})})
    assert standing(automatic).waiting == ()


def test_what_everything_cost_is_told_by_run(make_file: MakeFile, make_plan: MakePlan, key: NodeKey) -> None:
    file, plan = make_file(), make_plan()
    spend(file, key, plan, "first", 4)
    spend(file, key, plan, "second", 2)
    found = standing(file)
    assert list(found.runs) == ["first", "second"]
    assert found.runs["second"].epsilon < found.runs["first"].epsilon < found.spent.epsilon
    document = json.loads(json.dumps(found.document(), allow_nan=False))
    assert document["epsilon"] == found.spent.epsilon
    assert document["runs"] == {job: one.epsilon for job, one in found.runs.items()}
    assert document["lifetime"] == 8.0


def test_noise_that_was_not_private_has_no_number(make_file: MakeFile, make_plan: MakePlan, key: NodeKey) -> None:
    file = make_file()
    spend(file, key, make_plan(), "rehearsal", 1, noise="fixed")
    document = json.loads(json.dumps(standing(file).document(), allow_nan=False))
    assert document["epsilon"] is None
    assert document["runs"] == {"rehearsal": None}
    assert "ε inf" in "\n".join(standing(file).lines())


def test_a_ledger_beside_a_working_agent_is_read(make_file: MakeFile, make_plan: MakePlan, key: NodeKey) -> None:
    file, plan = make_file(), make_plan()
    with closing(Ledger(file.agent.ledger, file.name, key, anchor=file.agent.anchor)) as ledger:
        ledger.spend("job", schedule(plan)[0], noise="os", plan=plan.sha256, review=lambda entries: None)
        assert list(standing(file).runs) == ["job"]


def test_a_ledger_that_cannot_be_read_is_refused(make_file: MakeFile) -> None:
    file = make_file()
    file.agent.ledger.write_bytes(os.urandom(4096))
    with pytest.raises(RefusalError, match="ledger"):
        standing(file)
