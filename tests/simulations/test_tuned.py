# SPDX-License-Identifier: Apache-2.0
"""Simulations that tune more than a head: three sites, two rounds, a tiny BERT; whole, repeatable, on every engine."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from tests.tiny_models import LENGTH

from veil.client.ledger import entries_of, total
from veil.common.head import CENTRE, WEIGHT, predict
from veil.common.plan import parse_plan
from veil.common.plan_sections import Backbone
from veil.common.trained import is_tuned
from veil.common.update import Adapter
from veil.server.model import TunedModel
from veil.simulations.baselines import Pool
from veil.simulations.simulate import prepare
from veil.simulations.tuned_model import forget

Veil = Callable[..., tuple[int, str, str]]
Write = Callable[..., Path]
ILL, WELL = (
    ["mild cough", "severe rash and fever", "a fever of two", "cough since day two"],
    ["well", "no pain", "no rash"],
)


@pytest.fixture
def reports() -> pd.DataFrame:
    """Twelve texts at each of three sites, ill and well in turn."""
    rows = [
        {"body": (ILL, WELL)[index % 2][index % 3] + " the" * (index % 5), "ill": ("ill", "well")[index % 2]}
        for index in range(36)
    ]
    return pd.DataFrame(rows).assign(site=np.repeat(["Bern", "Graz", "Ulm"], 12))


@pytest.fixture
def write(write_plan: Write, reports: pd.DataFrame, tiny: Callable[[str], Backbone]) -> Write:
    """Two rounds at ε = 8 that tune a tiny BERT; keywords change sections."""
    backbone = tiny("bert")

    def made(**sections: Any) -> Path:
        table: dict[str, Any] = {"features": None, "text": "body", "label": "ill", "baselines": []}
        return write_plan(
            reports,
            backbone={"source": backbone.source, "sha256": backbone.sha256},
            task={"kind": "text-classification", "max_length": LENGTH, "bounds": None},
            transfer={"mode": "lora", "rank": 2, **sections.pop("transfer", {})},
            training={"rounds": 2, "centre": False, **sections.pop("training", {})},
            cohort={"nominal_units": 9, **sections.pop("cohort", {})},
            simulation={**table, **sections.pop("simulation", {})},
            **sections,
        )

    return made


def adapter_of(folder: Path) -> Adapter:
    return Adapter.from_bytes((folder / "model" / "head" / "head.safetensors").read_bytes())


def test_a_private_run_is_whole_and_its_folder_predicts(veil: Veil, write: Write, tmp_path: Path) -> None:
    plan = write(simulation={"baselines": ["head_only"]}, training={"centre": True})
    code, out, err = veil("simulate", plan, "--output", tmp_path / "out", "--json")
    assert code == 0, err
    report = json.loads(out)
    assert report["plan"]["transfer"]["mode"] == "lora"
    assert set(report["metrics"]) == {"federated", "head_only"}
    assert all(0 <= scores["accuracy"] <= 1 and scores["loss"] > 0 for scores in report["metrics"].values())
    for site in report["sites"]:
        assert (site["rounds"], site["refusals"]) == (3, {})
        assert 7.9 < site["epsilon"] <= 8.0
        entries = entries_of(tmp_path / "out" / "ledger.sqlite", site["name"])
        assert total(entries, 1e-5).epsilon == site["epsilon"]
    adapter = adapter_of(tmp_path / "out")
    assert {name.split(".lora_")[1][0] for name in adapter.tensors if is_tuned(name)} == {"A", "B"}
    assert all(np.isfinite(one).all() and one.any() for one in adapter.tensors.values())
    (tmp_path / "new.csv").write_text("body\nmild cough\nwell\n", encoding="utf-8")
    code, out, err = veil("predict", tmp_path / "out" / "model", tmp_path / "new.csv", "--column", "body", "--json")
    assert code == 0, err
    said = [{label: row["probabilities"][label] for label in ("well", "ill")} for row in json.loads(out)]
    answers = TunedModel.load(tmp_path / "out" / "model").predict(["mild cough", "well"])
    assert np.allclose([[row["well"], row["ill"]] for row in said], answers, atol=1e-4)


def test_engines_give_the_same_adapter_to_the_bit(veil: Veil, write: Write, tmp_path: Path) -> None:
    """With the noise fixed, whatever this process did before."""
    plan = write(simulation={"noise": "fixed"})
    for engine in ("inprocess", "processes"):
        code, _, err = veil("simulate", plan, "--output", tmp_path / engine, "--engine", engine)
        assert code == 0, err
    one, two = (adapter_of(tmp_path / engine).to_bytes() for engine in ("inprocess", "processes"))
    assert one == two


class Silent:
    """Tells nobody how far a simulation is."""

    def stage(self, name: str, total: int) -> Callable[[int], None]:
        return lambda done: None


class TestPool:
    """What a simulation's model says, whoever used it before."""

    @pytest.fixture
    def pool(self, write: Write, tmp_path: Path) -> Pool:
        forget()
        plan = parse_plan(write(simulation={"noise": "none"}))
        assert plan.simulation is not None
        return prepare(plan, plan.simulation, tmp_path, Silent())[0]

    def test_every_run_starts_from_the_same(self, pool: Pool) -> None:
        """A baseline must not start from what the federation learnt."""
        start = pool.initial()
        assert start is not None
        random = np.random.default_rng(1)
        moved = Adapter(
            tensors={
                name: one + random.normal(size=one.shape).astype(np.float32) for name, one in start.tensors.items()
            }
        )
        first = pool.answers(start, pool.test)
        assert not np.allclose(pool.answers(moved, pool.test), first)
        again = pool.initial()
        assert again is not None and again.to_bytes() == start.to_bytes()
        assert not again.tensors[WEIGHT].any() and not again.tensors[CENTRE].any()
        assert all(one.any() != (".lora_B." in name) for name, one in again.tensors.items() if is_tuned(name))
        assert np.array_equal(pool.answers(again, pool.test), first)

    def test_a_head_alone_says_what_frozen_features_say(self, pool: Pool) -> None:
        start = pool.initial()
        assert start is not None
        weight = np.random.default_rng(1).normal(size=start.tensors[WEIGHT].shape).astype(np.float32)
        adapter = Adapter(tensors={**start.tensors, WEIGHT: weight})
        assert np.allclose(pool.answers(adapter, pool.test), predict(adapter, pool.features[pool.test]), atol=1e-5)


def test_a_mode_that_does_not_fit_leaves_no_folder(veil: Veil, write: Write, tmp_path: Path) -> None:
    plan = write(transfer={"layers": 4})
    code, _, err = veil("simulate", plan, "--output", tmp_path / "out")
    assert code == 2
    assert "transfer.layers = 4" in err and "3 blocks" in err
    assert not (tmp_path / "out").exists()
