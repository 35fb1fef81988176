# SPDX-License-Identifier: Apache-2.0
"""What mechanisms cost together: ε at a δ, from the list of mechanisms alone.

Promises an upper bound: a tight accountant's figure is reported only between a lower bound computed without it and
the Rényi bound, is not asked where it would take gigabytes, and is replaced by the Rényi bound where it fails.
Sources: Balle & Wang 2018 (exact Gaussian), Dong, Roth & Su 2022 (Gaussian composition), Mironov, Talwar & Zhang 2019
(Rényi), Doroshenko et al. 2022 (PLD), Feldman & Zrnic 2021 (Rényi filter); Gaussian and PLD from dp-accounting.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from veil.common.privacy.floor import least_epsilon
from veil.common.privacy.mechanism import Mechanism, PrivacySpent
from veil.common.privacy.renyi import FILTER_ORDERS, ORDERS, epsilon_at, renyi

if TYPE_CHECKING:
    from dp_accounting import PrivacyAccountant  # a second to load, which most processes never need

PLD_INTERVAL = 1e-4
"""Grid of the privacy-loss distribution; dp-accounting rounds to the pessimistic side."""

FINER = ((5.0, 0.05, 1e-6), (1.0, 1.0, 1e-5))
"""Least noise multiplier and largest Rényi bound for a finer grid, and that grid.

Splitting a loss between two points adds variance in each step, which a small ε shows: on the coarse grid it is
overstated by up to 0.02 in 10⁵ steps. A fine one takes more memory, which is little where noise is large and ε small.
"""

PLD_LIMIT = 60.0
"""Above this bound a PLD may take gigabytes and no one would call it private: the bound is reported."""

PLD_MECHANISMS = 8
"""Different sampled mechanisms that a PLD is built for; each takes seconds, and a plan has one."""

PLD_STEPS = 1_000_000
"""Sampled steps that a PLD is built for: at 10⁹ one of next to no cost takes minutes, and the grid outweighs it."""

PLD_MIN_DELTA = 1e-10
"""Below this δ the Fourier transforms' rounding counts: at 10⁻¹¹ a PLD was seen below the truth."""

GUARD = 1 + 1e-5
"""What a reported ε is raised by: the accountants' own rounding differs with the order and grouping of terms."""

_FRACTIONS = (1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.75, 1.9, 2.25, 2.5, 3.5)
"""Orders between whole numbers, which count where ε is large."""

_SLACK = 1e-6
"""What a PLD may lie below the lower bound by rounding."""

_Term = tuple[float, float, int]


def gaussian_mu_squared(mechanisms: Iterable[Mechanism]) -> float:
    """The additive cost μ² = Σ steps/σ² of full-batch Gaussian releases (Gaussian DP).

    Raises:
        ValueError: for a subsampled mechanism, whose cost is not a single μ.
    """
    terms = []
    for mechanism in mechanisms:
        if mechanism.sample_rate != 1.0:
            raise ValueError(f"sample_rate = {mechanism.sample_rate}; expected 1, as μ² adds up full batches only")
        terms.append(mechanism.steps / mechanism.noise_multiplier**2)
    return math.fsum(terms)


def spent(mechanisms: Iterable[Mechanism], delta: float) -> PrivacySpent:
    """What all these mechanisms together cost one unit.

    The mechanisms' parameters must have been fixed before the first of them ran (a plan), or all of them be full
    batch, where composition holds for adaptively chosen noise as well (Smith & Thakurta 2022).

    Args:
        mechanisms: what was done, in any order.
        delta: δ, above 0 and below 1.

    Returns:
        ε as an upper bound, with every accountant's own figure. Full batches: the exact Gaussian or the PLD, the
        larger. Sampled steps: the smallest of PLD, Rényi bound and, where that is less than the Rényi bound, the
        exact Gaussian of the same steps as full batches, which cost more whatever the rate (the hockey-stick
        divergence is convex). A PLD that says what cannot be true is replaced by the Rényi bound (`pld_rejected`:
        its figure, or 0 where it had none).

    Raises:
        ValueError: when δ is out of range.
    """
    _check(delta)
    return _spent(*_terms(mechanisms), delta)


def spent_over_runs(runs: Iterable[Iterable[Mechanism]], delta: float) -> PrivacySpent:
    """What several runs together cost one unit, by the rule that is valid for what they are.

    - All full batch: `spent`; the exact Gaussian is a valid filter (Smith & Thakurta 2022).
    - One run: `spent`; its plan was fixed before it began.
    - Sampled steps and several runs: a Rényi filter. Whoever wrote the later plans may have read the earlier runs'
      releases, and PLDs composed then bound nothing.

    The filter. Let L be the privacy loss of all releases under one of two neighbouring collections, R(α) the sum of
    their divergences of order α: both depend on the plans that the releases led to. For a fixed α each release is
    chosen from those before it, so that exp((α−1)(L − R(α))) is a supermartingale that begins at 1, whichever way
    the plans are chosen (Feldman & Zrnic 2021), and so is its mean M over the m orders of `FILTER_ORDERS`. A site
    stops when the figure returned here would pass its limit ε: at the end some order has
    R(α) + log(1 − 1/α) + log(m/(α·δ))/(α − 1) ≤ ε. The left side is the least ε with
    1 − exp(−x) ≤ (δ/m)·exp((α−1)(x + ε − R(α))) for all x ≥ 0; with x = L − ε the right side is at most δ·M. Hence
    E max(0, 1 − exp(ε − L)) ≤ δ·E M ≤ δ, which is (ε, δ) of everything that left. The order is chosen at the end
    and may depend on all releases; the m in the tail term pays for that, and the conversion is the improved one of
    Canonne, Kamath & Steinke 2020.

    What remains: a ledger follows one rule at a time, and a coordinator that lets answers decide whether it moves on
    to another (a full-batch or a single run, then sampled steps) gets each rule's δ for those ends that fall under
    it. The first plan is chosen before any answer, so that is two rules, and at most 2δ (three would be 3δ). Within
    a run, a round that is drawn again after a crash counts as one more step of the plan: crashes are taken not to be
    chosen by what was released. What a filter reports of a ledger that stands below its limit is what a limit set
    there would have allowed.

    Args:
        runs: each run's mechanisms, fixed before that run began; a run without any counts for nothing.
        delta: δ, above 0 and below 1.

    Returns:
        `spent` of everything under the first two rules; under the third ε by the filter, with `rdp_filter`, and
        `rdp` of the same mechanisms for comparison, which holds for plans fixed beforehand only.

    Raises:
        ValueError: when δ is out of range.
    """
    _check(delta)
    begun = [mechanisms for run in runs if (mechanisms := list(run))]
    mu_squared, sampled = _terms(mechanism for run in begun for mechanism in run)
    if len(begun) <= 1 or not sampled:
        return _spent(mu_squared, sampled, delta)
    divergences = _divergences(mu_squared, sampled)
    figures = {
        "rdp": epsilon_at(divergences, delta),
        "rdp_filter": epsilon_at(divergences, delta / len(FILTER_ORDERS), FILTER_ORDERS),
    }
    return PrivacySpent(epsilon=GUARD * figures["rdp_filter"], delta=delta, by_accountant=figures)


def renyi_bound(mechanisms: Iterable[Mechanism], delta: float) -> float:
    """ε by the Rényi bound alone, for a plan fixed beforehand: within milliseconds, and 5 to 60 % above `spent`."""
    return epsilon_at(_divergences(*_terms(mechanisms)), delta)


def _check(delta: float) -> None:
    if not 0 < delta < 1:
        raise ValueError(f"delta = {delta}; expected above 0 and below 1")


def _terms(mechanisms: Iterable[Mechanism]) -> tuple[float, tuple[_Term, ...]]:
    """μ² of the full batches, and the different sampled mechanisms in a fixed order."""
    counts: Counter[tuple[float, float]] = Counter()
    for mechanism in mechanisms:
        counts[mechanism.noise_multiplier, mechanism.sample_rate] += mechanism.steps
    terms = sorted((sigma, q, steps) for (sigma, q), steps in counts.items())
    mu_squared = math.fsum(steps / sigma**2 for sigma, q, steps in terms if q == 1.0)
    return mu_squared, tuple(term for term in terms if term[1] < 1.0)


@lru_cache(maxsize=4096)
def _spent(mu_squared: float, sampled: tuple[_Term, ...], delta: float) -> PrivacySpent:
    if not (mu_squared or sampled):
        return PrivacySpent(epsilon=0.0, delta=delta, by_accountant={})
    figures = {"rdp": epsilon_at(_divergences(mu_squared, sampled), delta)}
    if figures["rdp"] > PLD_LIMIT and len(sampled) <= PLD_MECHANISMS:
        figures["rdp"] = min(figures["rdp"], _rdp_of_fractions(mu_squared, sampled, delta))
    exact = _exact(mu_squared, delta)
    as_full = math.fsum([mu_squared, *(steps / sigma**2 for sigma, _, steps in sampled)])
    full = _exact(as_full, delta)
    if not sampled or full < figures["rdp"]:
        figures["gaussian"] = full
    least, bound = exact, min(figures.values())
    if bound <= PLD_LIMIT and _pld_is_cheap(sampled) and delta >= PLD_MIN_DELTA:
        least = max(exact, *(least_epsilon(*term, delta) for term in sampled), 0.0)
        figure = _pld(mu_squared, sampled, delta, _interval(sampled, bound))
        trusted = least - _SLACK <= figure < math.inf
        figures["pld" if trusted else "pld_rejected"] = figure if math.isfinite(figure) else 0.0
        valid = min(bound, figure) if sampled else figure
        bound = valid if trusted else figures["rdp"]
    return PrivacySpent(epsilon=GUARD * max(least, bound), delta=delta, by_accountant=figures)


def _pld_is_cheap(sampled: tuple[_Term, ...]) -> bool:
    return len(sampled) <= PLD_MECHANISMS and sum(steps for *_, steps in sampled) <= PLD_STEPS


def _exact(mu_squared: float, delta: float) -> float:
    """ε of full batches alone (Balle & Wang 2018)."""
    import dp_accounting

    with _quiet():
        return float(dp_accounting.get_epsilon_gaussian(mu_squared**-0.5, delta)) if mu_squared else 0.0


def _divergences(mu_squared: float, sampled: Iterable[_Term]) -> NDArray[np.float64]:
    total = np.array(ORDERS) * (mu_squared / 2)
    for sigma, q, steps in sampled:
        total = total + steps * renyi(sigma, q)
    return total


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence an accountant's notes: what it says of itself is checked, not read."""
    logger = logging.getLogger("absl")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)


def _rdp_of_fractions(mu_squared: float, sampled: tuple[_Term, ...], delta: float) -> float:
    """ε by dp-accounting's Rényi bound at fractional orders, whose series it sums without signs: an upper bound."""
    from dp_accounting import rdp

    return _compose(rdp.RdpAccountant(orders=_FRACTIONS), mu_squared, sampled, delta)


def _interval(sampled: tuple[_Term, ...], bound: float) -> float:
    least = min((sigma for sigma, *_ in sampled), default=0.0)
    return next((grid for sigma, most, grid in FINER if least >= sigma and bound <= most), PLD_INTERVAL)


def _pld(mu_squared: float, sampled: tuple[_Term, ...], delta: float, interval: float) -> float:
    """ε by dp-accounting's privacy-loss distribution; nan when it fails."""
    from dp_accounting import pld

    try:
        return _compose(pld.PLDAccountant(value_discretization_interval=interval), mu_squared, sampled, delta)
    except (ArithmeticError, LookupError, MemoryError, ValueError):
        return math.nan


def _compose(accountant: PrivacyAccountant, mu_squared: float, sampled: tuple[_Term, ...], delta: float) -> float:
    import dp_accounting

    with _quiet():
        if mu_squared:
            accountant.compose(dp_accounting.GaussianDpEvent(mu_squared**-0.5))
        for sigma, q, steps in sampled:
            accountant.compose(dp_accounting.PoissonSampledDpEvent(q, dp_accounting.GaussianDpEvent(sigma)), steps)
        return float(accountant.get_epsilon(delta))
