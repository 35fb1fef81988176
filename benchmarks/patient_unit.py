# SPDX-License-Identifier: Apache-2.0
"""What protecting patients costs beside protecting records: the same plans under both units, to PATIENT_UNIT.md.

Promises medians with their spread over seeds, and beside each record-level ε what it is worth to a patient with several
records: k records of one patient under a record-level promise are protected like a replacement of k records.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from figures import EPSILONS, changed, measure, spread

from veil.client.examples import read_examples
from veil.common.plan import RunPlan, parse_plan
from veil.common.privacy import PrivacyUnit, spent
from veil.common.schedule import schedule
from veil.simulations.folders import table_path

HERE = Path(__file__).parent
MEANINGLESS = 100.0
"""ε above which a figure is not written out."""

PLANS = ("ade_corpus_v2", "chest_xray_pneumonia")


_HEAD = """# Record or patient

The plans of `benchmarks/plans` under both privacy units; medians with the smallest and largest value over
{seeds} seeds (another split and other noise each); accuracy of the common model on held-out patients. The last column
says what each promise is worth to a patient with the median, the 95th percentile and the largest number of records: a
record-level promise weakens with every further record, a patient-level one does not. It counts a patient's presence or
absence.

    python benchmarks/patient_unit.py --datasets FOLDER --seeds {seeds}

"""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One plan, unit and ε.

    Attributes:
        plan: its name.
        unit: whom it protects.
        epsilon: promised to that unit.
        accuracies: of the common model on held-out patients, percent, by seed.
        to_patients: ε of a patient with the median, the 95th percentile and the largest number of records.
    """

    plan: str
    unit: str
    epsilon: float
    accuracies: list[float]
    to_patients: tuple[float, float, float]


def to_patient(plan: RunPlan, records: int) -> float:
    """ε of a patient with so many records: its gradients add up, so that its noise is `records` times smaller."""
    releases = [release.mechanism for release in schedule(plan)]
    if plan.privacy.unit is PrivacyUnit.PATIENT:
        return spent(releases, plan.privacy.target_delta).epsilon
    weaker = [replace(one, noise_multiplier=max(0.3, one.noise_multiplier / records)) for one in releases]
    return spent(weaker, plan.privacy.target_delta).epsilon


def records_of_patients(plan: RunPlan, datasets: Path) -> tuple[int, int, int]:
    """Median, 95th percentile and maximum of a patient's records."""
    simulation = plan.simulation
    if simulation is None:
        raise ValueError(f"{plan.name} has no [simulation]")
    table = table_path(simulation.path, datasets)
    examples = read_examples(table, simulation, plan.task, unit=PrivacyUnit.PATIENT)
    counts = np.unique(examples.units, return_counts=True)[1]
    low, high = np.percentile(counts, [50, 95])
    return max(1, math.ceil(low)), math.ceil(high), int(counts.max())


def study(datasets: Path, seeds: int) -> Iterator[Cell]:
    """Every plan under both units."""
    for name in PLANS:
        plan = parse_plan(HERE / "plans" / f"{name}.toml")
        counts = records_of_patients(plan, datasets)
        for unit in ("record", "patient"):
            for epsilon in EPSILONS:
                privacy = {"unit": unit, "target_epsilon": epsilon}
                asked = [
                    changed(plan, seed=seed, privacy=dict(privacy), simulation={"baselines": []})
                    for seed in range(seeds)
                ]
                cell = Cell(
                    plan=plan.name,
                    unit=unit,
                    epsilon=epsilon,
                    accuracies=[measure(one, unit, datasets).federated for one in asked],
                    to_patients=(
                        to_patient(asked[0], counts[0]),
                        to_patient(asked[0], counts[1]),
                        to_patient(asked[0], counts[2]),
                    ),
                )
                print(json.dumps(cell.__dict__), flush=True)
                yield cell


def table(cells: list[Cell]) -> str:
    """A row for each cell."""
    lines = [
        "| plan | unit | ε of the unit | accuracy, % | ε of a patient: median, 95th percentile, most records |",
        "|---|---|---|---|---|",
    ]
    for cell in cells:
        to = ", ".join(f"over {MEANINGLESS:g}" if one > MEANINGLESS else f"{one:.1f}" for one in cell.to_patients)
        lines.append(f"| {cell.plan} | {cell.unit} | {cell.epsilon:g} | {spread(cell.accuracies)} | {to} |")
    return "\n".join(lines)


def main() -> None:
    """Run the study and write PATIENT_UNIT.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--datasets", type=Path, required=True, help="folder with the data sets")
    parser.add_argument("--seeds", type=int, default=3)
    chosen = parser.parse_args()
    cells = list(study(chosen.datasets, chosen.seeds))
    text = _HEAD.replace("{seeds}", str(chosen.seeds)) + table(cells) + "\n"
    (HERE / "PATIENT_UNIT.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
