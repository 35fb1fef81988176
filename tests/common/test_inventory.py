# SPDX-License-Identifier: Apache-2.0
"""Tests of `veil.common.inventory`: complete against the wire itself, and nothing passes that it does not list."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from flwr.proto import fleet_pb2, heartbeat_pb2, message_pb2, run_pb2

from veil.common import wire
from veil.common.delivery import Position, Progress, Standing
from veil.common.errors import RefusalCode
from veil.common.exchange import KeyReply, OfferReply, RoundReply, StatementReply, Willingness
from veil.common.inventory import ENVELOPE, FIELDS, TRAIN, WITHHELD, Mark, check_outgoing, known, table
from veil.common.masking import Member
from veil.common.statement import SignedStatement
from veil.common.update import MaskedUpdate, Update
from veil.common.wire import CHUNK, MANIFEST, OFFER, STATEMENT, WireError

DIGEST = "0" * 64
UPDATE = Update(points={"head.weight": np.zeros((2, 3), np.int32)}, spacing=0.5)
SIGNED = SignedStatement(text="{}", signature=b"s", public_pem=b"p")
RELEASED = RoundReply(site="Ulm", job="job", round=1, update=UPDATE, head=DIGEST, units=7)
REFUSED = RefusalCode.INTERNAL
HIDDEN = MaskedUpdate(words={"head.weight": np.zeros((2, 3), np.uint64)}, spacing=0.5)
MEMBER = Member(site="Ulm", masking_key=bytes(32), signature=b"s", public_pem=b"p")

REPLIES: dict[str, tuple[type, list[RecordDict]]] = {
    TRAIN: (
        RoundReply,
        [
            wire.encode_reply(RELEASED),
            wire.encode_reply(RoundReply(site="Ulm", job="job", round=1, refusal=REFUSED, head=DIGEST)),
            wire.encode_reply(RoundReply(site="Ulm", job="job", round=1, masked=HIDDEN)),
        ],
    ),
    OFFER: (
        OfferReply,
        [wire.encode_offer_reply(OfferReply(job="job", willingness=Willingness.REFUSED, refusal=REFUSED))],
    ),
    **{
        action: (
            Progress,
            [
                wire.encode_progress(
                    Progress(manifest=DIGEST, standing=Standing.RECEIVING, next=Position(name="config.json", offset=1))
                ),
                wire.encode_progress(Progress(manifest=DIGEST, standing=Standing.REFUSED, refusal=REFUSED)),
            ],
        )
        for action in (MANIFEST, CHUNK)
    },
    wire.KEYS: (
        KeyReply,
        [
            wire.encode_key_reply(KeyReply(job="job", member=MEMBER)),
            wire.encode_key_reply(KeyReply(job="job", refusal=REFUSED)),
        ],
    ),
    STATEMENT: (
        StatementReply,
        [
            wire.encode_statement_reply(StatementReply(job="job", signed=SIGNED)),
            wire.encode_statement_reply(StatementReply(job="job", refusal=REFUSED)),
        ],
    ),
}


def sent(content: RecordDict) -> set[str]:
    """What a message holds, read off the records themselves."""
    names = {name for record in content.config_records.values() for name in record}
    names |= {name for record in content.metric_records.values() for name in record}
    return names | set(content.array_records)


@pytest.mark.parametrize("action", REPLIES)
def test_every_field_that_is_sent_is_marked_and_every_mark_is_of_a_field(action: str) -> None:
    kind, contents = REPLIES[action]
    assert set().union(*map(sent, contents)) == set(known(action))
    values = {field.value for field in FIELDS if field.action == action}
    declared = {f"{kind.__name__}.{field.name}" for field in dataclasses.fields(kind)}
    assert declared <= values, "a new field of the value needs a mark"
    assert values - declared <= {"the constant 1"}


def test_every_query_and_the_round_have_their_replies_listed() -> None:
    encoders = {name for name in vars(wire) if name.startswith("encode_") and name.endswith(("reply", "progress"))}
    replies = {"encode_reply", "encode_offer_reply", "encode_statement_reply", "encode_key_reply"}
    assert encoders == {*replies, "encode_progress"}
    assert set(REPLIES) == {field.action for field in FIELDS}


@pytest.mark.parametrize("action", REPLIES)
def test_what_is_listed_passes(action: str) -> None:
    for content in REPLIES[action][1]:
        check_outgoing(content, action, counts=True)


@pytest.mark.parametrize("action", REPLIES)
@pytest.mark.parametrize(
    ("record", "extra"),
    [
        ("config", ConfigRecord({"loss": 0.5})),
        ("metrics", MetricRecord({"accuracy": 0.5})),
        ("debug", ConfigRecord({"n": 7})),
    ],
)
def test_what_is_not_listed_stays(action: str, record: str, extra: Any) -> None:
    content = RecordDict(dict(REPLIES[action][1][0]))
    content[record] = type(extra)({**content.get(record, {}), **extra})
    with pytest.raises(WireError, match="no inventory lists"):
        check_outgoing(content, action, counts=True)


def test_counts_pass_only_where_the_owner_declares_them() -> None:
    with pytest.raises(WireError, match="release_counts"):
        check_outgoing(wire.encode_reply(RELEASED), TRAIN, counts=False)
    silent = dataclasses.replace(RELEASED, units=None)
    check_outgoing(wire.encode_reply(silent), TRAIN, counts=False)


def test_numbers_off_the_lattice_and_weights_stay() -> None:
    content = wire.encode_reply(RELEASED)
    for width in ("float32", "int64", "uint8", "bool"):
        content["arrays"] = ArrayRecord({"head.weight": Array(np.zeros(3, width))})
        with pytest.raises(WireError, match=width):
            check_outgoing(content, TRAIN, counts=True)
    for width in ("int8", "int16"):
        content["arrays"] = ArrayRecord({"head.weight": Array(np.zeros(3, width))})
        check_outgoing(content, TRAIN, counts=True)
    content = wire.encode_reply(RELEASED)
    content["metrics"] = MetricRecord({"num-examples": 57})
    with pytest.raises(WireError, match="constant 1"):
        check_outgoing(content, TRAIN, counts=True)


def test_an_unknown_question_gets_no_field() -> None:
    with pytest.raises(WireError):
        check_outgoing(wire.encode_reply(RELEASED), "query.other", counts=True)


MESSAGES: list[Any] = [
    fleet_pb2.ActivateNodeRequest,
    fleet_pb2.DeactivateNodeRequest,
    fleet_pb2.PullMessagesRequest,
    fleet_pb2.PushMessagesRequest,
    heartbeat_pb2.SendNodeHeartbeatRequest,
    message_pb2.PushObjectRequest,
    message_pb2.PullObjectRequest,
    message_pb2.ConfirmMessageReceivedRequest,
    message_pb2.Message,
    message_pb2.Metadata,
    message_pb2.ObjectTree,
    run_pb2.GetRunRequest,
]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: message.DESCRIPTOR.name)
def test_the_envelope_is_described_to_the_last_field(message: Any) -> None:
    """A field that a new Flower adds has to be looked at first."""
    assert {field.name for field in message.DESCRIPTOR.fields} == set(ENVELOPE[message.DESCRIPTOR.name])


def test_the_envelope_describes_nothing_else() -> None:
    assert set(ENVELOPE) == {message.DESCRIPTOR.name for message in MESSAGES}


def test_privacy_md_holds_the_inventory() -> None:
    text = (Path(__file__).parents[2] / "PRIVACY.md").read_text(encoding="utf-8")
    remedy = "put in what python -m veil.common.inventory prints"
    assert "\n".join(table()) in text, remedy
    for what in WITHHELD:
        assert f"- {what}" in text, what


def test_only_an_update_is_noised_and_only_what_an_owner_says_is_declared() -> None:
    assert {field.name for field in FIELDS if field.mark is Mark.NOISED} == {"arrays", "masked", "spacing"}
    assert {field.name for field in FIELDS if field.mark is Mark.DECLARED} == {"site", "units"}
