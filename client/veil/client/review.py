# SPDX-License-Identifier: Apache-2.0
"""What a site checks before anything touches a record: the request against its own schedule, limits and ledger.

Promises that the answer depends on plan, policy and ledger alone, never on the records, so that a refusal tells
nothing about them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from veil.client.ledger import Entry, total
from veil.client.policy import Limits
from veil.common.errors import RefusalCode, RefusalError
from veil.common.exchange import RoundRequest
from veil.common.privacy import PrivacyUnit
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


def review_plan(request: RoundRequest, limits: Limits) -> None:
    """Refuse a plan that protects less than the site demands.

    Raises:
        RefusalError: naming the plan's value and the site's limit.
    """
    privacy = request.plan.privacy
    if limits.unit is PrivacyUnit.PATIENT and privacy.unit is not PrivacyUnit.PATIENT:
        raise RefusalError(
            RefusalCode.POLICY,
            f'privacy.unit = "{privacy.unit}"',
            'unit = "patient", as this site\'s limits say',
            "the coordinator can plan for the patient unit, or the operator can lower limits.unit",
        )
    if privacy.target_delta > limits.delta:
        raise RefusalError(
            RefusalCode.POLICY,
            f"privacy.target_delta = {privacy.target_delta}",
            f"at most limits.delta = {limits.delta}",
            "the coordinator can lower target_delta",
        )
    if not (math.isfinite(request.nominal_units) and request.nominal_units >= 1):
        raise RefusalError(
            RefusalCode.MALFORMED,
            f"nominal_units = {request.nominal_units}",
            "a finite number of at least 1",
            "the coordinator must send a public size",
        )


def affordable(
    request: RoundRequest, release: Release, limits: Limits, *, noise: str
) -> Callable[[Sequence[Entry]], None]:
    """The budget check for the ledger's transaction: everything so far plus all that is left of this plan.

    Returns:
        a function of the ledger's lines that raises `RefusalError` when a limit would be passed.
    """
    remaining = [
        Entry(job=request.job, round=r.round, mechanism=r.mechanism, noise=noise)
        for r in schedule(request.plan)
        if r.round >= release.round
    ]

    def check(entries: Sequence[Entry]) -> None:
        projected = [*entries, *remaining]
        for name, limit, job in (
            ("epsilon_per_run", limits.epsilon_per_run, request.job),
            ("epsilon_lifetime", limits.epsilon_lifetime, None),
        ):
            epsilon = total(projected, limits.delta, job).epsilon
            if epsilon > limit:
                raise RefusalError(
                    RefusalCode.BUDGET,
                    f"this run would reach epsilon {epsilon:.4g} in the ledger",
                    f"at most limits.{name} = {limit:.4g}",
                    "fewer rounds or a smaller target_epsilon in the plan, or a higher limit in the site's file",
                )

    return check
