# SPDX-License-Identifier: Apache-2.0
"""Tests of `veil.server.statements`: who made a statement, who did not, and why, with sites that say what they like."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, cast

import pytest
from flwr.app import Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

from veil.common.errors import RefusalCode
from veil.common.exchange import StatementReply
from veil.common.keys import NodeKey
from veil.common.plan import RunPlan
from veil.common.privacy import NeighboringRelation, PrivacyUnit
from veil.common.statement import Cost, SignedStatement, StatedLimits, Statement
from veil.common.wire import decode_offer, encode_statement_reply
from veil.server.statements import NO_ANSWER, Evidence, ask_for_statements

MakePlan = Callable[..., RunPlan]
BONN, ULM = NodeKey.generate(), NodeKey.generate()
NAMES = {2: "Bonn", 3: "Ulm"}


class Sites:
    """Nodes 2, 3, … that answer with what they were given; None keeps silent."""

    def __init__(self, answers: list[Any]) -> None:
        TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 1, 1
        self.answers = dict(enumerate(answers, start=2))
        self.asked: list[Message] = []

    def get_node_ids(self) -> Iterable[int]:
        return list(self.answers)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        self.asked += messages
        for node, answer in self.answers.items():
            if answer is not None:
                content = answer if isinstance(answer, RecordDict) else encode_statement_reply(answer)
                reply = Message(content, 1, "query.statement")
                reply.metadata.__dict__["_src_node_id"] = node
                yield reply


@pytest.fixture
def plan(make_plan: MakePlan) -> RunPlan:
    return make_plan()


@pytest.fixture
def ask(plan: RunPlan) -> Callable[..., Evidence]:
    def ask(*answers: Any, **options: Any) -> Evidence:
        return ask_for_statements(
            cast(Grid, Sites(list(answers))), plan, "job", **{"site_of": NAMES.__getitem__, **options}
        )

    return ask


@pytest.fixture
def state(plan: RunPlan) -> Callable[..., StatementReply]:
    def make(site: str, key: NodeKey, **change: Any) -> StatementReply:
        fields: dict[str, Any] = {
            "simulation": False,
            "site": site,
            "job": "job",
            "plan_sha256": plan.sha256,
            "unit": PrivacyUnit.RECORD,
            "relation": NeighboringRelation.ADD_OR_REMOVE_ONE,
            "sampler": "full-batch",
            "noise": "os",
            "releases": (),
            "ledger": (),
            "ledger_head": "0" * 64,
            "ledger_lines": 1,
            "delta": 1e-5,
            "this_run": Cost(epsilon=0.0, by_accountant={}),
            "lifetime": Cost(epsilon=0.0, by_accountant={}),
            "limits": StatedLimits(epsilon_per_run=1.0, epsilon_lifetime=1.0, unit=PrivacyUnit.RECORD),
            "backbone_sha256": None,
            "code_sha256": "0" * 64,
            "versions": {},
            "audit": None,
            "time": "",
            **change,
        }
        return StatementReply(job="job", signed=SignedStatement.sign(Statement(**fields), key))

    return make


def test_each_site_is_asked_with_the_run_and_its_statement_kept(
    plan: RunPlan, state: Callable[..., StatementReply]
) -> None:
    bonn, ulm = state("Bonn", BONN), state("Ulm", ULM)
    sites = Sites([bonn, ulm])
    keys = {"Bonn": BONN.public_pem, "Ulm": b"\n" + ULM.public_pem}
    said = ask_for_statements(cast(Grid, sites), plan, "job", site_of=NAMES.__getitem__, keys=keys)
    assert (said.statements, said.missing) == ({"Bonn": bonn.signed, "Ulm": ulm.signed}, {})
    assert [decode_offer(message.content).job for message in sites.asked] == ["job", "job"]


def test_a_site_that_is_silent_refuses_or_talks_nonsense_is_named_with_the_reason(
    ask: Callable[..., Evidence], state: Callable[..., StatementReply]
) -> None:
    assert ask(None, state("Ulm", ULM)).missing == {"Bonn": NO_ANSWER}
    refusal = StatementReply(job="job", refusal=RefusalCode.APPROVAL)
    assert ask(refusal, RecordDict()).missing == {"Bonn": "approval", "Ulm": "malformed"}


def test_what_is_not_the_site_s_own_statement_of_this_run_is_not_taken(
    ask: Callable[..., Evidence], state: Callable[..., StatementReply], make_plan: MakePlan
) -> None:
    honest = state("Bonn", BONN).signed
    assert honest is not None
    changed = SignedStatement(
        text=honest.text.replace('"time":""', '"time":"x"'), signature=honest.signature, public_pem=honest.public_pem
    )
    wrong = {
        "another site's": state("Ulm", ULM),
        "another run's": state("Bonn", BONN, job="job-2"),
        "another plan's": state("Bonn", BONN, plan_sha256=make_plan(seed=9).sha256),
        "changed": StatementReply(job="job", signed=changed),
        "no statement": StatementReply(
            job="job", signed=SignedStatement(text="{}", signature=b"", public_pem=BONN.public_pem)
        ),
    }
    for what, answer in wrong.items():
        said = ask(answer)
        assert (said.statements, said.missing) == ({}, {"Bonn": "malformed"}), what
    keys = {"Bonn": ULM.public_pem}
    assert ask(state("Bonn", BONN), keys=keys).missing == {"Bonn": "malformed"}
    assert ask(state("Bonn", BONN), keys={}).missing == {"Bonn": "malformed"}


def test_simulated_sites_name_themselves_and_each_name_once(
    ask: Callable[..., Evidence], state: Callable[..., StatementReply]
) -> None:
    said = ask(state("Bern", BONN), state("Bern", BONN), None, site_of=None)
    assert set(said.statements) == {"Bern"}
    assert said.missing == {"node 3": "malformed", "node 4": NO_ANSWER}


def test_nobody_is_asked_where_nobody_is(ask: Callable[..., Evidence]) -> None:
    assert ask() == Evidence()
