# SPDX-License-Identifier: Apache-2.0
"""The BackboneStore: where a site finds the pinned backbone, and how it takes one from the coordinator.

Promises that nothing is used whose hashes are not the plan's, that a plan cannot look around in the site's files or
make the site ask a network, and that a delivery cut off at any instant goes on from the bytes that are on disk.
"""

from __future__ import annotations

import logging
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from veil.common.delivery import MAX_BYTES, Chunk, Manifest, Position, Progress, Standing, shelved
from veil.common.durable import sync_folder, write_new
from veil.common.errors import RefusalCode, RefusalError, WeightsError
from veil.common.lazy_backbone import LazyBackbone, find_backbone
from veil.common.plan_sections import Backbone, Device, Task
from veil.common.weights import as_safetensors, locate

RESERVE_BYTES: Final = 256 << 20
"""Bytes of the disk that a delivery leaves free: the site's ledger may lie on the same disk."""

_MARK: Final = "manifest.sha256"
_ANYWHERE: Final = Path("/")

_log = logging.getLogger(__name__)


def free_bytes(folder: Path) -> int:
    """Free bytes of the disk on which `folder` lies."""
    return shutil.disk_usage(folder).free


class BackboneStore:
    """A site's backbones: installed, cached, mirrored or received. One process at a time, any number of threads.

    Args:
        folder: where received ones are kept; made when missing.
        mirror: the operator's own folder of backbones, by preference `SHA256/` each; None when there is none.
        accept: whether a coordinator may deliver one.
        max_bytes: most bytes of one that may be delivered.
        device: where features are computed.
        free: says how many bytes are free where a folder lies.
    """

    def __init__(
        self,
        folder: Path,
        *,
        mirror: Path | None,
        accept: bool,
        max_bytes: int = MAX_BYTES,
        device: Device = "auto",
        free: Callable[[Path], int] = free_bytes,
    ) -> None:
        self._folder = folder.resolve()
        self._mirror = None if mirror is None else mirror.resolve()
        self._accept, self._max_bytes, self._device, self._free = accept, max_bytes, device, free
        self._open: dict[str, _Partial] = {}
        self._lock = threading.RLock()

    def find(self, backbone: Backbone) -> Backbone:
        """The same backbone with a `path:` source on this machine, hashed just now.

        Looked at in this order: the plan's source if it is an installed package or in the local hub cache (never a path
        of the plan's), the mirror's folder of that hash, what was received, the mirror's other folders.

        Raises:
            WeightsError: when it is nowhere.
        """
        for candidate in self._candidates(backbone):
            try:
                found = locate(candidate, base=_ANYWHERE, network=False)
            except (WeightsError, OSError) as error:
                _log.debug("backbone not used: %s", error)
            else:
                return candidate.model_copy(update={"source": f"path:{found.folder}"})
        raise WeightsError(
            f"no backbone {backbone.sha256} (in the plan: {backbone.source}) on this machine",
            "the pinned files in an installed package, the local hub cache, the mirror, or delivered",
            "install the package, put the folder into the mirror, or let the coordinator deliver it",
        )

    def has(self, backbone: Backbone) -> bool:
        """Whether `find` finds it."""
        try:
            self.find(backbone)
        except WeightsError:
            return False
        return True

    def find_backbone(self, backbone: Backbone, task: Task) -> LazyBackbone:
        """Find it; it is loaded when the first record needs it.

        Raises:
            WeightsError: when it is nowhere.
            InputError: a GPU is asked for that torch does not have.
        """
        return find_backbone(self.find(backbone), task, base=_ANYWHERE, device=self._device)

    def begin(self, manifest: Manifest, backbone: Backbone) -> Progress:
        """Prepare for a delivery, or go on with one that was cut off.

        Args:
            manifest: what the coordinator would send.
            backbone: from a plan that this site's operator approved; the caller sees to that.

        Raises:
            RefusalError: the plan pins other files, the site takes no delivery, it is too large, or the disk too full.
        """
        with self._lock, _refused():
            manifest.check(backbone)
            if self.has(backbone):
                return Progress(manifest=manifest.digest, standing=Standing.COMPLETE)
            self._refuse_unwanted(manifest)
            pinned = as_safetensors(backbone)
            target = shelved(self._folder, pinned)
            partial = _Partial(manifest=manifest, pinned=pinned, folder=target.with_suffix(".partial"), target=target)
            self._refuse_full_disk(manifest.size - partial.resume())
            partial.lay_out()
            self._open = {digest: one for digest, one in self._open.items() if one.target != target}
            self._open[manifest.digest] = partial
            return self._progress(partial)

    def write(self, chunk: Chunk) -> Progress:
        """Take one piece and say which is the next; a piece that is not the next one changes nothing.

        Raises:
            RefusalError: the piece is longer than its file, the disk fails, or all is there and not the pinned files.
        """
        with self._lock, _refused():
            partial = self._open.get(chunk.manifest)
            if partial is None:
                return Progress(manifest=chunk.manifest, standing=Standing.MANIFEST_WANTED)
            if chunk.position == partial.next():
                partial.append(chunk)
            return self._progress(partial)

    def _candidates(self, backbone: Backbone) -> Iterator[Backbone]:
        if not backbone.source.startswith("path:"):
            yield backbone
        travelling = as_safetensors(backbone)
        for form in (backbone, travelling):
            if self._mirror is not None:
                yield _at(self._mirror / form.sha256, form)
        yield _at(shelved(self._folder, travelling), travelling)
        for folder in self._mirrored():
            yield _at(folder, backbone)
            if travelling is not backbone:
                yield _at(folder, travelling)

    def _mirrored(self) -> Iterator[Path]:
        if self._mirror is None:
            return
        yield self._mirror
        try:
            yield from sorted(one for one in self._mirror.iterdir() if one.is_dir())
        except OSError as error:
            _log.warning("mirror %s cannot be read: %s", self._mirror, error.strerror)

    def _refuse_unwanted(self, manifest: Manifest) -> None:
        if not self._accept:
            raise RefusalError(
                RefusalCode.BACKBONE,
                f"a backbone of {manifest.size} bytes is offered, and this site takes none from a coordinator",
                "a backbone that the site's operator installs",
                "install its package or put its folder into the mirror, or allow deliveries in the site's file",
            )
        if manifest.size > self._max_bytes:
            raise RefusalError(
                RefusalCode.BACKBONE,
                f"a backbone of {manifest.size} bytes",
                f"at most {self._max_bytes} bytes",
                "put its folder into the mirror",
            )

    def _refuse_full_disk(self, missing: int) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        if (free := self._free(self._folder)) < missing + RESERVE_BYTES:
            raise RefusalError(
                RefusalCode.BACKBONE,
                f"{free} bytes are free for {missing} bytes of a backbone",
                f"{RESERVE_BYTES} bytes to spare after it, for the site's ledger",
                f"make room where {self._folder} lies",
            )

    def _progress(self, partial: _Partial) -> Progress:
        digest = partial.manifest.digest
        if (following := partial.next()) is not None:
            return Progress(manifest=digest, standing=Standing.RECEIVING, next=following)
        del self._open[digest]
        partial.finish()
        _log.info("backbone %s received into %s", partial.pinned.sha256, partial.target)
        return Progress(manifest=digest, standing=Standing.COMPLETE)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Partial:
    """A backbone of which some bytes are there; its state is the files' lengths and nothing else.

    Attributes:
        manifest: what it will consist of.
        pinned: the hashes it must have.
        folder: where its files grow.
        target: what that folder is called once it is complete.
    """

    manifest: Manifest
    pinned: Backbone
    folder: Path
    target: Path

    def resume(self) -> int:
        """Bytes that are there already; what is not of this very delivery is removed."""
        try:
            same = (self.folder / _MARK).read_text(encoding="utf-8") == self.manifest.digest
            lengths = [(self.folder / entry.name).stat().st_size for entry in self.manifest.entries]
        except (FileNotFoundError, UnicodeDecodeError):
            same, lengths = False, []
        if same and all(n <= entry.size for n, entry in zip(lengths, self.manifest.entries, strict=True)):
            return sum(lengths)
        if self.folder.exists():
            shutil.rmtree(self.folder)
        return 0

    def lay_out(self) -> None:
        """Every file, empty where it is new, and last the mark that says whose they are; one that is there stays."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for entry in self.manifest.entries:
            (self.folder / entry.name).touch()
        if not (self.folder / _MARK).exists():
            write_new(self.folder / _MARK, self.manifest.digest.encode())

    def next(self) -> Position | None:
        """Where the next piece begins; None when all bytes are there."""
        for entry in self.manifest.entries:
            if (length := (self.folder / entry.name).stat().st_size) < entry.size:
                return Position(name=entry.name, offset=length)
        return None

    def append(self, chunk: Chunk) -> None:
        """Put a piece at the end of its file, durably.

        Raises:
            RefusalError: when the file would be longer than it may be.
        """
        name, offset = chunk.position.name, chunk.position.offset
        if (end := offset + len(chunk.data)) > (size := self.manifest.entry(name).size):
            raise RefusalError(
                RefusalCode.MALFORMED,
                f"a piece of {name} that ends at byte {end}",
                f"at most the {size} bytes of the manifest",
                "the coordinator must send the file that it announced",
            )
        with (self.folder / name).open("r+b") as file:
            file.seek(offset)
            file.write(chunk.data)
            file.flush()
            os.fsync(file.fileno())

    def finish(self) -> None:
        """Check every hash, then give the folder its name in one step.

        Raises:
            WeightsError: the files are not the pinned ones; they are deleted.
        """
        try:
            locate(_at(self.folder, self.pinned), base=_ANYWHERE, network=False)
        except WeightsError:
            shutil.rmtree(self.folder)
            raise
        if self.target.exists():
            shutil.rmtree(self.target)
        self.folder.rename(self.target)
        sync_folder(self.target.parent)


def _at(folder: Path, backbone: Backbone) -> Backbone:
    return backbone.model_copy(update={"source": f"path:{folder}"})


@contextmanager
def _refused() -> Iterator[None]:
    """Whatever is wrong with a delivery, the coordinator learns one word of it."""
    try:
        yield
    except WeightsError as error:
        raise RefusalError(RefusalCode.BACKBONE, error.value, error.expectation, error.remedy) from error
    except OSError as error:
        raise RefusalError(
            RefusalCode.BACKBONE,
            f"the backbone cannot be stored ({error})",
            "a disk that is there, has room and can be written",
            "repair that; the delivery goes on where it stopped",
        ) from error
