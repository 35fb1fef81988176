# SPDX-License-Identifier: Apache-2.0
"""Which known mistakes an audit of some size would notice in some plan, and who notices the others.

Promises arithmetic and no attack: a mistake counts as seen when at least 98 of 100 audits are expected to reject it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

from scipy.stats import binom, norm

from veil.client.canaries import LONGEST, RECORDS, longest
from veil.common.moments import MOMENTS_NORM
from veil.common.plan import RunPlan
from veil.common.privacy import Mechanism, PrivacyUnit
from veil.common.privacy.auditing import Guesses, contradicts

UNLUCKY = 0.99
"""Each error count is taken that high, as one audit in a hundred sees it."""


class SeenBy(StrEnum):
    """What notices a mistake."""

    CANARIES = "canaries"
    CORRELATION = "correlation"
    DIRECT_TEST = "direct test"


@dataclass(frozen=True, kw_only=True, slots=True)
class Mistake:
    """A way in which published code breaks its promise.

    Attributes:
        name: in words.
        seen_by: what notices it; mistakes with a direct test are seen by no audit of this size.
    """

    name: str
    seen_by: SeenBy


REPEATED_NOISE = "the same noise in two rounds or two runs"
DIRECTLY_TESTED = (
    "the sum over a batch clipped instead of each unit",
    "float32 noise on a coarse grid",
    "a generator with few seeds",
    "fresh noise, uncharged, after a crash",
    "an empty sample left out",
    "noise or divisor from the exact number of units",
    "averaging weights that depend on records",
    "a record that is not a number",
    "a frozen layer in train mode",
)
"""Mistakes that leave a canary's trace as it is, and need a test of the code itself."""


def mistakes(
    plan: RunPlan, mechanisms: Sequence[Mechanism], *, gap: float, canaries: int, confidence: float
) -> tuple[Mistake, ...]:
    """Every known mistake that this plan leaves room for.

    Args:
        plan: the audited plan.
        mechanisms: what it claims.
        gap: what an included canary is expected to score, in standard deviations of the noise.
        canaries: of the audit, half of them included.
        confidence: of the audit's bound.
    """

    def seen(signal: float, noise: float) -> bool:
        half = canaries // 2
        alarms = binom.ppf(UNLUCKY, half, norm.sf(gap / 2 / noise))
        misses = binom.ppf(UNLUCKY, half, norm.sf((signal - 0.5) * gap / noise))
        guesses = Guesses(included=half, found=half - int(misses), excluded=half, alarms=int(alarms))
        return contradicts(mechanisms, guesses, delta=plan.privacy.target_delta, confidence=confidence)

    def judged() -> Iterator[Mistake]:
        for name, signal, noise in _effects(plan):
            yield Mistake(name=name, seen_by=SeenBy.CANARIES if seen(signal, noise) else SeenBy.DIRECT_TEST)
        yield Mistake(name=REPEATED_NOISE, seen_by=SeenBy.CORRELATION)
        for name in DIRECTLY_TESTED:
            yield Mistake(name=name, seen_by=SeenBy.DIRECT_TEST)

    return tuple(judged())


def _effects(plan: RunPlan) -> Iterator[tuple[str, float, float]]:
    """What a mistake multiplies a canary's part and the noise by."""
    training = plan.training
    bound = MOMENTS_NORM if training.algorithm == "one-shot" else plan.privacy.max_grad_norm
    yield "noise missing", 1.0, 1e-9
    yield "noise half of its size", 1.0, 0.5
    yield "accounted for half of the steps", 1.0, math.sqrt(0.5)
    if bound > 1:
        yield "clipping bound left out of the noise", 1.0, 1 / bound
    if bound < (furthest := LONGEST if training.algorithm == "one-shot" else longest(plan)):
        yield "no clipping", furthest / bound, 1.0
        yield "the mean over a batch clipped instead of each unit", furthest / bound, 1.0
    if plan.privacy.unit is PrivacyUnit.PATIENT and plan.privacy.max_records_per_patient > 1:
        records = min(RECORDS, plan.privacy.max_records_per_patient)
        yield "records clipped one by one where the unit is the patient", float(records), 1.0
    if training.sampling < 1:
        yield "accounted as sampled while every unit takes part in every step", 1 / training.sampling, 1.0
