# SPDX-License-Identifier: Apache-2.0
"""A whole federation on this machine: records → features → shares → federation → baselines → output folder.

Promises that the output folder appears complete or not at all.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from veil.client.examples import Examples, read_examples
from veil.client.features import cached_features
from veil.client.ledger import Entry, entries_by_site, total, without_masks
from veil.common.errors import PlanError
from veil.common.keys import NodeKey
from veil.common.lazy_backbone import LazyBackbone, find_backbone
from veil.common.plan import RunPlan
from veil.common.plan_sections import STRUCTURED, Simulation
from veil.common.privacy import spent
from veil.common.schedule import schedule
from veil.common.update import Adapter
from veil.common.weights import cache_folder
from veil.server.app import Outcome
from veil.server.documents import write_documents
from veil.server.model import TunedModel
from veil.server.state import RunState
from veil.simulations.baselines import Baselines, Pool, run_baselines
from veil.simulations.engine import check_engine
from veil.simulations.engines import Engine
from veil.simulations.fairness import check_groups, fairness
from veil.simulations.federation import federate
from veil.simulations.folders import fresh_folder, table_path
from veil.simulations.partition import Share, partition
from veil.simulations.picture import draw_picture
from veil.simulations.report import Curve, SimulationResult, SiteResult, build_report, refusals_of
from veil.simulations.selection import SiteSelection, run_selector
from veil.simulations.workspace import Workspace, close_workspaces

_JUDGED = 10
"""Rounds after which a model that is tuned below its head is judged, at most."""


class Progress(Protocol):
    """Who is told how far a simulation is."""

    def stage(self, name: str, total: int) -> Callable[[int], None]:
        """A new stage of `total` steps; the returned function advances it."""
        ...


@dataclass(kw_only=True)
class Clock:
    """Seconds by stage."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Note how long the block took."""
        start = time.monotonic()
        yield
        self.seconds[name] = round(time.monotonic() - start, 3)


def simulate(
    plan: RunPlan, *, base: Path, output: Path, progress: Progress, engine: Engine = Engine.INPROCESS
) -> SimulationResult:
    """Run a plan's simulation and write its output folder.

    Args:
        plan: with a simulation section.
        base: the folder that relative paths of the plan start from.
        output: a folder that does not exist yet.
        progress: told how far it is.
        engine: where the apps run.

    Returns:
        what the report is made of.

    Raises:
        VeilError: with nothing left behind.
    """
    if plan.simulation is None:
        raise PlanError(f"plan {plan.name} has no [simulation]", "a table to simulate sites from", "add [simulation]")
    check_engine(engine)
    schedule(plan)
    with fresh_folder(output) as partial:
        clock = Clock()
        with clock.stage("total_s"):
            pool, backbone = prepare(plan, plan.simulation, base, progress, clock)
            pool.initial()  # a mode that does not fit the backbone ends here
            work = partial / "work"
            workspace = pool.lay_down(work / "federation", pool.shares)
            with clock.stage("federation_s"):
                outcome, adapters = _federate(pool, workspace, engine, progress)
            with clock.stage("baselines_s"):
                advance = progress.stage("Baselines", _baseline_count(pool))
                baselines = run_baselines(pool, work, lambda name: advance(1))
            with clock.stage("selector_s"):
                sites = len(pool.shares) if plan.simulation.selector else 0
                selections = run_selector(pool, outcome.adapter, progress.stage("Choosing", sites))
        result = _result(pool, workspace, outcome, adapters, baselines, selections, clock.seconds, engine)
        tuned = TunedModel(plan=plan, adapter=outcome.adapter, backbone=backbone, anomaly=outcome.anomaly)
        tuned.save(partial / "model")
        report = build_report(result)
        (partial / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        write_documents(
            partial,
            plan,
            outcome.job,
            records=outcome.records,
            evidence=outcome.evidence,
            report=report,
            key=NodeKey.generate(),
            simulation=True,
        )
        draw_picture(result, partial / "picture.png")
        workspace.copy_ledger_to(partial / "ledger.sqlite")
        close_workspaces()
        shutil.rmtree(work)
    return result


def prepare(
    plan: RunPlan, simulation: Simulation, base: Path, progress: Progress, clock: Clock | None = None
) -> tuple[Pool, LazyBackbone | None]:
    """Read the pooled records, divide them, compute their features.

    Args:
        plan: what is to be run.
        simulation: its simulation section.
        base: the folder that relative paths of the plan start from.
        progress: told how far it is.
        clock: notes the seconds.

    Raises:
        VeilError: when table, weights or shares do not fit the plan.
    """
    clock = clock or Clock()
    with clock.stage("records_s"):
        examples = read_examples(
            table_path(simulation.path, base),
            simulation,
            plan.task,
            unit=plan.privacy.unit,
            site_column=simulation.site if simulation.partition == "site-column" else None,
        )
        check_groups(examples.groups)
        shares = partition(
            examples, simulation, seed=plan.seed, delta=plan.privacy.target_delta, labels=plan.task.labels
        )
        _check_cohort(plan, shares)
        schedule(plan)
    with clock.stage("features_s"):
        backbone, features = _features(plan, simulation, examples, base, progress)
    return Pool(plan=plan, examples=examples, features=features, shares=shares, backbone=backbone), backbone


def _check_cohort(plan: RunPlan, shares: tuple[Share, ...]) -> None:
    if len(shares) < plan.cohort.min_sites:
        raise PlanError(
            f"cohort.min_sites = {plan.cohort.min_sites} with {len(shares)} sites",
            "at least as many sites as the cohort needs",
            "lower cohort.min_sites or simulate more sites",
        )


def _features(
    plan: RunPlan, simulation: Simulation, examples: Examples, base: Path, progress: Progress
) -> tuple[LazyBackbone | None, NDArray[np.floating]]:
    if plan.backbone is None or isinstance(examples.inputs, np.ndarray):
        return None, np.asarray(examples.inputs, dtype=np.float64)
    backbone = find_backbone(plan.backbone, plan.task, base=base, device=simulation.device)
    if plan.task.form in STRUCTURED:
        return backbone, np.zeros((len(examples), 0), dtype=np.float32)
    features = cached_features(
        backbone,
        examples.inputs,
        cache_folder() / "features",
        precision=simulation.cache_precision,
        advance=progress.stage("Frozen features", len(examples)),
    )
    return backbone, features


def _federate(pool: Pool, workspace: Workspace, engine: Engine, progress: Progress) -> tuple[Outcome, list[Adapter]]:
    advance = progress.stage("Federated rounds", len(schedule(pool.plan)))
    adapters: list[Adapter] = []

    def watch(state: RunState) -> None:
        adapters.append(state.descent.adapter)
        advance(1)

    outcome = federate(
        pool.plan,
        workspace,
        sites=len(pool.shares),
        width=pool.features.shape[1],
        engine=engine,
        watch=watch,
        initial=pool.initial(),
    )
    return outcome, adapters


def _baseline_count(pool: Pool) -> int:
    wanted = pool.plan.simulation.baselines if pool.plan.simulation else ()
    return len(pool.shares) * ("local_only" in wanted) + len(set(wanted) - {"local_only"})


def _result(
    pool: Pool,
    workspace: Workspace,
    outcome: Outcome,
    adapters: list[Adapter],
    baselines: Baselines,
    selections: Mapping[str, SiteSelection],
    seconds: dict[str, float],
    engine: Engine,
) -> SimulationResult:
    ledgers = entries_by_site(workspace.ledger_path)
    sites = tuple(
        _site_result(pool, ledgers.get(share.site, ()), outcome, share, baselines, selections.get(share.site))
        for share in pool.shares
    )
    return SimulationResult(
        plan=pool.plan,
        sites=sites,
        metrics={"federated": pool.score(outcome.adapter, pool.test), **baselines.metrics},
        curve=_curve(pool, outcome, adapters, private=all(np.isfinite(s.spent.epsilon) for s in sites)),
        records=outcome.records,
        timing=seconds,
        engine=engine.value,
        estimated_units=outcome.estimated_units,
        evaluation=outcome.evaluation,
        mismatch=outcome.mismatch,
        groups=_groups(pool, outcome.adapter),
    )


def _groups(pool: Pool, adapter: Adapter) -> dict[str, Any] | None:
    """The common model by group of everybody's held-out records; None where no column is named."""
    groups, test = pool.examples.groups, pool.test
    if groups is None:
        return None
    labels = np.asarray(pool.examples.labels[test], dtype=np.int64)
    return fairness(pool.answers(adapter, test), labels, groups[test], pool.plan.task.labels)


def _site_result(
    pool: Pool,
    entries: Sequence[Entry],
    outcome: Outcome,
    share: Share,
    baselines: Baselines,
    selection: SiteSelection | None,
) -> SiteResult:
    own = baselines.local.get(share.site)
    return SiteResult(
        name=share.site,
        records=len(share.train),
        test_records=len(share.test),
        units=len(np.unique(pool.examples.units[share.train])),
        spent=total(entries, pool.plan.privacy.target_delta),
        unmasked=without_masks(entries, pool.plan.privacy.target_delta),
        rounds=len(entries),
        refusals=refusals_of(outcome.records, share.site),
        federated=pool.score(outcome.adapter, share.test),
        local_only=pool.score(own, share.test) if own else None,
        local_only_everywhere=pool.score(own, pool.test) if own else None,
        selection=selection,
    )


def _curve(pool: Pool, outcome: Outcome, adapters: list[Adapter], *, private: bool) -> tuple[Curve, ...]:
    """Quality and ε after each round, or some rounds of a model that takes long to ask, at a site that took part in
    all of them."""
    done = [release.mechanism for release in schedule(pool.plan)]
    delta = pool.plan.privacy.target_delta
    every = math.ceil(len(adapters) / _JUDGED) if pool.plan.transfer.deep else 1
    return tuple(
        Curve(
            round=record.round,
            scores=pool.score(adapter, pool.test),
            epsilon=spent(done[: index + 1], delta).epsilon if private else float("inf"),
        )
        for index, (record, adapter) in enumerate(zip(outcome.records, adapters, strict=True))
        if (len(adapters) - 1 - index) % every == 0
    )
