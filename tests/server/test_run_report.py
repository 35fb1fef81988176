# SPDX-License-Identifier: Apache-2.0
"""Tests of `veil.server.run_report`: the contract's keys, the ε of what each site released, and every refusal."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from veil.common.errors import RefusalCode
from veil.common.evaluation import Figure, design
from veil.common.head import initial_adapter
from veil.common.mismatch import Likeness, Mismatch
from veil.common.plan import RunPlan
from veil.common.privacy import spent
from veil.common.schedule import ReleaseKind, schedule
from veil.server.run_report import build_run_report
from veil.server.state import RoundRecord, RunState

MakePlan = Callable[..., RunPlan]
PROMISED = {"name", "created", "veil_version", "plan", "backbone", "sites", "metrics", "per_site", "timing", "bytes"}
OF_A_SITE = {"name", "records", "units", "epsilon", "delta", "rounds", "refusals"}


@pytest.fixture
def state(make_plan: MakePlan) -> RunState:
    """A finished run: Ulm in every round, Bonn refused in round 2, Köln refused the offer."""
    plan = make_plan()
    made = RunState.start(plan, initial_adapter(plan, 3), sites=2)
    made.cohort, made.declined, made.declared = ("Bonn", "Ulm"), {"Köln": "policy"}, {"Ulm": 120}
    for release in schedule(plan):
        refused = {"Bonn": "budget"} if release.round == 2 else {}
        made.records.append(
            RoundRecord(
                round=release.round,
                kind=release.kind,
                sites=tuple(sorted({"Bonn", "Ulm"} - set(refused))),
                refusals=refused,
                bytes_down=2000 + release.round,
                bytes_up=1000,
                seconds=0.5,
            )
        )
    return made


@pytest.fixture
def report(make_plan: MakePlan, state: RunState) -> dict[str, Any]:
    return build_run_report(make_plan(), "server-0a1b2c", state, {"federation_s": 2.5})


def site(report: dict[str, Any], name: str) -> dict[str, Any]:
    (found,) = [one for one in report["sites"] if one["name"] == name]
    return dict(found)


def test_the_promised_keys_are_there_and_it_is_json(report: dict[str, Any]) -> None:
    assert set(report) >= PROMISED
    assert all(set(one) >= OF_A_SITE for one in report["sites"])
    assert json.loads(json.dumps(report, allow_nan=False)) == report


def test_it_says_what_was_run(report: dict[str, Any], make_plan: MakePlan) -> None:
    plan = make_plan()
    assert (report["name"], report["job"], report["private"]) == ("server", "server-0a1b2c", True)
    assert RunPlan.from_json(json.dumps(report["plan"])) == plan
    assert report["plan_sha256"] == plan.sha256
    assert report["backbone"] is None
    assert report["privacy"]["unit"] == "record"
    assert report["timing"] == {"federation_s": 2.5}
    assert report["bytes"] == {"per_round_per_site": 3003, "down": 2003, "up": 1000, "total_per_site": 12_006}


def test_a_backbone_is_named_with_its_hash_and_licence(make_plan: MakePlan, state: RunState) -> None:
    backbone = {
        "source": "hub:a/b@c",
        "sha256": "ab" * 32,
        "licence": "MIT",
        "trained_on": "a billion pairs of sentences",
        "citation": "Wang et al. 2020",
    }
    plan = make_plan(backbone=backbone, task={"kind": "text-classification", "labels": ["a", "b"]})
    assert build_run_report(plan, "j", state, {})["backbone"] == backbone


def test_the_epsilon_of_a_site_is_that_of_the_rounds_it_answered(report: dict[str, Any], make_plan: MakePlan) -> None:
    plan = make_plan()
    mechanisms = [release.mechanism for release in schedule(plan)]
    ulm, bonn = site(report, "Ulm"), site(report, "Bonn")
    assert (ulm["rounds"], bonn["rounds"]) == (4, 3)
    assert ulm["epsilon"] == spent(mechanisms, 1e-5).epsilon
    assert bonn["epsilon"] == spent([*mechanisms[:2], mechanisms[3]], 1e-5).epsilon
    assert 0 < bonn["epsilon"] < ulm["epsilon"] <= plan.privacy.target_epsilon
    assert ulm["delta"] == bonn["delta"] == 1e-5


def test_a_site_that_took_no_part_spent_nothing_here(report: dict[str, Any]) -> None:
    koeln = site(report, "Köln")
    assert (koeln["epsilon"], koeln["rounds"], koeln["refusals"]) == (0.0, 0, {"offer": "policy"})


def test_every_refusal_stands_with_its_round(report: dict[str, Any]) -> None:
    assert site(report, "Bonn")["refusals"] == {"2": "budget"}
    assert site(report, "Ulm")["refusals"] == {}
    assert [one["refusals"] for one in report["rounds"]] == [{}, {}, {"Bonn": "budget"}, {}]
    assert [one["sites"] for one in report["rounds"]] == [2, 2, 1, 2]


@pytest.mark.parametrize("code", RefusalCode)
def test_a_refusal_of_any_kind_is_reported(make_plan: MakePlan, state: RunState, code: RefusalCode) -> None:
    state.declined = {"Köln": code.value}
    assert site(build_run_report(make_plan(), "j", state, {}), "Köln")["refusals"] == {"offer": code.value}


def judged(make_plan: MakePlan, state: RunState, right: int) -> dict[str, Any]:
    """The report of a run whose two sites released what they held out."""
    plan = make_plan(evaluation={"holdout": 0.2, "share": 0.2}, privacy={"target_epsilon": 8.0})
    clean = design(2) @ np.array([right, right, 100, 100, 40.0])
    points = tuple(np.rint(clean / schedule(plan)[-1].spacing).astype(int).tolist())
    state.evaluation = {"Ulm": points, "Bonn": points}
    last = replace(state.records[-1], round=4, kind=ReleaseKind.EVALUATION, bytes_down=9, bytes_up=9)
    state.records.append(last)
    return build_run_report(plan, "j", state, {})


def test_an_evaluation_stands_with_its_errors(make_plan: MakePlan, state: RunState) -> None:
    report = judged(make_plan, state, right=400)
    whole, (bonn, ulm) = report["evaluation"], report["evaluation"]["per_site"]
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert (whole["sites"], whole["holdout"], whole["confidence"]) == (2, 0.2, 0.95)
    assert (bonn["name"], ulm["name"]) == ("Bonn", "Ulm")
    assert whole["count"]["value"] == pytest.approx(2000, rel=1e-4)
    assert ulm["count"]["value"] == pytest.approx(1000, rel=1e-4)
    assert whole["accuracy"]["value"] == ulm["accuracy"]["value"] == pytest.approx(0.8, rel=1e-4)
    assert whole["count"]["standard_error"] == pytest.approx(math.sqrt(2) * ulm["count"]["standard_error"])
    assert whole["accuracy"]["standard_error"] < ulm["accuracy"]["standard_error"]
    assert whole["accuracy"]["low"] < 0.8 < whole["accuracy"]["high"]
    assert set(whole["classes"]) == {"a", "b"}
    assert set(whole["classes"]["a"]) == {"count", "share", "recall"}


def test_the_bytes_of_a_round_are_those_of_training(make_plan: MakePlan, state: RunState) -> None:
    sent = judged(make_plan, state, right=400)["bytes"]
    assert sent == {"per_round_per_site": 3003, "down": 2003, "up": 1000, "total_per_site": 12_006 + 18}


def test_the_epsilon_of_an_evaluation_is_in_the_sites(make_plan: MakePlan, state: RunState) -> None:
    ulm = site(judged(make_plan, state, right=400), "Ulm")
    plan = make_plan(evaluation={"holdout": 0.2, "share": 0.2}, privacy={"target_epsilon": 8.0})
    assert ulm["rounds"] == 5
    assert ulm["epsilon"] == spent([release.mechanism for release in schedule(plan)], 1e-5).epsilon


def test_where_noise_is_shared_what_holds_without_masks_is_told_too(make_plan: MakePlan, state: RunState) -> None:
    plan = make_plan(privacy={"target_epsilon": 3.0, "noise": "distributed"})
    ulm = site(build_run_report(plan, "j", state, {}), "Ulm")
    shares = [record.shares(plan) for record in state.records if "Ulm" in record.sites]
    alone = [one.unmasked(release.mechanism) for one, release in zip(shares, schedule(plan), strict=True) if one]
    assert len(alone) == ulm["rounds"] == 4
    assert ulm["epsilon_alone"] == spent(alone, 1e-5).epsilon > ulm["epsilon"]
    assert site(build_run_report(make_plan(), "j", state, {}), "Ulm")["epsilon_alone"] is None


def test_without_an_evaluation_there_is_none(report: dict[str, Any]) -> None:
    assert report["evaluation"] is None


def test_how_unlike_the_others_a_site_is_stands_with_its_interval(make_plan: MakePlan, state: RunState) -> None:
    distance = Figure(value=0.3, standard_error=0.05, low=0.2, high=0.4)
    state.mismatch = {name: Mismatch(distance=distance, verdict=Likeness.APART) for name in ("Ulm", "Bonn")}
    report = build_run_report(make_plan(), "j", state, {})
    told = report["mismatch"]
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert [one["name"] for one in told["per_site"]] == ["Bonn", "Ulm"] and told["reason"] is None
    shown = {"value": 0.3, "standard_error": 0.05, "low": 0.2, "high": 0.4, "reason": None}
    assert told["per_site"][0] == {"name": "Bonn", "distance": shown, "verdict": "apart"}


@pytest.mark.parametrize(
    ("sections", "sites", "reason"),
    [
        ({}, 2, "an earlier version took the centring round in"),
        ({}, 1, "no other site to compare with"),
        ({"privacy": {"noise": "distributed", "target_epsilon": 3.0}}, 3, "masks hide every single site's sum"),
        ({"training": {"centre": False}, "cohort": {"nominal_units": 9}}, 2, "the plan has no centring round"),
    ],
)
def test_why_no_mismatch_is_known_is_said(
    make_plan: MakePlan, state: RunState, sections: dict[str, Any], sites: int, reason: str
) -> None:
    plan = make_plan(**sections)
    first = replace(state.records[0], sites=("Bonn", "Kiel", "Ulm")[:sites])
    state.records = [first, *state.records[1:]]
    told = build_run_report(plan, "j", state, {})["mismatch"]
    assert (told["per_site"], told["reason"]) == (None, reason)


def test_of_a_sites_records_it_knows_what_the_site_declared_public(report: dict[str, Any]) -> None:
    assert {one["name"]: one["units"] for one in report["sites"]} == {"Bonn": None, "Köln": None, "Ulm": 120}
    assert all(one["records"] is None for one in report["sites"])
    assert (report["metrics"], report["per_site"]) == ({}, [])
