# SPDX-License-Identifier: Apache-2.0
"""Tests of `veil.common.noise`: the noise is what it says, comes from nowhere else, and its grid gives nothing away.

Statistical tests fail by chance at most once in 10⁶ runs each; the same check rejects a near lie.
"""

from __future__ import annotations

import inspect
import math
import os
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from scipy.stats import kstest, spearmanr

from veil.common import noise as noise_module
from veil.common.noise import (
    LATTICE_BITS,
    DrawnAhead,
    NoiseSource,
    OSNoise,
    clip_bound,
    polar_gaussian,
    privatize,
    spacing,
)
from veil.simulations.unprivate_noise import FixedNoise, NoNoise

Floats = NDArray[np.float64]
DRAWS = 1_000_000
FIVE = 5.1
"""Standard errors allowed: a normal statistic is beyond them once in 3·10⁶, on both sides together."""


class Scaled:
    """A near lie: a little less noise than promised."""

    name, private = "scaled", True

    def __init__(self, factor: float) -> None:
        self._factor, self._noise = factor, OSNoise()

    def uniform(self, count: int) -> Floats:
        return self._noise.uniform(count)

    def gaussian(self, count: int) -> Floats:
        return self._factor * self._noise.gaussian(count)


def centred(draws: Floats) -> bool:
    return bool(abs(draws.mean()) < FIVE / math.sqrt(len(draws)))


def unit_variance(draws: Floats) -> bool:
    return bool(abs(np.mean(draws**2) - 1) < FIVE * math.sqrt(2 / len(draws)))


def normal_shape(draws: Floats) -> bool:
    return bool(kstest(draws, "norm").pvalue > 2e-7)


def uncorrelated(first: Floats, second: Floats) -> bool:
    return bool(abs(np.mean(first * second)) < FIVE / math.sqrt(len(first)))


@pytest.mark.statistical
@pytest.mark.parametrize("check", [centred, unit_variance, normal_shape])
def test_draws_are_standard_normal(check: Callable[[Floats], bool]) -> None:
    """False alarm: below 4e-7 a check."""
    assert check(OSNoise().gaussian(DRAWS))


@pytest.mark.statistical
@pytest.mark.parametrize("check", [unit_variance, normal_shape])
def test_three_per_cent_less_noise_is_noticed(check: Callable[[Floats], bool]) -> None:
    """Passing by chance: below 1e-15."""
    assert not check(Scaled(0.97).gaussian(DRAWS))


@pytest.mark.statistical
def test_a_shifted_mean_is_noticed() -> None:
    """Passing by chance: below 1e-6."""
    assert not centred(OSNoise().gaussian(DRAWS) + 0.011)


@pytest.mark.statistical
def test_uniform_draws_are_uniform() -> None:
    """False alarm: 2e-7; a law that is 1 % off is rejected."""
    draws = OSNoise().uniform(DRAWS)
    assert draws.min() >= 0.0
    assert draws.max() < 1.0
    assert kstest(draws, "uniform").pvalue > 2e-7
    assert kstest(draws**1.01, "uniform").pvalue < 2e-7


@pytest.mark.statistical
def test_draws_do_not_know_each_other() -> None:
    """Neighbours, halves (the two numbers of one pair) and successive calls. False alarm: 1e-6 together."""
    noise = OSNoise()
    first, second = noise.gaussian(DRAWS), noise.gaussian(DRAWS)
    assert uncorrelated(first[1:], first[:-1])
    half = DRAWS // 2
    assert uncorrelated(first[:half], first[half:])
    assert uncorrelated(first, second)
    assert not uncorrelated(first, 0.02 * first + math.sqrt(1 - 0.02**2) * second)


def test_two_draws_are_never_equal() -> None:
    """20 000 numbers, all different (a repetition by chance: below 1e-7), unlike those of repeatable noise."""
    draws = np.concatenate([OSNoise().gaussian(100) for _ in range(200)])
    assert len(np.unique(draws)) == len(draws)
    repeated = np.concatenate([FixedNoise(0, "site", 1).gaussian(100) for _ in range(2)])
    assert len(np.unique(repeated)) == len(repeated) // 2


@pytest.mark.parametrize("count", [0, 1, 2, 7, 8])
def test_as_many_draws_as_asked_for(count: int) -> None:
    assert OSNoise().gaussian(count).shape == OSNoise().uniform(count).shape == (count,)


def test_the_polar_method_reaches_its_stated_tail_and_is_finite_everywhere() -> None:
    """The innermost points but the centre have s = 2⁻¹²⁶, and √(2·126·ln 2) = 13.2; centre and corners are left out."""

    def words(drawn: NDArray[np.int64]) -> None:
        drawn[:] = 0
        drawn[0], drawn[1], drawn[-1] = 1, 2**63 - 1, 1

    numbers = polar_gaussian(words, 5)
    furthest = math.sqrt(2 * 126 * math.log(2))
    np.testing.assert_allclose(numbers, [furthest, 0.0, 0.0, furthest, furthest], rtol=1e-12)


def test_a_pair_of_the_polar_method_is_a_normal_pair() -> None:
    """Radius Rayleigh, angle even, neither knows the other. Repeatable: no false alarm."""
    random_words, pieces = np.random.default_rng(0), []

    def words(drawn: NDArray[np.int64]) -> None:
        drawn[:] = random_words.integers(-(2**63), 2**63, len(drawn))
        pieces.append(drawn.copy())

    drawn = polar_gaussian(words, 10_000)
    inside = int((np.hypot(*(pieces[0] * 2.0**-63).reshape(2, -1)) < 1).sum())
    first, second = drawn[: 10_000 - inside], drawn[inside : inside + 10_000 - inside]
    halves, angles = (first**2 + second**2) / 2, np.arctan2(second, first) / (2 * np.pi) + 0.5
    assert kstest(halves, "expon").pvalue > 1e-3
    assert kstest(angles, "uniform").pvalue > 1e-3
    assert spearmanr(halves, angles).pvalue > 1e-3
    assert kstest(1.1 * halves, "expon").pvalue < 1e-3
    assert kstest(angles**1.1, "uniform").pvalue < 1e-3


@pytest.mark.parametrize("size", [1, 7, 1000, 200_000])
def test_numbers_drawn_ahead_are_the_source_s_and_none_comes_twice(size: int) -> None:
    """Eight steps, of which the first few are drawn in one piece; what was not asked for is never drawn."""
    asked: list[int] = []

    class Counting(OSNoise):
        def gaussian(self, count: int) -> Floats:
            asked.append(count)
            return super().gaussian(count)

        def uniform(self, count: int) -> Floats:
            asked.append(count)
            return super().uniform(count)

    ahead = DrawnAhead(Counting(), normal=8 * size, uniform=8 * size)
    for take in (ahead.gaussian, ahead.uniform):
        drawn = np.concatenate([take(size) for _ in range(8)])
        assert len(np.unique(drawn)) == len(drawn) == 8 * size == sum(asked)
        assert len(asked) < 8 or size == 200_000
        asked.clear()


def test_no_seed_enters() -> None:
    """`OSNoise` takes no argument, and no seed of any library that is about changes what it draws."""
    with pytest.raises(TypeError):
        OSNoise(1)  # type: ignore[call-arg]
    with pytest.raises(TypeError):
        OSNoise(seed=1)  # type: ignore[call-arg]
    for method in (OSNoise.gaussian, OSNoise.uniform):
        assert list(inspect.signature(method).parameters) == ["self", "count"]

    def seeded() -> Floats:
        random.seed(1)
        np.random.seed(1)
        torch.manual_seed(1)
        return OSNoise().gaussian(64)

    assert not np.isin(seeded(), seeded()).any()


def in_a_fork(draw: Callable[[int], Floats]) -> Floats:
    """What a forked process draws, 1000 numbers."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writing, draw(1000).tobytes())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        drawn = np.frombuffer(pipe.read())
    os.waitpid(child, 0)
    assert len(drawn) == 1000
    return drawn


def test_two_processes_never_share_a_draw() -> None:
    """The same check sees the shared draws of a generator with state."""
    noise, stateful = OSNoise(), FixedNoise(0, "site", 1)
    noise.gaussian(10)
    assert not np.isin(
        in_a_fork(noise.gaussian), np.concatenate([in_a_fork(noise.gaussian), noise.gaussian(1000)])
    ).any()
    assert np.isin(in_a_fork(stateful.gaussian), stateful.gaussian(1000)).all()


@pytest.mark.statistical
@pytest.mark.parametrize(("sigma", "norm"), [(1.3, 0.5), (0.3, 4.0), (20.0, 1.0)])
def test_a_zero_signal_shows_sigma_times_c(sigma: float, norm: float) -> None:
    """False alarm: 4e-7 each; three per cent less noise is rejected."""
    zero = np.zeros(DRAWS)

    def released(noise: NoiseSource) -> Floats:
        points = privatize(zero, noise_multiplier=sigma, max_grad_norm=norm, noise=noise)
        assert points.dtype == np.int64
        return np.asarray(points * spacing(norm) / (sigma * norm), np.float64)

    truth = released(OSNoise())
    assert centred(truth)
    assert unit_variance(truth)
    assert not unit_variance(released(Scaled(0.97)))
    assert not unit_variance(released(NoNoise(0, "site", 1)))


def test_noise_wider_than_an_integer_is_refused() -> None:
    """Beyond int64 numpy's cast gives one constant for every coordinate, and the clean sum shows through."""
    clean = np.array([0.0, 0.25, 0.5])
    with np.errstate(invalid="ignore"), pytest.raises((ValueError, OverflowError)):
        privatize(clean, noise_multiplier=1e16, max_grad_norm=0.5, noise=OSNoise())


def quantised(values: Floats, norm: float) -> Floats:
    silent = NoNoise(0, "site", 0)
    points = privatize(values, noise_multiplier=1.0, max_grad_norm=norm, noise=silent)
    return np.asarray(points * spacing(norm), np.float64)


sums = hnp.arrays(np.float64, st.integers(1, 40), elements=st.floats(-1000, 1000))


@given(values=sums, norm=st.floats(1e-3, 1e3))
def test_rounding_moves_a_number_by_at_most_half_a_spacing(values: Floats, norm: float) -> None:
    error = np.abs(quantised(values, norm) - values)
    assert (error <= spacing(norm) / 2 + 1e-12 * np.abs(values)).all()


@settings(max_examples=200)
@given(values=sums, norm=st.floats(1e-2, 1e2), direction=st.data())
def test_a_unit_within_the_clip_bound_keeps_the_sensitivity(values: Floats, norm: float, direction: Any) -> None:
    """However the neighbour's contribution points and wherever the sums lie on the lattice."""
    shape = values.shape
    towards = direction.draw(hnp.arrays(np.float64, shape, elements=st.floats(-1, 1)))
    length = np.linalg.norm(towards)
    step = towards / length * clip_bound(norm, len(values)) if length > 1e-6 else np.zeros(shape)
    moved = np.linalg.norm(quantised(values + step, norm) - quantised(values, norm))
    assert moved <= norm


@pytest.mark.parametrize("size", [1, 10, 1000, 100_003])
def test_the_worst_neighbour_needs_the_clip_bound(size: int) -> None:
    """Every coordinate a hair below a lattice boundary: within `clip_bound` C holds, with C itself it would not."""
    norm, gamma = 1.0, spacing(1.0)

    def moved(bound: float) -> float:
        each = bound / math.sqrt(size)
        fraction = each / gamma - math.floor(each / gamma)
        start = np.full(size, (0.5 - min(fraction, 0.5) / 2) * gamma)
        return float(np.linalg.norm(quantised(start + each, norm) - quantised(start, norm)))

    assert moved(clip_bound(norm, size)) <= norm
    naive = max(moved(norm * (1 - k * 1e-8)) / (norm * (1 - k * 1e-8)) for k in range(100))
    assert size in (1,) or naive > 1 + 1e-9


def test_clip_bound_is_just_below_c() -> None:
    assert 0.4995 < clip_bound(0.5, 1_000_000) < clip_bound(0.5, 10) < 0.5
    assert spacing(0.5) == 0.5 / 2**LATTICE_BITS


def test_more_numbers_than_the_lattice_has_room_for_are_refused() -> None:
    with pytest.raises(ValueError, match="expected below 2\\^38"):
        clip_bound(1.0, 2**38)


def test_blocks_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    clean = np.random.default_rng(0).normal(size=(5, 7))

    def drawn() -> NDArray[np.int64]:
        return privatize(clean, noise_multiplier=2.0, max_grad_norm=0.5, noise=FixedNoise(0, "site", 1))

    whole = drawn()
    monkeypatch.setattr(noise_module, "_BLOCK", 4)
    np.testing.assert_array_equal(drawn(), whole)
