# SPDX-License-Identifier: Apache-2.0
"""What the accuracy study measures and what it found: sets, methods, runs, and rows over seeds.

Promises means with the standard deviation over seeds, and differences taken seed by seed.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from figures import EPSILONS

OWN = {
    "heart_4hospitals": "natural",
    "ade_corpus_v2": "iid",
    "sst2": "iid",
    "chest_xray_pneumonia": "iid",
    "fsdd": "iid",
    "demo": "natural",
}
"""The sets, and how each is divided among sites where nothing else is said."""

DIVISIONS = dict.fromkeys(OWN, ("dirichlet",)) | {
    "heart_4hospitals": ("iid", "dirichlet"),
    "fsdd": ("natural", "dirichlet"),
    "demo": (),
}
"""Other divisions of the same training records."""

WITH_PATIENTS = ("ade_corpus_v2", "chest_xray_pneumonia")


@dataclass(frozen=True, kw_only=True)
class Method:
    """A row of the study.

    Attributes:
        title: in the tables.
        epsilons: at which it runs; (None,) without privacy.
        moved: whether it runs under other divisions too.
        sets: on which, if not on all five.
        seeds: at most, where a check takes long.
    """

    title: str
    epsilons: tuple[float | None, ...] = EPSILONS
    moved: bool = False
    sets: tuple[str, ...] = tuple(name for name in OWN if name != "demo")
    seeds: int = 5

    def cells(self, name: str) -> list[tuple[str, float | None]]:
        """Division and ε of each run of a set."""
        if name not in self.sets:
            return []
        divisions = (OWN[name], *(DIVISIONS[name] if self.moved else ()))
        return [(division, epsilon) for division in divisions for epsilon in self.epsilons]


METHODS = {
    "fedavg-opacus": Method(title="FedAvg + Opacus"),
    "fedavg-opacus-tuned": Method(title="FedAvg + Opacus, tuned"),
    "veil-local": Method(title="Veil, local noise", moved=True),
    "veil-distributed": Method(title="Veil, distributed noise", moved=True),
    "centralized-dp": Method(title="pooled, with DP"),
    "local-only-dp": Method(title="alone, with DP"),
    "local-only": Method(title="alone, no privacy", epsilons=(None,)),
    "pooled": Method(title="pooled, no privacy", epsilons=(None,)),
    "fedavg-opacus-by-record": Method(title="FedAvg + Opacus, protecting records only", sets=WITH_PATIENTS),
    "veil-local-by-record": Method(title="Veil, local noise, protecting records only", sets=WITH_PATIENTS),
    "veil-dp-fedavg": Method(title="Veil, dp-fedavg", epsilons=(3.0,), seeds=3),
    "veil-no-noise": Method(title="Veil, no noise, clip 10", epsilons=(None,), seeds=1),
    "demo": Method(title="the demo", epsilons=(3.0,), sets=("demo",)),
}
COMPARED = tuple(METHODS)[:8]
"""Those of the main table; the others stand beside it."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One finished run, or one that is wanted.

    Attributes:
        set: name of the data set.
        division: natural, iid or dirichlet.
        method: a key of METHODS, or a trial of the tuning.
        epsilon: promised to every unit; None without privacy.
        seed: of split and division.
        accuracy: on everybody's held-out records, percent.
        macro_f1: on the same, percent.
        units: that each site trains on.
        settings: of a tuned method.
        seconds: it took.
    """

    set: str
    division: str
    method: str
    epsilon: float | None
    seed: int
    accuracy: float = 0.0
    macro_f1: float = 0.0
    units: list[int] = field(default_factory=list)
    settings: str = ""
    seconds: float = 0.0

    @property
    def key(self) -> tuple[object, ...]:
        """What it is, without what it found."""
        return self.set, self.division, self.method, self.epsilon, self.seed


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of accuracy.json: a method on a set at an ε, over seeds.

    Attributes:
        set: name of the data set, followed by the division where it is not the set's own.
        method: a key of METHODS.
        epsilon: promised; None without privacy.
        mean: accuracy on everybody's held-out records, percent.
        sd: its standard deviation over seeds.
        seeds: how many.
        values: of each seed.
        macro_f1: mean, percent.
        units: that the sites train on: fewest, mean, most.
        settings: of a tuned method, most frequent first.
    """

    set: str
    method: str
    epsilon: float | None
    mean: float
    sd: float
    seeds: int
    values: list[float]
    macro_f1: float
    units: list[float]
    settings: list[str]


@dataclass(frozen=True, kw_only=True)
class Gap:
    """A difference of two rows, seed by seed.

    Attributes:
        mean: points.
        error: its standard error over the seeds; None where the rows' seeds differ, or there is one.
    """

    mean: float
    error: float | None

    @classmethod
    def between(cls, one: Row, two: Row) -> Gap:
        """One less two."""
        apart = [left - right for left, right in zip(one.values, two.values, strict=False)]
        paired = len(one.values) == len(two.values) > 1
        error = statistics.stdev(apart) / math.sqrt(len(apart)) if paired else None
        return cls(mean=round(one.mean - two.mean, 2), error=error)

    def __str__(self) -> str:
        return f"{self.mean:+.1f}" + ("" if self.error is None else f" ± {self.error:.1f}")


def row(runs: Collection[Run]) -> Row:
    """The line of some runs that differ in their seed only."""
    first, values = next(iter(runs)), [run.accuracy for run in runs]
    units = [units for run in runs for units in run.units]
    chosen = [run.settings for run in runs if run.settings]
    return Row(
        set=set_name(first.set, first.division),
        method=first.method,
        epsilon=first.epsilon,
        mean=round(statistics.fmean(values), 2),
        sd=round(statistics.stdev(values), 2) if len(values) > 1 else 0.0,
        seeds=len(values),
        values=values,
        macro_f1=round(statistics.fmean(run.macro_f1 for run in runs), 2),
        units=[min(units), round(statistics.fmean(units), 1), max(units)],
        settings=sorted(set(chosen), key=chosen.count, reverse=True),
    )


def set_name(name: str, division: str) -> str:
    return name if division == OWN[name] else f"{name}, {division}"


class Results:
    """The rows, found by what they are.

    Args:
        rows: lines of accuracy.json.
    """

    def __init__(self, rows: Iterable[Row]) -> None:
        self._rows = {(row.set, row.method, row.epsilon): row for row in rows}

    def find(self, name: str, method: str, epsilon: float | None) -> Row | None:
        """A row; that of a method without ε whatever ε is asked."""
        return self._rows.get((name, method, epsilon)) or self._rows.get((name, method, None))

    def gap(self, name: str, epsilon: float, method: str, other: str) -> Gap | None:
        """How much better a method is than another."""
        one, two = self.find(name, method, epsilon), self.find(name, other, epsilon)
        return None if one is None or two is None else Gap.between(one, two)

    def sets(self) -> list[str]:
        """The sets that something was measured on, the demo not counted."""
        return [name for name in OWN if name != "demo" and any(key[0] == name for key in self._rows)]

    def sites(self, name: str) -> Row | None:
        """Any row of a set, which says how large its sites are."""
        return next((row for key, row in self._rows.items() if key[0] == name), None)
