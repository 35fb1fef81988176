# SPDX-License-Identifier: Apache-2.0
"""A Flower Grid over the link's database: asks the sites of a cohort, waits, asks a site again that came back.

Promises that asking ends by its deadline, that a reply to an earlier question is never taken for one to this, and that
a question to a site that restarted is asked again: the site's ledger answers it with the recorded bytes or pays anew.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from flwr.app import Error, Message, MessageType, Metadata, RecordDict
from flwr.app.message import make_message, remove_content_from_message
from flwr.common.constant import NOOP_FLWR_AID, SUPERLINK_NODE_ID, ErrorCode, SubStatus
from flwr.proto.message_pb2 import ObjectTree
from flwr.proto.node_pb2 import NodeInfo
from flwr.server.superlink.linkstate import LinkState
from flwr.serverapp import Grid
from flwr.supercore.constant import NOOP_FEDERATION_ID, NodeStatus, TaskType
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.object_store import NoObjectInStoreError
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity
from sqlalchemy.exc import SQLAlchemyError

from veil.common.errors import RunError
from veil.common.wire import refuses

_POLL_S = 0.05
_HEARTBEAT_S = 10.0
_TTL_MARGIN_S = 5.0
_UNBOUNDED_TTL_S = 3600.0

ABSENCE_S = 10.0
"""How long a round with enough replies waits for a site that is not connected."""

GRACE_S = 2.0
"""How long, at least, a round waits for a site that missed the last one once all others have replied."""

_log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class _Question:
    """One site's part of a round."""

    message: Message
    message_id: str | None = None
    activation: str = ""
    absent_since: float | None = None


@dataclass(kw_only=True)
class _Arrival:
    """A reply whose objects are still being uploaded."""

    tree: ObjectTree
    node_id: int


class RunLostError(Exception):
    """Flower counts this run as ended, as after a machine that slept; another process can go on with the job."""


class LinkGrid(Grid):
    """One run's messages to the sites of a cohort.

    Args:
        state: the link's state.
        stopped: whether the operator wants the run to end.
        enough: see the attribute.

    Attributes:
        cohort: Flower node ids of the sites to ask.
        enough: replies, refusals not counted, with which a round need not wait for sites that are absent or were late.
    """

    def __init__(self, state: LinkState, *, stopped: Callable[[], bool] = lambda: False, enough: int = 1) -> None:
        self.cohort: list[int] = []
        self.enough = enough
        self._state, self._stopped = state, stopped
        self._run_id = 0
        self._late: set[int] = set()
        self._last_s: dict[int, float] = {}
        self._lost = threading.Event()

    @contextmanager
    def running(self) -> Iterator[LinkGrid]:
        """A Flower run without a bundle, for as long as the block lasts; its messages go with it.

        Raises:
            RunError: when Flower does not grant the run.
        """
        state = self._state
        self._run_id = state.create_run("", "", "", {}, NOOP_FEDERATION_ID, None, NOOP_FLWR_AID, TaskType.SERVER_APP)
        task = self.run.primary_task_id if self._run_id else None
        if not (task and state.claim_task(task) and state.activate_task(task)):
            raise RunError("Flower did not grant a run", "a new run", "look into the coordinator's log")
        TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = self._run_id, task, SUPERLINK_NODE_ID
        ended = threading.Event()
        beating = threading.Thread(target=self._beat, args=(task, ended), daemon=True)
        beating.start()
        outcome = SubStatus.FAILED
        try:
            yield self
            outcome = SubStatus.COMPLETED
        finally:
            ended.set()
            beating.join()
            state.finish_task(task, outcome, "")
            state.cleanup_run(self._run_id)

    def set_run(self, run: Run) -> None:
        """Nothing: the run is this grid's own."""

    @property
    def run(self) -> Run:
        """Flower's view of the run."""
        return self._state.get_run_info(run_ids=[self._run_id])[0]

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """A message to a node."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """The cohort, connected or not."""
        return list(self.cohort)

    def online(self) -> set[int]:
        """Those of the cohort that are connected now."""
        return {node for node, info in self._nodes(self.cohort).items() if info.status == NodeStatus.ONLINE}

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Write messages for their sites to fetch."""
        return [self._push(message) for message in messages]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The replies that are there, each once."""
        arrivals: dict[str, _Arrival] = {}
        self._collect(set(message_ids), arrivals)
        return [message for _, message in self._inflate(arrivals)]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Ask, and wait for the replies.

        Args:
            messages: one for each site.
            timeout: seconds until the round closes; None waits as long as it takes.

        Raises:
            RunError: when the operator stops the run.
            RunLostError: when Flower ended it.
        """
        now = time.monotonic()
        round_ = _Round(grid=self, began=now, deadline=None if timeout is None else now + timeout)
        for message in messages:
            round_.open[message.metadata.dst_node_id] = _Question(message=message)
        try:
            while not round_.step():
                self._go_on()
                time.sleep(_POLL_S)
        finally:
            self._state.delete_messages({q.message_id for q in round_.open.values() if q.message_id})
        asked = {message.metadata.src_node_id for message in round_.replies} | set(round_.open)
        self._late = (self._late - asked) | set(round_.open)
        self._last_s.update(round_.seconds)
        return round_.replies

    def _patience_s(self, node: int) -> float:
        """How long a late site is waited for: twice its last reply, so that a slow one that fell behind can return."""
        return max(GRACE_S, 2 * self._last_s.get(node, 0.0))

    def _go_on(self) -> None:
        if self._stopped():
            raise RunError("the run was stopped", "a run to its end", "veil coordinator resume goes on with it")
        if self._lost.is_set():
            raise RunLostError(f"Flower ended run {self._run_id}")

    def _beat(self, task: int, ended: threading.Event) -> None:
        while not ended.wait(_HEARTBEAT_S):
            try:
                known = self._state.acknowledge_task_heartbeat(task)
            except SQLAlchemyError:
                _log.warning("no heartbeat now", exc_info=True)
            else:
                if not known:
                    self._lost.set()

    def _nodes(self, ids: Collection[int]) -> dict[int, NodeInfo]:
        return {info.node_id: info for info in self._state.get_node_info(node_ids=list(ids))} if ids else {}

    def _push(self, message: Message) -> str:
        state = self._state
        session = state.start_session(self._run_id)
        message.metadata.__dict__["_message_id"] = message.object_id
        with no_object_id_recompute():
            objects = get_all_nested_objects(message)
            bare = remove_content_from_message(message)
            stored, missing = state.store_message_and_object_tree(bare, get_object_tree(message), session)
            for object_id in missing:
                state.store_object(self._run_id, session, object_id, objects[object_id].deflate())
        return message.metadata.message_id if stored else ""

    def _collect(self, ids: set[str], arrivals: dict[str, _Arrival]) -> dict[str, Message]:
        """Note replies as arriving; return error replies by the question's id, Flower's own and those of sites."""
        errors = {}
        for message in self._state.get_message_res(message_ids=set(ids), run_id=self._run_id):
            meta = message.metadata
            if message.has_error():
                errors[meta.reply_to_message_id] = message
                continue
            try:
                tree = self._state.object_store.get_object_tree(meta.message_id)
            except NoObjectInStoreError:
                continue
            arrivals[meta.message_id] = _Arrival(tree=tree, node_id=meta.src_node_id)
        return errors

    def _inflate(self, arrivals: dict[str, _Arrival]) -> Iterator[tuple[int, Message]]:
        """The arrived replies whose every object is there; an unreadable one becomes an error reply."""
        for message_id, arrival in list(arrivals.items()):
            ids = [tree.object_id for tree in iterate_object_tree(arrival.tree)]
            contents = {one: self._state.get_object(self._run_id, one) for one in ids}
            whole = {one: content for one, content in contents.items() if content}
            if len(whole) < len(contents):
                continue
            del arrivals[message_id]
            yield arrival.node_id, self._read(message_id, whole, arrival.node_id)
            self._state.object_store.delete(message_id)

    def _read(self, message_id: str, contents: dict[str, bytes], node_id: int) -> Message:
        try:
            message = inflate_object_from_contents(message_id, contents)
        except Exception:  # hostile bytes fail inside Flower's inflation in many ways
            message = None
        if not isinstance(message, Message) or not message.has_content():
            return self._garbled(node_id)
        message.metadata.__dict__["_message_id"] = message_id
        message.metadata.__dict__["_src_node_id"] = node_id
        return message

    def _garbled(self, node_id: int) -> Message:
        metadata = Metadata(
            run_id=self._run_id,
            message_id="",
            src_node_id=node_id,
            dst_node_id=SUPERLINK_NODE_ID,
            reply_to_message_id="",
            group_id="",
            created_at=time.time(),
            ttl=1.0,
            message_type=MessageType.TRAIN,
        )
        return make_message(metadata, error=Error(code=ErrorCode.UNKNOWN, reason="a reply that cannot be read"))


@dataclass(kw_only=True)
class _Round:
    """One question to many sites, until it closes."""

    grid: LinkGrid
    began: float
    deadline: float | None
    punctual_at: float | None = None
    open: dict[int, _Question] = field(default_factory=dict)
    replies: list[Message] = field(default_factory=list)
    seconds: dict[int, float] = field(default_factory=dict)
    arrivals: dict[str, _Arrival] = field(default_factory=dict)

    def step(self) -> bool:
        """Take in what came, ask whom has to be asked; True when the round is over."""
        now = time.monotonic()
        nodes = self.grid._nodes(self.open)
        asked = {q.message_id: node for node, q in self.open.items() if q.message_id}
        for message_id, error in self.grid._collect(set(asked), self.arrivals).items():
            self._take_error(asked[message_id], error)
        for node, message in self.grid._inflate(self.arrivals):
            if self.open.pop(node, None) is not None:
                self.replies.append(message)
                self.seconds[node] = now - self.began
        for node, question in self.open.items():
            self._ask(question, nodes.get(node), now)
        return not self.open or self._closed(now)

    def _take_error(self, node: int, error: Message) -> None:
        """A site's own word ends its part of the round; Flower's says that the question or its site was lost."""
        if error.metadata.src_node_id == SUPERLINK_NODE_ID:
            self.open[node].message_id = None
        else:
            del self.open[node]
            self.replies.append(error)

    def _ask(self, question: _Question, node: NodeInfo | None, now: float) -> None:
        """Ask a connected site that was not asked yet, or that reconnected since: it may have lost the question."""
        if node is None or node.status != NodeStatus.ONLINE:
            question.absent_since = question.absent_since or now
            return
        question.absent_since = None
        if question.message_id is None or question.activation != node.last_activated_at:
            self.grid._state.delete_messages({question.message_id} if question.message_id else set())
            left = _UNBOUNDED_TTL_S if self.deadline is None else self.deadline - now + _TTL_MARGIN_S
            old = question.message.metadata
            message = Message(
                question.message.content, old.dst_node_id, old.message_type, ttl=max(left, 1.0), group_id=old.group_id
            )
            question.activation = node.last_activated_at
            question.message_id = self.grid._push(message) or None

    def _closed(self, now: float) -> bool:
        if self.deadline is not None and now >= self.deadline:
            return True
        if sum(not refuses(reply) for reply in self.replies) < self.grid.enough:
            return False
        if any(self._worth_waiting(node, question, now) for node, question in self.open.items()):
            self.punctual_at = None
            return False
        self.punctual_at = self.punctual_at or now
        late = [node for node, question in self.open.items() if question.absent_since is None]
        patience_s = max((self.grid._patience_s(node) for node in late), default=0.0)
        return not late or now - self.punctual_at > max(patience_s, self.punctual_at - self.began)

    def _worth_waiting(self, node: int, question: _Question, now: float) -> bool:
        if node in self.grid._late:
            return False
        return question.absent_since is None or now - question.absent_since <= ABSENCE_S
