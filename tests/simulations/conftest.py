# SPDX-License-Identifier: Apache-2.0
"""A small federation of numeric records that runs in a second: three sites, two classes, forty patients each."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from veil.simulations.cli import run_command

PLAN: dict[str, Any] = {
    "name": "small",
    "seed": 3,
    "task": {"kind": "tabular-classification", "labels": ["well", "ill"], "bounds": {"a": [-4, 4], "b": [-4, 4]}},
    "training": {"rounds": 5},
    "privacy": {"target_epsilon": 8.0, "target_delta": 1e-5},
    "simulation": {
        "path": "records.csv",
        "features": ["a", "b"],
        "label": "label",
        "site": "site",
        "partition": "site-column",
    },
}


def toml(document: dict[str, Any], prefix: str = "") -> str:
    """TOML of nested tables with JSON-like values."""
    plain = {key: value for key, value in document.items() if not isinstance(value, dict)}
    lines = [f"{key} = {json.dumps(value)}" for key, value in plain.items()]
    for key, value in document.items():
        if isinstance(value, dict):
            lines += [f"[{prefix}{key}]", toml(value, f"{prefix}{key}.")]
    return "\n".join(lines)


@pytest.fixture
def records() -> pd.DataFrame:
    """Three sites of forty patients; the class is the sign of a."""
    random = np.random.default_rng(0)
    a = random.normal(size=120)
    return pd.DataFrame(
        {
            "a": a,
            "b": random.normal(size=120),
            "label": np.where(a + 0.2 * random.normal(size=120) > 0, "ill", "well"),
            "site": np.repeat(["Bern", "Graz", "Ulm"], 40),
            "patient": [f"p{index}" for index in range(120)],
        }
    )


@pytest.fixture
def write_plan(tmp_path: Path, records: pd.DataFrame) -> Callable[..., Path]:
    """Write table and plan; keyword arguments change sections (None removes a key)."""

    def write(table: pd.DataFrame = records, **sections: dict[str, Any] | str) -> Path:
        table.to_csv(tmp_path / "records.csv", index=False)
        document = json.loads(json.dumps(PLAN))
        for section, change in sections.items():
            if isinstance(change, dict):
                merged = {**document.get(section, {}), **change}
                document[section] = {key: value for key, value in merged.items() if value is not None}
            else:
                document[section] = change
        path = tmp_path / "plan.toml"
        path.write_text(toml(document), encoding="utf-8")
        return path

    return write


@pytest.fixture
def veil(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run a command line in this process: exit code, stdout, stderr."""

    def run(*words: str | Path) -> tuple[int, str, str]:
        code = run_command([str(word) for word in words])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run
