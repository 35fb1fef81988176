# SPDX-License-Identifier: Apache-2.0
"""Records to model inputs: texts to token ids, image files to pixels, sound files to samples or spectrograms.

Promises that a model input depends on the record, the folder's files and the task's max_length, image_size or
max_seconds alone.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from veil.common import ge2e
from veil.common.errors import TableError
from veil.common.plan_sections import Modality, Task
from veil.common.sound import read_sound
from veil.common.weights import COMPANIONS

Features = npt.NDArray[np.float32]
ModelInput = dict[str, Tensor]
"""What a model takes for one record, by argument; the first dimension of each tensor is 1."""

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
_EXTRACTORS: Final = ("Wav2Vec2FeatureExtractor", "WhisperFeatureExtractor")
"""Transformers' own that look at the recording alone: others cut or dither at random, or need torchaudio."""

_DEEP_IMAGE_MODES: Final = frozenset({"F", "I", "I;16", "I;16L", "I;16B", "I;16N"})


class Reader(Protocol):
    """Turns records into what a model takes."""

    modality: Modality

    def read(self, record: Any) -> ModelInput:
        """One record as the model takes it.

        Raises:
            TableError: it cannot be read.
        """

    def largest(self) -> ModelInput:
        """Model inputs for one record of the greatest size there can be."""


class TextReader:
    """A text → token ids, as many as it has and at most `max_length`."""

    modality: Modality = "text"

    def __init__(self, folder: Path, max_length: int) -> None:
        from transformers import AutoTokenizer

        names = [name for name in COMPANIONS if name not in _CONFIGS and (folder / name).is_file()]
        if _VOCABULARIES.isdisjoint(names):
            # Without one, transformers makes an empty tokenizer that knows no word and says nothing.
            raise ValueError("no tokenizer vocabulary beside the weights")
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        self.max_length = max_length
        self.padding = int(self.tokenizer.pad_token_id or 0)

    def read(self, record: str) -> ModelInput:
        """A text's tokens."""
        return unpadded(self._tokens(record))

    def largest(self) -> ModelInput:
        """One text that fills `max_length`, with the vocabulary's last token in it."""
        row = self._tokens("a " * self.max_length)
        return unpadded([*row[:-1], max(self.tokenizer.get_vocab().values())])

    def spans(self, record: str) -> list[tuple[int, int]]:
        """Which characters of a text each of its tokens stands for, from the first up to the second; none where both
        are the same, as for a token that opens the text."""
        told = self.tokenizer(record, truncation=True, max_length=self.max_length, return_offsets_mapping=True)
        return [(int(first), int(last)) for first, last in told["offset_mapping"]] or [(0, 0)]

    def blank(self, record: str) -> ModelInput:
        """A text's tokens, those that stand for characters replaced by padding that the model is not told to skip."""
        said = self.read(record)
        stands = torch.tensor([[first < last for first, last in self.spans(record)]])
        return {**said, "input_ids": said["input_ids"].masked_fill(stands, self.padding)}

    def _tokens(self, text: str) -> list[int]:
        tokens: list[int] = self.tokenizer(text, truncation=True, max_length=self.max_length)["input_ids"]
        return tokens or [self.padding]


def unpadded(tokens: list[int]) -> ModelInput:
    """Tokens as a model takes them, with nothing that it is to skip."""
    ids = torch.tensor([tokens])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


class ImageReader:
    """Image files → pixels of a square, scaled as the folder's preprocessor_config.json says, or timm's own part of
    its config.json."""

    modality: Modality = "image"

    def __init__(self, folder: Path, image_size: int) -> None:
        told = _scaling(folder)
        self._size = image_size
        self._factor = float(told.get("rescale_factor", 1 / 255)) if told.get("do_rescale", True) else 1.0
        normalise = told.get("do_normalize", True)
        self._mean = np.asarray(told["image_mean"] if normalise else [0, 0, 0], np.float32)
        self._std = np.asarray(told["image_std"] if normalise else [1, 1, 1], np.float32)
        if self._mean.shape != (3,) or self._std.shape != (3,) or not (self._std > 0).all():
            raise ValueError("image_mean and image_std must be three numbers each, image_std above 0")

    def read(self, record: Path) -> ModelInput:
        """An image's pixels."""
        return self._scaled(self._colours(record)[None])

    def largest(self) -> ModelInput:
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

    def _scaled(self, colours: Features) -> ModelInput:
        pixels = (colours * np.float32(self._factor) - self._mean) / self._std
        return {"pixel_values": torch.from_numpy(pixels).permute(0, 3, 1, 2)}


def _scaling(folder: Path) -> dict[str, Any]:
    own, config = folder / "preprocessor_config.json", read_json(folder / "config.json")
    if own.is_file() or "pretrained_cfg" not in config:
        return read_json(own)
    told = config["pretrained_cfg"]
    return {"image_mean": told["mean"], "image_std": told["std"]}


class SoundReader:
    """Sound files → what the folder's preprocessor_config.json says the model hears: samples or a spectrogram."""

    modality: Modality = "audio"

    def __init__(self, folder: Path, max_seconds: float) -> None:
        told = read_json(folder / "preprocessor_config.json")
        self._rate = int(told["sampling_rate"])
        self._max_seconds = max_seconds
        self._heard = _hearing(told, max_seconds)

    def read(self, record: Path) -> ModelInput:
        """A sound, as much of it as `max_seconds` holds."""
        return self._heard(read_sound(record, rate=self._rate, max_seconds=self._max_seconds))

    def largest(self) -> ModelInput:
        """Silence of `max_seconds`."""
        return self._heard(np.zeros(round(self._max_seconds * self._rate), np.float32))


def _hearing(told: dict[str, Any], max_seconds: float) -> Callable[[Features], ModelInput]:
    """Samples [n] → model input, as a preprocessor_config.json tells it."""
    kind = told.get("feature_extractor_type")
    if kind == ge2e.MODEL_TYPE:
        return ge2e.model_input
    if kind not in _EXTRACTORS or told.get("dither"):
        raise ValueError(f"feature_extractor_type {kind}; {' and '.join(_EXTRACTORS)} without dither are read")
    if max_seconds > (longest := float(told.get("chunk_length", max_seconds))):
        raise ValueError(f"max_seconds = {max_seconds:g} for a model that hears {longest:g} s")
    import transformers

    # Made of this one file: by folder, transformers would prefer a processor_config.json, which is not pinned.
    extractor: Any = getattr(transformers, kind).from_dict(told)
    padded = "chunk_length" in told

    def heard(samples: Features) -> ModelInput:
        found = extractor(
            samples, sampling_rate=extractor.sampling_rate, return_attention_mask=padded, return_tensors="pt"
        )
        return dict(found)

    return heard


def reader_for(task: Task, folder: Path) -> Reader:
    """The way to read the records of a task with the model in a folder.

    Raises:
        ValueError: what the folder says about it cannot be followed.
    """
    if task.modality == "text":
        return TextReader(folder, task.max_length)
    if task.modality == "audio":
        return SoundReader(folder, task.max_seconds)
    return ImageReader(folder, task.image_size)


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file; anything else becomes a `WeightsError` in `_explained`."""
    document = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(document, dict):
        raise ValueError(f"{file.name} is not a JSON object")
    return document
