# SPDX-License-Identifier: Apache-2.0
"""A Flower Grid that calls the ClientApp in this process: no Ray, no sockets, no serialisation.

Promises the ServerApp what any Grid promises; each node keeps its own Context from round to round. Nodes work one after
the other: sites of small heads hold Python's lock most of the time, and threads would only wait for it.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity
from threadpoolctl import ThreadpoolController

RUN_ID = 1
_FIRST_NODE = 2


class InProcessGrid(Grid):
    """`nodes` sites served by one ClientApp, one after the other.

    Args:
        client_app: what answers.
        nodes: number of sites; node i has partition-id i.
        threads: for a site's matrix products; small ones wait for their threads longer than they compute.
    """

    def __init__(self, client_app: ClientApp, nodes: int, *, threads: int = 1) -> None:
        TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = RUN_ID, 1, 1
        self._app = client_app
        self._replies: dict[str, Message] = {}
        self._threads, self._blas = threads, ThreadpoolController()
        self._contexts = {
            _FIRST_NODE + index: Context(
                run_id=RUN_ID,
                node_id=_FIRST_NODE + index,
                node_config={"partition-id": index, "num-partitions": nodes},
                state=RecordDict(),
                run_config={},
            )
            for index in range(nodes)
        }

    def set_run(self, run: Run) -> None:
        """Nothing: there is one run."""

    @property
    def run(self) -> Run:
        """The one run."""
        return Run.create_empty(RUN_ID)

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """A message to a node."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """All nodes."""
        return list(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Deliver messages at once and keep the replies."""
        waiting = list(messages)
        for message in waiting:
            message.metadata.__dict__["_message_id"] = str(uuid.uuid4())
        ids = [message.metadata.message_id for message in waiting]
        self._replies.update(zip(ids, self.answer(waiting), strict=True))
        return ids

    def answer(self, messages: list[Message]) -> list[Message]:
        """All replies, in the order of the messages."""
        with self._blas.limit(limits=self._threads, user_api="blas"):
            return [self._app(message=one, context=self._contexts[one.metadata.dst_node_id]) for one in messages]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Hand the replies out, each once."""
        return [self._replies.pop(one) for one in message_ids if one in self._replies]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """All replies of a round."""
        return self.pull_messages(self.push_messages(messages))
