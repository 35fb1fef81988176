# SPDX-License-Identifier: Apache-2.0
"""`veil audit` on the command line: what it prints, what it writes, and how it leaves."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from veil.common.noise import OSNoise
from veil.simulations import audit_command, membership

Veil = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def small_attack(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few heads, as their number is not what is tested here."""
    monkeypatch.setattr(audit_command, "HEADS", 4)
    monkeypatch.setattr(membership, "RECORDS", 60)


@pytest.fixture
def plan(write_plan: Callable[..., Path]) -> Path:
    return write_plan(training={"rounds": 2})


def test_a_person_reads_claim_bounds_and_that_records_are_made_up(veil: Veil, plan: Path) -> None:
    (plan.parent / "records.csv").unlink()
    code, out, err = veil("audit", plan, "--repeats", "2")
    assert code == 0, err
    first, claimed, *rest = out.splitlines()
    assert "small" in first and "all records here are made up, no site's record is read" in first
    assert claimed.endswith("ε = 8.00 at δ = 1e-05")
    for words in ("canaries (decides)       ε ≥ ", "confidence 99.9 %", "no assumptions (report)", "noticed", "AUC"):
        assert any(words in line for line in rest), words
    assert "noise missing" in next(line for line in rest if line.startswith("canaries would notice"))
    assert "float32 noise" in next(line for line in rest if line.startswith("not seen here"))
    assert rest[-1] == "passed: nothing contradicts the claim"


def test_the_document_is_printed_and_written(veil: Veil, plan: Path, tmp_path: Path) -> None:
    code, out, err = veil("audit", plan, "--repeats", "1", "--json", "--output", tmp_path / "audit.json")
    assert code == 0 and err == ""
    document = json.loads(out)
    assert json.loads((tmp_path / "audit.json").read_text(encoding="utf-8")) == document
    assert document["passed"] is True and document["repeats"] == 1 and document["plan"] == "small"
    assert document["canary_bound"]["epsilon"] <= document["claimed_epsilon"] <= 8.0
    assert document["membership"]["heads"] == 4


def test_a_contradicted_claim_leaves_with_4_and_the_document(
    veil: Veil, plan: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(OSNoise, "gaussian", lambda self, count: 1e-6 * self.uniform(count))
    code, out, err = veil("audit", plan, "--repeats", "2", "--json")
    assert code == 4
    document = json.loads(out)
    assert document["passed"] is False and document["canary_bound"]["epsilon"] > 8.0
    assert err.startswith("veil: a lower bound of ") and "Expected: at most the claimed 8.00" in err


def test_repeated_noise_leaves_with_4(veil: Veil, plan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OSNoise, "gaussian", lambda self, count: np.random.default_rng(1).standard_normal(count))
    code, out, err = veil("audit", plan, "--repeats", "1")
    assert code == 4
    assert "noise repeated           YES" in out and out.splitlines()[-1] == "NOT PASSED"
    assert "Expected: independent noise" in err


def test_an_audit_without_power_says_so(veil: Veil, write_plan: Callable[..., Path]) -> None:
    plan = write_plan(training={"rounds": 2}, privacy={"target_epsilon": 50.0})
    code, out, _ = veil("audit", plan, "--repeats", "1")
    assert code == 0
    assert "THIS AUDIT PROVES NOTHING" in out and out.splitlines()[-1].startswith("nothing shown")


def test_bad_words_leave_with_2(veil: Veil, plan: Path, tmp_path: Path) -> None:
    assert veil("audit", tmp_path / "absent.toml")[0] == 2
    assert veil("audit", plan, "--repeats", "0")[0] == 2
    code, _, err = veil("audit", plan, "--repeats", "1", "--output", tmp_path / "no" / "folder.json")
    assert code == 2 and "No such file" in err


def test_without_a_plan_the_demo_s_training_at_8_is_audited() -> None:
    plan = audit_command.default_plan()
    assert (plan.privacy.target_epsilon, plan.training.rounds, plan.backbone) == (8.0, 30, None)
