# SPDX-License-Identifier: Apache-2.0
"""The noise of whole sites is what their ledgers were charged for, and each judgement on it rejects a near lie.

Every check errs on the truth once in 2·10⁷ at most (`checks.ALARM`); fifty of them run here, so one run in 400 000
fails by chance.
A near lie passes its check at most once in 10⁶.
"""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
from tests.privacy.scene import blank, fedavg, noise_of, plan, replaced, stage
from tests.statistical.checks import (
    ENOUGH,
    Floats,
    check_count,
    check_dispersion,
    check_scale,
    check_shape,
    check_tails,
    check_unrelated,
)

from veil.common.noise import OSNoise

pytestmark = pytest.mark.statistical
WIDE = ENOUGH // 3 + 1
Source = Callable[[int], Floats]
_ours = OSNoise().gaussian


def site_noise(name: str = "Ulm") -> list[Floats]:
    """The noise of every training round of one site, at least `ENOUGH` numbers each."""
    with stage() as scene:
        return noise_of(scene.site(blank(2, WIDE), name=name), plan(), WIDE)[1:]


def test_each_round_of_each_site_has_the_noise_it_was_charged_for() -> None:
    rounds = [*site_noise("Ulm"), *site_noise("Graz")]
    for noise in rounds:
        assert noise.size >= ENOUGH
        for check in (check_scale, check_shape, check_tails):
            check(noise)
    for first, second in itertools.combinations(rounds, 2):
        check_unrelated(first, second)
    for noise in rounds:
        check_unrelated(noise[1:], noise[:-1])


def test_local_steps_have_the_noise_they_were_charged_for() -> None:
    with stage() as scene:
        (noise,) = noise_of(scene.site(blank(0, WIDE)), fedavg(), WIDE)
    for check in (check_scale, check_shape, check_tails):
        check(noise)


def scaled(factor: float) -> Source:
    return lambda count: factor * _ours(count)


def cut_off(count: int) -> Floats:
    """Nothing beyond 3 σ; the variance is put right again."""
    numbers = _ours(2 * count)
    kept = numbers[np.abs(numbers) < 3.0][:count]
    return np.asarray(kept / 0.98658, np.float64)


def sum_of_four(count: int) -> Floats:
    """Four uniform numbers less two, of variance 1: next to no tails."""
    uniform = OSNoise().uniform(4 * count).reshape(4, count)
    return np.asarray((uniform.sum(axis=0) - 2) * np.sqrt(3), np.float64)


def on_a_grid(count: int) -> Floats:
    """Noise of the right size in steps of a quarter."""
    return np.asarray(np.rint(4 * _ours(count)) / 4 / np.sqrt(1 + 1 / (12 * 16)), np.float64)


def with_holes(count: int) -> Floats:
    """Every twentieth number is left as it is: a tensor of many that got no noise."""
    numbers = _ours(count)
    numbers[::20] = 0.0
    return np.asarray(numbers * np.sqrt(20 / 19), np.float64)


@pytest.mark.parametrize(
    ("check", "lie"),
    [
        (check_scale, scaled(0.97)),
        (check_scale, scaled(1.03)),
        (check_tails, cut_off),
        (check_tails, sum_of_four),
        (check_shape, on_a_grid),
        (check_shape, with_holes),
        (check_shape, scaled(0.9)),
    ],
    ids=["97 %", "103 %", "no tails", "four uniforms", "a coarse grid", "holes", "90 %"],
)
def test_a_near_lie_is_rejected(check: Callable[[Floats], None], lie: Source) -> None:
    """The lie is told below a whole site, whose ledger says nothing of it."""
    with replaced((OSNoise, "gaussian", lambda self, count: lie(count))):
        rounds = site_noise()
    with pytest.raises(AssertionError):
        check(rounds[0])


def test_a_twentieth_of_shared_noise_is_seen() -> None:
    """Two sites whose noise has a common part of 5 %."""
    common, share = _ours(ENOUGH), 0.05
    first, second = (np.sqrt(share) * common + np.sqrt(1 - share) * _ours(ENOUGH) for _ in range(2))
    check_unrelated(_ours(ENOUGH), _ours(ENOUGH))
    with pytest.raises(AssertionError, match="correlated"):
        check_unrelated(np.asarray(first), np.asarray(second))


def test_counts_of_independent_draws_are_told_from_others() -> None:
    """400 times 400 draws at 0.1; at 0.11, in equal batches, and in pairs that go together, they are noticed."""
    draws = OSNoise().uniform(160_000).reshape(400, 400)
    taken = draws < 0.1
    check_count(int(taken.sum()), taken.size, 0.1)
    check_dispersion(taken.sum(axis=1), 400, 0.1)
    with pytest.raises(AssertionError):
        check_count(int((draws < 0.11).sum()), taken.size, 0.1)
    with pytest.raises(AssertionError):
        check_dispersion(np.full(400, 40), 400, 0.1)
    with pytest.raises(AssertionError):
        check_dispersion(2 * taken[:, ::2].sum(axis=1), 400, 0.1)


_DRAWS = "import sys; from {}; sys.stdout.buffer.write({}(20_000).tobytes())"
_FRESH = _DRAWS.format("veil.common.noise import OSNoise", "OSNoise().gaussian")
_SEEDED = _DRAWS.format("numpy.random import default_rng", "default_rng(3).standard_normal")


def started(code: str) -> Floats:
    """What a new interpreter draws."""
    return np.frombuffer(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)


def test_started_processes_share_nothing() -> None:
    """Two interpreters and this one; with a seed in their code they would draw the same numbers."""
    for first, second in itertools.combinations([started(_FRESH), started(_FRESH), _ours(20_000)], 2):
        check_unrelated(first, second)
    with pytest.raises(AssertionError, match="correlated"):
        check_unrelated(started(_SEEDED), started(_SEEDED))
