# SPDX-License-Identifier: Apache-2.0
"""Thousands of simulated sites in one process: seconds, memory, files. Writes benchmarks/MANY_SITES.md.

    python benchmarks/many_sites.py

Each site has its own ledger lines, signatures and noise, as any simulated site.
"""

from __future__ import annotations

import argparse
import os
import resource
import tempfile
import time
from pathlib import Path

import numpy as np

from veil.client.examples import Examples
from veil.client.ledger import entries_by_site
from veil.common.plan import RunPlan
from veil.simulations.federation import federate
from veil.simulations.partition import Share
from veil.simulations.workspace import Workspace, close_workspaces

CLASSES = 10


def plan_of(sites: int, rounds: int) -> RunPlan:
    """Veil's default algorithm over so many sites."""
    return RunPlan.model_validate(
        {
            "name": f"{sites}-sites",
            "task": {"kind": "tabular-classification", "labels": [f"class {one}" for one in range(CLASSES)]},
            "training": {"rounds": rounds},
            "privacy": {"target_epsilon": 3.0, "target_delta": 1e-5},
            "cohort": {"min_sites": sites},
            "simulation": {"path": "made up", "label": "label", "features": ["x"], "sites": sites},
        }
    )


def measure(sites: int, records: int, width: int, rounds: int) -> str:
    """Run it; a table's row."""
    random = np.random.default_rng(0)
    rows = random.standard_normal((sites * records, width), dtype=np.float32)
    labels = random.integers(0, CLASSES, sites * records)
    examples = Examples(inputs=rows, labels=labels, units=np.arange(len(labels)).astype(np.str_))
    shares = tuple(
        Share(
            site=f"site-{site:05d}",
            train=np.arange(site * records, (site + 1) * records),
            test=np.zeros(0, np.int64),
        )
        for site in range(sites)
    )
    plan = plan_of(sites, rounds)
    with tempfile.TemporaryDirectory() as folder:
        workspace = Workspace.create(Path(folder) / "sites", plan, rows, examples, shares)
        del rows, examples
        began = time.monotonic()
        federate(plan, workspace, sites=sites, width=width)
        seconds = time.monotonic() - began
        files, size = len(list(workspace.folder.iterdir())), workspace.ledger_path.stat().st_size
        lines = sum(len(entries) for entries in entries_by_site(workspace.ledger_path).values())
        open_files = len(list(Path("/proc/self/fd").iterdir()))
        close_workspaces()
    if lines != sites * (rounds + 1):
        raise ValueError(f"{lines} spends in the ledger; expected {sites * (rounds + 1)}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return (
        f"| {sites:,} | {records} x {width} x {CLASSES} | {rounds} + 1 | {seconds:.1f} | "
        f"{1e3 * seconds / lines:.2f} | {peak:,.0f} | {lines:,} | {size / 2**20:.0f} | {files} | {open_files} |"
    )


def main() -> None:
    """Measure and write the table."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--sites", type=int, default=5000)
    options.add_argument("--records", type=int, default=100)
    options.add_argument("--width", type=int, default=384)
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--output", type=Path, default=Path(__file__).parent / "MANY_SITES.md")
    chosen = options.parse_args()
    row = measure(chosen.sites, chosen.records, chosen.width, chosen.rounds)
    table = [
        "# Thousands of sites in one process",
        "",
        f"`python benchmarks/many_sites.py`, {os.cpu_count()} cores. dp-fedsgd, one full-batch step a round; the peak "
        "is of the whole process, with the records made up for it.",
        "",
        "| sites | records x features x classes | rounds | seconds | ms a site and round | peak MB | spends in the "
        "ledger | ledger MB | files | open files |",
        "|---|---|---|---|---|---|---|---|---|---|",
        row,
    ]
    print(row)
    chosen.output.write_text("\n".join(table) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
