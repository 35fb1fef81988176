# SPDX-License-Identifier: Apache-2.0
"""Tests of `veil.common.privacy.calibration`: the promise holds with `<=`, and hardly any noise is given away."""

from __future__ import annotations

import math
from collections.abc import Iterable

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from veil.common.privacy import (
    Mechanism,
    PrivacyBudget,
    PrivacySpent,
    PrivacyUnit,
    calibrate,
    calibration,
    gaussian_sigma,
    spent,
)
from veil.common.privacy.mechanism import MIN_NOISE_MULTIPLIER

DELTA = 1e-5
UNSHRUNK = (Phase.explicit, Phase.generate)
"""An example takes seconds: one that fails is reported as it is."""


def budget(epsilon: float, delta: float = DELTA) -> PrivacyBudget:
    return PrivacyBudget(target_epsilon=epsilon, target_delta=delta)


def quieter(mechanism: Mechanism, factor: float) -> Mechanism:
    return Mechanism(
        noise_multiplier=mechanism.noise_multiplier / factor,
        max_grad_norm=mechanism.max_grad_norm,
        sample_rate=mechanism.sample_rate,
        steps=mechanism.steps,
        unit=mechanism.unit,
    )


def check(found: Mechanism, target: float, alongside: Iterable[Mechanism] = ()) -> None:
    """Within the promise, and 1 % less noise would not be (unless σ is at its floor)."""
    assert spent([*alongside, found], DELTA).epsilon <= target
    if found.noise_multiplier > MIN_NOISE_MULTIPLIER * 1.01:
        assert spent([*alongside, quieter(found, 1.01)], DELTA).epsilon > target


@settings(max_examples=3, deadline=None, derandomize=True, phases=UNSHRUNK)
@given(
    epsilon=st.floats(0.1, 8.0),
    rate=st.floats(1e-3, 1.0),
    steps=st.integers(10, 20_000),
)
def test_the_promise_holds_and_is_tight(epsilon: float, rate: float, steps: int) -> None:
    check(calibrate(budget(epsilon), steps=steps, sample_rate=rate, max_grad_norm=0.5), epsilon)


@settings(max_examples=2, deadline=None, derandomize=True, phases=UNSHRUNK)
@given(
    epsilon=st.floats(0.3, 8.0),
    rate=st.sampled_from([1.0, 0.1]),
    steps=st.integers(1, 500),
    share=st.floats(0.01, 0.5),
)
def test_the_promise_holds_for_everything_together(epsilon: float, rate: float, steps: int, share: float) -> None:
    before = Mechanism(noise_multiplier=max(0.3, gaussian_sigma(budget(epsilon)) / math.sqrt(share)), max_grad_norm=1.0)
    found = calibrate(budget(epsilon), steps=steps, sample_rate=rate, max_grad_norm=0.5, alongside=[before])
    check(found, epsilon, [before])
    alone = calibrate(budget(epsilon), steps=steps, sample_rate=rate, max_grad_norm=0.5)
    assert found.noise_multiplier >= alone.noise_multiplier


@settings(max_examples=6, deadline=None, derandomize=True, phases=UNSHRUNK)
@given(epsilon=st.floats(0.1, 20.0), steps=st.integers(1, 10_000))
def test_full_batches_lose_next_to_nothing(epsilon: float, steps: int) -> None:
    found = calibrate(budget(epsilon), steps=steps, max_grad_norm=0.5)
    expected = max(MIN_NOISE_MULTIPLIER, gaussian_sigma(budget(epsilon)) * math.sqrt(steps))
    assert expected <= found.noise_multiplier <= expected * (1 + 1e-4)
    assert spent([found], DELTA).epsilon <= epsilon


@pytest.mark.parametrize(("epsilon", "sigma"), [(1.0, 20.43), (3.0, 7.62), (8.0, 3.29)])
def test_golden_numbers_of_thirty_full_batches(epsilon: float, sigma: float) -> None:
    """facts/privacy.md §4: T = 30, δ = 1e-5."""
    found = calibrate(budget(epsilon), steps=30, max_grad_norm=1.0).noise_multiplier
    assert found == pytest.approx(sigma, abs=0.006)


def test_what_was_asked_for_comes_back() -> None:
    found = calibrate(budget(0.5), steps=7, sample_rate=0.25, max_grad_norm=0.7, unit=PrivacyUnit.PATIENT)
    assert (found.steps, found.sample_rate, found.max_grad_norm, found.unit) == (7, 0.25, 0.7, PrivacyUnit.PATIENT)


@pytest.mark.parametrize("rate", [1.0, 0.05])
def test_an_enormous_budget_gets_the_least_noise_there_is(rate: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """With an accountant that answers at once: no 1/σ² reaches 900."""

    def quick(mechanisms: Iterable[Mechanism], at: float) -> PrivacySpent:
        figure = sum(one.noise_multiplier**-2 for one in mechanisms)
        return PrivacySpent(epsilon=figure, delta=at, by_accountant={})

    monkeypatch.setattr(calibration, "spent", quick)
    found = calibrate(budget(900.0), steps=1, sample_rate=rate, max_grad_norm=1.0)
    assert found.noise_multiplier == pytest.approx(MIN_NOISE_MULTIPLIER, rel=1e-12)
    assert found.noise_multiplier >= MIN_NOISE_MULTIPLIER


@pytest.mark.parametrize("rate", [1.0, 0.1])
def test_nothing_is_left_when_alongside_spends_the_budget(rate: float) -> None:
    dear = Mechanism(noise_multiplier=gaussian_sigma(budget(3.0)) * 0.999, max_grad_norm=1.0)
    with pytest.raises(ValueError, match="already decided spend"):
        calibrate(budget(3.0), steps=1, sample_rate=rate, max_grad_norm=1.0, alongside=[dear])


@pytest.mark.parametrize("change", [{"steps": 0}, {"steps": 2_000_000}, {"sample_rate": 1.5}, {"max_grad_norm": 0.0}])
def test_impossible_mechanisms_are_refused(change: dict[str, float]) -> None:
    arguments = {"steps": 10, "sample_rate": 0.1, "max_grad_norm": 1.0, **change}
    with pytest.raises(ValueError, match=next(iter(change))):
        calibrate(budget(3.0), **arguments)  # type: ignore[arg-type]


def test_no_noise_is_enough_when_the_budget_is_below_every_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "spent", lambda *_: PrivacySpent(epsilon=math.inf, delta=DELTA, by_accountant={}))
    with pytest.raises(ValueError, match="no noise up to"):
        calibrate(budget(3.0), steps=10, sample_rate=0.1, max_grad_norm=1.0)


@pytest.mark.parametrize(("epsilon", "delta"), [(3.0, 1e-20), (3.0, 1e-15), (1e-6, 1e-9), (1e-15, 1e-14)])
def test_a_promise_no_accountant_can_see_ends(epsilon: float, delta: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """A site calibrates whatever plan it is sent: 40 evaluations must be enough, for an answer or a ValueError."""
    calls = 0

    def counted(mechanisms: Iterable[Mechanism], at: float) -> PrivacySpent:
        nonlocal calls
        calls += 1
        if calls > 40:
            pytest.fail("the search for σ does not end")
        return spent(mechanisms, at)

    monkeypatch.setattr(calibration, "spent", counted)
    try:
        found = calibrate(budget(epsilon, delta), steps=10, max_grad_norm=1.0)
    except ValueError:
        return
    assert spent([found], delta).epsilon <= epsilon
