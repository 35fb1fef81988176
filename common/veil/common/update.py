# SPDX-License-Identifier: Apache-2.0
"""What travels: the Adapter (trainable tensors, server to site) and the Update (noised lattice points, site to server).

Promises that both have one exact byte form, so that a reply sent twice is the same reply.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save


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
        points: lattice points by tensor name, int64.
        spacing: distance γ of neighbouring points; `points * spacing` are the released numbers.
    """

    points: Mapping[str, NDArray[np.int64]]
    spacing: float

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
        if not (math.isfinite(spacing) and spacing > 0) or any(p.dtype != np.int64 for p in points.values()):
            raise ValueError(f"not an update: spacing {spacing}, or numbers that are not int64")
        return cls(points=points, spacing=spacing)

    @property
    def nbytes(self) -> int:
        """Size of the lattice points, bytes."""
        return sum(p.nbytes for p in self.points.values())


def sum_points(updates: list[Update]) -> dict[str, NDArray[np.float64]]:
    """Exact integer sums over updates of one shape, as numbers; the order of `updates` does not matter."""
    first = updates[0]
    return {
        name: np.sum([u.points[name] for u in updates], axis=0).astype(np.float64) * first.spacing
        for name in first.points
    }
