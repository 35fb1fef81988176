# SPDX-License-Identifier: Apache-2.0
"""One run of a plan and what it reached: what the studies of accuracy share.

Promises a plan that is checked like a file, whatever was changed in it, and a folder that goes away.
"""

from __future__ import annotations

import json
import shutil
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from veil.common.plan import RunPlan
from veil.simulations.report import SimulationResult
from veil.simulations.screen import Screen
from veil.simulations.simulate import simulate

EPSILONS = (1.0, 3.0, 8.0)


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


def spread(values: list[float]) -> str:
    """Median with the smallest and largest value."""
    if not values:
        return "-"
    return f"{statistics.median(values):.1f} ({min(values):.1f} to {max(values):.1f})"
