# SPDX-License-Identifier: Apache-2.0
"""What mechanisms cost together: ε at a δ, from the list of mechanisms alone.

Promises an upper bound: where two accountants are tight the larger one is reported, and a plan that would make a
tight accountant eat memory is answered by the cheap one. Sources: Balle & Wang 2018 (exact Gaussian), Dong, Roth &
Su 2022 (Gaussian composition), Mironov, Talwar & Zhang 2019 (RDP of the sampled Gaussian), Doroshenko et al. 2022
(PLD); implementations: dp-accounting.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache

import dp_accounting
from dp_accounting import pld, rdp

from veil.common.privacy.mechanism import Mechanism, PrivacySpent

PLD_INTERVAL = 1e-4
"""Grid of the privacy-loss distribution; dp-accounting rounds it to the pessimistic side."""

PLD_LIMIT = 60.0
"""Above this RDP bound a PLD may take gigabytes and no one would call it private: the RDP bound is reported."""

GUARD = 1 + 1e-5
"""What a reported ε is raised by: the accountants' own rounding differs with the order and grouping of terms."""

_Term = tuple[float, float, int]


def gaussian_mu_squared(mechanisms: Iterable[Mechanism]) -> float:
    """The additive cost μ² = Σ steps/σ² of full-batch Gaussian releases (Gaussian DP).

    Raises:
        ValueError: for a subsampled mechanism, whose cost is not a single μ.
    """
    total = 0.0
    for mechanism in mechanisms:
        if mechanism.sample_rate != 1.0:
            raise ValueError(f"sample_rate = {mechanism.sample_rate}; expected 1, as μ² adds up full batches only")
        total += mechanism.steps / mechanism.noise_multiplier**2
    return total


def spent(mechanisms: Iterable[Mechanism], delta: float) -> PrivacySpent:
    """What all these mechanisms together cost one unit.

    The mechanisms' parameters must have been fixed before the first of them ran (a plan), or all of them be full
    batch, where composition holds for adaptively chosen noise as well (Smith & Thakurta 2022).

    Args:
        mechanisms: what was done, in any order.
        delta: δ, above 0 and below 1.

    Returns:
        ε as an upper bound, with every accountant's own figure.

    Raises:
        ValueError: when δ is out of range.
    """
    if not 0 < delta < 1:
        raise ValueError(f"delta = {delta}; expected above 0 and below 1")
    terms: Counter[tuple[float, float]] = Counter()
    for mechanism in mechanisms:
        terms[mechanism.noise_multiplier, mechanism.sample_rate] += mechanism.steps
    return _spent(tuple(sorted((sigma, q, steps) for (sigma, q), steps in terms.items())), delta)


def spent_over_runs(runs: Iterable[Iterable[Mechanism]], delta: float) -> PrivacySpent:
    """What several runs together cost one unit.

    Args:
        runs: each run's mechanisms, fixed before that run began.
        delta: δ, above 0 and below 1.

    Raises:
        ValueError: when δ is out of range.
    """
    return spent([mechanism for run in runs for mechanism in run], delta)


@lru_cache(maxsize=4096)
def _spent(terms: tuple[_Term, ...], delta: float) -> PrivacySpent:
    if not terms:
        return PrivacySpent(epsilon=0.0, delta=delta, by_accountant={})
    figures = {"rdp": _rdp(terms, delta)}
    if all(q == 1.0 for _, q, _ in terms):
        mu = math.sqrt(sum(steps / sigma**2 for sigma, _, steps in terms))
        figures["gaussian"] = float(dp_accounting.get_epsilon_gaussian(1 / mu, delta))
    if figures["rdp"] <= PLD_LIMIT:
        figures["pld"] = _pld(terms, delta)
    tight = [figures[name] for name in ("gaussian", "pld") if name in figures]
    reported = GUARD * (max(tight) if tight else figures["rdp"])
    return PrivacySpent(epsilon=reported, delta=delta, by_accountant=figures)


@contextmanager
def _quiet_absl() -> Iterator[None]:
    """Silence the accountants' notes on orders they leave out, which only makes a bound larger."""
    logger = logging.getLogger("absl")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _event(sigma: float, q: float) -> dp_accounting.DpEvent:
    gaussian = dp_accounting.GaussianDpEvent(sigma)
    return gaussian if q == 1.0 else dp_accounting.PoissonSampledDpEvent(q, gaussian)


def _rdp(terms: tuple[_Term, ...], delta: float) -> float:
    return _compose(rdp.RdpAccountant(), terms, delta)


def _pld(terms: tuple[_Term, ...], delta: float) -> float:
    return _compose(pld.PLDAccountant(value_discretization_interval=PLD_INTERVAL), terms, delta)


def _compose(accountant: dp_accounting.PrivacyAccountant, terms: tuple[_Term, ...], delta: float) -> float:
    with warnings.catch_warnings(), _quiet_absl():
        warnings.simplefilter("ignore")
        for sigma, q, steps in terms:
            accountant.compose(_event(sigma, q), steps)
        epsilon = float(accountant.get_epsilon(delta))
    return epsilon if math.isfinite(epsilon) else math.inf
