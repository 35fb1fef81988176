# SPDX-License-Identifier: Apache-2.0
"""Tests of `veil.common.privacy.accounting`: every ε against accountants called here, independently, and `<=`."""

from __future__ import annotations

import logging
import math
import random
import tracemalloc
import warnings

import dp_accounting
import pytest
from dp_accounting import pld, rdp
from scipy.optimize import brentq
from scipy.stats import norm

from veil.common.privacy import Mechanism, accounting, gaussian_mu_squared, spent

DELTA = 1e-5
BATCH = 64
GUARD = 1e-5
"""What a reported ε may lie above a tight accountant's own figure, relative."""

"""What the PLD's rounding may add to a small ε over 10⁵ steps; it grows like their root, and a little faster."""

LOOSEST = 1.03
"""No reported ε may be above the RDP bound by more: a bound is no use when the cheap one is better."""


def mechanism(sigma: float, rate: float = 1.0, steps: int = 1) -> Mechanism:
    return Mechanism(noise_multiplier=sigma, max_grad_norm=1.0, sample_rate=rate, steps=steps)


def exact_gaussian(mu: float, delta: float) -> float:
    """ε of a μ-GDP mechanism, from Balle & Wang's equation solved here (Dong, Roth & Su 2022, corollary 1)."""

    def excess(epsilon: float) -> float:
        return float(norm.cdf(-epsilon / mu + mu / 2) - math.exp(epsilon) * norm.cdf(-epsilon / mu - mu / 2)) - delta

    return 0.0 if excess(0.0) <= 0 else float(brentq(excess, 0.0, 300.0, xtol=1e-13, rtol=1e-14))


def independent(mechanisms: list[Mechanism], accountant: dp_accounting.PrivacyAccountant) -> float:
    """The same releases as one composed event, built without the module under test."""
    events = [
        dp_accounting.SelfComposedDpEvent(
            dp_accounting.PoissonSampledDpEvent(m.sample_rate, dp_accounting.GaussianDpEvent(m.noise_multiplier)),
            m.steps,
        )
        for m in mechanisms
    ]
    logger = logging.getLogger("absl")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            accountant.compose(dp_accounting.ComposedDpEvent(events))
            return float(accountant.get_epsilon(DELTA))
    finally:
        logger.setLevel(before)


def check(mechanisms: list[Mechanism]) -> None:
    """Between an independent PLD and (almost) an independent RDP bound, made of the tight figure by its guard."""
    figure = spent(mechanisms, DELTA)
    loose = independent(mechanisms, rdp.RdpAccountant())
    relation = dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE
    finest = accounting._interval(tuple((m.noise_multiplier, m.sample_rate, 1) for m in mechanisms), loose)
    pessimistic = independent(mechanisms, pld.PLDAccountant(relation, value_discretization_interval=finest))
    assert pessimistic <= figure.epsilon <= LOOSEST * loose
    assert figure.delta == DELTA
    tight = max(value for name, value in figure.by_accountant.items() if name != "rdp")
    assert tight <= figure.epsilon <= tight * (1 + 2 * GUARD)


def local(site: int, rounds: int) -> tuple[float, int]:
    """Sample rate and steps of one local epoch a round in batches of 64."""
    rate = min(1.0, BATCH / site)
    return rate, max(1, round(1 / rate)) * rounds


@pytest.mark.parametrize("mu_squared", [0.0719, 0.517, 2.776])
@pytest.mark.parametrize("steps", [1, 30, 1000])
def test_full_batches_cost_the_exact_gaussian(mu_squared: float, steps: int) -> None:
    """The Gaussian figure against the closed equation, to 1e-9; what is reported lies above, by its guard."""
    figure = spent([mechanism(math.sqrt(steps / mu_squared), steps=steps)], DELTA)
    exact = exact_gaussian(math.sqrt(mu_squared), DELTA)
    assert figure.by_accountant["gaussian"] == pytest.approx(exact, rel=1e-9)
    assert exact < figure.epsilon <= exact * (1 + 2 * GUARD)


@pytest.mark.parametrize(("mu_squared", "epsilon"), [(0.0719, 1.0), (0.517, 3.0), (2.776, 8.0)])
def test_what_a_budget_of_epsilon_buys(mu_squared: float, epsilon: float) -> None:
    """Golden numbers of facts/privacy.md §2.1, three digits each, δ = 1e-5."""
    assert spent([mechanism(1 / math.sqrt(mu_squared))], DELTA).epsilon == pytest.approx(epsilon, rel=2e-3)


def test_mu_squared_adds_up() -> None:
    parts = [mechanism(2.0, steps=4), mechanism(0.5), mechanism(10.0, steps=100)]
    assert gaussian_mu_squared(parts) == pytest.approx(1.0 + 4.0 + 1.0, rel=1e-12)
    assert gaussian_mu_squared([]) == 0.0
    one = mechanism(1 / math.sqrt(gaussian_mu_squared(parts)))
    exact = spent(parts, DELTA).by_accountant["gaussian"]
    assert spent([one], DELTA).by_accountant["gaussian"] == pytest.approx(exact, rel=1e-9)


def test_mu_squared_of_a_sample_does_not_exist() -> None:
    with pytest.raises(ValueError, match=r"sample_rate = 0\.1; expected 1"):
        gaussian_mu_squared([mechanism(1.0), mechanism(1.0, rate=0.1)])


@pytest.mark.parametrize(
    ("site", "rounds", "sigma"),
    [(20, 30, 20.0), (100, 1, 1.0), (1000, 1, 4.0), (1000, 30, 0.7), (1000, 200, 20.0), (50_000, 30, 2.0)],
)
def test_the_cost_lies_between_the_accountants(site: int, rounds: int, sigma: float) -> None:
    check([mechanism(sigma, *local(site, rounds))])


@pytest.mark.parametrize(("site", "sigma"), [(50_000, 20.0), (200_000, 50.0)])
def test_a_small_cost_is_not_overstated_by_the_grid(site: int, sigma: float) -> None:
    """More than 10⁵ steps: on the coarse grid its rounding would pass the Rényi bound."""
    rate, steps = local(site, 200)
    figure = spent([mechanism(sigma, rate, steps)], DELTA)
    assert steps > 100_000
    coarse = accounting._pld(0.0, ((sigma, rate, steps),), DELTA, accounting.PLD_INTERVAL)
    assert figure.by_accountant["pld"] <= figure.by_accountant["rdp"] < coarse


def test_a_sample_never_costs_more_than_everyone() -> None:
    """Above the limit of the tight accountant, where the Rényi bound is loose."""
    everyone = spent([mechanism(0.5, 1.0, 80_000)], DELTA)
    figure = spent([mechanism(0.5, 0.9999, 80_000)], DELTA)
    assert figure.by_accountant["rdp"] > 1.01 * figure.epsilon
    assert figure.epsilon == pytest.approx(everyone.epsilon, rel=1e-9)


def test_many_different_samples_are_answered_by_the_cheap_bound() -> None:
    """One more than a loss distribution is built for: a looser bound, never a lower figure."""
    plan = [mechanism(2.0 + index / 10, 0.001, 10) for index in range(accounting.PLD_MECHANISMS + 1)]
    fewer, figure = spent(plan[:-1], DELTA), spent(plan, DELTA)
    assert "pld" in fewer.by_accountant and set(figure.by_accountant) == {"rdp"}
    assert figure.epsilon > fewer.epsilon


def test_different_mechanisms_compose() -> None:
    """A centring round, two runs of different samples, and a full-batch run; order and grouping do not matter."""
    parts = [
        mechanism(21.5),
        mechanism(1.2, rate=0.064, steps=100),
        mechanism(2.5, rate=0.2, steps=40),
        mechanism(14.0, steps=30),
    ]
    check(parts)
    together = spent(parts, DELTA).epsilon
    assert together > max(spent([part], DELTA).epsilon for part in parts)
    assert together < sum(spent([part], DELTA).epsilon for part in parts)
    shuffled = [
        *parts[2:],
        mechanism(1.2, rate=0.064, steps=60),
        mechanism(21.5),
        mechanism(1.2, rate=0.064, steps=40),
    ]
    random.Random(0).shuffle(shuffled)  # noqa: S311
    assert spent(shuffled, DELTA).epsilon == pytest.approx(together, rel=1e-12)


@pytest.mark.parametrize("change", [{"sigma": 0.99}, {"rate": 0.033}, {"steps": 330}])
def test_less_noise_a_larger_sample_and_more_steps_cost_more(change: dict[str, float]) -> None:
    """A near lie of a few per cent is seen in ε."""
    plain = {"sigma": 1.0, "rate": 0.032, "steps": 320.0}
    dearer = {**plain, **change}
    less, more = (
        spent([mechanism(one["sigma"], one["rate"], int(one["steps"]))], DELTA).epsilon for one in (plain, dearer)
    )
    assert more > less * 1.005


@pytest.mark.parametrize(
    ("sigma", "steps", "tight"),
    [(0.8, 32, 2.769), (1.0, 320, 3.711), (1.5, 1000, 3.328)],
)
def test_golden_numbers_of_an_earlier_measurement(sigma: float, steps: int, tight: float) -> None:
    """dp-accounting 0.6 PLD, q = 0.032, δ = 1e-5: facts/privacy.md §1.4."""
    assert spent([mechanism(sigma, 0.032, steps)], DELTA).epsilon == pytest.approx(tight, abs=2e-3)


@pytest.mark.parametrize(
    ("sigma", "rate"),
    [(0.3, 1.0), (0.3, 0.5), (0.3, 0.05), (0.3, 0.001), (0.5, 1.0), (1.0, 0.5)],
)
def test_absurd_plans_are_answered_by_the_cheap_accountant(
    sigma: float, rate: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """10⁶ steps: an upper bound (or infinity), without the tight accountant that would take gigabytes."""

    def never(*_: object) -> float:
        raise AssertionError("the privacy-loss distribution must not be built")

    monkeypatch.setattr(accounting, "_pld", never)
    accounting._spent.cache_clear()
    tracemalloc.start()
    try:
        figure = spent([mechanism(sigma, rate, 1_000_000)], DELTA)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert figure.epsilon > accounting.PLD_LIMIT
    assert figure.epsilon <= figure.by_accountant["rdp"] * (1 + 2 * GUARD)
    assert peak < 32 * 2**20


def test_nothing_costs_nothing() -> None:
    assert spent([], DELTA).epsilon == 0.0


@pytest.mark.parametrize("delta", [0.0, 1.0, -1e-5, 2.0, math.nan])
def test_delta_out_of_range_is_refused(delta: float) -> None:
    with pytest.raises(ValueError, match=r"delta = .*expected above 0 and below 1"):
        spent([mechanism(1.0)], delta)
