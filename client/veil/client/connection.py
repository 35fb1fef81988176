# SPDX-License-Identifier: Apache-2.0
"""A site's line to the coordinator: Flower's fleet endpoints over TLS, in the site's own process.

Promises that nothing is fetched but messages: a bundle of code is neither asked for nor unpacked, and a run that
carries one is reported as such; and that every failure is one of two, `UnreachableError` or `NotAdmittedError`.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

import httpx
from flwr.app import Message
from flwr.app.message import remove_content_from_message
from flwr.common.serde import message_to_proto
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PushMessagesRequest,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import ObjectTree
from flwr.proto.node_pb2 import Node
from flwr.proto.run_pb2 import GetRunRequest
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_protobuf_utils import (
    make_confirm_message_received_fn_protobuf,
    make_pull_object_fn_protobuf,
    make_push_object_fn_protobuf,
)
from flwr.supercore.inflatable.inflatable_utils import (
    ObjectPullError,
    ObjectPushError,
    inflate_object_from_contents,
    pull_objects,
    push_objects,
)
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supercore.task_identity import TaskIdentity
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from veil.common.keys import NodeKey

HEARTBEAT_S = 10.0
"""Seconds between heartbeats; Flower counts a node as offline after two missed ones."""

MISSING_S = 5.0
"""How long a part of a message that the coordinator announced and does not have is waited for."""

MAX_MESSAGE_BYTES = 2 << 30
"""Largest message that is taken in."""

_Answer = TypeVar("_Answer")


class UnreachableError(Exception):
    """The coordinator cannot be reached now; worth another attempt."""


class DeclinedError(UnreachableError):
    """The coordinator does not grant this one request, such as for a run that ended meanwhile."""


class NotAdmittedError(Exception):
    """The coordinator does not know this key, or no longer."""


class Connection:
    """The site's node at the coordinator's link.

    Args:
        address: host:port.
        ca: the certificates that may vouch for the coordinator, PEM.
        key: the site's identity.
        node_file: where the node's number is kept, to take the node back after a crash without waiting for its lease.
    """

    def __init__(self, address: str, ca: bytes, key: NodeKey, node_file: Path) -> None:
        self._key, self._node_file = key, node_file
        self._client = FleetHttpClient.from_server_address(
            address,
            insecure=False,
            root_certificates=ca,
            interceptors=[
                RuntimeVersionHttpInterceptor(component_name="SuperNode"),
                NodeAuthHttpInterceptor(key.private, key.private.public_key()),
            ],
        )
        # a redirect would let the coordinator choose whom this machine calls within the site's network
        self._client._client.follow_redirects = False
        self._node = Node()
        self._bundles: dict[int, bool] = {}
        self._ended = threading.Event()
        self._beating = threading.Thread(target=self._beat, daemon=True)
        self.alive = threading.Event()

    def __enter__(self) -> Self:
        """Take the site's node.

        Raises:
            UnreachableError: when there is no answer.
            NotAdmittedError: when the key is not enrolled.
        """
        try:
            node_id = self._activate()
        except BaseException:
            self._client.close()
            raise
        self._node = Node(node_id=node_id)
        with contextlib.suppress(OSError):  # without the file, a crash costs the wait for Flower's lease
            self._node_file.write_text(str(node_id), encoding="ascii")
        TaskIdentity.node_id, TaskIdentity.task_id = node_id, 1
        self.alive.set()
        self._beating.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give the node back."""
        self._ended.set()
        self._beating.join()
        with contextlib.suppress(UnreachableError, NotAdmittedError):
            self._call(self._client.DeactivateNode, DeactivateNodeRequest(node_id=self._node.node_id))
        self._client.close()

    def receive(self) -> Message | None:
        """The next message, or None when there is none, or when it was withdrawn on its way.

        Raises:
            UnreachableError: also when the message went missing on its way.
            NotAdmittedError: when the site was revoked.
        """
        response = self._call(self._client.PullMessages, PullMessagesRequest(node=self._node))
        if not (response.messages_list and response.message_object_trees):
            return None
        run_id = response.messages_list[0].metadata.run_id
        TaskIdentity.run_id = run_id
        try:
            return self._fetch(run_id, response.message_object_trees[0])
        except DeclinedError:
            return None

    def carries_bundle(self, run_id: int) -> bool:
        """Whether the coordinator attached code to a run. It is not fetched.

        Raises:
            DeclinedError: when the run ended.
            UnreachableError, NotAdmittedError: as in `receive`.
        """
        if run_id not in self._bundles:
            response = self._call(self._client.GetRun, GetRunRequest(node=self._node, run_id=run_id))
            self._bundles[run_id] = bool(response.run.fab_hash or response.run.fab_id)
        return self._bundles[run_id]

    def send(self, reply: Message) -> bool:
        """Deliver a reply.

        Returns:
            False when the coordinator no longer wants it: the run ended, or the question expired.

        Raises:
            UnreachableError, NotAdmittedError: as in `receive`; the same reply may be sent again.
        """
        reply.metadata.__dict__["_message_id"] = reply.object_id
        run_id = reply.metadata.run_id
        with no_object_id_recompute():
            request = PushMessagesRequest(
                node=self._node,
                messages_list=[message_to_proto(remove_content_from_message(reply))],
                message_object_trees=[get_object_tree(reply)],
            )
            try:
                response = self._call(self._client.PushMessages, request)
                push = make_push_object_fn_protobuf(
                    lambda one: self._call(self._client.PushObject, one), self._node, run_id, response.session_id
                )
                push_objects(get_all_nested_objects(reply), push, object_ids_to_push=set(response.objects_to_push))
            except (DeclinedError, ObjectPushError):
                return False
        return True

    def _activate(self) -> int:
        request = ActivateNodeRequest(public_key=self._key.public_pem, heartbeat_interval=HEARTBEAT_S)
        try:
            return self._call(self._client.ActivateNode, request).node_id
        except DeclinedError as error:
            if not self._node_file.exists():
                raise NotAdmittedError(str(error)) from None
        return self._take_back(request)

    def _take_back(self, request: ActivateNodeRequest) -> int:
        """Activate again after a crash: Flower still counts the lost process as connected."""
        try:
            lost = int(self._node_file.read_text(encoding="ascii"))
            self._call(self._client.DeactivateNode, DeactivateNodeRequest(node_id=lost))
            return self._call(self._client.ActivateNode, request).node_id
        except (ValueError, DeclinedError) as error:
            raise NotAdmittedError(str(error)) from None

    def _fetch(self, run_id: int, tree: ObjectTree) -> Message:
        pull = make_pull_object_fn_protobuf(lambda one: self._call(self._client.PullObject, one), self._node, run_id)
        size = 0

        def bounded(object_id: str) -> bytes:
            nonlocal size
            content = pull(object_id)
            size += len(content)
            if size > MAX_MESSAGE_BYTES:
                raise UnreachableError(f"a message of more than {MAX_MESSAGE_BYTES} bytes")
            return content

        try:
            parts = [one.object_id for one in iterate_object_tree(tree)]
            contents = pull_objects(parts, bounded, max_time=MISSING_S, backoff_cap=1.0)
            message = inflate_object_from_contents(tree.object_id, contents)
        except (UnreachableError, NotAdmittedError):
            raise
        except ObjectPullError as error:  # whoever asked died in the midst of it, and asks again
            raise DeclinedError(str(error)) from None
        except Exception as error:  # hostile bytes fail inside Flower's inflation in many ways
            raise UnreachableError(f"a message that cannot be read ({type(error).__name__})") from None
        if not isinstance(message, Message):
            raise UnreachableError("something other than a message")
        message.metadata.__dict__["_message_id"] = tree.object_id
        confirm = make_confirm_message_received_fn_protobuf(
            lambda one: self._call(self._client.ConfirmMessageReceived, one), self._node, run_id
        )
        confirm(tree.object_id)
        return message

    def _beat(self) -> None:
        request = SendNodeHeartbeatRequest(node=self._node, heartbeat_interval=HEARTBEAT_S)
        while not self._ended.wait(HEARTBEAT_S / 2):
            try:
                known = self._call(self._client.SendNodeHeartbeat, request).success
            except (UnreachableError, NotAdmittedError):
                known = False
            if known:
                self.alive.set()
            else:
                self.alive.clear()

    def _call(self, method: Callable[..., _Answer], request: object) -> _Answer:
        try:
            return method(request)
        except httpx.HTTPStatusError as error:
            if error.response.status_code == httpx.codes.UNAUTHORIZED:
                raise NotAdmittedError(str(error)) from None
            if error.response.status_code >= 500:
                raise UnreachableError(str(error)) from None
            raise DeclinedError(str(error)) from None
        except (httpx.HTTPError, OSError, ValueError) as error:  # Flower's word for bytes that are no answer
            raise UnreachableError(str(error)) from None
