# SPDX-License-Identifier: Apache-2.0
"""Tests of `veil.common.privacy.auditing`: bounds that hold as often as they say, and are worth having."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import binom, norm

from veil.common.privacy import Mechanism, spent
from veil.common.privacy.auditing import (
    Guesses,
    Separation,
    contradicts,
    epsilon_bound,
    gaussian_epsilon,
    one_run_epsilon,
    repeated_noise,
)

DELTA = 1e-5
SAMPLED = Mechanism(noise_multiplier=0.8, max_grad_norm=1.0, sample_rate=0.25, steps=8)


def guesses(alarm: float, miss: float, size: int) -> Guesses:
    """Exactly as many errors as these rates make of `size` in and `size` out, rounded up."""
    return Guesses(included=size, found=size - math.ceil(miss * size), excluded=size, alarms=math.ceil(alarm * size))


def gaussian_guesses(mu: float, size: int) -> Guesses:
    return guesses(norm.sf(mu / 2), norm.sf(mu / 2), size)


def test_guesses_are_counted_at_a_threshold() -> None:
    scores, included = np.array([3.0, 1.0, 2.0, -1.0, 1.5]), np.array([True, True, False, False, False])
    assert Guesses.of(scores, included, 1.2) == Guesses(included=2, found=1, excluded=3, alarms=2)


@pytest.mark.parametrize("counts", [(0, 0, 5, 0), (5, 6, 5, 0), (5, 1, 0, 0), (5, 1, 5, 6), (5, -1, 5, 0)])
def test_impossible_guesses_are_refused(counts: tuple[int, int, int, int]) -> None:
    included, found, excluded, alarms = counts
    with pytest.raises(ValueError, match="expected 0 <= found"):
        Guesses(included=included, found=found, excluded=excluded, alarms=alarms)


@pytest.mark.parametrize("size", [1, 40])
@pytest.mark.parametrize("rate", [0.0, 0.01, 0.3, 0.9, 1.0])
def test_error_rates_are_rarely_above_their_bounds(size: int, rate: float) -> None:
    """Clopper & Pearson's promise, summed over all outcomes."""
    wrong = 0.0
    for alarms in range(size + 1):
        bound, _ = Guesses(included=1, found=1, excluded=size, alarms=alarms).error_bounds(0.9)
        wrong += binom.pmf(alarms, size, rate) * (bound < rate)
    assert wrong <= 0.05


def test_misses_and_alarms_change_places() -> None:
    first, second = guesses(0.1, 0.3, 100).error_bounds(0.99)
    assert guesses(0.3, 0.1, 100).error_bounds(0.99) == (second, first)
    assert 0.1 < first < 0.3 < second


def test_a_gap_of_mu_is_the_gaussian_mechanism_of_that_noise() -> None:
    for sigma in (0.6, 2.0, 20.0):
        paid = Mechanism(noise_multiplier=sigma, max_grad_norm=1.0)
        assert gaussian_epsilon(1 / sigma, DELTA) == pytest.approx(spent([paid], DELTA).epsilon, rel=1e-4)
    assert gaussian_epsilon(0.0, DELTA) == gaussian_epsilon(-1.0, DELTA) == gaussian_epsilon(1e-9, DELTA) == 0.0


@pytest.mark.parametrize("mu", [0.3, 1.7, 4.0])
def test_full_batch_bounds_approach_the_truth_from_below(mu: float) -> None:
    claim = [Mechanism(noise_multiplier=2 / mu, max_grad_norm=1.0, steps=4)]
    truth = spent(claim, DELTA).epsilon
    bounds = [
        epsilon_bound(claim, gaussian_guesses(mu, size), delta=DELTA, confidence=0.999)
        for size in (100, 10_000, 10_000_000)
    ]
    assert bounds == sorted(bounds) and bounds[-1] <= truth
    assert bounds[-1] > 0.97 * truth


def test_guesses_no_better_than_chance_bound_nothing() -> None:
    for claim in ([Mechanism(noise_multiplier=1.0, max_grad_norm=1.0)], [SAMPLED]):
        for alarm, miss in ((0.5, 0.5), (1.0, 0.0), (0.0, 1.0), (0.9, 0.9)):
            found = guesses(alarm, miss, 1000)
            assert epsilon_bound(claim, found, delta=DELTA, confidence=0.999) == 0.0
            assert not contradicts(claim, found, delta=DELTA, confidence=0.999)


def at_scaled_noise(factor: float, size: int) -> Guesses:
    """What a threshold on the sum over all steps gives when the noise has `factor` times its size."""
    sigma, steps, rate = SAMPLED.noise_multiplier * factor, SAMPLED.steps, SAMPLED.sample_rate
    cut, deviation = steps * rate / 2, sigma * math.sqrt(steps)
    taken = np.arange(steps + 1)
    miss = float(binom.pmf(taken, steps, rate) @ norm.cdf((cut - taken) / deviation))
    return guesses(float(norm.sf(cut / deviation)), miss, size)


def test_sampled_bounds_stay_below_the_truth_and_see_too_little_noise() -> None:
    truth = spent([SAMPLED], DELTA).epsilon
    honest = epsilon_bound([SAMPLED], at_scaled_noise(1.0, 1_000_000), delta=DELTA, confidence=0.999)
    assert 0.3 * truth < honest < truth
    broken = epsilon_bound([SAMPLED], at_scaled_noise(0.4, 10_000), delta=DELTA, confidence=0.999)
    assert broken > 1.1 * truth


@pytest.mark.parametrize("claim", [SAMPLED, Mechanism(noise_multiplier=1.5, max_grad_norm=1.0, steps=3)])
@pytest.mark.parametrize("error", [0.001, 0.05, 0.15, 0.25])
def test_a_claim_is_contradicted_exactly_when_the_bound_passes_it(claim: Mechanism, error: float) -> None:
    found = guesses(error, error, 5000)
    bound = epsilon_bound([claim], found, delta=DELTA, confidence=0.99)
    assert contradicts([claim], found, delta=DELTA, confidence=0.99) is (bound > spent([claim], DELTA).epsilon)


def one_run(correct: int, of: int, *, delta: float = 0.0, canaries: int = 1000, confidence: float = 0.95) -> float:
    return one_run_epsilon(canaries=canaries, guesses=of, correct=correct, delta=delta, confidence=confidence)


def test_one_run_is_randomized_response_without_delta() -> None:
    """All of r guesses right: (1 + e^-ε)^-r = 1 - confidence."""
    for of in (10, 400):
        assert one_run(of, of) == pytest.approx(-math.log(0.05 ** (-1 / of) - 1), abs=2e-3)


@pytest.mark.parametrize("epsilon", [0.2, 1.0, 3.0])
def test_one_run_is_rarely_above_the_truth(epsilon: float) -> None:
    """Against randomized response, the worst ε-DP mechanism, summed over all outcomes."""
    right = 1 / (1 + math.exp(-epsilon))
    wrong = sum(binom.pmf(correct, 60, right) for correct in range(61) if one_run(correct, 60) > epsilon)
    assert wrong <= 0.05


def test_one_run_gives_delta_its_due() -> None:
    """A mechanism that fails with chance δ betrays 2mδ guesses: the bound falls with δ and with canaries."""
    assert one_run(55, 60) > one_run(55, 60, delta=1e-4) > one_run(55, 60, delta=1e-4, canaries=3000)
    assert one_run(30, 60) == one_run(0, 60) == one_run(0, 0) == 0.0
    assert one_run(60, 60, delta=1e-3) == 0.0


@pytest.mark.statistical
def test_independent_noise_is_not_called_repeated() -> None:
    """False alarm: 1e-6, by the bound itself."""
    random = np.random.default_rng()
    found = repeated_noise(random.normal(size=(40, 300)), random.random((40, 300)) < 0.5)
    assert found.p_value > 1e-6
    assert abs(found.correlation) < 0.9


@pytest.mark.statistical
@pytest.mark.parametrize("share", [1.0, -1.0, 0.8])
def test_one_pair_of_releases_with_common_noise_is_noticed(share: float) -> None:
    """Releases 3 and 17 of 40. Missed: below once in 10⁹."""
    random = np.random.default_rng()
    noise = random.normal(size=(40, 300))
    noise[17] = share * noise[3] + math.sqrt(1 - share**2) * noise[17]
    found = repeated_noise(noise, random.random((40, 300)) < 0.7)
    assert found.p_value < 1e-6
    assert found.correlation == pytest.approx(share, abs=0.2)


def test_silence_counts_as_repeated_and_too_few_places_as_nothing() -> None:
    everywhere = np.ones((2, 100), np.bool_)
    assert repeated_noise(np.zeros((2, 100)), everywhere).p_value == 0.0
    alone = np.random.default_rng().normal(size=(1, 100))
    assert repeated_noise(alone, everywhere[:1]).p_value == 1.0
    assert repeated_noise(np.vstack([alone, alone]), everywhere & (np.arange(100) < 10)).p_value == 1.0


def test_separation_of_scores() -> None:
    members = np.arange(400) % 2 == 0
    assert Separation.of(members.astype(float), members) == Separation(auc=1.0, found_at_one_percent=1.0)
    assert Separation.of(np.zeros(400), members) == Separation(auc=0.5, found_at_one_percent=0.0)
    scores = np.where(members, 1.0, 0.0)
    scores[1], scores[0] = 2.0, 0.0
    assert Separation.of(scores, members).auc == pytest.approx(1 - (200 + 199 / 2 - 0.5 + 0.0) / 200**2, abs=1e-2)
