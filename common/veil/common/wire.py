# SPDX-License-Identifier: Apache-2.0
"""RoundRequest and RoundReply as Flower records: the one module that knows both languages.

Promises that what is decoded has the stated types, or a `WireError` says what was wrong; nothing is guessed.
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from numpy.typing import NDArray

from veil.common.errors import PlanError, RefusalCode
from veil.common.exchange import RoundReply, RoundRequest
from veil.common.plan import RunPlan
from veil.common.schedule import ReleaseKind
from veil.common.update import Adapter, Update

ARRAYS, CONFIG, METRICS = "arrays", "config", "metrics"


class WireError(ValueError):
    """A message that is not what this version of Veil sends."""


def encode_adapter(adapter: Adapter) -> ArrayRecord:
    """The adapter as named arrays."""
    return ArrayRecord({name: Array(np.ascontiguousarray(t)) for name, t in sorted(adapter.tensors.items())})


def decode_adapter(record: ArrayRecord) -> Adapter:
    """The inverse of `encode_adapter`.

    Raises:
        WireError: for arrays that are not float32 or not finite.
    """
    tensors = {name: _numpy(array) for name, array in record.items()}
    for name, tensor in tensors.items():
        if tensor.dtype != np.float32 or not np.isfinite(tensor).all():
            raise WireError(f"adapter tensor {name} of {tensor.dtype}; expected finite float32")
    return Adapter(tensors=tensors)


def encode_request(request: RoundRequest) -> RecordDict:
    """The content of a train message."""
    config = ConfigRecord(
        {
            "plan": request.plan.public().to_json(),
            "job": request.job,
            "round": request.round,
            "kind": request.kind.value,
            "nominal-units": request.nominal_units,
        }
    )
    return RecordDict({ARRAYS: encode_adapter(request.adapter), CONFIG: config})


def decode_request(content: RecordDict) -> RoundRequest:
    """The inverse of `encode_request`.

    Raises:
        WireError: when a part is missing or of the wrong type.
    """
    config = _config(content)
    try:
        return RoundRequest(
            plan=RunPlan.from_json(str(config["plan"])),
            job=str(config["job"]),
            round=_integer(config["round"]),
            kind=ReleaseKind(str(config["kind"])),
            adapter=decode_adapter(content.array_records[ARRAYS]),
            nominal_units=float(str(config["nominal-units"])),
        )
    except (KeyError, ValueError, PlanError) as error:
        raise WireError(f"request: {type(error).__name__}: {error}") from None


def encode_reply(reply: RoundReply) -> RecordDict:
    """The content of a train reply. Its weight is the constant 1: no count of records leaves."""
    config: dict[str, Any] = {"site": reply.site, "job": reply.job, "round": reply.round}
    record = RecordDict({METRICS: MetricRecord({"num-examples": 1})})
    if reply.update is None:
        config["refusal"] = str(reply.refusal)
    else:
        config["spacing"] = reply.update.spacing
        points = {name: Array(np.ascontiguousarray(p)) for name, p in sorted(reply.update.points.items())}
        record[ARRAYS] = ArrayRecord(points)
    record[CONFIG] = ConfigRecord(config)
    return record


def decode_reply(content: RecordDict) -> RoundReply:
    """The inverse of `encode_reply`.

    Raises:
        WireError: when a part is missing or of the wrong type.
    """
    config = _config(content)
    try:
        site, job, round_ = str(config["site"]), str(config["job"]), _integer(config["round"])
        if "refusal" in config:
            return RoundReply(site=site, job=job, round=round_, refusal=RefusalCode(str(config["refusal"])))
        points = {name: _numpy(array) for name, array in content.array_records[ARRAYS].items()}
        if any(p.dtype != np.int64 for p in points.values()):
            raise WireError("an update holds int64 lattice points only")
        update = Update(points=points, spacing=float(str(config["spacing"])))
        return RoundReply(site=site, job=job, round=round_, update=update)
    except (KeyError, ValueError) as error:
        raise WireError(f"reply: {type(error).__name__}: {error}") from None


def payload_bytes(content: RecordDict) -> int:
    """Bytes of all records of a message, transport framing not counted."""
    arrays = sum(record.count_bytes() for record in content.array_records.values())
    config = sum(record.count_bytes() for record in content.config_records.values())
    return arrays + config + sum(record.count_bytes() for record in content.metric_records.values())


def _config(content: RecordDict) -> ConfigRecord:
    if CONFIG not in content.config_records:
        raise WireError("a message without its config record")
    return content.config_records[CONFIG]


def _integer(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise WireError(f"{value!r}; expected an integer")
    return value


def _numpy(array: Array) -> NDArray[Any]:
    """The array's numbers, never through pickle."""
    if array.stype != "numpy.ndarray":
        raise WireError(f"array of type {array.stype}; expected numpy.ndarray")
    try:
        numbers: NDArray[Any] = np.load(io.BytesIO(array.data), allow_pickle=False)
    except Exception as error:  # hostile bytes fail inside numpy in many ways, MemoryError among them
        raise WireError(f"array that numpy cannot read ({type(error).__name__})") from None
    if not isinstance(numbers, np.ndarray):
        raise WireError("an archive in the place of an array")
    return numbers
