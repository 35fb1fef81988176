# SPDX-License-Identifier: Apache-2.0
"""What sections of a plan may not say together, each refused with what contradicts and what to do instead.

Promises that what cannot run is refused while the plan is read, before anybody reads a record.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from veil.common.plan_sections import STRUCTURED
from veil.common.privacy import PrivacyUnit

if TYPE_CHECKING:
    from veil.common.plan import RunPlan


def check_plan(plan: RunPlan) -> None:
    """Look for contradictions between sections.

    Raises:
        ValueError: naming the first one.
    """
    for check in (_structured, _formed, _deep, _maskable, _consistent, _told_apart):
        check(plan)


def _structured(plan: RunPlan) -> None:
    """What cannot learn answers with a structure is refused here, before anybody reads a record."""
    if plan.task.form not in STRUCTURED:
        return
    simulation, generation = plan.simulation, plan.task.form == "generation"
    contradictions = {
        'transfer.mode = "gradual"; it begins with a new head alone, and there is none': (
            plan.transfer.mode == "gradual" and generation
        ),
        'transfer.mode = "head"; a head on one feature of a record does not learn it, tune more': (
            not plan.transfer.deep
        ),
        f"transfer.head_rounds = {plan.transfer.head_rounds}; a record has no one feature for a head": (
            plan.transfer.head_rounds > 0
        ),
        "training.centre = true; a record has no one feature to centre, leave it out": plan.training.centre,
        "no training.learning_rate; the public rule is of a new head, and there is none, name a rate": (
            generation and plan.training.learning_rate is None
        ),
        "simulation.baselines with head_only; a head alone does not learn it, leave it out": (
            simulation is not None and "head_only" in simulation.baselines
        ),
        "simulation.group; right and wrong by group are of classes, leave it out": (
            simulation is not None and simulation.group is not None
        ),
        'simulation.partition = "dirichlet"; records have no class by which to divide them': (
            simulation is not None and simulation.partition == "dirichlet"
        ),
    }
    _refuse(f'task.kind = "{plan.task.kind}"', contradictions)


def _formed(plan: RunPlan) -> None:
    """What cannot answer the task's form is refused here, before anybody reads a record."""
    if plan.simulation is not None and plan.simulation.form != plan.task.form:
        raise ValueError(
            f'task.kind = "{plan.task.kind}" with simulation.form = "{plan.simulation.form}"; they must agree'
        )
    if plan.task.form == "classification":
        return
    contradictions = {
        f'training.algorithm = "{plan.training.algorithm}"; its one message holds sums by class, use dp-fedsgd': (
            plan.training.algorithm == "one-shot"
        ),
        f"evaluation.groups = {list(plan.groups)}; right and wrong by group are of classification, leave them "
        "out": bool(plan.groups),
        "simulation.selector = true; sites compare heads of classes only, leave it out": (
            plan.simulation is not None and plan.simulation.selector
        ),
        "simulation.labels; the label column holds none, leave them out": (
            plan.simulation is not None
            and plan.task.form in ("regression", "answers", "generation")
            and bool(plan.simulation.labels)
        ),
    }
    _refuse(f'task.kind = "{plan.task.kind}"', contradictions)


def _deep(plan: RunPlan) -> None:
    """What more than a head cannot be tuned with is refused here, before anybody reads a record."""
    if not plan.transfer.deep:
        if plan.simulation is not None and "head_only" in plan.simulation.baselines:
            raise ValueError('simulation.baselines with head_only and transfer.mode = "head"; leave it out')
        return
    mode = plan.transfer.mode
    contradictions = {
        f'task.kind = "{plan.task.kind}"; numeric columns have no pretrained layers, use mode = "head"': (
            plan.task.modality == "tabular"
        ),
        f'task.kind = "{plan.task.kind}"; tokens before the record are for text': (
            mode == "prompt" and plan.task.modality != "text"
        ),
        f'training.algorithm = "{plan.training.algorithm}"; the mean of changes that sites made apart is not the '
        "change of the whole, use dp-fedsgd": plan.training.algorithm != "dp-fedsgd",
        "simulation.selector = true; a site compares heads only": (
            plan.simulation is not None and plan.simulation.selector
        ),
        f"transfer.head_rounds = {plan.transfer.head_rounds} of training.rounds = {plan.training.rounds}; leave "
        "rounds for what is below the head": plan.transfer.head_rounds >= plan.training.rounds,
    }
    _refuse(f'transfer.mode = "{mode}"', contradictions)


def _maskable(plan: RunPlan) -> None:
    """What cannot be said of a masked sum is refused, not left out in silence."""
    if plan.privacy.noise == "local":
        return
    contradictions = {
        f'training.algorithm = "{plan.training.algorithm}"; masked sums are of dp-fedsgd': (
            plan.training.algorithm == "dp-fedavg"
        ),
        f'cohort.aggregation = "{plan.cohort.aggregation}"; nobody sees single updates, so only sum is possible': (
            plan.cohort.aggregation != "sum"
        ),
        f"wire.update_bits = {plan.wire.update_bits}; masked numbers have a width of their own, leave it at 32": (
            plan.wire.update_bits != 32
        ),
        f"cohort.min_sites = {plan.cohort.min_sites}; a sum of one site hides nothing, ask at least 2": (
            plan.cohort.min_sites < 2
        ),
        f"cohort.colluding_sites = {plan.cohort.colluding_sites} of min_sites = {plan.cohort.min_sites}; somebody "
        "must be honest": (plan.cohort.colluding_sites or 0) >= plan.cohort.min_sites,
    }
    _refuse('privacy.noise = "distributed"', contradictions)


def _consistent(plan: RunPlan) -> None:
    """What a run needs whatever it learns."""
    one_shot = plan.training.algorithm == "one-shot"
    if one_shot and plan.cohort.sites_per_round is not None:
        raise ValueError(
            f'cohort.sites_per_round = {plan.cohort.sites_per_round} with training.algorithm = "one-shot"; its one '
            "message is asked of all sites, leave it out"
        )
    if not plan.training.centre and not one_shot and plan.cohort.nominal_units is None:
        raise ValueError(
            "training.centre = false without cohort.nominal_units; without the centring round's noisy count, "
            "say how many units a site has, as a public figure"
        )
    modality = plan.task.modality
    if (plan.backbone is None) != (modality == "tabular"):
        raise ValueError(
            f'task.kind = "{plan.task.kind}" {"with" if plan.backbone else "without"} [backbone]; '
            "text, images and sounds need one, numeric features have none"
        )


def _told_apart(plan: RunPlan) -> None:
    """Groups and a simulation's columns have to fit the task."""
    simulation = plan.simulation
    compared = plan.groups or (simulation is not None and simulation.group is not None)
    if compared and plan.task.form != "classification":
        raise ValueError(
            f'evaluation.groups or simulation.group with task.kind = "{plan.task.kind}"; groups are compared by '
            "right and wrong answers, which only classes have"
        )
    if simulation is not None and simulation.modality != plan.task.modality:
        raise ValueError(
            f'task.kind = "{plan.task.kind}" with {simulation.modality} input in [simulation]; they must agree'
        )
    if simulation is not None:
        for raw, label in simulation.labels.items():
            if label not in plan.task.labels:
                raise ValueError(
                    f'simulation.labels."{raw}" = "{label}" is not in task.labels = {list(plan.task.labels)}'
                )
        if plan.groups and simulation.group is None:
            raise ValueError("evaluation.groups without simulation.group; name the column with the group")
        if plan.privacy.unit is PrivacyUnit.PATIENT and simulation.patient is None:
            raise ValueError('privacy.unit = "patient" without simulation.patient; name the patient column')


def _refuse(where: str, contradictions: Mapping[str, bool]) -> None:
    for what, found in contradictions.items():
        if found:
            raise ValueError(f"{where} with {what}")
