# SPDX-License-Identifier: Apache-2.0
"""The sound set of the studies: spoken digits (fsdd) as features of a pretrained speech encoder, and a plan for them.

Promises that the encoder lives in an environment of its own (sound_encoder.txt): nothing is added to Veil's. Features
are computed once and kept as a table, which a plan of the kind tabular-classification reads; a site is a speaker, or
the recordings are dealt to as many sites.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from veil.common.plan import RunPlan

HERE = Path(__file__).parent
WORK = HERE.parent / "runs" / "sound"
TABLE = "fsdd.parquet"
WIDTH = 96
DIGITS = tuple(str(digit) for digit in range(10))
SPEAKERS = 6


def sound_plan(*, partition: str = "iid") -> RunPlan:
    """The plan for `sound_table`; its folder is the plan's base.

    Args:
        partition: `iid` or `dirichlet` over as many sites as there are speakers, or `site-column`: a site is a speaker.
    """
    return RunPlan.model_validate(
        {
            "name": "spoken-digits",
            "task": {"kind": "tabular-classification", "labels": DIGITS},
            "privacy": {"target_epsilon": 3.0},
            "cohort": {"min_sites": SPEAKERS},
            "simulation": {
                "path": TABLE,
                "features": _columns(),
                "label": "label",
                "site": "site",
                "partition": partition,
                "sites": SPEAKERS,
            },
        }
    )


def sound_features(
    datasets: Path, work: Path = WORK
) -> tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.str_]]:
    """Features [3000, 96], digits [3000] and speakers [3000] of fsdd.

    Args:
        datasets: folder with the data sets.
        work: where the environment and the table are kept.
    """
    frame = pd.read_parquet(sound_table(datasets, work))
    features = frame[_columns()].to_numpy(np.float32)
    return features, frame["label"].to_numpy(np.int64), frame["site"].to_numpy(np.str_)


def sound_table(datasets: Path, work: Path = WORK) -> Path:
    """The recordings' features with `label` and `site`, as Parquet; computed unless it is there.

    Args:
        datasets: folder with the data sets.
        work: where the environment and the table are kept.
    """
    table = work / TABLE
    if not table.is_file():
        index = pd.read_csv(datasets / "fsdd" / "index.csv", dtype=str)
        features = _encoded([str((datasets / "fsdd" / path).resolve()) for path in index["path"]], work)
        frame = pd.DataFrame(features, columns=_columns()).assign(label=index["label"], site=index["site"])
        frame.to_parquet(partial := table.with_suffix(".partial"), index=False)
        partial.replace(table)
    return table


def _columns() -> list[str]:
    return [f"x{number:02d}" for number in range(WIDTH)]


def _encoded(paths: list[str], work: Path) -> NDArray[np.float32]:
    """Features of the recordings, computed in the encoder's environment."""
    python = _environment(work / "environment")
    asked, answered = work / "paths.json", work / "features.npy"
    asked.write_text(json.dumps(paths), encoding="utf-8")
    subprocess.run([str(python), str(HERE / "sound_encoder.py"), str(asked), str(answered)], check=True)
    features: NDArray[np.float32] = np.load(answered)
    return features


def _environment(folder: Path) -> Path:
    """The encoder's own Python with exactly sound_encoder.txt, set up if that changed."""
    wanted, installed, python = HERE / "sound_encoder.txt", folder / "installed.txt", folder / "bin" / "python"
    if not installed.is_file() or installed.read_bytes() != wanted.read_bytes():
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "-qq", "--no-deps", "-r", str(wanted)], check=True)
        shutil.copyfile(wanted, installed)
    return python


def main() -> None:
    """Compute the table and say what is in it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--datasets", type=Path, required=True, help="folder with the data sets")
    parser.add_argument("--work", type=Path, default=WORK, help="where environment and table are kept")
    chosen = parser.parse_args()
    features, digits, speakers = sound_features(chosen.datasets, chosen.work)
    print(f"{len(features)} recordings, {features.shape[1]} features, {len(set(digits))} digits, {set(speakers)}")


if __name__ == "__main__":
    main()
