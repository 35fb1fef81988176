# SPDX-License-Identifier: Apache-2.0
"""Records to model inputs: texts to token ids, image files to pixels.

Promises that a model input depends on the record, the folder's files and the task's max_length or image_size alone.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any, Final, Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from veil.common.errors import TableError
from veil.common.weights import COMPANIONS

Modality = Literal["text", "image"]
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
        self._tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        self._max_length = max_length
        self._padding = int(self._tokenizer.pad_token_id or 0)

    def read(self, record: str) -> ModelInput:
        """A text's tokens."""
        return _unpadded(self._tokens(record))

    def largest(self) -> ModelInput:
        """One text that fills `max_length`, with the vocabulary's last token in it."""
        row = self._tokens("a " * self._max_length)
        return _unpadded([*row[:-1], max(self._tokenizer.get_vocab().values())])

    def _tokens(self, text: str) -> list[int]:
        tokens: list[int] = self._tokenizer(text, truncation=True, max_length=self._max_length)["input_ids"]
        return tokens or [self._padding]


def _unpadded(tokens: list[int]) -> ModelInput:
    ids = torch.tensor([tokens])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


class ImageReader:
    """Image files → pixels of a square, scaled as the folder's preprocessor_config.json says."""

    modality: Modality = "image"

    def __init__(self, folder: Path, image_size: int) -> None:
        told = read_json(folder / "preprocessor_config.json")
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


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file; anything else becomes a `WeightsError` in `_explained`."""
    document = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(document, dict):
        raise ValueError(f"{file.name} is not a JSON object")
    return document
