# SPDX-License-Identifier: Apache-2.0
"""How much noise a promise needs.

Promises the private side: the mechanism returned never spends more than the budget, and a thousandth less noise
would.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import dp_accounting

from veil.common.privacy.accounting import gaussian_mu_squared, spent
from veil.common.privacy.mechanism import (
    MAX_NOISE_MULTIPLIER,
    MIN_NOISE_MULTIPLIER,
    Mechanism,
    PrivacyBudget,
    PrivacyUnit,
)

PRECISION = 1e-3
"""Relative width of σ at which the search for subsampled mechanisms stops, on the private side."""

MARGIN = 1 + 2e-5
"""Full batches: what the closed form is raised by, for the guard on a reported ε."""

_TRIES = 24


def gaussian_sigma(budget: PrivacyBudget) -> float:
    """σ of the one full-batch Gaussian release that spends exactly the budget (Balle & Wang 2018).

    1/σ² is the μ² that the budget buys.
    """
    return float(dp_accounting.get_sigma_gaussian(budget.target_epsilon, budget.target_delta))


def calibrate(
    budget: PrivacyBudget,
    *,
    steps: int,
    max_grad_norm: float,
    sample_rate: float = 1.0,
    unit: PrivacyUnit = PrivacyUnit.RECORD,
    alongside: Sequence[Mechanism] = (),
) -> Mechanism:
    """The mechanism with the least noise that, together with `alongside`, stays within the budget.

    Args:
        budget: the promise for everything together.
        steps: number of releases.
        max_grad_norm: L2 bound of one unit's contribution.
        sample_rate: chance of a unit to take part in a step.
        unit: whom the promise protects.
        alongside: mechanisms of the same run that are already decided.

    Raises:
        ValueError: when `alongside` alone spends the budget, or no noise would be enough.
    """

    def mechanism(sigma: float) -> Mechanism:
        return Mechanism(
            noise_multiplier=sigma,
            max_grad_norm=max_grad_norm,
            sample_rate=sample_rate,
            steps=steps,
            unit=unit,
        )

    def excess(log_sigma: float) -> float:
        """log(ε spent / ε promised): positive where the noise is too small."""
        cost = spent([*alongside, mechanism(math.exp(log_sigma))], budget.target_delta).epsilon
        return math.log(max(cost, 1e-300) / budget.target_epsilon)

    if alongside and spent(alongside, budget.target_delta).epsilon >= budget.target_epsilon:
        raise ValueError(f"the mechanisms already decided spend ε = {budget.target_epsilon} or more")
    if sample_rate == 1.0 and all(other.sample_rate == 1.0 for other in alongside):
        return mechanism(_raised(excess, _full_batch(budget, steps, alongside)))
    return mechanism(math.exp(_least(excess, start=_first_guess(budget, steps, sample_rate))))


def _full_batch(budget: PrivacyBudget, steps: int, alongside: Sequence[Mechanism]) -> float:
    left = gaussian_sigma(budget) ** -2 - gaussian_mu_squared(alongside)
    sigma = math.sqrt(steps / left) * MARGIN if left > 0 else math.inf
    return max(MIN_NOISE_MULTIPLIER, sigma)


def _raised(excess: Callable[[float], float], sigma: float) -> float:
    """The closed form's σ, raised in growing steps until the accountants agree: once, almost always."""
    margin = MARGIN - 1
    for _ in range(_TRIES):
        if sigma > MAX_NOISE_MULTIPLIER:
            break
        if excess(math.log(sigma)) <= 0:
            return sigma
        sigma, margin = sigma * (1 + margin), 2 * margin
    raise ValueError(f"no noise up to σ = {MAX_NOISE_MULTIPLIER:g} keeps the budget")


def _first_guess(budget: PrivacyBudget, steps: int, sample_rate: float) -> float:
    """What subsampled noise would need if sampling helped as in the central limit (q·√steps)."""
    return max(0.5, gaussian_sigma(budget) * math.sqrt(steps) * sample_rate)


def _least(excess: Callable[[float], float], start: float) -> float:
    """log σ just above the root of a decreasing function: bracketed, then narrowed by regula falsi."""
    floor, ceiling = math.log(MIN_NOISE_MULTIPLIER), math.log(MAX_NOISE_MULTIPLIER)
    high, over = math.log(start), excess(math.log(start))
    step = 0.3
    while over > 0:
        if high >= ceiling:
            raise ValueError(f"no noise up to σ = {MAX_NOISE_MULTIPLIER:g} keeps the budget")
        high, step = min(ceiling, high + step), step * 2
        over = excess(high)
    low, step = high, 0.1
    under = over
    while under <= 0:
        if low <= floor:
            return floor
        high, over = low, under
        low, step = max(floor, low - step), step * 2
        under = excess(low)
    while high - low > PRECISION:
        share = under / (under - over) if math.isfinite(under) else 0.5
        middle = low + (high - low) * min(0.95, max(0.05, share + 0.02))
        value = excess(middle)
        low, under, high, over = (low, under, middle, value) if value <= 0 else (middle, value, high, over)
    return high
