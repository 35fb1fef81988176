# SPDX-License-Identifier: Apache-2.0
"""Tests of `veil.common.durable`: a file is new, whole, and its owner's from the first moment on."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from veil.common.durable import PUBLIC, write_new


@pytest.fixture
def open_umask() -> Iterator[None]:
    """A process that hands everything out."""
    before = os.umask(0)
    yield
    os.umask(before)


@pytest.mark.usefixtures("open_umask")
def test_a_file_is_private_unless_it_is_called_public(tmp_path: Path) -> None:
    write_new(tmp_path / "secret", b"s")
    write_new(tmp_path / "known", b"k", PUBLIC)
    assert stat.S_IMODE((tmp_path / "secret").stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "known").stat().st_mode) == 0o644


def test_a_file_that_is_there_stays_as_it_is(tmp_path: Path) -> None:
    write_new(tmp_path / "file", b"first")
    with pytest.raises(FileExistsError):
        write_new(tmp_path / "file", b"second")
    assert (tmp_path / "file").read_bytes() == b"first"


def test_a_symbolic_link_is_not_written_through(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FileExistsError):
        write_new(tmp_path / "link", b"secret")
    assert not (tmp_path / "elsewhere").exists()


def test_content_and_name_are_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file first, then the folder that names it."""
    synced: list[int] = []
    real = os.fsync

    def record(handle: int) -> None:
        synced.append(stat.S_IFMT(os.fstat(handle).st_mode))
        real(handle)

    monkeypatch.setattr(os, "fsync", record)
    write_new(tmp_path / "file", b"content")
    assert synced == [stat.S_IFREG, stat.S_IFDIR]
