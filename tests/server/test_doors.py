# SPDX-License-Identifier: Apache-2.0
"""Closed doors: attacks that a bare SuperLink and SuperNode let through, and that the link and the site's agent refuse.

Promises that every attack is seen to work on the bare processes, so that its failing here means something; all
processes, sockets and certificates are real.
"""

from __future__ import annotations

import hashlib
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import httpx
import pytest
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from fastapi import FastAPI
from fastapi.routing import APIRoute
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.cli.build import build_fab_from_files
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.common.serde import message_to_proto, run_from_proto
from flwr.proto.control_pb2 import ListRunsRequest, RegisterNodeRequest, StartRunRequest, StopRunRequest
from flwr.proto.fab_pb2 import Fab as ProtoFab
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PushMessagesRequest,
    RegisterNodeFleetRequest,
    UnregisterNodeFleetRequest,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, PullObjectRequest
from flwr.proto.node_pb2 import Node
from flwr.proto.runtime_pb2 import AcquireTaskRequest, AcquireTaskResponse, GetNodesRequest, PullTaskInputRequest
from flwr.server.superlink.linkstate import LinkState
from flwr.supercore.constant import NodeStatus, TaskType
from flwr.supercore.control.control_http_client import ControlHttpClient
from flwr.supercore.fab import Fab
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.interceptors import RuntimeTokenHttpInterceptor
from flwr.supercore.protobuf.translation import PROTOBUF_REQUEST_TYPES
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.grid.http_grid import HttpGrid
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor
from starlette.types import ASGIApp, Receive, Scope, Send

from veil.client.agent import Agent
from veil.client.connection import Connection, DeclinedError, NotAdmittedError, UnreachableError
from veil.client.enrol import enrol
from veil.client.workbench import ExecutorLostError, Workbench
from veil.common.errors import InputError, RefusalCode
from veil.common.invitation import ENROL_PATH
from veil.common.keys import NodeKey
from veil.common.supervision import Child
from veil.common.wire import OFFER, decode_offer_reply, decode_reply
from veil.server.enrolment import enrolment_router
from veil.server.home import PULSE_PATH, Home, Settings
from veil.server.link import link_app, open_link_state
from veil.server.link_grid import LinkGrid
from veil.server.link_server import MAX_BODY_BYTES
from veil.server.pki import issue_certificate, make_authority
from veil.server.roster import Roster

pytestmark = pytest.mark.filterwarnings(
    "ignore:No path_separator:DeprecationWarning", "ignore:GitWildMatchPattern:DeprecationWarning"
)

Serve = Callable[[FastAPI, tuple[Path, Path]], str]

DEADLINE_S = 40.0
HOSTS = ("127.0.0.1", "localhost")
FLEET = (
    "activate-node",
    "confirm-message-received",
    "deactivate-node",
    "get-fab",
    "get-run",
    "pull-messages",
    "pull-object",
    "push-messages",
    "push-object",
    "register-node",
    "send-node-heartbeat",
    "unregister-node",
)


def wait_for(what: str, ready: Callable[[], bool]) -> None:
    end = time.monotonic() + DEADLINE_S
    while not ready():
        assert time.monotonic() < end, f"{what}: not within {DEADLINE_S:g} s"
        time.sleep(0.02)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


# ---------------------------------------------------------------------------------------------------------------------
# Attackers


@dataclass(frozen=True, kw_only=True)
class Peer:
    """Whoever reaches a port and holds the CA file; what else it holds is an argument."""

    address: str
    ca: bytes

    def control(self) -> ControlHttpClient:
        return ControlHttpClient.from_server_address(
            self.address, insecure=False, root_certificates=self.ca, interceptors=[]
        )

    def runtime(self, token: str = "") -> RuntimeHttpClient:
        known: list[Any] = [RuntimeTokenHttpInterceptor(token)] if token else []
        return RuntimeHttpClient.from_server_address(
            self.address, insecure=False, root_certificates=self.ca, interceptors=known
        )

    def fleet(self, key: NodeKey | None = None) -> FleetHttpClient:
        known: list[Any] = []
        if key is not None:
            known = [NodeAuthHttpInterceptor(key.private, key.private.public_key())]
        return FleetHttpClient.from_server_address(
            self.address, insecure=False, root_certificates=self.ca, interceptors=known
        )

    def start_run(self, fab: bytes) -> int:
        bundle = ProtoFab(hash_str=hashlib.sha256(fab).hexdigest(), content=fab)
        with self.control() as control:
            return control.StartRun(StartRunRequest(fab=bundle)).run_id

    def list_runs(self) -> set[int]:
        with self.control() as control:
            return set(control.ListRuns(ListRunsRequest()).run_dict)

    def stop_run(self, run_id: int) -> bool:
        with self.control() as control:
            return control.StopRun(StopRunRequest(run_id=run_id)).success

    def let_in(self, key: NodeKey) -> int:
        with self.control() as control:
            return control.RegisterNode(RegisterNodeRequest(public_key=key.public_pem)).node_id

    def steal_task(self) -> AcquireTaskResponse:
        with self.runtime() as runtime:
            return runtime.AcquireTask(AcquireTaskRequest(supported_task_types=[TaskType.SERVER_APP]))

    def aggregate(self, token: str, node_id: int) -> Message:
        """Take the aggregator's place with a stolen token: ask a node, and read its reply."""
        with self.runtime(token) as runtime:
            task = runtime.PullTaskInput(PullTaskInputRequest())
            wait_for("the node", lambda: node_id in online(runtime))
        TaskIdentity.run_id, TaskIdentity.task_id = task.run.run_id, task.task_id
        TaskIdentity.node_id = SUPERLINK_NODE_ID
        grid = HttpGrid(self.address, False, self.ca, token=token)
        grid.set_run(run_from_proto(task.run))
        try:
            return next(iter(grid.send_and_receive([Message(RecordDict(), node_id, "train")], timeout=DEADLINE_S)))
        finally:
            grid._disconnect()


def online(runtime: RuntimeHttpClient) -> set[int]:
    return {one.node_id for one in runtime.GetNodes(GetNodesRequest()).nodes if one.status == NodeStatus.ONLINE}


CA_ONLY: Mapping[str, Callable[[Peer, bytes], object]] = {
    "start a run": lambda peer, fab: peer.start_run(fab),
    "list runs": lambda peer, _: peer.list_runs(),
    "stop a run": lambda peer, _: peer.stop_run(1),
    "let a key in": lambda peer, _: peer.let_in(NodeKey.generate()),
    "steal a task": lambda peer, _: peer.steal_task(),
    "aggregate": lambda peer, _: peer.aggregate("0" * 64, 1),
}


def bundle_that_shadows(marker: Path, records: Path) -> bytes:
    """A FAB whose ClientApp takes the place of the installed one, leaves a mark, and sends the site's records away."""
    project = """
    [project]
    name = "shadow"
    version = "1.0.0"
    description = "the client, so it says"
    license = "Apache-2.0"
    dependencies = []
    [tool.flwr.app]
    publisher = "peer"
    [tool.flwr.app.components]
    serverapp = "server:app"
    clientapp = "veil.client.app:app"
    [tool.flwr.app.config]
    """
    client = f"""
from pathlib import Path
Path({str(marker)!r}).write_text("veil.client.app of the bundle ran")
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp
app = ClientApp()
@app.train()
def train(message, context):
    loot = ConfigRecord({{"records": Path({str(records)!r}).read_text()}})
    return Message(content=RecordDict({{"loot": loot}}), reply_to=message)
"""
    customize = f"from pathlib import Path\nPath({str(marker)!r}).write_text('sitecustomize ran')\n"
    files = {"pyproject.toml": project, "server.py": "", "veil/client/app.py": client, "sitecustomize.py": customize}
    assert tomllib.loads(project)
    return build_fab_from_files({name: text.encode() for name, text in files.items()})[0]


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    """Written by the bundle's code, wherever it runs."""
    return tmp_path / "marker"


@pytest.fixture
def fab(tmp_path: Path, marker: Path) -> bytes:
    """The hostile bundle."""
    records = tmp_path / "records.csv"
    records.write_text("mrn,label\n4711,1\n", encoding="utf-8")
    return bundle_that_shadows(marker, records)


# ---------------------------------------------------------------------------------------------------------------------
# What they attack: Flower as it comes


@contextmanager
def flower(program: str, *options: str | Path, folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """One of Flower's own programs, offline, with what it starts."""
    binaries = Path(sys.executable).parent
    folder.mkdir(exist_ok=True)
    environment = {
        **os.environ,
        "PATH": f"{binaries}:{os.environ['PATH']}",
        "FLWR_HOME": str(folder),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "NO_PROXY": "127.0.0.1,localhost",
    }
    with (folder / f"{program}.log").open("wb") as log:
        process = subprocess.Popen(
            [binaries / program, *options],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Peer]:
    """A peer of a SuperLink with TLS and node authentication; nobody has taken its tasks yet."""
    folder, port = tmp_path_factory.mktemp("bare"), free_port()
    ca = make_authority(folder / "pki", "Bare")
    certificate, key = issue_certificate(folder / "pki", HOSTS)
    tls = ("--ssl-ca-certfile", ca, "--ssl-certfile", certificate, "--ssl-keyfile", key)
    offline = ("--disable-runtime-dependency-installation", "--isolation", "process")
    where = ("--host", "127.0.0.1", "--port", str(port))
    with flower("flower-superlink", *where, *tls, "--enable-supernode-auth", *offline, folder=folder / "f") as process:
        wait_for("the SuperLink", lambda: process.poll() is not None or listens(port))
        yield Peer(address=f"127.0.0.1:{port}", ca=ca.read_bytes())


def test_a_bare_superlink_lets_a_peer_with_the_ca_file_start_list_and_stop_runs(bare: Peer, fab: bytes) -> None:
    run_id = bare.start_run(fab)
    assert run_id in bare.list_runs()
    assert bare.stop_run(run_id)


def test_a_bare_superlink_and_supernode_give_the_sites_records_to_a_peer_with_the_ca_file(
    bare: Peer, fab: bytes, marker: Path, tmp_path: Path
) -> None:
    key, key_file, ca = NodeKey.generate(), tmp_path / "site.key", tmp_path / "ca.pem"
    key_file.write_bytes(key.private.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
    ca.write_bytes(bare.ca)
    node_id = bare.let_in(key)
    identity = ("--root-certificates", ca, "--auth-supernode-private-key", key_file)
    where = ("--superlink", bare.address, "--host", "127.0.0.1", "--port", str(free_port()))
    with flower("flower-supernode", *where, *identity, folder=tmp_path / "site"):
        run_id = bare.start_run(fab)
        stolen = bare.steal_task()
        assert (stolen.task.type, stolen.task.run_id) == (TaskType.SERVER_APP, run_id)
        reply = bare.aggregate(stolen.token, node_id)
    assert reply.content["loot"] == ConfigRecord({"records": "mrn,label\n4711,1\n"})
    assert marker.read_text(encoding="utf-8") == "veil.client.app of the bundle ran"


# ---------------------------------------------------------------------------------------------------------------------
# What they attack: the link


@dataclass(frozen=True, kw_only=True)
class Link:
    """The link's process, and the coordinator's own view of its folder."""

    home: Home
    state: LinkState
    roster: Roster
    peer: Peer

    def enrol(self, name: str) -> tuple[NodeKey, int]:
        """A site that the operator invited: its key and its node."""
        key = NodeKey.generate()
        enrol(self.roster.invite(name, self.home.url, self.peer.ca.decode(), 1), key)
        node_id = self.state.get_node_id_by_public_key(key.public_pem)
        assert node_id is not None
        return key, node_id

    def connect(self, key: NodeKey, folder: Path) -> Connection:
        return Connection(self.peer.address, self.peer.ca, key, folder / "node")

    def get(self, path: str, **options: Any) -> httpx.Response:
        context = ssl.create_default_context(cadata=self.peer.ca.decode())
        with httpx.Client(verify=context, trust_env=False, base_url=self.home.url) as client:
            return client.request(options.pop("method", "GET"), path, **options)

    def tls(self, version: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3) -> ssl.SSLSocket:
        raw = socket.create_connection(("127.0.0.1", self.home.settings.port), timeout=DEADLINE_S)
        try:
            return weak_client(self.peer.ca, version).wrap_socket(raw, server_hostname="127.0.0.1")
        except BaseException:
            raw.close()
            raise


def weak_client(ca: bytes, version: ssl.TLSVersion) -> ssl.SSLContext:
    """A client that speaks one version of TLS, however old, with any cipher."""
    context = ssl.create_default_context(cadata=ca.decode())
    context.set_ciphers("ALL:@SECLEVEL=0")
    context.minimum_version = context.maximum_version = version
    return context


@pytest.fixture(scope="module")
def link(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Link]:
    """The link as the coordinator starts it."""
    port = free_port()
    settings = Settings(hosts=HOSTS, listen="127.0.0.1", port=port)
    home = Home.create(tmp_path_factory.mktemp("link") / "home", settings)
    ca = make_authority(home.folder / "pki", "Study 7").read_bytes()
    issue_certificate(home.folder / "pki", HOSTS)
    state = open_link_state(home.database).state()
    child = Child("veil.server.link_server", [str(home.folder)])
    try:
        wait_for("the link", lambda: child.exit_code is not None or listens(port))
        with closing(Roster(home.roster, state)) as roster:
            yield Link(home=home, state=state, roster=roster, peer=Peer(address=f"127.0.0.1:{port}", ca=ca))
    finally:
        child.end()


def status_of(attack: Callable[[], object]) -> int:
    """The status with which an attack was refused."""
    with pytest.raises(httpx.HTTPStatusError) as caught:
        attack()
    return caught.value.response.status_code


@pytest.mark.parametrize("attack", CA_ONLY)
def test_what_a_peer_with_the_ca_file_does_to_a_superlink_it_cannot_do_to_the_link(
    link: Link, fab: bytes, attack: str
) -> None:
    assert status_of(lambda: CA_ONLY[attack](link.peer, fab)) == 404


def test_control_and_runtime_endpoints_are_not_there_for_an_enrolled_site_either(link: Link) -> None:
    key, _ = link.enrol("curious")
    closed = {path: kind for (_, path), kind in PROTOBUF_REQUEST_TYPES.items() if not path.startswith("/v1/fleet/")}
    assert {path.split("/")[2] for path in closed} == {"control", "runtime"}
    with link.peer.fleet(key) as client:
        answers = {path: status_of(partial(ask, client, path, closed[path]())) for path in closed}
    assert set(answers.values()) == {404}, answers


def ask(client: FleetHttpClient, path: str, request: Any) -> Any:
    return client._unary_unary(path=path, rpc_method=path, request=request, response_type=type(request))


@pytest.mark.parametrize("path", ["/", "/docs", "/redoc", "/openapi.json", "/health", "/metrics", "/v1/fleet"])
def test_nothing_else_is_served(link: Link, path: str) -> None:
    assert link.get(path).status_code == 404


def test_the_routes_of_the_link_are_flowers_fleet_enrolment_and_a_pulse(tmp_path: Path) -> None:
    state = open_link_state(tmp_path / "link.sqlite").state()
    with closing(Roster(tmp_path / "roster.sqlite", state)) as roster:
        app = link_app(tmp_path / "link.sqlite", enrolment_router(roster))
    wanted = [("POST", f"/v1/fleet/{name}") for name in FLEET] + [("POST", "/v1/enrol"), ("GET", "/v1/pulse")]
    assert sorted(routes(app)) == sorted(wanted)


def routes(router: Any) -> list[tuple[str, str]]:
    """Method and path of every route, those of included routers among them; another kind of route is an error."""
    found: list[tuple[str, str]] = []
    for route in router.routes:
        included = getattr(route, "original_router", None)
        if included is None:
            assert isinstance(route, APIRoute), route
        found += routes(included) if included else [(method, route.path) for method in route.methods]
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Who is a site


def test_a_key_that_nobody_invited_gets_no_node(link: Link, tmp_path: Path) -> None:
    stranger, before = NodeKey.generate(), len(link.state.get_node_info())
    pem = stranger.public_pem
    with link.peer.fleet(stranger) as fleet:
        assert status_of(lambda: fleet.RegisterNode(RegisterNodeFleetRequest(public_key=pem))) == 412
        activation = ActivateNodeRequest(public_key=pem, heartbeat_interval=30)
        assert status_of(lambda: fleet.ActivateNode(activation)) == 412
    with pytest.raises(NotAdmittedError), link.connect(stranger, tmp_path):
        pass
    assert len(link.state.get_node_info()) == before


def test_without_a_key_no_fleet_endpoint_answers(link: Link) -> None:
    _, node_id = link.enrol("silent")
    fleet = {path: kind for (_, path), kind in PROTOBUF_REQUEST_TYPES.items() if path.startswith("/v1/fleet/")}
    with link.peer.fleet() as client:
        answers = {path: status_of(partial(ask, client, path, fleet[path]())) for path in fleet}
        assert status_of(lambda: client.PullMessages(PullMessagesRequest(node=Node(node_id=node_id)))) == 401
    assert len(answers) == len(FLEET)
    assert set(answers.values()) == {401}, answers


def test_a_forged_host_does_not_lead_past_the_authentication(link: Link) -> None:
    """The guards read the path from the URL, which is put together from the Host header; the router does not."""
    request = PullObjectRequest(node=Node(node_id=1), run_id=1, object_id="0" * 64).SerializeToString()
    headers = {"content-type": "application/protobuf", "host": "127.0.0.1/v1/runtime/pull-object?"}
    answer = link.get("/v1/fleet/pull-object", method="POST", content=request, headers=headers)
    assert answer.status_code in (400, 401)


def test_an_invitation_admits_one_key(link: Link) -> None:
    invitation = link.roster.invite("once", link.home.url, link.peer.ca.decode(), 1)
    enrol(invitation, NodeKey.generate())
    with pytest.raises(InputError, match="refuses the invitation"):
        enrol(invitation, NodeKey.generate())


def test_a_revoked_key_is_turned_out_in_mid_connection_and_never_admitted_again(link: Link, tmp_path: Path) -> None:
    key, _ = link.enrol("leaver")
    with link.connect(key, tmp_path) as line:
        assert line.receive() is None
        link.roster.revoke("leaver")
        with pytest.raises(NotAdmittedError):
            line.receive()
    with pytest.raises(NotAdmittedError), link.connect(key, tmp_path):
        pass
    with pytest.raises(InputError, match="refuses the invitation"):
        enrol(link.roster.invite("leaver", link.home.url, link.peer.ca.decode(), 1), key)


# ---------------------------------------------------------------------------------------------------------------------
# A site against another


@dataclass(frozen=True, kw_only=True)
class Quarrel:
    """A run with a question to one site, and another site that is not asked."""

    grid: LinkGrid
    question: Message
    victim: NodeKey
    victim_id: int
    rival: NodeKey
    rival_id: int


@pytest.fixture
def quarrel(link: Link, request: pytest.FixtureRequest) -> Iterator[Quarrel]:
    name = hashlib.sha256(request.node.name.encode()).hexdigest()[:8]
    (victim, victim_id), (rival, rival_id) = link.enrol(f"victim-{name}"), link.enrol(f"rival-{name}")
    with link.peer.fleet(victim) as fleet:  # Flower takes messages for nodes that were connected once
        fleet.ActivateNode(ActivateNodeRequest(public_key=victim.public_pem, heartbeat_interval=30))
        fleet.DeactivateNode(DeactivateNodeRequest(node_id=victim_id))
    with LinkGrid(link.state).running() as grid:
        question = Message(RecordDict({"secret": ConfigRecord({"for": name})}), victim_id, "query.offer")
        assert list(grid.push_messages([question])) == [question.metadata.message_id]
        yield Quarrel(grid=grid, question=question, victim=victim, victim_id=victim_id, rival=rival, rival_id=rival_id)


def test_a_site_does_not_speak_as_another(link: Link, quarrel: Quarrel) -> None:
    other = Node(node_id=quarrel.victim_id)
    with link.peer.fleet(quarrel.rival) as fleet:
        attacks: dict[str, Callable[[], object]] = {
            "heartbeat": lambda: fleet.SendNodeHeartbeat(SendNodeHeartbeatRequest(node=other, heartbeat_interval=30)),
            "deactivate": lambda: fleet.DeactivateNode(DeactivateNodeRequest(node_id=quarrel.victim_id)),
            "unregister": lambda: fleet.UnregisterNode(UnregisterNodeFleetRequest(node_id=quarrel.victim_id)),
            "messages": lambda: fleet.PullMessages(PullMessagesRequest(node=other)),
            "objects": lambda: fleet.PullObject(PullObjectRequest(node=other)),
            "reply": lambda: fleet.PushMessages(PushMessagesRequest(node=other)),
        }
        assert {name: status_of(attack) for name, attack in attacks.items()} == dict.fromkeys(attacks, 401)


def test_a_site_does_not_answer_as_another_within_its_own_envelope(
    link: Link, quarrel: Quarrel, tmp_path: Path
) -> None:
    with link.peer.fleet(quarrel.rival) as fleet:
        assert status_of(partial(fleet.PushMessages, forgery(quarrel, sender=quarrel.victim_id))) == 403
    assert answer_as_victim(link, quarrel, tmp_path) == RecordDict({"true": ConfigRecord()})


def test_a_site_does_not_answer_anothers_question_in_its_own_name(link: Link, quarrel: Quarrel, tmp_path: Path) -> None:
    with link.peer.fleet(quarrel.rival) as fleet:
        assert not fleet.PushMessages(forgery(quarrel, sender=quarrel.rival_id)).objects_to_push
    assert answer_as_victim(link, quarrel, tmp_path) == RecordDict({"true": ConfigRecord()})


def forgery(quarrel: Quarrel, *, sender: int) -> PushMessagesRequest:
    """The rival's answer to the victim's question."""
    forged = Message(content=RecordDict({"forged": ConfigRecord()}), reply_to=quarrel.question)
    forged.metadata.__dict__["_src_node_id"] = sender
    forged.metadata.__dict__["_message_id"] = forged.object_id
    return PushMessagesRequest(
        node=Node(node_id=quarrel.rival_id),
        messages_list=[message_to_proto(remove_content_from_message(forged))],
        message_object_trees=[get_object_tree(forged)],
    )


def test_a_site_does_not_read_or_remove_what_is_between_another_and_the_coordinator(
    link: Link, quarrel: Quarrel, tmp_path: Path
) -> None:
    rival, run_id = Node(node_id=quarrel.rival_id), quarrel.question.metadata.run_id
    secrets = list(get_all_nested_objects(quarrel.question))
    assert len(secrets) > 1
    with link.peer.fleet(quarrel.rival) as fleet:
        assert not fleet.PullMessages(PullMessagesRequest(node=rival)).messages_list
        for one in secrets:
            pull = PullObjectRequest(node=rival, run_id=run_id, object_id=one)
            assert status_of(partial(fleet.PullObject, pull)) == 403
        for one in secrets:
            confirm = ConfirmMessageReceivedRequest(node=rival, run_id=run_id, message_object_id=one)
            assert status_of(partial(fleet.ConfirmMessageReceived, confirm)) == 403
        with link.connect(quarrel.victim, tmp_path) as line:
            received = line.receive()
            assert received is not None
            assert received.content == quarrel.question.content
            reply = Message(content=RecordDict({"update": ConfigRecord()}), reply_to=received)
            assert line.send(reply)
            for one in get_all_nested_objects(reply):
                pull = PullObjectRequest(node=rival, run_id=run_id, object_id=one)
                assert status_of(partial(fleet.PullObject, pull)) == 403
            (arrived,) = quarrel.grid.pull_messages([quarrel.question.metadata.message_id])
            assert arrived.content == reply.content


def answer_as_victim(link: Link, quarrel: Quarrel, folder: Path) -> RecordDict:
    """The victim answers truly; what the coordinator then holds."""
    with link.connect(quarrel.victim, folder) as line:
        received = line.receive()
        assert received is not None
        assert line.send(Message(content=RecordDict({"true": ConfigRecord()}), reply_to=received))
        (reply,) = quarrel.grid.pull_messages([quarrel.question.metadata.message_id])
    return reply.content


def test_a_run_that_ends_while_its_message_is_on_the_way_declines_and_breaks_no_line(
    link: Link, tmp_path: Path
) -> None:
    key, node_id = link.enrol("late")
    with link.connect(key, tmp_path) as line:
        with LinkGrid(link.state).running() as grid:
            grid.push_messages([Message(RecordDict(), node_id, "query.offer")])
            received = line.receive()
            assert received is not None
        with pytest.raises(DeclinedError):
            line.carries_bundle(received.metadata.run_id)
        assert not line.send(Message(content=RecordDict(), reply_to=received))
        assert line.receive() is None


# ---------------------------------------------------------------------------------------------------------------------
# The port


@pytest.mark.parametrize("path", ["/v1/fleet/push-object", ENROL_PATH])
def test_a_body_that_is_declared_too_large_is_refused_before_it_is_sent(link: Link, path: str) -> None:
    with link.tls() as raw:
        raw.sendall(f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {MAX_BODY_BYTES + 1}\r\n\r\n".encode())
        assert raw.recv(12) == b"HTTP/1.1 413"


def test_a_body_that_grows_too_large_is_cut_off(link: Link) -> None:
    piece = b"%x\r\n%s\r\n" % (1 << 20, bytes(1 << 20))
    with link.tls() as raw:
        raw.sendall(b"POST /v1/fleet/push-object HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n")
        raw.sendall(b"Content-Type: application/protobuf\r\n\r\n")
        for _ in range(MAX_BODY_BYTES >> 20):
            raw.sendall(piece)
        raw.sendall(b"1\r\n\0\r\n")
        assert raw.recv(12) == b"HTTP/1.1 413"


def test_plain_http_is_not_spoken(link: Link) -> None:
    with pytest.raises(httpx.TransportError):
        httpx.get(f"http://{link.peer.address}{PULSE_PATH}", trust_env=False)
    assert link.get(PULSE_PATH).status_code == 204


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion:DeprecationWarning")
@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1])
def test_old_tls_is_refused_by_the_link(link: Link, version: ssl.TLSVersion) -> None:
    assert greeted_by_a_lenient_server(link, version) == version.name.replace("_", ".")
    with pytest.raises((ssl.SSLError, ConnectionResetError)):
        link.tls(version)


def greeted_by_a_lenient_server(link: Link, version: ssl.TLSVersion) -> str | None:
    """The version on which the same client and a server without a lower bound agree, in memory."""
    lenient = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    lenient.load_cert_chain(link.home.path(link.home.settings.certificate), link.home.path(link.home.settings.key))
    lenient.set_ciphers("ALL:@SECLEVEL=0")
    lenient.minimum_version = version
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = weak_client(link.peer.ca, version).wrap_bio(down, up, server_hostname="127.0.0.1")
    open_ends = [client, lenient.wrap_bio(up, down, server_side=True)]
    while open_ends:
        for end in list(open_ends):
            with suppress(ssl.SSLWantReadError):
                end.do_handshake()
                open_ends.remove(end)
    return client.version()


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_new_tls_is_spoken(link: Link, version: ssl.TLSVersion) -> None:
    with link.tls(version) as raw:
        assert raw.version() == version.name.replace("_", ".")


def test_a_site_does_not_talk_to_a_link_that_its_authority_does_not_vouch_for(link: Link, tmp_path: Path) -> None:
    key, node_id = link.enrol("careful")
    other = make_authority(tmp_path / "pki", "Study 7").read_bytes()
    with (
        pytest.raises(UnreachableError, match="CERTIFICATE_VERIFY_FAILED"),
        Connection(link.peer.address, other, key, tmp_path / "node"),
    ):
        pass
    assert {one.status for one in link.state.get_node_info(node_ids=[node_id])} == {NodeStatus.REGISTERED}


# ---------------------------------------------------------------------------------------------------------------------
# A bundle for a site


class Noted:
    """Writes down each path that is asked for."""

    def __init__(self, app: ASGIApp, paths: list[str]) -> None:
        self._app, self._paths = app, paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._paths.append(scope["path"])
        await self._app(scope, receive, send)


class BundlingState:
    """The link's state in the hands of a coordinator that attaches a bundle to every run."""

    def __init__(self, state: LinkState, fab: bytes) -> None:
        self._state, self._fab = state, Fab(hashlib.sha256(fab).hexdigest(), fab, {})

    def __getattr__(self, name: str) -> Any:
        return getattr(self._state, name)

    def create_run(self, _id: str, _version: str, _hash: str, *others: Any) -> int:
        return self._state.create_run("@peer/shadow", "1.0.0", self._state.store_fab(self._fab), *others)


@dataclass
class Desk(Workbench):
    """A workbench without an executor, that keeps what it was asked."""

    frames: list[bytes] = field(default_factory=list)

    def ask(self, frame: bytes) -> bytes:
        self.frames.append(frame)
        raise ExecutorLostError


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A link in this process, and one connected agent."""

    state: LinkState
    node_id: int
    desk: Desk
    agent: Agent
    paths: list[str]

    def ask(self, state: LinkState, message_type: str) -> RecordDict:
        with LinkGrid(state).running() as grid:
            (reply,) = grid.send_and_receive([Message(RecordDict(), self.node_id, message_type)], timeout=DEADLINE_S)
        return reply.content


@pytest.fixture
def stage(home: Home, serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stage]:
    monkeypatch.setenv("FLWR_HOME", str(tmp_path / "flwr"))
    app, paths = link_app(home.database), list[str]()
    app.add_middleware(Noted, paths=paths)
    pki, state, key = home.folder / "pki", app.state.linkstate_factory.state(), NodeKey.generate()
    address = serve(app, (pki / "link.pem", pki / "link.key")).removeprefix("https://")
    with closing(Roster(home.roster, state)) as roster:
        ca = (pki / "ca.pem").read_bytes()
        roster.admit(roster.invite("Ulm", f"https://{address}", ca.decode(), 1).secret, key.public_pem)
    desk, stop = Desk(), threading.Event()
    agent = Agent(
        site="Ulm",
        connect=lambda: Connection(address, ca, key, tmp_path / "node"),
        workbench=desk,
        status_file=tmp_path / "status.json",
    )
    thread = threading.Thread(target=agent.run, args=(stop,))
    thread.start()
    try:
        wait_for("the agent", agent.connected)
        node_id = state.get_node_id_by_public_key(key.public_pem)
        yield Stage(state=state, node_id=node_id, desk=desk, agent=agent, paths=paths)
    finally:
        stop.set()
        thread.join(DEADLINE_S)
        assert not thread.is_alive()


def test_an_agent_refuses_an_offer_with_a_bundle_unread(stage: Stage, fab: bytes, marker: Path, tmp_path: Path) -> None:
    reply = stage.ask(cast(LinkState, BundlingState(stage.state, fab)), f"query.{OFFER}")
    assert decode_offer_reply(reply).refusal is RefusalCode.BUNDLE
    assert_untouched(stage, marker, tmp_path)


def test_an_agent_refuses_a_round_with_a_bundle_unread(stage: Stage, fab: bytes, marker: Path, tmp_path: Path) -> None:
    reply = stage.ask(cast(LinkState, BundlingState(stage.state, fab)), "train")
    assert decode_reply(reply).refusal is RefusalCode.BUNDLE
    assert stage.agent.tally.refused == {"bundle": 1}
    assert_untouched(stage, marker, tmp_path)


def assert_untouched(stage: Stage, marker: Path, folder: Path) -> None:
    assert stage.desk.frames == []
    assert "/v1/fleet/get-run" in stage.paths
    assert "/v1/fleet/get-fab" not in stage.paths
    assert not (folder / "flwr" / "apps").exists()
    assert not marker.exists()


def test_without_a_bundle_the_same_agent_asks_its_executor(stage: Stage) -> None:
    assert decode_reply(stage.ask(stage.state, "train")).refusal is RefusalCode.INTERNAL
    assert len(stage.desk.frames) == 1
