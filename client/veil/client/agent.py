# SPDX-License-Identifier: Apache-2.0
"""The site's agent: keeps the line to the coordinator, hands each message to the executor, sends the answer back.

Promises that it fetches and runs no code, that no answer leaves with a field that the inventory does not list, that it
goes on after lost lines and lost executors, and that what it writes about itself holds nothing about the records.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flwr.app import Message, RecordDict
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.message_pb2 import Message as ProtoMessage

from veil.client.connection import Connection, DeclinedError, NotAdmittedError, UnreachableError
from veil.client.workbench import ExecutorLostError, Workbench
from veil.common.delivery import Progress, Standing
from veil.common.errors import RefusalCode
from veil.common.exchange import KeyReply, OfferReply, RoundReply, StatementReply, Willingness
from veil.common.inventory import TRAIN, check_outgoing
from veil.common.wire import (
    CHUNK,
    KEYS,
    MANIFEST,
    OFFER,
    STATEMENT,
    WireError,
    decode_key_reply,
    decode_offer_reply,
    decode_reply,
    encode_key_reply,
    encode_offer_reply,
    encode_progress,
    encode_reply,
    encode_statement_reply,
)

POLL_S, IDLE_POLL_S = 0.1, 2.0
"""Seconds between two looks for a message: while a run is on, and when none was for a while."""

_IDLE_AFTER_S = 60.0
_RETRY_S = (0.5, 10.0)

_log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Tally:
    """What the agent did, for its status file and its metrics.

    Attributes:
        released: rounds answered with an update.
        refused: offers and rounds refused, by code.
        last: the last one's job and outcome.
        connected: whether the coordinator answers.
        since: when that last changed, or the agent began; seconds since 1970.
    """

    released: int = 0
    refused: dict[str, int] = field(default_factory=dict)
    last: dict[str, Any] = field(default_factory=dict)
    connected: bool = False
    since: float = field(default_factory=time.time)

    def note(self, reply: RecordDict, action: str) -> None:
        """Count a round's reply, and a refused offer or request to share noise; other messages are not counted."""
        answer = _counted(reply, action)
        if answer is None:
            return
        if answer.refusal is not None:
            self.refused[answer.refusal.value] = self.refused.get(answer.refusal.value, 0) + 1
        elif isinstance(answer, RoundReply):
            self.released += 1
        else:
            return
        self.last = {"job": answer.job, "outcome": "released" if answer.refusal is None else answer.refusal.value}

    def write(self, path: Path) -> None:
        """The status file, replaced whole."""
        partial = path.with_name(f".{path.name}.partial")
        status = {
            "pid": os.getpid(),
            "since": self.since,
            "connected": self.connected,
            "released": self.released,
            "refused": self.refused,
            "last": self.last,
        }
        partial.write_text(json.dumps(status), encoding="utf-8")
        partial.replace(path)


def _action(message: Message) -> str:
    return message.metadata.message_type.removeprefix("query.")


def _message(frame: bytes) -> Message | None:
    """An executor's answer; None for what is no message with content."""
    try:
        reply = message_from_proto(ProtoMessage.FromString(frame))
    except Exception:  # bytes that are no message fail inside protobuf and Flower in many ways
        return None
    return reply if reply.has_content() else None


def _counted(reply: RecordDict, action: str) -> RoundReply | OfferReply | KeyReply | None:
    with contextlib.suppress(WireError):
        match action:
            case _ if action == OFFER:
                return decode_offer_reply(reply)
            case _ if action == KEYS:
                return decode_key_reply(reply)
            case _ if action == TRAIN:
                return decode_reply(reply)
    return None


class Agent:
    """One site's agent.

    Args:
        site: its name.
        connect: opens the line to the coordinator.
        workbench: its executor.
        status_file: where it says how it is.
        counts: whether the site's owner declares the number of units public.
    """

    def __init__(
        self,
        *,
        site: str,
        connect: Callable[[], Connection],
        workbench: Workbench,
        status_file: Path,
        counts: bool = False,
    ) -> None:
        self.tally = Tally()
        self._counts = counts
        self._site, self._connect, self._workbench, self._status_file = site, connect, workbench, status_file
        self._line: Connection | None = None

    def run(self, stop: threading.Event) -> None:
        """Serve until told to stop; every lost line is taken up again."""
        wait = _RETRY_S[0]
        while not stop.is_set():
            try:
                with self._connect() as line:
                    self._line, wait = line, _RETRY_S[0]
                    _log.info("connected to the coordinator")
                    self._set(connected=True)
                    self._serve(line, stop)
            except UnreachableError as error:
                _log.warning("the coordinator cannot be reached: %s", error)
            except NotAdmittedError as error:
                _log.error("the coordinator does not admit this site's key: %s", error)
                wait = _RETRY_S[1]
            finally:
                self._line = None
                self._set(connected=False)
            stop.wait(wait)
            wait = min(2 * wait, _RETRY_S[1])

    def connected(self) -> bool:
        """Whether the coordinator answered the last heartbeat."""
        return self._line is not None and self._line.alive.is_set()

    def _serve(self, line: Connection, stop: threading.Event) -> None:
        busy_at = time.monotonic()
        while not stop.is_set():
            message = line.receive()
            if message is None:
                idle = time.monotonic() - busy_at > _IDLE_AFTER_S
                stop.wait(IDLE_POLL_S if idle else POLL_S)
                continue
            try:
                wanted = line.send(self._reply(line, message))
            except DeclinedError:
                wanted = False
            if not wanted:
                _log.warning("the coordinator no longer wants a reply in run %d", message.metadata.run_id)
            busy_at = time.monotonic()
            self._set(connected=True)

    def _reply(self, line: Connection, message: Message) -> Message:
        if line.carries_bundle(message.metadata.run_id):
            _log.error("run %d carries a bundle of code; it is refused unread", message.metadata.run_id)
            return self._refuse(message, RefusalCode.BUNDLE)
        try:
            frame = self._workbench.ask(message_to_proto(message).SerializeToString())
        except ExecutorLostError:
            return self._refuse(message, RefusalCode.INTERNAL)
        reply = _message(frame)
        if reply is None:
            _log.error("the executor answered with what is no message; it is ended")
            self._workbench.close()
            return self._refuse(message, RefusalCode.INTERNAL)
        try:
            check_outgoing(reply.content, _action(message), counts=self._counts)
        except WireError as error:
            _log.error("an answer stays here: %s", error)
            return self._refuse(message, RefusalCode.INTERNAL)
        self.tally.note(reply.content, _action(message))
        return reply

    def _refuse(self, message: Message, code: RefusalCode) -> Message:
        match _action(message):
            case action if action == OFFER:
                content = encode_offer_reply(OfferReply(job="", willingness=Willingness.REFUSED, refusal=code))
            case action if action in {MANIFEST, CHUNK}:
                content = encode_progress(Progress(manifest="", standing=Standing.REFUSED, refusal=code))
            case action if action == STATEMENT:
                content = encode_statement_reply(StatementReply(job="", refusal=code))
            case action if action == KEYS:
                content = encode_key_reply(KeyReply(job="", refusal=code))
            case _:
                content = encode_reply(RoundReply(site=self._site, job="", round=-1, refusal=code))
        self.tally.note(content, _action(message))
        return Message(content=content, reply_to=message)

    def _set(self, *, connected: bool) -> None:
        if connected is not self.tally.connected:
            self.tally.connected, self.tally.since = connected, time.time()
        try:
            self.tally.write(self._status_file)
        except OSError as error:
            _log.error("the status file cannot be written: %s", error)
