# SPDX-License-Identifier: Apache-2.0
"""Tests of `veil site compare`: what it reads, what it says, what it stores, and that nothing is spent."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from veil.client.approvals import Approvals
from veil.client.ledger import entries_of
from veil.client.records import SiteRecords
from veil.client.site_file import SiteFile, read_site_file
from veil.common.head import HEAD_FILE, WEIGHT, initial_adapter
from veil.common.plan import RunPlan
from veil.common.update import Adapter
from veil.simulations.cli import run_command

MakePlan = Callable[..., RunPlan]
MakeHome = Callable[..., Path]
WIDTH = 6


@pytest.fixture
def file(make_home: MakeHome, make_plan: MakePlan) -> SiteFile:
    """A site that a run came to."""
    file = read_site_file(make_home() / "site.toml")
    Approvals(file.agent.runs).note("job", make_plan())
    return file


@pytest.fixture
def model(tmp_path: Path, make_plan: MakePlan) -> Path:
    """The folder of a model that always says the first class."""
    folder = tmp_path / "model"
    (folder / HEAD_FILE).parent.mkdir(parents=True)
    (folder / HEAD_FILE).write_bytes(initial_adapter(make_plan(), WIDTH).to_bytes())
    return folder


def run(capsys: pytest.CaptureFixture[str], file: SiteFile, *words: str | Path) -> tuple[int, str, str]:
    code = run_command(["site", "compare", "job", "--home", str(file.folder), *map(str, words)])
    out, err = capsys.readouterr()
    return code, out, err


def test_a_comparison_is_printed_with_errors_and_stores_and_spends_nothing(
    file: SiteFile, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(file.agent.state.rglob("*"))
    code, out, _ = run(capsys, file, "--model", model)
    assert code == 0
    assert "cross-validated on 40 units of this site" in out and "a model of this site alone" in out
    assert "kept here: a model of this site alone" in out and "no other is better by more than its error" in out
    assert out.count("±") >= 4 and "nothing of this left the site: ε = 0" in out
    assert set(file.agent.state.rglob("*")) - set(before) <= {file.agent.state / "units.key"}
    assert not file.agent.ledger.exists() or not entries_of(file.agent.ledger, file.name)


def test_the_kept_head_is_stored_for_the_owner_alone_and_replaced_by_a_later_choice(
    file: SiteFile, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):
        code, out, _ = run(capsys, file, "--model", model / HEAD_FILE, "--keep", "--json")
        assert code == 0
        found = json.loads(out)
    head = Path(found["file"])
    assert head.is_relative_to(file.agent.state) and head.stat().st_mode & 0o777 == 0o600
    assert sorted(path.suffix for path in head.parent.iterdir()) == [".json", ".safetensors"]
    assert Adapter.from_bytes(head.read_bytes()).tensors[WEIGHT].shape == (3, WIDTH + 1)
    noted = json.loads(head.with_suffix(".json").read_text(encoding="utf-8"))
    assert noted["epsilon"] == 0 and noted["job"] == "job" and noted["chosen"] in {"federated", "blend", "local"}
    assert {**noted, "file": str(head)} == found


def test_units_that_never_trained_are_judged_apart(
    file: SiteFile, model: Path, make_plan: MakePlan, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = RunPlan.model_validate({**json.loads(make_plan().to_json()), "evaluation": {"holdout": 0.4}})
    Approvals(file.agent.runs).note("judged", plan)
    code = run_command(["site", "compare", "judged", "--home", str(file.folder), "--model", str(model), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert code == 0 and set(found["held_out"]) == {"federated", "blend", "local"}
    units = SiteRecords(file, lambda *_: pytest.fail("no backbone is needed"))(plan)
    assert found["units"] == units.count < 40


@pytest.mark.parametrize("broken", ["missing", "torn", "of other width", "not finite"])
def test_what_is_no_head_of_this_run_is_refused(
    file: SiteFile, model: Path, make_plan: MakePlan, capsys: pytest.CaptureFixture[str], broken: str
) -> None:
    path = model / HEAD_FILE
    adapter = initial_adapter(make_plan(), WIDTH + (broken == "of other width"))
    adapter.tensors[WEIGHT][0, 0] = np.nan if broken == "not finite" else 0.0
    path.write_bytes(adapter.to_bytes()[: 20 if broken == "torn" else None])
    if broken == "missing":
        path.unlink()
    code, _, err = run(capsys, file, "--model", model)
    assert code == 2 and "Remedy: " in err
