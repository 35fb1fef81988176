# SPDX-License-Identifier: Apache-2.0
"""How unlike the training records a new one is, from the noised second moments that a one-shot run released anyway.

Promises that all it reads was released or is public, so that it costs no ε, and that it uses no label; that a direction
counts as one only where its variance stands clear of the noise; and that 1 is what a training record scores on average.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from veil.common.head import unit_rows
from veil.common.moments import Moments

ANOMALY_FILE = "head/anomaly.safetensors"
"""Where the distribution is in a tuned model's folder."""

_LEAST = 1e-6
"""No variance is taken for less: float32 features of unit rows tell no smaller deviation than its root."""

_TAIL = 3.3
"""The largest eigenvalue of pure noise is beyond 2σ + `_TAIL` σ d^(-2/3) once in a thousand (Tracy & Widom 1996)."""

_SURE = 3.1
"""Standard deviations that a normal number exceeds once in a thousand."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AnomalyModel:
    """The distribution of unit feature rows: a Gaussian with k directions of their own and one variance for the rest.

    Attributes:
        mean: of the unit rows, [d].
        directions: orthonormal, by falling variance, [k, d]; k is 0 where nothing stands clear of the noise.
        variances: along each, [k].
        residual: variance along every direction outside them.
    """

    mean: NDArray[np.float64]
    directions: NDArray[np.float64]
    variances: NDArray[np.float64]
    residual: float

    @classmethod
    def from_moments(cls, moments: Moments, mean: NDArray[np.float64], *, count: float, deviation: float) -> Self:
        """The covariance, as far as it can be told from noise.

        An eigenvalue y above the residual variance, seen under symmetric noise of spectral radius 2σ, belongs to a
        direction that is itself askew; the covariance along it is √(y² - 4σ²) above (Benaych-Georges & Nadakuditi
        2011). σ² adds up the released matrix's own noise, d s² with s the deviation off the diagonal (Füredi & Komlós
        1981), and the sampling of n units, d / n times the squared mean variance at most. A unit row has length 1, so
        that all variances add up to 1 - |mean|², whatever the noise.

        Args:
            moments: noised sums over units.
            mean: estimate of the mean unit row, [d].
            count: estimate of the number of units, above 0.
            deviation: of the noise in each released number.
        """
        classes, width = moments.sums.shape
        length, entry = float(np.linalg.norm(mean)), deviation / count
        total, unsure = max(_LEAST, 1 - length**2), 2 * length * entry * math.sqrt(classes)
        sigma = math.sqrt(width * entry**2 / 2 + total**2 / (count * width))
        edge = noise_edge(width, sigma, crossed=length * entry * math.sqrt(classes * width))
        values, vectors = np.linalg.eigh(moments.products / count - np.outer(mean, mean))
        values, vectors = values[::-1], vectors[:, ::-1]
        kept, rest = _clear(values, edge)
        variances = np.maximum(rest + np.sqrt((values[:kept] - rest) ** 2 - (2 * sigma) ** 2), _LEAST)
        left = max(total - float(variances.sum()), unsure + entry * math.sqrt(kept))
        return cls(
            mean=mean,
            directions=np.ascontiguousarray(vectors[:, :kept].T),
            variances=variances,
            residual=max(left / (width - kept), _LEAST),
        )

    def scores(self, features: NDArray[np.floating]) -> NDArray[np.float64]:
        """Squared Mahalanobis distance of each record's unit row from the mean, over d: 1 for a training record on
        average, more the less like one it is, [n].

        Args:
            features: pooled outputs of the frozen backbone, [n, d].

        Raises:
            ValueError: for another width.
        """
        if features.shape[1:] != self.mean.shape:
            raise ValueError(f"features of shape {features.shape}; expected rows of {self.mean.size}")
        moved = unit_rows(features) - self.mean
        along = (moved @ self.directions.T) ** 2
        outside = np.maximum((moved**2).sum(axis=1) - along.sum(axis=1), 0.0)
        distances: NDArray[np.float64] = (along @ (1 / self.variances) + outside / self.residual) / self.mean.size
        return distances

    @property
    def tensors(self) -> dict[str, NDArray[np.float64]]:
        """All of it by name."""
        return {
            "mean": self.mean,
            "directions": self.directions,
            "variances": self.variances,
            "residual": np.array([self.residual]),
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, NDArray[np.float64]]) -> Self:
        """The inverse of `tensors`.

        Raises:
            ValueError: when they are not a distribution's.
        """
        try:
            mean, directions, variances = (tensors[name] for name in ("mean", "directions", "variances"))
            residual = float(tensors["residual"].item())
        except KeyError as missing:
            raise ValueError(f"no tensor {missing}") from None
        if mean.ndim != 1 or variances.ndim != 1 or directions.shape != (variances.size, mean.size):
            raise ValueError(f"directions {directions.shape} with mean {mean.shape} and variances {variances.shape}")
        finite = all(np.isfinite(one).all() for one in (mean, directions, variances, residual))
        if not (finite and residual > 0 and (variances > 0).all()):
            raise ValueError("variances that are not above 0, or numbers that are not finite")
        return cls(mean=mean, directions=directions, variances=variances, residual=residual)

    def to_bytes(self) -> bytes:
        """The safetensors form."""
        return save(self.tensors)

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """The inverse of `to_bytes`.

        Raises:
            ValueError: when the bytes are not a distribution.
        """
        try:
            return cls.from_tensors(load(data))
        except SafetensorError as error:
            raise ValueError(f"not safetensors: {error}") from None


def noise_edge(width: int, sigma: float, *, crossed: float) -> float:
    """How far above the residual variance an eigenvalue must lie for its direction to be clear of the noise.

    Symmetric noise reaches 2σ and a little more by chance. That of the mean, crossed with the mean, is one direction
    beside it, which leaves the others from a length θ of σ on, as θ + σ²/θ (Péché 2006); θ varies by √(1.5 / d) of it,
    by the noise's length and by its part along the mean.

    Args:
        width: d.
        sigma: half the spectral radius of the noise.
        crossed: expected length of the noise in the mean times that of the mean.
    """
    longest = max(sigma, crossed * (1 + _SURE * math.sqrt(1.5 / width)))
    return longest + sigma**2 / longest + _TAIL * sigma / math.cbrt(width) ** 2


def _clear(values: NDArray[np.float64], edge: float) -> tuple[int, float]:
    """How many of the falling eigenvalues [d] are further than the edge above the mean of those below, and that mean;
    the last is never one of them."""
    below = np.cumsum(values[::-1])[::-1] / np.arange(len(values), 0, -1)
    found = np.flatnonzero(values[:-1] - below[1:] > edge)
    kept = int(found[-1]) + 1 if found.size else 0
    return kept, float(below[kept])
