# SPDX-License-Identifier: Apache-2.0
"""Writing files that a crash must not lose and that must not replace another, such as keys and certificates.

Promises that when a call returns, the file and its name are on the disk, and that a private file was never readable by
anyone but its owner.
"""

from __future__ import annotations

import os
from pathlib import Path

PRIVATE = 0o600
"""Permissions of a file that only its owner may read."""

PUBLIC = 0o644
"""Permissions of a file that anyone may read."""


def write_new(path: Path, content: bytes, mode: int = PRIVATE) -> None:
    """Write a file that is not there yet.

    Args:
        path: its place, in a folder that exists.
        content: all of it.
        mode: its permissions from the first moment on.

    Raises:
        FileExistsError: when it is there already; it is left as it is.
    """
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    sync_file(folder)


def sync_file(path: Path) -> None:
    """Make what was written to a file durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
