# SPDX-License-Identifier: Apache-2.0
"""Tests of `veil.common.privacy.floor`: exact where it claims to be, below the truth elsewhere, and its use."""

from __future__ import annotations

import math
from itertools import pairwise

import dp_accounting
import pytest
from dp_accounting import pld
from scipy.integrate import quad
from scipy.stats import norm

from veil.common.privacy import Mechanism, PrivacySpent, accounting, spent
from veil.common.privacy.floor import least_epsilon

DELTA = 1e-5


def mechanism(sigma: float, rate: float = 1.0, steps: int = 1) -> Mechanism:
    return Mechanism(noise_multiplier=sigma, max_grad_norm=1.0, sample_rate=rate, steps=steps)


def unremembered(mechanisms: list[Mechanism]) -> PrivacySpent:
    """`spent`, neither from its memory nor into it."""
    found = accounting._spent.__wrapped__(*accounting._terms(mechanisms), DELTA)
    assert isinstance(found, PrivacySpent)
    return found


def one_step(sigma: float, q: float, epsilon: float) -> float:
    """δ of one release at ε by quadrature, the larger of both directions."""

    def with_unit(x: float) -> float:
        return float((1 - q) * norm.pdf(x, 0, sigma) + q * norm.pdf(x, 1, sigma))

    def excess(x: float, sign: int) -> float:
        pair = with_unit(x), float(norm.pdf(x, 0, sigma))
        return max(0.0, pair[sign] - math.exp(epsilon) * pair[1 - sign])

    reach = [-15 * sigma, -2 * sigma, 0.0, 1.0, 1 + 2 * sigma, 1 + 15 * sigma]
    spans = list(pairwise(reach))
    return max(
        sum(float(quad(excess, *span, args=(sign,), epsabs=1e-14, limit=300)[0]) for span in spans) for sign in (0, 1)
    )


@pytest.mark.parametrize(("sigma", "steps"), [(0.5, 1), (1.0, 4), (20.0, 30), (50.0, 100_000), (300.0, 1)])
@pytest.mark.parametrize("delta", [1e-3, 1e-5, 1e-9])
def test_full_batches_are_exact(sigma: float, steps: int, delta: float) -> None:
    exact = dp_accounting.get_epsilon_gaussian(sigma / math.sqrt(steps), delta)
    assert least_epsilon(sigma, 1.0, steps, delta) == pytest.approx(exact, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize(("sigma", "q"), [(0.5, 0.1), (1.0, 0.01), (1.0, 0.9), (5.0, 0.5)])
def test_one_step_is_exact(sigma: float, q: float) -> None:
    found = least_epsilon(sigma, q, 1, DELTA)
    assert one_step(sigma, q, found) == pytest.approx(DELTA, rel=1e-5)


@pytest.mark.parametrize(("sigma", "q", "steps"), [(1.0, 0.032, 320), (4.0, 0.1, 300), (2.0, 0.2, 40)])
def test_many_steps_cost_more_than_the_floor(sigma: float, q: float, steps: int) -> None:
    """Between six tenths and all of the loss distribution's ε."""
    accountant = pld.PLDAccountant(value_discretization_interval=1e-3)
    accountant.compose(dp_accounting.PoissonSampledDpEvent(q, dp_accounting.GaussianDpEvent(sigma)), steps)
    epsilon = accountant.get_epsilon(DELTA)
    assert 0.6 * epsilon <= least_epsilon(sigma, q, steps, DELTA) <= epsilon


@pytest.mark.parametrize(("sigma", "q"), [(0.3, 1e-300), (1e6, 1e-5), (50.0, 1e-6)])
def test_what_nobody_can_see_costs_nothing(sigma: float, q: float) -> None:
    assert least_epsilon(sigma, q, 1, DELTA) == 0.0


PLANS = [
    [mechanism(1.0, 0.5)],
    [mechanism(2.0, 0.2, 40)],
    [mechanism(20.0, steps=30)],
    [mechanism(20.0, steps=3), mechanism(1.0, 0.032, 1000)],
]


@pytest.mark.parametrize("plan", PLANS, ids=["one step", "steps", "full batch", "mixed"])
@pytest.mark.parametrize("answer", [0.5, 0.0, -1.0, math.nan, math.inf])
def test_a_loss_distribution_that_cannot_be_true_is_not_believed(
    plan: list[Mechanism], answer: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half the truth, nothing, less, no number, or no end: the Rényi bound is reported, and why."""
    right = spent(plan, DELTA)
    figure = right.by_accountant["pld"] * answer if answer == 0.5 else answer
    monkeypatch.setattr(accounting, "_pld", lambda *_: figure)
    found = unremembered(plan)
    assert "pld" not in found.by_accountant
    assert found.by_accountant["pld_rejected"] == (figure if math.isfinite(figure) else 0.0)
    assert found.epsilon >= found.by_accountant["rdp"] >= right.epsilon / accounting.GUARD


@pytest.mark.parametrize("error", [ValueError, OverflowError, IndexError, MemoryError, ZeroDivisionError])
def test_a_loss_distribution_that_fails_is_replaced(error: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing:
        def __init__(self, **_: float) -> None:
            raise error("no distribution")

    monkeypatch.setattr("dp_accounting.pld.PLDAccountant", Failing)
    found = unremembered([mechanism(2.0, 0.2, 40)])
    assert found.by_accountant["pld_rejected"] == 0.0
    assert found.epsilon >= found.by_accountant["rdp"]


def test_no_loss_distribution_is_built_for_a_delta_that_drowns_in_its_rounding() -> None:
    """dp-accounting 0.6 at δ = 10⁻¹¹: below the truth, by the rounding of its Fourier transforms."""
    steps, q = 10_000, 1 - 1e-9
    sigma = math.sqrt(steps)
    accountant = pld.PLDAccountant(value_discretization_interval=1e-4)
    accountant.compose(dp_accounting.PoissonSampledDpEvent(q, dp_accounting.GaussianDpEvent(sigma)), steps)
    truth = least_epsilon(sigma, q, steps, 1e-11)
    assert accountant.get_epsilon(1e-11) < truth
    found = spent([mechanism(sigma, q, steps)], 1e-11)
    assert not {"pld", "pld_rejected"} & set(found.by_accountant)
    assert found.epsilon > truth
