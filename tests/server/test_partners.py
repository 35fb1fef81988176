# SPDX-License-Identifier: Apache-2.0
"""Tests of `veil.server.partners`: whose keys are passed on, and who is left out before a round costs anything."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, cast

import pytest
from flwr.app import Message
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

from veil.common.errors import RefusalCode
from veil.common.exchange import KeyReply, Offer
from veil.common.keys import NodeKey
from veil.common.masking import MaskingKey, Member
from veil.common.plan import RunPlan
from veil.common.wire import decode_offer, encode_key_reply
from veil.server.partners import Partners, ask_for_partners

NAMES = {2: "Bonn", 3: "Linz", 4: "Ulm"}
NODES = {name: NodeKey.generate() for name in NAMES.values()}
MEMBERS = {name: MaskingKey.of(key, name).member for name, key in NODES.items()}
KEYS = {name: key.public_pem for name, key in NODES.items()}
Answer = Callable[[Offer], KeyReply | None]


class Sites:
    """Nodes that answer each question as they were told; None keeps silent."""

    def __init__(self, answers: dict[int, Answer]) -> None:
        TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 1, 1
        self.answers, self.asked = answers, 0

    def get_node_ids(self) -> Iterable[int]:
        return list(self.answers)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        self.asked += 1
        for message in messages:
            node = message.metadata.dst_node_id
            answer = self.answers[node](decode_offer(message.content))
            if answer is not None:
                reply = Message(encode_key_reply(answer), 1, "query.keys")
                reply.metadata.__dict__["_src_node_id"] = node
                yield reply


def honest(name: str) -> Answer:
    return lambda offer: KeyReply(job=offer.job, member=MEMBERS[name])


@pytest.fixture
def ask(make_plan: Callable[..., RunPlan]) -> Callable[..., tuple[Partners, Sites]]:
    plan = make_plan()

    def go(**changed: Any) -> tuple[Partners, Sites]:
        sites = Sites({node: changed.get(name, honest(name)) for node, name in NAMES.items()})
        return ask_for_partners(cast(Grid, sites), plan, "job", site_of=NAMES.__getitem__, keys=KEYS), sites

    return go


Ask = Callable[..., tuple[Partners, Sites]]


def test_every_key_is_collected_and_everybody_asked_about_all_of_them(ask: Ask) -> None:
    seen: list[tuple[Member, ...]] = []

    def look(offer: Offer) -> KeyReply:
        seen.append(offer.members)
        return KeyReply(job=offer.job, member=MEMBERS["Ulm"])

    partners, sites = ask(Ulm=look)
    assert partners == Partners(members={node: MEMBERS[name] for node, name in NAMES.items()}, refusals={})
    assert seen == [(), tuple(MEMBERS[name] for name in sorted(MEMBERS))] and sites.asked == 2


def test_who_refuses_the_cohort_is_left_out_and_the_others_are_asked_again(ask: Ask) -> None:
    def picky(offer: Offer) -> KeyReply:
        if offer.members:
            return KeyReply(job=offer.job, refusal=RefusalCode.POLICY)
        return KeyReply(job=offer.job, member=MEMBERS["Linz"])

    partners, sites = ask(Linz=picky)
    assert (sorted(partners.members), partners.refusals, sites.asked) == ([2, 4], {"Linz": "policy"}, 3)


def lies() -> dict[str, Answer]:
    stranger = MaskingKey.of(NodeKey.generate(), "Ulm").member
    return {
        "another site's": honest("Bonn"),
        "a key that is not enrolled": lambda offer: KeyReply(job=offer.job, member=stranger),
        "a masking key that was not signed": lambda offer: KeyReply(
            job=offer.job, member=replace(MEMBERS["Ulm"], masking_key=MEMBERS["Bonn"].masking_key)
        ),
    }


@pytest.mark.parametrize("lie", lies())
def test_a_key_that_is_not_the_sites_own_is_not_passed_on(ask: Ask, lie: str) -> None:
    partners, _ = ask(Ulm=lies()[lie])
    assert (sorted(partners.members), partners.refusals) == ([2, 3], {"Ulm": "malformed"})


def test_a_silent_site_takes_no_part(ask: Ask) -> None:
    partners, _ = ask(Ulm=lambda offer: None)
    assert (sorted(partners.members), partners.refusals) == ([2, 3], {})
