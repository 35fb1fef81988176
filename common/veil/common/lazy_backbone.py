# SPDX-License-Identifier: Apache-2.0
"""A plan's pinned backbone that is loaded when the first record needs it, and not before.

Promises that the files' hashes were checked whenever one is there, and again when it loads or saves them, and that
everything its features depend on besides the record is known before it loads.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
from collections.abc import Callable, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from veil.common.errors import InputError, RunError, TableError, WeightsError
from veil.common.pickled import kind_of
from veil.common.plan_sections import Backbone, Device, Task
from veil.common.weights import COMPANIONS, WEIGHTS_NAME, PinnedWeights, locate, sha256_of

if TYPE_CHECKING:
    from veil.common.backbone import FrozenBackbone, PoolingName

_LIBRARIES: Final = ("numpy", "pillow", "scipy", "tokenizers", "torch", "transformers")
_EXTRAS: Final = ("timm",)
"""Taken into account where they are installed."""

_OUR_CODE: Final = (
    "veil.common.backbone",
    "veil.common.conversion",
    "veil.common.ge2e",
    "veil.common.lite0",
    "veil.common.preprocessing",
    "veil.common.smollm2",
    "veil.common.sound",
)
"""What turns records into features; another version of any of it may turn them into others."""


class LazyBackbone:
    """A pretrained model that is known but perhaps not loaded; `find_backbone` makes one.

    Attributes:
        sha256: the pinned hash of the weights the plan names.
        preprocessing: canonical JSON of all else that decides features: the task's way to read a record, the
            configuration and tokenizer, the libraries' versions, Veil's own code, the kind of device.
    """

    def __init__(self, pinned: Backbone, task: Task, *, preprocessing: str, device: Literal["cpu", "cuda"]) -> None:
        self._pinned, self._task, self._device = pinned, task, device
        self._loaded: FrozenBackbone | None = None
        self._lock = threading.Lock()
        self.sha256: str = pinned.sha256
        self.preprocessing: str = preprocessing

    @property
    def pinned(self) -> Backbone:
        """Where it is on this machine, with its hashes."""
        return self._pinned

    @property
    def width(self) -> int:
        """Features per record; loads the model.

        Raises:
            WeightsError: as `load_backbone`.
        """
        return self._model().width

    @property
    def pooling(self) -> PoolingName:
        """How the model's output becomes a row, as `FrozenBackbone.pooling`; loads the model.

        Raises:
            WeightsError: as `load_backbone`.
        """
        return self._model().pooling

    def encode(
        self,
        inputs: Sequence[str] | Sequence[Path],
        *,
        advance: Callable[[int], None] | None = None,
        unreadable: Callable[[int, TableError], None] | None = None,
    ) -> NDArray[np.float32]:
        """Features of `inputs`, as `FrozenBackbone.encode`; loads the model.

        Raises:
            WeightsError: as `load_backbone`.
            TableError: an image or a sound cannot be read, and there is no `unreadable`.
            RunError: the model is in train mode, or a buffer changed.
        """
        return self._model().encode(inputs, advance=advance, unreadable=unreadable)

    def save(self, folder: Path) -> None:
        """Write the model to `folder` as safetensors with its configuration, without loading it.

        Raises:
            WeightsError: the files are gone or no longer the pinned ones.
            RunError: the folder cannot be written.
        """
        files = _readable(locate(self._pinned, base=Path(), network=False))
        beside = [name for name in COMPANIONS if (files.folder / name).is_file()]
        try:
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(files.weights_file, folder / WEIGHTS_NAME)
            for name in beside:
                shutil.copyfile(files.folder / name, folder / name)
        except OSError as error:
            raise RunError(f"{folder}: {error}", "a writable folder", "choose another folder") from None
        if (found := sha256_of(folder / WEIGHTS_NAME)) != files.sha256:
            raise WeightsError(
                f"{files.weights_file} changed while it was copied, to SHA-256 {found}",
                f"SHA-256 {files.sha256}",
                "obtain the pinned file again",
            )

    def another(self) -> FrozenBackbone:
        """The model, loaded once more and on the CPU, for who changes it.

        Raises:
            WeightsError: as `load_backbone`.
        """
        from veil.common.backbone import load_backbone

        return load_backbone(self._pinned, self._task, base=Path(), device="cpu")

    def _model(self) -> FrozenBackbone:
        from veil.common.backbone import load_backbone

        with self._lock:
            if self._loaded is None:
                self._loaded = load_backbone(self._pinned, self._task, base=Path(), device=self._device)
            return self._loaded


def find_backbone(backbone: Backbone, task: Task, *, base: Path, device: Device = "auto") -> LazyBackbone:
    """Find a plan's pretrained model and check its hashes.

    Args:
        backbone: source and hashes.
        task: kind, and `max_length` (tokens), `image_size` (pixels) or `max_seconds`.
        base: folder that a relative `path:` source starts from.
        device: where features are computed.

    Raises:
        WeightsError: the weights are missing, damaged or not the pinned ones.
        InputError: a GPU is asked for that torch does not have.
    """
    found, chosen = locate(backbone, base=base), chosen_device(device)
    here = {"source": f"path:{found.folder.absolute()}", "files_sha256": found.files_sha256}
    return LazyBackbone(
        backbone.model_copy(update=here),
        task,
        preprocessing=_preprocessing(task, found.files_sha256, chosen),
        device=chosen,
    )


def _readable(pinned: PinnedWeights) -> PinnedWeights:
    """The files as they are loaded: the pinned ones, or what conversion.py makes of them."""
    if kind_of(pinned.weights_file) is None:  # conversion brings torch, which other backbones do not need here
        return pinned
    from veil.common.conversion import converted

    return converted(pinned)


def chosen_device(device: Device) -> Literal["cpu", "cuda"]:
    """The kind of device that is meant here and now.

    Raises:
        InputError: a GPU is asked for that torch does not have.
    """
    if device == "cpu":
        return "cpu"
    if _has_gpu():
        return "cuda"
    if device == "cuda":
        raise InputError(
            f'device = "cuda" with torch {version("torch")}, which has no GPU here',
            "a GPU, its driver, and a torch that is built for it",
            'set device = "auto" or "cpu", or install them',
        )
    return "cpu"


def _has_gpu() -> bool:
    if version("torch").endswith("+cpu"):  # it has none, and importing it to hear so takes seconds
        return False
    import torch

    return torch.cuda.is_available()


def _preprocessing(task: Task, files_sha256: str, device: str) -> str:
    told: dict[str, Any] = {
        "modality": task.modality,
        "max_length": task.max_length if task.modality == "text" else None,
        "image_size": task.image_size if task.modality == "image" else None,
        "max_seconds": task.max_seconds if task.modality == "audio" else None,
        "files": files_sha256,
        "device": device,
        "libraries": {name: version(name) for name in (*_LIBRARIES, *filter(find_spec, _EXTRAS))},
        "code": {name: _source_digest(name) for name in _OUR_CODE},
    }
    return json.dumps(told, sort_keys=True, separators=(",", ":"))


def _source_digest(name: str) -> str:
    spec = find_spec(name)
    if spec is None or spec.origin is None:
        raise ValueError(f"module {name} has no file; expected an installed package")
    return hashlib.sha256(Path(spec.origin).read_bytes()).hexdigest()
