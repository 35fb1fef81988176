# SPDX-License-Identifier: Apache-2.0
"""The anchor: a small signed file, kept elsewhere, that remembers a ledger's last line.

Promises that it names a line only after the line is durable, and that it is replaced whole or not at all.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from veil.client.chain import Head
from veil.common.errors import RefusalCode, RefusalError
from veil.common.keys import NodeKey, verify


class Anchor:
    """A ledger's anchor; one process at a time.

    Args:
        path: the file, best on another disk than the ledger.
        key: the site's.
    """

    def __init__(self, path: Path, key: NodeKey) -> None:
        self._path, self._key = path, key
        self._next = path.with_name(f"{path.name}.new")
        self._known: tuple[bytes, Head] | None = None
        self._public_pem = key.public_pem

    def read(self) -> Head | None:
        """The anchored line; None when there is no file.

        Raises:
            RefusalError: when the file cannot be read or is not this site's.
        """
        content = _content(self._path)
        if content is None:
            return None
        if self._known is None or self._known[0] != content:
            self._known = content, _checked(content, self._path, self._public_pem)
        return self._known[1]

    def prepare(self, head: Head) -> None:
        """Write the next anchor beside the present one, durably: a full disk shows before the line is committed.

        Raises:
            RefusalError: when it cannot be written.
        """
        content = _sealed(head, self._key)
        with _refused(self._path):
            handle = os.open(self._next, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())

    def publish(self) -> None:
        """Put what was prepared in place, durably.

        Raises:
            RefusalError: when it cannot be; the former anchor is still true then.
        """
        with _refused(self._path):
            self._next.replace(self._path)
            folder = os.open(self._path.parent, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)


def read_anchor(path: Path, public_pem: bytes) -> Head | None:
    """The anchored line; None when there is no file.

    Raises:
        RefusalError: when the file cannot be read or was not signed with this key.
    """
    content = _content(path)
    return None if content is None else _checked(content, path, public_pem)


def disagreement(anchored: Head | None, heads: Sequence[str]) -> str | None:
    """What is wrong between an anchor and a chain; a chain that is ahead of it was cut short by a crash, and is fine.

    Args:
        anchored: the anchor's line.
        heads: hash of each line of the chain, by number, the genesis first.
    """
    if anchored is None:
        return "its anchor is missing" if len(heads) > 1 else None
    if anchored.seq >= len(heads):
        return f"it ends at line {len(heads) - 1}, and its anchor remembers line {anchored.seq}"
    if heads[anchored.seq] != anchored.hash:
        return f"its line {anchored.seq} is not the one that its anchor remembers"
    return None


def _content(path: Path) -> bytes | None:
    with _refused(path):
        try:
            return path.read_bytes()
        except FileNotFoundError:
            return None


def _sealed(head: Head, key: NodeKey) -> bytes:
    document = {"seq": head.seq, "hash": head.hash, "signature": key.sign(_message(head)).hex()}
    return json.dumps(document).encode() + b"\n"


def _checked(content: bytes, path: Path, public_pem: bytes) -> Head:
    try:
        document = json.loads(content)
        head = Head(seq=int(document["seq"]), hash=str(document["hash"]))
        signature = bytes.fromhex(document["signature"])
    except (ValueError, TypeError, LookupError):
        signature, head = b"", Head(seq=0, hash="")
    if not verify(public_pem, signature, _message(head)):
        raise RefusalError(
            RefusalCode.LEDGER,
            f"the ledger's anchor {path} was changed, or is another site's",
            "an anchor signed with this site's key",
            "put the right file back, or count what may be lost with veil site ledger write-off",
        )
    return head


def _message(head: Head) -> bytes:
    return f"veil ledger anchor\n{head.seq} {head.hash}".encode()


@contextmanager
def _refused(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RefusalError(
            RefusalCode.LEDGER,
            f"the ledger's anchor {path} cannot be used ({error.strerror})",
            "a disk that is there, has room and can be written",
            "repair that; nothing is lost, and the next round is answered again",
        ) from error
