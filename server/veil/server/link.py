# SPDX-License-Identifier: Apache-2.0
"""The coordinator's one open door: Flower's fleet endpoints for enrolled sites, enrolment by token, and a pulse.

Promises that Flower's control and runtime endpoints are not served at all, on any address: a run is started and steered
only by processes that can open the coordinator's own folder; and that a site can speak for no node but its own, nor
read or remove what was said to another.
"""

from __future__ import annotations

import fcntl
import logging
import os
from pathlib import Path
from typing import cast

from fastapi import APIRouter, FastAPI, HTTPException, Request, Response, status
from flwr.proto.fleet_pb2 import PushMessagesRequest
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, ObjectTree, PullObjectRequest
from flwr.server.superlink.linkstate import LinkStateFactory, SqlLinkState
from flwr.supercore.error import http_error_translator
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.protobuf.translation import ProtobufTranslationMiddleware
from flwr.supercore.utils import uint64_to_int64
from flwr.superlink.federation import NoOpFederationManager
from flwr.superlink.routers.fleet.node_auth import NodeAuthMiddleware
from flwr.superlink.routers.fleet.router import router as fleet_router
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint

from veil.server.home import PULSE_PATH

_FLEET = "/v1/fleet/"

_ADDRESSED = """
WITH RECURSIVE holder (id) AS (
    SELECT :object_id UNION SELECT parent_id FROM object_children JOIN holder ON child_id = holder.id
)
SELECT 1 FROM message_ins JOIN holder ON message_id = holder.id WHERE dst_node_id = :node_id LIMIT 1
"""
"""Whether an object is, or is part of, a message to a node."""


MAX_OBJECTS = 64
"""Most parts of one reply; each is a request body at most."""


def open_link_state(database: Path) -> LinkStateFactory:
    """Flower's state of nodes, runs and messages, in an SQLite file that several processes may open, also at once.

    Args:
        database: the file, made when missing.
    """
    logging.getLogger("flwr").setLevel(logging.WARNING)
    factory = LinkStateFactory(
        str(database), NoOpFederationManager(simulation=False), ObjectStoreFactory(str(database))
    )
    folder = os.open(database.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)  # opening makes or migrates the tables, which two must not do at once
        factory.state()
    finally:
        os.close(folder)
    return factory


def link_app(database: Path, *routers: APIRouter) -> FastAPI:
    """The web application behind the link's TLS port.

    Args:
        database: Flower's state.
        routers: further routes, such as enrolment.
    """
    app = FastAPI(
        title="Veil link",
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        middleware=[
            Middleware(BaseHTTPMiddleware, dispatch=http_error_translator),
            Middleware(ProtobufTranslationMiddleware),
            Middleware(NodeAuthMiddleware),
            Middleware(BaseHTTPMiddleware, dispatch=_own_messages_only),
        ],
    )
    app.state.linkstate_factory = open_link_state(database)
    app.state.enable_supernode_auth = True
    app.include_router(fleet_router)
    for router in routers:
        app.include_router(router)

    @app.get(PULSE_PATH, status_code=status.HTTP_204_NO_CONTENT)
    def pulse(request: Request) -> None:
        request.app.state.linkstate_factory.state().get_node_info(node_ids=[0])

    return app


async def _own_messages_only(request: Request, call_next: RequestResponseEndpoint) -> Response:
    """Refuse what an authenticated node asks about another's messages, and a reply of too many parts."""
    body = getattr(request.state, "protobuf_request", None)
    if request.url.path.startswith(_FLEET) and not await run_in_threadpool(_is_own, body, request):
        raise HTTPException(
            status_code=status.HTTP_403_FORBIDDEN, detail="another node's message, or one of too many parts"
        )
    return await call_next(request)


def _is_own(body: object, request: Request) -> bool:
    """Whether a fleet request concerns no message but the sender's, and pushes none of too many parts."""
    if isinstance(body, PushMessagesRequest):
        own = all(message.metadata.src_node_id == body.node.node_id for message in body.messages_list)
        return own and all(_objects(tree) <= MAX_OBJECTS for tree in body.message_object_trees)
    state = cast(SqlLinkState, request.app.state.linkstate_factory.state())
    if isinstance(body, PullObjectRequest):
        return _is_addressed(state, body.object_id, body.node.node_id)
    if isinstance(body, ConfirmMessageReceivedRequest):
        return _is_addressed(state, body.message_object_id, body.node.node_id)
    return True


def _objects(tree: ObjectTree) -> int:
    return sum(1 for _ in iterate_object_tree(tree))


def _is_addressed(state: SqlLinkState, object_id: str, node_id: int) -> bool:
    return bool(state.query(_ADDRESSED, {"object_id": object_id, "node_id": uint64_to_int64(node_id)}))
