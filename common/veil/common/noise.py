# SPDX-License-Identifier: Apache-2.0
"""Randomness for what leaves a site: the operating system's generator, float64, rounded onto an integer lattice.

Promises that no seed enters: `OSNoise` takes no argument. Why not torch's generator: its CPU stream has 2³² starting
points and its float32 normals lie on a coarse grid that gives membership away (Mironov 2012 for the grid).
"""

from __future__ import annotations

import math
import os
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from veil.common.privacy.mechanism import MAX_NOISE_MULTIPLIER

LATTICE_BITS = 20
"""The lattice has 2²⁰ points per clipping bound."""


_LARGEST = 2.0**52


class NoiseSource(Protocol):
    """Where a site's randomness comes from.

    Attributes:
        name: recorded in the ledger beside every spend.
        private: whether a release with this noise may be called private at all.
    """

    @property
    def name(self) -> str:
        """The word in the ledger."""
        ...

    @property
    def private(self) -> bool:
        """Whether ε means anything for this noise."""
        ...

    def gaussian(self, count: int) -> NDArray[np.float64]:
        """Independent standard normal numbers, [count]."""
        ...

    def uniform(self, count: int) -> NDArray[np.float64]:
        """Independent uniform numbers in [0, 1), [count]."""
        ...


class OSNoise:
    """The operating system's cryptographic generator (`os.urandom`)."""

    name = "os"
    private = True

    def uniform(self, count: int) -> NDArray[np.float64]:
        """Uniform numbers on the 53-bit grid of [0, 1), [count]."""
        words = np.frombuffer(os.urandom(8 * count), dtype=np.uint64)
        return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53

    def gaussian(self, count: int) -> NDArray[np.float64]:
        """Standard normal numbers by Box & Muller (1958), tails to 12.1 σ, [count]."""
        return box_muller(self.uniform(3 * ((count + 1) // 2)))[:count]


def box_muller(uniform: NDArray[np.float64]) -> NDArray[np.float64]:
    """Turn 3m uniform numbers in [0, 1) into 2m independent standard normal ones.

    Two of each three make one uniform number of 106 bits in (0, 1]: with 53, the radii beyond 6.8 σ would lie further
    apart than the lattice's points.
    """
    first, fine, turn = np.split(uniform, 3)
    radius = np.sqrt(-2.0 * np.log((1.0 - first) - fine * 2.0**-53))
    angle = 2.0 * np.pi * turn
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])


def spacing(max_grad_norm: float) -> float:
    """Distance γ of neighbouring lattice points, in the unit of the clipped values."""
    return math.ldexp(max_grad_norm, -LATTICE_BITS)


def clip_bound(max_grad_norm: float, size: int) -> float:
    """What a unit's contribution must be clipped to, so that rounding the sum keeps its sensitivity.

    Rounding two neighbouring sums of `size` numbers can move them apart by γ in each: the bound is smaller by γ√size
    and by 10⁻⁶ for the rounding of float64 sums, the worst case of 95 000 units.

    Raises:
        ValueError: when so many numbers leave no room (size ≥ 2³⁸).
    """
    bound = max_grad_norm - spacing(max_grad_norm) * math.sqrt(size) - 1e-6 * max_grad_norm
    if bound <= max_grad_norm / 2:
        raise ValueError(f"{size} numbers; expected below 2^38 for a lattice of 2^{LATTICE_BITS} points")
    return bound


def privatize(
    clipped_sum: NDArray[np.float64], *, noise_multiplier: float, max_grad_norm: float, noise: NoiseSource
) -> NDArray[np.int64]:
    """Quantise a clipped sum and add Gaussian noise, both on the lattice.

    The noise is added to integers and rounded itself, so the release is post-processing of the Gaussian mechanism on
    the quantised sum: ordinary Gaussian accounting holds.

    Args:
        clipped_sum: sum over units, each within `clip_bound(max_grad_norm, size)`; any shape.
        noise_multiplier: σ in units of `max_grad_norm`.
        max_grad_norm: the sensitivity C.
        noise: where randomness comes from.

    Returns:
        Lattice points, same shape; times `spacing(max_grad_norm)` they are the noised sum.

    Raises:
        ValueError: for a sum or noise too large for exact integers.
    """
    scaled = np.rint(clipped_sum / spacing(max_grad_norm))
    if not np.abs(scaled).max(initial=0.0) < _LARGEST or noise_multiplier > MAX_NOISE_MULTIPLIER:
        raise ValueError(f"a sum beyond 2^52 lattice points, or σ = {noise_multiplier:g}; noise would not fit")
    clean = scaled.astype(np.int64)
    draws = noise.gaussian(clean.size).reshape(clean.shape)
    return clean + np.rint(draws * (noise_multiplier * 2.0**LATTICE_BITS)).astype(np.int64)
