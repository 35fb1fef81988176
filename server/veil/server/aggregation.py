# SPDX-License-Identifier: Apache-2.0
"""From the updates of a round to one sum: plainly, or by a rule that a few lying sites cannot bend far.

Promises that every rule returns what stands in for the sum over all updates, so that the rest of a round need not know
which one was chosen; all of them read noised updates only, and so cost no privacy.
"""

from __future__ import annotations

import math

import numpy as np
from flwr.app import Array, ArrayRecord, RecordDict
from flwr.serverapp.strategy.fedtrimmedavg import trim_mean
from flwr.serverapp.strategy.multikrum import select_multikrum
from numpy.typing import NDArray

from veil.common.plan_sections import Cohort
from veil.common.update import Points, Update, doublings, finest, sum_points


def aggregate(updates: list[Update], cohort: Cohort) -> dict[str, NDArray[np.float64]]:
    """The sum over sites, by the plan's rule.

    Args:
        updates: one of each site, of equal shapes, each on its own lattice; their order does not matter.
        cohort: names the rule (`sum`; coordinate-wise `median`, Yin et al. 2018; `trimmed-mean`, ibid.; `krum`,
            Blanchard et al. 2017, in its multi form) and how many sites it is to withstand.
    """
    if cohort.aggregation == "sum":
        return sum_points(updates)
    if cohort.aggregation == "krum":
        chosen = _multikrum(updates, cohort.malicious_sites)
        return {name: total * (len(updates) / len(chosen)) for name, total in sum_points(chosen).items()}
    unit = finest(updates)
    stacks = {
        name: np.stack([_rescaled(one.points[name], one.spacing, unit) for one in updates])
        for name in updates[0].points
    }
    return {name: len(updates) * _middle(stack, cohort) * unit for name, stack in stacks.items()}


def _rescaled(points: Points, spacing: float, unit: float) -> NDArray[np.float64]:
    """In units of a finer lattice: integers, whose float64 sums are exact below 2⁵³."""
    return np.ldexp(points.astype(np.float64), doublings(spacing, unit))


def _middle(stack: NDArray[np.float64], cohort: Cohort) -> NDArray[np.float64]:
    if cohort.aggregation == "median":
        return np.asarray(np.median(stack, axis=0), dtype=np.float64)
    cut = min(cohort.malicious_sites, math.ceil(len(stack) / 2) - 1)
    return np.asarray(trim_mean(stack, (cut + 0.25) / len(stack)), dtype=np.float64)


def _multikrum(updates: list[Update], malicious: int) -> list[Update]:
    contents = [
        RecordDict({"arrays": ArrayRecord({n: Array(p * u.spacing) for n, p in sorted(u.points.items())})})
        for u in updates
    ]
    chosen = select_multikrum(contents, malicious, max(1, len(updates) - malicious))
    return [update for update, content in zip(updates, contents, strict=True) if any(content is one for one in chosen)]
