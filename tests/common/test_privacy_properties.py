# SPDX-License-Identifier: Apache-2.0
"""Properties of ε over the range where a site could be: n 20 to 10⁶ (q 10⁻⁵ to 1), σ 0.3 to 50, 1 to 10⁵ steps.

The truth is called here, by means that the module under test does not use: the exact Gaussian in sixty digits, one
sampled step by quadrature, many by Opacus' PRV accountant (another derivation and implementation).
"""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import mpmath
import pytest
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from opacus.accountants import GaussianAccountant, PRVAccountant
from scipy.integrate import quad
from scipy.stats import norm

from veil.common.privacy import Mechanism, spent, spent_over_runs

DELTA = 1e-5
ROUNDING = 2e-5
"""What the guard on a reported ε makes of two figures that are the same, relative."""

PRV_ERROR = 0.01
"""What Opacus' PRV may be off, either way, by its own account."""

WITHIN_PRV = 30.0
"""ε above which a PRV is not asked: it takes gigabytes for 100."""

MOST = 300.0
"""ε that no single release of σ ≥ 0.3 reaches at a δ that a float can hold: the mean loss is below 6."""


def examples(count: int) -> settings:
    """The same examples in every run; one takes up to seconds, so that a failing one is reported as it is."""
    return settings(
        max_examples=count, deadline=None, derandomize=True, database=None, phases=(Phase.explicit, Phase.generate)
    )


def logarithmic(low: float, high: float) -> st.SearchStrategy[float]:
    spread = st.floats(math.log(low), math.log(high), exclude_max=True)
    return spread.map(lambda log: min(high, max(low, math.exp(log))))


sigmas = logarithmic(0.3, 50.0)
rates = logarithmic(1e-5, 1.0)
steps = logarithmic(1, 1e5).map(int)
deltas = logarithmic(1e-9, 1e-3)


def mechanism(sigma: float, rate: float = 1.0, count: int = 1) -> Mechanism:
    return Mechanism(noise_multiplier=sigma, max_grad_norm=1.0, sample_rate=rate, steps=count)


mechanisms = st.builds(mechanism, logarithmic(0.7, 50.0), st.one_of(rates, st.just(1.0)), steps)


def exact_delta(mu: float, epsilon: float) -> Any:
    """δ of a μ-GDP mechanism at ε, in sixty digits (Balle & Wang 2018, theorem 8)."""
    with mpmath.workdps(60):
        mu_, at = mpmath.mpf(mu), mpmath.mpf(epsilon)
        return mpmath.ncdf(mu_ / 2 - at / mu_) - mpmath.exp(at) * mpmath.ncdf(-mu_ / 2 - at / mu_)


def one_step_delta(sigma: float, q: float, epsilon: float) -> float:
    """δ of one sampled release at ε by quadrature, the larger of adding and removing the unit."""

    def excess(x: float, sign: int) -> float:
        absent = float(norm.pdf(x, 0, sigma))
        pair = ((1 - q) * absent + q * float(norm.pdf(x, 1, sigma)), absent)
        return max(0.0, pair[sign] - math.exp(epsilon) * pair[1 - sign])

    if epsilon > MOST:
        return 0.0
    kinks = [0.0, 1.0, sigma**2 * math.log(max(math.expm1(epsilon) + q, 1e-300) / q) + 0.5]
    inside = [x for x in kinks if -15 * sigma < x < 1 + 15 * sigma]
    spans = list(pairwise(sorted({-15 * sigma, 1 + 15 * sigma, *inside})))
    return max(
        sum(float(quad(excess, *span, args=(sign,), epsabs=1e-14, limit=200)[0]) for span in spans) for sign in (0, 1)
    )


def prv_bounds(sigma: float, q: float, count: int, delta: float) -> tuple[float, float, float]:
    """What Opacus' PRV says ε is at least, about, and at most."""
    accountant = PRVAccountant()
    accountant.history = [(sigma, q, count)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = accountant._get_dprv(eps_error=PRV_ERROR, delta_error=delta / 1000)
        low, middle, high = found.compute_epsilon(delta, delta / 1000, PRV_ERROR)
    return float(low), float(middle), float(high)


def never_below_truth(claim: Callable[[float, float, int], float], sigma: float, q: float, count: int) -> None:
    """Fails for an accountant whose ε, of these steps at δ = 10⁻⁵, is below what the releases are known to cost."""
    epsilon = claim(sigma, q, count)
    assert not math.isnan(epsilon)
    if epsilon == math.inf:
        return
    assert one_step_delta(sigma, q, epsilon) <= DELTA * (1 + 1e-6)
    bound = spent([mechanism(sigma, q, count)], DELTA).by_accountant["rdp"]
    if bound <= WITHIN_PRV:
        assert epsilon >= prv_bounds(sigma, q, count, DELTA)[0]


def reported(sigma: float, q: float, count: int) -> float:
    return spent([mechanism(sigma, q, count)], DELTA).epsilon


@examples(10)
@given(sigma=sigmas, q=rates, count=steps)
@example(sigma=0.3, q=1e-5, count=1)
@example(sigma=50.0, q=1e-5, count=100_000)
@example(sigma=1.0, q=1e-3, count=100_000)
@example(sigma=0.3, q=0.9, count=1)
def test_sampled_steps_never_cost_less_than_the_truth(sigma: float, q: float, count: int) -> None:
    never_below_truth(reported, sigma, q, count)


@pytest.mark.parametrize(
    ("sigma", "q", "count"), [(0.8, 0.032, 1), (1.0, 0.032, 10), (1.5, 0.032, 100), (0.5, 0.001, 1000), (2.0, 0.2, 40)]
)
def test_the_central_limit_accountant_of_opacus_would_be_rejected(sigma: float, q: float, count: int) -> None:
    def central_limit(sigma: float, q: float, count: int) -> float:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            accountant = GaussianAccountant()
            accountant.history = [(sigma, q, count)]
            return float(accountant.get_epsilon(DELTA))

    with pytest.raises(AssertionError):
        never_below_truth(central_limit, sigma, q, count)
    never_below_truth(reported, sigma, q, count)


@examples(30)
@given(sigma=sigmas, count=steps, delta=logarithmic(1e-12, 1e-2))
def test_full_batches_cost_the_exact_gaussian(sigma: float, count: int, delta: float) -> None:
    """To 1e-9; what is reported is not below the truth, and above by what the grid and the guard add."""
    found = spent([mechanism(sigma, 1.0, count)], delta)
    exact, mu = found.by_accountant["gaussian"], math.sqrt(count) / sigma
    assert exact_delta(mu, exact * (1 + 1e-9)) <= delta <= exact_delta(mu, exact * (1 - 1e-9))
    assert exact_delta(mu, found.epsilon) <= delta
    assert exact < found.epsilon <= exact * (1 + 1e-3)


@examples(9)
@given(sigma=logarithmic(0.5, 50.0), q=rates, count=steps)
@example(sigma=1.0, q=0.032, count=320)
def test_prv_and_pld_agree(sigma: float, q: float, count: int) -> None:
    """Within 0.02 (0.01 of it is PRV's own), and the PLD below the Rényi bound."""
    figures = spent([mechanism(sigma, q, count)], DELTA).by_accountant
    if figures["rdp"] > WITHIN_PRV:
        return
    low, _, high = prv_bounds(sigma, q, count, DELTA)
    assert figures["pld"] >= low
    assert abs(high - figures["pld"]) <= 0.02
    assert figures["rdp"] >= low
    assert figures["rdp"] >= figures["pld"]


@examples(9)
@given(one=mechanisms, delta=deltas, share=st.floats(0.5, 1.0))
def test_more_is_dearer(one: Mechanism, delta: float, share: float) -> None:
    """ε rises with steps, sample rate, 1/σ and 1/δ: never by less than what rounding takes."""
    sigma, q, count = one.noise_multiplier, one.sample_rate, one.steps
    most = spent([one], delta).epsilon * (1 + ROUNDING) + 1e-6
    assert spent([mechanism(sigma, q, max(1, int(count * share)))], delta).epsilon <= most
    assert spent([mechanism(sigma, q * share, count)], delta).epsilon <= most
    assert spent([mechanism(sigma / share, q, count)], delta).epsilon <= most
    assert spent([one], delta / share).epsilon <= most


@examples(3)
@given(plan=st.lists(mechanisms, min_size=2, max_size=4), more=mechanisms, seed=st.integers(0, 99))
def test_order_and_grouping_do_not_matter_and_nothing_is_free(
    plan: list[Mechanism], more: Mechanism, seed: int
) -> None:
    together = spent(plan, DELTA).epsilon
    halves = [(one, size) for one in plan for size in (one.steps // 2, one.steps - one.steps // 2) if size]
    parts = [mechanism(one.noise_multiplier, one.sample_rate, size) for one, size in halves]
    random.Random(seed).shuffle(parts)  # noqa: S311
    assert spent(parts, DELTA).epsilon == pytest.approx(together, rel=1e-9)
    assert spent([*plan, more], DELTA).epsilon >= together * (1 - ROUNDING) - 1e-6
    assert together >= max(spent([one], DELTA).epsilon for one in plan) * (1 - ROUNDING) - 1e-6


@examples(6)
@given(plan=st.lists(mechanisms, min_size=1, max_size=4), delta=deltas)
def test_runs_cost_at_least_what_one_plan_costs(plan: list[Mechanism], delta: float) -> None:
    """The adaptive rule is never below the fixed plan's, and the same where nothing adapts."""
    fixed = spent(plan, delta).epsilon
    assert spent_over_runs([plan], delta).epsilon == fixed
    apart = spent_over_runs([[one] for one in plan], delta).epsilon
    assert apart >= fixed * (1 - ROUNDING)
    assert len(plan) > 1 or apart == fixed


@examples(14)
@given(
    plan=st.lists(
        st.builds(
            mechanism,
            st.one_of(sigmas, st.sampled_from([0.3, 1e6]), logarithmic(0.3, 1e6)),
            st.one_of(rates, st.sampled_from([1.0, 1 - 2**-53, 5e-324, 1e-300]), logarithmic(1e-12, 1.0)),
            st.one_of(steps, st.sampled_from([1, 1_000_000])),
        ),
        min_size=1,
        max_size=3,
    ),
    delta=st.one_of(deltas, st.sampled_from([5e-324, 1e-30, 0.5, 1 - 2**-53])),
)
def test_every_mechanism_that_can_be_written_has_a_cost(plan: list[Mechanism], delta: float) -> None:
    """A number of at least 0, or infinity: for every plan that a hostile coordinator can put into words."""
    for found in (spent(plan, delta), spent_over_runs([[one] for one in plan], delta)):
        assert found.epsilon >= 0
        assert all(figure >= 0 for figure in found.by_accountant.values())
