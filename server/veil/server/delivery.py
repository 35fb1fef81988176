# SPDX-License-Identifier: Apache-2.0
"""The BackboneShelf holds the coordinator's pinned backbones; `deliver` brings one to every site that lacks it.

Promises that only safetensors, configuration and tokenizer with the plan's hashes are sent, and that a delivery ends:
every site has it, or is given up by a refusal, a bounded number of answers or the deadline.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final

from veil.common.delivery import CHUNK_BYTES, Chunk, Manifest, Position, Progress, Standing, manifest_of, shelved
from veil.common.errors import RefusalCode, WeightsError
from veil.common.pickled import converted_from, kind_of
from veil.common.plan_sections import Backbone
from veil.common.weights import as_safetensors, locate

Ask = Callable[[Mapping[str, Manifest | Chunk]], Mapping[str, Progress]]
"""One round trip: site → message in, site → answer out, without the sites that did not answer."""

_PATIENCE: Final = 8
"""Answers in a row without a byte of progress after which a site is given up."""

_SPARE_ANSWERS: Final = 64
_PAUSE_S: Final = 1.0


class BackboneShelf:
    """The coordinator's own copies of what its plans pin, so that a source may vanish in the middle of a run.

    Args:
        folder: where they are kept; made when missing.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._sources: dict[str, Path] = {}

    def manifest(self, backbone: Backbone, *, base: Path) -> Manifest:
        """What a plan's backbone consists of; it is taken onto the shelf when it is not there yet.

        Args:
            backbone: from the plan.
            base: folder that a relative `path:` source starts from.

        Raises:
            WeightsError: nothing found, another hash than a pinned one, files not pinned, or pickled weights.
        """
        target = shelved(self._folder, as_safetensors(backbone))
        manifest = _intact(target, backbone)
        if manifest is None:
            source = _safetensors_folder(backbone, base)
            manifest = manifest_of(source)
            manifest.check(backbone)
            _copy(source, manifest, target)
        self._sources[manifest.digest] = target
        return manifest

    def find(self, backbone: Backbone) -> Backbone:
        """The same backbone with a `path:` source on the shelf.

        Raises:
            WeightsError: when it is not there, or no longer what the plan pins.
        """
        pinned = as_safetensors(backbone)
        folder = shelved(self._folder, pinned)
        if _intact(folder, backbone) is None:
            raise _changed(folder, "not the pinned backbone")
        return pinned.model_copy(update={"source": f"path:{folder}"})

    def chunk(self, manifest: Manifest, position: Position) -> Chunk:
        """The piece that begins at a position, of `CHUNK_BYTES` or to the end of its file.

        Raises:
            WeightsError: the file on the shelf is no longer the one in the manifest.
        """
        file = self._sources[manifest.digest] / position.name
        length = min(CHUNK_BYTES, manifest.entry(position.name).size - position.offset)
        try:
            with file.open("rb") as stream:
                stream.seek(position.offset)
                data = stream.read(length)
        except OSError as error:
            raise _changed(file, str(error.strerror)) from None
        if len(data) != length:
            raise _changed(file, "shorter than it was")
        return Chunk(manifest=manifest.digest, position=position, data=data)


def deliver(
    ask: Ask,
    sites: Collection[str],
    manifest: Manifest,
    chunk: Callable[[Manifest, Position], Chunk],
    *,
    timeout_s: float,
    clock: Callable[[], float] = time.monotonic,
    pause: Callable[[float], None] = time.sleep,
) -> dict[str, RefusalCode | None]:
    """Bring a backbone to several sites at once, each at its own pace.

    Args:
        ask: does one round trip with those sites that are not done.
        sites: names of the sites that lack the backbone.
        manifest: what to deliver.
        chunk: reads a piece, see `BackboneShelf.chunk`.
        timeout_s: seconds after which sites that do not have it are given up.
        clock: seconds that only grow.
        pause: waits some seconds, after a round trip that nobody answered.

    Returns:
        Per site None when it has the backbone, else why not: its own refusal, `malformed` for an answer that makes no
        sense, `backbone` when it got no further.

    Raises:
        WeightsError: a piece cannot be read.
    """
    courses = {site: _Course(manifest=manifest, answers_left=_most_answers(manifest)) for site in sites}
    end = clock() + timeout_s
    while (left := {site: course for site, course in courses.items() if course.under_way}) and clock() < end:
        piece = cache(lambda position: chunk(manifest, position))
        answers = ask({site: manifest if (at := course.next) is None else piece(at) for site, course in left.items()})
        for site, course in left.items():
            if site in answers:
                course.take(answers[site])
        if left.keys().isdisjoint(answers):
            pause(_PAUSE_S)
    return {site: RefusalCode.BACKBONE if course.under_way else course.refusal for site, course in courses.items()}


@dataclass(kw_only=True, slots=True)
class _Course:
    """How far one site is.

    Attributes:
        manifest: what it is to have.
        answers_left: how many more answers it is allowed.
        next: where it goes on; None when it must be shown the manifest.
        reached: most bytes it ever said to have, -1 before it said any.
        idle: answers since then.
        under_way: whether nothing is decided yet.
        refusal: why it was given up.
    """

    manifest: Manifest
    answers_left: int
    next: Position | None = None
    reached: int = -1
    idle: int = 0
    under_way: bool = True
    refusal: RefusalCode | None = None

    def take(self, answer: Progress) -> None:
        """Go on as a site's answer says, or end."""
        self.answers_left -= 1
        if answer.standing is Standing.REFUSED:
            self._end(answer.refusal)
        elif answer.manifest != self.manifest.digest:
            self._end(RefusalCode.MALFORMED)
        elif answer.standing is Standing.COMPLETE:
            self._end(None)
        else:
            self._go_on(answer.next)

    def _go_on(self, position: Position | None) -> None:
        try:
            reached = -1 if position is None else self.manifest.bytes_before(position)
        except ValueError:
            return self._end(RefusalCode.MALFORMED)
        self.next = position
        self.idle = 0 if reached > self.reached else self.idle + 1
        self.reached = max(reached, self.reached)
        if self.idle >= _PATIENCE or self.answers_left <= 0:
            self._end(RefusalCode.BACKBONE)
        return None

    def _end(self, refusal: RefusalCode | None) -> None:
        self.under_way, self.refusal = False, refusal


def _most_answers(manifest: Manifest) -> int:
    """Twice what a delivery without a hitch takes, and some for the smallest."""
    return 2 * sum(entry.size // CHUNK_BYTES + 1 for entry in manifest.entries) + _SPARE_ANSWERS


def _intact(folder: Path, backbone: Backbone) -> Manifest | None:
    """What is on the shelf already, if it is what the plan pins."""
    if not folder.is_dir():
        return None
    try:
        manifest = manifest_of(folder)
        manifest.check(backbone)
    except WeightsError:
        return None
    return manifest


def _safetensors_folder(backbone: Backbone, base: Path) -> Path:
    found = locate(backbone, base=base)
    if kind_of(found.weights_file) is None:
        return found.folder
    if converted_from(found.sha256) is None:
        raise WeightsError(
            f"{found.weights_file}, pickled weights of SHA-256 {found.sha256}",
            "safetensors, or a checkpoint whose conversion every site can check: pickles are never delivered",
            "install the package at every site, or save the model as safetensors and pin that folder",
        )
    from veil.common.conversion import converted  # brings torch, which other backbones do not need here

    return converted(found).folder


def _copy(source: Path, manifest: Manifest, target: Path) -> None:
    """Copy aside, hash the copy, then give it its name in one step."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f"{target.name[:12]}.", dir=target.parent))
        try:
            for entry in manifest.entries:
                shutil.copyfile(source / entry.name, aside / entry.name)
            if manifest_of(aside) != manifest:
                raise _changed(source, "changed while it was copied")
            if target.exists():
                shutil.rmtree(target)
            aside.rename(target)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    except OSError as error:
        raise WeightsError(
            f"{target}: {error.strerror}", "a writable folder with room for the backbone", "make room there"
        ) from None


def _changed(file: Path, found: str) -> WeightsError:
    return WeightsError(f"{file}: {found}", "the backbone as it was when the run began", "start the run again")
