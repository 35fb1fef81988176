# SPDX-License-Identifier: Apache-2.0
"""Attacks on the site's own release code, and what they prove about ε: lower bounds beside the plan's claim.

Promises that no record of the site is read, that a bound above the claim means a defect but for the stated chance, and
that an audit too weak to notice noise that is missing says so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from veil.client.audit_power import Mistake, mistakes
from veil.client.canaries import CANARIES, Play, play
from veil.common.errors import InputError
from veil.common.noise import NoiseSource, OSNoise
from veil.common.plan import RunPlan
from veil.common.privacy import PrivacySpent, spent
from veil.common.privacy.auditing import Guesses, RepeatedNoise, epsilon_bound, one_run_epsilon, repeated_noise
from veil.common.schedule import ReleaseKind, schedule

REPEATS = 8
"""Plays of an audit, each with canaries of its own."""

CONFIDENCE = 0.999
"""Of the bound that decides."""

REPORT_CONFIDENCE = 0.95
"""Of the bound that is only reported."""

FALSE_ALARM = 1e-6
"""Chance to call independent noise repeated."""

_GUESSED = 0.05
_COMPARED = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class OneRun:
    """A bound from the boldest guesses alone, at `REPORT_CONFIDENCE`.

    Attributes:
        guesses: canaries that were called in or out.
        correct: how many of the calls were right.
        epsilon: lower bound of ε.
    """

    guesses: int
    correct: int
    epsilon: float


@dataclass(frozen=True, kw_only=True, slots=True)
class AuditResult:
    """What the attacks came to.

    Attributes:
        plan: the plan that was audited.
        claimed: what its schedule is said to cost.
        confidence: of `epsilon`.
        repeats: plays, each with its own canaries.
        guesses: at the canaries, by the fixed threshold.
        epsilon: lower bound of ε from them; the release gate.
        one_run: the bound without any assumption on the mechanism; a report.
        repeated: the most alike pair of releases, by their noise.
        epsilon_without_noise: the bound when all noise is left out, to see whether this audit could notice.
        mistakes: which known ones this audit would notice, and what notices the others.
    """

    plan: RunPlan
    claimed: PrivacySpent
    confidence: float
    repeats: int
    guesses: Guesses
    epsilon: float
    one_run: OneRun
    repeated: RepeatedNoise
    epsilon_without_noise: float
    mistakes: tuple[Mistake, ...]

    @property
    def has_power(self) -> bool:
        """Whether noise left out altogether would have been noticed."""
        return self.epsilon_without_noise > self.claimed.epsilon

    @property
    def noise_repeats(self) -> bool:
        """Whether two releases share their noise."""
        return self.repeated.p_value < FALSE_ALARM

    @property
    def passed(self) -> bool:
        """Whether nothing contradicts the claim."""
        return self.epsilon <= self.claimed.epsilon and not self.noise_repeats

    def to_record(self) -> dict[str, Any]:
        """Plain values, for JSON.

        Keys: `plan`, `plan_sha256`, `algorithm`, `unit`, `delta`; `claimed_epsilon`; `passed`; `has_power` and
        `epsilon_without_noise` (the self-check); `records`, always "artificial"; `repeats`, `canaries`;
        `canary_bound` {`epsilon`, `confidence`, `included`, `found`, `excluded`, `alarms`}; `one_run_bound`
        {`epsilon`, `confidence`, `guesses`, `correct`}; `repeated_noise` {`found`, `correlation`, `p_value`,
        `false_alarm`}; `mistakes`, a list of {`mistake`, `seen_by`: "canaries", "correlation" or "direct test"}. Keys
        are only ever added.
        """
        return {
            "plan": self.plan.name,
            "plan_sha256": self.plan.sha256,
            "algorithm": self.plan.training.algorithm,
            "unit": self.plan.privacy.unit.value,
            "claimed_epsilon": self.claimed.finite_epsilon,
            "delta": self.claimed.delta,
            "passed": self.passed,
            "has_power": self.has_power,
            "epsilon_without_noise": self.epsilon_without_noise,
            "records": "artificial",
            "repeats": self.repeats,
            "canaries": self.guesses.included + self.guesses.excluded,
            "canary_bound": {
                "epsilon": self.epsilon,
                "confidence": self.confidence,
                "included": self.guesses.included,
                "found": self.guesses.found,
                "excluded": self.guesses.excluded,
                "alarms": self.guesses.alarms,
            },
            "one_run_bound": {
                "epsilon": self.one_run.epsilon,
                "confidence": REPORT_CONFIDENCE,
                "guesses": self.one_run.guesses,
                "correct": self.one_run.correct,
            },
            "repeated_noise": {
                "found": self.noise_repeats,
                "correlation": self.repeated.correlation,
                "p_value": self.repeated.p_value,
                "false_alarm": FALSE_ALARM,
            },
            "mistakes": [{"mistake": one.name, "seen_by": one.seen_by.value} for one in self.mistakes],
        }


class _Silence(OSNoise):
    """No noise, for the self-check on artificial records alone."""

    name = "none"
    private = False

    def gaussian(self, count: int) -> NDArray[np.float64]:
        """Zeros, [count]."""
        return np.zeros(count)


def audit_plan(
    plan: RunPlan,
    *,
    repeats: int = REPEATS,
    confidence: float = CONFIDENCE,
    noise: Callable[[], NoiseSource] = OSNoise,
    advance: Callable[[int], None] = lambda done: None,
) -> AuditResult:
    """Attack what a plan would release on artificial records, and compare with what it claims.

    Args:
        plan: the plan; neither its backbone nor any table is read.
        repeats: plays, each with `canaries.CANARIES` canaries; more make the bounds tighter.
        confidence: that the deciding bound is not above the truth, above 0 and below 1.
        noise: where a play's noise comes from; `OSNoise` at a site.
        advance: called with 1 after each of the 2 · `repeats` plays.

    Raises:
        PlanError: when no noise keeps the plan's promise.
        InputError: for a plan that tunes more than a head: what would be attacked is not what it releases.
        ValueError: for fewer than one play, or a confidence out of range.
    """
    if repeats < 1 or not 0 < confidence < 1:
        raise ValueError(f"repeats = {repeats}, confidence = {confidence}; expected 1 or more, and between 0 and 1")
    if plan.transfer.deep:
        raise InputError(
            f'an audit of transfer.mode = "{plan.transfer.mode}"',
            "a plan that tunes a head on one feature of a record, which an artificial record can be",
            'audit the same [privacy] and [training] with mode = "head" and classes; the mechanism is the same',
        )
    everything = schedule(plan)
    releases = [release for release in everything if release.kind is not ReleaseKind.EVALUATION]
    mechanisms = [release.mechanism for release in everything]
    delta = plan.privacy.target_delta
    claimed = spent(mechanisms, delta)

    def plays(source: Callable[[], NoiseSource]) -> list[Play]:
        played = []
        for _ in range(repeats):
            played.append(play(plan, releases, source()))
            advance(1)
        return played

    def bound(guesses: Guesses) -> float:
        return epsilon_bound(mechanisms, guesses, delta=delta, confidence=confidence)

    played = plays(noise)
    guesses = _guesses(played)
    return AuditResult(
        plan=plan,
        claimed=claimed,
        confidence=confidence,
        repeats=repeats,
        guesses=guesses,
        epsilon=bound(guesses),
        one_run=_one_run(played, delta),
        repeated=_repeated(played),
        epsilon_without_noise=bound(_guesses(plays(_Silence))),
        mistakes=mistakes(
            plan, mechanisms, gap=2 * played[0].threshold, canaries=repeats * CANARIES, confidence=confidence
        ),
    )


def _together(played: Sequence[Play]) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Scores and inclusion of all plays' canaries."""
    return np.concatenate([one.scores for one in played]), np.concatenate([one.included for one in played])


def _guesses(played: Sequence[Play]) -> Guesses:
    scores, included = _together(played)
    return Guesses.of(scores, included, played[0].threshold)


def _one_run(played: Sequence[Play], delta: float) -> OneRun:
    """Call the highest twentieth of all scores in and the lowest out; the plays together are one mechanism's run."""
    scores, included = _together(played)
    order, count = np.argsort(scores), round(_GUESSED * len(scores))
    correct = int(included[order[len(order) - count :]].sum() + (~included[order[:count]]).sum())
    epsilon = one_run_epsilon(
        canaries=len(scores), guesses=2 * count, correct=correct, delta=delta, confidence=REPORT_CONFIDENCE
    )
    return OneRun(guesses=2 * count, correct=correct, epsilon=epsilon)


def _repeated(played: Sequence[Play]) -> RepeatedNoise:
    """Compare the noise of the first releases of every play, at canaries that were left out."""
    each = max(1, _COMPARED // len(played))
    rows = [one.rows[:each] for one in played]
    left_out = [np.tile(~one.included, (len(some), 1)) for one, some in zip(played, rows, strict=True)]
    return repeated_noise(np.concatenate(rows), np.concatenate(left_out))
