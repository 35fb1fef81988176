# SPDX-License-Identifier: Apache-2.0
"""Tests of `veil.server.anomaly`: without noise numpy's covariance, with noise only what stands clear of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save

from veil.common.errors import InputError
from veil.common.head import CENTRE, WEIGHT, initial_adapter, unit_rows
from veil.common.moments import MOMENTS_NORM, Moments
from veil.common.plan import RunPlan
from veil.common.privacy import PrivacyBudget, gaussian_sigma
from veil.common.schedule import ReleaseKind
from veil.common.update import Adapter
from veil.server.anomaly import ANOMALY_FILE, AnomalyModel
from veil.server.descent import shrink
from veil.server.home import Home
from veil.server.jobs import Job
from veil.server.model import TunedModel
from veil.server.result import write_result
from veil.server.state import RoundRecord, RunState
from veil.server.statements import Evidence

Floats = NDArray[np.float64]
MakePlan = Callable[..., RunPlan]
WIDTH, CLASSES = 48, 2
SPREAD = np.array([4.0, 3.0, 2.5, 2.0, *[0.5] * (WIDTH - 4)])
"""Deviations of the features: four directions hold most of the variance."""
ODD = np.array([*[0.5] * (WIDTH - 4), 2.0, 2.5, 3.0, 4.0])
"""Those of other records, which are as long."""


def records(count: int, spread: Floats, seed: int) -> Floats:
    return np.random.default_rng(seed).normal(size=(count, len(spread))) * spread + 0.3


def moments_of(features: Floats, deviation: float = 0.0, seed: int = 0) -> Moments:
    random, rows = np.random.default_rng(seed), unit_rows(features)
    chosen = np.eye(CLASSES)[random.integers(CLASSES, size=len(rows))]
    vector = Moments(products=rows.T @ rows, sums=chosen.T @ rows, counts=chosen.sum(axis=0)).to_vector()
    noised = vector + deviation * random.normal(size=vector.size)
    return Moments.from_vector(noised, width=features.shape[1], classes=CLASSES)


def model_of(moments: Moments, deviation: float) -> AnomalyModel:
    """As the coordinator makes it."""
    count = float(moments.counts.sum())
    mean = shrink(moments.sums.sum(axis=0) / count, deviation * CLASSES**0.5 / count)
    return AnomalyModel.from_moments(moments, mean, count=count, deviation=deviation)


def deviation_at(epsilon: float, sites: int) -> float:
    budget = PrivacyBudget(target_epsilon=epsilon, target_delta=1e-5)
    return gaussian_sigma(budget) * MOMENTS_NORM * math.sqrt(sites)


def area(model: AnomalyModel, usual: Floats, other: Floats) -> float:
    """AUROC: how often a record of another distribution scores higher."""
    low, high = np.sort(model.scores(usual)), model.scores(other)
    return float(np.searchsorted(low, high).mean() / len(low))


@pytest.fixture
def small() -> AnomalyModel:
    return model_of(moments_of(records(5000, SPREAD, 0)), 0.0)


def test_without_noise_it_is_numpys_mean_and_covariance() -> None:
    features = records(200_000, np.array([1.0, 2.0, 3.0, 4.0]), 0)
    model, rows = model_of(moments_of(features), 0.0), unit_rows(features)
    np.testing.assert_allclose(model.mean, rows.mean(axis=0), rtol=1e-9)
    outside = np.eye(4) - model.directions.T @ model.directions
    covariance = model.directions.T * model.variances @ model.directions + model.residual * outside
    assert len(model.variances) == 3
    np.testing.assert_allclose(covariance, np.cov(rows.T), atol=1e-3 * np.cov(rows.T).max())
    moved = rows[:100] - rows.mean(axis=0)
    theirs = np.einsum("nd,de,ne->n", moved, np.linalg.inv(np.cov(rows.T)), moved) / 4
    np.testing.assert_allclose(model.scores(features[:100]), theirs, rtol=0.01)


def test_a_training_record_scores_1_on_average_without_noise(small: AnomalyModel) -> None:
    assert len(small.variances) == 5, "the four, and that of the mean, along which rows vary with their length"
    assert small.scores(records(5000, SPREAD, 0)).mean() == pytest.approx(1.0, abs=0.005)


@pytest.mark.statistical
@pytest.mark.parametrize("epsilon", [3.0, 8.0])
def test_under_noise_other_records_score_higher(epsilon: float) -> None:
    """Twenty seeds: four directions, AUROC at least 0.998, new records 0.97 to 1.06 on average."""
    deviation = deviation_at(epsilon, sites=4)
    model = model_of(moments_of(records(4000, SPREAD, 1), deviation, seed=2), deviation)
    usual, other = records(2000, SPREAD, 3), records(2000, ODD, 4)
    assert 3 <= len(model.variances) <= 5
    assert area(model, usual, other) > 0.98
    assert model.scores(usual).mean() == pytest.approx(1.0, abs=0.12)
    flat = AnomalyModel(mean=model.mean, directions=np.zeros((0, WIDTH)), variances=np.zeros(0), residual=1.0)
    assert area(flat, usual, other) < 0.6, "the distance from the mean alone does not tell them apart"


def found_in_noise(length: float, *, believed: float = 1.0) -> list[int]:
    """Directions of twenty draws of noised moments, of rows that are alike in every direction around a mean.

    Args:
        length: of the mean.
        believed: the noise's deviation that the model is told, in units of the true one.
    """
    deviation, count, mean = 100.0, 1e5, length * np.eye(WIDTH)[0]
    exact = Moments(
        products=count * (np.outer(mean, mean) + (1 - length**2) / WIDTH * np.eye(WIDTH)),
        sums=count / CLASSES * np.tile(mean, (CLASSES, 1)),
        counts=np.full(CLASSES, count / CLASSES),
    ).to_vector()
    found = []
    for seed in range(20):
        noised = exact + deviation * np.random.default_rng(seed).normal(size=exact.size)
        moments = Moments.from_vector(noised, width=WIDTH, classes=CLASSES)
        found.append(len(model_of(moments, believed * deviation).variances))
    return found


@pytest.mark.statistical
@pytest.mark.parametrize("length", [0.0, 0.5, 1.0])
def test_pure_noise_has_no_direction(length: float) -> None:
    """At most 7 of 1000 draws have a false one; three of twenty then have in 1 of 2500 runs."""
    assert sum(kept > 0 for kept in found_in_noise(length)) <= 2
    assert all(found_in_noise(length, believed=0.5)), "who is told half of the noise believes in some"


@pytest.mark.parametrize("width", [1, 2, 5])
def test_every_width_and_every_noise_gives_numbers(width: int) -> None:
    features = np.abs(records(40, np.ones(width), 0)) * np.eye(width)[0]
    for deviation in (0.0, 0.1, 10.0, 1e4):
        moments = moments_of(features, deviation)
        found = AnomalyModel.from_moments(moments, unit_rows(features).mean(axis=0), count=40.0, deviation=deviation)
        assert found.residual > 0 and (found.variances > 0).all() and len(found.variances) < width
        assert np.isfinite(found.scores(np.vstack([features, np.zeros(width)]))).all()


def test_another_width_is_refused(small: AnomalyModel) -> None:
    with pytest.raises(ValueError, match=f"expected rows of {WIDTH}"):
        small.scores(np.zeros((2, WIDTH + 1)))


@pytest.mark.parametrize("kept", [0, 5])
def test_it_comes_back_to_the_last_bit(kept: int, small: AnomalyModel) -> None:
    model = AnomalyModel(
        mean=small.mean, directions=small.directions[:kept], variances=small.variances[:kept], residual=small.residual
    )
    back, features = AnomalyModel.from_bytes(model.to_bytes()), records(5, SPREAD, 9)
    assert np.array_equal(back.scores(features), model.scores(features))


@pytest.mark.parametrize(
    "change",
    [
        {"residual": np.array([0.0])},
        {"variances": np.array([1.0])},
        {"variances": np.array([1.0, 1.0, 1.0, 1.0, -1.0])},
        {"mean": np.full(WIDTH, np.nan)},
        {"residual": np.zeros(2)},
    ],
)
def test_what_is_no_distribution_is_refused(change: dict[str, Floats], small: AnomalyModel) -> None:
    with pytest.raises(ValueError, match=r".+"):
        AnomalyModel.from_bytes(save({**small.tensors, **change}))


@pytest.mark.parametrize("data", [b"", b"text", save({"mean": np.zeros(3)})])
def test_bytes_that_are_none_are_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"safetensors|no tensor"):
        AnomalyModel.from_bytes(data)


def test_a_checkpoint_keeps_it_and_one_without_has_none(
    tmp_path: Path, make_plan: MakePlan, small: AnomalyModel
) -> None:
    plan = make_plan()
    state = RunState.start(plan, initial_adapter(plan, WIDTH), sites=2)
    state.save(tmp_path / "before")
    assert RunState.load(tmp_path / "before", plan).descent.anomaly is None
    state.descent.anomaly = small
    state.save(tmp_path / "after")
    back = RunState.load(tmp_path / "after", plan).descent.anomaly
    assert back is not None
    assert all(np.array_equal(one, small.tensors[name]) for name, one in back.tensors.items())


def test_a_models_folder_keeps_it_and_a_damaged_one_is_named(
    tmp_path: Path, make_plan: MakePlan, small: AnomalyModel
) -> None:
    plan = make_plan()
    zeros = {WEIGHT: np.zeros((len(plan.task.labels), WIDTH + 1), np.float32), CENTRE: np.zeros(WIDTH, np.float32)}
    made = TunedModel(plan=plan, adapter=Adapter(tensors=zeros), backbone=None, anomaly=small)
    made.save(tmp_path / "model")
    assert np.array_equal(TunedModel.load(tmp_path / "model").distribution().mean, small.mean)
    (tmp_path / "model" / ANOMALY_FILE).write_bytes(model_of(moments_of(records(9, np.ones(3), 0)), 0.0).to_bytes())
    with pytest.raises(InputError, match="a mean of 3 features"):
        TunedModel.load(tmp_path / "model")
    (tmp_path / "model" / ANOMALY_FILE).unlink()
    with pytest.raises(InputError, match=r'training\.algorithm = "one-shot"'):
        TunedModel.load(tmp_path / "model").distribution()


def test_the_result_of_a_deployed_run_has_it(home: Home, make_plan: MakePlan, small: AnomalyModel) -> None:
    plan = make_plan()
    state = RunState.start(plan, initial_adapter(plan, WIDTH), sites=2)
    state.descent.anomaly, job = small, Job.submit(home.runs, plan, ("Bonn", "Ulm"))
    told: dict[str, Any] = {"sites": ("Bonn", "Ulm"), "refusals": {}, "bytes_down": 1, "bytes_up": 1, "seconds": 0.5}
    state.cohort, state.records = ("Bonn", "Ulm"), [RoundRecord(round=1, kind=ReleaseKind.STATISTICS, **told)]
    write_result(plan, home, job, state, {"federation_s": 1.5}, Evidence())
    assert np.array_equal(TunedModel.load(job.folder / "result" / "model").distribution().mean, small.mean)
