# SPDX-License-Identifier: Apache-2.0
"""Opacus' DP optimizer with the site's own noise: the module where Opacus is used.

Promises that every step adds noise from the given source on the lattice, is counted by Opacus' step hook, and has the
sample rate and divisor it was told, not ones derived from a loader.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from opacus.accountants import RDPAccountant
from opacus.optimizers import DPOptimizerFastGradientClipping

from veil.common.noise import NoiseSource, privatize, spacing
from veil.common.privacy import Mechanism


class LatticeOptimizer(DPOptimizerFastGradientClipping):  # type: ignore[misc] # Opacus has no types
    """SGD on noised, clipped sums.

    The caller puts the clipped sum into `parameter.grad`; `step` replaces it by the noised one, divided by
    `divisor`, and descends.

    Args:
        parameter: the one trainable tensor, float64.
        mechanism: σ, clipping bound, sample rate and number of steps.
        noise: where randomness comes from.
        learning_rate: of the descent.
        divisor: public number the sum is divided by.
    """

    def __init__(
        self,
        parameter: torch.nn.Parameter,
        *,
        mechanism: Mechanism,
        noise: NoiseSource,
        learning_rate: float = 1.0,
        divisor: float = 1.0,
    ) -> None:
        super().__init__(
            torch.optim.SGD([parameter], lr=learning_rate / divisor),
            noise_multiplier=mechanism.noise_multiplier,
            max_grad_norm=mechanism.max_grad_norm,
            expected_batch_size=None,
            loss_reduction="sum",
        )
        self._noise = noise
        self._accountant = RDPAccountant()
        self.points: NDArray[np.int64] = np.zeros(0, np.int64)
        self.attach_step_hook(self._accountant.get_optimizer_hook_fn(mechanism.sample_rate))

    def add_noise(self) -> None:
        """Quantise the clipped sum and add the noise; `points` keeps the lattice points."""
        (parameter,) = self.params
        self.points = privatize(
            parameter.summed_grad.numpy(),
            noise_multiplier=self.noise_multiplier,
            max_grad_norm=self.max_grad_norm,
            noise=self._noise,
        )
        parameter.grad = torch.from_numpy(self.points * spacing(self.max_grad_norm))

    @property
    def steps_counted(self) -> int:
        """Steps that Opacus' accountant has seen."""
        return sum(steps for _, _, steps in self._accountant.history)
