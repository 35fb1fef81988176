# SPDX-License-Identifier: Apache-2.0
"""The frozen prefix, computed once: pooled backbone features of records, kept on disk beside them.

Promises that a kept row is used only for the same weights, the same preprocessing and the same bytes of a record, and
that a record whose row is kept is not computed again. What is kept is as confidential as the records.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from veil.client.backbone_store import RESERVE_BYTES, free_bytes
from veil.client.feature_rows import StoredRows, row_bytes
from veil.client.feature_store import INDEX_BYTES, Appender, FeatureStore
from veil.common.errors import RunError, TableError
from veil.common.plan_sections import CachePrecision

_AT_ONCE = 64
"""Records that are handed to the encoder together."""

_NAMED = 5
_GB = 1e9

Unreadable = Callable[[int, TableError], None]


class Encoder(Protocol):
    """What turns records into features: see `veil.common.lazy_backbone.LazyBackbone`."""

    @property
    def sha256(self) -> str:
        """SHA-256 of the weights."""
        ...

    @property
    def preprocessing(self) -> str:
        """Everything besides the weights that the features depend on."""
        ...

    @property
    def width(self) -> int:
        """Features per record."""
        ...

    def encode(
        self,
        inputs: Sequence[str] | Sequence[Path],
        *,
        advance: Callable[[int], None] | None = ...,
        unreadable: Unreadable | None = ...,
    ) -> NDArray[np.float32]:
        """Features of the inputs, [n, width]."""
        ...


def cached_features(
    encoder: Encoder,
    inputs: Sequence[str] | Sequence[Path],
    folder: Path,
    *,
    precision: CachePrecision = "float32",
    max_bytes: float | None = None,
    free: Callable[[Path], int] = free_bytes,
    advance: Callable[[int], None] | None = None,
    unreadable: Unreadable | None = None,
) -> NDArray[np.float32]:
    """Features of the records, read from `folder` where they were computed before.

    Args:
        encoder: the frozen backbone; asked for nothing but its key where every row is there.
        inputs: texts or image paths, in the order wanted.
        folder: where features are kept; made when missing.
        precision: how they are kept there; what is returned was read from there, the first time as well.
        max_bytes: how much the whole folder may hold; None for as much as the disk has.
        free: says how many bytes are free where a folder lies.
        advance: called with the number of records done since: first all that are kept, then each that is computed.
        unreadable: called with the place of a record that cannot be read, which counts as zero then and is not kept.

    Returns:
        float32 [n, width], read-only in the file itself where the rows lie there one behind the other; a row that is
        not finite counts as zero later (`unit_rows`), so that no word of a hostile backbone's choice becomes an error
        that tells of a record.

    Raises:
        TableError: a record cannot be read, and there is no `unreadable`.
        RunError: the rows to compute do not fit, before the first is computed; or the folder cannot be used.
    """
    tell = advance or (lambda done: None)
    store = FeatureStore(folder, _identity(encoder), precision)
    digests = [_digest(one) for one in inputs]
    kept = store.find(digests)
    missing = [place for place, digest in enumerate(digests) if digest not in kept.row_of]
    tell(len(digests) - len(missing))
    if not missing:
        return kept.features(digests)
    work = _Completion(store=store, encoder=encoder, inputs=inputs, digests=digests, tell=tell, unreadable=unreadable)
    with store.held():
        groups = work.groups(missing)
        if groups:
            _check_room(store, len(groups), encoder.width, max_bytes, free)
            work.complete(groups)
    return _together(digests, store.find(digests), work.loose)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Completion:
    """The records whose rows are not there yet.

    Attributes:
        loose: features by place that are not kept: of a record that cannot be read, or changed meanwhile.
    """

    store: FeatureStore
    encoder: Encoder
    inputs: Sequence[str] | Sequence[Path]
    digests: Sequence[bytes]
    tell: Callable[[int], None]
    unreadable: Unreadable | None
    loose: dict[int, NDArray[np.float32]] = field(default_factory=dict)

    def groups(self, missing: Sequence[int]) -> list[list[int]]:
        """Places of each distinct record that nobody else has computed in the meantime."""
        there = self.store.find([self.digests[place] for place in missing]).row_of
        alike: dict[bytes | int, list[int]] = {}
        for place in (one for one in missing if self.digests[one] not in there):
            alike.setdefault(self.digests[place] or place, []).append(place)
        groups = list(alike.values())
        self.tell(len(missing) - sum(map(len, groups)))
        return groups

    def complete(self, groups: Sequence[list[int]]) -> None:
        """Compute and keep them."""
        with self.store.appending(self.encoder.width) as rows:
            for start in range(0, len(groups), _AT_ONCE):
                self._encode(groups[start : start + _AT_ONCE], rows)

    def _encode(self, groups: Sequence[list[int]], rows: Appender) -> None:
        lost: set[int] = set()

        def note(index: int, error: TableError) -> None:
            lost.add(index)
            for place in groups[index]:
                if self.unreadable is not None:
                    self.unreadable(place, error)

        features = self.encoder.encode(
            [self.inputs[places[0]] for places in groups],  # type: ignore[arg-type]  # all texts or all paths
            advance=self.tell,
            unreadable=note if self.unreadable is not None else None,
        )
        self.tell(sum(map(len, groups)) - len(groups))
        sound = [index for index, places in enumerate(groups) if index not in lost and self._unchanged(places[0])]
        rows.add([self.digests[groups[index][0]] for index in sound], features[sound])
        for index in set(range(len(groups))) - set(sound):
            self.loose.update(dict.fromkeys(groups[index], features[index]))

    def _unchanged(self, place: int) -> bool:
        """Whether the encoder read the bytes that the digest is of; a file may have been replaced in between."""
        one, digest = self.inputs[place], self.digests[place]
        return isinstance(one, str) or (digest != b"" and _digest(one) == digest)


def _together(digests: Sequence[bytes], kept: StoredRows, loose: dict[int, NDArray[np.float32]]) -> NDArray[np.float32]:
    """Kept and loose rows in the order wanted."""
    places = [place for place in range(len(digests)) if place not in loose]
    if any(digests[place] not in kept.row_of for place in places):
        raise RunError(
            "rows of features that were just written cannot be read back",
            "a disk that keeps what is written",
            "check the disk, then start again",
        )
    if not loose:
        return kept.features(digests)
    features = np.zeros((len(digests), len(next(iter(loose.values())))), dtype=np.float32)
    if places:
        features[places] = kept.features([digests[place] for place in places])
    for place, row in loose.items():
        features[place] = row
    return features


def _identity(encoder: Encoder) -> str:
    return json.dumps({"weights": encoder.sha256, "preprocessing": encoder.preprocessing}, sort_keys=True)


def _digest(one: str | Path) -> bytes:
    """SHA-256 of a text or of a file's bytes; empty for a file that cannot be read, which the encoder will say."""
    if isinstance(one, str):
        return hashlib.sha256(one.encode()).digest()
    try:
        return hashlib.sha256(one.read_bytes()).digest()
    except OSError:
        return b""


def _check_room(
    store: FeatureStore, records: int, width: int, max_bytes: float | None, free: Callable[[Path], int]
) -> None:
    """Refuse to begin what would not fit.

    Raises:
        RunError: naming what may be deleted.
    """
    needed = records * (row_bytes(width, store.precision) + INDEX_BYTES)
    sizes = {path: _size(path) for path in store.root.iterdir()}
    others = sorted((path for path in sizes if path != store.folder), key=lambda path: -sizes[path])
    named = ", ".join(f"{path} ({_shown(sizes[path])})" for path in others[:_NAMED])
    remedy = f"delete features that no run needs any more: {named}" if named else "keep fewer records"
    asked = f"the features of {records} records take {_shown(needed)}"
    held = sum(sizes.values())
    if max_bytes is not None and held + needed > max_bytes:
        raise RunError(
            f"{asked} beside {_shown(held)} in {store.root}",
            f"at most cache_max_gb = {max_bytes / _GB:g} in all",
            f"raise cache_max_gb, or {remedy}",
        )
    if (room := free(store.folder)) < needed + RESERVE_BYTES:
        raise RunError(
            f"{asked}, and {_shown(room)} are free where {store.root} lies",
            f"{_shown(RESERVE_BYTES)} to spare after it",
            f"make room on that disk, or {remedy}",
        )


def _size(path: Path) -> int:
    """Bytes of a file, or of all files in a folder; others may delete some meanwhile."""
    total = 0
    for one in path.rglob("*") if path.is_dir() else [path]:
        with suppress(FileNotFoundError):
            total += one.stat().st_size
    return total


def _shown(size: float) -> str:
    return f"{size / _GB:.2f} GB" if size >= _GB / 10 else f"{size / 1e6:.1f} MB"
