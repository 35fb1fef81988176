# SPDX-License-Identifier: Apache-2.0
"""`veil predict --anomaly`, end to end: a record unlike those of the run scores higher; other runs have no score."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from veil.common.head import initial_adapter
from veil.common.plan import RunPlan
from veil.server.anomaly import ANOMALY_FILE
from veil.server.model import TunedModel

Veil = Callable[..., tuple[int, str, str]]
COLUMNS = ("--column", "a", "--column", "b")


@pytest.fixture
def like() -> pd.DataFrame:
    """Records of three sites, all on one side: where b is large; the class is the sign of a."""
    random = np.random.default_rng(0)
    a = random.normal(size=900)
    side = np.where(a > 0, "ill", "well")
    return pd.DataFrame(
        {"a": a, "b": 3 + 0.3 * random.normal(size=900), "label": side, "site": np.repeat(["Bern", "Graz", "Ulm"], 300)}
    )


def test_what_is_unlike_the_training_records_scores_higher(
    veil: Veil, write_plan: Callable[..., Path], like: pd.DataFrame, tmp_path: Path
) -> None:
    plan = write_plan(like, training={"algorithm": "one-shot", "rounds": None}, simulation={"baselines": []})
    assert veil("simulate", plan, "--output", tmp_path / "run")[0] == 0
    model, new, answers = tmp_path / "run" / "model", tmp_path / "new.csv", tmp_path / "answers.csv"
    pd.DataFrame({"a": [1.0, -1.0, 0.0], "b": [3.0, 3.0, -3.0]}).to_csv(new, index=False)
    code, out, _ = veil("predict", model, new, *COLUMNS, "--anomaly", "--json", "--output", answers)
    assert code == 0
    usual, also, odd = (one["anomaly"] for one in json.loads(out))
    assert max(usual, also) < 3 < 10 < odd
    table = pd.read_csv(answers)
    assert list(table.columns) == ["input", "label", "anomaly", "probability of well", "probability of ill"]
    assert list(table["anomaly"]) == [usual, also, odd]
    code, out, _ = veil("predict", model, new, *COLUMNS, "--anomaly")
    said = [line.split("\t") for line in out.splitlines()]
    assert code == 0 and [line[2:] for line in said] == [
        [f"{usual:.2f}", "1"],
        [f"{also:.2f}", "2"],
        [f"{odd:.2f}", "3"],
    ]
    code, out, _ = veil("predict", model, new, *COLUMNS, "--json")
    assert code == 0 and all("anomaly" not in one for one in json.loads(out)), "only where it is asked for"


def test_a_run_without_moments_has_none_and_says_what_has(veil: Veil, tmp_path: Path) -> None:
    task = {"kind": "tabular-classification", "labels": ["a", "b"]}
    plan = RunPlan.model_validate({"name": "other", "task": task, "privacy": {"target_epsilon": 3.0}})
    TunedModel(plan=plan, adapter=initial_adapter(plan, 2), backbone=None).save(tmp_path / "model")
    assert not (tmp_path / "model" / ANOMALY_FILE).exists()
    pd.DataFrame({"a": [1.0], "b": [1.0]}).to_csv(tmp_path / "new.csv", index=False)
    code, _, err = veil("predict", tmp_path / "model", tmp_path / "new.csv", *COLUMNS, "--anomaly")
    assert code == 2 and 'algorithm = "dp-fedsgd"' in err and 'training.algorithm = "one-shot"' in err
