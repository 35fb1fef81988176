# SPDX-License-Identifier: Apache-2.0
"""RoundRequest and RoundReply as Flower records: the one module that knows both languages.

Promises that what is decoded has the stated types, or a `WireError` says what was wrong; nothing is guessed.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.lib.format as npy
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.common.serde import recorddict_to_proto
from numpy.typing import NDArray

from veil.common.delivery import Chunk, FileEntry, Manifest, Position, Progress, Standing
from veil.common.errors import PlanError, RefusalCode, RunError
from veil.common.exchange import (
    KeyReply,
    Offer,
    OfferReply,
    RoundReply,
    RoundRequest,
    StatementReply,
    Willingness,
)
from veil.common.masking import MOST_MEMBERS, Member
from veil.common.plan import RunPlan
from veil.common.schedule import ReleaseKind
from veil.common.statement import SignedStatement
from veil.common.update import Adapter, MaskedUpdate, Update, packed, unpacked

ARRAYS, CONFIG, METRICS, MASKED = "arrays", "config", "metrics", "masked"

OFFER = "offer"
"""The action of a query message that carries an offer."""

MANIFEST, CHUNK = "manifest", "chunk"
"""The actions of query messages that carry the list of a backbone's files, and a piece of one."""


STATEMENT = "statement"
"""The action of a query message that asks a site to state, signed, what it did in a run; its content is the offer's."""


KEYS = "keys"
"""The action of a query message that asks a site for its public masking key; its content is the offer's."""

_LARGEST_HALF = float(np.finfo(np.float16).max)
_SENT = ("int8", "int16", "uint16", "int32", "int64", "float16", "float32")
_POINTS = tuple(np.dtype(f"int{bits}") for bits in (8, 16, 32))


class WireError(ValueError):
    """A message that is not what this version of Veil sends."""


def encode_adapter(adapter: Adapter, bits: int = 32) -> ArrayRecord:
    """The adapter as named arrays, in floating point of so many bits.

    Raises:
        RunError: for a number that 16 bits cannot hold.
    """
    for name, tensor in adapter.tensors.items():
        largest = float(np.abs(tensor).max(initial=0.0))
        if bits == 16 and largest > _LARGEST_HALF:
            raise RunError(
                f"{name} with {largest:.4g} in 16 bits",
                f"at most {_LARGEST_HALF:.0f}",
                "set wire.adapter_bits = 32, or lower training.learning_rate",
            )
    arrays = {name: np.ascontiguousarray(t, dtype=f"float{bits}") for name, t in sorted(adapter.tensors.items())}
    return ArrayRecord({name: Array(array) for name, array in arrays.items()})


def decode_adapter(record: ArrayRecord, bits: int = 32) -> Adapter:
    """The inverse of `encode_adapter`, up to its rounding.

    Raises:
        WireError: for arrays of another width, or not finite.
    """
    tensors = {name: _numpy(array) for name, array in record.items()}
    for name, tensor in tensors.items():
        if tensor.dtype != np.dtype(f"float{bits}") or not np.isfinite(tensor).all():
            raise WireError(f"adapter tensor {name} of {tensor.dtype}; expected finite float{bits}")
    return Adapter(tensors={name: tensor.astype(np.float32, copy=False) for name, tensor in tensors.items()})


def _adapter_bits(plan: RunPlan, kind: ReleaseKind) -> int:
    """An evaluation judges the very adapter that the coordinator keeps."""
    return 32 if kind is ReleaseKind.EVALUATION else plan.wire.adapter_bits


def encode_request(request: RoundRequest) -> RecordDict:
    """The content of a train message, the adapter as wide as the plan says.

    Raises:
        RunError: for an adapter that does not fit.
    """
    config: dict[str, Any] = {
        "plan": request.plan.public().to_json(),
        "job": request.job,
        "round": request.round,
        "kind": request.kind.value,
        "nominal-units": request.nominal_units,
    }
    if request.witness:
        config["witness"] = request.witness
    if request.members:
        config |= {"attempt": request.attempt, **_encode_members(request.members)}
    arrays = encode_adapter(request.adapter, _adapter_bits(request.plan, request.kind))
    return RecordDict({ARRAYS: arrays, CONFIG: ConfigRecord(config)})


def addressed(content: RecordDict, witness: str) -> RecordDict:
    """A train message's content for one site, with the last line seen of its ledger; the arrays are shared."""
    config = ConfigRecord({**content.config_records[CONFIG], **({"witness": witness} if witness else {})})
    return RecordDict({ARRAYS: content.array_records[ARRAYS], CONFIG: config})


def decode_request(content: RecordDict) -> RoundRequest:
    """The inverse of `encode_request`.

    Raises:
        WireError: when a part is missing or of the wrong type.
    """
    config = _config(content)
    try:
        plan, kind = RunPlan.from_json(str(config["plan"])), ReleaseKind(str(config["kind"]))
        return RoundRequest(
            plan=plan,
            job=_job(config["job"]),
            round=_integer(config["round"]),
            kind=kind,
            adapter=decode_adapter(content.array_records[ARRAYS], _adapter_bits(plan, kind)),
            nominal_units=float(str(config["nominal-units"])),
            witness=_digest(config.get("witness", "")),
            members=_decode_members(config) if "members" in config else (),
            attempt=_integer(config.get("attempt", 0)),
        )
    except (KeyError, ValueError, PlanError) as error:
        raise WireError(f"request: {type(error).__name__}: {error}") from None


def encode_reply(reply: RoundReply) -> RecordDict:
    """The content of a train reply. Its weight is the constant 1: no count leaves but one declared public."""
    config: dict[str, Any] = {"site": reply.site, "job": reply.job, "round": reply.round}
    if reply.head:
        config["head"] = reply.head
    if reply.units is not None:
        config["units"] = reply.units
    record = RecordDict({METRICS: MetricRecord({"num-examples": 1})})
    if reply.update is not None:
        config["spacing"] = reply.update.spacing
        record[ARRAYS] = _arrays(reply.update.points)
    elif reply.masked is not None:
        config["spacing"] = reply.masked.spacing
        record[MASKED] = _arrays({name: packed(words) for name, words in reply.masked.words.items()})
    else:
        config["refusal"] = str(reply.refusal)
    record[CONFIG] = ConfigRecord(config)
    return record


def decode_reply(content: RecordDict) -> RoundReply:
    """The inverse of `encode_reply`; whether the width is the plan's, `validation` knows.

    Raises:
        WireError: when a part is missing or of the wrong type.
    """
    config = _config(content)
    try:
        site, job, round_ = str(config["site"]), str(config["job"]), _integer(config["round"])
        head = _digest(config.get("head", ""))
        if "refusal" in config:
            return RoundReply(site=site, job=job, round=round_, refusal=RefusalCode(str(config["refusal"])), head=head)
        spacing = float(str(config["spacing"]))
        units = _integer(config["units"]) if "units" in config else None
        update, masked = _update(content, spacing), _masked(content, spacing)
        return RoundReply(site=site, job=job, round=round_, update=update, masked=masked, head=head, units=units)
    except (KeyError, ValueError) as error:
        raise WireError(f"reply: {type(error).__name__}: {error}") from None


def _arrays(numbers: Mapping[str, NDArray[Any]]) -> ArrayRecord:
    return ArrayRecord({name: Array(np.ascontiguousarray(one)) for name, one in sorted(numbers.items())})


def _update(content: RecordDict, spacing: float) -> Update | None:
    """Lattice points in the widths that travel."""
    if ARRAYS not in content.array_records:
        return None
    points = {name: _numpy(array) for name, array in content.array_records[ARRAYS].items()}
    if any(one.dtype not in _POINTS for one in points.values()):
        raise WireError("an update holds lattice points of int8, int16 or int32 only")
    return Update(points=points, spacing=spacing)


def _masked(content: RecordDict, spacing: float) -> MaskedUpdate | None:
    if MASKED not in content.array_records:
        return None
    words = {name: unpacked(_numpy(array)) for name, array in content.array_records[MASKED].items()}
    return MaskedUpdate(words=words, spacing=spacing)


def refuses(reply: Message) -> bool:
    """Whether a site's reply, to whatever question, is an error or a refusal."""
    if not reply.has_content():
        return True
    return "refusal" in reply.content.config_records.get(CONFIG, {})


def encode_offer(offer: Offer) -> RecordDict:
    """The content of an offer."""
    config: dict[str, Any] = {"plan": offer.plan.public().to_json(), "job": offer.job}
    if offer.members:
        config |= _encode_members(offer.members)
    return RecordDict({CONFIG: ConfigRecord(config)})


def decode_offer(content: RecordDict) -> Offer:
    """The inverse of `encode_offer`.

    Raises:
        WireError: when a part is missing or of the wrong type.
    """
    config = _config(content)
    try:
        return Offer(
            plan=RunPlan.from_json(str(config["plan"])),
            job=_job(config["job"]),
            members=_decode_members(config) if "members" in config else (),
        )
    except (KeyError, ValueError, PlanError) as error:
        raise WireError(f"offer: {type(error).__name__}: {error}") from None


def encode_offer_reply(reply: OfferReply) -> RecordDict:
    """The content of the answer to an offer."""
    config: dict[str, Any] = {"job": reply.job, "willingness": reply.willingness.value}
    if reply.refusal is not None:
        config["refusal"] = reply.refusal.value
    return RecordDict({CONFIG: ConfigRecord(config)})


def decode_offer_reply(content: RecordDict) -> OfferReply:
    """The inverse of `encode_offer_reply`.

    Raises:
        WireError: when a part is missing or of the wrong type.
    """
    config = _config(content)
    try:
        return OfferReply(
            job=str(config["job"]),
            willingness=Willingness(str(config["willingness"])),
            refusal=RefusalCode(str(config["refusal"])) if "refusal" in config else None,
        )
    except (KeyError, ValueError) as error:
        raise WireError(f"answer to an offer: {type(error).__name__}: {error}") from None


def payload_bytes(content: RecordDict) -> int:
    """Bytes of all records of a message, transport framing not counted."""
    return int(recorddict_to_proto(content).ByteSize())


def _config(content: RecordDict) -> ConfigRecord:
    if CONFIG not in content.config_records:
        raise WireError("a message without its config record")
    return content.config_records[CONFIG]


def _job(value: object) -> str:
    """A run's name: letters, digits and a few signs, so that it can stand in any line and any message."""
    if not isinstance(value, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9 ._-]{0,119}", value):
        raise WireError("the name of a run; expected letters, digits, blanks, dots, dashes")
    return value


def _digest(value: object) -> str:
    """64 hex digits, or nothing."""
    if not isinstance(value, str) or not re.fullmatch(r"([0-9a-f]{64})?", value):
        raise WireError(f"{value!r}; expected the hash of a ledger line")
    return value


def _integer(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise WireError(f"{value!r}; expected an integer")
    return value


@lru_cache(maxsize=64)
def _npy_header(dtype: str, shape: tuple[int, ...]) -> bytes:
    """What numpy writes before such an array: reading it by comparison spares parsing it as Python, once an array."""
    header = io.BytesIO()
    fields = {"descr": npy.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
    npy.write_array_header_1_0(header, fields)
    return header.getvalue()


def _numpy(array: Array) -> NDArray[Any]:
    """The array's numbers, never through pickle."""
    if array.stype != "numpy.ndarray":
        raise WireError(f"array of type {array.stype}; expected numpy.ndarray")
    if array.dtype in _SENT and all(isinstance(length, int) and length >= 0 for length in array.shape):
        plain, header = np.dtype(array.dtype), _npy_header(array.dtype, tuple(array.shape))
        if array.data.startswith(header) and len(array.data) == len(header) + plain.itemsize * math.prod(array.shape):
            return np.frombuffer(array.data, plain, offset=len(header)).reshape(array.shape)
    try:
        numbers: NDArray[Any] = np.load(io.BytesIO(array.data), allow_pickle=False)
    except Exception as error:  # hostile bytes fail inside numpy in many ways, MemoryError among them
        raise WireError(f"array that numpy cannot read ({type(error).__name__})") from None
    if not isinstance(numbers, np.ndarray):
        raise WireError("an archive in the place of an array")
    return numbers


def encode_manifest(manifest: Manifest, offer: Offer) -> RecordDict:
    """The content of a message that begins a delivery; the offer says for which run, which the site approved or not."""
    content = encode_offer(offer)
    config = content.config_records[CONFIG]
    config["names"] = [entry.name for entry in manifest.entries]
    config["sizes"] = [entry.size for entry in manifest.entries]
    config["sha256"] = [entry.sha256 for entry in manifest.entries]
    return content


def decode_manifest(content: RecordDict) -> tuple[Offer, Manifest]:
    """The inverse of `encode_manifest`.

    Raises:
        WireError: when a part is missing or of the wrong type, or the files are not those of a backbone.
    """
    offer, config = decode_offer(content), _config(content)
    try:
        columns = (_list(config["names"]), _list(config["sizes"]), _list(config["sha256"]))
        entries = (
            FileEntry(name=_text(name), size=_integer(size), sha256=_text(sha256))
            for name, size, sha256 in zip(*columns, strict=True)
        )
        return offer, Manifest(entries=tuple(entries))
    except (KeyError, ValueError) as error:
        raise WireError(f"manifest: {type(error).__name__}: {error}") from None


def encode_chunk(chunk: Chunk) -> RecordDict:
    """The content of a message with a piece of a backbone."""
    config = {"manifest": chunk.manifest, **_encode_position(chunk.position), "data": chunk.data}
    return RecordDict({CONFIG: ConfigRecord(config)})


def decode_chunk(content: RecordDict) -> Chunk:
    """The inverse of `encode_chunk`.

    Raises:
        WireError: when a part is missing, of the wrong type or out of range.
    """
    config = _config(content)
    try:
        data = config["data"]
        if not isinstance(data, bytes):
            raise WireError(f"a chunk of {type(data).__name__}; expected bytes")
        return Chunk(manifest=_text(config["manifest"]), position=_decode_position(config), data=data)
    except (KeyError, ValueError) as error:
        raise WireError(f"chunk: {type(error).__name__}: {error}") from None


def encode_progress(progress: Progress) -> RecordDict:
    """The content of the answer to a manifest or a chunk."""
    config: dict[str, Any] = {"manifest": progress.manifest, "standing": progress.standing.value}
    if progress.next is not None:
        config |= _encode_position(progress.next)
    if progress.refusal is not None:
        config["refusal"] = progress.refusal.value
    return RecordDict({CONFIG: ConfigRecord(config)})


def decode_progress(content: RecordDict) -> Progress:
    """The inverse of `encode_progress`.

    Raises:
        WireError: when a part is missing, of the wrong type or out of range.
    """
    config = _config(content)
    try:
        return Progress(
            manifest=_text(config["manifest"]),
            standing=Standing(_text(config["standing"])),
            next=_decode_position(config) if "name" in config or "offset" in config else None,
            refusal=RefusalCode(_text(config["refusal"])) if "refusal" in config else None,
        )
    except (KeyError, ValueError) as error:
        raise WireError(f"answer to a delivery: {type(error).__name__}: {error}") from None


def _encode_position(position: Position) -> dict[str, Any]:
    return {"name": position.name, "offset": position.offset}


def _decode_position(config: ConfigRecord) -> Position:
    return Position(name=_text(config["name"]), offset=_integer(config["offset"]))


def _list(value: object) -> list[Any]:
    if not isinstance(value, list):
        raise WireError(f"{type(value).__name__}; expected a list")
    return value


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise WireError(f"{type(value).__name__}; expected text")
    return value


def encode_statement_reply(reply: StatementReply) -> RecordDict:
    """The content of the answer to a request for a statement."""
    config: dict[str, Any] = {"job": reply.job}
    if reply.signed is not None:
        config["statement"] = reply.signed.text
        config["signature"] = reply.signed.signature
        config["public-key"] = reply.signed.public_pem
    if reply.refusal is not None:
        config["refusal"] = reply.refusal.value
    return RecordDict({CONFIG: ConfigRecord(config)})


def decode_statement_reply(content: RecordDict) -> StatementReply:
    """The inverse of `encode_statement_reply`.

    Raises:
        WireError: when a part is missing or of the wrong type.
    """
    config = _config(content)
    try:
        job = _text(config["job"])
        if "refusal" in config:
            return StatementReply(job=job, refusal=RefusalCode(_text(config["refusal"])))
        signed = SignedStatement(
            text=_text(config["statement"]),
            signature=_octets(config["signature"]),
            public_pem=_octets(config["public-key"]),
        )
        return StatementReply(job=job, signed=signed)
    except (KeyError, ValueError) as error:
        raise WireError(f"statement: {type(error).__name__}: {error}") from None


def _octets(value: object) -> bytes:
    if not isinstance(value, bytes):
        raise WireError(f"{type(value).__name__}; expected bytes")
    return value


def encode_key_reply(reply: KeyReply) -> RecordDict:
    """The content of the answer to a request for a masking key."""
    config: dict[str, Any] = {"job": reply.job}
    if reply.member is not None:
        config |= _encode_members([reply.member])
    if reply.refusal is not None:
        config["refusal"] = reply.refusal.value
    return RecordDict({CONFIG: ConfigRecord(config)})


def decode_key_reply(content: RecordDict) -> KeyReply:
    """The inverse of `encode_key_reply`.

    Raises:
        WireError: when a part is missing or of the wrong type.
    """
    config = _config(content)
    try:
        job = _text(config["job"])
        if "refusal" in config:
            return KeyReply(job=job, refusal=RefusalCode(_text(config["refusal"])))
        (member,) = _decode_members(config)
        return KeyReply(job=job, member=member)
    except (KeyError, ValueError) as error:
        raise WireError(f"masking key: {type(error).__name__}: {error}") from None


def _encode_members(members: Sequence[Member]) -> dict[str, Any]:
    return {
        "members": [one.site for one in members],
        "masking-keys": [one.masking_key for one in members],
        "signatures": [one.signature for one in members],
        "public-keys": [one.public_pem for one in members],
    }


def _decode_members(config: ConfigRecord) -> tuple[Member, ...]:
    columns = [_list(config[name]) for name in ("members", "masking-keys", "signatures", "public-keys")]
    if len(columns[0]) > MOST_MEMBERS:
        raise WireError(f"a cohort of {len(columns[0])}; expected at most {MOST_MEMBERS}")
    return tuple(
        Member(site=_text(site), masking_key=_octets(key), signature=_octets(signature), public_pem=_octets(pem))
        for site, key, signature, pem in zip(*columns, strict=True)
    )
