# SPDX-License-Identifier: Apache-2.0
"""When more than a head is worth its ε: learning curves of the modes, with ε = 8 and without noise, beside the head.

Every run is a federation as `veil simulate` plays it; what is judged are held-out records that never train. A run that
is in the file already is not played again, so that the study can be stopped and continued.

    python benchmarks/transfer.py --datasets ../shared/datasets [--only Adverse] [--seeds 0 1 2]
    python benchmarks/transfer.py --lengths
    python benchmarks/transfer.py --page
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from transfer_page import write_page

from veil.common.pickled import SMOLLM2
from veil.common.plan import RunPlan, parse_plan
from veil.common.trained import is_tuned
from veil.common.update import Adapter
from veil.simulations.baselines import Pool
from veil.simulations.federation import federate
from veil.simulations.screen import Screen
from veil.simulations.simulate import prepare
from veil.simulations.tuned_model import forget, tuned_model
from veil.simulations.workspace import close_workspaces

HERE = Path(__file__).parent
RUNS = HERE.parent / "runs" / "transfer" / "runs.jsonl"
LENGTHS = RUNS.with_name("lengths.jsonl")
LOOKED_AT = 100
"""Records whose gradients are measured."""

POINTS = 4
"""Times that a curve is looked at."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One line of a study.

    Attributes:
        transfer: the plan's [transfer].
        training: the plan's [training].
        privacy: keys of the plan's [privacy] that are the line's own.
    """

    transfer: dict[str, Any]
    training: dict[str, Any]
    privacy: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """As the page shows it."""
        extras = [f"{key} = {value}" for key, value in self.transfer.items() if key not in ("mode", "head_rounds")]
        extras += [f"{value} noise" for key, value in self.privacy.items() if key == "noise"]
        return str(self.transfer["mode"]) + (f" ({', '.join(extras)})" if extras else "")


@dataclass(frozen=True, kw_only=True)
class Study:
    """Lines that are compared on the same records.

    Attributes:
        name: of the study.
        set: of the plan under `plans`.
        sites: how many.
        epsilon: of each unit at each site.
        cases: the lines.
        noises: "os" for the private run, "none" for the same plan without noise.
        judged: held-out records that every line is judged on, the same of all.
        rows: of the table, drawn by a fixed seed; None for all.
        backbone: the plan's [backbone] where it is not the set's own.
        task: keys of the plan's [task] that differ.
        privacy: keys of the plan's [privacy] of all lines.
    """

    name: str
    set: str
    sites: int
    epsilon: float
    cases: tuple[Case, ...]
    noises: tuple[str, ...] = ("os", "none")
    judged: int = 1000
    rows: int | None = None
    backbone: dict[str, str] | None = None
    task: dict[str, Any] = field(default_factory=dict)
    privacy: dict[str, Any] = field(default_factory=dict)


_HEAD = Case(transfer={"mode": "head"}, training={"rounds": 30})
_SMOLLM2 = {
    "source": SMOLLM2.source,
    "sha256": "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    "licence": "Apache-2.0",
}
_SHARED = {"noise": "distributed"}


HEAD_ROUNDS = 12

MEASURED: dict[str, tuple[dict[str, Any], ...]] = {
    "Adverse": (
        {"mode": "prompt"},
        {"mode": "lora", "layers": 3},
        {"mode": "adapter"},
        {"mode": "bias"},
        {"mode": "last-layers"},
        {"mode": "full"},
    ),
    "Chest": ({"mode": "bias"}, {"mode": "last-layers"}, {"mode": "full"}),
    "Film": ({"mode": "lora", "layers": 3},),
}
"""Modes whose gradients' lengths are measured, by the study's name."""


def _deep(rounds: int, **transfer: Any) -> Case:
    """Rounds of the head alone, and then so many, each of a tenth of the units: what two cores do in minutes."""
    training = {"rounds": HEAD_ROUNDS + rounds, "sample_rate": 0.1}
    return Case(transfer={**transfer, "head_rounds": HEAD_ROUNDS}, training=training)


STUDIES = (
    Study(
        name="Chest X-rays, Lite0 at 96 pixels",
        set="chest_xray_pneumonia",
        sites=4,
        epsilon=8.0,
        task={"image_size": 96},
        cases=(_HEAD, _deep(24, mode="last-layers"), _deep(12, mode="full")),
    ),
    Study(
        name="Adverse events, MiniLM",
        set="ade_corpus_v2",
        sites=4,
        epsilon=8.0,
        privacy={"max_records_per_patient": 2},
        cases=(_HEAD, _deep(24, mode="lora", layers=3), _deep(24, mode="last-layers")),
    ),
    Study(
        name="Film reviews, SmolLM2-135M",
        set="sst2",
        sites=4,
        epsilon=8.0,
        rows=1500,
        judged=500,
        backbone=_SMOLLM2,
        cases=(_HEAD, _deep(12, mode="lora", layers=3)),
    ),
    Study(
        name="SST-2 at ε = 3 over ten sites, MiniLM",
        set="sst2",
        sites=10,
        epsilon=3.0,
        noises=("os",),
        judged=2000,
        cases=(
            _HEAD,
            replace(_HEAD, privacy=_SHARED),
            replace(_deep(24, mode="lora", layers=3), privacy=_SHARED),
        ),
    ),
)


def main() -> None:
    """Play what is missing, or write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--datasets", type=Path, default=HERE.parent.parent / "shared" / "datasets")
    parser.add_argument("--only", default="", help="words of a study's name")
    parser.add_argument("--mode", default="", help="beginning of a mode's name")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--lengths", action="store_true", help="measure how long gradients are, instead")
    parser.add_argument("--page", action="store_true")
    given = parser.parse_args()
    RUNS.parent.mkdir(parents=True, exist_ok=True)
    if given.page:
        write_page(_lines(RUNS), _lines(LENGTHS), [study.name for study in STUDIES], HERE)
        return
    if given.lengths:
        rows = [row for word in MEASURED for row in measure(word, given.datasets)]
        LENGTHS.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return
    for seed in given.seeds:
        for study in (one for one in STUDIES if given.only in one.name):
            for case in (one for one in study.cases if one.name.startswith(given.mode)):
                for noise in study.noises:
                    row = {"study": study.name, "mode": case.name, "noise": noise, "seed": seed}
                    if any(row.items() <= one.items() for one in _lines(RUNS)):
                        continue
                    row |= play(study, case, noise, seed, given.datasets)
                    with RUNS.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(row) + "\n")
                    print(json.dumps({key: value for key, value in row.items() if key != "plan"}), flush=True)


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def play(study: Study, case: Case, noise: str, seed: int, datasets: Path) -> dict[str, Any]:
    """One federation, judged along its way."""
    plan, began = _plan(study, case, noise, seed), time.monotonic()
    if plan.simulation is None:
        raise ValueError(f"{study.set} without [simulation]; expected one")
    with Screen(quiet=True) as screen, tempfile.TemporaryDirectory() as folder:
        base = datasets if study.rows is None else _part(datasets, plan.simulation.path, study.rows, Path(folder))
        pool, _ = prepare(plan, plan.simulation, base, screen)
        judged = np.random.default_rng(0).permutation(pool.test)[: study.judged]
        looked = {*np.linspace(0, plan.training.rounds, POINTS + 1).astype(int)[1:-1].tolist()}
        curve: list[dict[str, float]] = []
        outcome = federate(
            plan,
            pool.lay_down(Path(folder) / "sites", pool.shares),
            sites=len(pool.shares),
            width=pool.features.shape[1],
            initial=pool.initial(),
            watch=lambda state: curve.extend(_look(pool, state, judged, looked)),
        )
        final = pool.score(outcome.adapter, judged)
        close_workspaces()
        forget()
    return {
        "set": study.set,
        "sites": study.sites,
        "epsilon": study.epsilon,
        "units": int(sum(len(np.unique(pool.examples.units[share.train])) for share in pool.shares)),
        "judged": len(judged),
        "accuracy": 100 * final.accuracy,
        "macro_f1": 100 * final.macro_f1,
        "curve": [*curve, {"round": plan.training.rounds, "accuracy": 100 * final.accuracy}],
        "trained": int(sum(tensor.size for tensor in outcome.adapter.tensors.values()) - pool.features.shape[1]),
        "seconds": round(time.monotonic() - began, 1),
        "plan": json.loads(plan.to_json()),
    }


def measure(word: str, datasets: Path) -> Iterator[dict[str, Any]]:
    """How long gradients below the head are beside the head's, where the head's own rounds end, without noise."""
    study = next(one for one in STUDIES if word in one.name)
    alone = _plan(study, Case(transfer={"mode": "head"}, training={"rounds": HEAD_ROUNDS}), "none", 0)
    if alone.simulation is None:
        raise ValueError(f"{study.set} without [simulation]; expected one")
    with Screen(quiet=True) as screen, tempfile.TemporaryDirectory() as folder:
        base = datasets if study.rows is None else _part(datasets, alone.simulation.path, study.rows, Path(folder))
        pool, _ = prepare(alone, alone.simulation, base, screen)
        workspace, width = pool.lay_down(Path(folder) / "sites", pool.shares), pool.features.shape[1]
        head = federate(alone, workspace, sites=len(pool.shares), width=width).adapter
        close_workspaces()
        for transfer in MEASURED[word]:
            plan = _plan(study, replace(_deep(1), transfer=transfer), "none", 0)
            lengths = np.array(list(_lengths(pool.with_plan(plan), head)))
            ratio = float(np.sqrt((lengths[:, 1] ** 2).mean() / (lengths[:, 0] ** 2).mean()))
            row = {"study": study.name, "mode": transfer["mode"], "records": len(lengths), "ratio": ratio}
            print(json.dumps(row), flush=True)
            yield row
            forget()


def _lengths(pool: Pool, head: Adapter) -> Iterator[tuple[float, float]]:
    """Of some records' gradients: of the head's and of the others' numbers."""
    if pool.backbone is None:
        raise ValueError("no backbone; expected one")
    model, inputs = tuned_model(pool.backbone, pool.plan), pool.examples.inputs
    adapter = Adapter(tensors={**model.initial().tensors, **head.tensors})
    trained = tuple(sorted(filter(is_tuned, adapter.tensors)))
    rows = np.random.default_rng(0).permutation(np.concatenate([share.train for share in pool.shares]))[:LOOKED_AT]
    units = ([model.record(inputs[row], pool.examples.labels[row])] for row in rows)
    with model.at(adapter, trained):
        for gradient in model.gradients(units, trained):
            if gradient is not None:
                own, *below = [float(one.double().norm()) for one in gradient]
                yield own, math.hypot(*below)


def _part(datasets: Path, table: str, rows: int, folder: Path) -> Path:
    """A folder with some rows of a table in its place, the same for every run."""
    (folder / "tables" / table).parent.mkdir(parents=True)
    whole = pd.read_csv(datasets / table)
    whole.sample(rows, random_state=0).to_csv(folder / "tables" / table, index=False)
    return folder / "tables"


def _look(pool: Pool, state: Any, judged: Any, looked: set[int]) -> Iterator[dict[str, float]]:
    number = state.records[-1].round
    if number in looked:
        yield {"round": number, "accuracy": 100 * pool.score(state.descent.adapter, judged).accuracy}


def _plan(study: Study, case: Case, noise: str, seed: int) -> RunPlan:
    document = json.loads(parse_plan(HERE / "plans" / f"{study.set}.toml").to_json())
    document["seed"] = seed
    unit = document["privacy"]["unit"]
    document["privacy"] = {"unit": unit, "target_epsilon": study.epsilon, **study.privacy, **case.privacy}
    document["transfer"], document["training"] = case.transfer, case.training
    document["task"] |= study.task
    document["cohort"] = {"min_sites": study.sites}
    document["simulation"] |= {"sites": study.sites, "noise": noise, "baselines": [], "selector": False}
    if study.backbone:
        document["backbone"] = study.backbone
    return RunPlan.from_json(json.dumps(document))


if __name__ == "__main__":
    main()
