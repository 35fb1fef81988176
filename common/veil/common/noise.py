# SPDX-License-Identifier: Apache-2.0
"""Randomness for what leaves a site: the operating system's generator, float64, rounded onto an integer lattice.

Promises that no seed enters: `OSNoise` takes no argument. Why not torch's generator: its CPU stream has 2³² starting
points and its float32 normals lie on a coarse grid that gives membership away (Mironov 2012 for the grid).
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable
from typing import Protocol

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from numpy.typing import NDArray

from veil.common.privacy.mechanism import MAX_NOISE_MULTIPLIER

LATTICE_BITS = 20
"""The lattice has 2²⁰ points per clipping bound."""


_LARGEST = 2.0**52
_AHEAD = 1 << 17
"""Numbers that are drawn before they are asked for, at most."""

_AT_ONCE, _SPARE = 1 << 14, 8
"""Pairs drawn in one piece, which stay in a core's cache; pairs more than are expected to be needed."""

_BLOCK = 1 << 16
"""Numbers that are made private in one piece: what lies between a sum and its lattice points stays small."""


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
    """The operating system's cryptographic generator.

    Every call takes a key of 256 bits from `os.urandom` and reads the ChaCha20 stream of it (RFC 8439), as Linux itself
    does behind `os.urandom`. No key is kept: a process that forks, or a copy of its memory, repeats nothing.
    """

    name = "os"
    private = True

    def uniform(self, count: int) -> NDArray[np.float64]:
        """Uniform numbers on the 53-bit grid of [0, 1), [count]."""
        words, fill = np.empty(count, np.int64), _stream()
        for start in range(0, count, 2 * _AT_ONCE):
            fill(words[start : start + 2 * _AT_ONCE])
        return (words.view(np.uint64) >> np.uint64(11)).astype(np.float64) * 2.0**-53

    def gaussian(self, count: int) -> NDArray[np.float64]:
        """Standard normal numbers by the polar method, tails to 13.2 σ, [count]."""
        return polar_gaussian(_stream(), count)


class SharedNoise:
    """A site's share of noise that several sites add together.

    Args:
        noise: where the numbers come from.
        share: what the share's deviation is of the whole.
    """

    def __init__(self, noise: NoiseSource, share: float) -> None:
        self.name, self.private = noise.name, noise.private
        self._noise, self._share = noise, share

    def uniform(self, count: int) -> NDArray[np.float64]:
        """As they come."""
        return self._noise.uniform(count)

    def gaussian(self, count: int) -> NDArray[np.float64]:
        """Normal numbers whose standard deviation is the share, [count]."""
        return self._noise.gaussian(count) * self._share


class DrawnAhead:
    """A source for the steps of one release, whose numbers are drawn for several steps in one piece.

    Args:
        noise: where they come from.
        normal: how many normal numbers will be asked for, at most.
        uniform: how many uniform ones.
    """

    def __init__(self, noise: NoiseSource, *, normal: int, uniform: int) -> None:
        self.name, self.private = noise.name, noise.private
        self._normal, self._uniform = _Store(noise.gaussian, normal), _Store(noise.uniform, uniform)

    def uniform(self, count: int) -> NDArray[np.float64]:
        """Independent uniform numbers in [0, 1), [count]; none is handed out twice."""
        return self._uniform.take(count)

    def gaussian(self, count: int) -> NDArray[np.float64]:
        """Independent standard normal numbers, [count]; none is handed out twice."""
        return self._normal.take(count)


class _Store:
    """Numbers that were drawn and not handed out yet; in all no more are drawn than announced or asked for."""

    def __init__(self, draw: Callable[[int], NDArray[np.float64]], announced: int) -> None:
        self._draw, self._left = draw, announced
        self._drawn: NDArray[np.float64] = np.zeros(0)

    def take(self, count: int) -> NDArray[np.float64]:
        if len(self._drawn) < count:
            several = _AHEAD // count * count
            self._drawn = self._draw(max(count, min(self._left, several)))
        numbers, self._drawn = self._drawn[:count], self._drawn[count:]
        self._left -= count
        return numbers


Words = Callable[[NDArray[np.int64]], None]
"""Fills an array with independent uniform words of 64 bits."""


def _stream() -> Words:
    """Words of a ChaCha20 stream under a key of its own."""
    encryptor = Cipher(ChaCha20(os.urandom(32), bytes(16)), mode=None).encryptor()

    def fill(words: NDArray[np.int64]) -> None:
        encryptor.update_into(_NOTHING[: words.nbytes], words.view(np.uint8).data)

    return fill


class _Desk(threading.local):
    """Where a thread works numbers out: memory that is asked for anew costs more than the work."""

    def __init__(self) -> None:
        self.words = np.empty(2 * _AT_ONCE, np.int64)
        self.points = np.empty(2 * _AT_ONCE)
        self.squares, self.others, self.factors = np.empty((3, _AT_ONCE))
        self.inside, self.outwards = np.empty((2, _AT_ONCE), np.bool_)


_DESK, _NOTHING = _Desk(), memoryview(bytes(16 * _AT_ONCE))


def polar_gaussian(fill: Words, count: int) -> NDArray[np.float64]:
    """Independent standard normal numbers by the polar method (Marsaglia and Bray 1964), [count].

    A point (a, b) drawn evenly from the unit disc gives two: a·f and b·f with f² = -2 ln s / s, s = a² + b². The tails
    come from the centre of the disc, where float64 holds the grid of 2⁻⁶³ whole: it has more points than the lattice
    out to 10.9 standard deviations for a noise multiplier of 1 (a pair lies beyond with chance 2⁻⁸⁵), out to 10 for
    one of 100 (2⁻⁷²).
    """
    numbers, done, desk = np.empty(count), 0, _DESK
    while done < count:
        pairs = min((count - done) * 2 // 3 + _SPARE, _AT_ONCE)
        fill(desk.words[: 2 * pairs])
        points = np.multiply(desk.words[: 2 * pairs], 2.0**-63, out=desk.points[: 2 * pairs]).reshape(2, pairs)
        squares = np.multiply(points[0], points[0], out=desk.squares[:pairs])
        squares += np.multiply(points[1], points[1], out=desk.others[:pairs])
        inside = np.less(squares, 1.0, out=desk.inside[:pairs])
        inside &= np.greater(squares, 0.0, out=desk.outwards[:pairs])
        places = np.flatnonzero(inside)
        squares = squares.take(places, out=desk.others[: len(places)], mode="clip")
        factors = np.log(squares, out=desk.factors[: len(places)])
        factors *= -2.0
        factors /= squares
        np.sqrt(factors, out=factors)
        for coordinate in points:
            wanted = numbers[done : done + len(places)]
            coordinate.take(places[: len(wanted)], out=wanted, mode="clip")
            wanted *= factors[: len(wanted)]
            done += len(wanted)
    return numbers


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
    the quantised sum: ordinary Gaussian accounting holds. Both are integers below 2⁵³, whose float64 sum is exact.

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
    scale, deviation = 1.0 / spacing(max_grad_norm), noise_multiplier * 2.0**LATTICE_BITS
    furthest = np.rint(max(clipped_sum.max(initial=0.0), -clipped_sum.min(initial=0.0)) * scale)
    if not furthest < _LARGEST or noise_multiplier > MAX_NOISE_MULTIPLIER:
        raise ValueError(f"a sum beyond 2^52 lattice points, or σ = {noise_multiplier:g}; noise would not fit")
    values, points = clipped_sum.reshape(-1), np.empty(clipped_sum.size, np.int64)
    for start in range(0, points.size, _BLOCK):
        block = values[start : start + _BLOCK] * scale
        np.rint(block, out=block)
        draws = noise.gaussian(block.size) * deviation
        block += np.rint(draws, out=draws)
        points[start : start + _BLOCK] = block
    return points.reshape(clipped_sum.shape)
