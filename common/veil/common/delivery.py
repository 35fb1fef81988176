# SPDX-License-Identifier: Apache-2.0
"""A pinned backbone on its way from coordinator to site: what it consists of, one piece of it, and how far a site is.

Promises that a manifest names nothing but one safetensors file and known configuration and tokenizer files, within a
size, and that nothing here takes a path from the other side.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Final

from veil.common.errors import RefusalCode, WeightsError
from veil.common.plan_sections import Backbone
from veil.common.weights import COMPANIONS, WEIGHTS_NAME, as_safetensors, companion_digests, files_digest, sha256_of

CHUNK_BYTES: Final = 4 << 20
"""Most bytes of a backbone in one message."""

MAX_BYTES: Final = 16 << 30
"""Most bytes of a whole backbone."""

_NAMES: Final = frozenset({WEIGHTS_NAME, *COMPANIONS})
_SHA256: Final = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, kw_only=True, slots=True)
class FileEntry:
    """One file of a backbone.

    Attributes:
        name: `WEIGHTS_NAME` or one of `COMPANIONS`.
        size: its bytes.
        sha256: of its bytes, 64 hex digits.
    """

    name: str
    size: int
    sha256: str

    def __post_init__(self) -> None:
        _check_name(self.name)
        _check_sha256(self.sha256)
        if not 0 <= self.size <= MAX_BYTES:
            raise ValueError(f"{self.name} of {self.size} bytes; expected 0 to {MAX_BYTES}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Position:
    """A place in a backbone: the byte at `offset` of the file `name`."""

    name: str
    offset: int

    def __post_init__(self) -> None:
        _check_name(self.name)
        if not 0 <= self.offset < MAX_BYTES:
            raise ValueError(f"offset {self.offset}; expected 0 to {MAX_BYTES - 1}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """All files of a backbone, in the order in which they travel.

    Attributes:
        entries: one per file, sorted by name; the weights are among them.
    """

    entries: tuple[FileEntry, ...]

    def __post_init__(self) -> None:
        names = [entry.name for entry in self.entries]
        if names != sorted(set(names)) or WEIGHTS_NAME not in names:
            raise ValueError(f"files {names}; expected {WEIGHTS_NAME} among them, each once, sorted by name")
        if self.size > MAX_BYTES:
            raise ValueError(f"a backbone of {self.size} bytes; expected at most {MAX_BYTES}")

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(entry.size for entry in self.entries)

    @property
    def sha256(self) -> str:
        """SHA-256 of the weights file."""
        return self.entry(WEIGHTS_NAME).sha256

    @property
    def files_sha256(self) -> str:
        """`files_digest` of the other files."""
        return files_digest({entry.name: entry.sha256 for entry in self.entries if entry.name != WEIGHTS_NAME})

    @property
    def digest(self) -> str:
        """SHA-256 over names, sizes and hashes, by which chunks refer to this manifest."""
        lines = "".join(f"{entry.name} {entry.size} {entry.sha256}\n" for entry in self.entries)
        return hashlib.sha256(lines.encode()).hexdigest()

    def entry(self, name: str) -> FileEntry:
        """The file of that name.

        Raises:
            ValueError: when there is none.
        """
        for entry in self.entries:
            if entry.name == name:
                return entry
        raise ValueError(f"a file {name}; expected one of {[entry.name for entry in self.entries]}")

    def bytes_before(self, position: Position) -> int:
        """Bytes of the whole backbone that come before a position.

        Raises:
            ValueError: when there is no such byte.
        """
        if position.offset >= self.entry(position.name).size:
            raise ValueError(f"byte {position.offset} of {position.name}; expected one before its end")
        return sum(entry.size for entry in self.entries if entry.name < position.name) + position.offset

    def check(self, backbone: Backbone) -> None:
        """Refuse a manifest whose files are not the ones a plan pins.

        Raises:
            WeightsError: the plan leaves files unpinned, or pins others.
        """
        pinned = as_safetensors(backbone)
        if pinned.files_sha256 is None:
            raise WeightsError(
                "a plan without backbone.files_sha256",
                "configuration and tokenizer pinned like the weights, where they are to be delivered",
                "the coordinator can add the line that veil backbone prints",
            )
        if (self.sha256, self.files_sha256) != (pinned.sha256, pinned.files_sha256):
            raise WeightsError(
                f"a manifest of weights {self.sha256} and files {self.files_sha256}",
                f"the pinned weights {pinned.sha256} and files {pinned.files_sha256}",
                "the coordinator must deliver what its plan pins",
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Chunk:
    """One piece of one file.

    Attributes:
        manifest: digest of the manifest.
        position: where the piece begins.
        data: 1 to `CHUNK_BYTES` bytes.
    """

    manifest: str
    position: Position
    data: bytes

    def __post_init__(self) -> None:
        _check_sha256(self.manifest)
        if not 1 <= len(self.data) <= CHUNK_BYTES:
            raise ValueError(f"a chunk of {len(self.data)} bytes; expected 1 to {CHUNK_BYTES}")


class Standing(StrEnum):
    """How a site stands to a delivery."""

    MANIFEST_WANTED = "manifest-wanted"
    RECEIVING = "receiving"
    COMPLETE = "complete"
    REFUSED = "refused"


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """A site's answer to a manifest or a chunk.

    Attributes:
        manifest: digest of the manifest it is about; "" where the site could not read what it refuses.
        standing: whether the site must be shown the manifest (again), goes on receiving, has it all, or refused.
        next: when receiving, where the next chunk must begin.
        refusal: why, when refused.
    """

    manifest: str
    standing: Standing
    next: Position | None = None
    refusal: RefusalCode | None = None

    def __post_init__(self) -> None:
        if self.manifest or self.standing is not Standing.REFUSED:
            _check_sha256(self.manifest)
        if (self.standing is Standing.RECEIVING) != (self.next is not None):
            raise ValueError("a next position with and only with a delivery under way; expected both or neither")
        if (self.standing is Standing.REFUSED) != (self.refusal is not None):
            raise ValueError("a refusal code with and only with a refusal; expected both or neither")


def shelved(root: Path, backbone: Backbone) -> Path:
    """Folder below `root` for a backbone whose files are pinned; backbones that differ in any file never share one."""
    return root / backbone.sha256 / str(backbone.files_sha256)


def manifest_of(folder: Path) -> Manifest:
    """List and hash a folder's one safetensors file, configuration and tokenizer; anything else there stays.

    Raises:
        WeightsError: there are no weights, a file cannot be read, or all are too large.
    """
    digests = {**companion_digests(folder), WEIGHTS_NAME: sha256_of(folder / WEIGHTS_NAME)}
    sizes = {name: (folder / name).stat().st_size for name in digests}
    try:
        return Manifest(
            entries=tuple(FileEntry(name=name, size=sizes[name], sha256=digests[name]) for name in sorted(digests))
        )
    except ValueError as error:
        raise WeightsError(f"{folder}: {error}", "a backbone that can be delivered", "choose a smaller one") from None


def _check_name(name: str) -> None:
    if name not in _NAMES:
        raise ValueError(f"a file {name!r}; expected {WEIGHTS_NAME}, configuration or tokenizer")


def _check_sha256(digest: str) -> None:
    if not _SHA256.fullmatch(digest):
        raise ValueError(f"{digest!r}; expected a SHA-256 of 64 hex digits")
