# SPDX-License-Identifier: Apache-2.0
"""What `veil audit` is held against: the product as it is, and broken variants of it with what should notice them.

Variants that the suite of mistakes has are taken from there; the audit itself is the same in all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from tests.privacy import clipping, randomness
from tests.privacy.scene import Floats, replaced

from veil.client import audit as audit_module
from veil.client import release
from veil.client.audit import AuditResult, audit_plan
from veil.client.audit_power import SeenBy
from veil.client.gradient import clipped_head_sum
from veil.client.head_batch import HeadBatch
from veil.common import schedule as schedule_module
from veil.common.noise import NoiseSource, OSNoise
from veil.common.plan import RunPlan
from veil.common.privacy import Mechanism, PrivacySpent, calibrate, spent

FEDAVG = {"algorithm": "dp-fedavg", "rounds": 4, "sample_rate": 0.25}


@dataclass(frozen=True, kw_only=True)
class Variant:
    """The product, possibly with a mistake.

    Attributes:
        name: the mistake.
        seen_by: what must reject it; None for the product as it is.
        training: the plan's section.
        privacy: the plan's section, at ε = 8 unless said otherwise.
        broken: the product with the mistake, until the block ends.
        noise: where noise comes from.
    """

    name: str
    seen_by: SeenBy | None
    training: dict[str, Any] = field(default_factory=dict)
    privacy: dict[str, Any] = field(default_factory=dict)
    broken: Callable[[], AbstractContextManager[None]] = nullcontext
    noise: Callable[[], NoiseSource] = OSNoise

    def audit(self, repeats: int = 8) -> AuditResult:
        """One audit."""
        with self.broken():
            return audit_plan(plan(self.training, **self.privacy), repeats=repeats, noise=self.noise)


def plan(training: dict[str, Any] | None = None, **privacy: Any) -> RunPlan:
    """Two classes, four rounds after the centring one, ε = 8; keywords belong to `privacy`."""
    return RunPlan.model_validate(
        {
            "name": "audited",
            "task": {"kind": "tabular-classification", "labels": ["no", "yes"]},
            "training": {"rounds": 4, **(training or {})},
            "privacy": {"target_epsilon": 8.0, **privacy},
        }
    )


class Silent(OSNoise):
    """Nothing is added."""

    def gaussian(self, count: int) -> Floats:
        return 0.0 * super().gaussian(count)


class Halved(OSNoise):
    """Half the noise that is paid for."""

    def gaussian(self, count: int) -> Floats:
        return 0.5 * super().gaussian(count)


class Everyone(OSNoise):
    """Every unit takes part in every step, whatever the sample rate."""

    def uniform(self, count: int) -> Floats:
        return 0.0 * super().uniform(count)

    def gaussian(self, count: int) -> Floats:
        return OSNoise().gaussian(count)


class Repeated(OSNoise):
    """The same noise in every round."""

    def __init__(self) -> None:
        self._first: dict[int, Floats] = {}

    def gaussian(self, count: int) -> Floats:
        return self._first.setdefault(count, super().gaussian(count))


@contextmanager
def half_accounted() -> Iterator[None]:
    """Noise is calibrated, and the claim computed, for every other round."""

    def weaker(budget: Any, *, steps: int, **options: Any) -> Mechanism:
        return calibrate(budget, steps=math.ceil(steps / 2), **options)

    def cheaper(mechanisms: Sequence[Mechanism], delta: float) -> PrivacySpent:
        return spent([mechanisms[0], *mechanisms[1::2]], delta)

    schedule_module._schedule.cache_clear()
    with replaced((schedule_module, "calibrate", weaker), (audit_module, "spent", cheaper)):
        yield
    schedule_module._schedule.cache_clear()


def batch_mean_clipped() -> AbstractContextManager[None]:
    """The mean over the batch is clipped, with noise as if each unit were."""

    def variant(weight: Floats, of: HeadBatch, bound: float) -> Floats:
        mean = clipped_head_sum(weight, of, 1e9) / max(1, of.count)
        length = max(math.hypot(*mean.ravel()), 1e-300)
        return mean * of.count * min(1.0, bound / length)

    return replaced((release, "clipped_head_sum", variant))


CORRECT = (
    Variant(name="as it is", seen_by=None),
    Variant(name="as it is, patients", seen_by=None, privacy={"unit": "patient"}),
    Variant(name="as it is, dp-fedavg", seen_by=None, training=FEDAVG),
    Variant(name="as it is, ε = 1", seen_by=None, privacy={"target_epsilon": 1.0}),
)
BROKEN = (
    Variant(name="noise missing", seen_by=SeenBy.CANARIES, noise=Silent),
    Variant(name="noise half of its size", seen_by=SeenBy.CANARIES, noise=Halved),
    Variant(
        name="accounted for half of the steps", seen_by=SeenBy.CANARIES, training={"rounds": 2}, broken=half_accounted
    ),
    Variant(
        name="clipping bound left out of the noise (C = 1.4)",
        seen_by=SeenBy.CANARIES,
        training={"rounds": 2},
        privacy={"max_grad_norm": 1.4},
        broken=randomness.bound_left_out,
    ),
    Variant(name="no clipping", seen_by=SeenBy.CANARIES, broken=clipping.unclipped),
    Variant(name="the mean over a batch clipped", seen_by=SeenBy.CANARIES, broken=batch_mean_clipped),
    Variant(
        name="records clipped one by one where the unit is the patient",
        seen_by=SeenBy.CANARIES,
        training={"rounds": 2},
        privacy={"unit": "patient"},
        broken=clipping.records_clipped,
    ),
    Variant(
        name="accounted as sampled while every unit takes part in every step",
        seen_by=SeenBy.CANARIES,
        training=FEDAVG,
        noise=Everyone,
    ),
    Variant(name="the same noise in every round", seen_by=SeenBy.CORRELATION, noise=Repeated),
    Variant(name="the sum over a batch clipped", seen_by=SeenBy.DIRECT_TEST, broken=clipping.batch_clipped),
)


def rejected_by(result: AuditResult) -> SeenBy | None:
    """What contradicts the claim; canaries before correlation."""
    if result.epsilon > result.claimed.epsilon:
        return SeenBy.CANARIES
    return SeenBy.CORRELATION if result.noise_repeats else None
