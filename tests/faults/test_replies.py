# SPDX-License-Identifier: Apache-2.0
"""A site that lies, and one that is not who it says: nothing of theirs touches the model, and the operator sees it."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict

from veil.client.connection import Connection, NotAdmittedError, UnreachableError
from veil.common.errors import RefusalCode
from veil.common.exchange import OfferReply, RoundReply, RoundRequest, StatementReply, Willingness
from veil.common.head import CENTRE, WEIGHT
from veil.common.keys import NodeKey
from veil.common.noise import spacing
from veil.common.schedule import ReleaseKind, schedule
from veil.common.update import Update
from veil.common.wire import (
    ARRAYS,
    CONFIG,
    OFFER,
    STATEMENT,
    decode_offer,
    decode_request,
    encode_offer_reply,
    encode_reply,
    encode_statement_reply,
)

Answer = Callable[[RoundRequest], RecordDict]


def zeros(request: RoundRequest) -> RoundReply:
    """A well-formed reply that says nothing."""
    name = CENTRE if request.kind is ReleaseKind.CENTRE else WEIGHT
    shape = request.adapter.tensors[name].shape
    if name == CENTRE:
        shape = (shape[0] + 1,)
    mechanism = next(one.mechanism for one in schedule(request.plan) if one.round == request.round)
    update = Update(points={name: np.zeros(shape, dtype=np.int32)}, spacing=spacing(mechanism.max_grad_norm))
    return RoundReply(site="Dorsten", job=request.job, round=request.round, update=update)


def points(change: Callable[[np.ndarray], np.ndarray]) -> Answer:
    def answer(request: RoundRequest) -> RecordDict:
        honest = zeros(request)
        assert honest.update is not None
        changed = {name: change(one) for name, one in honest.update.points.items()}
        return encode_reply(replace(honest, update=replace(honest.update, points=changed)))

    return answer


def with_spacing(value: float) -> Answer:
    def answer(request: RoundRequest) -> RecordDict:
        content = encode_reply(zeros(request))
        content.config_records[CONFIG]["spacing"] = value
        return content

    return answer


def floats(request: RoundRequest) -> RecordDict:
    content = encode_reply(zeros(request))
    arrays = {name: Array(np.full(5, np.nan)) for name in content.array_records[ARRAYS]}
    content[ARRAYS] = ArrayRecord(arrays)
    return content


def pickled(request: RoundRequest) -> RecordDict:
    content = encode_reply(zeros(request))
    name = next(iter(content.array_records[ARRAYS]))
    objects = np.array([{"a": 1}], dtype=object)
    content[ARRAYS] = ArrayRecord(
        {name: Array(dtype="object", shape=(1,), stype="numpy.ndarray", data=objects.dumps())}
    )
    return content


def endless(request: RoundRequest) -> RecordDict:
    content = encode_reply(zeros(request))
    name = next(iter(content.array_records[ARRAYS]))
    content[ARRAYS] = ArrayRecord({name: Array(dtype="int32", shape=(2**70,), stype="numpy.ndarray", data=b"")})
    return content


LIES: dict[str, Answer] = {
    "empty": lambda request: RecordDict({CONFIG: ConfigRecord({"nothing": 1})}),
    "wrong shape": points(lambda one: np.zeros(one.size + 1, dtype=np.int32)),
    "too long": points(lambda one: np.full_like(one, 2**31 - 1)),
    "too wide": points(lambda one: one.astype(np.int64)),
    "oversized": points(lambda one: np.zeros(1 << 20, dtype=np.int32)),
    "NaN": with_spacing(float("nan")),
    "infinite": with_spacing(float("inf")),
    "coarse": with_spacing(1.0),
    "floating point": floats,
    "pickled": pickled,
    "endless": endless,
    "stale round": lambda request: encode_reply(replace(zeros(request), round=request.round - 1)),
    "another run": lambda request: encode_reply(replace(zeros(request), job="another-run")),
    "another kind": lambda request: encode_reply(
        replace(zeros(request), update=Update(points={"bias": np.zeros(3, dtype=np.int32)}, spacing=1.0))
    ),
}


class Liar:
    """An enrolled site with a program of its own, in a thread."""

    def __init__(self, connection: Connection) -> None:
        self.answer: Answer = lambda request: encode_reply(zeros(request))
        self.replayed: list[bool] = []
        self._connection, self._stop = connection, threading.Event()
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def __enter__(self) -> Liar:
        self._connection.__enter__()
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._stop.set()
        self._thread.join()
        self._connection.__exit__(None, None, None)

    def _serve(self) -> None:
        while not self._stop.wait(0.05):
            message = self._connection.receive()
            if message is not None:
                reply = Message(content=self._content(message), reply_to=message)
                self._connection.send(reply)
                self.replayed.append(self._connection.send(reply))

    def _content(self, message: Message) -> RecordDict:
        if message.metadata.message_type == f"query.{OFFER}":
            job = decode_offer(message.content).job
            return encode_offer_reply(OfferReply(job=job, willingness=Willingness.READY))
        if message.metadata.message_type == f"query.{STATEMENT}":
            return encode_statement_reply(StatementReply(job="", refusal=RefusalCode.APPROVAL))
        return self.answer(decode_request(message.content))


@pytest.fixture
def liar(clinics: Any, tmp_path: Any) -> Iterator[Liar]:
    from veil.client.enrol import enrol

    key, invitation = NodeKey.generate(), clinics.deployment.invite("Dorsten")
    enrol(invitation, key)
    address = f"127.0.0.1:{clinics.deployment.home.settings.port}"
    with Liar(Connection(address, invitation.ca.encode(), key, tmp_path / "node")) as opened:
        yield opened
    revoke(clinics, "Dorsten")


def revoke(clinics: Any, name: str) -> None:
    from contextlib import closing

    from veil.server.link import open_link_state
    from veil.server.roster import Roster

    home = clinics.deployment.home
    with closing(Roster(home.roster, open_link_state(home.database).state())) as roster:
        roster.revoke(name)


def test_every_lie_is_dropped_and_shown_and_the_model_is_the_others(clinics: Any, liar: Liar) -> None:
    lies = list(LIES.items())
    liar.answer = lambda request: lies[(request.round - 1) % len(lies)][1](request)
    job = clinics.submit(clinics.plan(rounds=len(lies)))
    state = clinics.finish(job)
    for (name, _), record in zip(lies, state.records[1:], strict=True):
        assert record.sites == ("Aachen", "Bonn", "Celle"), name
        assert record.refusals == {"Dorsten": RefusalCode.MALFORMED.value}, name
    report = json.loads((job.folder / "result" / "report.json").read_text())
    shown = next(site for site in report["sites"] if site["name"] == "Dorsten")
    assert set(shown["refusals"].values()) == {"malformed"}


def test_a_reply_sent_twice_counts_once(clinics: Any, liar: Liar) -> None:
    state = clinics.finish(clinics.submit(clinics.plan(rounds=3)))
    assert all(record.sites.count("Dorsten") == 1 for record in state.records)
    assert liar.replayed, "it was sent twice"
    assert all("Dorsten" not in record.refusals for record in state.records)


def test_a_revoked_site_is_out_at_once(clinics: Any, tmp_path: Any) -> None:
    from veil.client.enrol import enrol

    key, invitation = NodeKey.generate(), clinics.deployment.invite("Essen")
    enrol(invitation, key)
    address = f"127.0.0.1:{clinics.deployment.home.settings.port}"
    with Connection(address, invitation.ca.encode(), key, tmp_path / "node") as line:
        assert line.receive() is None
        revoke(clinics, "Essen")
        with pytest.raises((NotAdmittedError, UnreachableError)):
            line.receive()


def test_an_unregistered_key_is_not_admitted_and_the_operator_reads_so(clinics: Any) -> None:
    deployment, agent = clinics.deployment, clinics.deployment.sites["Celle"].agent
    deployment.processes.pop("Celle").end()
    own = {path: path.rename(path.with_name(f"{path.name}.own")) for path in (agent.state, agent.key, agent.anchor)}
    NodeKey.generate().save(agent.key)
    deployment.start_site("Celle")
    deployment.wait_for(lambda: "does not admit this site's key" in deployment.log("Celle"), "the agent's word")
    deployment.processes.pop("Celle").end()
    shutil.rmtree(agent.state)
    for path, kept in own.items():
        kept.replace(path)
