# SPDX-License-Identifier: Apache-2.0
"""What coordinator and site say to each other survives the wire exactly; anything else is a WireError, not a guess."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.supercore.task_identity import TaskIdentity

from veil.common.delivery import CHUNK_BYTES, Chunk, FileEntry, Manifest, Position, Progress, Standing
from veil.common.errors import RefusalCode, RunError
from veil.common.exchange import KeyReply, Offer, OfferReply, RoundReply, RoundRequest, StatementReply, Willingness
from veil.common.masking import Member
from veil.common.plan import RunPlan
from veil.common.schedule import ReleaseKind
from veil.common.statement import SignedStatement
from veil.common.update import Adapter, MaskedUpdate, Update
from veil.common.wire import (
    WireError,
    decode_chunk,
    decode_key_reply,
    decode_manifest,
    decode_offer,
    decode_offer_reply,
    decode_progress,
    decode_reply,
    decode_request,
    decode_statement_reply,
    encode_chunk,
    encode_key_reply,
    encode_manifest,
    encode_offer,
    encode_offer_reply,
    encode_progress,
    encode_reply,
    encode_request,
    encode_statement_reply,
    payload_bytes,
    refuses,
)

PLAN = RunPlan.model_validate(
    {
        "name": "p",
        "task": {"kind": "tabular-classification", "labels": ["a", "b"]},
        "privacy": {"target_epsilon": 3.0},
        "simulation": {"path": "t.csv", "features": ["x"], "label": "y", "sites": 2},
    }
)


def request(**change: Any) -> RoundRequest:
    values: dict[str, Any] = {
        "plan": PLAN,
        "job": "job-1",
        "round": 3,
        "kind": ReleaseKind.GRADIENT,
        "adapter": Adapter(tensors={"head.weight": np.arange(6, dtype=np.float32).reshape(2, 3)}),
        "nominal_units": 12.5,
    }
    return RoundRequest(**{**values, **change})


def reply(points: Any = None) -> RoundReply:
    numbers = np.array([[1, -(2**30)], [3, 4]], dtype=np.int32) if points is None else points
    return RoundReply(
        site="s", job="job-1", round=3, update=Update(points={"head.weight": numbers}, spacing=0.5 / 2**20)
    )


def test_a_request_arrives_as_it_left_without_the_simulation() -> None:
    got = decode_request(encode_request(request()))
    assert got.plan == PLAN.public() and got.plan.simulation is None
    assert (got.job, got.round, got.kind, got.nominal_units) == ("job-1", 3, ReleaseKind.GRADIENT, 12.5)
    assert np.array_equal(got.adapter.tensors["head.weight"], request().adapter.tensors["head.weight"])


def test_a_reply_arrives_as_it_left() -> None:
    got = decode_reply(encode_reply(reply()))
    assert got.update is not None and (got.site, got.job, got.round) == ("s", "job-1", 3)
    assert got.update.to_bytes() == reply().update.to_bytes()  # type: ignore[union-attr]


def test_a_refusal_carries_its_code_and_no_numbers() -> None:
    content = encode_reply(RoundReply(site="s", job="j", round=1, refusal=RefusalCode.BUDGET))
    assert not content.array_records
    assert decode_reply(content).refusal is RefusalCode.BUDGET


def test_nothing_but_the_listed_fields_leaves() -> None:
    content = encode_reply(reply())
    assert set(content) == {"arrays", "config", "metrics"}
    assert set(content.config_records["config"]) == {"site", "job", "round", "spacing"}
    assert dict(content.metric_records["metrics"]) == {"num-examples": 1}
    assert set(content.array_records["arrays"]) == {"head.weight"}


def test_a_reply_is_an_update_or_a_refusal() -> None:
    with pytest.raises(ValueError, match="exactly one"):
        RoundReply(site="s", job="j", round=1)


@pytest.mark.parametrize("dtype", ["i1", "i2", "i4"])
def test_narrower_points_arrive_as_they_left(dtype: str) -> None:
    sent = reply(np.array([[1, -127], [3, 4]], dtype=dtype))
    got = decode_reply(travelled(encode_reply(sent)))
    assert got.update is not None and got.update.points["head.weight"].dtype == dtype
    assert got.update.to_bytes() == sent.update.to_bytes()  # type: ignore[union-attr]


@pytest.mark.parametrize("dtype", ["f8", "f4", "f2", "i8", "u4", "u1", "?", ">i4"])
def test_an_update_that_is_not_of_lattice_points(dtype: str) -> None:
    with pytest.raises(WireError, match="int8, int16 or int32 only"):
        decode_reply(encode_reply(reply(np.zeros((2, 2), dtype=dtype))))


@pytest.mark.parametrize("key", ["plan", "job", "round", "kind", "nominal-units"])
def test_a_request_without_one_of_its_parts(key: str) -> None:
    content = encode_request(request())
    del content.config_records["config"][key]
    with pytest.raises(WireError):
        decode_request(content)


@pytest.mark.parametrize(("key", "value"), [("round", "x"), ("kind", "weights"), ("plan", "{}"), ("round", 1.5)])
def test_a_request_with_a_wrong_part(key: str, value: Any) -> None:
    content = encode_request(request())
    content.config_records["config"][key] = value
    with pytest.raises(WireError):
        decode_request(content)


HALF = RunPlan.model_validate({**PLAN.model_dump(mode="json"), "wire": {"adapter_bits": 16}})


def test_an_adapter_of_16_bits_arrives_rounded_once_and_an_evaluation_judges_the_exact_one() -> None:
    exact = np.array([1 + 2.0**-12, 2.0**-20, -65504.0, 0.1], np.float32)
    adapter = Adapter(tensors={"head.weight": exact})
    content = travelled(encode_request(request(plan=HALF, adapter=adapter)))
    got = decode_request(content).adapter.tensors["head.weight"]
    assert got.dtype == np.float32 and content.array_records["arrays"]["head.weight"].dtype == "float16"
    assert got.tolist() == exact.astype(np.float16).tolist() != exact.tolist()
    judged = encode_request(request(plan=HALF, adapter=adapter, kind=ReleaseKind.EVALUATION))
    assert decode_request(judged).adapter.tensors["head.weight"].tolist() == exact.tolist()
    with pytest.raises(WireError, match="finite float32"):
        decode_request(RecordDict({**judged, "arrays": content["arrays"]}))


def test_weights_that_16_bits_cannot_hold_stop_the_run_and_say_why() -> None:
    adapter = Adapter(tensors={"head.weight": np.array([1.0, -65505.0], np.float32)})
    with pytest.raises(RunError, match=r"head.weight with .* in 16 bits.*at most 65504.*adapter_bits = 32"):
        encode_request(request(plan=HALF, adapter=adapter))
    assert encode_request(request(adapter=adapter))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_an_adapter_that_is_not_finite(value: float) -> None:
    with pytest.raises(WireError, match="finite"):
        decode_request(encode_request(request(adapter=Adapter(tensors={"w": np.array([value], np.float32)}))))


def test_pickled_arrays_are_not_opened() -> None:
    array = Array(np.zeros(2))
    evil = np.array([{"code": 1}], dtype=object)
    import io

    buffer = io.BytesIO()
    np.save(buffer, evil, allow_pickle=True)
    array.data = buffer.getvalue()
    content = encode_reply(reply())
    content["arrays"] = ArrayRecord({"head.weight": array})
    with pytest.raises(WireError):
        decode_reply(content)


def test_an_empty_message() -> None:
    for decode in (decode_request, decode_reply):
        with pytest.raises(WireError):
            decode(RecordDict())
        with pytest.raises(WireError):
            decode(RecordDict({"config": ConfigRecord({"job": "j"})}))


def test_the_payload_is_counted() -> None:
    sizes = [payload_bytes(encode_reply(reply(np.zeros((100, 10), f"int{bits}")))) for bits in (8, 16, 32)]
    assert [size - sizes[0] for size in sizes] == pytest.approx([0, 1000, 3000], abs=20)


DIGEST, OTHER = "a" * 64, "b" * 64
OFFER = Offer(plan=PLAN, job="job-1")
MANIFEST = Manifest(
    entries=(
        FileEntry(name="config.json", size=0, sha256=OTHER),
        FileEntry(name="model.safetensors", size=1 << 33, sha256=DIGEST),
    )
)
PLACE = Position(name="model.safetensors", offset=(1 << 33) - 5)
PIECE = Chunk(manifest=DIGEST, position=PLACE, data=bytes(range(256)))
PROGRESSES = [
    Progress(manifest=DIGEST, standing=Standing.MANIFEST_WANTED),
    Progress(manifest=DIGEST, standing=Standing.RECEIVING, next=PLACE),
    Progress(manifest=DIGEST, standing=Standing.COMPLETE),
    *(Progress(manifest=DIGEST, standing=Standing.REFUSED, refusal=code) for code in RefusalCode),
    Progress(manifest="", standing=Standing.REFUSED, refusal=RefusalCode.MALFORMED),
]


def travelled(content: RecordDict) -> RecordDict:
    """The content as it comes out of the bytes of a message."""
    sent = recorddict_to_proto(content).SerializeToString()
    return recorddict_from_proto(type(recorddict_to_proto(content)).FromString(sent))


def changed(content: RecordDict, **change: Any) -> RecordDict:
    """The content with other values, or without those that are None."""
    config = dict(content.config_records["config"])
    kept = {key: value for key, value in {**config, **change}.items() if value is not None}
    return RecordDict({"config": ConfigRecord(kept)})


def test_an_offer_and_its_answers_arrive_as_they_left() -> None:
    got = decode_offer(travelled(encode_offer(OFFER)))
    assert got == Offer(plan=PLAN.public(), job="job-1")
    for willingness in Willingness:
        code = RefusalCode.BUDGET if willingness is Willingness.REFUSED else None
        answer = OfferReply(job="job-1", willingness=willingness, refusal=code)
        assert decode_offer_reply(travelled(encode_offer_reply(answer))) == answer


@pytest.mark.parametrize("job", ["", " x", "../x", "a\nb", "a/b", "n" * 121, "é"])
def test_a_run_s_name_that_could_do_harm_is_refused(job: str) -> None:
    content = encode_offer(OFFER)
    with pytest.raises(WireError, match="name of a run"):
        decode_offer(changed(content, job=job))
    with pytest.raises(WireError, match="name of a run"):
        decode_manifest(changed(encode_manifest(MANIFEST, OFFER), job=job))


def test_a_witness_and_a_head_arrive_and_are_hashes() -> None:
    assert decode_request(travelled(encode_request(request(witness=DIGEST)))).witness == DIGEST
    assert decode_request(encode_request(request())).witness == ""
    answer = RoundReply(site="s", job="j", round=1, refusal=RefusalCode.BUDGET, head=OTHER)
    assert decode_reply(travelled(encode_reply(answer))).head == OTHER
    for wrong in ("x", DIGEST.upper(), 5):
        content = encode_request(request())
        content.config_records["config"]["witness"] = wrong
        with pytest.raises(WireError, match="hash of a ledger line"):
            decode_request(content)


def test_a_number_of_units_leaves_only_when_it_is_given() -> None:
    told = RoundReply(site="s", job="job-1", round=3, update=reply().update, units=40)
    assert decode_reply(travelled(encode_reply(told))).units == 40
    assert decode_reply(travelled(encode_reply(reply()))).units is None


def test_a_manifest_arrives_as_it_left_with_its_offer() -> None:
    offer, manifest = decode_manifest(travelled(encode_manifest(MANIFEST, OFFER)))
    assert (offer, manifest) == (Offer(plan=PLAN.public(), job="job-1"), MANIFEST)
    assert manifest.digest == MANIFEST.digest


def test_a_chunk_arrives_as_it_left_at_its_largest_too() -> None:
    assert decode_chunk(travelled(encode_chunk(PIECE))) == PIECE
    largest = Chunk(manifest=DIGEST, position=PLACE, data=bytes(CHUNK_BYTES))
    assert decode_chunk(travelled(encode_chunk(largest))) == largest
    assert payload_bytes(encode_chunk(largest)) - CHUNK_BYTES < 1000


@pytest.mark.parametrize("progress", PROGRESSES, ids=lambda one: f"{one.standing}-{one.refusal}")
def test_an_answer_to_a_delivery_arrives_as_it_left(progress: Progress) -> None:
    assert decode_progress(travelled(encode_progress(progress))) == progress


@pytest.mark.parametrize(
    "change",
    [
        {"names": None},
        {"sizes": None},
        {"sha256": None},
        {"plan": None},
        {"job": None},
        {"names": "model.safetensors"},
        {"names": b"config.json"},
        {"names": ["config.json"]},
        {"names": ["model.safetensors"]},
        {"names": []},
        {"names": [], "sizes": [], "sha256": []},
        {"names": ["model.safetensors", "config.json"]},
        {"names": ["model.safetensors", "model.safetensors"]},
        {"names": ["../config.json", "model.safetensors"]},
        {"names": ["modeling.py", "model.safetensors"]},
        {"names": ["model.safetensors", "pytorch_model.bin"]},
        {"names": [b"config.json", b"model.safetensors"]},
        {"names": [1, 2]},
        {"sizes": [1]},
        {"sizes": [1, -1]},
        {"sizes": [1, 1 << 62]},
        {"sizes": [1.0, 2.0]},
        {"sizes": ["1", "2"]},
        {"sizes": [True, True]},
        {"sha256": ["", ""]},
        {"sha256": [DIGEST, DIGEST[:-1] + "\n"]},
        {"plan": "{}"},
    ],
)
def test_a_manifest_that_is_none(change: dict[str, Any]) -> None:
    content = changed(encode_manifest(MANIFEST, OFFER), **change)
    with pytest.raises(WireError):
        decode_manifest(travelled(content))


@pytest.mark.parametrize(
    "change",
    [
        {"manifest": None},
        {"name": None},
        {"offset": None},
        {"data": None},
        {"manifest": ""},
        {"manifest": 5},
        {"name": "../model.safetensors"},
        {"name": b"model.safetensors"},
        {"offset": -1},
        {"offset": 1 << 62},
        {"offset": 0.0},
        {"offset": True},
        {"offset": "0"},
        {"data": "text"},
        {"data": [1, 2]},
        {"data": b""},
        {"data": bytes(CHUNK_BYTES + 1)},
    ],
    ids=lambda change: "-".join(f"{key}={str(value)[:20]}" for key, value in change.items()),
)
def test_a_chunk_that_is_none(change: dict[str, Any]) -> None:
    with pytest.raises(WireError):
        decode_chunk(travelled(changed(encode_chunk(PIECE), **change)))


@pytest.mark.parametrize(
    "change",
    [
        {"manifest": None},
        {"manifest": ""},
        {"standing": None},
        {"standing": "done"},
        {"standing": "complete"},
        {"standing": "complete", "name": None},
        {"standing": "complete", "offset": None},
        {"name": None},
        {"offset": None},
        {"name": None, "offset": None},
        {"name": "merges.py"},
        {"offset": -1},
        {"offset": True},
        {"refusal": "budget"},
        {"refusal": "because"},
        {"standing": "refused", "name": None, "offset": None},
        {"standing": "refused", "name": None, "offset": None, "refusal": "my record 7 is odd"},
    ],
)
def test_an_answer_to_a_delivery_that_is_none(change: dict[str, Any]) -> None:
    with pytest.raises(WireError):
        decode_progress(travelled(changed(encode_progress(PROGRESSES[1]), **change)))


@pytest.mark.parametrize("decode", [decode_offer, decode_offer_reply, decode_manifest, decode_chunk, decode_progress])
def test_an_empty_question_or_answer(decode: Callable[[RecordDict], object]) -> None:
    for content in (RecordDict(), RecordDict({"config": ConfigRecord({"job": "j"})})):
        with pytest.raises(WireError):
            decode(content)


SIGNED = SignedStatement(text='{"site":"Ulm"}', signature=bytes(range(256)), public_pem=b"-----BEGIN PUBLIC KEY-----")


def test_a_statement_and_a_refusal_of_one_arrive_as_they_left() -> None:
    for answer in (
        StatementReply(job="job-1", signed=SIGNED),
        *(StatementReply(job="", refusal=code) for code in RefusalCode),
    ):
        assert decode_statement_reply(travelled(encode_statement_reply(answer))) == answer
    TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 1, 1
    refusal = encode_statement_reply(StatementReply(job="", refusal=RefusalCode.BUNDLE))
    assert refuses(Message(refusal, 1, "query.statement"))


@pytest.mark.parametrize(
    "change",
    [{"job": 1}, {"statement": None}, {"statement": b"{}"}, {"signature": "00"}, {"public-key": 5}, {"refusal": "no"}],
)
def test_a_statement_of_another_form_is_refused(change: dict[str, Any]) -> None:
    honest = encode_statement_reply(StatementReply(job="j", signed=SIGNED))
    with pytest.raises(WireError, match="statement"):
        decode_statement_reply(travelled(changed(honest, **change)))


def test_a_reply_holds_a_statement_or_a_refusal() -> None:
    for both in ({}, {"signed": SIGNED, "refusal": RefusalCode.BUDGET}):
        with pytest.raises(ValueError, match="exactly one"):
            StatementReply(job="j", **both)  # type: ignore[arg-type]


MEMBERS = tuple(
    Member(site=site, masking_key=bytes([number] * 32), signature=b"s", public_pem=b"p")
    for number, site in enumerate(("Bonn", "Ulm"))
)


def test_a_cohort_and_its_attempt_arrive_in_requests_and_offers() -> None:
    got = decode_request(encode_request(replace(request(), members=MEMBERS, attempt=3)))
    assert (got.members, got.attempt) == (MEMBERS, 3)
    bare = decode_request(encode_request(request()))
    assert (bare.members, bare.attempt) == ((), 0)
    offer = Offer(plan=PLAN.public(), job="j", members=MEMBERS)
    assert decode_offer(encode_offer(offer)).members == MEMBERS


def test_masked_numbers_arrive_as_they_left_under_a_name_of_their_own() -> None:
    words = np.random.default_rng(0).integers(0, 2**48, (3, 5), dtype=np.uint64)
    sent = RoundReply(site="s", job="j", round=1, masked=MaskedUpdate(words={"w": words}, spacing=0.25))
    content = encode_reply(sent)
    assert set(content.array_records) == {"masked"} and content.array_records["masked"]["w"].dtype == "uint16"
    got = decode_reply(content)
    assert got.update is None and got.masked is not None and got.masked.spacing == 0.25
    assert np.array_equal(got.masked.words["w"], words)


@pytest.mark.parametrize(
    ("shape", "dtype"), [((3, 5), "uint16"), ((3,), "uint16"), ((3, 3), "int16"), ((3, 4), "uint16")]
)
def test_masked_numbers_of_another_form_are_refused(shape: tuple[int, ...], dtype: str) -> None:
    content = encode_reply(
        RoundReply(site="s", job="j", round=1, masked=MaskedUpdate(words={"w": np.zeros(3, np.uint64)}, spacing=1.0))
    )
    content["masked"] = ArrayRecord({"w": Array(np.zeros(shape, dtype))})
    with pytest.raises(WireError, match="masked numbers"):
        decode_reply(content)


def test_a_masking_key_and_a_refusal_of_one_arrive() -> None:
    for sent in (KeyReply(job="j", member=MEMBERS[0]), KeyReply(job="j", refusal=RefusalCode.POLICY)):
        assert decode_key_reply(encode_key_reply(sent)) == sent
    with pytest.raises(ValueError, match="exactly one"):
        KeyReply(job="j")


@pytest.mark.parametrize(
    "change",
    [
        {"masking-keys": [b"x"]},
        {"members": "Bonn"},
        {"members": [1, 2]},
        {"signatures": ["", ""]},
        {"public-keys": []},
    ],
)
def test_a_cohort_of_another_form_is_refused(change: dict[str, Any]) -> None:
    content = encode_offer(Offer(plan=PLAN.public(), job="j", members=MEMBERS))
    content["config"] = ConfigRecord({**content.config_records["config"], **change})
    with pytest.raises(WireError):
        decode_offer(content)


def test_a_cohort_without_end_is_refused() -> None:
    many = tuple(replace(MEMBERS[0], site=f"s{number:04d}") for number in range(101))
    with pytest.raises(WireError, match="at most 100"):
        decode_offer(encode_offer(Offer(plan=PLAN.public(), job="j", members=many)))
