# SPDX-License-Identifier: Apache-2.0
"""Tests of `veil.client.units`: what one unit brings is bounded and is nobody else's business."""

from __future__ import annotations

import gc
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from veil.client import head_batch
from veil.client.head_batch import HeadBatch, HeadStream
from veil.client.units import Units, bounded_units
from veil.common.head import unit_rows

KEY = bytes(range(32))


def units_of(names: list[str], *, most: int, key: bytes = KEY, marks: list[int] | None = None) -> Units:
    """Records marked by their feature: row i holds [mark, 1]."""
    rows = np.array(marks if marks is not None else range(len(names)), dtype=np.float64)
    return bounded_units(
        np.stack([rows, np.ones(len(names))], axis=1).reshape(-1, 2),
        rows.astype(np.int64),
        np.array(names, dtype=np.str_),
        max_records=most,
        key=key,
    )


def kept(names: list[str], *, most: int, key: bytes = KEY, marks: list[int] | None = None) -> dict[str, set[int]]:
    """Marks of the records that take part, by patient."""
    units = units_of(names, most=most, key=key, marks=marks)
    distinct = list(dict.fromkeys(names))
    found: dict[str, set[int]] = {name: set() for name in distinct}
    for unit, mark in zip(units.unit, units.labels, strict=True):
        found[distinct[int(unit)]].add(int(mark))
    return found


patients = st.lists(st.sampled_from(["a", "b", "c", "d"]), max_size=30)


@given(names=patients, most=st.integers(1, 5))
def test_no_unit_has_more_records_than_the_bound(names: list[str], most: int) -> None:
    units = units_of(names, most=most)
    assert units.count == len(set(names))
    expected = [min(most, names.count(name)) for name in list(dict.fromkeys(names))]
    assert units.sizes.tolist() == expected


@given(names=patients, most=st.integers(1, 5))
def test_a_record_keeps_its_feature_label_and_unit(names: list[str], most: int) -> None:
    units = units_of(names, most=most)
    distinct = list(dict.fromkeys(names))
    for feature, label, unit in zip(units.features, units.labels, units.unit, strict=True):
        assert feature.tolist() == [float(label), 1.0]
        assert names[int(label)] == distinct[int(unit)]


def test_the_same_key_chooses_the_same_records_and_another_key_others() -> None:
    names = ["a"] * 30
    assert kept(names, most=8) == kept(names, most=8)
    assert len({frozenset(kept(names, most=8, key=bytes([k]) * 32)["a"]) for k in range(10)}) > 5


def test_every_record_can_be_chosen() -> None:
    """Not always the first: over 300 keys, each of six records is kept about half the time (3 of 6)."""
    chosen = [kept(["a"] * 6, most=3, key=bytes([k % 256, k // 256]))["a"] for k in range(300)]
    counts = [sum(mark in one for one in chosen) for mark in range(6)]
    assert min(counts) > 90
    assert max(counts) < 210


@given(names=patients, most=st.integers(1, 4))
def test_units_held_out_are_bounded_alike_and_never_train(names: list[str], most: int) -> None:
    marks = np.arange(len(names))
    features = np.stack([marks, marks], axis=1).astype(np.float64)
    held = np.isin(names, ["a", "b"])
    units = bounded_units(features, marks, np.array(names, np.str_), max_records=most, key=KEY, held=held)
    everyone = units_of(names, most=most)
    assert units.held is not None
    assert set(units.labels.tolist()) == {mark for mark in everyone.labels.tolist() if names[mark] in "cd"}
    assert set(units.held.labels.tolist()) == {mark for mark in everyone.labels.tolist() if names[mark] in "ab"}
    assert (units.count, units.held.count) == (len({*names} & {*"cd"}), len({*names} & {*"ab"}))
    assert (units.total, units.held.held) == (everyone.count, None)


def test_without_an_evaluation_all_units_train() -> None:
    units = units_of(["a", "b", "a"], most=2)
    assert (units.held, units.total) == (None, units.count)


@given(names=patients, most=st.integers(1, 4), gone=st.sampled_from(["a", "b", "c", "d"]))
def test_a_choice_does_not_depend_on_any_other_unit(names: list[str], most: int, gone: str) -> None:
    """Removing a patient leaves every other patient's records as they were: what add-or-remove-one rests on."""
    everyone = kept(names, most=most)
    rest = [row for row, name in enumerate(names) if name != gone]
    without = kept([names[row] for row in rest], most=most, marks=rest)
    assert without == {name: marks for name, marks in everyone.items() if name != gone}


@given(names=patients, most=st.integers(1, 5))
def test_the_order_of_other_patients_rows_does_not_matter_for_counts(names: list[str], most: int) -> None:
    assert sorted(units_of(names, most=most).sizes) == sorted(units_of(names[::-1], most=most).sizes)


def test_no_records_are_no_units() -> None:
    units = units_of([], most=3)
    assert units.count == 0
    assert units.mean_rows().shape == (0, 2)
    batch = HeadBatch.of(units, np.zeros(2))
    assert batch.inputs.shape == (0, 3)
    assert batch.pairs.shape == (2, 0)


def test_mean_rows_are_means_of_unit_rows() -> None:
    features = np.array([[3.0, 4.0], [0.0, -2.0], [0.0, 0.0], [np.nan, 1.0], [5.0, 0.0]])
    units = Units(features=features, labels=np.zeros(5, np.int64), unit=np.array([0, 0, 1, 2, 2]), count=3)
    expected = [[0.3, -0.1], [0.0, 0.0], [0.5, 0.0]]
    np.testing.assert_allclose(units.mean_rows(), expected, atol=1e-15)
    assert (np.linalg.norm(units.mean_rows(), axis=1) <= 1 + 1e-12).all()


@given(
    sizes=st.lists(st.integers(1, 4), max_size=6),
    chosen=st.lists(st.booleans(), min_size=6, max_size=6),
    seed=st.integers(0, 99),
)
def test_taking_some_units_is_building_them_alone(sizes: list[int], chosen: list[bool], seed: int) -> None:
    random = np.random.default_rng(seed)
    unit = random.permutation(np.repeat(np.arange(len(sizes)), sizes)).astype(np.int64)
    features, labels = random.normal(size=(len(unit), 3)), random.integers(0, 2, size=len(unit))
    centre = random.normal(size=3) * 0.1
    mask: NDArray[np.bool_] = np.array(chosen[: len(sizes)], dtype=np.bool_)
    taken = HeadBatch.of(Units(features=features, labels=labels, unit=unit, count=len(sizes)), centre).take(mask)
    rows = mask[unit]
    number = np.cumsum(mask) - 1
    rebuilt = HeadBatch.of(
        Units(features=features[rows], labels=labels[rows], unit=number[unit[rows]], count=int(mask.sum())), centre
    )
    np.testing.assert_array_equal(taken.inputs, rebuilt.inputs)
    np.testing.assert_array_equal(taken.labels, rebuilt.labels)
    np.testing.assert_array_equal(taken.share, rebuilt.share)
    np.testing.assert_array_equal(number[taken.unit], rebuilt.unit)
    pairs = {(int(a), int(b)): dot for (a, b), dot in zip(taken.pairs.T, taken.dots, strict=True)}
    assert pairs == {(int(a), int(b)): dot for (a, b), dot in zip(rebuilt.pairs.T, rebuilt.dots, strict=True)}
    assert taken.count == len(sizes)


def test_pairs_are_all_pairs_of_one_unit() -> None:
    unit = np.array([1, 0, 1, 1, 2], np.int64)
    features = np.arange(15.0).reshape(5, 3)
    batch = HeadBatch.of(Units(features=features, labels=unit, unit=unit, count=3), np.zeros(3))
    assert {frozenset((int(a), int(b))) for a, b in batch.pairs.T} == {frozenset(p) for p in [(0, 2), (0, 3), (2, 3)]}
    for (a, b), dot in zip(batch.pairs.T, batch.dots, strict=True):
        assert dot == pytest.approx(batch.inputs[a] @ batch.inputs[b], rel=1e-12)
    assert batch.share.tolist() == [1 / 3, 1.0, 1 / 3, 1 / 3, 1.0]


def test_unit_rows_have_length_one_or_nothing() -> None:
    rows = unit_rows(np.array([[1e30, 0.0], [1e-30, 1e-30], [0.0, 0.0], [np.inf, 1.0], [np.nan, 1.0]], np.float32))
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), [1, 1, 0, 0, 0], atol=1e-12)


@pytest.mark.parametrize("most", [1, 4, 9, 1000])
def test_pieces_divide_no_unit_and_leave_nothing_out(most: int, make_units: Callable[..., Units]) -> None:
    units = make_units(20, most=5, width=3)
    pieces = list(units.pieces(most))
    assert all(len(piece.unit) <= most or piece.count == 1 for piece in pieces)
    assert sum(piece.count for piece in pieces) == units.count
    rows = {tuple(row): size for row, size in zip(units.features.tolist(), units.sizes[units.unit], strict=True)}
    found = {
        tuple(row): size
        for piece in pieces
        for row, size in zip(piece.features.tolist(), piece.sizes[piece.unit], strict=True)
    }
    assert found == rows


def test_batches_are_kept_only_as_far_as_there_is_room(
    make_units: Callable[..., Units], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Room for one of two: the second is prepared anew for each step; the room is free again when the first goes."""
    first, second = (make_units(20, seed=seed, width=3) for seed in (1, 2))
    centre = np.zeros(3)
    free = head_batch.ROOM_BYTES - head_batch._ROOM._taken
    size = HeadBatch.of(first, centre).nbytes
    monkeypatch.setattr(head_batch, "ROOM_BYTES", head_batch.ROOM_BYTES - free + size + size // 2)
    assert first.batch(centre) is first.batch(centre)
    assert second.batch(centre) is not second.batch(centre)
    first.batch(np.ones(3))
    del first
    gc.collect()
    assert second.batch(centre) is second.batch(centre)


def test_a_batch_without_room_for_one_step_is_streamed(
    make_units: Callable[..., Units], monkeypatch: pytest.MonkeyPatch
) -> None:
    units, centre = make_units(20, width=3), np.zeros(3)
    monkeypatch.setattr(head_batch, "ROOM_BYTES", 4 * 20 * (4 + 5 * 10))
    assert isinstance(units.batch(centre, classes=10), HeadBatch)
    assert isinstance(units.batch(np.ones(3), classes=11), HeadStream)


def test_the_order_of_units_does_not_depend_on_what_they_are_called() -> None:
    """A sample of a simulated site is that of the deployed one, whose table counts its rows from another number."""
    for names in (["9", "10", "9", "11"], ["0", "1", "0", "2"]):
        assert units_of(names, most=5).unit.tolist() == [0, 1, 0, 2]
