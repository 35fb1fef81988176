# SPDX-License-Identifier: Apache-2.0
"""Tests of `spent_over_runs`: which rule holds when, and an adversary who chooses plans by what runs gave."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.special import log_ndtr
from scipy.stats import norm

from veil.common.privacy import Mechanism, spent, spent_over_runs
from veil.common.privacy.accounting import GUARD
from veil.common.privacy.renyi import FILTER_ORDERS, ORDERS, renyi

DELTA = 1e-5
Array = NDArray[np.float64]


def mechanism(sigma: float, rate: float = 1.0, steps: int = 1) -> Mechanism:
    return Mechanism(noise_multiplier=sigma, max_grad_norm=1.0, sample_rate=rate, steps=steps)


FULL = [mechanism(20.0), mechanism(15.0, steps=30)]
SAMPLED = [mechanism(20.0), mechanism(1.5, 0.032, 100)]


@pytest.mark.parametrize("runs", [[FULL], [SAMPLED], [FULL, FULL], [FULL, [], [mechanism(9.0)]], [[], SAMPLED], []])
def test_one_run_and_full_batches_cost_what_a_plan_costs(runs: list[list[Mechanism]]) -> None:
    assert spent_over_runs(runs, DELTA) == spent([one for run in runs for one in run], DELTA)


@pytest.mark.parametrize("runs", [[SAMPLED, SAMPLED], [FULL, SAMPLED], [SAMPLED, FULL], [SAMPLED, [mechanism(1e6)]]])
def test_sampled_steps_beside_another_run_are_filtered(runs: list[list[Mechanism]]) -> None:
    """By the formula written out, above what the same steps would cost in one plan, in any order of runs."""
    found = spent_over_runs(iter([iter(run) for run in runs]), DELTA)
    together = [one for run in runs for one in run]
    totals = {
        order: sum(
            one.steps * (order / 2 / one.noise_multiplier**2 if one.sample_rate == 1 else renyi_at(one, order))
            for one in together
        )
        for order in FILTER_ORDERS
    }
    share = DELTA / len(FILTER_ORDERS)
    expected = min(
        total + math.log((order - 1) / order) + math.log(1 / (order * share)) / (order - 1)
        for order, total in totals.items()
    )
    assert found.by_accountant["rdp_filter"] == pytest.approx(expected, rel=1e-12)
    assert found.epsilon == GUARD * found.by_accountant["rdp_filter"]
    assert found.by_accountant["rdp"] < found.by_accountant["rdp_filter"]
    assert found.epsilon > spent(together, DELTA).epsilon
    assert spent_over_runs(runs[::-1], DELTA).epsilon == pytest.approx(found.epsilon, rel=1e-12)


def renyi_at(one: Mechanism, order: int) -> float:
    return float(renyi(one.noise_multiplier, one.sample_rate)[ORDERS.index(order)])


def test_a_later_run_never_lowers_the_figure() -> None:
    """A change of rule included: from one run to two, from full batches to samples."""
    runs: list[list[Mechanism]] = []
    before = 0.0
    for run in (FULL, [mechanism(40.0)], [mechanism(50.0, 1e-5)], SAMPLED, FULL, SAMPLED):
        runs.append(run)
        after = spent_over_runs(runs, DELTA).epsilon
        assert after > before
        before = after


@pytest.mark.parametrize("delta", [0.0, 1.0, -1e-5, math.nan])
def test_delta_out_of_range_is_refused(delta: float) -> None:
    with pytest.raises(ValueError, match=r"delta = .*expected above 0 and below 1"):
        spent_over_runs([SAMPLED, SAMPLED], delta)


def exceeded(sigma: float, q: float, epsilon: Array) -> Array:
    """δ of one release at every ε, for the unit's presence against its absence, in closed form."""
    ratio = np.expm1(epsilon) + q
    threshold = np.where(ratio > 0, sigma**2 * np.log(np.maximum(ratio, 1e-300) / q) + 0.5, -np.inf)
    present = (1 - q) * np.exp(log_ndtr(-threshold / sigma)) + q * np.exp(log_ndtr((1 - threshold) / sigma))
    found: Array = np.maximum(present - np.exp(epsilon + log_ndtr(-threshold / sigma)), 0.0)
    return found


def least_noise(q: float, within: Callable[[Mechanism], bool]) -> float | None:
    """The smallest σ for which a release of that rate is still within a limit, by halving."""
    low, high = math.log(0.3), math.log(1000.0)
    if not within(mechanism(math.exp(high), q)):
        return None
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if within(mechanism(math.exp(middle), q)) else (middle, high)
    return math.exp(high)


def adaptive_delta(first: Mechanism, rule: Callable[[Mechanism], float], limit: float) -> float:
    """What a coordinator reaches at ε = limit who sees the first release and then picks the worst release allowed."""
    sigma, q = first.noise_multiplier, first.sample_rate
    x = np.linspace(-10 * sigma, 1 + 10 * sigma, 20_001)
    density = (1 - q) * norm.pdf(x, 0, sigma) + q * norm.pdf(x, 1, sigma)
    loss = np.log(density / norm.pdf(x, 0, sigma))
    worst = np.zeros_like(x)
    for rate in (1.0, 0.5, 0.2, 0.05, 0.01, 0.001):
        noise = least_noise(rate, lambda one: rule(one) <= limit)
        if noise is not None:
            worst = np.maximum(worst, exceeded(noise, rate, limit - loss))
    return float(np.trapezoid(density * worst, x))


FIRST = [mechanism(1.0, 0.1), mechanism(0.7, 0.01), mechanism(2.0, 0.5), mechanism(3.0, 0.9)]


@pytest.mark.parametrize("first", FIRST, ids=str)
@pytest.mark.parametrize("more", [1.05, 1.5, 2.5])
def test_an_adversary_who_chooses_the_second_run_stays_within_delta(first: Mechanism, more: float) -> None:
    limit = more * spent_over_runs([[first], [mechanism(1e6)]], DELTA).epsilon
    assert adaptive_delta(first, lambda one: spent_over_runs([[first], [one]], DELTA).epsilon, limit) <= DELTA


@pytest.mark.parametrize("first", FIRST, ids=str)
def test_the_adversary_would_catch_a_filter_without_its_tail(first: Mechanism) -> None:
    """A near lie: two thirds of the figure."""

    def lie(one: Mechanism) -> float:
        return 2 / 3 * spent_over_runs([[first], [one]], DELTA).epsilon

    assert adaptive_delta(first, lie, 1.5 * lie(mechanism(1e6))) > DELTA
