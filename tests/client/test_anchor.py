# SPDX-License-Identifier: Apache-2.0
"""Tests of `veil.client.anchor`: it names a line only after the line is durable, and it is replaced whole or not."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from veil.client.anchor import Anchor, disagreement, read_anchor
from veil.client.chain import Head
from veil.common.errors import RefusalCode, RefusalError
from veil.common.keys import NodeKey

FIRST, SECOND = Head(seq=1, hash="1" * 64), Head(seq=2, hash="2" * 64)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "anchor.json"


@pytest.fixture
def anchor(path: Path, key: NodeKey) -> Anchor:
    """One that remembers the first line."""
    made = Anchor(path, key)
    made.prepare(FIRST)
    made.publish()
    return made


def test_no_file_is_no_anchor(path: Path, key: NodeKey) -> None:
    assert Anchor(path, key).read() is None
    assert read_anchor(path, key.public_pem) is None


def test_it_names_the_next_line_once_it_is_published(anchor: Anchor, path: Path, key: NodeKey) -> None:
    anchor.prepare(SECOND)
    assert anchor.read() == read_anchor(path, key.public_pem) == FIRST
    anchor.publish()
    assert anchor.read() == read_anchor(path, key.public_pem) == SECOND


def test_only_its_owner_may_read_it(anchor: Anchor, path: Path) -> None:
    assert path.stat().st_mode & 0o777 == 0o600


def test_an_anchor_put_back_by_hand_is_read_anew(anchor: Anchor, path: Path) -> None:
    older = path.read_bytes()
    anchor.prepare(SECOND)
    anchor.publish()
    assert anchor.read() == SECOND
    path.write_bytes(older)
    assert anchor.read() == FIRST


def test_any_changed_byte_is_refused(anchor: Anchor, path: Path, key: NodeKey) -> None:
    """But for white space between the values."""
    content = path.read_bytes()
    for at in range(len(content)):
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        try:
            assert read_anchor(path, key.public_pem) == FIRST
            assert content[at : at + 1].isspace()
        except RefusalError as error:
            assert error.code is RefusalCode.LEDGER


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"{}", b"null", b"\xff\xfe", b'{"seq": 1, "hash": "", "signature": 1}', b'{"seq": [], "hash": ""}'],
)
def test_what_is_no_anchor_is_refused(content: bytes, path: Path, key: NodeKey) -> None:
    path.write_bytes(content)
    with pytest.raises(RefusalError, match="was changed, or is another site's"):
        read_anchor(path, key.public_pem)


def test_another_sites_anchor_is_refused(anchor: Anchor, path: Path) -> None:
    with pytest.raises(RefusalError, match="another site's"):
        read_anchor(path, NodeKey.generate().public_pem)


def test_a_line_signed_elsewhere_is_no_anchor(path: Path, key: NodeKey) -> None:
    """The same key signs ledger lines; such a signature does not serve here."""
    signature = key.sign(b"veil ledger line\n" + FIRST.hash.encode()).hex()
    path.write_text(json.dumps({"seq": 1, "hash": FIRST.hash, "signature": signature}))
    with pytest.raises(RefusalError):
        read_anchor(path, key.public_pem)


def test_a_lost_folder_is_refused_in_words(path: Path, key: NodeKey, tmp_path: Path) -> None:
    lost = Anchor(tmp_path / "unmounted" / "anchor.json", key)
    with pytest.raises(RefusalError, match=r"cannot be used .*a disk that is there"):
        lost.prepare(FIRST)


def test_a_folder_in_its_place_is_refused(path: Path, key: NodeKey) -> None:
    path.mkdir()
    with pytest.raises(RefusalError, match="cannot be used"):
        Anchor(path, key).read()


def test_a_disk_that_fails_leaves_the_former_anchor(
    anchor: Anchor, path: Path, key: NodeKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(RefusalError, match=r"Input/output error"):
            anchor.prepare(SECOND)
    assert read_anchor(path, key.public_pem) == FIRST


def test_both_the_file_and_its_name_are_synced(anchor: Anchor, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced = []
    real = os.fsync

    def fsync(handle: int) -> None:
        synced.append(str(Path(f"/proc/self/fd/{handle}").readlink()))
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    anchor.prepare(SECOND)
    assert synced == [f"{path}.new"]
    anchor.publish()
    assert synced == [f"{path}.new", str(path.parent)]


HEADS = ["0" * 64, FIRST.hash, SECOND.hash]


@pytest.mark.parametrize(
    ("anchored", "heads", "fault"),
    [
        (None, HEADS[:1], None),
        (None, HEADS, "missing"),
        (SECOND, HEADS, None),
        (FIRST, HEADS, None),
        (SECOND, HEADS[:2], "ends at line 1, and its anchor remembers line 2"),
        (FIRST, HEADS[:1], "ends at line 0"),
        (Head(seq=1, hash="9" * 64), HEADS, "line 1 is not the one"),
    ],
    ids=["new", "missing", "same", "behind", "older copy", "emptied", "another past"],
)
def test_what_an_anchor_says_of_a_chain(anchored: Head | None, heads: list[str], fault: str | None) -> None:
    said = disagreement(anchored, heads)
    assert said is None if fault is None else said is not None and fault in said
