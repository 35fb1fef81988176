# SPDX-License-Identifier: Apache-2.0
"""The site's executor: the one process that holds libraries, backbone, records and ledger, and answers messages.

Promises that it runs the ClientApp installed with it, on whatever it is given, and that it ends with its agent.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

from flwr.app import Context, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.supercore.task_identity import TaskIdentity

from veil.client.workbench import PING
from veil.common.errors import VeilError
from veil.common.logs import log_json_lines
from veil.common.supervision import end_with_parent

_log = logging.getLogger(__name__)


def serve(pipe: Connection, app: ClientApp) -> None:
    """Answer frames until the other side is gone.

    Args:
        pipe: each frame is `PING` or a serialized Flower message; each is answered by one frame.
        app: the site's ClientApp.
    """
    while True:
        try:
            frame = pipe.recv_bytes()
        except (EOFError, OSError):
            return
        pipe.send_bytes(PING if frame == PING else _answer(frame, app))


def _answer(frame: bytes, app: ClientApp) -> bytes:
    message = message_from_proto(ProtoMessage.FromString(frame))
    meta = message.metadata
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = meta.run_id, meta.dst_node_id, 1
    context = Context(run_id=meta.run_id, node_id=meta.dst_node_id, node_config={}, state=RecordDict(), run_config={})
    return bytes(message_to_proto(app(message=message, context=context)).SerializeToString())


def main(open_app: Callable[[Path], ClientApp]) -> None:
    """The executor's process.

    Args:
        open_app: opens the site of a site file; raises `VeilError` when it cannot.
    """
    end_with_parent()
    log_json_lines()
    descriptor, path = int(sys.argv[1]), Path(sys.argv[2])
    with Connection(descriptor) as pipe:
        try:
            app = open_app(path)
        except Exception as error:  # said while the pipe is open: its agent ends this process when it closes
            _log.error("the site cannot be opened: %s", error, exc_info=not isinstance(error, VeilError))
            sys.exit(VeilError.exit_code)
        _log.info("the executor is ready")
        serve(pipe, app)
