# SPDX-License-Identifier: Apache-2.0
"""The frozen prefix, computed once: pooled backbone features of records, kept on disk beside them.

Promises that a cached row is used only for the same weights, the same preprocessing and the same record, and that a
half-written cache never has the cache's name. A cache is as confidential as the records.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from veil.common.errors import TableError


class Encoder(Protocol):
    """What turns records into features: see `veil.common.backbone.FrozenBackbone`."""

    @property
    def sha256(self) -> str:
        """SHA-256 of the weights."""
        ...

    @property
    def preprocessing(self) -> str:
        """Everything besides the weights that the features depend on."""
        ...

    def encode(
        self,
        inputs: Sequence[str] | Sequence[Path],
        *,
        advance: Callable[[int], None] | None = ...,
        unreadable: Callable[[int, TableError], None] | None = ...,
    ) -> NDArray[np.float32]:
        """Features of the inputs, [n, width]."""
        ...


def cached_features(
    encoder: Encoder,
    inputs: Sequence[str] | Sequence[Path],
    folder: Path,
    *,
    advance: Callable[[int], None] | None = None,
    unreadable: Callable[[int, TableError], None] | None = None,
) -> NDArray[np.float32]:
    """Features of the records, read from `folder` where they were computed before.

    Args:
        encoder: the frozen backbone.
        inputs: texts or image paths, in the order wanted.
        folder: where the cache lives; made when missing.
        advance: called with the number of records done, for progress.
        unreadable: called with the place of a record that cannot be read, which counts as zero then.

    Returns:
        [n, width], memory-mapped read-only; a row that is not finite counts as zero later (`unit_rows`), so that no
        word of a hostile backbone's choice becomes an error that tells of a record.

    Raises:
        TableError: a record cannot be read, and there is no `unreadable`.
    """
    path = folder / f"{_key(encoder, inputs)}.npy"
    if not path.exists():
        _write(path, encoder.encode(inputs, advance=advance, unreadable=unreadable))
    elif advance is not None:
        advance(len(inputs))
    mapped: NDArray[np.float32] = np.load(path, mmap_mode="r", allow_pickle=False)
    return mapped


def _key(encoder: Encoder, inputs: Sequence[str] | Sequence[Path]) -> str:
    digest = hashlib.sha256(f"{encoder.sha256}\n{encoder.preprocessing}\n".encode())
    for item in inputs:
        content = item.read_bytes() if isinstance(item, Path) else item.encode()
        digest.update(hashlib.sha256(content).digest())
    return digest.hexdigest()


def _write(path: Path, features: NDArray[np.float32]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.stem}.{os.getpid()}.partial")
    with partial.open("wb") as file:
        np.save(file, features, allow_pickle=False)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
