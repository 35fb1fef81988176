# SPDX-License-Identifier: Apache-2.0
"""A model card that Hugging Face's own library reads, which says what is known and what is not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from veil.common.plan import RunPlan
from veil.server.export_card import export_card
from veil.server.export_target import Target
from veil.server.lineage import Lineage

LABELS = ["a|b", "--- # <b>no</b>", 'ja: "ö"']
BACKBONE = {"source": "hub:org/name@abc", "sha256": "0" * 64, "licence": "Apache-2.0"}
FIGURE = {"value": 0.75, "low": 0.5, "high": 1.0, "standard_error": 0.125}
SITE = {"name": "St. *Elsewhere*", "epsilon": 2.5001, "delta": 1e-5}
REPORT = {"sites": [SITE], "estimated_units": 41.7, "evaluation": None, "metrics": {}, "private": True}


def plan(backbone: dict[str, str] | None = BACKBONE) -> RunPlan:
    task = {"kind": "text-classification" if backbone else "tabular-classification", "labels": LABELS}
    document: dict[str, Any] = {"name": "a plan", "task": task, "privacy": {"target_epsilon": 3.0}}
    return RunPlan.model_validate({**document, **({"backbone": backbone} if backbone else {})})


def card(target: Target = Target.HF, report: dict[str, Any] | None = None, **backbone: str) -> ModelCard:
    text = export_card(plan({**BACKBONE, **backbone}), target, Lineage(report=report), "print()\n")
    return ModelCard(text)


def test_hugging_face_reads_the_front_matter() -> None:
    found = card().data.to_dict()
    assert (found["base_model"], found["license"], found["library_name"]) == ("org/name", "apache-2.0", "transformers")
    assert {"federated-learning", "differential-privacy"} <= set(found["tags"])
    assert found["veil"]["labels"] == LABELS
    assert found["veil"]["datasets"] == "not stated by the coordinator"
    assert found["veil"]["plan_sha256"] == plan().sha256


@pytest.mark.parametrize(
    ("licence", "claimed"),
    [
        ("MIT", {"license": "mit"}),
        ("", {"license": "unknown"}),
        ("LicenseRef-Ours", {"license": "other", "license_name": "LicenseRef-Ours"}),
    ],
)
def test_a_licence_is_claimed_as_it_was_stated(licence: str, claimed: dict[str, str]) -> None:
    found = card(licence=licence).data.to_dict()
    assert {key: found[key] for key in found if key.startswith("license")} == claimed


def test_the_tuned_part_alone_has_no_licence_that_anybody_stated() -> None:
    found = card(Target.SAFETENSORS)
    assert found.data.to_dict()["license"] == "unknown"
    assert found.data.to_dict()["veil"]["base_model_licence"] == "Apache-2.0"
    assert "| licence of the tuned part | not stated by the coordinator |" in found.text


def test_a_source_that_is_not_on_the_hub_is_not_named_as_if_it_were() -> None:
    found = card(source="package:weights").data.to_dict()
    assert "base_model" not in found
    assert found["veil"]["base_model"] == "package:weights"


def test_no_name_breaks_out_of_its_cell() -> None:
    (line,) = [one for one in card().text.splitlines() if one.startswith("| answers")]
    assert line == '| answers | a\\|b, --- \\# \\<b\\>no\\</b\\>, ja: "ö" |'


def test_without_report_and_certificate_nothing_is_claimed() -> None:
    text = card().text
    assert "Not known here: no report.json" in text
    assert "asked for at most (3, 1e-05) for each record of a site. What was spent is not known" in text


def test_a_report_alone_gives_each_site_s_cost_and_says_that_it_is_not_signed() -> None:
    text = card(report=REPORT).text
    assert "| St. \\*Elsewhere\\* | 2.501 | 1e-05 |" in text
    assert "nobody signed" in text and "about 42 in all" in text
    assert "Not measured" in text and "NOT PRIVATE" not in text


def test_released_figures_stand_with_their_error() -> None:
    evaluation = {
        "on": "held-out units",
        "sites": 3,
        "accuracy": FIGURE,
        "classes": {"a|b": {"recall": {**FIGURE, "value": None, "reason": "too few"}}},
        "per_site": [{"name": "Ulm", "accuracy": FIGURE}],
    }
    text = card(report={**REPORT, "evaluation": evaluation}).text
    assert "| accuracy | 0.750 | 0.500 to 1.000 | 0.125 |" in text
    assert "| per site Ulm accuracy | 0.750 | 0.500 to 1.000 | 0.125 |" in text
    assert "| classes a\\|b recall | unknown | too few |  |" in text


def test_a_simulation_without_real_noise_says_so_first() -> None:
    metrics = {"federated": {"accuracy": 0.5, "loss": 1.0}, "non_private": {"accuracy": 0.75, "rmse": 2.0}}
    report = {**REPORT, "private": False, "simulation": {}, "metrics": metrics, "sites": [{**SITE, "epsilon": None}]}
    text = card(report=report).text
    assert text.index("SIMULATION") < text.index("NOT PRIVATE") < text.index("## Model")
    assert "| model | accuracy | loss | rmse |" in text
    assert "| non\\_private | 0.750 |  | 2.000 |" in text
    assert "unlimited" in text


class TestLineage:
    @pytest.fixture
    def model(self, tmp_path: Path) -> Path:
        (tmp_path / "model").mkdir()
        return tmp_path / "model"

    def test_a_report_of_another_plan_is_not_believed(self, model: Path) -> None:
        asked = plan()
        report = {"plan": {"simulation": {"features": ["b", "a"]}}, "plan_sha256": asked.sha256}
        file = model.parent / "report.json"
        file.write_text(json.dumps(report))
        assert Lineage.of(model, asked).features == ("b", "a")
        file.write_text(json.dumps({**report, "plan_sha256": "0" * 64}))
        assert Lineage.of(model, asked) == Lineage()

    @pytest.mark.parametrize("content", ["", "[]", "{}", '{"plan": 3}'])
    def test_what_is_no_report_is_none(self, model: Path, content: str) -> None:
        (model.parent / "report.json").write_text(content)
        (model.parent / "certificate.json").write_text(content)
        assert Lineage.of(model, plan()) == Lineage()
