# SPDX-License-Identifier: Apache-2.0
"""The membership attack works where nothing hides members, and fails where much noise does."""

from __future__ import annotations

import json

import pytest

from veil.common.plan import RunPlan
from veil.simulations.membership import RECORDS, attack_membership


@pytest.mark.statistical
def test_noise_takes_from_the_attack_what_it_finds_without() -> None:
    """ε = 0.1. False alarm: below 1e-6 (AUC over 4800 guesses, standard deviations near 0.01)."""
    plan = RunPlan.model_validate(
        {
            "name": "attacked",
            "task": {"kind": "tabular-classification", "labels": ["no", "yes"]},
            "training": {"rounds": 8},
            "privacy": {"target_epsilon": 0.1, "noise": "distributed"},
            "evaluation": {},
        }
    )
    done: list[int] = []
    report = attack_membership(plan, heads=12, advance=done.append)
    assert abs(report.private.auc - 0.5) < 0.06
    assert report.without_noise.auc > 0.57
    assert report.private.found_at_one_percent < 0.05
    assert len(done) == 2 * 12 and (report.heads, report.records) == (12, RECORDS)
    assert json.loads(json.dumps(report.to_record())) == report.to_record()
