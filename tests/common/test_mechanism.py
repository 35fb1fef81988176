# SPDX-License-Identifier: Apache-2.0
"""Tests of `veil.common.privacy.mechanism`: none outside the proven range, and a stored one is exact."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from veil.common.noise import LATTICE_BITS
from veil.common.privacy import Mechanism, NeighboringRelation, PrivacyUnit
from veil.common.privacy.mechanism import MAX_NOISE_MULTIPLIER


def mechanism(**change: Any) -> Mechanism:
    return Mechanism(**{"noise_multiplier": 1.0, "max_grad_norm": 0.5, **change})


@pytest.mark.parametrize("sigma", [0.0, -1.0, 0.29999, 1.000001e6, 1e16, math.inf, -math.inf, math.nan])
def test_noise_multiplier_out_of_range_is_refused(sigma: float) -> None:
    with pytest.raises(ValueError, match=r"noise_multiplier = .*expected 0\.3 to 1e\+06"):
        mechanism(noise_multiplier=sigma)


@pytest.mark.parametrize("norm", [0.0, -0.5, math.inf, math.nan])
def test_max_grad_norm_out_of_range_is_refused(norm: float) -> None:
    with pytest.raises(ValueError, match=r"max_grad_norm = .*expected above 0 and finite"):
        mechanism(max_grad_norm=norm)


@pytest.mark.parametrize("rate", [0.0, -0.1, 1.0000001, math.inf, math.nan])
def test_sample_rate_out_of_range_is_refused(rate: float) -> None:
    with pytest.raises(ValueError, match=r"sample_rate = .*expected above 0 and at most 1"):
        mechanism(sample_rate=rate)


@pytest.mark.parametrize("steps", [0, -1, 1_000_001])
def test_steps_out_of_range_are_refused(steps: int) -> None:
    with pytest.raises(ValueError, match=r"steps = .*expected 1 to 1000000"):
        mechanism(steps=steps)


@pytest.mark.parametrize(
    "edge",
    [{"noise_multiplier": 0.3}, {"noise_multiplier": 1e6}, {"sample_rate": 1.0}, {"steps": 1}, {"steps": 1_000_000}],
)
def test_the_edges_of_the_range_belong_to_it(edge: dict[str, Any]) -> None:
    (name, value) = next(iter(edge.items()))
    assert getattr(mechanism(**edge), name) == value


def test_the_largest_noise_stays_inside_the_lattice() -> None:
    """13.2 σ of noise (its furthest) must stay far inside int64: beyond, a cast would make it one constant."""
    assert 13.3 * MAX_NOISE_MULTIPLIER * 2**LATTICE_BITS < 2**53


def test_a_mechanism_is_a_value() -> None:
    assert mechanism() == mechanism()
    with pytest.raises(dataclasses.FrozenInstanceError):
        mechanism().steps = 2  # type: ignore[misc]


@given(
    sigma=st.floats(0.3, 1e6),
    norm=st.floats(1e-6, 1e6),
    rate=st.floats(1e-9, 1.0),
    steps=st.integers(1, 1_000_000),
    unit=st.sampled_from(PrivacyUnit),
)
def test_a_record_gives_back_every_bit(sigma: float, norm: float, rate: float, steps: int, unit: PrivacyUnit) -> None:
    one = Mechanism(noise_multiplier=sigma, max_grad_norm=norm, sample_rate=rate, steps=steps, unit=unit)
    assert Mechanism.from_record(json.loads(json.dumps(one.to_record()))) == one


def test_the_stored_form_does_not_drift() -> None:
    """A ledger written today must be readable for years: these words and hexadecimal floats are the format."""
    assert mechanism(sample_rate=0.1, steps=7, unit=PrivacyUnit.PATIENT).to_record() == {
        "noise_multiplier": "0x1.0000000000000p+0",
        "max_grad_norm": "0x1.0000000000000p-1",
        "sample_rate": "0x1.999999999999ap-4",
        "steps": 7,
        "unit": "patient",
        "relation": "add-or-remove-one",
    }


@pytest.mark.parametrize(
    "change",
    [{"noise_multiplier": "0x0p+0"}, {"steps": 0}, {"unit": "household"}, {"relation": "replace-one"}],
)
def test_a_record_outside_the_range_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"expected|not a valid"):
        Mechanism.from_record({**mechanism().to_record(), **change})


def test_only_add_or_remove_one_exists() -> None:
    assert list(NeighboringRelation) == [NeighboringRelation.ADD_OR_REMOVE_ONE]
