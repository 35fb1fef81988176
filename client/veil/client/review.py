# SPDX-License-Identifier: Apache-2.0
"""What a site checks before anything touches a record: the request against its own schedule, limits and ledger.

Promises that the answer depends on plan, policy and ledger alone, never on the records, so that a refusal tells
nothing about them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from veil.client.ledger import Entry, Ledger, total
from veil.client.policy import Limits
from veil.common.errors import RefusalCode, RefusalError
from veil.common.exchange import RoundRequest
from veil.common.head import CENTRE, WEIGHT
from veil.common.plan import RunPlan
from veil.common.plan_sections import Privacy
from veil.common.schedule import Release, schedule


def release_of(request: RoundRequest) -> Release:
    """The site's own idea of the requested round, computed from the plan.

    Raises:
        RefusalError: when the plan has no such round.
    """
    for release in schedule(request.plan):
        if release.round == request.round and release.kind == request.kind:
            return release
    raise RefusalError(
        RefusalCode.MALFORMED,
        f"round {request.round} ({request.kind})",
        "a round of the plan",
        "the coordinator must follow its own plan",
    )


def review_request(
    request: RoundRequest, limits: Limits, expected: Mapping[str, tuple[int, ...]] | None = None
) -> None:
    """Refuse a plan that protects otherwise than the site demands, and a request that cannot be answered.

    Args:
        request: the round.
        limits: the site's.
        expected: shapes of a tuned model's tensors; None for a head, as wide as it comes.

    Raises:
        RefusalError: naming the request's value and what the site expects.
    """
    review_plan(request.plan, limits)
    if not (math.isfinite(request.nominal_units) and request.nominal_units >= 1):
        raise RefusalError(
            RefusalCode.MALFORMED,
            f"nominal_units = {request.nominal_units}",
            "a finite number of at least 1",
            "the coordinator must send a public size",
        )
    shapes = {name: tensor.shape for name, tensor in request.adapter.tensors.items()}
    width = (shapes.get(CENTRE) or (0,))[0]
    wanted = expected or {CENTRE: (width,), WEIGHT: (len(request.plan.task.labels), width + 1)}
    if shapes != wanted:
        raise RefusalError(
            RefusalCode.MALFORMED,
            f"an adapter of {shapes}",
            f"{wanted}",
            "the coordinator must send the plan's adapter",
        )


def review_plan(plan: RunPlan, limits: Limits) -> None:
    """Refuse a plan that protects otherwise than the site demands, or brings weights under another licence.

    Raises:
        RefusalError: naming the plan's value and what the site expects.
    """
    _review_privacy(plan.privacy, limits)
    if plan.backbone is not None and limits.licences and plan.backbone.licence not in limits.licences:
        raise RefusalError(
            RefusalCode.POLICY,
            f'backbone.licence = "{plan.backbone.licence}"',
            f"one of limits.licences = {', '.join(limits.licences)}",
            "the coordinator can name the licence or choose other weights",
        )


def review_history(request: RoundRequest, ledger: Ledger) -> None:
    """Refuse when the coordinator saw a ledger line that this ledger does not hold: it is an old copy.

    Raises:
        RefusalError: with the code `ledger`.
    """
    if request.witness and not ledger.knows(request.witness):
        raise RefusalError(
            RefusalCode.LEDGER,
            f"the coordinator saw ledger line {request.witness}, which is not in this ledger",
            "a ledger with every line this site ever answered from",
            "restore the newest copy; without one, veil site ledger write-off --covers that line counts what is lost",
        )


def _review_privacy(privacy: Privacy, limits: Limits) -> None:
    """The unit must be the site's own: each of the two says nothing about the other at the same ε."""
    if privacy.unit is not limits.unit:
        raise RefusalError(
            RefusalCode.POLICY,
            f'privacy.unit = "{privacy.unit}"',
            f'unit = "{limits.unit}", as this site\'s limits say',
            "the coordinator can plan for that unit",
        )
    if privacy.target_delta > limits.delta:
        raise RefusalError(
            RefusalCode.POLICY,
            f"privacy.target_delta = {privacy.target_delta}",
            f"at most limits.delta = {limits.delta}",
            "the coordinator can lower target_delta",
        )
    if privacy.max_records_per_patient > limits.max_records_per_patient:
        raise RefusalError(
            RefusalCode.POLICY,
            f"privacy.max_records_per_patient = {privacy.max_records_per_patient}",
            f"at most limits.max_records_per_patient = {limits.max_records_per_patient}",
            "the coordinator can lower max_records_per_patient",
        )


def remaining(request: RoundRequest, release: Release) -> tuple[Release, ...]:
    """This release and all that the plan has after it."""
    return tuple(one for one in schedule(request.plan) if one.round >= release.round)


def affordable(
    plan: RunPlan, job: str, releases: Sequence[Release], limits: Limits, *, noise: str
) -> Callable[[Sequence[Entry]], None]:
    """The check for the ledger's transaction: everything so far plus all that is left of this plan.

    Args:
        plan: the run's plan.
        job: the run.
        releases: what is left of it.
        limits: the site's.
        noise: name of the noise source.

    Returns:
        a function of the ledger's lines that raises `RefusalError` when the job's plan is another one than before,
        when lines protect another unit, or when a limit would be passed.
    """
    digest = plan.sha256
    left = [Entry(job=job, round=r.round, mechanism=r.mechanism, noise=noise, plan=digest) for r in releases]

    def check(entries: Sequence[Entry]) -> None:
        _check_history(entries, job, digest, limits)
        projected = [*entries, *left]
        _check_limit(projected, "epsilon_per_run", limits.epsilon_per_run, limits.delta, job)
        _check_limit(projected, "epsilon_lifetime", limits.epsilon_lifetime, limits.delta, None)

    return check


def _check_history(entries: Sequence[Entry], job: str, plan: str, limits: Limits) -> None:
    if any(entry.job == job and entry.plan != plan for entry in entries):
        raise RefusalError(
            RefusalCode.PLAN_CHANGED,
            f"job {job} with another plan than in earlier rounds",
            "the plan that the job began with",
            "the coordinator can start a new job with the new plan",
        )
    if any(entry.mechanism.unit is not limits.unit for entry in entries):
        raise RefusalError(
            RefusalCode.POLICY,
            f'ledger lines of another unit than limits.unit = "{limits.unit}"',
            "one unit throughout a ledger, as costs of different units do not add up",
            "put limits.unit back to what it was",
        )


def _check_limit(entries: Sequence[Entry], name: str, limit: float, delta: float, job: str | None) -> None:
    epsilon = total(entries, delta, job).epsilon
    if epsilon > limit:
        raise RefusalError(
            RefusalCode.BUDGET,
            f"this run would reach epsilon {epsilon:.4g} in the ledger",
            f"at most limits.{name} = {limit:.4g}",
            "fewer rounds or a smaller target_epsilon in the plan, or a higher limit in the site's file",
        )
