# SPDX-License-Identifier: Apache-2.0
"""The accuracy study, to accuracy.json and RESULTS.md: Veil, FedAvg with Opacus, pooling, staying alone, on five sets.

Promises that every seed is another split and other noise, that all methods of a seed see the same split, that Veil's
rows are the product with its defaults (plan → sites with ledgers → federation), and that nothing is chosen by looking:
what the tuned rows choose, they choose on other splits. A finished run is a line of the work file and is not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
from accuracy_page import save
from accuracy_rows import METHODS, OWN, Run
from fedavg_opacus import GRID, Settings, fedavg
from figures import changed, fresh
from sound import sound_plan, sound_table

from veil.common.plan import parse_plan
from veil.simulations.baselines import Pool, run_baselines
from veil.simulations.demo import demo_plan
from veil.simulations.evaluation import Scores, mean_scores, non_private
from veil.simulations.federation import federate
from veil.simulations.partition import Share, partition
from veil.simulations.screen import Screen
from veil.simulations.simulate import prepare
from veil.simulations.workspace import close_workspaces

HERE = Path(__file__).parent
WORK = HERE.parent / "runs" / "accuracy" / "runs.jsonl"
TUNING_SEEDS = (100, 101, 102)
DIRICHLET = 0.3

PLANS: dict[str, dict[str, dict[str, object]]] = {
    "veil-local": {},
    "veil-distributed": {"privacy": {"noise": "distributed"}},
    "veil-dp-fedavg": {
        "training": {"algorithm": "dp-fedavg", "rounds": 20, "local_epochs": 1, "sample_rate": 0.1},
    },
    "veil-no-noise": {
        "privacy": {"max_grad_norm": 10.0},
        "training": {"rounds": 300, "learning_rate": 16.0},
        "simulation": {"noise": "none"},
    },
}
"""What each of Veil's rows changes in the plan, besides ε: for the first two, nothing but the mode of noise."""


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """A set in memory.

    Attributes:
        name: its folder's.
        pool: all its records, with features; undivided.
    """

    name: str
    pool: Pool

    @classmethod
    def load(cls, name: str, datasets: Path) -> DataSet:
        """Read a set and compute its features, or find them in the cache."""
        if name == "demo":
            plan, base = demo_plan(), Path.cwd()
        elif name == "fsdd":
            plan, base = sound_plan(partition="site-column"), sound_table(datasets).parent
        else:
            plan, base = parse_plan(HERE / "plans" / f"{name}.toml"), datasets
        if plan.simulation is None:
            raise ValueError(f"the plan of {name} has no [simulation]; expected one")
        return cls(name=name, pool=prepare(plan, plan.simulation, base, Screen(quiet=True))[0])

    def divided(self, division: str, seed: int) -> Pool:
        """The set divided among its sites; another division than the set's own deals out the same training records."""
        own = self._partition(OWN[self.name], seed)
        if division == OWN[self.name]:
            return own
        other = self._partition(division, seed)
        shares = tuple(
            Share(
                site=share.site,
                train=np.setdiff1d(np.concatenate([share.train, share.test]), own.test),
                test=np.intersect1d(np.concatenate([share.train, share.test]), own.test),
            )
            for share in other.shares
        )
        return replace(other, shares=shares)

    def _partition(self, division: str, seed: int) -> Pool:
        sites = len(self.pool.shares)
        ways: dict[str, dict[str, object]] = {
            "natural": {"partition": "site-column"},
            "iid": {"partition": "iid", "sites": sites},
            "dirichlet": {"partition": "dirichlet", "sites": sites, "alpha": DIRICHLET},
        }
        keys = {**ways[division], "allow_single_class_sites": division == "dirichlet", "baselines": []}
        plan = changed(self.pool.plan, seed=seed, simulation=keys)
        if plan.simulation is None:
            raise ValueError(f"the plan of {self.name} has no [simulation]; expected one")
        delta, labels = plan.privacy.target_delta, plan.task.labels
        shares = partition(self.pool.examples, plan.simulation, seed=seed, delta=delta, labels=labels)
        return replace(self.pool, plan=plan, shares=shares)


def asked(pool: Pool, epsilon: float | None, changes: dict[str, dict[str, object]]) -> Pool:
    """The same records under a plan with another ε, where one is given, and other keys."""
    privacy = {**({} if epsilon is None else {"target_epsilon": epsilon}), **changes.get("privacy", {})}
    others = {section: values for section, values in changes.items() if section != "privacy"}
    return replace(pool, plan=changed(pool.plan, seed=pool.plan.seed, privacy=privacy, **others))


RECORDS: dict[str, dict[str, object]] = {"privacy": {"unit": "record"}}


def by_veil(pool: Pool, folder: Path) -> Scores:
    """The product's federation of these sites."""
    workspace = pool.lay_down(folder / "federation", pool.shares)
    outcome = federate(pool.plan, workspace, sites=len(pool.shares), width=pool.features.shape[1])
    return pool.score(outcome.adapter, pool.test)


def by_record(pool: Pool, folder: Path) -> Scores:
    """The product's federation where each record is a unit, as FedAvg's users have it: patients are protected less."""
    rows = np.arange(len(pool.examples.labels)).astype(np.str_)
    return by_veil(asked(replace(pool, examples=replace(pool.examples, units=rows)), None, RECORDS), folder)


def by_baseline(name: str) -> Callable[[Pool, Path], Scores]:
    """One of the product's own comparisons."""

    def run(pool: Pool, folder: Path) -> Scores:
        wanted = asked(pool, None, {"simulation": {"baselines": [name]}})
        return run_baselines(wanted, folder, lambda stage: None).metrics[name]

    return run


def alone(pool: Pool, folder: Path) -> Scores:
    """Each site's own model without privacy, judged on everybody's held-out records; the mean over sites."""
    features, labels, classes = pool.features, pool.examples.labels, len(pool.plan.task.labels)
    return mean_scores(
        [
            non_private(features[share.train], labels[share.train], features[pool.test], labels[pool.test], classes)
            for share in pool.shares
        ]
    )


RUNS: dict[str, Callable[[Pool, Path], Scores]] = {
    **dict.fromkeys((*PLANS, "demo"), by_veil),
    "centralized-dp": by_baseline("centralized_dp"),
    "local-only-dp": by_baseline("local_only"),
    "pooled": by_baseline("non_private"),
    "local-only": alone,
    "fedavg-opacus": lambda pool, folder: fedavg(pool, Settings()),
    "veil-local-by-record": by_record,
    "fedavg-opacus-by-record": lambda pool, folder: fedavg(pool, Settings(), by_record=True),
}


@dataclass(frozen=True, kw_only=True)
class Study:
    """Finished runs and where the sets are.

    Attributes:
        work: file with one finished run a line.
        datasets: folder with the sets; None: the demo only.
        done: finished runs by what they were.
    """

    work: Path
    datasets: Path | None
    done: dict[tuple[object, ...], Run]

    @classmethod
    def open(cls, work: Path, datasets: Path | None) -> Study:
        """Go on where the work file ends."""
        lines = work.read_text(encoding="utf-8").splitlines() if work.exists() else []
        runs = [Run(**json.loads(line)) for line in lines]
        return cls(work=work, datasets=datasets, done={run.key: run for run in runs})

    def forget(self, sets: Iterable[str], methods: Iterable[str]) -> None:
        """Take runs out of the work file."""
        for run in list(self.done.values()):
            if run.set in sets and run.method in methods:
                del self.done[run.key]
        self.work.parent.mkdir(parents=True, exist_ok=True)
        self.work.write_text("".join(_line(run) for run in self.done.values()), encoding="utf-8")

    def run(self, sets: Iterable[str], methods: Iterable[str], seeds: int) -> None:
        """Do what is not done yet, set by set."""
        for name in sets:
            for seed in range(seeds):
                for wanted in planned(name, methods, seed):
                    settings = self._tuned(wanted) if wanted.method == "fedavg-opacus-tuned" else None
                    self._once(wanted, settings)

    def _tuned(self, wanted: Run) -> Settings:
        """The settings with the best mean accuracy on the tuning splits."""
        means = []
        for settings in GRID:
            tried = [
                self._once(replace(wanted, method=f"tuning {settings}", seed=seed), settings) for seed in TUNING_SEEDS
            ]
            means.append(np.mean([run.accuracy for run in tried]))
        return GRID[int(np.argmax(means))]

    def _once(self, wanted: Run, settings: Settings | None = None) -> Run:
        """One run, unless it is in the work file."""
        if (found := self.done.get(wanted.key)) is not None:
            return found
        pool = asked(_divided(wanted.set, self.datasets, wanted.division, wanted.seed), wanted.epsilon, {})
        began = time.monotonic()
        with fresh() as folder:
            if settings is not None:
                scores = fedavg(pool, settings)
            else:
                scores = RUNS[wanted.method](asked(pool, None, PLANS.get(wanted.method, {})), folder)
            close_workspaces()
        finished = replace(
            wanted,
            accuracy=round(100 * scores.accuracy, 3),
            macro_f1=round(100 * scores.macro_f1, 3),
            units=[len(np.unique(pool.examples.units[share.train])) for share in pool.shares],
            settings="" if settings is None else str(settings),
            seconds=round(time.monotonic() - began, 2),
        )
        self.work.parent.mkdir(parents=True, exist_ok=True)
        with self.work.open("a", encoding="utf-8") as file:
            file.write(_line(finished))
        print(_line(finished), end="", flush=True)
        self.done[finished.key] = finished
        return finished


def _line(run: Run) -> str:
    return json.dumps(asdict(run)) + "\n"


def planned(name: str, methods: Iterable[str], seed: int) -> Iterator[Run]:
    """The runs of one set and seed."""
    for method in (one for one in methods if seed < METHODS[one].seeds):
        for division, epsilon in METHODS[method].cells(name):
            yield Run(set=name, division=division, method=method, epsilon=epsilon, seed=seed)


@cache
def _loaded(name: str, datasets: Path) -> DataSet:
    return DataSet.load(name, datasets)


@cache
def _divided(name: str, datasets: Path | None, division: str, seed: int) -> Pool:
    return _loaded(name, datasets or Path.cwd()).divided(division, seed)


def main() -> None:
    """Run what is missing and write accuracy.json and RESULTS.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--datasets", type=Path, help="folder with the data sets; without it, the demo only")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--sets", default=",".join(OWN), help="names, with commas between")
    parser.add_argument("--methods", default=",".join(METHODS), help="names, with commas between")
    parser.add_argument("--again", action="store_true", help="forget what the work file has of these sets and methods")
    parser.add_argument("--work", type=Path, default=WORK, help="the work file: one finished run a line")
    parser.add_argument("--output", type=Path, default=HERE, help="folder of both files and the template")
    parser.add_argument("--write-only", action="store_true", help="run nothing; write both files from the work file")
    chosen = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sets = [name for name in chosen.sets.split(",") if chosen.datasets or name == "demo"]
    methods = chosen.methods.split(",")
    if unknown := {*sets, *methods} - {*OWN, *METHODS}:
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    study = Study.open(chosen.work, chosen.datasets)
    if chosen.again:
        study.forget(sets, methods)
    if not chosen.write_only:
        study.run(sets, methods, chosen.seeds)
    save(study.done.values(), chosen.output)


if __name__ == "__main__":
    main()
