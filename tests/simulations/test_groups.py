# SPDX-License-Identifier: Apache-2.0
"""Groups in a simulation: exact rates beside the released ones, from one table to report, statement and model card."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from veil.client.ledger import entries_of
from veil.common.evaluation import evaluation_norm

Veil = Callable[..., tuple[int, str, str]]


@pytest.fixture
def table() -> pd.DataFrame:
    """The class is the sign of a, but for 30 % of the women, of whom it is not; one record in ten is of nobody."""
    random = np.random.default_rng(1)
    frame = pd.DataFrame({"a": random.normal(size=3600), "b": random.normal(size=3600)})
    frame["sex"] = random.choice(["0", "1", ""], size=3600, p=[0.45, 0.45, 0.1])
    odd = (frame["sex"] == "0") & (random.random(3600) < 0.3)
    frame["label"] = np.where((frame["a"] > 0) ^ odd, "ill", "well")
    frame["site"] = np.repeat(["Bern", "Graz", "Ulm"], 1200)
    return frame


GROUPED: dict[str, Any] = {
    "evaluation": {"holdout": 0.4, "share": 0.3, "groups": ["women", "men"]},
    "simulation": {"baselines": [], "selector": False, "group": "sex", "groups": {"0": "women", "1": "men"}},
}


def test_a_model_that_fails_women_is_found_out_exactly_and_with_noise(
    veil: Veil, write_plan: Callable[..., Path], table: pd.DataFrame, tmp_path: Path
) -> None:
    code, out, err = veil("simulate", write_plan(table, **GROUPED), "--output", tmp_path / "out")
    assert code == 0, err
    report = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    exact, told = report["groups"], report["evaluation"]
    women, men = (exact["by_group"][name]["accuracy"]["value"] for name in ("women", "men"))
    assert abs(women - 0.7) < 0.12 < 0.18 < men - women
    assert exact["gaps"]["accuracy"]["value"] == pytest.approx(men - women)
    assert exact["gaps"]["accuracy"]["low"] > 0.05
    assert 0 < exact["not_known"] < 200
    for name, right in (("women", women), ("men", men)):
        released = told["groups"][name]
        assert abs(released["accuracy"]["value"] - right) < 6 * released["accuracy"]["standard_error"] < 0.5
        held = 0.4 * 0.45 * sum(site["records"] for site in report["sites"])
        assert abs(released["count"]["value"] - held) < 6 * released["count"]["standard_error"] + 100
    assert told["accuracy_gap"]["low"] < men - women + 0.05 and told["accuracy_gap"]["high"] > men - women - 0.05
    assert entries_of(tmp_path / "out" / "ledger.sqlite", "Graz")[-1].mechanism.max_grad_norm == evaluation_norm(2)
    assert all(7.99 < site["epsilon"] <= 8.0 for site in report["sites"])
    assert [set(one["groups"]) for one in told["per_site"]] == [{"women", "men"}] * 3
    card = (tmp_path / "out" / "model-card.html").read_text(encoding="utf-8")
    assert "accuracy for group women" in card and "largest gap in accuracy between groups" in card
    assert "largest gap between groups: equalized odds" in card and f"{exact['not_known']} records of no known" in card
    assert "largest gap between groups" in out and f"accuracy {100 * (men - women):5.1f} points" in out


def test_without_groups_nothing_is_said_of_them(veil: Veil, write_plan: Callable[..., Path], tmp_path: Path) -> None:
    plan = write_plan(evaluation={"share": 0.3}, simulation={"baselines": [], "selector": False})
    assert veil("simulate", plan, "--output", tmp_path / "out")[0] == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    assert report["groups"] is None and "groups" not in report["evaluation"]


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"evaluation": {"groups": ["women", "men"]}}, "without simulation.group"),
        ({"evaluation": {"groups": ["women"]}}, "at least two groups"),
        ({"evaluation": {"groups": ["men", "men"]}}, "at least two groups"),
        ({"simulation": {"group": "a"}}, "2 to 50"),
    ],
)
def test_groups_that_compare_nothing_are_refused_before_anything_runs(
    veil: Veil, write_plan: Callable[..., Path], tmp_path: Path, sections: dict[str, Any], words: str
) -> None:
    code, _, err = veil("simulate", write_plan(**sections), "--output", tmp_path / "out")
    assert code == 2 and words in err and not (tmp_path / "out").exists()
