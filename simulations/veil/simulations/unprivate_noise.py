# SPDX-License-Identifier: Apache-2.0
"""Noise that is not private: repeatable, or none. Exists in simulations only.

Promises that both call themselves not private, so that the ledger's ε is infinite and every output says so.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray


class FixedNoise:
    """Repeatable noise: the same for the same seed, site and round, on every engine.

    Args:
        seed: from the plan.
        site: the site's name.
        round_: the round.
    """

    name = "fixed"
    private = False

    def __init__(self, seed: int, site: str, round_: int) -> None:
        digest = hashlib.sha256(f"{seed}\0{site}\0{round_}".encode()).digest()
        self._random = np.random.default_rng(int.from_bytes(digest, "little"))

    def uniform(self, count: int) -> NDArray[np.float64]:
        """Uniform numbers in [0, 1), [count]."""
        return self._random.random(count)

    def gaussian(self, count: int) -> NDArray[np.float64]:
        """Standard normal numbers, [count]."""
        return self._random.standard_normal(count)


class NoNoise(FixedNoise):
    """Sampling as in `FixedNoise`, and no noise at all."""

    name = "none"

    def gaussian(self, count: int) -> NDArray[np.float64]:
        """Zeros, [count]."""
        return np.zeros(count)
