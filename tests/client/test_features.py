# SPDX-License-Identifier: Apache-2.0
"""Tests of `veil.client.features`: each record is computed once, by whomever, and its row is never another's."""

from __future__ import annotations

import logging
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from veil.client.features import cached_features
from veil.common.errors import RunError, TableError

TEXTS = [f"report {number}" for number in range(200)]


class FakeEncoder:
    """Features that name the record; remembers the records it read."""

    sha256 = "a" * 64
    preprocessing = "fake"
    width = 4

    def __init__(self) -> None:
        self.read: list[str | Path] = []

    def encode(
        self,
        inputs: Sequence[str] | Sequence[Path],
        *,
        advance: Callable[[int], None] | None = None,
        unreadable: Callable[[int, TableError], None] | None = None,
    ) -> NDArray[np.float32]:
        records: list[str | Path] = [*inputs]
        self.read += records
        rows = np.zeros((len(records), self.width), np.float32)
        for place, one in enumerate(records):
            rows[place] = self.row(one, place, unreadable)
            if advance is not None:
                advance(1)
        return rows

    def row(self, one: str | Path, place: int, unreadable: Callable[[int, TableError], None] | None) -> list[int]:
        content = one.encode() if isinstance(one, str) else one.read_bytes() if one.exists() else b"damaged"
        if content == b"damaged":
            error = TableError(f"image {one}", "a complete image", "replace it")
            if unreadable is None:
                raise error
            unreadable(place, error)
            return [0] * self.width
        return [len(content), sum(content), content[0], content[-1]]


def features_of(inputs: Sequence[str] | Sequence[Path]) -> NDArray[np.float32]:
    return FakeEncoder().encode(inputs)


@pytest.fixture
def encoder() -> FakeEncoder:
    return FakeEncoder()


class Sealed(FakeEncoder):
    """Known by its key alone, as a backbone that is not loaded."""

    @property
    def width(self) -> int:  # type: ignore[override]
        raise AssertionError("the backbone was loaded")

    def encode(self, *_: object, **__: object) -> NDArray[np.float32]:
        raise AssertionError("the backbone was loaded")


def test_the_second_time_nothing_is_loaded(encoder: FakeEncoder, tmp_path: Path) -> None:
    first = cached_features(encoder, TEXTS, tmp_path)
    assert encoder.read == TEXTS
    assert np.array_equal(first, features_of(TEXTS))
    assert np.array_equal(cached_features(Sealed(), TEXTS, tmp_path), first)
    assert np.array_equal(cached_features(Sealed(), TEXTS[::-2], tmp_path), first[::-2])


def test_only_a_changed_record_is_computed_again(encoder: FakeEncoder, tmp_path: Path) -> None:
    cached_features(encoder, TEXTS, tmp_path)
    encoder.read.clear()
    changed = ["another", *TEXTS[50:], TEXTS[3], "new"]
    assert np.array_equal(cached_features(encoder, changed, tmp_path), features_of(changed))
    assert encoder.read == ["another", "new"]


def test_equal_records_are_computed_once_and_all_counted(encoder: FakeEncoder, tmp_path: Path) -> None:
    seen: list[int] = []
    texts = ["b", "a", "b", "b"]
    assert np.array_equal(cached_features(encoder, texts, tmp_path, advance=seen.append), features_of(texts))
    assert encoder.read == ["b", "a"]
    assert sum(seen) == 4


def test_progress_begins_with_what_is_kept(encoder: FakeEncoder, tmp_path: Path) -> None:
    cached_features(encoder, TEXTS[:150], tmp_path)
    seen: list[int] = []
    cached_features(encoder, TEXTS, tmp_path, advance=seen.append)
    assert seen[0] == 150
    assert [one for one in seen[1:] if one] == [1] * 50


@pytest.mark.parametrize("change", ["sha256", "preprocessing"])
def test_another_encoder_computes_anew(change: str, encoder: FakeEncoder, tmp_path: Path) -> None:
    cached_features(encoder, TEXTS[:2], tmp_path)
    setattr(encoder, change, "b" * 64)
    cached_features(encoder, TEXTS[:2], tmp_path)
    assert len(encoder.read) == 4


def test_half_precision_is_the_same_the_first_time_and_later(encoder: FakeEncoder, tmp_path: Path) -> None:
    first = cached_features(encoder, TEXTS, tmp_path, precision="float16")
    assert np.allclose(first, features_of(TEXTS), rtol=0, atol=2**-11 * first.max())
    assert np.array_equal(cached_features(Sealed(), TEXTS, tmp_path, precision="float16"), first)


class TestImages:
    @pytest.fixture
    def images(self, tmp_path: Path) -> list[Path]:
        paths = [tmp_path / f"{number}.png" for number in range(4)]
        for number, path in enumerate(paths):
            path.write_bytes(b"damaged" if number == 1 else bytes([number + 1]) * 9)
        return paths

    def test_the_bytes_of_a_file_are_its_key(self, encoder: FakeEncoder, images: list[Path], tmp_path: Path) -> None:
        cached_features(encoder, images[2:], tmp_path / "cache")
        images[2].write_bytes(bytes([8]) * 9)
        images[3].rename(tmp_path / "renamed.png")
        encoder.read.clear()
        now = [images[2], tmp_path / "renamed.png"]
        assert np.array_equal(cached_features(encoder, now, tmp_path / "cache"), features_of(now))
        assert encoder.read == [images[2]]

    @pytest.mark.parametrize("damage", ["damaged", "absent"])
    def test_an_unreadable_file_counts_as_zero_until_it_is_repaired(
        self, damage: str, encoder: FakeEncoder, images: list[Path], tmp_path: Path
    ) -> None:
        if damage == "absent":
            images[1].unlink()
        wanted = [*images, images[1]]
        told: list[int] = []
        for _ in range(2):
            told.clear()
            rows = cached_features(
                encoder, wanted, tmp_path / "cache", unreadable=lambda place, error: told.append(place)
            )
            assert sorted(told) == [1, 4]
            assert not rows[[1, 4]].any()
            assert np.array_equal(rows[[0, 2, 3]], features_of([images[0], *images[2:]]))
        images[1].write_bytes(b"whole")
        rows = cached_features(encoder, wanted, tmp_path / "cache")
        assert np.array_equal(rows, features_of(wanted))

    def test_only_unreadable_files_give_zeros(self, encoder: FakeEncoder, images: list[Path], tmp_path: Path) -> None:
        rows = cached_features(encoder, images[1:2], tmp_path / "cache", unreadable=lambda place, error: None)
        assert rows.tolist() == [[0] * 4]

    def test_an_unreadable_file_is_an_error_where_nobody_listens(
        self, encoder: FakeEncoder, images: list[Path], tmp_path: Path
    ) -> None:
        with pytest.raises(TableError, match="replace it"):
            cached_features(encoder, images, tmp_path / "cache")

    def test_a_file_replaced_while_it_is_read_is_not_kept(self, images: list[Path], tmp_path: Path) -> None:
        """Its row would stand under the digest of what was there before."""

        class Slow(FakeEncoder):
            def encode(self, inputs: Sequence[str] | Sequence[Path], **_: object) -> NDArray[np.float32]:
                images[0].write_bytes(b"replaced")
                return features_of(inputs)

        before = images[0].read_bytes()
        rows = cached_features(Slow(), images[:1], tmp_path / "cache")
        assert np.array_equal(rows, features_of(images[:1]))
        images[0].write_bytes(before)
        rows = cached_features(FakeEncoder(), images[:1], tmp_path / "cache")
        assert np.array_equal(rows, features_of(images[:1]))


class TestRoom:
    def test_more_than_the_owner_allows_is_refused_before_anything_is_computed(
        self, encoder: FakeEncoder, tmp_path: Path
    ) -> None:
        cached_features(encoder, TEXTS[:100], tmp_path)
        (other,) = tmp_path.iterdir()
        encoder.read.clear()
        encoder.preprocessing = "longer texts"
        with pytest.raises(RunError) as caught:
            cached_features(encoder, TEXTS, tmp_path, max_bytes=24_000)
        message = str(caught.value)
        assert "cache_max_gb = 2.4e-05" in message
        assert str(other) in message
        assert encoder.read == []
        cached_features(encoder, TEXTS[:10], tmp_path, max_bytes=24_000)
        assert len(encoder.read) == 10

    def test_a_disk_without_reserve_is_refused(self, encoder: FakeEncoder, tmp_path: Path) -> None:
        with pytest.raises(RunError, match="make room"):
            cached_features(encoder, TEXTS, tmp_path, free=lambda folder: 256 << 20)
        assert encoder.read == []
        cached_features(encoder, TEXTS, tmp_path, free=lambda folder: (256 << 20) + 10**6)

    def test_what_is_kept_needs_no_room(self, encoder: FakeEncoder, tmp_path: Path) -> None:
        cached_features(encoder, TEXTS, tmp_path)
        cached_features(Sealed(), TEXTS, tmp_path, max_bytes=1, free=lambda folder: 0)


def test_threads_that_ask_at_once_compute_once(encoder: FakeEncoder, tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: cached_features(encoder, TEXTS, tmp_path), range(4)))
    assert all(np.array_equal(one, features_of(TEXTS)) for one in answers)
    assert encoder.read == TEXTS


BUILDER = """
    import sys, threading
    from pathlib import Path
    from tests.client.test_features import TEXTS, FakeEncoder
    from veil.client import feature_store
    from veil.client.features import cached_features

    class Stuck(FakeEncoder):
        def encode(self, inputs, **named):
            if len(self.read) == 128:
                print("stuck", flush=True)
                threading.Event().wait()
            return super().encode(inputs, **named)

    feature_store.COMMIT_S = 0.0
    cached_features(Stuck(), TEXTS, Path(sys.argv[1]))
"""


def test_who_waits_for_a_killed_process_computes_only_the_rest(
    encoder: FakeEncoder, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """SIGKILL in the midst of its third 64 records; the kernel lets go of its lock."""
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", textwrap.dedent(BUILDER), str(tmp_path)]
    caplog.set_level(logging.WARNING)
    with (
        subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True) as builder,
        ThreadPoolExecutor(1) as pool,
    ):
        try:
            assert builder.stdout is not None
            assert builder.stdout.readline() == "stuck\n"
            waiting = pool.submit(cached_features, encoder, TEXTS, tmp_path)
            while not caplog.records:
                assert not waiting.done()
                time.sleep(0.01)
        finally:
            builder.send_signal(signal.SIGKILL)
        assert np.array_equal(waiting.result(), features_of(TEXTS))
    assert f"waiting for process {builder.pid}" in caplog.text
    assert encoder.read == TEXTS[128:]
