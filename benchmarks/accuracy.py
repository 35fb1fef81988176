# SPDX-License-Identifier: Apache-2.0
"""The accuracy study: every plan of benchmarks/plans at several ε and seeds, written to benchmarks/RESULTS.md.

Promises medians with their spread over seeds (each seed another split and other noise), nothing chosen by looking.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from veil.common.plan import RunPlan, parse_plan
from veil.simulations.demo import demo_plan
from veil.simulations.report import SimulationResult
from veil.simulations.screen import Screen
from veil.simulations.simulate import simulate

HERE = Path(__file__).parent
EPSILONS = (1.0, 3.0, 8.0)
BARE = {"max_grad_norm": 10.0}
BARE_TRAINING = {"rounds": 300, "learning_rate": 16.0}


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One run's accuracies, in percent; None where the plan did not ask for it."""

    plan: str
    variant: str
    seed: int
    epsilon: float | None
    federated: float
    local_only: float | None
    centralized_dp: float | None
    non_private: float | None


def changed(
    plan: RunPlan,
    *,
    seed: int,
    privacy: dict[str, object] | None = None,
    training: dict[str, object] | None = None,
    simulation: dict[str, object] | None = None,
    wire: dict[str, object] | None = None,
) -> RunPlan:
    """A plan with some keys set, checked like a file."""
    document = json.loads(plan.to_json())
    sections = {"privacy": privacy, "training": training, "simulation": simulation, "wire": wire}
    for section, values in sections.items():
        document[section] = {**document.get(section, {}), **(values or {})}
    document["seed"] = seed
    return RunPlan.from_json(json.dumps(document))


def measure(plan: RunPlan, variant: str, datasets: Path) -> Figure:
    """Run one plan and keep its figures."""
    with fresh() as folder:
        result = simulate(plan, base=datasets, output=folder / "run", progress=Screen(quiet=True))
    return figure(result, variant)


def figure(result: SimulationResult, variant: str) -> Figure:
    """The figures of a finished run."""

    def percent(name: str) -> float | None:
        return round(100 * result.metrics[name].accuracy, 2) if name in result.metrics else None

    return Figure(
        plan=result.plan.name,
        variant=variant,
        seed=result.plan.seed,
        epsilon=result.plan.privacy.target_epsilon if result.private else None,
        federated=percent("federated") or 0.0,
        local_only=percent("local_only"),
        centralized_dp=percent("centralized_dp"),
        non_private=percent("non_private"),
    )


@contextmanager
def fresh() -> Iterator[Path]:
    """A folder that goes away."""
    folder = Path(tempfile.mkdtemp(prefix="veil-study-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def study(datasets: Path | None, seeds: int, only: list[str]) -> Iterator[Figure]:
    """All runs, one after the other."""
    if not only or "demo" in only:
        for seed in range(5):
            yield measure(changed(demo_plan(), seed=seed), "demo", Path.cwd())
    if datasets is None:
        return
    for path in sorted((HERE / "plans").glob("*.toml")):
        if only and path.stem not in only:
            continue
        plan = parse_plan(path)
        for seed in range(seeds):
            for epsilon in EPSILONS:
                yield measure(changed(plan, seed=seed, privacy={"target_epsilon": epsilon}), "default", datasets)
            fedavg = {"algorithm": "dp-fedavg", "rounds": 20, "local_epochs": 1, "sample_rate": 0.1}
            asked = changed(plan, seed=seed, training=fedavg, simulation={"baselines": []})
            yield measure(asked, "dp-fedavg", datasets)
            bare = changed(
                plan,
                seed=seed,
                privacy=dict(BARE),
                training=dict(BARE_TRAINING),
                simulation={"noise": "none", "baselines": ["non_private"]},
            )
            yield measure(bare, "no noise, clip 10", datasets)


def spread(values: list[float]) -> str:
    """Median with the smallest and largest value."""
    if not values:
        return "-"
    return f"{statistics.median(values):.1f} ({min(values):.1f} to {max(values):.1f})"


def table(figures: list[Figure]) -> str:
    """One row per plan, variant and ε."""
    lines = [
        "| plan | variant | ε | seeds | together | alone, with DP | pooled, with DP | pooled, not private |",
        "|---|---|---|---|---|---|---|---|",
    ]
    keys = sorted({(f.plan, f.variant, f.epsilon or 0.0) for f in figures})
    for plan, variant, epsilon in keys:
        rows = [f for f in figures if (f.plan, f.variant, f.epsilon or 0.0) == (plan, variant, epsilon)]
        columns = [
            spread([value for f in rows if (value := getattr(f, name)) is not None])
            for name in ("federated", "local_only", "centralized_dp", "non_private")
        ]
        lines.append(f"| {plan} | {variant} | {epsilon or 'none'} | {len(rows)} | {' | '.join(columns)} |")
    return "\n".join(lines)


def demo_mean(figures: list[Figure]) -> str:
    """The demo's mean over its splits."""
    values = [f.federated for f in figures if f.variant == "demo"]
    return f"The demo, mean over its {len(values)} splits at ε = 3: {statistics.fmean(values):.2f} %."


def _order(figure: Figure) -> tuple[str, str, float, int]:
    return figure.plan, figure.variant, figure.epsilon or 0.0, figure.seed


def main() -> None:
    """Run the study and write RESULTS.md and accuracy.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--datasets", type=Path, help="folder with the data sets; without it, the demo only")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="*", default=[], help="demo or plans by file name; the others stay as they are")
    chosen = parser.parse_args()
    figures: list[Figure] = []
    for one in study(chosen.datasets, chosen.seeds, chosen.only):
        figures.append(one)
        print(json.dumps(asdict(one)), flush=True)
    save(figures)


def save(figures: list[Figure]) -> None:
    """Put figures in the place of older ones of the same plans, and write both files."""
    store = HERE / "accuracy.json"
    older = [Figure(**one) for one in json.loads(store.read_text(encoding="utf-8"))] if store.exists() else []
    measured = {f.plan for f in figures}
    figures = sorted([*(f for f in older if f.plan not in measured), *figures], key=_order)
    store.write_text(json.dumps([asdict(f) for f in figures], indent=1) + "\n", encoding="utf-8")
    results, template = HERE / "RESULTS.md", (HERE / "RESULTS.template.md").read_text(encoding="utf-8")
    filled = template.replace("{{accuracy}}", table(figures)).replace("{{means}}", demo_mean(figures))
    older_page = results.read_text(encoding="utf-8") if results.exists() else ""
    results.write_text(filled.replace("{{speed}}", speed_section(older_page)), encoding="utf-8")


def speed_section(page: str) -> str:
    """What `make bench` wrote between its markers, to be kept."""
    return page.partition("<!-- speed -->")[2].partition("<!-- /speed -->")[0].strip()


if __name__ == "__main__":
    main()
