# SPDX-License-Identifier: Apache-2.0
"""What the federation is compared with: each site alone, all records in one place under DP, and without privacy.

Promises that the two private baselines are the very same program with one site in it, at the same ε.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from veil.client.examples import Examples
from veil.common.plan import RunPlan
from veil.common.update import Adapter
from veil.simulations.evaluation import Scores, mean_scores, non_private, score_adapter
from veil.simulations.federation import federate
from veil.simulations.partition import Share
from veil.simulations.workspace import Workspace


@dataclass(frozen=True, kw_only=True, slots=True)
class Baselines:
    """Scores on all held-out records, and each site's own model.

    Attributes:
        metrics: by name; `local_only` is the mean over the sites' models.
        local: each site's own adapter, where asked for.
    """

    metrics: dict[str, Scores]
    local: dict[str, Adapter]


@dataclass(frozen=True, kw_only=True, slots=True)
class Pool:
    """All records of a simulation, as features.

    Attributes:
        plan: the run's plan.
        examples: the records.
        features: [n, d].
        shares: how they are divided.
    """

    plan: RunPlan
    examples: Examples
    features: NDArray[np.floating]
    shares: tuple[Share, ...]

    @property
    def test(self) -> NDArray[np.int64]:
        """Everybody's held-out records."""
        return np.concatenate([share.test for share in self.shares])

    def lay_down(self, folder: Path, shares: tuple[Share, ...]) -> Workspace:
        """A workspace of some shares; those in one folder share one file of features."""
        features = folder.parent / "features.npy"
        if not features.exists():
            folder.parent.mkdir(parents=True, exist_ok=True)
            np.save(features, self.features)
        return Workspace.create(folder, self.plan, np.load(features, mmap_mode="r"), self.examples, shares)

    def score(self, adapter: Adapter, rows: NDArray[np.int64]) -> Scores:
        """Judge an adapter on some records."""
        return score_adapter(adapter, self.features[rows], self.examples.labels[rows])


def run_baselines(pool: Pool, folder: Path, advance: Callable[[str], None]) -> Baselines:
    """Run what the plan asks for.

    Args:
        pool: the records.
        folder: where to lay workspaces down.
        advance: called with the name of what comes next.
    """
    wanted = pool.plan.simulation.baselines if pool.plan.simulation else ()
    metrics: dict[str, Scores] = {}
    local: dict[str, Adapter] = {}
    if "local_only" in wanted:
        for index, share in enumerate(pool.shares):
            advance(f"{share.site} alone")
            local[share.site] = _alone(pool, folder / f"local-{index}", share)
        metrics["local_only"] = mean_scores([pool.score(adapter, pool.test) for adapter in local.values()])
    if "centralized_dp" in wanted:
        advance("all records in one place, with DP")
        everyone = Share(site="pooled", train=np.concatenate([share.train for share in pool.shares]), test=pool.test)
        metrics["centralized_dp"] = pool.score(
            _alone(pool, folder / "centralized", everyone, size=len(pool.shares)), pool.test
        )
    if "non_private" in wanted:
        advance("all records in one place, without privacy")
        train = np.concatenate([share.train for share in pool.shares])
        metrics["non_private"] = non_private(
            pool.features[train],
            pool.examples.labels[train],
            pool.features[pool.test],
            pool.examples.labels[pool.test],
            len(pool.plan.task.labels),
        )
    return Baselines(metrics=metrics, local=local)


def _alone(pool: Pool, folder: Path, share: Share, *, size: int = 1) -> Adapter:
    """One site in the place of `size` sites."""
    nominal = pool.plan.cohort.nominal_units
    changes = {"min_sites": 1, "nominal_units": None if nominal is None else nominal * size}
    cohort = pool.plan.cohort.model_copy(update=changes)
    plan = pool.plan.model_copy(update={"cohort": cohort})
    workspace = pool.lay_down(folder, (share,))
    return federate(plan, workspace, sites=1, width=pool.features.shape[1]).adapter
