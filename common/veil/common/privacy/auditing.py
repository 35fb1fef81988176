# SPDX-License-Identifier: Apache-2.0
"""What attacks prove: lower bounds of ε from counted guesses, and the chance that two releases share their noise.

Promises bounds that are above the truth with at most the stated chance, for mechanisms whose trade-off is that of the
claimed ones with some other amount of noise; `one_run_epsilon` needs no such assumption. Sources: Clopper & Pearson
1934; Dong, Roth & Su 2022 (Gaussian DP); Nasr et al. 2023 (bounds through a known trade-off); Steinke, Nasr &
Jagielski 2023 (one run).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import dp_accounting
import numpy as np
from dp_accounting import pld
from numpy.typing import NDArray
from scipy.special import expit
from scipy.stats import beta, binom, norm, rankdata, t

from veil.common.privacy.accounting import gaussian_mu_squared
from veil.common.privacy.mechanism import MIN_NOISE_MULTIPLIER, Mechanism

MOST_NOISE = 16.0
"""Sampled mechanisms: the largest factor on the claimed noise at which a bound is looked for; above it, ε is 0."""

_SPREAD = 0.02
_INTERVALS = (1e-4, 5e-3)
_PRECISION = 0.005
_MOST_MU = 6.0
_FEWEST_SHARED = 30


@dataclass(frozen=True, kw_only=True, slots=True)
class Guesses:
    """What telling members from the rest came to, by a threshold that was fixed before anything was released.

    Attributes:
        included: canaries that took part.
        found: those of them that were called members.
        excluded: canaries that did not take part.
        alarms: those of them that were called members.

    Raises:
        ValueError: when more were found than were there, or nobody was in or nobody was out.
    """

    included: int
    found: int
    excluded: int
    alarms: int

    def __post_init__(self) -> None:
        if not (0 <= self.found <= self.included > 0 and 0 <= self.alarms <= self.excluded > 0):
            raise ValueError(f"{self}; expected 0 <= found <= included, 0 <= alarms <= excluded, members and others")

    @classmethod
    def of(cls, scores: NDArray[np.float64], included: NDArray[np.bool_], threshold: float) -> Guesses:
        """Call a member whoever scores above the threshold; scores and included are [canaries]."""
        called = scores > threshold
        return cls(
            included=int(included.sum()),
            found=int((called & included).sum()),
            excluded=int((~included).sum()),
            alarms=int((called & ~included).sum()),
        )

    def error_bounds(self, confidence: float) -> tuple[float, float]:
        """The most that the rates of false alarms and of misses can be, both together with this confidence."""
        half = (1 - confidence) / 2
        return (
            _most(self.alarms, self.excluded, half),
            _most(self.included - self.found, self.included, half),
        )


def _most(events: int, of: int, chance: float) -> float:
    """Upper Clopper-Pearson bound of a rate, wrong with at most `chance`."""
    return 1.0 if events == of else float(beta.ppf(1 - chance, events + 1, of - events))


def epsilon_bound(mechanisms: Sequence[Mechanism], guesses: Guesses, *, delta: float, confidence: float) -> float:
    """A lower bound of ε at δ from guesses against mechanisms like the claimed ones.

    Full batches: the bound of μ from the two error rates, turned into ε by the exact Gaussian formula. Sampled steps:
    ε of the claimed mechanisms with the least noise that the errors rule out, by their privacy-loss distribution.
    Either way the bound passes the claimed ε only when the errors contradict the claim.

    Args:
        mechanisms: what is said to have run.
        guesses: independent of each other, as guesses at canaries with orthogonal gradients are.
        delta: δ of the claim.
        confidence: that the bound is not above the truth.
    """
    alarms, misses = guesses.error_bounds(confidence)
    if _full_batch(mechanisms):
        return gaussian_epsilon(_apart(alarms, misses), delta)
    return _Sampled(mechanisms, delta).epsilon(alarms, misses)


def contradicts(mechanisms: Sequence[Mechanism], guesses: Guesses, *, delta: float, confidence: float) -> bool:
    """Whether guesses are better than the claimed mechanisms allow; arguments as in `epsilon_bound`."""
    alarms, misses = guesses.error_bounds(confidence)
    if _full_batch(mechanisms):
        return _apart(alarms, misses) ** 2 > gaussian_mu_squared(mechanisms) and alarms + misses < 1
    return _Sampled(mechanisms, delta).contradicted(1.0, alarms, misses)


def _full_batch(mechanisms: Sequence[Mechanism]) -> bool:
    return all(mechanism.sample_rate == 1.0 for mechanism in mechanisms)


def _apart(alarms: float, misses: float) -> float:
    """How far apart two unit normals are at least, when a threshold errs at most that often."""
    return -float(norm.ppf(alarms) + norm.ppf(misses))


def gaussian_epsilon(mu: float, delta: float) -> float:
    """ε at δ of a mechanism whose trade-off is that of two unit normals μ apart; 0 where μ is not positive."""
    if not mu > 0 or float(2 * norm.cdf(mu / 2) - 1) <= delta:
        return 0.0
    return float(dp_accounting.get_epsilon_gaussian(1 / mu, delta))


class _Sampled:
    """The claimed mechanisms with all their noise multiplied by a factor.

    Args:
        mechanisms: as claimed.
        delta: δ of the claim.
    """

    def __init__(self, mechanisms: Sequence[Mechanism], delta: float) -> None:
        self._delta = delta
        self._steps: Counter[tuple[float, float]] = Counter()
        for mechanism in mechanisms:
            self._steps[mechanism.noise_multiplier, mechanism.sample_rate] += mechanism.steps

    def epsilon(self, alarms: float, misses: float) -> float:
        """ε at the smallest factor that the error rates contradict; 0 when they contradict none."""
        low, high = self._least_factor(), MOST_NOISE
        if not self.contradicted(high, alarms, misses):
            return 0.0
        if self.contradicted(low, alarms, misses):
            high = low
        while math.log(high / low) > _PRECISION:
            middle = math.sqrt(low * high)
            low, high = (low, middle) if self.contradicted(middle, alarms, misses) else (middle, high)
        return float(self._loss(high).get_epsilon(self._delta))

    def contradicted(self, factor: float, alarms: float, misses: float) -> bool:
        """Whether (ε, δ(ε)) of some ε allows no such errors: 1 - misses ≤ e^ε alarms + δ(ε), and the other way."""
        epsilons = np.linspace(0.0, 20.0, 401)
        deltas = np.asarray(self._loss(factor).get_delta(epsilons), dtype=np.float64)
        members = 1 - misses > np.exp(epsilons) * alarms + deltas
        others = 1 - alarms > np.exp(epsilons) * misses + deltas
        return bool(np.any(members | others))

    def _loss(self, factor: float) -> pld.PLDAccountant:
        """The distribution, on a grid whose rounding adds at most 10⁻⁴ to its variance (but for 10⁵ steps and more)."""
        grid = float(np.clip(_SPREAD / math.sqrt(self._steps.total()), *_INTERVALS))
        accountant = pld.PLDAccountant(value_discretization_interval=grid)
        for (sigma, rate), steps in self._steps.items():
            gaussian = dp_accounting.GaussianDpEvent(sigma * factor)
            event = gaussian if rate == 1.0 else dp_accounting.PoissonSampledDpEvent(rate, gaussian)
            accountant.compose(event, steps)
        return accountant

    def _least_factor(self) -> float:
        """As little noise as is looked at; a privacy-loss distribution of less would grow without end."""
        factor = 1.0
        while self._within_reach(0.8 * factor):
            factor *= 0.8
        return factor

    def _within_reach(self, factor: float) -> bool:
        """Whether μ of the central limit theorem (Bu et al. 2020) is moderate, and every σ in range."""
        sigmas = [sigma * factor for sigma, _ in self._steps]
        if min(sigmas) < MIN_NOISE_MULTIPLIER:
            return False
        terms = zip(sigmas, self._steps.items(), strict=True)
        return sum(steps * rate**2 * math.expm1(sigma**-2) for sigma, ((_, rate), steps) in terms) <= _MOST_MU**2


def one_run_epsilon(*, canaries: int, guesses: int, correct: int, delta: float, confidence: float) -> float:
    """A lower bound of ε at δ that assumes nothing about the mechanism (Steinke, Nasr & Jagielski 2023, theorem 5.2).

    Args:
        canaries: included each with chance 1/2, independently.
        guesses: how many were called in or out, by a rule fixed beforehand; for the others there was no guess.
        correct: guesses that were right.
        delta: δ of the bound.
        confidence: that it is not above the truth.
    """
    low, high = 0.0, 50.0
    while high - low > 1e-3:
        middle = (low + high) / 2
        too_lucky = _chance_of(canaries, guesses, correct, middle, delta) < 1 - confidence
        low, high = (middle, high) if too_lucky else (low, middle)
    return low


def _chance_of(canaries: int, guesses: int, correct: int, epsilon: float, delta: float) -> float:
    """The most likely that an (ε, δ)-DP mechanism lets so many guesses be right."""
    right = float(expit(epsilon))
    shifts = np.arange(1, correct + 1)
    near = np.cumsum(binom.pmf(correct - shifts, guesses, right)) / shifts
    slack = 2 * canaries * delta * float(near.max(initial=0.0))
    return min(1.0, float(binom.sf(correct - 1, guesses, right)) + slack)


@dataclass(frozen=True, kw_only=True, slots=True)
class RepeatedNoise:
    """How much the two most alike of some releases have in common.

    Attributes:
        correlation: of their noise, -1 to 1.
        p_value: chance that independent normal noise shows as much in any pair.
    """

    correlation: float
    p_value: float

    def to_record(self) -> dict[str, Any]:
        """Plain values."""
        return {"correlation": self.correlation, "p_value": self.p_value}


def repeated_noise(noise: NDArray[np.float64], known: NDArray[np.bool_]) -> RepeatedNoise:
    """Compare every two releases where both hold nothing but noise.

    Args:
        noise: what was released, [releases, places].
        known: where it is pure noise, [releases, places].
    """
    first, second = np.triu_indices(len(noise), 1)
    pure = np.where(known, noise, 0.0)
    shared = known.astype(np.float64)
    places = (shared @ shared.T)[first, second]
    power = pure**2
    lengths = np.sqrt((power @ shared.T)[first, second] * (shared @ power.T)[first, second])
    products = (pure @ pure.T)[first, second]
    silent = lengths == 0  # no noise of its own at all
    correlations = np.clip(np.where(silent, 1.0, products / np.where(silent, 1.0, lengths)), -1.0, 1.0)
    correlations = correlations[places >= _FEWEST_SHARED]
    if not len(correlations):
        return RepeatedNoise(correlation=0.0, p_value=1.0)
    free = places[places >= _FEWEST_SHARED] - 1
    with np.errstate(divide="ignore"):
        chances = 2 * t.sf(np.abs(correlations) * np.sqrt(free / (1 - correlations**2)), free)
    worst = int(np.argmin(chances))
    return RepeatedNoise(correlation=float(correlations[worst]), p_value=min(1.0, float(chances[worst]) * len(chances)))


@dataclass(frozen=True, kw_only=True, slots=True)
class Separation:
    """How well scores tell members from the rest.

    Attributes:
        auc: chance that a member scores above another, 0.5 for pure guessing.
        found_at_one_percent: share of members found where 1 % of the others are called members.
    """

    auc: float
    found_at_one_percent: float

    @classmethod
    def of(cls, scores: NDArray[np.float64], members: NDArray[np.bool_]) -> Separation:
        """Judge scores by who was a member; both [n]."""
        inside, outside = scores[members], scores[~members]
        ranks = rankdata(scores)[members].sum()
        below = ranks - len(inside) * (len(inside) + 1) / 2
        return cls(
            auc=float(below / (len(inside) * len(outside))),
            found_at_one_percent=float(np.mean(inside > np.quantile(outside, 0.99))),
        )

    def to_record(self) -> dict[str, Any]:
        """Plain values."""
        return {"auc": self.auc, "found_at_one_percent": self.found_at_one_percent}
