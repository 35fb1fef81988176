# SPDX-License-Identifier: Apache-2.0
"""What a round of masking costs a site and the coordinator, beside the adapter: `python benchmarks/masking.py` writes
benchmarks/MASKING.md. Medians over repeats; the members of a cohort are checked once a run.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from veil.client.cohort import _strangers, review_cohort
from veil.client.policy import Limits, SitePolicy
from veil.common.keys import NodeKey
from veil.common.masking import MaskingKey, session_of, unmask
from veil.common.plan import RunPlan
from veil.common.update import Update

SIZES = ((4, 384, 2), (10, 384, 2), (10, 384, 10), (10, 768, 100), (50, 384, 10))


def milliseconds(work: Callable[[], object], repeats: int) -> float:
    """Median of one call."""
    taken = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        taken.append(time.perf_counter() - began)
    return 1e3 * statistics.median(taken)


def measure(sites: int, width: int, classes: int, repeats: int) -> list[str]:
    """One row: what a cohort of that size costs."""
    keys = [MaskingKey.of(NodeKey.generate(), f"site-{index:03d}") for index in range(sites)]
    members = tuple(key.member for key in keys)
    session = session_of(job="j", plan="p" * 64, round_=1, kind="gradient", attempt=0, members=members)
    random = np.random.default_rng(0)
    shape = (classes, width + 1)
    updates = [Update(points={"w": random.integers(-(2**30), 2**30, shape)}, spacing=2.0**-21) for _ in keys]
    peers = {one.site: one.fingerprint for one in members[1:]}
    limits = Limits(epsilon_per_run=1, epsilon_lifetime=1)
    policy = SitePolicy(name=members[0].site, limits=limits, peers=peers)
    plan = RunPlan.model_validate(
        {
            "name": "masking",
            "task": {"kind": "tabular-classification", "labels": [str(one) for one in range(max(2, classes))]},
            "privacy": {"target_epsilon": 1.0, "noise": "distributed"},
            "cohort": {"min_sites": 3},
        }
    )

    def first_check() -> None:
        _strangers.cache_clear()
        review_cohort(plan, members, policy, members[0])

    hidden = [key.mask(update, members, session) for key, update in zip(keys, updates, strict=True)]
    adapter = 4 * (classes * (width + 1) + width)
    size = len(hidden[0].to_bytes())
    figures = [
        milliseconds(first_check, 5),
        milliseconds(lambda: review_cohort(plan, members, policy, members[0]), repeats),
        milliseconds(lambda: keys[0].mask(updates[0], members, session), repeats),
        milliseconds(lambda: unmask(hidden), repeats),
    ]
    total = unmask(hidden).points["w"]
    if not np.array_equal(total, sum(update.points["w"] for update in updates)):
        raise ValueError("the masks do not cancel; expected the exact sum")
    cells = [f"{figure:.2f}" for figure in figures]
    return [f"{sites} x {classes} x {width + 1}", *cells, f"{adapter:,}", f"{size:,}", f"{size / adapter:.2f}"]


def main() -> None:
    """Measure and write the table."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--repeats", type=int, default=50)
    options.add_argument("--output", type=Path, default=Path(__file__).parent / "MASKING.md")
    chosen = options.parse_args()
    rows = [measure(*size, chosen.repeats) for size in SIZES]
    lines = [
        "# A round of masking",
        "",
        f"`python benchmarks/masking.py`, {platform.machine()}, {os.cpu_count()} cores, numpy {np.__version__}, "
        f"medians over {chosen.repeats}. Milliseconds of a site (checking the cohort the first time and every further "
        "round, masking) and of the coordinator (taking the sum), and bytes of a site's reply beside the adapter's.",
        "",
        "| sites x classes x inputs | first check | check | mask | sum | adapter bytes | masked bytes | ratio |",
        "|---|---|---|---|---|---|---|---|",
        *("| " + " | ".join(row) + " |" for row in rows),
    ]
    chosen.output.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
