# SPDX-License-Identifier: Apache-2.0
"""What an agent hands to TLS in a whole run: the same, but for noise, for a table with more records.

Real processes: a coordinator and three agents that record their requests, with their executors. Two have tables of
different size and are compared field by field; the third's owner declares counts public, which shows that a count would
be seen.
"""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from flwr.app import Message
from flwr.proto import fleet_pb2, heartbeat_pb2, message_pb2, run_pb2
from flwr.supercore.inflatable.inflatable_object import get_object_id
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

from veil.common.inventory import ENVELOPE
from veil.common.plan import RunPlan
from veil.common.supervision import Child
from veil.server.jobs import Phase
from veil.server.submission import submit
from veil.simulations.deployment import Deployment

COLUMNS = ("age", "pulse")
FEW, MANY = 60, 73
BODIES: dict[str, Any] = {
    "activate-node": fleet_pb2.ActivateNodeRequest,
    "deactivate-node": fleet_pb2.DeactivateNodeRequest,
    "send-node-heartbeat": heartbeat_pb2.SendNodeHeartbeatRequest,
    "pull-messages": fleet_pb2.PullMessagesRequest,
    "push-messages": fleet_pb2.PushMessagesRequest,
    "get-run": run_pb2.GetRunRequest,
    "push-object": message_pb2.PushObjectRequest,
    "pull-object": message_pb2.PullObjectRequest,
    "confirm-message-received": message_pb2.ConfirmMessageReceivedRequest,
}
OF_A_SITE = {"site", "head", "statement", "signature", "public-key"}
"""Names, hashes, and what is signed; the statement is compared on its own."""
OF_THE_MOMENT = {"site", "created", "ledger_head", "head", "time"}
SITES = {"Few": (FEW, False), "Many": (MANY, False), "Telling": (FEW, True)}
"""Records of each site, and whether its owner declares the number public."""


def plan() -> RunPlan:
    return RunPlan.model_validate(
        {
            "name": "traffic",
            "task": {"kind": "tabular-classification", "labels": ["well", "ill"], "width": len(COLUMNS)},
            "training": {"rounds": 3},
            "evaluation": {},
            "privacy": {"target_epsilon": 2.0},
            "cohort": {"min_sites": 3, "round_timeout_s": 60},
        }
    )


@dataclass(kw_only=True)
class Traffic:
    """Everything a site sent.

    Attributes:
        requests: type of the request and the request, oldest first; headers' names by path.
        trees: type of the question, and digests of the reply's parts.
        wanted: parts that the coordinator asked for, by the reply's digest; of a reply it would not take, none.
        replies: type of the question and the reply, of those that were sent whole.
    """

    requests: list[Any] = field(default_factory=list)
    headers: dict[str, set[str]] = field(default_factory=dict)
    trees: list[tuple[str, Any]] = field(default_factory=list)
    wanted: dict[str, set[str]] = field(default_factory=dict)
    replies: list[tuple[str, Message]] = field(default_factory=list)

    @classmethod
    def read(cls, path: Path, objects: dict[str, bytes]) -> Traffic:
        """What one agent sent; `objects` gathers all parts of messages, as Flower sends equal ones once."""
        found, trees = cls(), list[tuple[Any, Any]]()
        for line in path.read_text(encoding="ascii").splitlines():
            said = json.loads(line)
            if "pulled" in said:
                part = message_pb2.PullObjectResponse.FromString(base64.b64decode(said["pulled"])).object_content
                objects[get_object_id(part)] = part
                continue
            if "wanted" in said:
                answer = fleet_pb2.PushMessagesResponse.FromString(base64.b64decode(said["wanted"]))
                found.wanted |= {reply: set(answer.objects_to_push) for reply in answer.results}
                continue
            name = said["path"].removeprefix("/v1/fleet/")
            found.headers.setdefault(name, set()).update(said["headers"])
            request = BODIES[name].FromString(base64.b64decode(said["body"]))
            found.requests.append(request)
            if name == "push-object":
                objects[request.object_id] = request.object_content
            if name == "push-messages":
                trees += zip(request.messages_list, request.message_object_trees, strict=True)
        found.trees = [(message.metadata.message_type, tree) for message, tree in trees]
        return found

    def inflate(self, objects: dict[str, bytes]) -> Traffic:
        """Put the replies together.

        A site that was asked twice answers twice, and the second time a run that is over takes nothing of it.
        """
        for kind, tree in self.trees:
            unseen = {one for one in _ids(tree) if one not in objects}
            if unseen:
                assert unseen <= self.wanted.get(tree.object_id, unseen), f"a part of an answer to {kind} nobody sent"
                continue
            reply = inflate_object_from_contents(tree.object_id, {one: objects[one] for one in _ids(tree)})
            assert isinstance(reply, Message)
            self.replies.append((kind, reply))
        return self

    def rounds(self) -> list[dict[str, Any]]:
        """The answers to rounds, oldest first."""
        return [one for one in self.said() if one["type"] == "train"]

    def said(self) -> list[dict[str, Any]]:
        """What was said, each once, without names and keys; tensors by form and size."""
        replies = [
            {
                "type": kind,
                "config": {k: v for k, v in reply.content.config_records["config"].items() if k not in OF_A_SITE},
                "metrics": {k: dict(v) for k, v in reply.content.metric_records.items()},
                "arrays": {
                    name: (array.dtype, tuple(array.shape), len(array.data))
                    for record in reply.content.array_records.values()
                    for name, array in record.items()
                },
            }
            for kind, reply in self.replies
        ]
        return [one for place, one in enumerate(replies) if one not in replies[:place]]

    def statement(self) -> Any:
        (text,) = [
            str(reply.content.config_records["config"]["statement"])
            for kind, reply in self.replies
            if kind == "query.statement"
        ]
        return _timeless(json.loads(text))


def _ids(tree: Any) -> list[str]:
    return [tree.object_id, *(one for child in tree.children for one in _ids(child))]


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _timeless(one) for key, one in value.items() if key not in OF_THE_MOMENT}
    return [_timeless(one) for one in value] if isinstance(value, list) else value


def write_table(path: Path, records: int) -> Path:
    random = np.random.default_rng(1)
    frame = pd.DataFrame(random.normal(size=(records, len(COLUMNS))), columns=list(COLUMNS))
    frame.assign(ill=random.integers(0, 2, size=records)).to_csv(path, index=False)
    return path


def start_recorded(deployment: Deployment, name: str) -> Path:
    """Enrol a site and start its agent; the file that its requests are written to."""
    records, release_counts = SITES[name]
    table = write_table(deployment.folder / f"{name}.csv", records)
    limits = {"epsilon_per_run": 4.0, "epsilon_lifetime": 4.0, "approval": "auto-within-limits"}
    file = deployment.add_site(
        name,
        data={"table": str(table), "features": list(COLUMNS), "label": "ill", "labels": {"0": "well", "1": "ill"}},
        limits={**limits, "release_counts": release_counts},
    )
    output = deployment.folder / f"{name}.requests"
    arguments = [str(file.folder / "site.toml"), str(output)]
    log = deployment.folder / "log" / name
    deployment.processes[name] = Child("tests.privacy.recording_agent", arguments, log=log)
    return output


@pytest.fixture(scope="module")
def traffic(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Traffic]:
    with Deployment.create(tmp_path_factory.mktemp("traffic")) as deployment:
        outputs = {name: start_recorded(deployment, name) for name in SITES}
        job = submit(deployment.home, plan(), base=Path.cwd(), sites=())
        deployment.finish(job, 120.0)
        assert job.status.phase is Phase.FINISHED, job.status.message
    objects: dict[str, bytes] = {}
    recorded = {name: Traffic.read(output, objects) for name, output in outputs.items()}
    return {name: one.inflate(objects) for name, one in recorded.items()}


def test_a_table_with_more_records_sends_the_same(traffic: dict[str, Traffic]) -> None:
    few, many = traffic["Few"], traffic["Many"]
    assert [one["type"] for one in few.rounds()] == ["train"] * 5
    assert few.said() == many.said()
    assert few.rounds() == many.rounds()
    assert few.statement() == many.statement()
    assert {type(one) for one in few.requests} == {type(one) for one in many.requests}
    assert few.headers == many.headers


def test_a_declared_count_would_be_seen(traffic: dict[str, Traffic]) -> None:
    few, telling = traffic["Few"], traffic["Telling"]
    assert few.rounds() != telling.rounds()
    assert {one["config"].get("units") for one in telling.rounds()} == {FEW}


def test_what_is_not_sent_is_not_sent(traffic: dict[str, Traffic]) -> None:
    for request in [one for site in traffic.values() for one in site.requests]:
        told = ENVELOPE[request.DESCRIPTOR.name]
        for one, _ in request.ListFields():
            assert not told[one.name].startswith("not sent"), (request.DESCRIPTOR.name, one.name)
        for message in getattr(request, "messages_list", ()):
            assert not message.HasField("error")
