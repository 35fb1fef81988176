# SPDX-License-Identifier: Apache-2.0
"""The sets on which the study of rule.py chooses and judges: frozen features, labels, units, and how they are divided.

Promises that no unit is on both sides of a split, and that no record of a set to choose on is in a set to judge on.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import load_breast_cancer, load_digits, load_iris, load_wine
from sound import sound_features

from veil.common.head import scaled, unit_rows
from veil.common.plan import parse_plan
from veil.simulations.evaluation import non_private
from veil.simulations.screen import Screen
from veil.simulations.simulate import prepare

HERE = Path(__file__).parent
TEST_FRACTION = 0.2
MAX_RECORDS = 8
"""Records of one unit that train, as in the plans."""

Floats = NDArray[np.floating]
Integers = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """Pairs of different records of one unit, ordered by unit.

    Attributes:
        first, second: rows, [m].
        dots: inner products of their unit rows, [m].
        unit: the units that have a pair, [u].
        starts: each such unit's first pair, [u].
    """

    first: Integers
    second: Integers
    dots: Floats
    unit: Integers
    starts: Integers


@dataclass(frozen=True, kw_only=True)
class Split:
    """One division of a set into training and test units.

    Attributes:
        rows: unit rows of the records that train, ordered by unit, float32 [n, d].
        labels: [n].
        unit: [n], 0 to `count` - 1.
        count: number of training units.
        test_rows, test_labels: held-out records.
        classes: number of classes.
        sites: number of sites; sums do not see which unit is where.
        reference: accuracy of the product's non-private reference on the same split.
    """

    rows: Floats
    labels: Integers
    unit: Integers
    count: int
    test_rows: Floats
    test_labels: Integers
    classes: int
    sites: int
    reference: float

    @cached_property
    def share(self) -> Floats:
        """1 / records of the record's unit, [n]."""
        return (1.0 / np.bincount(self.unit)[self.unit]).astype(np.float32)

    @cached_property
    def starts(self) -> Integers:
        """Each unit's first row, [count]."""
        return np.searchsorted(self.unit, np.arange(self.count))

    @cached_property
    def mean_sum(self) -> NDArray[np.float64]:
        """Sum over units of their mean unit row, [d]."""
        return np.asarray(self.share.astype(np.float64) @ self.rows.astype(np.float64))

    @cached_property
    def pairs(self) -> Pairs | None:
        """None where every unit has one record."""
        if self.count == len(self.unit):
            return None
        ends = [*self.starts[1:], len(self.unit)]
        found = [
            pair
            for start, end in zip(self.starts, ends, strict=True)
            for pair in itertools.combinations(range(start, end), 2)
        ]
        first, second = np.array(found, dtype=np.int64).T
        unit, starts = np.unique(self.unit[first], return_index=True)
        dots = np.einsum("md,md->m", self.rows[first], self.rows[second])
        return Pairs(first=first, second=second, dots=dots, unit=unit, starts=starts)


@dataclass(frozen=True, kw_only=True)
class Records:
    """A whole set.

    Attributes:
        features: [n, d].
        labels: [n].
        units: name or number of each record's unit, [n].
        sites: number of sites it is thought to lie at.
    """

    features: Floats
    labels: Integers
    units: NDArray[np.generic]
    sites: int

    @property
    def classes(self) -> int:
        """Number of classes."""
        return int(self.labels.max()) + 1

    def only(self, chosen: Integers, sites: int) -> Records:
        """Some of the records, in the order of the table."""
        rows = np.sort(chosen)
        return Records(features=self.features[rows], labels=self.labels[rows], units=self.units[rows], sites=sites)

    def split(self, seed: int) -> Split:
        """Hold a fifth of the units out."""
        rng = np.random.default_rng(seed)
        _, unit = np.unique(self.units, return_inverse=True)
        held = rng.permutation(unit.max() + 1) < TEST_FRACTION * (unit.max() + 1)
        train, test = np.flatnonzero(~held[unit]), np.flatnonzero(held[unit])
        reference = non_private(
            self.features[train], self.labels[train], self.features[test], self.labels[test], self.classes
        )
        rows = _bounded(train, unit, rng)
        _, numbered = np.unique(unit[rows], return_inverse=True)
        return Split(
            rows=unit_rows(self.features[rows]).astype(np.float32),
            labels=self.labels[rows],
            unit=numbered.astype(np.int64),
            count=int(numbered.max()) + 1,
            test_rows=unit_rows(self.features[test]).astype(np.float32),
            test_labels=self.labels[test],
            classes=self.classes,
            sites=self.sites,
            reference=reference.accuracy,
        )


def _bounded(rows: Integers, unit: Integers, rng: np.random.Generator) -> Integers:
    """At most `MAX_RECORDS` rows of each unit, ordered by unit."""
    shuffled = rng.permutation(rows)
    ordered = shuffled[np.argsort(unit[shuffled], kind="stable")]
    place = np.arange(len(ordered)) - np.searchsorted(unit[ordered], unit[ordered])
    return np.asarray(ordered[place < MAX_RECORDS])


def of_plan(name: str, datasets: Path, *, by_record: bool = False, sites: int | None = None) -> Records:
    """The records of a plan of benchmarks/plans with Veil's own features."""
    plan = parse_plan(HERE / "plans" / f"{name}.toml")
    if plan.simulation is None:
        raise ValueError(f"plan {name} has no [simulation]")
    pool, _ = prepare(plan, plan.simulation, datasets, Screen(quiet=True))
    units = np.arange(len(pool.features)) if by_record else pool.examples.units
    return Records(
        features=np.asarray(pool.features), labels=pool.examples.labels, units=units, sites=sites or len(pool.shares)
    )


def rare(records: Records, *, label: int, share: float, sites: int) -> Records:
    """A subset in which one class has the given share of the records."""
    rng = np.random.default_rng(0)
    members, others = np.flatnonzero(records.labels == label), np.flatnonzero(records.labels != label)
    kept = rng.permutation(members)[: round(share / (1 - share) * len(others))]
    return records.only(np.concatenate([kept, others]), sites)


def few(records: Records, *, count: int, sites: int) -> Records:
    """A random subset."""
    return records.only(np.random.default_rng(0).permutation(len(records.labels))[:count], sites)


def _plain(features: Floats, labels: Integers, sites: int) -> Records:
    return Records(features=features, labels=labels.astype(np.int64), units=np.arange(len(labels)), sites=sites)


def _columns(bunch: object, sites: int) -> Records:
    """A table whose columns are mapped to [-1, 1], as `task.bounds` does; the bounds are taken to be public."""
    data, target = np.asarray(bunch.data), np.asarray(bunch.target)  # type: ignore[attr-defined]  # a Bunch names none
    columns = [scaled(column, (float(column.min()), float(column.max()))) for column in data.T]
    return _plain(np.stack(columns, axis=1), target, sites)


def digits() -> Records:
    """scikit-learn's handwritten digits: 64 pixels, 10 classes, 10 sites of 144."""
    bunch = load_digits()
    return _plain(bunch.data / 16.0, bunch.target, 10)


def wide_digits(width: int = 1024) -> Records:
    """The digits as random Fourier features of a Gaussian kernel (Rahimi & Recht 2007)."""
    rng, plain = np.random.default_rng(0), digits()
    frequencies = rng.normal(size=(plain.features.shape[1], width)) * 0.35
    phases = rng.uniform(0, 2 * np.pi, width)
    return _plain(np.cos(plain.features @ frequencies + phases), plain.labels, 10)


def digit_pairs(*, count: int, classes: int, sites: int) -> Records:
    """Made up: two digits side by side; the class is both (100), or the first and the second's parity (20)."""
    rng, plain = np.random.default_rng(0), digits()
    first, second = rng.integers(0, len(plain.labels), (2, count))
    features = np.hstack([unit_rows(plain.features[first]), unit_rows(plain.features[second])])
    labels = plain.labels[first] * (classes // 10) + plain.labels[second] % (classes // 10)
    return _plain(features, labels, sites)


def spoken(datasets: Path, *, by_speaker: bool = False) -> Records:
    """Spoken digits as features of a pretrained speech encoder (sound.py), 6 sites.

    With `by_speaker` a class is a digit of one speaker, 60 in all.
    """
    features, digit, speakers = sound_features(datasets)
    speaker = np.unique(speakers, return_inverse=True)[1]
    return _plain(features, digit + 10 * speaker if by_speaker else digit, 6)


Source = Callable[[Path], Records]


def _sst2(datasets: Path) -> Records:
    return of_plan("sst2", datasets)


CHOOSE: dict[str, Source] = {
    "ade": partial(of_plan, "ade_corpus_v2"),
    "ade-large": partial(of_plan, "ade_corpus_v2", by_record=True, sites=2),
    "digits": lambda _: digits(),
    "digits-wide": lambda _: wide_digits(),
    "digit-pairs-20": lambda _: digit_pairs(count=50_000, classes=20, sites=2),
    "digit-pairs-100": lambda _: digit_pairs(count=10_000, classes=100, sites=5),
    "breast-cancer": lambda _: _columns(load_breast_cancer(), 3),
}
"""Sets that the rule's constants were chosen on."""

JUDGE: dict[str, Source] = {
    "heart": partial(of_plan, "heart_4hospitals"),
    "sst2": _sst2,
    "sst2-rare": lambda datasets: rare(_sst2(datasets), label=1, share=0.08, sites=5),
    "sst2-few": lambda datasets: few(_sst2(datasets), count=1250, sites=10),
    "chest": partial(of_plan, "chest_xray_pneumonia"),
    "fsdd": spoken,
    "fsdd-60": partial(spoken, by_speaker=True),
    "wine": lambda _: _columns(load_wine(), 2),
    "iris": lambda _: _columns(load_iris(), 2),
}
"""Sets that were looked at once the rule stood."""
