# SPDX-License-Identifier: Apache-2.0
"""Never worse than alone: what each site keeps, beside the federated head and its own, written to SELECTOR.md.

    python benchmarks/selector.py --datasets FOLDER --seeds 5

Promises that every accuracy is of records that neither the run nor the choice has seen, that the federated heads are
those of `veil simulate`, and that a site counts as worse off wherever its own error bar says so.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from figures import EPSILONS, changed, fresh
from sound import sound_plan, sound_table

from veil.client.personal import Origin
from veil.common.plan import RunPlan, parse_plan
from veil.simulations.baselines import Pool
from veil.simulations.federation import federate
from veil.simulations.partition import Share, partition
from veil.simulations.screen import Screen
from veil.simulations.selection import Finding, SiteSelection, run_selector
from veil.simulations.simulate import prepare
from veil.simulations.workspace import close_workspaces

HERE = Path(__file__).parent
SETS = ("heart_4hospitals", "fsdd", "ade_corpus_v2", "sst2", "chest_xray_pneumonia")
DIVISIONS: dict[str, dict[str, object]] = {"iid": {}, "Dirichlet 0.3": {"partition": "dirichlet", "alpha": 0.3}}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One site of one run; accuracies and gains in percent and points, on its held-out records.

    Attributes:
        units: training units of the site.
        chosen: the origin of the head that it keeps.
        federated: accuracy of the common head; so `blend`, `local`, `kept`.
        gain: of the kept head over the site's own.
        error: standard error of `gain`.
        federated_gain: of the common head over the site's own.
        federated_error: standard error of `federated_gain`.
        findings: what the report names.
    """

    plan: str
    split: str
    epsilon: float
    seed: int
    site: str
    units: int
    chosen: str
    federated: float
    blend: float
    local: float
    kept: float
    gain: float
    error: float
    federated_gain: float
    federated_error: float
    findings: tuple[str, ...]

    @property
    def worse(self) -> bool:
        """Whether what is kept is worse than the site's own, beyond 1.96 standard errors."""
        return self.gain + 1.96 * self.error < 0

    @property
    def federated_worse(self) -> bool:
        """Whether the common head is."""
        return self.federated_gain + 1.96 * self.federated_error < 0


def rows_of(pool: Pool, split: str) -> Iterator[Row]:
    """Federate, as `veil simulate` does, and let the sites choose."""
    plan, units = pool.plan, pool.examples.units
    with fresh() as folder:
        workspace = pool.lay_down(folder / "sites", pool.shares)
        outcome = federate(plan, workspace, sites=len(pool.shares), width=pool.features.shape[1])
        close_workspaces()
    found = run_selector(pool, outcome.adapter, lambda done: None)
    for share in pool.shares:
        yield Row(
            plan=plan.name,
            split=split,
            epsilon=plan.privacy.target_epsilon,
            seed=plan.seed,
            site=share.site,
            units=len(np.unique(units[share.train])),
            **_figures(found[share.site]),
        )


def _figures(one: SiteSelection) -> dict[str, object]:
    accuracies = {origin: 100 * one.accuracy(origin).value for origin in Origin}
    return {
        "chosen": one.chosen.value,
        "federated": accuracies[Origin.FEDERATED],
        "blend": accuracies[Origin.BLEND],
        "local": accuracies[Origin.LOCAL],
        "kept": accuracies[one.chosen],
        "gain": 100 * one.gain.value,
        "error": 100 * one.gain.standard_error,
        "federated_gain": 100 * one.federated_gain.value,
        "federated_error": 100 * one.federated_gain.standard_error,
        "findings": tuple(finding.value for finding in one.findings),
    }


def study(datasets: Path, seeds: int, only: list[str]) -> Iterator[Row]:
    """All runs, one after the other; records are read once for each division of a set."""
    for name in only or SETS:
        for split, plan, base in splits_of(name, datasets):
            if plan.simulation is None:
                raise ValueError(f"{plan.name} has no [simulation]")
            pool, _ = prepare(plan, plan.simulation, base, Screen(quiet=True))
            for seed in range(seeds):
                for epsilon in EPSILONS:
                    asked = changed(plan, seed=seed, privacy={"target_epsilon": epsilon})
                    yield from rows_of(replace(pool, plan=asked, shares=_dealt(pool, asked)), split)


def _dealt(pool: Pool, plan: RunPlan) -> tuple[Share, ...]:
    """The division of a plan's seed."""
    if plan.simulation is None:
        raise ValueError(f"{plan.name} has no [simulation]")
    delta, labels = plan.privacy.target_delta, plan.task.labels
    return partition(pool.examples, plan.simulation, seed=plan.seed, delta=delta, labels=labels)


def splits_of(name: str, datasets: Path) -> Iterator[tuple[str, RunPlan, Path]]:
    """The ways in which a set is divided, each with its plan and the folder that this starts from."""
    asked: dict[str, object] = {"baselines": [], "allow_single_class_sites": True, "selector": True}
    if name == "fsdd":
        plan = changed(sound_plan(partition="site-column"), seed=0, simulation=asked)
        yield "by speaker", plan, sound_table(datasets).parent
        return
    plan = parse_plan(HERE / "plans" / f"{name}.toml")
    if name == "heart_4hospitals":
        yield "by hospital", changed(plan, seed=0, simulation=asked), datasets
        return
    for split, division in DIVISIONS.items():
        yield split, changed(plan, seed=0, simulation={**asked, **division}), datasets


def summary(rows: list[Row]) -> str:
    """One line per plan, split and ε."""
    lines = [
        "| plan | split | ε | sites | together | alone | corrected | kept | gain, points | kept: T / C / A "
        "| together worse | kept worse | largest loss of a site |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for key in dict.fromkeys((r.plan, r.split, r.epsilon) for r in rows):
        some = [r for r in rows if (r.plan, r.split, r.epsilon) == key]
        kept = [sum(r.chosen == origin.value for r in some) for origin in Origin]
        cells = [
            *map(str, key[:2]),
            f"{key[2]:g}",
            str(len(some)),
            *(f"{_mean(getattr(r, name) for r in some):.1f}" for name in ("federated", "local", "blend", "kept")),
            _by_seed(some),
            " / ".join(map(str, kept)),
            _share(sum(r.federated_worse for r in some), len(some)),
            _share(sum(r.worse for r in some), len(some)),
            _largest(some),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def totals(rows: list[Row]) -> str:
    """All sets together."""
    others = [r for r in rows if r.chosen != Origin.LOCAL.value]
    return (
        f"Of {len(rows)} sites in all runs, the federated head is worse than alone beyond the error bar at "
        f"{_share(sum(r.federated_worse for r in rows), len(rows))}, what is kept at "
        f"{_share(sum(r.worse for r in rows), len(rows))}. {len(others)} sites keep another head than their own: it is "
        f"better by {_mean(r.gain for r in others):.1f} points on average."
    )


def natural(rows: list[Row]) -> str:
    """One line per site of the natural splits and ε."""
    lines = [
        "| plan | site | units | ε | together | alone | corrected | kept | gain, points | found (of the runs) |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    some = [r for r in rows if r.split.startswith("by ")]
    for key in dict.fromkeys((r.plan, r.site, r.epsilon) for r in sorted(some, key=lambda r: (r.plan, r.site))):
        runs = [r for r in some if (r.plan, r.site, r.epsilon) == key]
        found = {finding: sum(finding.value in r.findings for r in runs) for finding in Finding}
        told = ", ".join(f"{name.value} {count}/{len(runs)}" for name, count in found.items() if count)
        figures = (f"{_mean(getattr(r, name) for r in runs):.1f}" for name in ("federated", "local", "blend", "kept"))
        units = f"{_mean(r.units for r in runs):.0f}"
        cells = [*map(str, key[:2]), units, f"{key[2]:g}", *figures, _by_seed(runs), told]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _mean(values: Iterator[float]) -> float:
    return statistics.fmean(values)


def _by_seed(rows: list[Row]) -> str:
    """Mean gain, with the spread of the seeds' means."""
    means = [_mean(r.gain for r in rows if r.seed == seed) for seed in dict.fromkeys(r.seed for r in rows)]
    spread = statistics.stdev(means) if len(means) > 1 else 0.0
    return f"{statistics.fmean(means):+.1f} ± {spread:.1f}"


def _share(count: int, of: int) -> str:
    return f"{count} ({100 * count / of:.1f} %)"


def _largest(rows: list[Row]) -> str:
    worst = min(rows, key=lambda r: r.gain)
    return f"{worst.gain:+.1f} ± {1.96 * worst.error:.1f}"


def main() -> None:
    """Run the study and write SELECTOR.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--datasets", type=Path, required=True, help="folder with the data sets")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--only", nargs="*", default=[], help="some of the sets")
    chosen = parser.parse_args()
    rows = []
    for row in study(chosen.datasets, chosen.seeds, chosen.only):
        rows.append(row)
        print(json.dumps(asdict(row)), flush=True)
    write(rows)


def write(rows: list[Row]) -> None:
    """The page, from its template."""
    template = (HERE / "SELECTOR.template.md").read_text(encoding="utf-8")
    parts = {"{{totals}}": totals(rows), "{{summary}}": summary(rows), "{{natural}}": natural(rows)}
    page = template
    for place, text in parts.items():
        page = page.replace(place, text)
    (HERE / "SELECTOR.md").write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
