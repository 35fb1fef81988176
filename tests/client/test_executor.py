# SPDX-License-Identifier: Apache-2.0
"""Tests of `veil.client.executor`: one frame in, one frame out, until the agent is gone."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection, Pipe
from pathlib import Path

from flwr.app import Message
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.supercore.task_identity import TaskIdentity

from veil.client.app import client_app
from veil.client.executor import serve
from veil.client.site import Site
from veil.client.workbench import PING
from veil.common.exchange import RoundRequest
from veil.common.plan import RunPlan
from veil.common.wire import decode_reply, encode_request

OPEN = """
from pathlib import Path
from veil.client.executor import main
from veil.common.errors import InputError

def open_app(path):
    raise InputError(f"{path.name} is empty", "a site", "write one")

main(open_app)
"""


@contextmanager
def serving(site: Site) -> Iterator[Connection]:
    ours, theirs = Pipe()
    thread = threading.Thread(target=serve, args=(theirs, client_app(lambda _: site)))
    thread.start()
    yield ours
    ours.close()
    thread.join()
    theirs.close()


def test_a_ping_and_a_message_are_answered_in_their_order(
    make_site: Callable[..., Site], make_request: Callable[..., RoundRequest], make_plan: Callable[..., RunPlan]
) -> None:
    TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 7, 1, 1
    message = Message(encode_request(make_request(make_plan())), 2, "train")
    with serving(make_site()) as pipe:
        pipe.send_bytes(PING)
        pipe.send_bytes(message_to_proto(message).SerializeToString())
        pipe.send_bytes(PING)
        assert pipe.recv_bytes() == PING
        reply = message_from_proto(ProtoMessage.FromString(pipe.recv_bytes()))
        assert pipe.recv_bytes() == PING
    assert decode_reply(reply.content).update is not None
    assert (reply.metadata.run_id, reply.metadata.message_type) == (7, "train")


def test_a_site_that_cannot_be_opened_ends_the_executor_with_its_message(tmp_path: Path) -> None:
    """Exit code 4, one line of JSON, no traceback."""
    (tmp_path / "opening.py").write_text(OPEN, encoding="utf-8")
    ours, theirs = socket.socketpair()
    with ours, theirs:
        done = subprocess.run(
            [sys.executable, str(tmp_path / "opening.py"), str(theirs.fileno()), str(tmp_path / "site.toml")],
            pass_fds=[theirs.fileno()],
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 4
    (line,) = done.stderr.splitlines()
    assert "site.toml is empty" in line
    assert "Traceback" not in line
