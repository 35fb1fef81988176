# SPDX-License-Identifier: Apache-2.0
"""The frozen pretrained model: texts or images in, a row of features each out; transformers' only room.

Nothing but the pinned file's tensors and the JSON beside it is loaded and no code from there runs; a model
that trains, moves its statistics or would start with random layers is refused.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor, nn

from veil.common import lite0
from veil.common.errors import RunError, TableError, WeightsError
from veil.common.plan import Backbone, Task
from veil.common.weights import COMPANIONS, WEIGHTS_NAME, PinnedWeights, locate, sha256_of

Modality = Literal["text", "image"]
Features = npt.NDArray[np.float32]
Batch = dict[str, Tensor]

_WINDOW_BATCHES: Final = 64
_CONFIGS: Final = ("config.json", "preprocessor_config.json")
_VOCABULARIES: Final = frozenset(
    {
        "tokenizer.json",
        "vocab.txt",
        "vocab.json",
        "spiece.model",
        "sentencepiece.bpe.model",
        "tokenizer.model",
    }
)
_VOLATILE_KEYS: Final = frozenset({"transformers_version", "_name_or_path"})
_DEEP_IMAGE_MODES: Final = frozenset({"F", "I", "I;16", "I;16L", "I;16B", "I;16N"})


class FrozenBackbone:
    """A pretrained model whose every tensor stays as it is; `load_backbone` makes one.

    Attributes:
        width: features per record.
        modality: what `encode` takes.
        preprocessing: canonical JSON of all that decides features besides the weights and library versions.
        sha256: the pinned hash of the weights the plan names.

    Guarantees:
        - a record's features do not depend on the batch it is in, beyond float32 rounding
        - no module is in train mode, and no buffer changes, while features are computed
    """

    def __init__(self, model: nn.Module, reader: _Reader, pooling: _Pooling, files: PinnedWeights, sha256: str) -> None:
        self._model, self._reader, self._pooling, self._files = model, reader, pooling, files
        self._buffers: Batch | None = {name: one.clone() for name, one in model.named_buffers()}
        self.width: int = pooling.width
        self.modality: Modality = reader.modality
        self.preprocessing: str = _canonical({**reader.facts, "pooling": pooling.name})
        self.sha256: str = sha256

    def encode(
        self,
        inputs: Sequence[str] | Sequence[Path],
        *,
        batch_size: int = 32,
        advance: Callable[[int], None] | None = None,
    ) -> Features:
        """Features of `inputs`, as the model gives them (rows are not normalised).

        Args:
            inputs: n texts, or n paths of image files.
            batch_size: records computed at once.
            advance: called after every batch with the number of records in it.

        Returns:
            float32 [n, width], row i for input i.

        Raises:
            TableError: an image cannot be read.
            RunError: the model is in train mode, or a buffer changed.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size = {batch_size}; expected at least 1")
        features = np.empty((len(inputs), self.width), dtype=np.float32)
        for positions, batch in self._reader.batches(inputs, batch_size):
            self._refuse_training()
            with torch.inference_mode():
                features[positions] = self._pooling.pool(self._model(**batch), batch).numpy()
            if advance is not None:
                advance(len(positions))
        if len(inputs) > 0:
            self._refuse_drift()
        return features

    def save(self, folder: Path) -> None:
        """Write the model to `folder` as transformers reads it: the loaded files themselves, byte for byte.

        Raises:
            WeightsError: the weights on disk are no longer the loaded ones.
            RunError: the folder cannot be written.
        """
        beside = [name for name in COMPANIONS if (self._files.folder / name).is_file()]
        try:
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self._files.weights_file, folder / WEIGHTS_NAME)
            for name in beside:
                shutil.copyfile(self._files.folder / name, folder / name)
        except OSError as error:
            raise RunError(f"{folder}: {error}", "a writable folder", "choose another folder") from None
        if (found := sha256_of(folder / WEIGHTS_NAME)) != self._files.sha256:
            raise WeightsError(
                f"{self._files.weights_file} changed after it was loaded, to SHA-256 {found}",
                f"SHA-256 {self._files.sha256}",
                "obtain the pinned file again",
            )

    def _refuse_training(self) -> None:
        for name, module in self._model.named_modules():
            if module.training:
                raise _not_frozen(f"module {name or 'at the root'} in train mode")

    def _refuse_drift(self) -> None:
        """Looked at once, after the first records: statistics that move at all move with these."""
        if self._buffers is None:
            return
        for name, buffer in self._model.named_buffers():
            if not torch.equal(buffer, self._buffers[name]):
                raise _not_frozen(f"buffer {name} changed by computing features")
        self._buffers = None


def load_backbone(backbone: Backbone, task: Task, *, base: Path) -> FrozenBackbone:
    """Load a plan's pretrained model for its task.

    Args:
        backbone: source and hash.
        task: kind, and `max_length` (tokens) or `image_size` (pixels).
        base: folder that a relative `path:` source starts from.

    Raises:
        WeightsError: the weights are missing, not the pinned ones, damaged, ask for code of their own, or do
            not fit the task.
    """
    pinned = locate(backbone, base=base)
    files = lite0.converted(pinned) if pinned.weights_file.suffix == ".pth" else pinned
    with _quiet(), _explained(files.folder):
        _refuse_code(files.folder)
        reader: _Reader = (
            _TextReader(files.folder, task.max_length)
            if task.kind == "text-classification"
            else _ImageReader(files.folder, task.image_size)
        )
        model, lacking = _model(files)
        pooling = _pooling(model, reader, lacking)
    return FrozenBackbone(model, reader, pooling, files, backbone.sha256)


class _Reader(Protocol):
    """Turns records into what a model takes; `facts` says how, completely."""

    modality: Modality
    facts: dict[str, Any]

    def batches(self, records: Sequence[Any], size: int) -> Iterator[tuple[list[int], Batch]]:
        """Every record once, as (positions, model inputs), at most `size` at a time."""

    def largest(self) -> Batch:
        """Model inputs for one record of the greatest size there can be."""


class _TextReader:
    """Texts → token ids, padded on the right to the longest of a batch."""

    modality: Modality = "text"

    def __init__(self, folder: Path, max_length: int) -> None:
        from transformers import AutoTokenizer

        names = [name for name in COMPANIONS if name not in _CONFIGS and (folder / name).is_file()]
        if _VOCABULARIES.isdisjoint(names):
            # Without one, transformers makes an empty tokenizer that knows no word and says nothing.
            raise ValueError("no tokenizer vocabulary beside the weights")
        self._tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        self._max_length = max_length
        self._padding = int(self._tokenizer.pad_token_id or 0)
        self.facts = {
            "modality": self.modality,
            "max_length": max_length,
            "config": _config_digest(folder),
            "tokenizer": _digest({name: sha256_of(folder / name) for name in names}),
        }

    def batches(self, records: Sequence[str], size: int) -> Iterator[tuple[list[int], Batch]]:
        """Texts by length within a window of many batches, so that little padding is computed."""
        window = size * _WINDOW_BATCHES
        for start in range(0, len(records), window):
            rows = self._tokens(records[start : start + window])
            order = sorted(range(len(rows)), key=lambda one: len(rows[one]))
            for first in range(0, len(order), size):
                chosen = order[first : first + size]
                yield [start + one for one in chosen], self._padded([rows[one] for one in chosen])

    def largest(self) -> Batch:
        """One text that fills `max_length`, with the vocabulary's last token in it."""
        (row,) = self._tokens(["a " * self._max_length])
        return self._padded([[*row[:-1], max(self._tokenizer.get_vocab().values())]])

    def _tokens(self, texts: Sequence[str]) -> list[list[int]]:
        tokens = self._tokenizer(list(texts), truncation=True, max_length=self._max_length)["input_ids"]
        return [row or [self._padding] for row in tokens]

    def _padded(self, rows: list[list[int]]) -> Batch:
        longest = max(map(len, rows))
        ids = [row + [self._padding] * (longest - len(row)) for row in rows]
        mask = [[1] * len(row) + [0] * (longest - len(row)) for row in rows]
        return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


class _ImageReader:
    """Image files → pixels of a square, scaled as the folder's preprocessor_config.json says."""

    modality: Modality = "image"

    def __init__(self, folder: Path, image_size: int) -> None:
        told = _read_json(folder / "preprocessor_config.json")
        self._size = image_size
        self._factor = float(told.get("rescale_factor", 1 / 255)) if told.get("do_rescale", True) else 1.0
        normalise = told.get("do_normalize", True)
        self._mean = np.asarray(told["image_mean"] if normalise else [0, 0, 0], np.float32)
        self._std = np.asarray(told["image_std"] if normalise else [1, 1, 1], np.float32)
        if self._mean.shape != (3,) or self._std.shape != (3,) or not (self._std > 0).all():
            raise ValueError("image_mean and image_std must be three numbers each, image_std above 0")
        self.facts = {
            "modality": self.modality,
            "image_size": image_size,
            "colours": "RGB",
            "resample": "bilinear",
            "rescale_factor": self._factor,
            "mean": self._mean.tolist(),
            "std": self._std.tolist(),
            "config": _config_digest(folder),
        }

    def batches(self, records: Sequence[Path], size: int) -> Iterator[tuple[list[int], Batch]]:
        """Images in the order given."""
        for start in range(0, len(records), size):
            chosen = list(range(start, min(start + size, len(records))))
            yield chosen, self._scaled(np.stack([self._colours(records[one]) for one in chosen]))

    def largest(self) -> Batch:
        """One black image."""
        return self._scaled(np.zeros((1, self._size, self._size, 3), np.float32))

    def _colours(self, path: Path) -> Features:
        """float32 [size, size, 3], 0 to 255."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                with Image.open(path) as image:
                    if image.mode in _DEEP_IMAGE_MODES:
                        raise ValueError(f"more than 8 bits a channel, mode {image.mode}")
                    square = image.convert("RGB").resize((self._size,) * 2, Image.Resampling.BILINEAR)
        except Exception as error:  # a damaged file fails inside Pillow in many ways, all of them the file's
            raise TableError(
                f"image {path}: {error}",
                "a complete image of 8 bits a channel that Pillow reads, such as PNG or JPEG",
                "replace or convert the file, or remove its row",
            ) from None
        return np.asarray(square, np.float32)

    def _scaled(self, colours: Features) -> Batch:
        pixels = (colours * np.float32(self._factor) - self._mean) / self._std
        return {"pixel_values": torch.from_numpy(pixels).permute(0, 3, 1, 2)}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pooling:
    """How a model's output becomes one row per record, and how wide the row is."""

    name: str
    width: int
    pool: Callable[[Any, Batch], Tensor]


def _pooling(model: nn.Module, reader: _Reader, lacking: set[str]) -> _Pooling:
    """Choose by the output for the largest record, which also shows that the model takes such records."""
    batch = reader.largest()
    with torch.inference_mode():
        output = model(**batch)
    if reader.modality == "text":
        name, pool = "masked-mean", _masked_mean
    elif getattr(output, "pooler_output", None) is not None and not lacking:
        name, pool = "pooler", _pooler
    else:
        name, pool = "mean", _mean
    row = pool(output, batch)
    if row.ndim != 2 or not row.isfinite().all():
        raise ValueError(f"features of shape {list(row.shape)} that are not one finite row per record")
    return _Pooling(name=name, width=row.shape[1], pool=pool)


def _masked_mean(output: Any, batch: Batch) -> Tensor:
    mask = batch["attention_mask"].unsqueeze(-1)
    hidden: Tensor = output.last_hidden_state
    return (hidden * mask).sum(1) / mask.sum(1)


def _pooler(output: Any, batch: Batch) -> Tensor:
    pooled: Tensor = output.pooler_output
    return pooled.flatten(1)


def _mean(output: Any, batch: Batch) -> Tensor:
    """Over the tokens of [n, tokens, d], or the places of [n, d, height, width]."""
    hidden: Tensor = output.last_hidden_state
    return hidden.mean(1) if hidden.ndim == 3 else hidden.flatten(2).mean(2)


def _model(files: PinnedWeights) -> tuple[nn.Module, set[str]]:
    """The frozen model, and the names of its pooler's tensors that the weights lack (they are random then).

    It is handed tensors instead of the folder: from a folder, transformers would also follow an adapter or
    another weights file that some JSON there names, and neither is pinned.
    """
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModel

    auto: Any = AutoModel
    config = AutoConfig.from_pretrained(
        files.folder, local_files_only=True, trust_remote_code=False, attn_implementation="eager"
    )
    with torch.device("meta"):
        kind = type(auto.from_config(config, trust_remote_code=False))
    model, report = kind.from_pretrained(
        None,
        config=config,
        state_dict=load_file(files.weights_file),
        dtype=torch.float32,
        attn_implementation="eager",
        output_loading_info=True,
    )
    lacking = set(report["missing_keys"])
    if random := {name for name in lacking if not name.startswith("pooler.")}:
        raise ValueError(f"{len(random)} tensors are missing from the weights, such as {min(random)}")
    return model.eval().requires_grad_(False), lacking


def _refuse_code(folder: Path) -> None:
    for name in (one for one in COMPANIONS if one.endswith("config.json") and (folder / one).is_file()):
        if "auto_map" in _read_json(folder / name):
            raise WeightsError(
                f"{folder / name} asks for code of its own (auto_map)",
                "a model that the installed transformers knows",
                "choose a backbone without remote code",
            )


@contextmanager
def _explained(folder: Path) -> Iterator[None]:
    """Turn whatever transformers raises over a folder it cannot use into one error for a person."""
    try:
        yield
    except WeightsError:
        raise
    except Exception as error:  # a dozen kinds, and none of them says what to do
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise WeightsError(
            f"{folder}: {reason}",
            "a complete model that fits task.kind and takes its max_length or image_size",
            "check the folder, and set max_length or image_size to what the model was made for",
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars, log lines or warnings meanwhile; transformers' own settings are put back after."""
    from transformers import utils

    control: Any = utils.logging
    bars, level = control.is_progress_bar_enabled(), control.get_verbosity()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        control.disable_progress_bar()
        control.set_verbosity_error()
        try:
            yield
        finally:
            control.set_verbosity(level)
            if bars:
                control.enable_progress_bar()


def _config_digest(folder: Path) -> str:
    config = _read_json(folder / "config.json")
    return _digest({key: value for key, value in config.items() if key not in _VOLATILE_KEYS})


def _digest(document: dict[str, Any]) -> str:
    return hashlib.sha256(_canonical(document).encode()).hexdigest()


def _canonical(document: dict[str, Any]) -> str:
    return json.dumps(document, sort_keys=True, separators=(",", ":"))


def _read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file; anything else becomes a `WeightsError` in `_explained`."""
    document = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(document, dict):
        raise ValueError(f"{file.name} is not a JSON object")
    return document


def _not_frozen(found: str) -> RunError:
    return RunError(found, "a frozen backbone in evaluation mode", "load the backbone again and leave it be")
