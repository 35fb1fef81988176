# SPDX-License-Identifier: Apache-2.0
"""Where the time of a client-round goes that is not the floor's: Veil on workload (a) of `make bench`, part by part.

`python benchmarks/gap.py` writes benchmarks/GAP.md. A part's time is its own: what it calls that is a part too is not
in it. One process, one thread; the clocks themselves take about a twentieth of the whole.
"""

from __future__ import annotations

import argparse
import os

os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")

import statistics
import sys
import tempfile
import time
from collections import Counter
from functools import wraps
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent / "speed" / "peers"))
sys.path.insert(0, str(Path(__file__).parent / "speed"))

import floor
import veil_side
import workloads
from contract import Workload
from flwr.clientapp import ClientApp

from veil.client import gradient, optimizer
from veil.client.head_batch import HeadBatch
from veil.client.ledger import Ledger
from veil.client.optimizer import LatticeOptimizer
from veil.client.site import Site
from veil.common import noise
from veil.common.keys import NodeKey
from veil.server.strategy import SumOfUpdates

HERE = Path(__file__).parent
PARTS: tuple[tuple[str, tuple[tuple[Any, str], ...]], ...] = (
    ("two products a step", ((gradient, "exact_scores"), (gradient, "total_of"))),
    ("softmax, lengths, clipping, grid", ((gradient, "_clipped_errors"),)),
    ("normal numbers", ((noise, "polar_gaussian"),)),
    ("lattice and descent", ((optimizer, "privatize"), (LatticeOptimizer, "step"))),
    ("samples: who is in a step, and their rows", ((HeadBatch, "take"), (noise.OSNoise, "uniform"))),
    ("ledger, both lines of a round on disk", ((Ledger, "spend"), (Ledger, "record_reply"))),
    ("signatures of both lines", ((NodeKey, "sign"),)),
    ("review, and the rest of a site's answer", ((Site, "answer"),)),
    ("messages in and out, Flower's ClientApp", ((ClientApp, "__call__"),)),
    (
        "coordinator: requests, validation, exact sums",
        ((SumOfUpdates, "configure_train"), (SumOfUpdates, "aggregate_train")),
    ),
)
ALGORITHMS = {"": "dp-fedavg, 10 steps", "dp-fedsgd": "dp-fedsgd, 1 step"}


class Clock:
    """Seconds by part, each part's own."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self._open: list[float] = []

    def watch(self, owner: Any, name: str, part: str) -> None:
        """Count a function's time for a part, from now on."""
        ours = getattr(owner, name)

        @wraps(ours)
        def timed(*given: Any, **named: Any) -> Any:
            self._open.append(0.0)
            began = time.perf_counter()
            try:
                return ours(*given, **named)
            finally:
                took = time.perf_counter() - began
                self.seconds[part] += took - self._open.pop()
                if self._open:
                    self._open[-1] += took

        setattr(owner, name, timed)


def workload(folder: Path) -> Workload:
    """Workload (a), with an empty folder of its own."""
    told = workloads.prepare("a", folder) | {"threads": 1, "folder": tempfile.mkdtemp(dir=folder)}
    return Workload(**{name: told[name] for name in Workload.__dataclass_fields__})


def measure(clock: Clock, variant: str, repeats: int, folder: Path) -> dict[str, float]:
    """Milliseconds of a client-round by part, medians over the repeats; `whole` is all of it."""
    found: dict[str, list[float]] = {}
    for _ in range(repeats):
        clock.seconds.clear()
        work = workload(folder)
        seconds = veil_side.features(work, variant).seconds
        known = {part: clock.seconds[part] for part, _ in PARTS}
        for part, took in {**known, "the rest": seconds - sum(known.values()), "whole": seconds}.items():
            found.setdefault(part, []).append(1e3 * took / work.client_rounds)
    return {part: statistics.median(took) for part, took in found.items()}


def bare_products(repeats: int, folder: Path) -> float:
    """The floor of (a) on one thread, milliseconds a client-round."""
    work, taken = workload(folder), []
    rows = work.read_features()
    for _ in range(repeats):
        began = time.perf_counter()
        floor.products(work, rows)
        taken.append(time.perf_counter() - began)
    return 1e3 * statistics.median(taken) / work.client_rounds


def main() -> None:
    """Measure and write the page."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--repeats", type=int, default=3)
    options.add_argument("--output", type=Path, default=HERE / "GAP.md")
    chosen = options.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        least = bare_products(chosen.repeats, folder)
        clock = Clock()
        for part, functions in PARTS:
            for owner, function in functions:
                clock.watch(owner, function, part)
        found = {variant: measure(clock, variant, chosen.repeats, folder) for variant in ALGORITHMS}
    lines = [
        "# Where the time of a client-round goes",
        "",
        f"`python benchmarks/gap.py --repeats {chosen.repeats}`: milliseconds of one site's part of one round in",
        "workload (a) of [RESULTS.md](RESULTS.md), 500 records x 384 features x 10 classes; medians; one process, one",
        "thread.",
        f"The floor, its products alone and nothing else, takes {least:.2f} ms for the ten steps of dp-fedavg.",
        "",
        f"| part | {' | '.join(ALGORITHMS.values())} |",
        f"|---|{'---|' * len(ALGORITHMS)}",
        *(f"| {part} | {' | '.join(f'{found[variant][part]:.3f}' for variant in ALGORITHMS)} |" for part in found[""]),
    ]
    chosen.output.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
