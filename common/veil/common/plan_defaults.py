# SPDX-License-Identifier: Apache-2.0
"""What a plan need not say: defaults of one section that follow from another, filled in before anything is checked.

Promises that nothing which a plan names is changed, and that what is not a section is left for the checks to refuse.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast, get_args

from veil.common.plan_sections import STRUCTURED, Form, clipping_bound
from veil.common.privacy import PrivacyUnit

Document = dict[str, Any]


def with_defaults(document: Any) -> Any:
    """A raw plan with what its sections mean for one another."""
    if not isinstance(document, dict):
        return document
    for fill in (_tuned_below_the_head, _of_patients, _as_the_task_asks, _uncentred, _bounded_by_classes):
        document = fill(document)
    return document


def _tuned_below_the_head(document: Document) -> Document:
    """Where more than the head is tuned, no site chooses among heads, and heads are what it is compared with."""
    transfer, simulation, task = (document.get(name) for name in ("transfer", "simulation", "task"))
    if not (isinstance(transfer, dict) and isinstance(simulation, dict)) or transfer.get("mode", "head") == "head":
        return document
    heads = [] if isinstance(task, dict) and _form(task) in STRUCTURED else ["head_only"]
    usual = {"selector": False, "baselines": ["local_only", *heads]}
    return {**document, "simulation": {**usual, **simulation}}


def _of_patients(document: Document) -> Document:
    """Where a patient column is named and no unit is, the patient is the unit."""
    privacy, simulation = document.get("privacy"), document.get("simulation")
    if isinstance(privacy, dict) and isinstance(simulation, dict) and simulation.get("patient"):
        return {**document, "privacy": {"unit": PrivacyUnit.PATIENT.value, **privacy}}
    return document


def _as_the_task_asks(document: Document) -> Document:
    """A simulation's label column holds what the task asks for; sites choose among heads of classes only."""
    task, simulation = document.get("task"), document.get("simulation")
    if not (isinstance(task, dict) and isinstance(simulation, dict)) or _form(task) == "classification":
        return document
    return {**document, "simulation": {"form": _form(task), "selector": False, **simulation}}


def _uncentred(document: Document) -> Document:
    """Where an answer is more than a row of numbers, a record has no one feature to centre."""
    task, training = document.get("task"), document.get("training", {})
    if not (isinstance(task, dict) and isinstance(training, dict)) or _form(task) not in STRUCTURED:
        return document
    return {**document, "training": {"centre": False, **training}}


def _bounded_by_classes(document: Document) -> Document:
    """Where dp-fedsgd's bound is not named, it is half as long as the zero head's gradient."""
    privacy, task, training = (document.get(name, {}) for name in ("privacy", "task", "training"))
    if not (isinstance(privacy, dict) and isinstance(task, dict) and isinstance(training, dict)):
        return document
    labels, form = task.get("labels"), _form(task)
    if form in STRUCTURED:
        labels = labels or ("",)
    if training.get("algorithm", "dp-fedsgd") != "dp-fedsgd" or not isinstance(labels, list | tuple) or not labels:
        return document
    classes = max(2 if form in ("classification", "tokens") else 1, len(labels))
    return {**document, "privacy": {"max_grad_norm": clipping_bound(classes, form), **privacy}}


def _form(task: Mapping[str, Any]) -> Form:
    """What a raw [task] asks for; classification where it says nothing that is known."""
    named = str(task.get("kind")).partition("-")[2]
    return cast(Form, named) if named in get_args(Form) else "classification"
