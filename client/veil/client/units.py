# SPDX-License-Identifier: Apache-2.0
"""A site's records as the mechanism sees them: units, each with at most a bounded number of records.

Promises that a unit's records are chosen by a keyed hash alone, so that the choice is stable over rounds and does not
depend on any other unit.
"""

from __future__ import annotations

import hashlib
import hmac
import itertools
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from veil.common.head import head_inputs, unit_rows


@dataclass(frozen=True, kw_only=True, slots=True)
class Units:
    """Records grouped by unit.

    Attributes:
        features: pooled outputs of the frozen backbone, [n, d].
        labels: class of each record, [n].
        unit: index of each record's unit, 0 to `count` - 1, [n].
        count: number of units.
        held: further units, which never train; None where the plan asks for no evaluation.
    """

    features: NDArray[np.floating]
    labels: NDArray[np.int64]
    unit: NDArray[np.int64]
    count: int
    held: Units | None = None
    _batch: dict[bytes, HeadBatch] = field(default_factory=dict, init=False, repr=False, compare=False)

    def batch(self, centre: NDArray[np.floating]) -> HeadBatch:
        """The head's view of these records around a centre [d]; kept until another centre comes."""
        key = centre.tobytes()
        if key not in self._batch:
            self._batch.clear()
            self._batch[key] = HeadBatch.of(self, centre)
        return self._batch[key]

    @property
    def sizes(self) -> NDArray[np.int64]:
        """Records of each unit, [count]."""
        return np.bincount(self.unit, minlength=self.count).astype(np.int64)

    @property
    def total(self) -> int:
        """Number of units, those held out among them."""
        return self.count + (self.held.count if self.held else 0)

    def mean_rows(self) -> NDArray[np.float64]:
        """Mean unit-length feature of each unit, [count, d], each of length at most 1."""
        return self.means(unit_rows(self.features))

    def means(self, rows: NDArray[np.float64]) -> NDArray[np.float64]:
        """Mean of each unit's records' rows: [n, m] to [count, m]."""
        sums = np.zeros((self.count, rows.shape[1]))
        np.add.at(sums, self.unit, rows)
        return sums / np.maximum(self.sizes, 1)[:, None]


def bounded_units(
    features: NDArray[np.floating],
    labels: NDArray[np.int64],
    names: NDArray[np.str_],
    *,
    max_records: int,
    key: bytes,
    held: NDArray[np.bool_] | None = None,
) -> Units:
    """Group records by unit and keep at most `max_records` of each.

    Args:
        features: [n, d].
        labels: [n].
        names: unit of each record, [n].
        max_records: the bound; further records of a unit do not take part.
        key: the site's secret key of the hash.
        held: which records never train, all of a unit or none, [n]; None where the plan asks for no evaluation.
    """
    if held is not None:
        training, kept_out = (
            bounded_units(features[part], labels[part], names[part], max_records=max_records, key=key)
            for part in (~held, held)
        )
        return replace(training, held=kept_out)
    distinct, unit = np.unique(names, return_inverse=True)
    kept: list[int] = []
    for index, rows_of in enumerate(_rows_by_unit(unit, len(distinct))):
        kept.extend(_drawn(rows_of, key, str(distinct[index]), max_records))
    rows = np.array(sorted(kept), dtype=np.int64)
    return Units(features=features[rows], labels=labels[rows], unit=unit[rows].astype(np.int64), count=len(distinct))


def _drawn(rows: NDArray[np.int64], key: bytes, name: str, most: int) -> list[int]:
    """At most `most` rows of one unit, by hash of their place among the unit's own records, not in the table."""

    def rank(place: int) -> bytes:
        return hmac.new(key, f"{name}\0{place}".encode(), hashlib.sha256).digest()

    return [int(rows[place]) for place in sorted(range(len(rows)), key=rank)[:most]]


def _rows_by_unit(unit: NDArray[np.integer], count: int) -> list[NDArray[np.int64]]:
    """Rows of each unit, in the table's order."""
    order = np.argsort(unit, kind="stable")
    ends = np.searchsorted(unit[order], np.arange(count + 1))
    return [order[start:end].astype(np.int64) for start, end in itertools.pairwise(ends)]


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadBatch:
    """What one step of a linear head reads, with all that does not change between steps.

    Attributes:
        inputs: head inputs, [n, d + 1].
        labels: [n].
        unit: [n].
        count: number of units.
        share: 1 / records of the record's unit, [n].
        pairs: pairs of different records of one unit, i < j, [2, m].
        dots: inner products of the pairs' inputs, [m].
    """

    inputs: NDArray[np.float64]
    labels: NDArray[np.int64]
    unit: NDArray[np.int64]
    count: int
    share: NDArray[np.float64]
    pairs: NDArray[np.int64]
    dots: NDArray[np.float64]

    @classmethod
    def of(cls, units: Units, centre: NDArray[np.floating]) -> HeadBatch:
        """Prepare units for a centre."""
        inputs = head_inputs(units.features, centre)
        pairs = _pairs(units.unit, units.count)
        return cls(
            inputs=inputs,
            labels=units.labels,
            unit=units.unit,
            count=units.count,
            share=1.0 / units.sizes[units.unit] if len(units.unit) else np.zeros(0),
            pairs=pairs,
            dots=np.einsum("md,md->m", inputs[pairs[0]], inputs[pairs[1]]),
        )

    def take(self, chosen: NDArray[np.bool_]) -> HeadBatch:
        """The batch of some units only: `chosen` [count]. Unit numbers stay as they are."""
        rows = chosen[self.unit]
        position = np.cumsum(rows) - 1
        kept = rows[self.pairs[0]]
        return HeadBatch(
            inputs=self.inputs[rows],
            labels=self.labels[rows],
            unit=self.unit[rows],
            count=self.count,
            share=self.share[rows],
            pairs=position[self.pairs[:, kept]],
            dots=self.dots[kept],
        )


def _pairs(unit: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    found = [pair for rows in _rows_by_unit(unit, count) for pair in itertools.combinations(rows.tolist(), 2)]
    return np.array(found, dtype=np.int64).reshape(-1, 2).T
