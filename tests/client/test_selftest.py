# SPDX-License-Identifier: Apache-2.0
"""Tests of `veil.client.selftest`: it finds what it is for, noise that is not there and clipping that does not hold."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from veil.client import gradient, moment_sums, optimizer, release, selftest
from veil.client.head_batch import HeadBatch
from veil.client.selftest import examine_step
from veil.client.units import Units
from veil.common.errors import RunError
from veil.common.noise import NoiseSource, privatize

MakeUnits = Callable[..., Units]
Points = NDArray[np.int64]
Sum = NDArray[np.float64]

UNBOUND = 1e300


def missing(clipped_sum: Sum, *, noise: NoiseSource, **mechanism: Any) -> Points:
    class Silence:
        name, private = "none", False

        def gaussian(self, count: int) -> Sum:
            return np.zeros(count)

        uniform = gaussian

    return privatize(clipped_sum, noise=Silence(), **mechanism)


def halved(clipped_sum: Sum, *, noise_multiplier: float, max_grad_norm: float, noise: NoiseSource) -> Points:
    return privatize(clipped_sum, noise_multiplier=noise_multiplier / 2, max_grad_norm=max_grad_norm, noise=noise)


def doubled(clipped_sum: Sum, *, noise_multiplier: float, max_grad_norm: float, noise: NoiseSource) -> Points:
    return privatize(clipped_sum, noise_multiplier=noise_multiplier * 2, max_grad_norm=max_grad_norm, noise=noise)


def reused() -> Callable[..., Points]:
    """One vector of noise for all draws."""
    first: list[Points] = []

    def draw(clipped_sum: Sum, **how: Any) -> Points:
        if not first:
            first.append(privatize(np.zeros_like(clipped_sum), **how))
        clean = privatize(clipped_sum, **{**how, "noise_multiplier": 0.0})
        return clean + first[0]

    return draw


BROKEN_NOISE = {"missing": lambda: missing, "halved": lambda: halved, "doubled": lambda: doubled, "reused": reused}


@pytest.mark.parametrize("where", [optimizer, release], ids=["gradient", "centre"])
@pytest.mark.parametrize("broken", BROKEN_NOISE)
@pytest.mark.parametrize("width", [None, 1, 6])
def test_noise_that_is_not_its_size_is_found(
    where: Any, broken: str, width: int | None, make_units: MakeUnits, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On made-up records, and on a site's own, however few numbers a release of them has."""
    monkeypatch.setattr(where, "privatize", BROKEN_NOISE[broken]())
    with pytest.raises(RunError, match="noise of"):
        examine_step(None if width is None else make_units(20, width=width))


def head_unclipped(weight: Sum, batch: HeadBatch, bound: float) -> Sum:
    return gradient.clipped_head_sum(weight, batch, UNBOUND)


def head_clipped_per_batch(weight: Sum, batch: HeadBatch, bound: float) -> Sum:
    total = head_unclipped(weight, batch, bound)
    return total * min(1.0, bound / max(float(np.linalg.norm(total)), 1e-300))


def head_clipped_per_record(weight: Sum, batch: HeadBatch, bound: float) -> Sum:
    """A unit of several records counts several times."""
    records = len(batch.labels)
    alone = HeadBatch(
        inputs=batch.inputs,
        labels=batch.labels,
        unit=np.arange(records),
        count=records,
        share=batch.share,
        pairs=np.zeros((2, 0), np.int64),
        dots=np.zeros(0),
        squares=batch.squares,
        largest=batch.largest,
    )
    return gradient.clipped_head_sum(weight, alone, bound)


def mean_unclipped(rows: Sum, constant: float, bound: float) -> Sum:
    return gradient.clipped_mean_sum(rows, constant, UNBOUND)


def mean_clipped_per_batch(rows: Sum, constant: float, bound: float) -> Sum:
    total = mean_unclipped(rows, constant, bound)
    return total * min(1.0, bound / max(float(np.linalg.norm(total)), 1e-300))


def mean_clipped_before_the_constant(rows: Sum, constant: float, bound: float) -> Sum:
    total = gradient.clipped_mean_sum(rows, 0.0, bound)
    total[-1] = constant * len(rows)
    return total


def moment_unclipped(units: Units, classes: int, bound: float) -> Sum:
    return moment_sums.clipped_moment_sum(units, classes, UNBOUND)


def moment_of_the_sum_over_records(units: Units, classes: int, bound: float) -> Sum:
    """A unit of several records counts several times."""
    alone = replace(units, unit=np.arange(len(units.unit)), count=len(units.unit))
    return moment_sums.clipped_moment_sum(alone, classes, bound)


@pytest.mark.parametrize(
    "broken",
    [
        head_unclipped,
        head_clipped_per_batch,
        head_clipped_per_record,
        mean_unclipped,
        mean_clipped_per_batch,
        mean_clipped_before_the_constant,
        moment_unclipped,
        moment_of_the_sum_over_records,
    ],
    ids=lambda broken: broken.__name__,
)
def test_clipping_that_does_not_hold_is_found(broken: Callable[..., Sum], monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"clipped_{broken.__name__.split('_')[0]}_sum"
    monkeypatch.setattr(selftest, name, broken)
    with pytest.raises(RunError, match="one unit's"):
        examine_step()


def test_a_gradient_that_is_not_opacus_own_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sixteenth too short: neither its noise nor its bound shows it."""

    def shorter(weight: Sum, batch: HeadBatch, bound: float) -> Sum:
        return gradient.clipped_head_sum(weight, batch, bound) * (15 / 16)

    monkeypatch.setattr(selftest, "clipped_head_sum", shorter)
    with pytest.raises(RunError, match="Opacus"):
        examine_step()


def test_a_sum_that_is_not_that_of_its_parts_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bits of a unit that depend on who stands beside it, as in ordinary float32 products."""

    def rounded(weight: Sum, batch: HeadBatch, bound: float) -> Sum:
        found = gradient.clipped_head_sum(weight, batch, bound)
        return found * (1 - 2.0**-30) if batch.count and len(batch.labels) > 8 else found

    monkeypatch.setattr(selftest, "clipped_head_sum", rounded)
    with pytest.raises(RunError, match="last bit"):
        examine_step()


@pytest.mark.parametrize("width", [1, 6, 700])
@pytest.mark.parametrize("count", [0, 1, 30])
def test_a_sound_step_passes_on_any_records(width: int, count: int, make_units: MakeUnits) -> None:
    """Chance of a false alarm: 2·10⁻⁹ each."""
    lines = examine_step(make_units(count, most=4, width=width))
    assert any(f"{count} units" in line for line in lines)


def test_a_sound_step_passes_on_made_up_records() -> None:
    """Chance of a false alarm: 2·10⁻⁸ for the ten."""
    for _ in range(10):
        examine_step()
