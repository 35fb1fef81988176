# SPDX-License-Identifier: Apache-2.0
"""Tests of `veil.client.tuned_units`: a unit's own records, read once where there is room, zero where unreadable."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import pytest
import torch

from veil.client.examples import Examples
from veil.client.tuned_units import TunedUnits, tuned_units
from veil.client.units import Units, bounded_units
from veil.common.errors import TableError
from veil.common.plan import RunPlan
from veil.common.task_heads import Record, Truth
from veil.common.tunable import TunableModel

PATIENTS = ["a", "b", "a", "c", "b", "b", "a"]
TEXTS = ["zero", "one", "two", "three", "four", "five", "six"]
LABELS = np.array([0, 1, 0, 2, 1, 1, 0])
BYTES = 8


class Reader:
    """Reads a text as its length, 8 bytes of it; a text can be unreadable. Counts what it was asked for."""

    def __init__(self, lost: Sequence[str] = (), room: int = 2**20) -> None:
        self.lost, self.read_room = lost, room
        self.asked: list[str] = []

    def record(self, told: str, truth: Truth) -> Record:
        self.asked.append(told)
        if told in self.lost:
            raise TableError(f"the name {told}", "a text", "none")
        return Record(inputs={"length": torch.tensor([len(told)])}, target=torch.tensor(int(truth)), key=told)


def plan(centre: bool) -> RunPlan:
    return RunPlan.model_validate(
        {
            "name": "p",
            "backbone": {"source": "path:m", "sha256": "a" * 64},
            "task": {"kind": "text-classification", "labels": ["no", "yes", "maybe"]},
            "transfer": {"mode": "lora"},
            "training": {"centre": centre},
            "privacy": {"target_epsilon": 3.0, "unit": "patient"},
            "cohort": {"nominal_units": 3},
        }
    )


def made(reader: Reader, *, centre: bool = False, most: int = 8, held: Sequence[int] = ()) -> TunedUnits:
    def bounded(rows: Any) -> Units:
        chosen = np.isin(np.arange(len(TEXTS)), held) if held else None
        return bounded_units(rows, LABELS, np.array(PATIENTS), max_records=most, key=bytes(32), held=chosen)

    def features() -> Any:
        assert centre, "nobody centres: the backbone's features are not needed"
        return np.arange(14.0).reshape(7, 2)

    examples = Examples(inputs=tuple(TEXTS), labels=LABELS, units=np.array(PATIENTS))
    return tuned_units(bounded, features, examples, cast(TunableModel, reader), plan(centre))


def said(units: TunedUnits, chosen: Sequence[bool]) -> list[list[tuple[Any, int]]]:
    return [[(one.key, int(one.target)) for one in unit] for unit in units.records(np.array(chosen))]


A, B, C = [("zero", 0), ("two", 0), ("six", 0)], [("one", 1), ("four", 1), ("five", 1)], [("three", 2)]


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [((1, 1, 1), [A, B, C]), ((0, 1, 0), [B]), ((1, 0, 1), [A, C]), ((0, 0, 0), [])],
)
def test_chosen_units_come_with_their_own_records_and_truths(chosen: tuple[int, ...], expected: Any) -> None:
    units = made(Reader())
    assert (units.count, units.total) == (3, 3)
    assert said(units, [bool(one) for one in chosen]) == expected


def test_a_unit_has_no_more_records_than_it_may() -> None:
    found = said(made(Reader(), most=2), [True] * 3)
    assert [len(unit) for unit in found] == [2, 2, 1]
    assert all(set(unit) <= set(whole) for unit, whole in zip(found, (A, B, C), strict=True))


def test_held_out_units_do_not_train_and_are_found_by_their_places() -> None:
    units = made(Reader(), held=[1, 4, 5])
    assert (units.count, units.total) == (2, 3)
    assert said(units, [True, True]) == [A, C]
    assert units.rows.held is not None
    assert units.at(units.rows.held.features) == ["one", "four", "five"]


def test_the_pretrained_features_are_for_the_centring_round_alone() -> None:
    assert made(Reader(), centre=True).pooled.features.tolist() == np.arange(14.0).reshape(7, 2).tolist()
    assert made(Reader()).pooled is not None


def test_a_record_that_cannot_be_read_is_there_without_inputs(caplog: pytest.LogCaptureFixture) -> None:
    """It counts as zero among its unit's records; the site's own log says which one, and not what it says."""
    reader = Reader(lost=["two", "three"])
    with caplog.at_level(logging.WARNING):
        first, second, third = made(reader).records(np.ones(3, bool))
    assert [one.inputs is None for one in first] == [False, True, False]
    assert [one.inputs is None for one in second] == [False] * 3
    assert [one.inputs is None for one in third] == [True]
    assert [record.getMessage()[:27] for record in caplog.records] == [
        "record 3 counts as zero: th",
        "record 4 counts as zero: th",
    ]


@pytest.mark.parametrize(("room", "kept"), [(0, 0), (BYTES - 1, 0), (BYTES, 1), (3 * BYTES + 1, 3), (2**20, 7)])
def test_records_are_read_once_as_far_as_there_is_room(room: int, kept: int) -> None:
    reader = Reader(room=room)
    units = made(reader)
    first = said(units, [True] * 3)
    assert len(reader.asked) == 7
    assert said(units, [True] * 3) == first
    assert len(reader.asked) == 14 - kept


def test_an_unreadable_record_is_tried_once() -> None:
    """It takes no room."""
    reader = Reader(lost=TEXTS, room=0)
    units = made(reader)
    for _ in range(3):
        assert all(one.inputs is None for unit in units.records(np.ones(3, bool)) for one in unit)
    assert len(reader.asked) == 7
