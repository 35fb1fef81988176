# SPDX-License-Identifier: Apache-2.0
"""How the noised sums of gradients become steps: rate and momentum by a rule of public numbers alone.

Promises that nothing is tuned on anybody's records: `benchmarks/RULE.md` has how the constants were chosen, on which
sets, and where the rule fails.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from veil.common.objective import OBJECTIVES
from veil.common.plan_sections import STRUCTURED, Form

LOGIT_NOISE = 1.0
"""ν: standard deviation of the noise that each weight has at the end, so about that of a record's logits."""

RATE_PER_CLASS = 16.0
"""Largest rate, per class: the head's curvature falls in inverse proportion to the classes. Halved for bounds of 2 and
above, where nothing is clipped."""

RATES: Mapping[Form, float] = {"classification": RATE_PER_CLASS, "multilabel": 8.0, "regression": 1.0}
"""Largest rate times the largest curvature of a record's loss, 1 / classes or of a sigmoid 1/4. Of a number it is that
at which no step is too far, whatever the features are: a class is known however far its score goes, a number is not."""

NUMBER_NOISE = 0.25
"""ν of regression, for the same reason: it moves an answer by at most a sixteenth of the public range."""

MOST_MOMENTUM = 0.9


@dataclass(frozen=True, kw_only=True, slots=True)
class Steps:
    """How sums become steps, the same in all training rounds.

    Attributes:
        rate: by which a sum over units, divided by their number, is multiplied.
        momentum: β of Nesterov's update v ← β v + g, w ← w - rate (g + β v); post-processing, so it costs no ε.
    """

    rate: float
    momentum: float = 0.0


def public_steps(
    *,
    units: float,
    classes: int,
    bound: float,
    sigma: float,
    noises: float,
    rounds: int,
    form: Form = "classification",
) -> Steps:
    """As far as brings each weight's noise to ν, with just as much momentum as that takes.

    Args:
        units: public or released number of units in a round's sum.
        classes: c.
        bound: C, the clipping bound.
        sigma: σ₁, of the one release that would spend the whole budget, in units of C.
        noises: variance of a round's noise on the sum, in units of the mechanism's: k of k sites with local noise,
            k / (k - m) where all but m share it, 1 for one site.
        rounds: T.
        form: of the task.
    """
    cap = largest_rate(form, classes, bound)
    noise = NUMBER_NOISE if form == "regression" else LOGIT_NOISE
    way = noise * units / (bound * sigma * math.sqrt(noises))
    momentum = min(MOST_MOMENTUM, max(0.0, 1 - cap * rounds / way))
    gains = momentum_gains(rounds, momentum)
    return Steps(rate=min(cap, way / math.sqrt(rounds * float(gains @ gains))), momentum=momentum)


def largest_rate(form: Form, classes: int, bound: float) -> float:
    """In inverse proportion to the curvature; half of it where the bound is above the longest gradient by √2."""
    alike: Form = "classification" if form in STRUCTURED else form  # of each word, of start and end, of each object
    objective = OBJECTIVES[alike]
    tight = objective.longest(classes) / (math.sqrt(2.0) * bound)
    return RATES[alike] / objective.curvature(classes) * min(1.0, max(0.5, tight))


def momentum_gains(rounds: int, momentum: float) -> NDArray[np.float64]:
    """How often each round's sum is in the last weights, in rates, first round first: [rounds]."""
    left = np.arange(rounds, 0, -1)
    return np.asarray((1 - momentum ** (left + 1.0)) / (1 - momentum), dtype=np.float64)
