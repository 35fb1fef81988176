# SPDX-License-Identifier: Apache-2.0
"""Whether each site should centre its features by its own mean (transductive transfer) or by that of all sites.

No noise anywhere, which is the best that either can be: a site's own mean of a few hundred units, noised at ε = 3, is
mostly noise. `python benchmarks/alignment.py --datasets ../shared/datasets` prints the table of ALIGNMENT.md.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import median

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression

from veil.common.plan import RunPlan, parse_plan
from veil.simulations.baselines import Pool
from veil.simulations.screen import Screen
from veil.simulations.simulate import prepare

HERE = Path(__file__).parent
SETS = {
    "heart_4hospitals": {},
    "sst2": {"partition": "dirichlet", "alpha": 0.5, "allow_single_class_sites": True},
    "ade_corpus_v2": {},
}
SEEDS = 5


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--datasets", type=Path, default=HERE.parent.parent / "shared" / "datasets")
    given = parser.parse_args()
    print("| set | sites | one centre | each site its own | difference, pairs of runs |")
    print("|---|---|---|---|---|")
    for name, changes in SETS.items():
        pools = [pool_of(name, changes, seed, given.datasets) for seed in range(SEEDS)]
        ours, theirs = ([accuracy(pool, own=own) for pool in pools] for own in (False, True))
        gaps = [other - one for one, other in zip(ours, theirs, strict=True)]
        how = pools[0].plan.simulation
        divided = f"{len(pools[0].shares)}, {how.partition if how else ''}"
        print(f"| {name} | {divided} | {told(ours)} | {told(theirs)} | {told(gaps, '+')} |", flush=True)


def pool_of(name: str, changes: dict[str, object], seed: int, datasets: Path) -> Pool:
    """A set's records, divided by a seed."""
    document = json.loads(parse_plan(HERE / "plans" / f"{name}.toml").to_json())
    document["seed"] = seed
    document["simulation"] |= changes
    plan = RunPlan.from_json(json.dumps(document))
    if plan.simulation is None:
        raise ValueError(f"{name} without [simulation]; expected one")
    with Screen(quiet=True) as screen:
        return prepare(plan, plan.simulation, datasets, screen)[0]


def accuracy(pool: Pool, *, own: bool) -> float:
    """Of a logistic regression on all training records, judged on all held-out ones, %."""
    rows, labels = directions(pool.features), pool.examples.labels
    train = np.concatenate([share.train for share in pool.shares])
    inputs = rows.copy()
    for share in pool.shares:
        centre = rows[share.train if own else train].mean(axis=0)
        for part in (share.train, share.test):
            inputs[part] = directions(rows[part] - centre)
    model = LogisticRegression(C=10.0, max_iter=2000).fit(inputs[train], labels[train])
    return 100 * float(model.score(inputs[pool.test], labels[pool.test]))


def directions(rows: NDArray[np.floating]) -> NDArray[np.float64]:
    """Rows of length 1; a zero row stays zero."""
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.asarray(rows / np.where(lengths > 0, lengths, 1.0), dtype=np.float64)


def told(values: list[float], sign: str = "") -> str:
    """Median and range."""
    return f"{median(values):{sign}.1f} ({min(values):{sign}.1f} to {max(values):{sign}.1f})"


if __name__ == "__main__":
    main()
