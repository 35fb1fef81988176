# SPDX-License-Identifier: Apache-2.0
"""Tests of `veil.client.app`: whatever a message holds, a message with a short word goes back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.supercore.task_identity import TaskIdentity

from veil.client.app import client_app
from veil.client.site import Site
from veil.common.delivery import Chunk, FileEntry, Manifest, Position, Progress, Standing
from veil.common.errors import RefusalCode
from veil.common.exchange import Offer, OfferReply, RoundRequest, Willingness
from veil.common.plan import RunPlan
from veil.common.statement import Statement
from veil.common.weights import WEIGHTS_NAME
from veil.common.wire import (
    CHUNK,
    MANIFEST,
    OFFER,
    STATEMENT,
    decode_offer_reply,
    decode_progress,
    decode_reply,
    decode_statement_reply,
    encode_chunk,
    encode_manifest,
    encode_offer,
    encode_request,
)

MakePlan = Callable[..., RunPlan]
MakeRequest = Callable[..., RoundRequest]
MakeSite = Callable[..., Site]
Ask = Callable[[str, RecordDict], RecordDict]

DIGEST = "a" * 64
MANIFESTED = Manifest(entries=(FileEntry(name=WEIGHTS_NAME, size=4, sha256=DIGEST),))
REFUSED = Progress(manifest="", standing=Standing.REFUSED, refusal=RefusalCode.MALFORMED)


def asking(app: ClientApp) -> Ask:
    TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 1, 1

    def ask(message_type: str, content: RecordDict) -> RecordDict:
        context = Context(run_id=1, node_id=2, node_config={}, state=RecordDict(), run_config={})
        return app(message=Message(content, 2, message_type), context=context).content

    return ask


@pytest.fixture
def ask(make_site: MakeSite) -> Ask:
    site = make_site()
    return asking(client_app(lambda _: site))


def test_a_round_and_an_offer_reach_the_site(ask: Ask, make_plan: MakePlan, make_request: MakeRequest) -> None:
    reply = decode_reply(ask("train", encode_request(make_request(make_plan()))))
    assert (reply.site, reply.job, reply.round, reply.refusal) == ("Ulm", "job", 0, None)
    offer = Offer(plan=make_plan(), job="other")
    answer = decode_offer_reply(ask(f"query.{OFFER}", encode_offer(offer)))
    assert answer == OfferReply(job="other", willingness=Willingness.READY)


def test_a_statement_is_asked_for_with_the_run_s_offer(
    ask: Ask, make_plan: MakePlan, make_request: MakeRequest
) -> None:
    plan = make_plan()
    ask("train", encode_request(make_request(plan)))
    offer = encode_offer(Offer(plan=plan, job="job"))
    reply = decode_statement_reply(ask(f"query.{STATEMENT}", offer))
    assert reply.signed is not None and reply.signed.genuine
    assert Statement.from_text(reply.signed.text).site == "Ulm"
    for content in (changed(offer, job="a\nb"), changed(offer, plan=None), *EMPTY):
        reply = decode_statement_reply(ask(f"query.{STATEMENT}", content))
        assert (reply.job, reply.refusal) == ("", RefusalCode.MALFORMED)


def test_a_delivery_reaches_the_site(ask: Ask, make_plan: MakePlan) -> None:
    """The plan needs no backbone: the site says so, and for a piece of nothing it wants to see the list."""
    begun = decode_progress(ask(f"query.{MANIFEST}", encode_manifest(MANIFESTED, Offer(plan=make_plan(), job="job"))))
    assert begun == Progress(manifest=MANIFESTED.digest, standing=Standing.REFUSED, refusal=RefusalCode.APPROVAL)
    chunk = Chunk(manifest=DIGEST, position=Position(name=WEIGHTS_NAME, offset=0), data=b"four")
    received = decode_progress(ask(f"query.{CHUNK}", encode_chunk(chunk)))
    assert received == Progress(manifest=DIGEST, standing=Standing.MANIFEST_WANTED)


def changed(content: RecordDict, **config: Any) -> RecordDict:
    """The same message with other values; None leaves one out."""
    values = {**content.config_records["config"], **config}
    kept = ConfigRecord({name: value for name, value in values.items() if value is not None})
    return RecordDict({**content, "config": kept})


EMPTY: list[RecordDict] = [RecordDict(), RecordDict({"config": ConfigRecord()})]


@pytest.mark.parametrize("change", [{"plan": None}, {"plan": "{}"}, {"plan": 3}, {"round": "1"}, {"job": "\x1b[2J"}])
def test_a_malformed_round_is_a_code(
    change: dict[str, Any], ask: Ask, make_plan: MakePlan, make_request: MakeRequest
) -> None:
    honest = encode_request(make_request(make_plan()))
    for content in (changed(honest, **change), *EMPTY):
        reply = decode_reply(ask("train", content))
        assert (reply.refusal, reply.site, reply.job, reply.round) == (RefusalCode.MALFORMED, "Ulm", "", -1)


@pytest.mark.parametrize("change", [{"plan": None}, {"plan": "{"}, {"plan": b"{}"}, {"job": None}, {"job": "a\nb"}])
def test_a_malformed_offer_is_a_code(change: dict[str, Any], ask: Ask, make_plan: MakePlan) -> None:
    honest = encode_offer(Offer(plan=make_plan(), job="job"))
    for content in (changed(honest, **change), *EMPTY):
        answer = decode_offer_reply(ask(f"query.{OFFER}", content))
        assert answer == OfferReply(job="", willingness=Willingness.REFUSED, refusal=RefusalCode.MALFORMED)


@pytest.mark.parametrize(
    "change",
    [
        {"names": None},
        {"names": ["../../etc/passwd"]},
        {"names": WEIGHTS_NAME},
        {"sizes": [-1]},
        {"sizes": [4, 4]},
        {"sizes": [2**60]},
        {"sha256": ["A" * 64]},
        {"plan": "{}"},
    ],
    ids=str,
)
def test_a_malformed_manifest_is_a_code(change: dict[str, Any], ask: Ask, make_plan: MakePlan) -> None:
    honest = encode_manifest(MANIFESTED, Offer(plan=make_plan(), job="job"))
    for content in (changed(honest, **change), *EMPTY):
        assert decode_progress(ask(f"query.{MANIFEST}", content)) == REFUSED


@pytest.mark.parametrize(
    "change",
    [{"data": None}, {"data": b""}, {"data": "text"}, {"offset": -1}, {"name": "../x"}, {"manifest": "a"}],
    ids=str,
)
def test_a_malformed_chunk_is_a_code(change: dict[str, Any], ask: Ask) -> None:
    honest = encode_chunk(Chunk(manifest=DIGEST, position=Position(name=WEIGHTS_NAME, offset=0), data=b"four"))
    for content in (changed(honest, **change), *EMPTY):
        assert decode_progress(ask(f"query.{CHUNK}", content)) == REFUSED


def test_the_site_is_found_by_what_it_configured(make_site: MakeSite, make_plan: MakePlan) -> None:
    """The function given at the site sees the node's context; the message has no part in it."""
    seen: list[Context] = []
    site = make_site()

    def open_site(context: Context) -> Site:
        seen.append(context)
        return site

    ask = asking(client_app(open_site))
    ask(f"query.{OFFER}", encode_offer(Offer(plan=make_plan(), job="job")))
    assert [context.node_id for context in seen] == [2]
