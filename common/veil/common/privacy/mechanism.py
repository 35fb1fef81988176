# SPDX-License-Identifier: Apache-2.0
"""What was done to the records, as values: a Mechanism is data, and ε is always computed from it.

Promises that a Mechanism outside the range where the arithmetic is known to hold cannot be constructed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

MIN_NOISE_MULTIPLIER = 0.3
MAX_NOISE_MULTIPLIER = 1e6
MAX_STEPS = 1_000_000


class PrivacyUnit(StrEnum):
    """Whom the promise protects."""

    RECORD = "record"
    PATIENT = "patient"


class NeighboringRelation(StrEnum):
    """What "differs in one unit" means. Only add-or-remove is in use: nothing released depends on the exact n."""

    ADD_OR_REMOVE_ONE = "add-or-remove-one"


@dataclass(frozen=True, kw_only=True, slots=True)
class Mechanism:
    """A Gaussian mechanism run `steps` times on a Poisson sample of the units.

    Attributes:
        noise_multiplier: σ, standard deviation of the noise in units of `max_grad_norm`.
        max_grad_norm: L2 bound of what one unit adds to the released sum.
        sample_rate: chance of a unit to take part in a step; 1 means every unit, every step.
        steps: number of releases.
        unit: whom the promise protects.
        relation: what neighbouring data sets are.

    Raises:
        ValueError: outside 0.3 ≤ σ ≤ 10⁶, 0 < q ≤ 1, 1 ≤ steps ≤ 10⁶, 0 < C.
    """

    noise_multiplier: float
    max_grad_norm: float
    sample_rate: float = 1.0
    steps: int = 1
    unit: PrivacyUnit = PrivacyUnit.RECORD
    relation: NeighboringRelation = NeighboringRelation.ADD_OR_REMOVE_ONE

    def __post_init__(self) -> None:
        low, high = MIN_NOISE_MULTIPLIER, MAX_NOISE_MULTIPLIER
        if not low <= self.noise_multiplier <= high:
            raise ValueError(f"noise_multiplier = {self.noise_multiplier:g}; expected {low} to {high:g}")
        if not (math.isfinite(self.max_grad_norm) and self.max_grad_norm > 0):
            raise ValueError(f"max_grad_norm = {self.max_grad_norm}; expected above 0 and finite")
        if not 0 < self.sample_rate <= 1:
            raise ValueError(f"sample_rate = {self.sample_rate}; expected above 0 and at most 1")
        if not 1 <= self.steps <= MAX_STEPS:
            raise ValueError(f"steps = {self.steps}; expected 1 to {MAX_STEPS}")

    def to_record(self) -> dict[str, Any]:
        """Plain values for storage; floats in hexadecimal, so that not a bit is lost."""
        return {
            "noise_multiplier": self.noise_multiplier.hex(),
            "max_grad_norm": self.max_grad_norm.hex(),
            "sample_rate": self.sample_rate.hex(),
            "steps": self.steps,
            "unit": self.unit.value,
            "relation": self.relation.value,
        }

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> Mechanism:
        """The inverse of `to_record`."""
        return cls(
            noise_multiplier=float.fromhex(record["noise_multiplier"]),
            max_grad_norm=float.fromhex(record["max_grad_norm"]),
            sample_rate=float.fromhex(record["sample_rate"]),
            steps=int(record["steps"]),
            unit=PrivacyUnit(record["unit"]),
            relation=NeighboringRelation(record["relation"]),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class PrivacyBudget:
    """The promise: the most a run may cost one unit."""

    target_epsilon: float
    target_delta: float


@dataclass(frozen=True, kw_only=True, slots=True)
class PrivacySpent:
    """The fact: what mechanisms cost one unit at `delta`.

    Attributes:
        epsilon: the reported value, an upper bound by the rule that is valid here.
        delta: the δ it holds at.
        by_accountant: every accountant's own upper bound, by name: `gaussian`, `pld` and `rdp` for plans fixed
            beforehand, `rdp_filter` whatever the plans followed from; `pld_rejected` is one that was not believed.
    """

    epsilon: float
    delta: float
    by_accountant: dict[str, float]

    @property
    def finite_epsilon(self) -> float | None:
        """ε, or None where it is infinite: JSON has no word for that."""
        return self.epsilon if math.isfinite(self.epsilon) else None
