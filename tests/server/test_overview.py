# SPDX-License-Identifier: Apache-2.0
"""Tests of `veil.server.overview`: one document of sites, runs, and which site said what."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import datetime

import pytest
from flwr.server.superlink.linkstate import LinkState
from flwr.supercore.constant import NodeStatus

from veil.common.errors import InputError, RefusalCode
from veil.common.keys import NodeKey
from veil.common.plan import RunPlan
from veil.server.home import Home
from veil.server.jobs import Job, Phase
from veil.server.link import open_link_state
from veil.server.overview import Overview
from veil.server.roster import Roster

pytestmark = pytest.mark.filterwarnings("ignore:No path_separator:DeprecationWarning")


@pytest.fixture
def state(home: Home) -> LinkState:
    return open_link_state(home.database).state()


@pytest.fixture
def enrol(home: Home, state: LinkState) -> Iterator[Callable[[str], int]]:
    """Enrols a site; gives its node."""
    with closing(Roster(home.roster, state)) as roster:
        ca = home.path(home.settings.ca).read_text(encoding="ascii")

        def make(name: str) -> int:
            key = NodeKey.generate().public_pem
            roster.admit(roster.invite(name, home.url, ca, 1).secret, key)
            node_id = state.get_node_id_by_public_key(key)
            assert node_id is not None
            return node_id

        yield make


def test_a_new_coordinator_has_nothing_to_show(home: Home) -> None:
    document = Overview(home).document()
    assert (document["url"], document["sites"], document["runs"]) == ("https://localhost:8443", [], [])
    assert document["certificate"]["days_left"] > 300
    assert datetime.fromisoformat(document["certificate"]["not_after"]).tzinfo is not None


def test_a_site_is_connected_while_its_agent_is(home: Home, state: LinkState, enrol: Callable[[str], int]) -> None:
    overview, ulm = Overview(home), enrol("Ulm")
    enrol("Bonn")
    assert [(site.name, site.connected) for site in overview.sites()] == [("Ulm", False), ("Bonn", False)]
    state.activate_node(ulm, 30.0)
    assert [(site.name, site.connected) for site in overview.sites()] == [("Ulm", True), ("Bonn", False)]
    state.deactivate_node(ulm)
    assert [(site.name, site.connected) for site in overview.sites()] == [("Ulm", False), ("Bonn", False)]


def test_a_site_that_fell_silent_is_not_connected_as_flower_sees_it_too(
    home: Home, state: LinkState, enrol: Callable[[str], int]
) -> None:
    nodes = {"silent": enrol("silent"), "heard": enrol("heard")}
    state.activate_node(nodes["silent"], 1e-6)
    state.activate_node(nodes["heard"], 30.0)
    connected = {site.name for site in Overview(home).sites() if site.connected}
    infos = state.get_node_info(node_ids=list(nodes.values()))
    assert {nodes[name] for name in connected} == {info.node_id for info in infos if info.status == NodeStatus.ONLINE}
    assert connected == {"heard"}


def test_looking_makes_no_file(home: Home) -> None:
    before = sorted(home.folder.rglob("*"))
    Overview(home).document()
    assert sorted(home.folder.rglob("*")) == before
    assert home.database not in before


def test_a_link_that_has_not_made_its_tables_yet_has_nobody(home: Home) -> None:
    home.database.touch()
    assert Overview(home).sites() == []


def test_a_revoked_site_stays_in_the_list_and_is_not_connected(
    home: Home, state: LinkState, enrol: Callable[[str], int]
) -> None:
    state.activate_node(enrol("Ulm"), 30.0)
    with closing(Roster(home.roster, state)) as roster:
        roster.revoke("Ulm")
    (site,) = Overview(home).sites()
    assert (site.name, site.connected) == ("Ulm", False)
    assert site.revoked_at is not None
    assert datetime.fromisoformat(site.enrolled_at) <= datetime.fromisoformat(site.revoked_at)


def test_a_run_shows_what_each_site_said(home: Home, make_plan: Callable[..., RunPlan]) -> None:
    job = Job.submit(home.runs, make_plan(), ("Ulm",))
    said = {code.value: code.value for code in RefusalCode}
    job.note(phase=Phase.FAILED, rounds_done=1, rounds=4, sites=said, message="too few <sites>")
    document = Overview(home).document()
    (run,) = json.loads(json.dumps(document))["runs"]
    assert {key: run[key] for key in ("name", "phase", "rounds_done", "rounds", "sites", "message")} == {
        "name": job.name,
        "phase": "failed",
        "rounds_done": 1,
        "rounds": 4,
        "sites": said,
        "message": "too few <sites>",
    }


def test_a_certificate_that_is_none_is_named(home: Home) -> None:
    home.path(home.settings.certificate).write_bytes(b"")
    with pytest.raises(InputError, match="holds no certificate"):
        Overview(home).document()
