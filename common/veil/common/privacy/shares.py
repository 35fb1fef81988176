# SPDX-License-Identifier: Apache-2.0
"""Noise that several sites add together: what each adds, and what a release costs where only its own noise counts.

Promises that the sum over the honest sites of a cohort carries at least the noise that its mechanism names.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from veil.common.privacy.mechanism import MIN_NOISE_MULTIPLIER, Mechanism


@dataclass(frozen=True, kw_only=True, slots=True)
class NoiseShares:
    """How many sites add noise to one masked sum, and how many of them may work with the coordinator.

    Attributes:
        sites: in the sum.
        colluding: whose noise is not counted on.

    Raises:
        ValueError: unless at least one honest site is left.
    """

    sites: int
    colluding: int

    def __post_init__(self) -> None:
        if not 0 <= self.colluding < self.sites:
            raise ValueError(
                f"{self.colluding} colluding sites of {self.sites}; expected 0 or more, and fewer than all"
            )

    @property
    def honest(self) -> int:
        """Sites whose noise is counted on."""
        return self.sites - self.colluding

    @property
    def share(self) -> float:
        """What each site's deviation is of the mechanism's: the squares of the honest ones add up to 1."""
        return 1.0 / math.sqrt(self.honest)

    @property
    def excess(self) -> float:
        """Variance of the sum's noise, if everybody is honest, in units of the mechanism's."""
        return self.sites / self.honest

    def unmasked(self, mechanism: Mechanism) -> Mechanism:
        """What the release was for whoever took this site's mask off: its own noise alone.

        Noise too small to be counted as one release is counted as several whose 1/σ² adds up, which holds for full
        batches: a sample is then taken for a full batch, which costs no less.

        Raises:
            ValueError: for one of too many steps to count.
        """
        sigma = mechanism.noise_multiplier * self.share
        if sigma >= MIN_NOISE_MULTIPLIER:
            return replace(mechanism, noise_multiplier=sigma)
        pieces = math.ceil((MIN_NOISE_MULTIPLIER / sigma) ** 2)
        return replace(
            mechanism,
            noise_multiplier=max(sigma * math.sqrt(pieces), MIN_NOISE_MULTIPLIER),
            sample_rate=1.0,
            steps=mechanism.steps * pieces,
        )
