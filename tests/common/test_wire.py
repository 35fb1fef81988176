# SPDX-License-Identifier: Apache-2.0
"""Requests and replies survive the wire exactly; anything else is a WireError and never a guess."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from veil.common.errors import RefusalCode
from veil.common.exchange import RoundReply, RoundRequest
from veil.common.plan import RunPlan
from veil.common.schedule import ReleaseKind
from veil.common.update import Adapter, Update
from veil.common.wire import (
    WireError,
    decode_reply,
    decode_request,
    encode_reply,
    encode_request,
    payload_bytes,
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
    numbers = np.array([[1, -(2**60)], [3, 4]], dtype=np.int64) if points is None else points
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


@pytest.mark.parametrize("dtype", [np.float64, np.int32, np.float32])
def test_an_update_that_is_not_of_lattice_points(dtype: type) -> None:
    with pytest.raises(WireError, match="int64"):
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
    assert payload_bytes(encode_reply(reply())) >= 4 * 8
