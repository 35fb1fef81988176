# SPDX-License-Identifier: Apache-2.0
"""Tests of `veil.common.plan` for what a task can ask: what each form needs, gets and refuses."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from veil.common.errors import PlanError
from veil.common.evaluation import EVALUATION_NORM
from veil.common.evaluation_forms import figures, vector_norm, vector_rows, vector_size
from veil.common.objective import OBJECTIVES, Targets
from veil.common.plan import RunPlan
from veil.common.plan_sections import Form, Task, clipping_bound
from veil.common.schedule import ReleaseKind, schedule

TASKS: dict[Form, dict[str, Any]] = {
    "classification": {"kind": "tabular-classification", "labels": ["well", "ill"]},
    "multilabel": {"kind": "tabular-multilabel", "labels": ["pain", "fever", "rash"]},
    "regression": {"kind": "tabular-regression", "labels": ["age"], "target": [20, 90]},
}


def document(form: Form, **sections: Any) -> dict[str, Any]:
    table = {"path": "t.csv", "features": ["x"], "label": "y", "sites": 3}
    plan: dict[str, Any] = {"name": "p", "task": TASKS[form], "privacy": {"target_epsilon": 3.0}, "simulation": table}
    return {**plan, **{name: {**plan.get(name, {}), **change} for name, change in sections.items()}}


def parsed(form: Form, **sections: Any) -> RunPlan:
    plan = RunPlan.model_validate(document(form, **sections))
    return RunPlan.from_json(plan.to_json())


@pytest.mark.parametrize("form", list(TASKS))
@pytest.mark.parametrize("modality", ["text", "image", "audio", "tabular"])
def test_a_kind_is_a_modality_and_a_form(modality: str, form: Form) -> None:
    task = Task.model_validate({**TASKS[form], "kind": f"{modality}-{form}"})
    assert (task.modality, task.form) == (modality, form)


@pytest.mark.parametrize("form", list(TASKS))
def test_the_simulation_s_column_holds_what_the_task_asks(form: Form) -> None:
    plan = parsed(form)
    assert plan.simulation is not None and plan.simulation.form == form
    assert plan.simulation.selector is (form == "classification")


@pytest.mark.parametrize("form", list(TASKS))
def test_the_bound_is_half_of_the_first_gradient(form: Form) -> None:
    """Of a record whose input has length 1, at a head of zero; of numbers, of those spread evenly over the range."""
    task = Task.model_validate(TASKS[form])
    rows, labels = 1000, len(task.labels)
    truths: dict[Form, Targets] = {
        "classification": np.arange(rows) % labels,
        "multilabel": (np.arange(rows * labels) % 3 == 0).reshape(rows, labels).astype(np.float64),
        "regression": np.linspace(0, 1, rows),
    }
    errors = OBJECTIVES[form].errors(np.zeros((rows, labels)), truths[form])
    first = float(np.linalg.norm(errors, axis=1).mean())
    assert clipping_bound(labels, form) == pytest.approx(first / 2, rel=1e-2)
    assert parsed(form).privacy.max_grad_norm == clipping_bound(labels, form)


@pytest.mark.parametrize(
    ("form", "task", "said"),
    [
        ("classification", {"labels": ["well"]}, "name at least two classes"),
        ("classification", {"target": [0, 1]}, "it is for regression"),
        ("multilabel", {"labels": []}, "without labels; name them"),
        ("multilabel", {"target": [0, 1]}, "it is for regression"),
        ("regression", {"labels": ["age", "height"]}, "name the one number"),
        ("regression", {"target": None}, "without target; name the public"),
        ("regression", {"target": [90, 20]}, "low must be below high"),
        ("regression", {"target": [20, 20]}, "low must be below high"),
        ("regression", {"kind": "tabular-ranking"}, "task.kind"),
    ],
)
def test_what_a_form_does_not_go_with_is_named(form: Form, task: dict[str, Any], said: str) -> None:
    with pytest.raises(PlanError, match=said):
        RunPlan.from_json(RunPlan.model_construct(**document(form, task=task)).model_dump_json(warnings=False))


@pytest.mark.parametrize("form", ["multilabel", "regression"])
@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"training": {"algorithm": "one-shot"}}, "sums by class, use dp-fedsgd"),
        ({"simulation": {"selector": True}}, "selector = true"),
        ({"simulation": {"form": "classification"}}, "they must agree"),
        (
            {"simulation": {"group": "g"}, "evaluation": {"groups": ["a", "b"]}},
            r"evaluation.groups = \['a', 'b'\]; right and wrong by group are of classification",
        ),
    ],
)
def test_what_cannot_answer_a_form_is_refused_at_once(form: Form, sections: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        RunPlan.model_validate(document(form, **sections))


def test_numbers_have_no_labels_to_map() -> None:
    with pytest.raises(ValueError, match=r"simulation\.labels; the label column holds"):
        RunPlan.model_validate(document("regression", simulation={"labels": {"1": "age"}}))


@pytest.mark.parametrize("form", list(TASKS))
def test_an_evaluation_is_charged_with_the_bound_of_its_vector(form: Form) -> None:
    plan = parsed(form, evaluation={"holdout": 0.2})
    release = schedule(plan)[-1]
    assert release.kind is ReleaseKind.EVALUATION
    labels = len(plan.task.labels)
    assert release.mechanism.max_grad_norm == vector_norm(form, labels)
    answers, truth = np.zeros((1, labels)), {"multilabel": np.ones((1, labels)), "regression": np.ones(1)}
    rows = vector_rows(answers, truth.get(form, np.array([1])))
    assert rows.shape == (1, vector_size(form, labels))
    assert np.linalg.norm(rows) == pytest.approx(vector_norm(form, labels))
    told = figures(rows[0] * 1000, 1.0, plan.task)
    assert told["count"]["value"] == pytest.approx(1000)


def test_one_label_is_judged_like_two_classes() -> None:
    assert math.isclose(vector_norm("multilabel", 1), EVALUATION_NORM)
