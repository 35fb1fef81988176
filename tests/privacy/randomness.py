# SPDX-License-Identifier: Apache-2.0
"""Mistakes with the noise itself: how much of it there is, what it depends on, and who can draw it again.

Noise is read from replies of whole sites whose records have no features, in units of what their ledgers were charged.
"""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from opacus.optimizers import DPOptimizerFastGradientClipping
from tests.privacy.scene import (
    BOUND,
    LABELS,
    WEIGHT,
    Floats,
    batch,
    blank,
    chosen,
    drawn,
    fedavg,
    mechanism,
    noise_of,
    numbers,
    plan,
    replaced,
    silent,
    stage,
)
from tests.statistical.checks import ENOUGH, check_count, check_scale, check_shape, check_unrelated

from veil.client import optimizer, release
from veil.client.gradient import clipped_head_sum
from veil.client.head_batch import HeadBatch
from veil.client.optimizer import LatticeOptimizer
from veil.client.release import gradient_update
from veil.common.noise import NoiseSource, OSNoise, clip_bound, privatize
from veil.common.privacy import Mechanism
from veil.common.update import Update

WIDE = ENOUGH // len(LABELS) + 1
NARROW = 2000
Source = Callable[[int], Floats]


def _drawn_by(source: Source) -> AbstractContextManager[None]:
    return replaced((OSNoise, "gaussian", lambda self, count: source(count)))


def guard_scale() -> None:
    """A site's rounds carry normal noise of the σ·C that its ledger was charged."""
    with stage() as scene:
        rounds = noise_of(scene.site(blank(2, WIDE)), plan(), WIDE)
    for noise in rounds[1:]:
        check_scale(noise)
        check_shape(noise)
    check_scale(rounds[0])


def without_noise() -> AbstractContextManager[None]:
    """Nothing is added."""
    return _drawn_by(np.zeros)


def bound_left_out() -> AbstractContextManager[None]:
    """The noise has the standard deviation σ instead of σ·C."""

    def variant(total: Floats, *, noise_multiplier: float, max_grad_norm: float, noise: Any) -> NDArray[np.int64]:
        wrong = noise_multiplier / max_grad_norm
        return privatize(total, noise_multiplier=wrong, max_grad_norm=max_grad_norm, noise=noise)

    return replaced((optimizer, "privatize", variant), (release, "privatize", variant))


def guard_public_scale() -> None:
    """Sites of 2 and of 200 units send local changes with the same, public amount of noise."""
    with stage() as scene:
        for count in (2, 200):
            site = scene.site(blank(count, NARROW), name=f"site of {count}")
            check_scale(np.concatenate(noise_of(site, fedavg(), NARROW)))


def divided_by_own_size() -> AbstractContextManager[None]:
    """The divisor, and with it the noise, is the expected batch of the site's own number of units."""
    ours = release.delta_update

    def variant(weight: Floats, of: HeadBatch, paid: Mechanism, noise: NoiseSource, **public: float) -> Update:
        return ours(weight, of, paid, noise, **{**public, "nominal_units": max(1, of.count)})

    return replaced((release, "delta_update", variant))


def scaled_by_batch() -> AbstractContextManager[None]:
    """Each step's noise shrinks and grows with the number of units that its sample happens to hold."""
    ours = release._step

    def variant(opt: LatticeOptimizer, of: HeadBatch, paid: Mechanism) -> None:
        opt.noise_multiplier = paid.noise_multiplier * len(of.labels) / max(0.1, of.count * paid.sample_rate)
        ours(opt, of, paid)

    return replaced((release, "_step", variant))


def guard_seedless() -> None:
    """The seeds of every library that is about, set alike, change nothing."""

    def seeded(name: str) -> Floats:
        random.seed(1)
        np.random.seed(1)
        torch.manual_seed(1)
        return noise_of(scene.site(blank(2, NARROW), name=name), plan(), NARROW)[1]

    with stage() as scene:
        check_unrelated(seeded("first"), seeded("second"))


def global_generator() -> AbstractContextManager[None]:
    """Noise from torch's global generator, which anybody can seed."""
    return _drawn_by(lambda count: torch.randn(count, dtype=torch.float64).numpy())


def guard_sites() -> None:
    """Two sites' noise of the same round is unrelated."""
    with stage() as scene:
        both = [noise_of(scene.site(blank(2, NARROW), name=name), plan(), NARROW) for name in ("Ulm", "Graz")]
    for first, second in zip(*both, strict=True):
        check_unrelated(first, second)


def fresh_generators() -> AbstractContextManager[None]:
    """Each draw has a `torch.Generator()` of its own: all of them start with the same fixed seed."""
    return _drawn_by(lambda count: torch.randn(count, dtype=torch.float64, generator=torch.Generator()).numpy())


def guard_rounds() -> None:
    """One site's noise is unrelated over rounds, runs and restarts."""
    with stage() as scene:
        found = noise_of(scene.site(blank(2, NARROW)), plan(), NARROW)[1:]
        found += noise_of(scene.site(blank(2, NARROW)), plan(), NARROW, job="another")[1:]
    for first, second in itertools.combinations(found, 2):
        check_unrelated(first, second)


def generator_rebuilt() -> AbstractContextManager[None]:
    """The generator is made anew in every round, from the site's own secret seed."""
    secret = int.from_bytes(os.urandom(8), "little")
    return _drawn_by(lambda count: np.random.default_rng(secret).standard_normal(count))


def guard_processes() -> None:
    """Two forked processes and the one they come from draw unrelated noise."""
    ours = OSNoise().gaussian(NARROW)
    found = [_in_a_fork(OSNoise().gaussian), _in_a_fork(OSNoise().gaussian), OSNoise().gaussian(NARROW), ours]
    for first, second in itertools.combinations(found, 2):
        check_unrelated(first, second)


def _in_a_fork(draw: Source) -> Floats:
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writing, draw(NARROW).tobytes())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        numbers_drawn = np.frombuffer(pipe.read())
    os.waitpid(child, 0)
    return numbers_drawn


def one_state() -> AbstractContextManager[None]:
    """One generator for the process, well seeded: a fork goes on from the same state."""
    return _drawn_by(np.random.default_rng().standard_normal)


TRIALS = 200
_SIGMA = 100.0
"""At this σ the best honest observer is right in 50.2 % of the trials."""

_MEMBERS, _FEATURES = 40, 301
_TORCH_APART = 8
"""Places between two numbers of a Box-Muller pair: torch draws in blocks of sixteen."""

_OUR_APART = len(LABELS) * (_FEATURES + 1) // 2
"""Ours are about half the release apart."""


def rightly_identified(apart: int) -> int:
    """The membership attack on floating-point noise (Mironov 2012): how often of `TRIALS` an observer is right.

    The observer knows every record but one, subtracts the sum with and the sum without it from what was released, and
    asks which of the remainders lies on the grid of float32 Box-Muller: angles at multiples of 2⁻²⁴ of a turn.

    Args:
        apart: places between the two numbers of a pair.
    """
    everyone = drawn(_MEMBERS, _FEATURES)
    groups = (everyone, chosen(everyone, list(range(1, _MEMBERS))))
    weight = np.zeros((len(LABELS), _FEATURES + 1))
    clean = [numbers(gradient_update(weight, batch(one), mechanism(), silent())) for one in groups]
    right = 0
    for trial in range(TRIALS):
        truth = trial % 2
        seen = numbers(release.gradient_update(weight, batch(groups[truth]), mechanism(_SIGMA), OSNoise()))
        off = [_off_grid(seen - candidate, apart) for candidate in clean]
        right += int(off[truth] < off[1 - truth])
    return right


def _off_grid(noise: Floats, apart: int) -> float:
    """Mean distance of the pairs' angles from the grid."""
    pairs = noise.ravel()[: noise.size // (2 * apart) * 2 * apart].reshape(-1, 2, apart)
    turns = np.arctan2(pairs[:, 1], pairs[:, 0]) / (2 * np.pi) * 2**24
    return float(np.abs(turns - np.rint(turns)).mean())


def guard_attack() -> None:
    """The observer of `rightly_identified` does as well as a coin, also when it is told about how our numbers pair."""
    for apart in (_TORCH_APART, _OUR_APART):
        check_count(rightly_identified(apart), TRIALS, 0.502)


def torch_float32() -> AbstractContextManager[None]:
    """Opacus' own optimizer and noise: torch's CPU generator in float32, added to a float32 sum."""

    def variant(weight: Floats, of: HeadBatch, paid: Mechanism, noise: NoiseSource) -> Update:
        parameter = torch.nn.Parameter(torch.from_numpy(weight).float())
        opacus = DPOptimizerFastGradientClipping(
            torch.optim.SGD([parameter], lr=1.0),
            noise_multiplier=paid.noise_multiplier,
            max_grad_norm=paid.max_grad_norm,
            expected_batch_size=None,
            loss_reduction="sum",
        )
        total = clipped_head_sum(weight, of, clip_bound(BOUND, weight.size))
        parameter.grad = torch.from_numpy(total).float()
        opacus.step()
        noised = parameter.grad.double().numpy()
        fine = 2.0**-48
        return Update(points={WEIGHT: np.rint(noised / fine).astype(np.int64)}, spacing=fine)

    return replaced((release, "gradient_update", variant))
