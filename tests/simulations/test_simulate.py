# SPDX-License-Identifier: Apache-2.0
"""A finished run's folder: report, picture, model, ledger; and what a run without the system's noise says of itself."""

from __future__ import annotations

import json
import math
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import dp_accounting
import numpy as np
import pandas as pd
import pytest
from dp_accounting import pld
from PIL import Image
from safetensors.numpy import load_file

from veil.client.ledger import entries_of, total
from veil.common.evaluation import EVALUATION_NORM

Veil = Callable[..., tuple[int, str, str]]


def report_of(veil: Veil, plan: Path, output: Path, *words: str) -> dict[str, Any]:
    code, _, err = veil("simulate", plan, "--output", output, *words)
    assert code == 0, err
    document: dict[str, Any] = json.loads((output / "report.json").read_text(encoding="utf-8"))
    return document


def test_the_report_has_every_key_of_the_contract(veil: Veil, write_plan: Callable[..., Path], tmp_path: Path) -> None:
    report = report_of(veil, write_plan(), tmp_path / "out")
    keys = {"name", "created", "veil_version", "plan", "backbone", "sites", "metrics", "per_site", "timing", "bytes"}
    assert keys <= set(report)
    for site in report["sites"]:
        assert {"name", "records", "units", "epsilon", "delta", "rounds", "refusals"} <= set(site)
    assert set(report["metrics"]) == {"federated", "local_only", "centralized_dp", "non_private"}
    for scores in report["metrics"].values():
        assert set(scores) == {"accuracy", "macro_f1", "loss"}
    assert [site["name"] for site in report["per_site"]] == ["Bern", "Graz", "Ulm"]
    assert {"name", "federated", "local_only"} <= set(report["per_site"][0])
    assert report["bytes"]["per_round_per_site"] > 0
    assert [site["name"] for site in report["mismatch"]["per_site"]] == ["Bern", "Graz", "Ulm"]
    assert {site["verdict"] for site in report["mismatch"]["per_site"]} <= {"alike", "apart", "unknown"}


def test_the_folder_is_complete_and_the_picture_can_be_seen(
    veil: Veil, write_plan: Callable[..., Path], tmp_path: Path
) -> None:
    report_of(veil, write_plan(), tmp_path / "out")
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    pages = ["model-card.html", "picture.png", "report.json", "statement.html"]
    assert names == ["certificate.json", "ledger.sqlite", "model", *pages]
    with Image.open(tmp_path / "out" / "picture.png") as picture:
        assert picture.width > 1000 and len(set(picture.convert("L").resize((64, 64)).tobytes())) > 20


@pytest.mark.parametrize(
    "training",
    [{"rounds": 5}, pytest.param({"algorithm": "dp-fedavg", "rounds": 4, "sample_rate": 0.25}, marks=pytest.mark.long)],
)
def test_epsilon_of_the_report_covers_the_ledger_recomputed_independently(
    veil: Veil, write_plan: Callable[..., Path], tmp_path: Path, training: dict[str, Any]
) -> None:
    report = report_of(veil, write_plan(training=training), tmp_path / "out")
    with closing(sqlite3.connect(tmp_path / "out" / "ledger.sqlite")) as ledger:
        rows = [(name, json.loads(body)) for name, body in ledger.execute("SELECT site, body FROM line")]
    spends = [(name, fields) for name, fields in rows if fields["kind"] == "spend"]
    for site in report["sites"]:
        accountant = pld.PLDAccountant()
        mechanisms = [fields["mechanism"] for name, fields in spends if name == site["name"]]
        assert len(mechanisms) == site["rounds"] == training["rounds"] + 1
        for one in mechanisms:
            event: dp_accounting.DpEvent = dp_accounting.GaussianDpEvent(float.fromhex(one["noise_multiplier"]))
            rate = float.fromhex(one["sample_rate"])
            event = event if rate == 1 else dp_accounting.PoissonSampledDpEvent(rate, event)
            accountant.compose(event, one["steps"])
        recomputed = accountant.get_epsilon(1e-5)
        assert recomputed - 1e-9 <= site["epsilon"] <= 8.0
        assert site["epsilon"] >= 0.98 * 8.0
    assert {fields["noise"] for _, fields in spends} == {"os"}


def test_the_ledger_of_the_folder_can_be_read(veil: Veil, write_plan: Callable[..., Path], tmp_path: Path) -> None:
    report = report_of(veil, write_plan(), tmp_path / "out")
    entries = entries_of(tmp_path / "out" / "ledger.sqlite", "Graz")
    assert total(entries, 1e-5).epsilon == report["sites"][1]["epsilon"]


@pytest.mark.parametrize("noise", ["none", "fixed"])
def test_a_run_without_the_systems_noise_says_so_everywhere(
    veil: Veil, write_plan: Callable[..., Path], tmp_path: Path, noise: str
) -> None:
    plan = write_plan(simulation={"noise": noise})
    code, out, _ = veil("simulate", plan, "--output", tmp_path / "out")
    report = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    assert code == 0 and "NOT PRIVATE" in out and "not private" in out
    assert report["private"] is False and report["statement"].startswith("NOT PRIVATE")
    assert all(site["epsilon"] is None for site in report["sites"])


def test_noise_none_and_loose_clipping_recovers_plain_training(
    veil: Veil, write_plan: Callable[..., Path], tmp_path: Path
) -> None:
    plan = write_plan(
        simulation={"noise": "none", "baselines": ["non_private"]},
        training={"rounds": 300, "learning_rate": 16.0},
        privacy={"max_grad_norm": 10.0},
    )
    metrics = report_of(veil, plan, tmp_path / "out")["metrics"]
    assert abs(metrics["federated"]["accuracy"] - metrics["non_private"]["accuracy"]) <= 0.05


def test_two_private_runs_of_one_plan_differ(veil: Veil, write_plan: Callable[..., Path], tmp_path: Path) -> None:
    plan = write_plan(simulation={"baselines": []})
    report_of(veil, plan, tmp_path / "one")
    report_of(veil, plan, tmp_path / "two")
    one, two = (load_file(tmp_path / run / "model" / "head" / "head.safetensors") for run in ("one", "two"))
    assert not np.array_equal(one["head.weight"], two["head.weight"])


def test_fixed_noise_gives_the_same_adapter_and_another_seed_another_one(
    veil: Veil, write_plan: Callable[..., Path], tmp_path: Path
) -> None:
    plan = write_plan(simulation={"noise": "fixed", "baselines": []})
    heads = []
    for name, words in (("one", ()), ("two", ()), ("three", ("--seed", "4"))):
        report_of(veil, plan, tmp_path / name, *words)
        heads.append((tmp_path / name / "model" / "head" / "head.safetensors").read_bytes())
    assert heads[0] == heads[1] != heads[2]


def test_a_patient_is_one_unit(
    veil: Veil, write_plan: Callable[..., Path], records: pd.DataFrame, tmp_path: Path
) -> None:
    records["patient"] = [f"p{index // 3}" for index in range(len(records))]
    plan = write_plan(records, privacy={"unit": "patient"}, simulation={"patient": "patient"})
    report = report_of(veil, plan, tmp_path / "out")
    for site in report["sites"]:
        assert site["units"] < site["records"]
    assert "one patient of that site" in report["statement"]


def test_an_evaluation_is_released_charged_and_told_with_its_errors(
    veil: Veil, write_plan: Callable[..., Path], tmp_path: Path
) -> None:
    random = np.random.default_rng(1)
    table = pd.DataFrame({"a": random.normal(size=2400), "b": random.normal(size=2400)})
    table["label"] = np.where(table["a"] > 0, "ill", "well")
    table["site"] = np.repeat(["Bern", "Graz", "Ulm"], 800)
    plan = write_plan(table, evaluation={"holdout": 0.4, "share": 0.2}, simulation={"baselines": []})
    code, out, _ = veil("simulate", plan, "--output", tmp_path / "out")
    report = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    told, exact = report["evaluation"], report["metrics"]["federated"]
    assert code == 0 and report["rounds"][-1]["kind"] == "evaluation"
    assert all(7.99 < site["epsilon"] <= 8.0 and site["rounds"] == 7 for site in report["sites"])
    entries = entries_of(tmp_path / "out" / "ledger.sqlite", "Graz")
    assert entries[-1].mechanism.max_grad_norm == EVALUATION_NORM
    held = 0.4 * sum(site["records"] for site in report["sites"])
    error = 6 * math.hypot(told["count"]["standard_error"], math.sqrt(held * 0.6))
    assert abs(told["count"]["value"] - held) < error < held / 4
    assert abs(told["accuracy"]["value"] - exact["accuracy"]) < 6 * told["accuracy"]["standard_error"] < 0.5
    assert abs(told["loss"]["value"] - exact["loss"]) < 6 * told["loss"]["standard_error"]
    assert [one["name"] for one in told["per_site"]] == ["Bern", "Graz", "Ulm"]
    accuracy = " ({:.1f} to {:.1f} %)".format(100 * told["accuracy"]["low"], 100 * told["accuracy"]["high"])
    assert "as the sites released it" in out and accuracy in out


def test_an_evaluation_of_too_few_says_so(veil: Veil, write_plan: Callable[..., Path], tmp_path: Path) -> None:
    plan = write_plan(
        evaluation={"share": 0.001}, simulation={"baselines": [], "noise": "fixed"}, privacy={"target_epsilon": 1.0}
    )
    code, out, _ = veil("simulate", plan, "--output", tmp_path / "out")
    report = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    assert code == 0 and report["evaluation"]["accuracy"]["value"] is None
    assert "accuracy not known: the noise outweighs what was counted" in out


def test_json_on_stdout_is_the_report(veil: Veil, write_plan: Callable[..., Path], tmp_path: Path) -> None:
    code, out, _ = veil("simulate", write_plan(), "--output", tmp_path / "out", "--json")
    assert code == 0
    assert json.loads(out)["name"] == "small"


def test_a_dirichlet_partition_runs(veil: Veil, write_plan: Callable[..., Path], tmp_path: Path) -> None:
    division = {"partition": "dirichlet", "site": None, "sites": 3, "alpha": 1.0, "allow_single_class_sites": True}
    assert len(report_of(veil, write_plan(simulation=division), tmp_path / "out")["sites"]) == 3


@pytest.mark.parametrize(("epsilon", "said"), [(1e-3, True), (8.0, False)])
def test_a_budget_that_leaves_nothing_to_learn_is_said(
    veil: Veil, write_plan: Callable[..., Path], epsilon: float, said: bool
) -> None:
    plan = write_plan(privacy={"target_epsilon": epsilon})
    code, out, _ = veil("simulate", plan, "--output", plan.parent / "out")
    assert code == 0
    assert ("no better than guessing" in " ".join(out.split())) == said
