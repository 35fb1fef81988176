# SPDX-License-Identifier: Apache-2.0
"""`veil audit`: all attacks on one plan, as a document and as lines on a screen.

Promises that the claim stands beside every bound, and that made-up records are called so.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from veil.client.audit import REPORT_CONFIDENCE, AuditResult, audit_plan
from veil.client.audit_power import SeenBy
from veil.common.errors import InputError, RunError
from veil.common.plan import RunPlan
from veil.simulations.membership import HEADS, MembershipReport, attack_membership

_WORDS = {
    SeenBy.CANARIES: "canaries would notice",
    SeenBy.CORRELATION: "correlation would notice",
    SeenBy.DIRECT_TEST: "not seen here, only by direct tests of the code:",
}

Stage = Callable[[str, int], Callable[[int], None]]


def default_plan() -> RunPlan:
    """The demo's training at ε = 8, on numeric features."""
    return RunPlan.model_validate(
        {
            "name": "audit",
            "task": {"kind": "tabular-classification", "labels": ["no", "yes"]},
            "training": {"algorithm": "dp-fedsgd", "rounds": 30},
            "privacy": {"target_epsilon": 8.0, "target_delta": 1e-5},
        }
    )


def run_attacks(plan: RunPlan, *, repeats: int, stage: Stage) -> tuple[AuditResult, MembershipReport]:
    """Play all of them.

    Args:
        plan: the plan whose releases are attacked.
        repeats: plays of the canary audit.
        stage: opens a progress bar of a name and a length.
    """
    audited = audit_plan(plan, repeats=repeats, advance=stage("canaries", 2 * repeats))
    return audited, attack_membership(plan, heads=HEADS, advance=stage("membership", 2 * HEADS))


def document(audited: AuditResult, membership: MembershipReport) -> dict[str, Any]:
    """The JSON document: the keys of `AuditResult.to_record`, and `membership` with those of `MembershipReport`."""
    return {**audited.to_record(), "membership": membership.to_record()}


def write(output: Path, text: str) -> None:
    """Put the document into a file.

    Raises:
        InputError: when it cannot be written.
    """
    try:
        output.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise InputError(
            f"{output}: {error.strerror}", "a file that can be written", "choose another --output"
        ) from None


def lines(audited: AuditResult, membership: MembershipReport) -> list[str]:
    """What a person reads."""
    guesses, claim = audited.guesses, audited.claimed
    claimed = f"{claim.epsilon:.2f}" if math.isfinite(claim.epsilon) else "nothing"
    canaries = guesses.included + guesses.excluded
    private, open_ = membership.private, membership.without_noise
    return [
        f"{audited.plan.name}: {audited.plan.training.algorithm}, unit {audited.plan.privacy.unit.value}; "
        f"all records here are made up, no site's record is read",
        f"claimed                  ε = {claimed} at δ = {claim.delta:g}",
        f"canaries (decides)       ε ≥ {audited.epsilon:.2f}, confidence {100 * audited.confidence:g} %: "
        f"{guesses.found} of {guesses.included} found, {guesses.alarms} of {guesses.excluded} called wrongly",
        f"no assumptions (report)  ε ≥ {audited.one_run.epsilon:.2f}, confidence {100 * REPORT_CONFIDENCE:g} %: "
        f"{audited.one_run.correct} of {audited.one_run.guesses} guesses right, {canaries} canaries",
        f"membership (report)      AUC {private.auc:.3f}, {100 * private.found_at_one_percent:.1f} % found at 1 % "
        f"false alarms; without noise {open_.auc:.3f}, {100 * open_.found_at_one_percent:.1f} %",
        f"noise repeated           {'YES' if audited.noise_repeats else 'no'}: largest correlation of two releases "
        f"{audited.repeated.correlation:.2f}, p = {audited.repeated.p_value:.2g}",
        f"self-check               with all noise left out: ε ≥ {audited.epsilon_without_noise:.2f}, "
        f"{'noticed' if audited.has_power else 'NOT noticed, THIS AUDIT PROVES NOTHING'}",
        *(f"{words:<24} {_named(audited, seen_by)}" for seen_by, words in _WORDS.items()),
        _verdict(audited),
    ]


def _verdict(audited: AuditResult) -> str:
    if not audited.passed:
        return "NOT PASSED"
    if not audited.has_power:
        return "nothing shown: raise --repeats until missing noise would be noticed"
    return "passed: nothing contradicts the claim"


def _named(audited: AuditResult, seen_by: SeenBy) -> str:
    return ", ".join(one.name for one in audited.mistakes if one.seen_by is seen_by) or "none"


def check(audited: AuditResult) -> None:
    """Nothing, or the defect.

    Raises:
        RunError: when the bound passes the claim, or noise repeats.
    """
    remedy = "do not run this plan with this installation; report this defect"
    if audited.epsilon > audited.claimed.epsilon:
        found, claim = f"{audited.epsilon:.2f}", f"{audited.claimed.epsilon:.2f}"
        raise RunError(f"a lower bound of {found} for ε", f"at most the claimed {claim}", remedy)
    if audited.noise_repeats:
        found = f"{audited.repeated.correlation:.2f}"
        raise RunError(f"two releases with noise of correlation {found}", "independent noise", remedy)
