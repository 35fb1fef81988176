# SPDX-License-Identifier: Apache-2.0
"""Tests of `veil.common.schedule`: all rounds of a run together keep its promise, whoever computes them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from veil.common.errors import PlanError
from veil.common.evaluation import EVALUATION_NORM
from veil.common.moments import MOMENTS_NORM
from veil.common.plan import RunPlan
from veil.common.plan_sections import Evaluation, clipping_bound
from veil.common.privacy import PrivacyUnit, gaussian_mu_squared, gaussian_sigma, spent
from veil.common.schedule import CENTRE_NORM, CENTRE_SHARE, ReleaseKind, local_steps, schedule


def plan(training: dict[str, Any] | None = None, **privacy: Any) -> RunPlan:
    return RunPlan.model_validate(
        {
            "name": "schedule",
            "task": {"kind": "tabular-classification", "labels": ["no", "yes"]},
            "training": training or {},
            "privacy": {"target_epsilon": 3.0, **privacy},
            "cohort": {"nominal_units": 100},
        }
    )


def epsilon(one: RunPlan) -> float:
    return spent([release.mechanism for release in schedule(one)], one.privacy.target_delta).epsilon


HALVES = {"algorithm": "dp-fedavg", "rounds": 1, "sample_rate": 0.5, "centre": False}
FEDAVG = {"algorithm": "dp-fedavg", "rounds": 20, "sample_rate": 0.1}


@pytest.mark.parametrize(
    ("training", "target"),
    [
        *[({"rounds": 1}, target) for target in (0.5, 3.0, 8.0)],
        *[({"rounds": 30}, target) for target in (0.5, 3.0, 8.0)],
        *[({"rounds": 30, "centre": False}, target) for target in (0.5, 3.0, 8.0)],
        *[(FEDAVG, target) for target in (0.5, 3.0, 8.0)],
        ({**FEDAVG, "local_epochs": 4, "centre": False, "sample_rate": 0.3}, 1.0),
        ({**FEDAVG, "sample_rate": 1.0}, 3.0),
        *[({"algorithm": "one-shot"}, target) for target in (0.5, 3.0, 8.0)],
    ],
)
def test_the_whole_run_keeps_the_promise(training: dict[str, Any], target: float) -> None:
    """At most the target, and at least 99.9 % of it: nothing is promised that is not used."""
    one = plan(training, target_epsilon=target)
    assert 0.999 * target <= epsilon(one) <= target


@pytest.mark.parametrize("noise", ["local", "distributed"])
def test_rounds_of_the_head_alone_are_full_batches_within_the_same_promise(noise: str) -> None:
    """With distributed noise, also if all rounds to spare fall on either kind."""
    document = json.loads(plan({"rounds": 9, "sample_rate": 0.2}, target_epsilon=3.0, noise=noise).to_json())
    document["task"] = {"kind": "text-classification", "labels": document["task"]["labels"]}
    document["backbone"] = {"source": "path:m", "sha256": "a" * 64}
    document["transfer"] = {"mode": "lora", "head_rounds": 4}
    document["simulation"] = None
    one = RunPlan.from_json(json.dumps(document))
    releases = schedule(one)
    assert [release.mechanism.sample_rate for release in releases] == [1.0] * 5 + [0.2] * 5
    spare = 2 if noise == "distributed" else 0
    done = [release.mechanism for release in releases]
    assert spent([*done, *[done[1]] * spare], 1e-5).epsilon <= 3.0
    assert spent([*done, *[done[-1]] * spare], 1e-5).epsilon <= 3.0
    assert spent([*done, *[done[1]] * spare, *[done[-1]] * spare], 1e-5).epsilon >= 0.999 * 3.0


def test_fedsgd_is_one_centring_round_and_then_full_batches() -> None:
    releases = schedule(plan({"rounds": 4}, unit="patient"))
    assert [(r.round, r.kind.value) for r in releases] == [
        (0, "centre"),
        (1, "gradient"),
        (2, "gradient"),
        (3, "gradient"),
        (4, "gradient"),
    ]
    assert {(r.mechanism.sample_rate, r.mechanism.steps, r.mechanism.unit) for r in releases} == {
        (1.0, 1, PrivacyUnit.PATIENT)
    }
    assert releases[0].mechanism.max_grad_norm == CENTRE_NORM
    assert {r.mechanism.max_grad_norm for r in releases[1:]} == {clipping_bound(2)} == {0.5 * 0.5**0.5}


@pytest.mark.parametrize("noise", ["local", "distributed"])
def test_one_shot_is_one_message_with_all_that_an_evaluation_leaves(noise: str) -> None:
    """Also with distributed noise: nothing is kept for another attempt."""
    one = plan({"algorithm": "one-shot"}, noise=noise)
    (alone,) = schedule(one)
    assert (alone.round, alone.kind.value, alone.mechanism.max_grad_norm) == (1, "statistics", MOMENTS_NORM)
    assert (alone.mechanism.steps, alone.mechanism.sample_rate) == (1, 1.0)
    first, last = schedule(one.model_copy(update={"evaluation": Evaluation(share=0.2)}))
    assert (first.round, last.round, last.kind) == (1, 2, ReleaseKind.EVALUATION)
    left = (alone.mechanism.noise_multiplier / first.mechanism.noise_multiplier) ** 2
    assert left == pytest.approx(0.8, rel=1e-3)


@pytest.mark.parametrize("training", [{"rounds": 7}, {"algorithm": "dp-fedavg", "rounds": 7}])
def test_without_centring_every_round_is_a_training_round(training: dict[str, Any]) -> None:
    releases = schedule(plan({**training, "centre": False}, target_epsilon=0.5))
    assert [r.round for r in releases] == list(range(1, 8))
    assert ReleaseKind.CENTRE not in {r.kind for r in releases}


def test_the_centring_round_has_its_share_of_mu_squared() -> None:
    mechanisms = [release.mechanism for release in schedule(plan({"rounds": 30}))]
    share = gaussian_mu_squared(mechanisms[:1]) / gaussian_mu_squared(mechanisms)
    assert share == pytest.approx(CENTRE_SHARE, rel=1e-4)


@pytest.mark.parametrize(
    ("epochs", "rate", "steps"), [(1, 0.1, 10), (3, 0.1, 30), (1, 0.3, 3), (2, 0.3, 7), (1, 1.0, 1), (1, 0.9, 1)]
)
def test_fedavg_steps_pass_over_the_records_local_epochs_times(epochs: int, rate: float, steps: int) -> None:
    training = {"algorithm": "dp-fedavg", "rounds": 2, "local_epochs": epochs, "sample_rate": rate}
    one = plan(training, target_epsilon=0.5)
    assert local_steps(one) == steps
    for release in schedule(one)[1:]:
        assert (release.kind, release.mechanism.steps, release.mechanism.sample_rate) == (
            ReleaseKind.DELTA,
            steps,
            rate,
        )


def test_more_rounds_need_more_noise_in_each() -> None:
    few, many = (schedule(plan({"rounds": rounds}))[-1].mechanism.noise_multiplier for rounds in (10, 40))
    assert many == pytest.approx(2 * few, rel=1e-4)


def judged(training: dict[str, Any], **evaluation: Any) -> RunPlan:
    return plan(training).model_copy(update={"evaluation": Evaluation(**evaluation)})


@pytest.mark.parametrize(
    ("training", "share"),
    [({"rounds": 30}, 0.05), ({"rounds": 1, "centre": False}, 0.5), (HALVES, 0.2)],
)
def test_an_evaluation_comes_last_and_is_paid_from_the_same_budget(training: dict[str, Any], share: float) -> None:
    one = judged(training, share=share)
    *before, last = schedule(one)
    assert (last.round, last.kind.value) == (before[-1].round + 1, "evaluation")
    assert (last.mechanism.steps, last.mechanism.sample_rate) == (1, 1.0)
    assert last.mechanism.max_grad_norm == EVALUATION_NORM
    assert last.mechanism.noise_multiplier == pytest.approx(gaussian_sigma(one.privacy.budget) / share**0.5)
    assert 0.999 * 3.0 <= epsilon(one) <= 3.0
    assert before[-1].mechanism.noise_multiplier > schedule(plan(training))[-1].mechanism.noise_multiplier


def test_without_an_evaluation_a_plan_is_what_it_was() -> None:
    """Its text, and so its hash in every ledger, does not know the section."""
    assert "evaluation" not in plan().to_json()
    assert ReleaseKind.EVALUATION not in {release.kind for release in schedule(plan())}


def test_sites_and_coordinator_agree_whatever_table_the_simulation_has() -> None:
    document = {
        "name": "x",
        "task": {"kind": "tabular-classification", "labels": ["no", "yes"]},
        "privacy": {"target_epsilon": 3.0},
        "simulation": {"path": "a.csv", "features": ["a"], "label": "l", "sites": 2},
    }
    full = RunPlan.model_validate(document)
    assert schedule(full) == schedule(RunPlan.from_json(full.public().to_json()))


@pytest.mark.parametrize(
    ("training", "privacy"),
    [
        ({"algorithm": "dp-fedavg", "rounds": 10_000, "sample_rate": 0.001}, {}),
        ({"algorithm": "dp-fedavg", "rounds": 200, "sample_rate": 1e-300}, {}),
        (
            {"algorithm": "dp-fedavg", "rounds": 100, "sample_rate": 0.01},
            {"target_epsilon": 1e-9, "target_delta": 1e-12},
        ),
    ],
)
def test_a_promise_no_noise_keeps_is_an_error_of_the_plan(training: dict[str, Any], privacy: dict[str, Any]) -> None:
    with pytest.raises(PlanError, match=r"target_epsilon = .* for \d+ rounds") as caught:
        schedule(plan(training, **privacy))
    assert "raise target_epsilon or lower training.rounds" in str(caught.value)
