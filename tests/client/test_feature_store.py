# SPDX-License-Identifier: Apache-2.0
"""Tests of `veil.client.feature_store`: what is read back is what was written, whatever happened to the files."""

from __future__ import annotations

import hashlib
import sqlite3
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from veil.client import feature_store
from veil.client.feature_rows import row_bytes
from veil.client.feature_store import FeatureStore
from veil.common.errors import RunError

WIDTH = 5
ROWS: NDArray[np.float32] = np.random.default_rng(1).normal(size=(8, WIDTH)).astype(np.float32)
DIGESTS = [hashlib.sha256(bytes([number])).digest() for number in range(8)]


def write(store: FeatureStore, digests: Sequence[bytes], rows: NDArray[np.float32]) -> None:
    with store.held(), store.appending(rows.shape[1]) as appender:
        appender.add(digests, rows)


@pytest.fixture
def store(tmp_path: Path) -> FeatureStore:
    """With the first six rows in it."""
    store = FeatureStore(tmp_path / "cache", "encoder")
    write(store, DIGESTS[:6], ROWS[:6])
    return store


def found(store: FeatureStore) -> list[int]:
    """Which of the records are there; every one that is has its own row."""
    rows = store.find(DIGESTS)
    there = [number for number, digest in enumerate(DIGESTS) if digest in rows.row_of]
    if there:
        assert np.array_equal(rows.features([DIGESTS[number] for number in there]), ROWS[there])
    return there


def test_rows_come_back_in_any_order(store: FeatureStore) -> None:
    assert found(store) == [0, 1, 2, 3, 4, 5]
    rows = store.find(DIGESTS[:6])
    assert np.array_equal(rows.features([DIGESTS[3], DIGESTS[0], DIGESTS[3]]), ROWS[[3, 0, 3]])
    assert store.find(DIGESTS[6:]).row_of == {}


def test_rows_that_lie_together_stay_in_the_file(store: FeatureStore) -> None:
    mapped = store.find(DIGESTS).features(DIGESTS[1:4])
    assert type(mapped) is np.ndarray, "not np.memmap, whose filename would be taken for this array's own file"
    assert not mapped.flags.owndata
    assert not mapped.flags.writeable
    copied = store.find(DIGESTS).features(DIGESTS[3:0:-1])
    assert (type(copied), copied.flags.writeable) == (np.ndarray, True)


def test_a_store_that_is_not_there_has_nothing_and_is_not_made(tmp_path: Path) -> None:
    assert found(FeatureStore(tmp_path, "encoder")) == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("per_record", [0, 10**6])
def test_a_few_of_many_are_found_either_way(
    per_record: int, store: FeatureStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feature_store, "_SCANNED_PER_RECORD", per_record)
    monkeypatch.setattr(feature_store, "_ASKED_AT_ONCE", 2)
    assert found(store) == [0, 1, 2, 3, 4, 5]


def test_another_encoder_or_precision_has_rows_of_its_own(store: FeatureStore) -> None:
    assert found(FeatureStore(store.root, "other")) == []
    assert found(FeatureStore(store.root, "encoder", "float16")) == []


def test_rows_without_an_entry_are_written_over(store: FeatureStore) -> None:
    file = store.folder / "rows.bin"
    with file.open("ab") as rows:
        rows.write(b"\xff" * (row_bytes(WIDTH, "float32") + 3))
    write(store, DIGESTS[6:], ROWS[6:])
    assert found(store) == [*range(8)]
    assert file.stat().st_size == 8 * row_bytes(WIDTH, "float32")


def test_a_cut_file_loses_only_what_was_cut(store: FeatureStore) -> None:
    file = store.folder / "rows.bin"
    with file.open("r+b") as rows:
        rows.truncate(3 * row_bytes(WIDTH, "float32") + 7)
    assert found(store) == [0, 1, 2]
    write(store, DIGESTS[6:], ROWS[6:])
    assert found(store) == [0, 1, 2, 6, 7]
    write(store, DIGESTS[3:6], ROWS[3:6])
    assert found(store) == [*range(8)]
    file.unlink()
    assert found(store) == []


def test_a_row_that_changed_is_not_found_and_its_place_not_used_again(store: FeatureStore) -> None:
    mapped = store.find(DIGESTS).features(DIGESTS[4:6])
    with (store.folder / "rows.bin").open("r+b") as rows:
        rows.seek(2 * row_bytes(WIDTH, "float32"))
        rows.write(b"\x01")
    assert found(store) == [0, 1, 3, 4, 5]
    write(store, DIGESTS[2:3], ROWS[2:3])
    write(store, DIGESTS[6:], ROWS[6:])
    assert found(store) == [*range(8)]
    assert np.array_equal(mapped, ROWS[4:6])


@pytest.mark.parametrize("damage", ["empty", "noise", "no tables", "torn page", "foreign", "other rows"])
def test_a_damaged_or_foreign_index_is_never_believed(damage: str, store: FeatureStore) -> None:
    index = store.folder / "index.sqlite"
    if damage == "empty":
        index.write_bytes(b"")
    elif damage == "noise":
        index.write_bytes(b"no database " * 400)
    elif damage == "no tables":
        with closing(sqlite3.connect(index)) as db:
            db.executescript("DROP TABLE record; DROP TABLE store")
    elif damage == "torn page":
        content = index.read_bytes()
        index.write_bytes(content[:2048] + b"\xff" * (len(content) - 2048))
    elif damage == "foreign":
        other = FeatureStore(store.root, "other")
        write(other, DIGESTS, ROWS[::-1])
        index.write_bytes((other.folder / "index.sqlite").read_bytes())
    else:
        (store.folder / "rows.bin").write_bytes(ROWS[::-1].tobytes())
    assert found(store) == []
    write(store, DIGESTS[:2], ROWS[:2])
    assert found(store) == [0, 1]


def test_another_width_starts_over(store: FeatureStore) -> None:
    wide = np.ones((1, WIDTH + 1), np.float32)
    mapped = store.find(DIGESTS).features(DIGESTS[:6])
    write(store, DIGESTS[:1], wide)
    rows = store.find(DIGESTS)
    assert (rows.width, list(rows.row_of)) == (WIDTH + 1, [DIGESTS[0]])
    assert np.array_equal(mapped, ROWS[:6]), "who has mapped the old file keeps it"


def test_who_reads_while_a_store_is_laid_out_never_breaks_it(tmp_path: Path) -> None:
    stores = [FeatureStore(tmp_path, f"encoder {number}") for number in range(200)]

    done = threading.Event()

    def read_until_whole() -> None:
        for store in stores:
            while found(store) != [0, 1] and not done.is_set():
                pass

    with ThreadPoolExecutor(3) as pool:
        readers = [pool.submit(read_until_whole) for _ in range(3)]
        try:
            for store in stores:
                write(store, DIGESTS[:2], ROWS[:2])
        finally:
            done.set()
    assert [reader.result() for reader in readers] == [None] * 3


def test_what_was_added_before_an_error_stays(store: FeatureStore) -> None:
    with pytest.raises(ZeroDivisionError), store.held(), store.appending(WIDTH) as appender:
        appender.add(DIGESTS[6:7], ROWS[6:7])
        raise ZeroDivisionError
    assert found(store) == [*range(7)]


def test_a_folder_that_cannot_be_used_is_said(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    store = FeatureStore(tmp_path / "cache", "encoder")
    with pytest.raises(RunError, match="local disk"), store.held():
        pass
