# SPDX-License-Identifier: Apache-2.0
"""What the federation is compared with: each site alone, all records in one place under DP, and without privacy.

Promises that the two private baselines are the very same program with one site in it, at the same ε.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
from numpy.typing import NDArray

from veil.client.examples import Examples
from veil.common.head import predict
from veil.common.lazy_backbone import LazyBackbone
from veil.common.plan import RunPlan
from veil.common.plan_sections import Training, Transfer, clipping_bound
from veil.common.update import Adapter
from veil.simulations.evaluation import Scores, mean_scores, non_private, score, score_outcomes
from veil.simulations.federation import federate
from veil.simulations.partition import Share
from veil.simulations.workspace import Workspace

if TYPE_CHECKING:
    from veil.common.tunable import TunableModel

Noise = Literal["os", "fixed", "none"]


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
        backbone: what the features are of; None for numeric columns.
    """

    plan: RunPlan
    examples: Examples
    features: NDArray[np.floating]
    shares: tuple[Share, ...]
    backbone: LazyBackbone | None = None

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
        pinned = self.backbone.pinned if self.backbone else None
        return Workspace.create(folder, self.plan, np.load(features, mmap_mode="r"), self.examples, shares, pinned)

    def initial(self) -> Adapter | None:
        """What a model that is tuned below its head starts from."""
        return self._model().initial() if self.plan.transfer.deep else None

    def with_plan(self, plan: RunPlan) -> Pool:
        """The same records under another plan."""
        return replace(self, plan=plan)

    def _model(self) -> TunableModel:
        from veil.simulations.tuned_model import tuned_model

        if self.backbone is None:
            raise ValueError("a tuned model without a backbone; expected a plan with one")
        return tuned_model(self.backbone, self.plan)

    def answers(self, adapter: Adapter, rows: NDArray[np.int64]) -> NDArray[np.float64]:
        """What an adapter's model says of some records, [m, c]."""
        if self.plan.transfer.deep:
            model, inputs = self._model(), self.examples.take(rows).inputs
            with model.at(adapter):
                return model.probabilities(cast(Sequence[Any], inputs))
        return predict(adapter, self.features[rows], self.plan.task.form)

    def score(self, adapter: Adapter, rows: NDArray[np.int64]) -> Scores:
        """Judge an adapter on some records."""
        if self.examples.truths is not None:
            asked, model = self.examples.take(rows), self._model()
            with model.at(adapter):
                outcomes = model.outcomes(cast(Sequence[Any], asked.inputs), asked.truths or ())
            return score_outcomes(outcomes, self.plan.task)
        return score(self.answers(adapter, rows), self.examples.labels[rows], self.plan.task.target)


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
    if "head_only" in wanted:
        advance("the head alone, federated")
        metrics["head_only"] = _head_only(pool, folder / "head-only")
    if "non_private" in wanted and pool.plan.transfer.deep:
        advance("all records in one place, without privacy")
        everyone = Share(site="pooled", train=np.concatenate([share.train for share in pool.shares]), test=pool.test)
        metrics["non_private"] = pool.score(
            _alone(pool, folder / "non-private", everyone, size=len(pool.shares), noise="none"), pool.test
        )
    elif "non_private" in wanted:
        advance("all records in one place, without privacy")
        train = np.concatenate([share.train for share in pool.shares])
        metrics["non_private"] = non_private(
            pool.features[train],
            pool.examples.labels[train],
            pool.features[pool.test],
            pool.examples.labels[pool.test],
            len(pool.plan.task.labels),
            pool.plan.task.target,
        )
    return Baselines(metrics=metrics, local=local)


def _head_only(pool: Pool, folder: Path) -> Scores:
    """The same federation with nothing but the head to tune, by the head's own rules."""
    plan = pool.plan
    privacy = plan.privacy.model_copy(update={"max_grad_norm": clipping_bound(len(plan.task.labels), plan.task.form)})
    training = Training(rounds=min(plan.training.rounds, 30), centre=plan.training.centre)
    simulation = None if plan.simulation is None else plan.simulation.model_copy(update={"baselines": ()})
    changes = {"transfer": Transfer(), "privacy": privacy, "training": training, "simulation": simulation}
    heads = pool.with_plan(plan.model_copy(update=changes))
    workspace = heads.lay_down(folder, pool.shares)
    outcome = federate(heads.plan, workspace, sites=len(pool.shares), width=pool.features.shape[1])
    return heads.score(outcome.adapter, pool.test)


def _alone(pool: Pool, folder: Path, share: Share, *, size: int = 1, noise: Noise | None = None) -> Adapter:
    """One site in the place of `size` sites, with noise of another kind where one is named."""
    nominal = pool.plan.cohort.nominal_units
    changes = {"min_sites": 1, "nominal_units": None if nominal is None else nominal * size}
    cohort = pool.plan.cohort.model_copy(update=changes)
    privacy = pool.plan.privacy.model_copy(update={"noise": "local"})  # one site has nobody to share it with
    simulation = pool.plan.simulation
    if noise is not None and simulation is not None:
        simulation = simulation.model_copy(update={"noise": noise})
    plan = pool.plan.model_copy(update={"cohort": cohort, "privacy": privacy, "simulation": simulation})
    pool = pool.with_plan(plan)
    workspace = pool.lay_down(folder, (share,))
    return federate(plan, workspace, sites=1, width=pool.features.shape[1], initial=pool.initial()).adapter
