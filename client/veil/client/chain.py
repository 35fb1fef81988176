# SPDX-License-Identifier: Apache-2.0
"""Lines that vouch for one another: each holds the hash of the line before it and the site's signature of its own.

Promises that a line changed, removed, moved or signed by another key is named. Only a cut at the end leaves a chain
that is whole: an anchor (`anchor.py`) or a remembered head (`Ledger.knows`) finds it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise
from typing import Any

from veil.common.keys import NodeKey, verify

_PURPOSE = b"veil ledger line\n"
"""What a line's signature begins with: the key signs other things too."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Head:
    """A place in a chain.

    Attributes:
        seq: number of the line; 0 before the first.
        hash: the line's, 64 hexadecimal digits.
    """

    seq: int
    hash: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """One link.

    Attributes:
        seq: its number, from 1 without gaps; also inside the body.
        body: canonical JSON.
        prev: hash of the line before it, hexadecimal.
        hash: SHA-256 of `prev` followed by `body`, hexadecimal.
        signature: the site's, of the hash.
    """

    seq: int
    body: bytes
    prev: str
    hash: str
    signature: bytes

    @property
    def head(self) -> Head:
        """Its place."""
        return Head(seq=self.seq, hash=self.hash)

    @property
    def fields(self) -> dict[str, Any]:
        """The body's values.

        Raises:
            ValueError: when the body is no JSON object.
        """
        fields = json.loads(self.body)
        if not isinstance(fields, dict):
            raise ValueError("a line's body is no JSON object; expected one")
        return fields


class Fault(StrEnum):
    """What can be wrong with a line."""

    CHANGED = "changed"
    REMOVED = "removed"
    REORDERED = "re-ordered"
    SIGNATURE = "signature"
    REPLY = "reply"
    ANCHOR = "anchor"
    FILE = "file"


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One thing that is wrong.

    Attributes:
        seq: the line's number; 0 when it is the file as a whole.
        fault: what is wrong.
        detail: the same for a person.
    """

    seq: int
    fault: Fault
    detail: str

    def __str__(self) -> str:
        return f"line {self.seq}: {self.fault} ({self.detail})"


def genesis(site: str) -> Head:
    """The place before a site's first line: fixed by its name, so that no line fits into another site's chain."""
    return Head(seq=0, hash=hashlib.sha256(b"veil ledger\n" + site.encode("utf-8", "surrogatepass")).hexdigest())


def seal(fields: Mapping[str, Any], after: Head, key: NodeKey) -> Line:
    """The next line.

    Args:
        fields: what it says; JSON values. Its number is added.
        after: the last line so far.
        key: the site's.
    """
    seq = after.seq + 1
    body = json.dumps({**fields, "seq": seq}, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
    hash_ = _hash(after.hash, body)
    return Line(seq=seq, body=body, prev=after.hash, hash=hash_, signature=key.sign(_message(hash_)))


def examine(lines: Sequence[Line], *, after: Head, public_pem: bytes) -> tuple[Finding, ...]:
    """All that is wrong with lines that should follow `after`.

    Args:
        lines: by number.
        after: the place before the first of them.
        public_pem: the site's public key.
    """
    own = {line.seq: fault for line in lines for fault in _own_fault(line, public_pem)}
    places = [after, *(line.head for line in lines)]
    order = [
        finding
        for (before, here), line in zip(pairwise(places), lines, strict=True)
        for finding in _order_fault(before, here, line, blamed=before.seq in own or here.seq in own)
    ]
    return tuple(sorted([*own.values(), *order], key=lambda finding: finding.seq))


def _own_fault(line: Line, public_pem: bytes) -> Iterator[Finding]:
    """What a line says against itself: at most one finding."""
    if line.hash != _hash(line.prev, line.body):
        yield Finding(seq=line.seq, fault=Fault.CHANGED, detail="it does not have its hash")
    elif not verify(public_pem, line.signature, _message(line.hash)):
        yield Finding(seq=line.seq, fault=Fault.SIGNATURE, detail="it is not signed with this site's key")
    elif (number := line.fields.get("seq")) != line.seq:
        yield Finding(seq=line.seq, fault=Fault.REORDERED, detail=f"it was written as line {number}")


def _order_fault(before: Head, here: Head, line: Line, *, blamed: bool) -> Iterator[Finding]:
    if here.seq > before.seq + 1:
        missing = f"lines {before.seq + 1} to {here.seq - 1} are missing"
        yield Finding(seq=before.seq + 1, fault=Fault.REMOVED, detail=missing)
    elif line.prev != before.hash and not blamed:
        yield Finding(seq=line.seq, fault=Fault.REORDERED, detail=f"it does not follow line {before.seq}")


def _hash(prev: str, body: bytes) -> str:
    return hashlib.sha256(prev.encode() + body).hexdigest()


def _message(hash_: str) -> bytes:
    return _PURPOSE + hash_.encode()
