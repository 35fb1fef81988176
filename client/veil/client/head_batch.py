# SPDX-License-Identifier: Apache-2.0
"""What one step of a linear head reads: records ready for two matrix products, in memory or a block at a time.

Promises that no block divides a unit, that the sum over blocks is the sum over all, and that the batches that a process
keeps from step to step take a bounded amount of memory together, however many sites and records there are.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from veil.client.exact_products import input_step, on_grid
from veil.common.head import head_inputs
from veil.common.objective import Targets

ROOM_BYTES = 2**30
"""What all kept batches of a process take together, at most."""

_BLOCK_BYTES = 2**26
"""What a block takes that is made anew for every step, where there is no room to keep it."""

_ROWS_AT_ONCE = 2048
"""Rows made ready in one piece: what lies between features and inputs stays small."""


class Grouped(Protocol):
    """Records grouped by unit: see `veil.client.units.Units`."""

    @property
    def features(self) -> NDArray[np.floating]:
        """[n, d]"""
        ...

    @property
    def labels(self) -> Targets:
        """[n], or [n, c]"""
        ...

    @property
    def unit(self) -> NDArray[np.int64]:
        """[n]"""
        ...

    @property
    def count(self) -> int:
        """Number of units."""
        ...

    @property
    def sizes(self) -> NDArray[np.int64]:
        """Records of each unit, [count]."""
        ...

    def pieces(self, most: int) -> Iterator[Grouped]:
        """The same units in pieces of at most so many records, each with numbers of its own for its units."""
        ...

    def only(self, chosen: NDArray[np.bool_]) -> Grouped:
        """The records of some units only."""
        ...


class Batch(Protocol):
    """The units that one step reads."""

    @property
    def count(self) -> int:
        """Number of units, those without a record in the batch among them."""
        ...

    def blocks(self) -> Iterator[HeadBatch]:
        """Its records, no unit in two blocks."""
        ...

    def take(self, chosen: NDArray[np.bool_]) -> Batch:
        """The batch of some units only: `chosen` [count]. Unit numbers stay as they are."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True, eq=False, weakref_slot=True)
class HeadBatch:
    """A batch in memory, with all that does not change between steps.

    Attributes:
        inputs: head inputs on the grid of `exact_products`, [n, d + 1].
        labels: the truth, [n] or [n, c].
        unit: [n].
        count: number of units.
        share: 1 / records of the record's unit, [n].
        pairs: pairs of different records of one unit, i < j, [2, m].
        dots: inner products of the pairs' inputs, [m].
        squares: squared length of each input, [n].
        largest: no number of the inputs is larger.
    """

    inputs: NDArray[np.float32]
    labels: Targets
    unit: NDArray[np.int64]
    count: int
    share: NDArray[np.float64]
    pairs: NDArray[np.int64]
    dots: NDArray[np.float64]
    squares: NDArray[np.float64]
    largest: float

    @classmethod
    def of(cls, units: Grouped, centre: NDArray[np.floating]) -> HeadBatch:
        """Prepare units for a centre [d]."""
        inputs, pairs = _inputs(units.features, centre), _pairs(units.unit, units.count)
        return cls(
            inputs=inputs,
            labels=units.labels,
            unit=units.unit,
            count=units.count,
            share=1.0 / units.sizes[units.unit] if len(units.unit) else np.zeros(0),
            pairs=pairs,
            dots=np.einsum("md,md->m", *inputs[pairs].astype(np.float64)),
            squares=_squares(inputs),
            largest=float(max(inputs.max(initial=0.0), -inputs.min(initial=0.0))),
        )

    @property
    def nbytes(self) -> int:
        """Memory it takes."""
        arrays = (self.inputs, self.labels, self.unit, self.share, self.pairs, self.dots, self.squares)
        return sum(array.nbytes for array in arrays)

    def blocks(self) -> Iterator[HeadBatch]:
        """Itself."""
        yield self

    def take(self, chosen: NDArray[np.bool_]) -> HeadBatch:
        """The batch of some units only: `chosen` [count]. Unit numbers stay as they are."""
        rows = np.flatnonzero(chosen[self.unit])
        pairs, dots = self.pairs, self.dots
        if pairs.shape[1]:
            kept = chosen[self.unit[pairs[0]]]
            pairs, dots = np.searchsorted(rows, pairs[:, kept]), dots[kept]
        return HeadBatch(
            inputs=self.inputs.take(rows, axis=0),
            labels=self.labels.take(rows, axis=0),
            unit=self.unit.take(rows),
            count=self.count,
            share=self.share.take(rows),
            pairs=pairs,
            dots=dots,
            squares=self.squares.take(rows),
            largest=self.largest,
        )


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class HeadStream:
    """A batch too large to keep: its blocks are prepared from the features anew for every step.

    Attributes:
        units: all of them, perhaps with memory-mapped features.
        centre: [d].
        most: records of a block that holds more than one unit.
    """

    units: Grouped
    centre: NDArray[np.floating]
    most: int

    @property
    def count(self) -> int:
        """Number of units."""
        return self.units.count

    def blocks(self) -> Iterator[HeadBatch]:
        """Its records, no unit in two blocks; a block numbers its own units."""
        for piece in self.units.pieces(self.most):
            yield HeadBatch.of(piece, self.centre)

    def take(self, chosen: NDArray[np.bool_]) -> HeadStream:
        """The batch of some units only: `chosen` [count]. Unit numbers stay as they are."""
        return HeadStream(units=self.units.only(chosen), centre=self.centre, most=self.most)


def head_batch(units: Grouped, centre: NDArray[np.floating], classes: int) -> HeadBatch | HeadStream:
    """The batch of all units: in memory where one step's numbers fit, streamed where they do not.

    Args:
        units: all of them.
        centre: [d].
        classes: rows of the head's weight, of which a step needs a few numbers a record each.
    """
    row_bytes = 4 * (units.features.shape[1] + 1 + 5 * classes)
    if row_bytes * len(units.unit) <= ROOM_BYTES:
        return HeadBatch.of(units, centre)
    return HeadStream(units=units, centre=centre, most=max(1, _BLOCK_BYTES // row_bytes))


class Kept:
    """The last batch of some units, if there was room for it."""

    def __init__(self) -> None:
        self._key = b""
        self._batch: Batch | None = None

    def get(self, key: bytes) -> Batch | None:
        """The batch put last, if it was put under this key."""
        return self._batch if self._key == key else None

    def put(self, key: bytes, batch: HeadBatch | HeadStream) -> None:
        """Keep a batch in the place of the last one, where there is room."""
        self._key, self._batch = b"", None
        if isinstance(batch, HeadStream) or _ROOM.admit(batch):
            self._key, self._batch = key, batch


class _Room:
    """Memory for kept batches, given back when a batch goes."""

    def __init__(self) -> None:
        self._taken, self._mutex = 0, threading.RLock()  # a batch may go while its thread is in here

    def admit(self, batch: HeadBatch) -> bool:
        """Take a batch's bytes, until it goes; False where they are not free."""
        size = batch.nbytes
        with self._mutex:
            if self._taken + size > ROOM_BYTES:
                return False
            self._taken += size
        weakref.finalize(batch, self._give_back, size)
        return True

    def _give_back(self, size: int) -> None:
        with self._mutex:
            self._taken -= size


_ROOM = _Room()


def rows_by_unit(unit: NDArray[np.integer], count: int) -> list[NDArray[np.int64]]:
    """Rows of each unit, in the table's order."""
    order = np.argsort(unit, kind="stable").astype(np.int64)
    ends = np.searchsorted(unit[order], np.arange(count + 1))
    return [order[start:end] for start, end in itertools.pairwise(ends)]


def _inputs(features: NDArray[np.floating], centre: NDArray[np.floating]) -> NDArray[np.float32]:
    inputs = np.empty((len(features), features.shape[1] + 1), np.float32)
    step = input_step(inputs.shape[1])
    for piece in _in_pieces(len(features)):
        inputs[piece] = on_grid(head_inputs(features[piece], centre), step)
    return inputs


def _squares(inputs: NDArray[np.float32]) -> NDArray[np.float64]:
    squares = np.empty(len(inputs))
    for piece in _in_pieces(len(inputs)):
        wide = inputs[piece].astype(np.float64)
        np.einsum("nd,nd->n", wide, wide, out=squares[piece])
    return squares


def _in_pieces(rows: int) -> Iterator[slice]:
    return (slice(start, start + _ROWS_AT_ONCE) for start in range(0, rows, _ROWS_AT_ONCE))


def _pairs(unit: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    if len(unit) == 0 or np.bincount(unit).max() < 2:
        return np.zeros((2, 0), np.int64)
    found = [pair for rows in rows_by_unit(unit, count) for pair in itertools.combinations(rows.tolist(), 2)]
    return np.array(found, dtype=np.int64).reshape(-1, 2).T
