# SPDX-License-Identifier: Apache-2.0
"""Veil on a workload: its simulation, with ledgers, signatures, the operating system's noise and signed statements.

Promises that nothing of the product is left out of the measured time but reading the given files, and working σ out of
ε, which no other system does (`calibration_s`, once a plan): laying the sites down, the rounds with their ledgers, and
the sites' signed statements are in it.

`SPEED_VEIL` in the environment says which variant: nothing for the local work that the other systems do (dp-fedavg),
`dp-fedsgd` for Veil's own default on (a), `second` for a second run on the same notes in (c). `SPEED_ENGINE` names the
engine, if not the default.
"""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent / "peers"))

from contract import Workload, answer, read_workload

from veil.client.examples import Examples
from veil.common.head import WEIGHT, predict
from veil.common.plan import RunPlan
from veil.common.privacy import Mechanism, spent
from veil.common.schedule import ReleaseKind, schedule
from veil.server.app import Outcome
from veil.simulations.demo import demo_plan
from veil.simulations.engines import Engine
from veil.simulations.federation import federate
from veil.simulations.partition import Share
from veil.simulations.simulate import prepare
from veil.simulations.workspace import Workspace

DELTA = 1e-5


class Quiet:
    """Nobody is told how far it is."""

    def stage(self, name: str, total: int) -> object:
        """A stage that is not shown."""
        return lambda done: None


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """One run.

    Attributes:
        calibration_s: before, for the plan's σ.
        seconds: from the start of the simulation to its outcome.
        setup_s: of it, before the first round.
        outcome: what it left.
        accuracy: of the tuned head.
        client_rounds: answers of sites.
    """

    calibration_s: float
    seconds: float
    setup_s: float
    outcome: Outcome
    accuracy: float


def main() -> None:
    """Run a workload and answer."""
    work, variant = read_workload(), os.environ.get("SPEED_VEIL", "")
    measured = notes(work, variant == "second") if work.notes is not None else features(work, variant)
    training = [r for r in measured.outcome.records if r.kind in (ReleaseKind.GRADIENT, ReleaseKind.DELTA)]
    answer(
        seconds=round(measured.seconds, 4),
        setup_s=round(measured.setup_s, 4),
        calibration_s=round(measured.calibration_s, 4),
        client_rounds=sum(len(record.sites) for record in training),
        wire_bytes=training[-1].bytes_down + training[-1].bytes_up,
        accuracy=round(measured.accuracy, 4),
        version=f"veil {version('veil')}, numpy {np.__version__}",
    )


def features(work: Workload, variant: str) -> Measured:
    """Workloads (a) and (b): sites of equal size with given features."""
    rows, labels = work.read_features(), work.read_labels()
    plan = plan_of(work, variant)
    examples = Examples(inputs=rows, labels=labels, units=np.arange(len(labels)).astype(np.str_))
    shares = tuple(
        Share(
            site=f"site-{site:05d}",
            train=np.arange(work.rows(site).start, work.rows(site).stop),
            test=np.zeros(0, np.int64),
        )
        for site in range(work.sites)
    )
    calibrating = time.monotonic()
    schedule(plan)
    began = time.monotonic()
    workspace = Workspace.create(Path(work.folder) / "sites", plan, rows, examples, shares)
    outcome, first = run(plan, workspace, work.sites, work.width)
    seconds = time.monotonic() - began
    correct = predict(outcome.adapter, np.asarray(rows)).argmax(axis=1) == labels
    return Measured(
        calibration_s=began - calibrating,
        seconds=seconds,
        setup_s=first - began,
        outcome=outcome,
        accuracy=float(correct.mean()),
    )


def notes(work: Workload, second: bool) -> Measured:
    """Workload (c): the demo from its table, features and all; `second` finds the features of a run before."""
    plan = demo_plan()
    if plan.simulation is None:
        raise ValueError("the demo has no [simulation]; expected one")
    os.environ["VEIL_CACHE"] = str(Path(work.folder) / "cache")
    if second:
        prepare(plan, plan.simulation, Path.cwd(), Quiet())
    calibrating = time.monotonic()
    schedule(plan)
    began = time.monotonic()
    pool, _ = prepare(plan, plan.simulation, Path.cwd(), Quiet())
    workspace = pool.lay_down(Path(work.folder) / "sites", pool.shares)
    outcome, first = run(plan, workspace, len(pool.shares), pool.features.shape[1])
    seconds = time.monotonic() - began
    accuracy = pool.score(outcome.adapter, pool.test).accuracy
    return Measured(
        calibration_s=began - calibrating,
        seconds=seconds,
        setup_s=first - began,
        outcome=outcome,
        accuracy=accuracy,
    )


def run(plan: RunPlan, workspace: Workspace, sites: int, width: int) -> tuple[Outcome, float]:
    """The federation, and when its first round was about to begin."""
    first = time.monotonic()
    engine = Engine(os.environ.get("SPEED_ENGINE", Engine.INPROCESS))
    outcome = federate(plan, workspace, sites=sites, width=width, engine=engine)
    if not np.abs(outcome.adapter.tensors[WEIGHT]).max() > 0:
        raise ValueError("the head did not move; expected a trained one")
    return outcome, first


def plan_of(work: Workload, variant: str) -> RunPlan:
    """The plan with the workload's local work; ε is what its σ costs (without noise, any)."""
    per_round = variant == "dp-fedsgd"
    steps = work.rounds if per_round else work.rounds * work.local_steps
    training = {
        "algorithm": "dp-fedsgd" if per_round else "dp-fedavg",
        "rounds": work.rounds,
        "centre": False,
        "sample_rate": None if per_round else work.sample_rate,
        "learning_rate": None if per_round else work.learning_rate,
    }
    mechanism = Mechanism(
        noise_multiplier=work.sigma if work.private else 1.0,
        max_grad_norm=work.max_grad_norm,
        sample_rate=1.0 if per_round else work.sample_rate,
        steps=steps,
    )
    return RunPlan.model_validate(
        {
            "name": f"speed-{work.workload}",
            "seed": work.seed,
            "task": {"kind": "tabular-classification", "labels": [f"class {one}" for one in range(work.classes)]},
            "training": training,
            "privacy": {
                "target_epsilon": spent([mechanism], DELTA).epsilon if work.private else 1.0,
                "target_delta": DELTA,
                "max_grad_norm": work.max_grad_norm if work.private else 1e3,
            },
            "cohort": {
                "min_sites": work.cohort,
                "sites_per_round": work.cohort,
                "nominal_units": work.offsets[1] - work.offsets[0],
            },
            "simulation": {
                "path": "given.npy",
                "label": "label",
                "features": ["x"],
                "sites": work.sites,
                "noise": "os" if work.private else "none",
            },
        }
    )


if __name__ == "__main__":
    main()
