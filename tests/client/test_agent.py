# SPDX-License-Identifier: Apache-2.0
"""Tests of `veil.client.agent`: it goes on after lost lines and lost executors, and refuses what it must not run."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, cast

import numpy as np
import pytest
from flwr.app import Message, RecordDict
from flwr.common.serde import message_to_proto
from flwr.supercore.task_identity import TaskIdentity

from veil.client import agent as module
from veil.client import workbench
from veil.client.agent import Agent, Tally
from veil.client.connection import Connection, DeclinedError, NotAdmittedError, UnreachableError
from veil.client.workbench import ExecutorLostError, Workbench
from veil.common.delivery import Progress, Standing
from veil.common.errors import RefusalCode
from veil.common.exchange import KeyReply, OfferReply, RoundReply, StatementReply, Willingness
from veil.common.head import WEIGHT
from veil.common.update import Update
from veil.common.wire import (
    CHUNK,
    MANIFEST,
    OFFER,
    STATEMENT,
    decode_offer_reply,
    decode_progress,
    decode_reply,
    decode_statement_reply,
    encode_key_reply,
    encode_offer_reply,
    encode_progress,
    encode_reply,
    encode_statement_reply,
)

UPDATE = Update(points={WEIGHT: np.zeros((2, 3), np.int32)}, spacing=1.0)
RELEASED = RoundReply(site="Ulm", job="study", round=1, update=UPDATE, head="a" * 64)
BUNDLED = 13
"""The run that carries a bundle."""


def released(content: RecordDict) -> bool:
    """Whether this is `RELEASED`."""
    reply = decode_reply(content)
    return reply.update is not None and reply.update.to_bytes() == UPDATE.to_bytes() and reply.job == RELEASED.job


def message(message_type: str = "train", run_id: int = 1) -> Message:
    TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = run_id, 1, 1
    question = Message(RecordDict(), 2, message_type)
    question.metadata.__dict__["_message_id"] = question.object_id
    return question


class Line:
    """A line whose deliveries are scripted: messages, errors; when they are used up, the agent is told to stop."""

    def __init__(self, deliveries: Sequence[Message | Exception | None], stop: threading.Event) -> None:
        self._deliveries, self._stop = list(deliveries), stop
        self.sent: list[Message] = []
        self.answers: list[bool | Exception] = []
        self.alive = threading.Event()
        self.alive.set()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.alive.clear()

    def receive(self) -> Message | None:
        if not self._deliveries:
            self._stop.set()
            return None
        delivered = self._deliveries.pop(0)
        if isinstance(delivered, Exception):
            raise delivered
        return delivered

    def carries_bundle(self, run_id: int) -> bool:
        return run_id == BUNDLED

    def send(self, reply: Message) -> bool:
        self.sent.append(reply)
        answer = self.answers.pop(0) if self.answers else True
        if isinstance(answer, Exception):
            raise answer
        return answer


class Desk:
    """A workbench that answers with a prepared content, or fails."""

    def __init__(self, answer: RecordDict | bytes | Exception) -> None:
        self.answer, self.asked, self.closed = answer, 0, 0

    def ask(self, frame: bytes) -> bytes:
        self.asked += 1
        if isinstance(self.answer, Exception):
            raise self.answer
        if isinstance(self.answer, bytes):
            return self.answer
        return bytes(message_to_proto(Message(content=self.answer, reply_to=message())).SerializeToString())

    def close(self) -> None:
        self.closed += 1


@dataclass
class Scene:
    """An agent between scripted lines and a desk."""

    status_file: Path
    stop: threading.Event = field(default_factory=threading.Event)
    attempts: int = 0
    waits: list[float] = field(default_factory=list)

    def run(self, desk: object, *lines: Line | Exception) -> Agent:
        waiting = list(lines)

        def connect() -> Connection:
            self.attempts += 1
            line = waiting.pop(0)
            if not waiting and isinstance(line, Exception):
                self.stop.set()
            if isinstance(line, Exception):
                raise line
            return cast(Connection, line)

        agent = Agent(site="Ulm", connect=connect, workbench=cast(Workbench, desk), status_file=self.status_file)
        agent.run(self.stop)
        return agent

    @property
    def status(self) -> dict[str, Any]:
        return cast(dict[str, Any], json.loads(self.status_file.read_text(encoding="utf-8")))


@pytest.fixture
def scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Scene:
    monkeypatch.setattr(module, "_RETRY_S", (0.001, 0.004))
    monkeypatch.setattr(module, "POLL_S", 0.001)
    return Scene(tmp_path / "status.json")


def test_a_round_is_handed_over_and_its_answer_sent(scene: Scene) -> None:
    line = Line([None, message(), None, message()], scene.stop)
    desk = Desk(encode_reply(RELEASED))
    agent = scene.run(desk, line)
    assert desk.asked == 2
    assert [released(reply.content) for reply in line.sent] == [True, True]
    assert agent.tally.released == 2
    assert not agent.connected()


@pytest.mark.parametrize("error", [UnreachableError("lost"), NotAdmittedError("revoked")])
def test_a_lost_line_is_taken_up_again(error: Exception, scene: Scene) -> None:
    """Lost before it was there, while waiting, and while sending; then everything goes on."""
    sending = Line([message()], scene.stop)
    sending.answers.append(error)
    last = Line([message()], scene.stop)
    agent = scene.run(Desk(encode_reply(RELEASED)), error, error, Line([error], scene.stop), sending, last)
    assert scene.attempts == 5
    assert len(last.sent) == 1
    assert agent.tally.released == 2
    assert scene.status["connected"] is False


def test_a_reply_that_is_no_longer_wanted_is_let_go(scene: Scene, caplog: pytest.LogCaptureFixture) -> None:
    line = Line([message(), message(), message()], scene.stop)
    line.answers = [False, DeclinedError("the run ended"), True]
    scene.run(Desk(encode_reply(RELEASED)), line)
    assert len(line.sent) == 3
    assert scene.attempts == 1
    assert caplog.text.count("no longer wants") == 2


REFUSED = {
    "train": lambda content: decode_reply(content).refusal,
    f"query.{OFFER}": lambda content: decode_offer_reply(content).refusal,
    f"query.{MANIFEST}": lambda content: decode_progress(content).refusal,
    f"query.{CHUNK}": lambda content: decode_progress(content).refusal,
    f"query.{STATEMENT}": lambda content: decode_statement_reply(content).refusal,
}


@pytest.mark.parametrize("message_type", REFUSED)
def test_a_bundle_is_refused_in_the_message_s_own_form_and_never_handed_over(message_type: str, scene: Scene) -> None:
    line, desk = Line([message(message_type, BUNDLED)], scene.stop), Desk(encode_reply(RELEASED))
    scene.run(desk, line)
    (reply,) = line.sent
    assert REFUSED[message_type](reply.content) is RefusalCode.BUNDLE
    assert desk.asked == 0


@pytest.mark.parametrize("message_type", REFUSED)
@pytest.mark.parametrize(
    "answer",
    [ExecutorLostError("hung"), b"", b"\xff\xff\xff", b"\x0a\x03abc", os.urandom(200)],
    ids=["lost", "nothing", "garbage", "a stub", "noise"],
)
def test_an_executor_without_an_answer_is_a_code(answer: bytes | Exception, message_type: str, scene: Scene) -> None:
    """And the next message finds an executor that answers."""
    desk = Desk(answer)
    line = Line([message(message_type), message()], scene.stop)
    asked = desk.ask

    def ask(frame: bytes) -> bytes:
        if desk.asked:
            desk.answer = encode_reply(RELEASED)
        return asked(frame)

    desk.ask = ask  # type: ignore[method-assign]  # a fake at the seam
    scene.run(desk, line)
    first, second = line.sent
    assert REFUSED[message_type](first.content) is RefusalCode.INTERNAL
    assert released(second.content)
    assert desk.closed == (1 if isinstance(answer, bytes) else 0)


@pytest.fixture
def bench(tmp_path: Path, fake_executor: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], Workbench]]:
    monkeypatch.setattr(workbench, "_RESTART_S", 0.0)
    opened: list[Workbench] = []

    def make() -> Workbench:
        opened.append(Workbench(tmp_path / "site.toml", 0.3, fake_executor))
        return opened[-1]

    yield make
    for one in opened:
        one.close()


class Told(Workbench):
    """A real workbench; what is put before its executor is replaced by what the executor should do."""

    def __init__(self, inner: Workbench, orders: list[bytes]) -> None:
        self._inner, self._orders = inner, orders

    def ask(self, frame: bytes) -> bytes:
        return self._inner.ask(self._orders.pop(0))

    def close(self) -> None:
        self._inner.close()


def test_a_real_executor_that_hangs_ends_or_talks_nonsense_does_not_end_the_agent(
    bench: Callable[[], Workbench], scene: Scene
) -> None:
    """The last order is the honest answer reversed, which the executor turns round."""
    honest = Desk(encode_reply(RELEASED)).ask(b"")
    orders = [b"hang", b"crash", b"nonsense", b"half", honest[::-1]]
    line = Line([message() for _ in orders], scene.stop)
    agent = scene.run(Told(bench(), orders), line)
    refusals = [decode_reply(reply.content).refusal for reply in line.sent]
    assert refusals == [RefusalCode.INTERNAL] * 4 + [None]
    assert agent.tally.released == 1
    assert agent.tally.refused == {"internal": 4}


def test_a_status_file_that_cannot_be_written_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "POLL_S", 0.001)
    scene = Scene(tmp_path / "missing" / "status.json")
    line = Line([message()], scene.stop)
    scene.run(Desk(encode_reply(RELEASED)), line)
    assert len(line.sent) == 1
    assert "status file cannot be written" in caplog.text


def test_the_status_file_says_what_was_done(scene: Scene) -> None:
    seen: list[dict[str, Any]] = []

    class Looking(Line):
        def receive(self) -> Message | None:
            seen.append(scene.status)
            return super().receive()

    scene.run(Desk(encode_reply(RELEASED)), Looking([message()], scene.stop))
    before, after = seen[0], seen[-1]
    assert (before["pid"], before["connected"], before["released"]) == (os.getpid(), True, 0)
    assert (after["released"], after["refused"]) == (1, {})
    assert after["last"] == {"job": "study", "outcome": "released"}
    assert after["since"] == before["since"]
    assert [path.name for path in scene.status_file.parent.iterdir()] == ["status.json"]


def test_the_status_file_and_the_log_hold_no_part_of_an_answer(scene: Scene, caplog: pytest.LogCaptureFixture) -> None:
    update = Update(points={WEIGHT: np.full((2, 3), 48_151_623, np.int32)}, spacing=1.0)
    answer = RoundReply(site="Ulm", job="study", round=1, update=update, units=4_815_162, head="b" * 64)
    scene.run(Desk(encode_reply(answer)), Line([message()], scene.stop))
    said = caplog.text + scene.status_file.read_text(encoding="utf-8")
    assert "48151" not in said
    assert "b" * 64 not in said


def test_a_tally_counts_rounds_and_refused_offers() -> None:
    tally = Tally()
    refusal = RoundReply(site="Ulm", job="study", round=1, refusal=RefusalCode.BUDGET)
    declined = OfferReply(job="other", willingness=Willingness.REFUSED, refusal=RefusalCode.POLICY)
    unshared = KeyReply(job="other", refusal=RefusalCode.POLICY)
    contents = [
        (encode_reply(RELEASED), "train"),
        (encode_reply(RELEASED), "train"),
        (encode_reply(refusal), "train"),
        (encode_offer_reply(declined), "offer"),
        (encode_key_reply(unshared), "keys"),
        (encode_reply(refusal), "train"),
    ]
    for content, action in contents:
        tally.note(content, action)
    assert (tally.released, tally.refused) == (2, {"budget": 2, "policy": 2})
    assert tally.last == {"job": "study", "outcome": "budget"}


@pytest.mark.parametrize(
    ("content", "action"),
    [
        (encode_offer_reply(OfferReply(job="other", willingness=Willingness.READY)), "offer"),
        (encode_offer_reply(OfferReply(job="other", willingness=Willingness.PENDING)), "offer"),
        (encode_progress(Progress(manifest="a" * 64, standing=Standing.COMPLETE)), "chunk"),
        (encode_progress(Progress(manifest="", standing=Standing.REFUSED, refusal=RefusalCode.MALFORMED)), "manifest"),
        (encode_statement_reply(StatementReply(job="other", refusal=RefusalCode.APPROVAL)), "statement"),
        (RecordDict(), "train"),
    ],
    ids=["ready", "pending", "delivered", "delivery refused", "no statement", "nothing"],
)
def test_other_messages_are_not_counted(content: RecordDict, action: str) -> None:
    tally = Tally()
    tally.note(content, action)
    assert (tally.released, tally.refused, tally.last) == (0, {}, {})
