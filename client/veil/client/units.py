# SPDX-License-Identifier: Apache-2.0
"""A site's records as the mechanism sees them: units, each with at most a bounded number of records.

Promises that a unit's records are chosen by a keyed hash alone, so that the choice is stable over rounds and does not
depend on any other unit.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from veil.client.head_batch import Batch, Kept, head_batch, rows_by_unit
from veil.common.head import unit_rows
from veil.common.objective import Targets

_PIECE = 2**15
"""Records of a piece: of 1280 features, a third of a gigabyte while it is worked on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Units:
    """Records grouped by unit.

    Attributes:
        features: pooled outputs of the frozen backbone, [n, d].
        labels: the truth of each record, [n] or [n, c]: see `veil.common.objective.Targets`.
        unit: index of each record's unit, 0 to `count` - 1, [n].
        count: number of units.
        held: further units, which never train; None where the plan asks for no evaluation.
        groups: of each record, as `veil.common.group_quality.group_numbers`, [n]; None where the plan names none.
    """

    features: NDArray[np.floating]
    labels: Targets
    unit: NDArray[np.int64]
    count: int
    held: Units | None = None
    groups: NDArray[np.int64] | None = None
    _batch: Kept = field(default_factory=Kept, init=False, repr=False, compare=False)

    def batch(self, centre: NDArray[np.floating], classes: int = 2) -> Batch:
        """The head's view of these records around a centre [d]; kept, where there is room, until another centre comes.

        Args:
            centre: [d].
            classes: the head's, by which a step's memory is estimated.
        """
        key = centre.tobytes()
        found = self._batch.get(key)
        if found is None:
            prepared = head_batch(self, centre, classes)
            self._batch.put(key, prepared)
            return prepared
        return found

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
        if len(rows):
            order = np.argsort(self.unit, kind="stable")
            present, starts = np.unique(self.unit[order], return_index=True)
            sums[present] = np.add.reduceat(rows[order], starts, axis=0)
        return sums / np.maximum(self.sizes, 1)[:, None]

    def pieces(self, most: int = _PIECE) -> Iterator[Units]:
        """These units in pieces of at most `most` records, or of one unit; a piece numbers its units from 0.

        So that what is worked out of all records takes a bounded amount of memory.
        """
        if len(self.unit) <= most:
            yield self
            return
        groups = [rows for rows in rows_by_unit(self.unit, self.count) if len(rows)]
        ends = np.cumsum([len(rows) for rows in groups])
        first = 0
        while first < len(groups):
            before = int(ends[first - 1]) if first else 0
            last = max(first + 1, int(np.searchsorted(ends, before + most, side="right")))
            rows = np.sort(np.concatenate(groups[first:last]))
            _, unit = np.unique(self.unit[rows], return_inverse=True)
            yield Units(
                features=self.features[rows],
                labels=self.labels[rows],
                unit=unit.astype(np.int64),
                count=last - first,
                groups=None if self.groups is None else self.groups[rows],
            )
            first = last

    def only(self, chosen: NDArray[np.bool_]) -> Units:
        """The records of some units: `chosen` [count]. Unit numbers stay as they are."""
        rows = np.flatnonzero(chosen[self.unit])
        return Units(
            features=self.features[rows],
            labels=self.labels[rows],
            unit=self.unit[rows],
            count=self.count,
            groups=None if self.groups is None else self.groups[rows],
        )


def bounded_units(
    features: NDArray[np.floating],
    labels: Targets,
    names: NDArray[np.str_],
    *,
    max_records: int,
    key: bytes,
    held: NDArray[np.bool_] | None = None,
    groups: NDArray[np.int64] | None = None,
) -> Units:
    """Group records by unit and keep at most `max_records` of each.

    Args:
        features: [n, d].
        labels: [n] or [n, c].
        names: unit of each record, [n].
        max_records: the bound; further records of a unit do not take part.
        key: the site's secret key of the hash.
        held: which records never train, all of a unit or none, [n]; None where the plan asks for no evaluation.
        groups: of each record, [n]; None where the plan names none.
    """
    if held is not None:
        training, kept_out = (
            bounded_units(
                features[part],
                labels[part],
                names[part],
                max_records=max_records,
                key=key,
                groups=None if groups is None else groups[part],
            )
            for part in (~held, held)
        )
        return replace(training, held=kept_out)
    distinct, unit = _numbered(names)
    by_unit = rows_by_unit(unit, len(distinct))
    taking_part = [
        rows if len(rows) <= max_records else _drawn(rows, key, str(name), max_records)
        for rows, name in zip(by_unit, distinct, strict=True)
    ]
    rows = np.sort(np.concatenate([np.zeros(0, np.int64), *taking_part]))
    if len(rows) < len(unit):
        features, labels, unit = features[rows], labels[rows], unit[rows]
        groups = None if groups is None else groups[rows]
    return Units(features=features, labels=labels, unit=unit.astype(np.int64), count=len(distinct), groups=groups)


def _numbered(names: NDArray[np.str_]) -> tuple[NDArray[np.str_], NDArray[np.int64]]:
    """The units in the order in which they first appear, whatever they are called, and each record's."""
    distinct, first, unit = np.unique(names, return_index=True, return_inverse=True)
    order = np.argsort(first)
    return distinct[order], np.argsort(order)[unit]


def _drawn(rows: NDArray[np.int64], key: bytes, name: str, most: int) -> NDArray[np.int64]:
    """At most `most` rows of one unit, by hash of their place among the unit's own records, not in the table."""

    def rank(place: int) -> bytes:
        return hmac.new(key, f"{name}\0{place}".encode(), hashlib.sha256).digest()

    return rows[sorted(range(len(rows)), key=rank)[:most]]
