# SPDX-License-Identifier: Apache-2.0
"""What joining gave each site: judged on records that nothing has seen, and named where it did harm."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from veil.client.examples import Examples
from veil.client.personal import Origin
from veil.common.head import initial_adapter
from veil.common.plan import RunPlan, parse_plan
from veil.simulations.baselines import Pool
from veil.simulations.partition import Share
from veil.simulations.selection import SiteSelection, run_selector

Veil = Callable[..., tuple[int, str, str]]
WritePlan = Callable[..., Path]
SITES = ("Bern", "Graz", "Ulm")


def table(count: int = 200) -> pd.DataFrame:
    """Three sites; the class is the sign of a, but Ulm means the opposite, and Graz has hardly any who are well."""
    random = np.random.default_rng(0)
    a, site = random.normal(size=3 * count), np.repeat(SITES, count)
    ill = (a + 0.2 * random.normal(size=3 * count) > 0) ^ (site == "Ulm")
    records = pd.DataFrame({"a": a, "b": random.normal(size=3 * count), "site": site})
    records["label"] = np.where(ill, "ill", "well")
    records["patient"] = records.index.map("p{}".format)
    kept: pd.DataFrame = records[(site != "Graz") | ill | (records.index % 5 == 0)]
    return kept


def test_what_joining_gave_is_told_and_what_did_harm_is_named(
    veil: Veil, write_plan: WritePlan, tmp_path: Path
) -> None:
    plan = write_plan(table(), simulation={"baselines": [], "noise": "fixed"})
    code, out, err = veil("simulate", plan, "--output", tmp_path / "out")
    assert code == 0, err
    report = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    found: dict[str, dict[str, Any]] = {site["name"]: site["selector"] for site in report["per_site"]}
    assert "negative_transfer" in found["Ulm"]["findings"] and found["Ulm"]["chosen"] != "federated"
    assert found["Ulm"]["held_out"]["chosen"]["value"] > 0.8 > 0.3 > found["Ulm"]["held_out"]["federated"]["value"]
    assert "label_shift" in found["Graz"]["findings"] and found["Graz"]["label_shift"] < 0.001
    assert "negative_transfer" not in found["Graz"]["findings"], "as good as its own"
    for one in found.values():
        assert one["epsilon"] == 0 and one["gain"]["high"] >= 0
        assert set(one["held_out"]) == {"federated", "blend", "local", "chosen"}
        assert set(one["cross_validated"]) == {"federated", "blend", "local"}
        assert all(figure["standard_error"] > 0 for figure in one["held_out"].values())
    assert report["selector"]["epsilon"] == 0 and sum(report["selector"]["chosen"].values()) == 3
    assert "What joining gave" in out and "negative transfer" in out


@pytest.fixture
def pool(write_plan: WritePlan) -> Pool:
    """Two sites of sixty patients with two records each, and an empty head's plan."""
    plan: RunPlan = parse_plan(write_plan())
    random = np.random.default_rng(6)
    features = np.repeat(random.normal(size=(120, 2)), 2, axis=0)
    patients = np.repeat([f"p{index}" for index in range(120)], 2)
    rows = np.arange(240)
    return Pool(
        plan=plan,
        examples=Examples(
            inputs=features,
            labels=(features[:, 0] > 0).astype(np.int64),
            units=rows.astype(np.str_),
            patients=patients,
        ),
        features=features,
        shares=(
            Share(site="Bern", train=rows[:80], test=rows[80:120]),
            Share(site="Ulm", train=rows[120:200], test=rows[200:]),
        ),
    )


def chosen(pool: Pool) -> dict[str, SiteSelection]:
    return run_selector(pool, initial_adapter(pool.plan, 2), lambda done: None)


def test_the_choice_reads_no_test_record(pool: Pool) -> None:
    labels = pool.examples.labels.copy()
    for share in pool.shares:
        labels[share.test] = 1 - labels[share.test]
    other = replace(pool, examples=replace(pool.examples, labels=labels))
    one, two = chosen(pool), chosen(other)
    for site in ("Bern", "Ulm"):
        assert (one[site].chosen, one[site].strength) == (two[site].chosen, two[site].strength)
        assert one[site].cross_validated == two[site].cross_validated
        assert one[site].accuracy(Origin.LOCAL).value + two[site].accuracy(Origin.LOCAL).value == pytest.approx(1)


def test_a_patient_s_records_count_as_one_whatever_the_promise_is_about(pool: Pool) -> None:
    """Forty patients, not eighty records: an error bar a good deal longer."""
    by_patient = chosen(pool)["Bern"].cross_validated[Origin.FEDERATED]
    by_record = chosen(replace(pool, examples=replace(pool.examples, patients=None)))["Bern"]
    shorter = by_record.cross_validated[Origin.FEDERATED]
    assert by_patient.value == shorter.value
    assert by_patient.standard_error > 1.3 * shorter.standard_error


def test_without_the_selector_nothing_is_compared(pool: Pool) -> None:
    simulation = pool.plan.simulation
    assert simulation is not None and simulation.selector
    without = pool.plan.model_copy(update={"simulation": simulation.model_copy(update={"selector": False})})
    assert chosen(replace(pool, plan=without)) == {}
