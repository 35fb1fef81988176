# SPDX-License-Identifier: Apache-2.0
"""`veil rehearse`: the deployed system on this machine, and the proof that it computes what the simulation computes.

Promises real processes, TLS, keys and ledgers; with repeatable noise it says in every output that nothing is private.
"""

from __future__ import annotations

import json
import shutil
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from veil.client.examples import named_columns, read_table
from veil.common.errors import InputError, PlanError, RunError
from veil.common.plan import RunPlan
from veil.common.plan_sections import Columns, Simulation
from veil.common.schedule import schedule
from veil.common.update import Adapter
from veil.server.jobs import Job, Phase
from veil.server.state import RunState
from veil.server.submission import submit
from veil.simulations.baselines import Pool
from veil.simulations.deployment import Deployment
from veil.simulations.federation import federate
from veil.simulations.folders import table_path
from veil.simulations.simulate import Progress, prepare
from veil.simulations.workspace import close_workspaces

_RUN_S = 900.0
_NOT_PRIVATE = "-rehearsal-not-private"


@dataclass(frozen=True, kw_only=True, slots=True)
class Rehearsal:
    """What a rehearsal showed.

    Attributes:
        private: whether the noise was the operating system's.
        sites: their names.
        rounds: how many there were.
        round_s: median seconds of a round after the first, from asking to having aggregated.
        largest_difference: of the deployed adapter from the simulated one; None where noise was not repeated.
        same_adapter: whether every number of both adapters is the same; None likewise.
        accuracy: of the deployed adapter on the held-out records; None for a number.
        r2: of a number, share of its variance that is explained; None for labels.
    """

    private: bool
    sites: tuple[str, ...]
    rounds: int
    round_s: float
    largest_difference: float | None
    same_adapter: bool | None
    accuracy: float | None
    r2: float | None


def rehearse(plan: RunPlan, *, base: Path, output: Path, progress: Progress, repeatable: bool) -> Rehearsal:
    """Deploy a plan's simulated sites as processes, run the plan, and compare.

    Args:
        plan: with a simulation section.
        base: the folder that relative paths of the plan start from.
        output: a new folder; it keeps the coordinator's and the sites' folders, and `rehearsal.json`.
        progress: told how far it is.
        repeatable: take noise from the plan's seed, which is not private, and compare with the simulation.

    Raises:
        VeilError: when anything does not work; the folder then stays, with the logs.
    """
    simulation = plan.simulation
    if simulation is None:
        raise PlanError(f"plan {plan.name} has no [simulation]", "a table to take the sites from", "add [simulation]")
    if output.exists():
        raise InputError(f"--output {output} exists", "a folder that is not there yet", "choose another, or remove it")
    simulation = simulation.model_copy(update={"noise": "fixed" if repeatable else "os"})
    if repeatable:
        plan = plan.model_copy(update={"name": plan.name + _NOT_PRIVATE})
    plan = plan.model_copy(update={"simulation": simulation})
    pool, _ = prepare(plan, simulation, base, progress)
    output.mkdir(parents=True)
    with Deployment.create(output) as deployment:
        enrol(deployment, pool, simulation, base)
        if plan.privacy.noise == "distributed":
            deployment.introduce()
        for name in deployment.sites:
            deployment.start_site(name, fixed_noise=repeatable)
        job = submit(deployment.home, plan, base=base, sites=())
        _follow(deployment, job, progress)
    if repeatable:
        _disown(job)
    shown = _show(plan, pool, RunState.load(job.checkpoint, job.plan), output)
    (output / "rehearsal.json").write_text(json.dumps(asdict(shown), indent=2) + "\n", encoding="utf-8")
    return shown


def enrol(deployment: Deployment, pool: Pool, simulation: Simulation, base: Path, *, runs: int = 1) -> None:
    """Give each site its own records in a table of its own, and a site.toml that admits what the plan asks.

    Args:
        deployment: whose coordinator runs.
        pool: the records and the shares.
        simulation: how they are read.
        base: the folder that relative paths of the plan start from.
        runs: how often the plan may be run.
    """
    source = table_path(simulation.path, base)
    frame, privacy = read_table(source, named_columns(simulation)), pool.plan.privacy
    if (files := simulation.image or simulation.audio) is not None:
        frame[files] = [str((source.parent / one).resolve()) for one in frame[files]]
    columns = simulation.model_dump(include=set(Columns.model_fields), exclude_none=True)
    if simulation.form != "regression":
        columns["labels"] = simulation.labels or {label: label for label in pool.plan.task.labels}
    limits = {
        "epsilon_per_run": privacy.target_epsilon,
        "epsilon_lifetime": privacy.target_epsilon * runs,
        "delta": privacy.target_delta,
        "unit": privacy.unit.value,
        "max_records_per_patient": privacy.max_records_per_patient,
        "approval": "auto-within-limits",
    }
    for share in pool.shares:
        table = _write_rows(frame, share.train, deployment.folder / "tables" / f"{share.site}.parquet")
        file = deployment.add_site(share.site, data={"table": str(table), **columns}, limits=limits)
        if simulation.noise == "fixed":
            file.agent.state.mkdir(parents=True)
            (file.agent.state / "units.key").write_bytes(bytes(32))


def _write_rows(frame: pd.DataFrame, rows: np.ndarray, path: Path) -> Path:
    path.parent.mkdir(exist_ok=True)
    frame.iloc[rows].to_parquet(path, index=False)
    return path.resolve()


def _follow(deployment: Deployment, job: Job, progress: Progress) -> None:
    advance, done = progress.stage("Deployed rounds", len(schedule(job.plan))), 0

    def watch(job: Job) -> None:
        nonlocal done
        now = job.status.rounds_done
        advance(now - done)
        done = now

    deployment.finish(job, _RUN_S, watch)
    status = job.status
    if status.phase is not Phase.FINISHED:
        raise RunError(
            f"run {job.name} {status.phase}: {status.message}", "a run to its end", f"read {deployment.folder}/log"
        )


def _disown(job: Job) -> None:
    """Take back what the coordinator could not know: with repeatable noise, its report promises nothing."""
    path = job.folder / "result" / "report.json"
    report = json.loads(path.read_text(encoding="utf-8"))
    sites = [{**site, "epsilon": None} for site in report["sites"]]
    path.write_text(json.dumps({**report, "private": False, "sites": sites}, indent=2) + "\n", encoding="utf-8")


def _show(plan: RunPlan, pool: Pool, state: RunState, output: Path) -> Rehearsal:
    repeatable = plan.simulation is not None and plan.simulation.noise == "fixed"
    adapter = state.descent.adapter
    apart = difference(adapter, _simulated(plan, pool, output / "simulation")) if repeatable else None
    scores = pool.score(adapter, pool.test)
    return Rehearsal(
        private=not repeatable,
        sites=state.cohort,
        rounds=len(state.records),
        round_s=statistics.median(record.seconds for record in state.records[1:] or state.records),
        largest_difference=apart,
        same_adapter=None if apart is None else apart == 0.0,
        accuracy=scores.accuracy,
        r2=scores.r2,
    )


def _simulated(plan: RunPlan, pool: Pool, folder: Path) -> Adapter:
    """The adapter of the same plan, seeds and shares without a network."""
    workspace = pool.lay_down(folder / "sites", pool.shares)
    width, initial = pool.features.shape[1], pool.with_plan(plan).initial()
    outcome = federate(plan, workspace, sites=len(pool.shares), width=width, initial=initial)
    close_workspaces()
    shutil.rmtree(folder)
    return outcome.adapter


def difference(deployed: Adapter, simulated: Adapter) -> float:
    """Largest absolute difference of any number."""
    return max(
        float(np.abs(tensor.astype(np.float64) - simulated.tensors[name]).max())
        for name, tensor in deployed.tensors.items()
    )
