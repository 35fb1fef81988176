# SPDX-License-Identifier: Apache-2.0
"""What travels: the Adapter (trainable tensors, server to site) and the Update (noised lattice points, site to server).

Promises that both have one exact byte form, so that a reply sent twice is the same reply, and that updates on lattices
of different width add up exactly, in whatever order they came.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

Points = NDArray[np.signedinteger[Any]]

MOST_DOUBLINGS = 62
"""Of a lattice's spacing: more would leave nothing of numbers of 64 bits."""

_BLOCK = 1 << 16
"""Numbers that are narrowed in one piece."""

_INTEGERS = tuple(np.dtype(f"int{bits}") for bits in (8, 16, 32, 64))


@dataclass(frozen=True, kw_only=True, slots=True)
class Adapter:
    """The trainable tensors, by name, float32."""

    tensors: Mapping[str, NDArray[np.float32]]

    def to_bytes(self) -> bytes:
        """The safetensors form."""
        return save({name: np.ascontiguousarray(t) for name, t in sorted(self.tensors.items())})

    @classmethod
    def from_bytes(cls, data: bytes) -> Adapter:
        """The inverse of `to_bytes`.

        Raises:
            ValueError: when the bytes are not an adapter.
        """
        try:
            return cls(tensors=load(data))
        except SafetensorError as error:
            raise ValueError(f"not an adapter: {error}") from None


@dataclass(frozen=True, kw_only=True, slots=True)
class Update:
    """A noised release of a site.

    Attributes:
        points: lattice points by tensor name, signed integers: 64 bits as drawn, fewer as they travel.
        spacing: distance γ of neighbouring points; `points * spacing` are the released numbers.
    """

    points: Mapping[str, Points]
    spacing: float

    def narrowed(self, bits: int) -> Update:
        """The same release in integers of so many bits, on a lattice as much coarser as they need.

        Each number goes to the nearest point of spacing γ·2ᵏ, halves to the even one, with the smallest k ≥ 0 for which
        all lie within ±(2^(bits - 1) - 1). With k = 0 nothing is lost; narrowing once more changes nothing.

        Guarantees:
            k follows from the noised points alone, so that narrowing is post-processing and costs no privacy (a k that
            followed from the clean sum would tell its length without noise).

        Args:
            bits: 8, 16 or 32.
        """
        reach = max((max(int(p.max()), -int(p.min())) for p in self.points.values() if p.size), default=0)
        k = 0
        while 2 * reach >= (2**bits - 1) * 2**k:  # it would round to 2^(bits - 1) or more
            k += 1
        points = {name: _halved(p, k, f"int{bits}") for name, p in self.points.items()}
        return Update(points=points, spacing=math.ldexp(self.spacing, k))

    def to_bytes(self) -> bytes:
        """The safetensors form, γ in its header as a hexadecimal float."""
        header = {"veil": json.dumps({"spacing": self.spacing.hex()})}
        return save({name: np.ascontiguousarray(p) for name, p in sorted(self.points.items())}, metadata=header)

    @classmethod
    def from_bytes(cls, data: bytes) -> Update:
        """The inverse of `to_bytes`.

        Raises:
            ValueError: when the bytes are not an update.
        """
        try:
            length = int.from_bytes(data[:8], "little")
            header = json.loads(data[8 : 8 + length])
            spacing = float.fromhex(json.loads(header["__metadata__"]["veil"])["spacing"])
            points = load(data)
        except (SafetensorError, LookupError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise ValueError(f"not an update: {type(error).__name__}") from None
        if not (math.isfinite(spacing) and spacing > 0) or any(p.dtype not in _INTEGERS for p in points.values()):
            raise ValueError(f"not an update: spacing {spacing}, or numbers that are not signed integers")
        return cls(points=points, spacing=spacing)

    @property
    def nbytes(self) -> int:
        """Size of the lattice points, bytes."""
        return sum(p.nbytes for p in self.points.values())


@dataclass(frozen=True, kw_only=True, slots=True)
class MaskedUpdate:
    """A release behind its masks: nothing to anyone until a whole cohort's are added.

    Attributes:
        words: numbers modulo 2⁴⁸ by tensor name, 64 bits each.
        spacing: of the lattice beneath.
    """

    words: Mapping[str, NDArray[np.uint64]]
    spacing: float

    def to_bytes(self) -> bytes:
        """The safetensors form, six bytes a number, γ in its header as a hexadecimal float."""
        header = {"veil": json.dumps({"spacing": self.spacing.hex(), "masked": True})}
        return save({name: packed(words) for name, words in sorted(self.words.items())}, metadata=header)

    @classmethod
    def from_bytes(cls, data: bytes) -> MaskedUpdate:
        """The inverse of `to_bytes`, for bytes that this site stored."""
        length = int.from_bytes(data[:8], "little")
        header = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["veil"])
        words = {name: unpacked(parts) for name, parts in load(data).items()}
        return cls(words=words, spacing=float.fromhex(header["spacing"]))


def packed(words: NDArray[np.uint64]) -> NDArray[np.uint16]:
    """Numbers below 2⁴⁸ as three words of 16 bits each, the lowest first: [...] to [..., 3]."""
    parts: NDArray[np.uint16] = np.ascontiguousarray(words, dtype="<u8").view("<u2")
    return np.ascontiguousarray(parts.reshape(*words.shape, 4)[..., :3])


def unpacked(parts: NDArray[np.uint16]) -> NDArray[np.uint64]:
    """The inverse of `packed`.

    Raises:
        ValueError: for an array of another form.
    """
    if parts.dtype != np.dtype("<u2") or parts.ndim < 2 or parts.shape[-1] != 3:
        raise ValueError(f"masked numbers of {parts.dtype} {list(parts.shape)}; expected uint16 [..., 3]")
    padded = np.zeros((*parts.shape[:-1], 4), dtype="<u2")
    padded[..., :3] = parts
    return padded.view("<u8")[..., 0].astype(np.uint64, copy=False)


def doublings(spacing: float, finer: float) -> int:
    """How often a lattice's spacing was doubled to give another.

    Raises:
        ValueError: when it was not, or more than `MOST_DOUBLINGS` times.
    """
    for k in range(MOST_DOUBLINGS + 1):
        if finer * 2.0**k == spacing < math.inf:
            return k
    raise ValueError(f"spacing {spacing:g}; expected {finer:g}, doubled 0 to {MOST_DOUBLINGS} times")


def finest(updates: Sequence[Update]) -> float:
    """The smallest spacing: every update's points are multiples of it."""
    return min(update.spacing for update in updates)


def sum_points(updates: Sequence[Update]) -> dict[str, NDArray[np.float64]]:
    """Sums over updates of one shape, exact in units of the finest spacing; the order of `updates` does not matter.

    Raises:
        ValueError: when a spacing is not the finest one times a power of two.
    """
    unit = finest(updates)
    shifts = [doublings(update.spacing, unit) for update in updates]
    return {name: _sum([u.points[name] for u in updates], shifts) * unit for name in updates[0].points}


def _sum(tensors: Sequence[Points], shifts: Sequence[int]) -> NDArray[np.float64]:
    """Σ tensor·2^shift in integers, Python's own where 64 bits may not do; rounded once, at the end."""
    most = sum(2 ** (8 * tensor.itemsize - 1 + shift) for tensor, shift in zip(tensors, shifts, strict=True))
    total = np.zeros(tensors[0].shape, dtype=np.int64 if most < 2**63 else object)
    for tensor, shift in zip(tensors, shifts, strict=True):
        total += tensor.astype(total.dtype) * 2**shift
    return total.astype(np.float64)


def _halved(points: Points, times: int, dtype: str) -> Points:
    """points / 2^times, halves to even, in blocks: what lies between is several times as large as either."""
    if times == 0:
        return points.astype(dtype)
    whole, found = points.reshape(-1), np.empty(points.size, dtype)
    for start in range(0, whole.size, _BLOCK):
        block = slice(start, start + _BLOCK)
        found[block] = _halved_block(whole[block].astype(np.int64), times)
    return found.reshape(points.shape)


def _halved_block(points: NDArray[np.int64], times: int) -> NDArray[np.int64]:
    whole = points >> times
    rest, half = points - (whole << times), 2 ** (times - 1)
    up = (rest > half) | ((rest == half) & (whole % 2 == 1))
    return np.asarray(whole + up, dtype=np.int64)
