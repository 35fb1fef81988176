# SPDX-License-Identifier: Apache-2.0
"""What narrow numbers on the wire cost in accuracy: the same plans at every width of update and adapter, to WIRE.md.

Promises medians with their spread over seeds under the operating system's noise, and the paired difference to 32 bits
under repeatable noise, where two runs differ in nothing but the width of what travels.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

from figures import EPSILONS, changed, fresh, spread

from veil.common.plan import RunPlan, parse_plan
from veil.server.run_report import wire_bytes
from veil.simulations.demo import demo_plan
from veil.simulations.screen import Screen
from veil.simulations.simulate import simulate

HERE = Path(__file__).parent
WIDTHS = ((32, 32), (16, 32), (8, 32), (32, 16), (8, 16))
"""Bits of an update's integers, and of the adapter's floating point."""

FEDAVG: dict[str, object] = {"algorithm": "dp-fedavg", "rounds": 20, "local_epochs": 1, "sample_rate": 0.1}

_HEAD = """# The wire

Accuracy on held-out records with updates of 32, 16 and 8 bits and the adapter at 32 and 16: medians with the smallest
and largest value over {seeds} seeds, another split each. Under the operating system's noise every run has its own;
under repeatable noise (`simulation.noise = "fixed"`, not private) the runs of a seed share theirs, and the last column
is the difference to the run at 32 and 32 bits, in percentage points. Bytes are those of one round and site, with all
that stands beside the numbers. Narrowing costs no privacy: ε is the same in every row.

    python benchmarks/wire.py --datasets FOLDER --seeds {seeds}

"""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run.

    Attributes:
        plan: its name.
        epsilon: promised.
        bits: of update and adapter.
        noise: `os` or `fixed`.
        seed: of the split, and of repeatable noise.
        accuracy: of the common model, percent.
        up: bytes from one site in one round.
        down: bytes to it.
    """

    plan: str
    epsilon: float
    bits: tuple[int, int]
    noise: str
    seed: int
    accuracy: float
    up: int
    down: int


def plans() -> Iterator[tuple[str, RunPlan, tuple[float, ...]]]:
    """The demo and a larger plan at every ε, and the demo with the other algorithm at its own."""
    yield "heart-disease", demo_plan(), EPSILONS
    yield "heart-disease, dp-fedavg", changed(demo_plan(), seed=0, training=dict(FEDAVG)), EPSILONS[1:2]
    yield "adverse-events", parse_plan(HERE / "plans" / "ade_corpus_v2.toml"), EPSILONS


def study(datasets: Path, seeds: int) -> Iterator[Run]:
    """All runs, one after the other."""
    for name, plan, epsilons in plans():
        for epsilon, noise, seed, bits in product(epsilons, ("os", "fixed"), range(seeds), WIDTHS):
            asked = changed(
                plan,
                seed=seed,
                privacy={"target_epsilon": epsilon},
                simulation={"noise": noise, "baselines": []},
                wire={"update_bits": bits[0], "adapter_bits": bits[1]},
            )
            yield measured(name, asked, datasets, epsilon, bits, noise)


def measured(name: str, plan: RunPlan, datasets: Path, epsilon: float, bits: tuple[int, int], noise: str) -> Run:
    """One run's figures."""
    with fresh() as folder:
        result = simulate(plan, base=datasets, output=folder / "run", progress=Screen(quiet=True))
    sent = wire_bytes(result.records)
    return Run(
        plan=name,
        epsilon=epsilon,
        bits=bits,
        noise=noise,
        seed=plan.seed,
        accuracy=100 * result.metrics["federated"].accuracy,
        up=sent["up"],
        down=sent["down"],
    )


def table(runs: list[Run]) -> str:
    """A row for each plan, ε and width."""
    lines = [
        "| plan | ε | update, adapter: bits | bytes up | bytes down | accuracy, % | difference at equal noise |",
        "|---|---|---|---|---|---|---|",
    ]
    exact = {(run.plan, run.epsilon, run.noise, run.seed): run.accuracy for run in runs if run.bits == WIDTHS[0]}
    for plan, epsilon, bits in dict.fromkeys((run.plan, run.epsilon, run.bits) for run in runs):
        rows = [run for run in runs if (run.plan, run.epsilon, run.bits) == (plan, epsilon, bits)]
        own = spread([run.accuracy for run in rows if run.noise == "os"])
        apart = [run.accuracy - exact[plan, epsilon, run.noise, run.seed] for run in rows if run.noise == "fixed"]
        paired = "-" if bits == WIDTHS[0] else spread([round(one, 1) + 0.0 for one in apart])
        lines.append(
            f"| {plan} | {epsilon:g} | {bits[0]}, {bits[1]} | {max(run.up for run in rows):,} | "
            f"{max(run.down for run in rows):,} | {own} | {paired} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Run the study and write WIRE.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--datasets", type=Path, required=True, help="folder with the data sets")
    parser.add_argument("--seeds", type=int, default=3)
    chosen = parser.parse_args()
    runs = []
    for run in study(chosen.datasets, chosen.seeds):
        runs.append(run)
        print(json.dumps(asdict(run)), flush=True)
    text = _HEAD.replace("{seeds}", str(chosen.seeds)) + table(runs) + "\n"
    (HERE / "WIRE.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
