# SPDX-License-Identifier: Apache-2.0
"""What every measured system is given and answers: a workload file in, one JSON line out.

Promises to need numpy only, so that it can be read from each peer's own environment.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """One workload, the same file for every system.

    Attributes:
        workload: a, b or c.
        features: path of float32 [records, width], sites one after the other; None where notes are given.
        labels: path of int64 [records].
        offsets: first row of each site and, last, the number of records.
        notes: path of a JSON list of texts, one a record; None where features are given.
        test_notes: path of {"texts": [...], "labels": [...]}, held out, site after site; None where features are given.
        test_offsets: first of each site's held-out notes and, last, their number; empty where features are given.
        backbone: folder of the pretrained encoder's files, for notes.
        max_length: tokens of a note that are read.
        sites: number of sites.
        width: features of a record.
        classes: number of classes.
        rounds: training rounds.
        cohort: sites asked in a round.
        batch: expected records of a local step.
        local_steps: local steps of a site in a round.
        sample_rate: chance of a record to be in a step.
        sigma: noise over the clipping bound.
        max_grad_norm: clipping bound of one record's gradient.
        learning_rate: of the local step.
        private: whether sites clip and add noise.
        seed: of what is random and public.
        threads: cores the systems may use.
        folder: an empty folder to write in.
    """

    workload: str
    features: str | None
    labels: str
    offsets: list[int]
    notes: str | None
    test_notes: str | None
    test_offsets: list[int]
    backbone: str | None
    max_length: int
    sites: int
    width: int
    classes: int
    rounds: int
    cohort: int
    batch: int
    local_steps: int
    sample_rate: float
    sigma: float
    max_grad_norm: float
    learning_rate: float
    private: bool
    seed: int
    threads: int
    folder: str

    @property
    def client_rounds(self) -> int:
        """How often a site trains, over the whole run."""
        return self.rounds * self.cohort

    def rows(self, site: int) -> slice:
        """The records of one site."""
        return slice(self.offsets[site], self.offsets[site + 1])

    def read_test(self) -> tuple[list[str], list[int]]:
        """Held-out notes and their labels."""
        if self.test_notes is None:
            raise ValueError(f"workload {self.workload} holds no notes out")
        held_out = json.loads(Path(self.test_notes).read_text(encoding="utf-8"))
        return held_out["texts"], held_out["labels"]

    def read_features(self) -> NDArray[np.float32]:
        """[records, width], mapped from the file."""
        if self.features is None:
            raise ValueError(f"workload {self.workload} has no features; it starts from notes")
        mapped: NDArray[np.float32] = np.load(self.features, mmap_mode="r")
        return mapped

    def read_labels(self) -> NDArray[np.int64]:
        """[records]."""
        labels: NDArray[np.int64] = np.load(self.labels)
        return labels

    def read_notes(self) -> list[str]:
        """One text per record."""
        notes: list[str] = json.loads(Path(self.notes or "").read_text(encoding="utf-8"))
        return notes


def read_workload(path: str | None = None) -> Workload:
    """The workload file named on the command line, or a given one; keys that only the harness uses are left out."""
    document = json.loads(Path(path or sys.argv[1]).read_text(encoding="utf-8"))
    known = {field.name for field in fields(Workload)}
    return Workload(**{key: value for key, value in document.items() if key in known})


def accuracy(
    weight: NDArray[np.float32], bias: NDArray[np.float32], features: NDArray[np.float32], labels: NDArray[np.int64]
) -> float:
    """Share of records whose class a linear head names, so that a figure for no work is noticed.

    Args:
        weight: [classes, width].
        bias: [classes].
        features: [records, width].
        labels: [records].
    """
    return round(float(np.mean((features @ weight.T + bias).argmax(axis=1) == labels)), 4)


def answer(**figures: object) -> None:
    """Print the line that the harness reads."""
    print(json.dumps(figures), flush=True)
