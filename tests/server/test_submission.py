# SPDX-License-Identifier: Apache-2.0
"""Tests of `veil.server.submission`: what is wrong with a plan is said at once, and what is submitted is pinned."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

from veil.common.delivery import manifest_of, shelved
from veil.common.errors import InputError, PlanError, WeightsError
from veil.common.keys import NodeKey
from veil.common.plan import RunPlan
from veil.common.weights import WEIGHTS_NAME
from veil.server.home import Home
from veil.server.jobs import Job, Phase
from veil.server.link import open_link_state
from veil.server.roster import Roster
from veil.server.submission import submit

TABLE = {"kind": "tabular-classification", "labels": ["a", "b"], "width": 3}
TEXT = {"kind": "text-classification", "labels": ["a", "b"]}
MakePlan = Callable[..., RunPlan]


@pytest.fixture
def roster(home: Home) -> Iterator[Roster]:
    with closing(Roster(home.roster, open_link_state(home.database).state())) as opened:
        yield opened


@pytest.fixture
def enrolled(home: Home, roster: Roster) -> Roster:
    """Ulm and Bonn are enrolled, Celle was revoked, Dorsten is invited."""
    ca = home.path(home.settings.ca).read_text(encoding="ascii")
    for name in ("Ulm", "Bonn", "Celle"):
        roster.admit(roster.invite(name, home.url, ca, 1).secret, NodeKey.generate().public_pem)
    roster.revoke("Celle")
    roster.invite("Dorsten", home.url, ca, 1)
    return roster


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A folder of weights and configuration, as a plan's author has it."""
    folder = tmp_path / "plans" / "model"
    folder.mkdir(parents=True)
    (folder / WEIGHTS_NAME).write_bytes(save({"w": np.arange(8, dtype=np.float32)}))
    (folder / "config.json").write_text('{"model_type": "bert"}', encoding="utf-8")
    return folder


def refused(home: Home, plan: RunPlan, kind: type[InputError], words: str, **options: Any) -> None:
    with pytest.raises(kind, match=words):
        submit(home, plan, **{"base": home.folder, "sites": (), **options})
    assert Job.all(home.runs) == []


@pytest.mark.usefixtures("enrolled")
def test_without_names_all_that_are_enrolled_are_asked(home: Home, make_plan: MakePlan) -> None:
    job = submit(home, make_plan(task=TABLE), base=home.folder, sites=())
    assert (job.sites, job.status.phase) == (("Bonn", "Ulm"), Phase.SUBMITTED)
    assert [one.name for one in Job.all(home.runs)] == [job.name]


@pytest.mark.usefixtures("enrolled")
def test_named_sites_are_asked_each_once(home: Home, make_plan: MakePlan) -> None:
    plan = make_plan(task=TABLE, cohort={"min_sites": 1})
    assert submit(home, plan, base=home.folder, sites=("Ulm", "Ulm")).sites == ("Ulm",)


@pytest.mark.usefixtures("enrolled")
@pytest.mark.parametrize("stranger", ["Celle", "Dorsten", "ulm", ""])
def test_a_site_that_is_not_enrolled_cannot_be_asked(home: Home, make_plan: MakePlan, stranger: str) -> None:
    refused(home, make_plan(task=TABLE), InputError, f"{stranger}: not enrolled", sites=("Ulm", stranger))


@pytest.mark.usefixtures("enrolled")
def test_fewer_sites_than_the_plan_wants_are_not_enough(home: Home, make_plan: MakePlan) -> None:
    refused(home, make_plan(task=TABLE), InputError, r"1 sites to ask \(Ulm\)", sites=("Ulm",))
    refused(home, make_plan(task=TABLE, cohort={"min_sites": 3}), InputError, r"min_sites = 3")


def test_without_any_site_there_is_no_run(home: Home, make_plan: MakePlan) -> None:
    refused(home, make_plan(task=TABLE), InputError, r"0 sites to ask \(none\)")


@pytest.mark.usefixtures("enrolled")
def test_numeric_features_need_their_number(home: Home, make_plan: MakePlan) -> None:
    refused(home, make_plan(), PlanError, r"task\.width")


@pytest.mark.usefixtures("enrolled")
def test_what_belongs_to_a_simulation_stays_at_home(home: Home, make_plan: MakePlan) -> None:
    """Paths of the coordinator's machine are nobody's business."""
    simulation = {"path": "/secret/records.csv", "features": ["x"], "label": "y", "partition": "iid", "sites": 2}
    job = submit(home, make_plan(task=TABLE, simulation=simulation), base=home.folder, sites=())
    assert job.plan.simulation is None
    assert all(b"/secret/" not in path.read_bytes() for path in job.folder.rglob("*") if path.is_file())


@pytest.mark.usefixtures("enrolled")
def test_a_backbone_is_pinned_whole_and_taken_onto_the_shelf(home: Home, make_plan: MakePlan, weights: Path) -> None:
    found = manifest_of(weights)
    plan = make_plan(task=TEXT, backbone={"source": "path:model", "sha256": found.sha256})
    job = submit(home, plan, base=weights.parent, sites=())
    assert job.plan.backbone is not None
    assert job.plan.backbone.files_sha256 == found.files_sha256
    assert manifest_of(shelved(home.shelf, job.plan.backbone)) == found
    (weights / WEIGHTS_NAME).unlink()
    assert manifest_of(shelved(home.shelf, job.plan.backbone)) == found


@pytest.mark.usefixtures("enrolled")
@pytest.mark.parametrize(
    ("pins", "words"),
    [
        ({"sha256": "0" * 64}, "0" * 64),
        ({"files_sha256": "0" * 64}, "0" * 64),
        ({"source": "path:elsewhere"}, "elsewhere"),
    ],
)
def test_another_backbone_than_the_pinned_one_is_refused(
    home: Home, make_plan: MakePlan, weights: Path, pins: dict[str, str], words: str
) -> None:
    pinned = {"source": "path:model", "sha256": manifest_of(weights).sha256, **pins}
    refused(home, make_plan(task=TEXT, backbone=pinned), WeightsError, words, base=weights.parent)
    assert not list(home.shelf.rglob(WEIGHTS_NAME))
