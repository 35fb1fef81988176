# SPDX-License-Identifier: Apache-2.0
"""Whether a model serves groups alike: right and wrong answers by public group, and what their noisy sums say.

Promises that one record moves a single entry, by `GROUP_WEIGHT`, that a record of no named group moves none, and that
the interval of the largest gap counts the noise, the chance of which units were held out, and that it is the largest.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from veil.common.evaluation import CONFIDENCE, GROUP_WEIGHT, Figure, NoisyCounts

NO_GROUP = -1
"""Group of a record that belongs to none of those named."""


def group_rows(right: NDArray[np.bool_], groups: NDArray[np.int64], count: int) -> NDArray[np.float64]:
    """Each record's counts, of length `GROUP_WEIGHT` or 0.

    Args:
        right: whether the answer is, [n].
        groups: each record's group, 0 to `count` - 1, or `NO_GROUP`, [n].
        count: number of groups.

    Returns:
        right answers by group, then wrong ones, [n, 2 count].
    """
    rows = np.zeros((len(groups), 2 * count))
    named = np.flatnonzero(groups != NO_GROUP)
    rows[named, groups[named] + count * ~right[named]] = GROUP_WEIGHT
    return rows


def group_numbers(names: NDArray[np.str_], groups: Sequence[str]) -> NDArray[np.int64]:
    """Each record's group by its place in the public list, `NO_GROUP` where its name is not on it, [n]."""
    places = {name: place for place, name in enumerate(groups)}
    return np.array([places.get(str(name), NO_GROUP) for name in names], dtype=np.int64)


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupQuality:
    """One group.

    Attributes:
        count: held-out units of it (a unit with records in several counts in parts); error: the noise.
        accuracy: share of right answers; error: the noise, and which units were held out.
    """

    count: Figure
    accuracy: Figure


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupsQuality:
    """All groups, side by side.

    Attributes:
        groups: by name.
        accuracy_gap: the largest difference in accuracy between two groups. Noise and chance alone make the value
            larger than the truth on average; the interval holds the truth all the same.
    """

    groups: Mapping[str, GroupQuality]
    accuracy_gap: Figure

    def to_report(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def groups_quality(sums: NDArray[np.float64], deviation: float, names: Sequence[str]) -> GroupsQuality:
    """What released sums say.

    Args:
        sums: the released numbers of `group_rows`, added over sites, [2 groups].
        deviation: standard deviation of their noise, each number's.
        names: the groups.
    """
    count = len(names)
    sought = NoisyCounts(counted=sums / GROUP_WEIGHT, covariance=np.eye(2 * count) * (deviation / GROUP_WEIGHT) ** 2)
    right = np.eye(2 * count)[:count]
    everyone = right + np.eye(2 * count)[count:]
    return GroupsQuality(
        groups={
            name: GroupQuality(
                count=sought.number(everyone[index]),
                accuracy=sought.share(right[index], everyone[index]),
            )
            for index, name in enumerate(names)
        },
        accuracy_gap=largest_gap(
            [sought.share(right[index], everyone[index], pair_quantile(count)) for index in range(count)], names
        ),
    )


def pair_quantile(groups: int, rates: int = 1) -> float:
    """Of the normal law: with it, the intervals of all pairs of groups hold together at `CONFIDENCE` (Bonferroni), and
    so does that of the largest difference.

    Args:
        groups: how many groups are compared.
        rates: in how many rates, the largest difference of all being sought.
    """
    return NormalDist().inv_cdf(1 - (1 - CONFIDENCE) / (groups * (groups - 1) * rates))


def largest_gap(shares: Sequence[Figure], names: Sequence[str]) -> Figure:
    """From one interval a group to the largest difference's: Newcombe's way (1998, method 10; Zou & Donner 2008) for
    each pair, which asks no more than that the groups' errors are independent.

    Args:
        shares: one rate in each group, with intervals at `pair_quantile`.
        names: of the groups, two at least.

    Returns:
        the difference; unknown where a group's rate is.
    """
    known: list[tuple[float, float, float]] = []
    for share, name in zip(shares, names, strict=True):
        if share.value is None or share.low is None or share.high is None:
            return Figure(reason=f"{share.reason} in {name}")
        known.append((share.low, share.value, share.high))
    pairs = [_difference(one, other) for one, other in combinations(known, 2)]
    low = max(max(0.0, below, -above) for below, _, above in pairs)
    high = min(1.0, max(max(-below, above) for below, _, above in pairs))
    error = (high - low) / (2 * pair_quantile(2))
    return Figure(value=max(abs(middle) for _, middle, _ in pairs), standard_error=error, low=low, high=high)


def _difference(one: tuple[float, float, float], other: tuple[float, float, float]) -> tuple[float, float, float]:
    """Low end, value and high end of one share less another."""
    (one_low, one_value, one_high), (other_low, other_value, other_high) = one, other
    middle = one_value - other_value
    return (
        middle - math.hypot(one_value - one_low, other_high - other_value),
        middle,
        middle + math.hypot(one_high - one_value, other_value - other_low),
    )
