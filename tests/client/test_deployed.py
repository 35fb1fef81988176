# SPDX-License-Identifier: Apache-2.0
"""Tests of `veil.client.deployed`: the operator's word reaches every round, and one process has the ledger."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from veil.client.approvals import Approvals, Decision
from veil.client.deployed import Operator, assemble, open_app
from veil.client.policy import Limits
from veil.client.site import Consent, Site
from veil.client.site_file import SiteFile, read_site_file
from veil.common.errors import InputError, RefusalCode, RefusalError, TableError
from veil.common.exchange import Offer, RoundRequest, Willingness
from veil.common.noise import OSNoise
from veil.common.plan import RunPlan

MakePlan = Callable[..., RunPlan]
MakeRequest = Callable[..., RoundRequest]
MakeHome = Callable[..., Path]

ASK = Limits(epsilon_per_run=8.0, epsilon_lifetime=8.0)
AUTOMATIC = ASK.model_copy(update={"approval": "auto-within-limits"})


def read(home: Path) -> SiteFile:
    return read_site_file(home / "site.toml")


def allowing(home: Path, limits: Limits) -> SiteFile:
    return read(home).model_copy(update={"limits": limits})


@contextmanager
def assembled(home: Path) -> Iterator[Site]:
    site = assemble(read(home))
    with closing(site.ledger):
        yield site


def decide(home: Path, plan: RunPlan, *, approve: bool) -> None:
    Approvals(read(home).agent.runs).decide("job", approve=approve, plan_sha256=plan.public().sha256)


@pytest.mark.parametrize(("limits", "first"), [(ASK, Consent.PENDING), (AUTOMATIC, Consent.GIVEN)])
def test_a_run_that_was_never_seen_is_written_down(
    limits: Limits, first: Consent, make_plan: MakePlan, make_home: MakeHome, tmp_path: Path
) -> None:
    approvals, plan = Approvals(tmp_path / "runs"), make_plan()
    assert Operator(approvals, allowing(make_home(), limits)).consent("job", plan) is first
    (asked,) = approvals.runs()
    assert (asked.job, asked.plan_sha256, asked.decision) == ("job", plan.public().sha256, Decision.PENDING)


@pytest.mark.parametrize("limits", [ASK, AUTOMATIC])
@pytest.mark.parametrize(("approve", "consent"), [(True, Consent.GIVEN), (False, Consent.DENIED)])
def test_the_word_holds_whatever_the_limits_say(
    limits: Limits, approve: bool, consent: Consent, make_plan: MakePlan, make_home: MakeHome, tmp_path: Path
) -> None:
    approvals, plan = Approvals(tmp_path / "runs"), make_plan()
    operator = Operator(approvals, allowing(make_home(), limits))
    operator.consent("job", plan)
    approvals.decide("job", approve=approve, plan_sha256=plan.public().sha256)
    assert operator.consent("job", plan) is consent


def test_a_plan_that_the_columns_cannot_serve_does_not_reach_the_operator(
    make_plan: MakePlan, make_home: MakeHome, tmp_path: Path
) -> None:
    approvals, plan = Approvals(tmp_path / "runs"), make_plan()
    wider = plan.model_copy(update={"task": plan.task.model_copy(update={"width": 99})})
    with pytest.raises(RefusalError) as caught:
        Operator(approvals, allowing(make_home(), AUTOMATIC)).consent("job", wider)
    assert caught.value.code is RefusalCode.DATA
    assert approvals.runs() == ()


def test_an_approval_is_not_of_another_plan(make_plan: MakePlan, make_home: MakeHome, tmp_path: Path) -> None:
    approvals, plan = Approvals(tmp_path / "runs"), make_plan()
    operator = Operator(approvals, allowing(make_home(), ASK))
    operator.consent("job", plan)
    approvals.decide("job", approve=True, plan_sha256=plan.public().sha256)
    with pytest.raises(RefusalError, match="another plan"):
        operator.consent("job", make_plan(target_epsilon=2.0))
    assert operator.consent("other", plan) is Consent.PENDING


def test_a_deployed_site_answers_only_what_its_operator_approved(
    make_home: MakeHome, make_plan: MakePlan, make_request: MakeRequest
) -> None:
    home, plan = make_home(), make_plan()
    with assembled(home) as site:
        assert site.consider(Offer(plan=plan, job="job")).willingness is Willingness.PENDING
        assert site.answer(make_request(plan)).refusal is RefusalCode.APPROVAL
        decide(home, plan, approve=True)
        assert site.consider(Offer(plan=plan, job="job")).willingness is Willingness.READY
        assert site.answer(make_request(plan)).update is not None
        decide(home, plan, approve=False)
        assert site.answer(make_request(plan, 1)).refusal is RefusalCode.APPROVAL
        assert len(site.ledger.entries()) == 1


def test_limits_alone_decide_where_the_file_says_so(
    make_home: MakeHome, make_plan: MakePlan, make_request: MakeRequest
) -> None:
    with assembled(make_home(limits={"approval": "auto-within-limits"})) as site:
        assert site.answer(make_request(make_plan())).update is not None


def test_noise_is_the_operating_system_s(make_home: MakeHome, make_plan: MakePlan, make_request: MakeRequest) -> None:
    with assembled(make_home()) as site:
        assert type(site.noise(make_request(make_plan()))) is OSNoise


def test_a_second_site_on_the_same_ledger_is_refused(make_home: MakeHome) -> None:
    home = make_home()
    with assembled(home), pytest.raises(InputError, match=f"in use by process {os.getpid()}"):
        assemble(read(home))
    with assembled(home):
        pass


def test_a_ledger_that_another_process_has_is_refused(make_home: MakeHome) -> None:
    home = make_home()
    (home / "state").mkdir()
    holding = "import sys; from pathlib import Path; from veil.client.lines import FileLock\n"
    holding += "lock = FileLock(Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", holding, str(home / "state" / "ledger.sqlite")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(InputError, match=f"in use by process {other.pid}"):
            assemble(read(home))
        other.communicate(b"")
    with assembled(home):
        pass


def test_a_site_without_its_key_does_not_open(make_home: MakeHome) -> None:
    home = make_home()
    (home / "keys" / "node.key").unlink()
    with pytest.raises(InputError, match=r"node\.key"):
        open_app(home / "site.toml")


def test_a_table_that_cannot_be_read_ends_the_executor_before_any_round(make_home: MakeHome) -> None:
    """Were it read at the first round, a coordinator would learn of its records by which plan failed."""
    home = make_home()
    with (home / "table.csv").open("a", encoding="utf-8") as table:
        table.write(",".join([*["0.5"] * 6, "a label that site.toml does not name"]) + "\n")
    with pytest.raises(TableError):
        open_app(home / "site.toml")


def test_a_site_file_without_labels_is_refused(make_home: MakeHome) -> None:
    home = make_home()
    text = (home / "site.toml").read_text(encoding="utf-8")
    start, end = text.index("[data.labels]"), text.index("[limits]")
    (home / "site.toml").write_text(text[:start] + text[end:], encoding="utf-8")
    with pytest.raises(InputError, match="labels"):
        open_app(home / "site.toml")
