# SPDX-License-Identifier: Apache-2.0
"""Tests of a deployed site's door for several labels and for numbers: its columns, its words, its canaries."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from veil.client.approvals import Asked
from veil.client.canaries import CANARIES, canary_units, longest, play
from veil.client.kept_head import compare_heads
from veil.client.records import SiteRecords, check_columns, look
from veil.client.site_file import SiteFile, parse_site
from veil.client.units import Units
from veil.client.wording import describe_plan
from veil.common.errors import InputError, RefusalError
from veil.common.noise import OSNoise
from veil.common.plan import RunPlan
from veil.common.plan_sections import Form
from veil.common.schedule import schedule

TABLE = "x,labels,age\n0.1,a|b,30\n0.2,,95\n0.3,b,55\n"
LABELS = {"a": "pain", "b": "fever"}
TASKS: dict[Form, dict[str, Any]] = {
    "multilabel": {"kind": "tabular-multilabel", "labels": ["fever", "pain"]},
    "regression": {"kind": "tabular-regression", "labels": ["age"], "target": [20, 90]},
}
COLUMNS: dict[Form, dict[str, Any]] = {
    "multilabel": {"label": "labels", "form": "multilabel", "labels": LABELS},
    "regression": {"label": "age", "form": "regression"},
}
FORMS = list(TASKS)


def file_of(folder: Path, form: Form, **data: Any) -> SiteFile:
    (folder / "t.csv").write_text(TABLE, encoding="utf-8")
    document = {
        "name": "Ulm",
        "data": {"table": "t.csv", "features": ["x"], **COLUMNS[form], **data},
        "limits": {"epsilon_per_run": 8.0, "epsilon_lifetime": 8.0},
        "coordinator": {"url": "https://veil.example", "ca": "ca.pem"},
    }
    return parse_site(document, folder / "site.toml")


def plan_of(form: Form, algorithm: str = "dp-fedsgd") -> RunPlan:
    return RunPlan.model_validate(
        {
            "name": "forms",
            "task": TASKS[form],
            "training": {"rounds": 2, "algorithm": algorithm, "sample_rate": 1.0},
            "privacy": {"target_epsilon": 8.0},
            "evaluation": {},
        }
    )


def no_backbone(*_: Any) -> Any:
    raise AssertionError("numbers need no backbone")


@pytest.mark.parametrize("form", FORMS)
def test_the_table_s_truth_reaches_the_units(form: Form, tmp_path: Path) -> None:
    units = SiteRecords(file_of(tmp_path, form), no_backbone)(plan_of(form))
    assert isinstance(units, Units) and units.held is not None
    both = np.concatenate([units.labels, units.held.labels])
    expected = {"multilabel": [[0, 0], [1, 0], [1, 1]], "regression": [10 / 70, 0.5, 1.0]}
    assert sorted(both.tolist()) == expected[form]


def test_the_operator_sees_labels_and_numbers_before_any_run(tmp_path: Path) -> None:
    labels = look(file_of(tmp_path, "multilabel"))
    assert labels.labels == {"pain": 1, "fever": 2} and labels.numbers is None
    number = look(file_of(tmp_path, "regression"))
    assert number.labels == {} and number.numbers == (30.0, 95.0)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("other", ["classification", *FORMS])
def test_a_plan_of_another_form_is_refused_by_site_toml_alone(form: Form, other: Form, tmp_path: Path) -> None:
    classes = {"kind": "tabular-classification", "labels": ["fever", "pain"]}
    task = RunPlan.model_validate(
        {"name": "x", "task": TASKS.get(other, classes), "privacy": {"target_epsilon": 1.0}}
    ).task
    data = file_of(tmp_path, form).data
    if form == other:
        check_columns(data, task)
        return
    with pytest.raises(RefusalError, match=f"tabular-{form}"):
        check_columns(data, task)


def test_numbers_have_no_labels_and_labels_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the label column holds"):
        file_of(tmp_path, "regression", labels=LABELS)
    with pytest.raises(InputError, match=r"\[data.labels\] is missing"):
        file_of(tmp_path, "multilabel", labels={})


@pytest.mark.parametrize(
    ("form", "said"), [("multilabel", "into any of fever, pain"), ("regression", "cut to the range from 20 to 90")]
)
def test_the_operator_reads_what_is_asked(form: Form, said: str, tmp_path: Path) -> None:
    lines = "\n".join(describe_plan(plan_of(form), "job", file_of(tmp_path, form), ()))
    assert said in lines and "This cannot be done" not in lines
    assert {"multilabel": "(evaluation) of 8 numbers", "regression": "(evaluation) of 3 numbers"}[form] in lines


@pytest.mark.parametrize("form", FORMS)
def test_heads_of_other_forms_are_not_compared(form: Form, tmp_path: Path) -> None:
    plan = plan_of(form)
    asked = Asked(job="job", plan_sha256=plan.sha256, plan_json=plan.to_json(), first_seen="now")
    with pytest.raises(InputError, match=f"tabular-{form}"):
        compare_heads(file_of(tmp_path, form), asked, tmp_path)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("algorithm", ["dp-fedsgd", "dp-fedavg"])
def test_canaries_of_every_form_are_as_loud_as_is_allowed(form: Form, algorithm: str) -> None:
    """Without noise an included canary moves its own row by what is expected of it, and another one's not at all."""

    class Silence(OSNoise):
        def gaussian(self, count: int) -> np.ndarray[Any, np.dtype[np.float64]]:
            return np.zeros(count)

    plan = plan_of(form, algorithm)
    assert longest(plan) > plan.privacy.max_grad_norm
    releases = schedule(plan)[:-1]
    played = play(plan, releases, Silence())
    for row, gap in zip(played.rows[1:], played.gaps[1:], strict=True):
        assert np.median(row[played.included]) == pytest.approx(gap, rel=0.05)
        assert np.abs(row[~played.included]).max() < 0.05 * gap
    everyone = canary_units(plan, np.ones(CANARIES, dtype=np.bool_))
    assert not everyone.labels.any()
