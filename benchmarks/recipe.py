# SPDX-License-Identifier: Apache-2.0
"""Why the recipe has the constants it has: other values of them, on the demo and on any plan.

Promises that only four constants change: the centring round's share of μ², the intercept, κ and the rate's cap.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator
from pathlib import Path

from accuracy import EPSILONS, Figure, changed, measure, spread

from veil.common import head, schedule
from veil.common.plan import RunPlan, parse_plan
from veil.server import descent
from veil.simulations.demo import demo_plan


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """The constants; the defaults are the product's."""

    share: float = schedule.CENTRE_SHARE
    intercept: float = head.INTERCEPT
    kappa: float = descent.WEIGHT_NOISE
    cap: float = descent.RATE_CAP

    def install(self) -> None:
        """Make the product use them."""
        schedule.CENTRE_SHARE, head.INTERCEPT = self.share, self.intercept
        descent.WEIGHT_NOISE, descent.RATE_CAP = self.kappa, self.cap
        schedule._schedule.cache_clear()


RECIPES = (
    Recipe(),
    Recipe(share=0.03),
    Recipe(intercept=0.5),
    Recipe(share=0.03, intercept=0.5),
    Recipe(share=0.03, intercept=0.5, kappa=60, cap=64),
    Recipe(kappa=15),
    Recipe(kappa=60),
    Recipe(cap=16),
    Recipe(cap=64),
)


def runs(plan: RunPlan, datasets: Path, seeds: int, rows: list[int]) -> Iterator[Figure]:
    """The chosen recipes at every ε and seed."""
    for recipe in (RECIPES[row] for row in rows):
        recipe.install()
        name = f"share {recipe.share:g}, intercept {recipe.intercept:g}, κ {recipe.kappa:g}, cap {recipe.cap:g}"
        for epsilon in EPSILONS:
            for seed in range(seeds):
                asked = changed(plan, seed=seed, privacy={"target_epsilon": epsilon}, simulation={"baselines": []})
                yield measure(asked, name, datasets)


def main() -> None:
    """Print one row per recipe, the product's first."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plan", type=Path, help="a plan; the demo without one")
    parser.add_argument("--datasets", type=Path, default=Path.cwd())
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--rows", type=int, nargs="*", default=list(range(len(RECIPES))), help="recipes, from 0")
    chosen = parser.parse_args()
    plan = parse_plan(chosen.plan) if chosen.plan else demo_plan()
    figures = list(runs(plan, chosen.datasets, chosen.seeds, chosen.rows))
    print("| plan | recipe | ε = 1 | ε = 3 | ε = 8 |\n|---|---|---|---|---|")
    for variant in dict.fromkeys(f.variant for f in figures):
        cells = [spread([f.federated for f in figures if (f.variant, f.epsilon) == (variant, e)]) for e in EPSILONS]
        print(f"| {plan.name} | {variant} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
