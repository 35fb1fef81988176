# SPDX-License-Identifier: Apache-2.0
"""How much noise a promise needs.

Promises the private side: the mechanism returned never spends more than the budget, and a hundredth less noise
would.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache

from veil.common.privacy.accounting import GUARD, gaussian_mu_squared, renyi_bound, spent
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


@lru_cache(maxsize=256)
def gaussian_sigma(budget: PrivacyBudget) -> float:
    """σ of the one full-batch Gaussian release that spends exactly the budget (Balle & Wang 2018).

    1/σ² is the μ² that the budget buys.
    """
    import dp_accounting

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
    return mechanism(math.exp(_least(excess, start=_first_guess(budget, steps, sample_rate, alongside))))


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


def _first_guess(budget: PrivacyBudget, steps: int, sample_rate: float, alongside: Sequence[Mechanism]) -> float:
    """σ that the Rényi bound, a hundred times cheaper, finds enough: a little more than is needed; to two per cent."""

    def enough(sigma: float) -> bool:
        tried = Mechanism(noise_multiplier=sigma, max_grad_norm=1.0, sample_rate=sample_rate, steps=steps)
        return GUARD * renyi_bound([*alongside, tried], budget.target_delta) <= budget.target_epsilon

    low, high = math.log(MIN_NOISE_MULTIPLIER), math.log(MAX_NOISE_MULTIPLIER)
    while high - low > 0.02:
        middle = (low + high) / 2
        low, high = (low, middle) if enough(math.exp(middle)) else (middle, high)
    return math.exp(high)


def _least(excess: Callable[[float], float], start: float) -> float:
    """log σ just above the root of a decreasing function: bracketed, then narrowed from both sides.

    Each guess is the secant's, moved a third of the precision to the side that the last one did not reach; every
    third halves, so that no shape of the function takes more than a few dozen evaluations.
    """
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
    aside, turn = PRECISION / 3, 0
    shift = aside
    while high - low > PRECISION:
        share = under / (under - over) if math.isfinite(under) and turn % 3 < 2 else 0.5
        middle = min(max(low + (high - low) * share + shift, low + aside), high - aside)
        value, turn = excess(middle), turn + 1
        if value <= 0:
            high, over, shift = middle, value, -aside
        else:
            low, under, shift = middle, value, aside
    return high
