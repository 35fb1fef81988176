# SPDX-License-Identifier: Apache-2.0
"""A site's records for a model that is tuned below its head: the units, and each record as the model reads it.

Promises that a record that cannot be read counts as zero and says nothing to anyone outside, and that records as the
model takes them are kept in a bounded amount of memory.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

from veil.client.examples import Examples
from veil.client.head_batch import rows_by_unit
from veil.client.units import Units
from veil.common.errors import TableError
from veil.common.plan import RunPlan
from veil.common.task_heads import Record, Truth
from veil.common.tunable import TunableModel

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class TunedUnits:
    """Records grouped by unit, beside the model that is tuned on them.

    Attributes:
        pooled: the units with the features that the pretrained model gives, for the centring round and the head's own.
        rows: the same units with each record's place in `inputs` as its one feature.
        inputs: texts or paths.
        model: the model.
        truths: of each input, where a truth has a structure; else None, and the rows' labels are it.
    """

    pooled: Units
    rows: Units
    inputs: Sequence[str] | Sequence[Path]
    model: TunableModel
    truths: Sequence[str] | None = None
    _read: dict[int, Record] = field(default_factory=dict, init=False, repr=False)
    _taken: list[int] = field(default_factory=lambda: [0], init=False, repr=False)

    @property
    def count(self) -> int:
        """Number of units that train."""
        return self.rows.count

    @property
    def total(self) -> int:
        """Number of units, those held out among them."""
        return self.rows.total

    def records(self, chosen: NDArray[np.bool_]) -> Iterator[Sequence[Record]]:
        """Each chosen unit's records; `chosen` [count]."""
        places = self.rows.features[:, 0].astype(np.int64)
        for unit, rows in enumerate(rows_by_unit(self.rows.unit, self.rows.count)):
            if chosen[unit] and len(rows):
                yield [self._record(int(places[row]), self.rows.labels[row]) for row in rows]

    def at(self, places: NDArray[np.floating]) -> list[Any]:
        """The inputs at some places, [n, 1]."""
        return [self.inputs[int(place)] for place in places[:, 0]]

    def truths_at(self, places: NDArray[np.floating]) -> list[str]:
        """Their truths, where these have a structure."""
        return [(self.truths or ())[int(place)] for place in places[:, 0]]

    def _record(self, place: int, label: Any) -> Record:
        if place in self._read:
            return self._read[place]
        truth: Truth = label if self.truths is None else self.truths[place]
        try:
            found = self.model.record(self.inputs[place], truth)
        except TableError as error:
            _log.warning("record %d counts as zero: %s", place + 1, error)
            found = Record(inputs=None, target=torch.zeros(()))
        size = sum(one.numel() * one.element_size() for one in (found.inputs or {}).values())
        if self._taken[0] + size <= self.model.read_room:
            self._taken[0] += size
            self._read[place] = found
        return found


def tuned_units(
    bounded: Callable[[NDArray[np.floating]], Units],
    features: Callable[[], NDArray[np.floating]],
    examples: Examples,
    model: TunableModel,
    plan: RunPlan,
) -> TunedUnits:
    """A site's records for a plan's model.

    Args:
        bounded: groups rows [n, m] by unit and leaves out what is too much of one.
        features: gives the pretrained model's features, [n, d]; asked where a round of the plan reads them.
        examples: the records.
        model: the plan's.
        plan: the run's.
    """
    places = np.arange(len(examples), dtype=np.float64)[:, None]
    rows = bounded(places)
    return TunedUnits(
        pooled=bounded(features()) if plan.training.centre or plan.transfer.head_rounds else rows,
        rows=rows,
        inputs=cast(Sequence[Any], examples.inputs),
        model=model,
        truths=examples.truths,
    )
