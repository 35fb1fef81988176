# SPDX-License-Identifier: Apache-2.0
"""Made-up features of given sizes: what a frozen backbone might give for records that nobody has.

Promises that no record is read, and one shape for all: only how far the classes lie apart is set, so that a head
trained on all records in one place, without privacy, reaches an assumed accuracy.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from veil.common.errors import InputError
from veil.simulations.evaluation import non_private

DECAY, SHOULDER = 1.1, 2.0
"""Variance along the j-th direction, j = 1, 2, …: proportional to (j + SHOULDER)^-DECAY. Between the spectra of MiniLM
sentences, which are flatter, and of Lite0 images, which are steeper."""

SIGNAL = 2.25
"""Variance between classes: proportional to that within a class, to this power; the leading directions tell most.
Between the values with which the losses measured on those sentences and on those images are met (FORECAST.md)."""

COMMON = 0.4
"""Squared length of the mean that all unit rows share."""

TEST_RECORDS = 3000

_STEPS = 8
_NEAREST, _FURTHEST = 0.01, 4.0
_REACHED = 0.03


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """What is public of a federation's records, as somebody expects them.

    Attributes:
        sites: how many take part.
        units: of each site.
        width: features of a record.
        shares: of the classes, adding up to 1.
        expected: accuracy of a head trained on all units in one place without privacy, 0 to 1.

    Raises:
        InputError: for sizes that cannot be.
    """

    sites: int
    units: int
    width: int
    shares: tuple[float, ...]
    expected: float

    def __post_init__(self) -> None:
        for name, value in {"sites": self.sites, "units": self.units, "width": self.width}.items():
            if value < 1:
                raise InputError(f"{name} = {value}", "at least 1", f"give another number of {name}")
        if len(self.shares) < 2 or min(self.shares) <= 0 or abs(sum(self.shares) - 1) > 1e-6:
            raise InputError(
                f"class shares {list(self.shares)}",
                "a positive share for each of two classes or more, 1 together",
                "give one share for every label, in the plan's order",
            )
        if not self.majority < self.expected < 1:
            raise InputError(
                f"an expected accuracy of {self.expected:g}",
                f"above {self.majority:g}, what naming the most frequent class reaches, and below 1",
                "expect another accuracy",
            )

    @property
    def majority(self) -> float:
        """Accuracy of naming the most frequent class always."""
        return max(self.shares)


@dataclass(frozen=True, kw_only=True, slots=True)
class MadeUpTask:
    """Gaussian classes on the unit sphere.

    Attributes:
        means: of the classes before they are set apart, [classes, d].
        deviations: standard deviation within a class along each direction, [d], of squared length 1.
        common: what all records share, [d].
        shares: of the classes, [classes].
        distance: factor on `means`.
    """

    means: NDArray[np.float64]
    deviations: NDArray[np.float64]
    common: NDArray[np.float64]
    shares: NDArray[np.float64]
    distance: float = 1.0

    @classmethod
    def draw(cls, width: int, shares: tuple[float, ...], random: np.random.Generator) -> MadeUpTask:
        """Classes in random directions, the leading ones most."""
        variances = (np.arange(1, width + 1) + SHOULDER) ** -DECAY
        variances /= variances.sum()
        between = np.sqrt(variances**SIGNAL / (variances**SIGNAL).sum())
        weights = np.array(shares)
        means = random.standard_normal((len(shares), width)) * between
        means -= weights @ means
        means /= np.sqrt(weights @ (means**2).sum(axis=1))
        common = random.standard_normal(width)
        common *= np.sqrt(COMMON / (1 - COMMON)) / np.linalg.norm(common)
        return cls(means=means, deviations=np.sqrt(variances), common=common, shares=weights)

    def records(self, count: int, random: np.random.Generator) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Features [count, d] and classes [count] of so many records; equal draws at every distance."""
        labels = random.choice(len(self.shares), size=count, p=self.shares)
        features = random.standard_normal((count, len(self.deviations)))
        features *= self.deviations
        features += self.common + (self.distance * self.means)[labels]
        return features, labels

    def reaching(self, accuracy: float, count: int, seed: int) -> MadeUpTask:
        """The same classes, so far apart that a head reaches an accuracy without privacy.

        Args:
            accuracy: on records it was not trained on, 0 to 1.
            count: records that it is trained on.
            seed: of the records that are tried.

        Raises:
            InputError: when no distance will do.
        """
        near, far = np.log(_NEAREST), np.log(_FURTHEST)
        for _ in range(_STEPS):
            middle = (near + far) / 2
            near, far = (middle, far) if self._at(middle)._accuracy(count, seed) < accuracy else (near, middle)
        found = self._at(far)
        if (reached := found._accuracy(count, seed)) < accuracy - _REACHED:
            raise InputError(
                f"{count} records of {len(self.deviations)} features, with which {reached:.2f} is reached at most",
                f"sizes with which an accuracy of {accuracy:g} is possible",
                "expect less, or more units",
            )
        return found

    def _at(self, logarithm: float) -> MadeUpTask:
        return replace(self, distance=float(np.exp(logarithm)))

    def _accuracy(self, count: int, seed: int) -> float:
        random = np.random.default_rng(seed)
        trained, judged = self.records(count, random), self.records(TEST_RECORDS, random)
        return non_private(*trained, *judged, classes=len(self.shares)).headline
