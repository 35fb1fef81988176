# SPDX-License-Identifier: Apache-2.0
"""GE2E, the speech encoder of the PyPI package Resemblyzer: three LSTM layers over 40 mel bands.

Every tensor of the layers is taken over bit by bit and what they compute stays that of the original; its projection
to a speaker's embedding is left out, as the mean of the top layer over time says more about what is spoken.

Wan, Wang, Papir, Lopez Moreno, Generalized End-to-End Loss for Speaker Verification, ICASSP 2018.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

MODEL_TYPE: Final = "veil-ge2e"
RATE: Final = 16_000

_LAYERS, _HIDDEN, _BANDS = 3, 256, 40
_FFT, _HOP = 400, 160
"""Samples of one frame, 25 ms, and from one frame to the next, 10 ms."""

_FRAMES, _STEP = 160, 80
"""Frames of the windows the encoder was trained on, 1.6 s, and from one window to the next."""

_LOUDNESS_DB: Final = -30.0
_PARTS: Final = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
_UNUSED: Final = frozenset({"linear.weight", "linear.bias", "similarity_weight", "similarity_bias"})

CONFIG: Final[dict[str, Any]] = {
    "architectures": ["Ge2e"],
    "model_type": MODEL_TYPE,
    "hidden_size": _HIDDEN,
    "num_hidden_layers": _LAYERS,
    "num_mel_bins": _BANDS,
}
PREPROCESSOR: Final[dict[str, Any]] = {
    "feature_extractor_type": MODEL_TYPE,
    "sampling_rate": RATE,
    "feature_size": _BANDS,
    "n_fft": _FFT,
    "hop_length": _HOP,
}


@dataclass(frozen=True, slots=True)
class Hidden:
    """What the encoder gives, under the name that transformers' models have for it.

    Attributes:
        last_hidden_state: the top layer at every frame of every window, [n, windows · 160, 256].
    """

    last_hidden_state: Tensor


class Layer(nn.Module):
    """One layer: every frame after those before it, a tensor in and a tensor out."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(width, _HIDDEN, batch_first=True)

    def forward(self, hidden: Tensor) -> Tensor:
        """[n, frames, width] → [n, frames, 256]."""
        after: Tensor = self.lstm(hidden)[0]
        return after


class Ge2e(nn.Module):
    """The encoder; its layers are modules of their own, `layers.0` at the bottom to `layers.2`."""

    def __init__(self) -> None:
        super().__init__()
        widths = (_BANDS, *[_HIDDEN] * (_LAYERS - 1))
        self.layers = nn.ModuleList(Layer(width) for width in widths)

    def forward(self, input_features: Tensor, attention_mask: Tensor | None = None) -> Hidden:
        """Every window is read from a start of its own.

        Args:
            input_features: as `model_input` gives them, [n, windows, 160, 40].
            attention_mask: which frames are sound, for whoever takes the mean; the encoder reads forward in time, so
                silence behind a sound changes nothing before it.
        """
        hidden = input_features.flatten(0, 1)
        for layer in self.layers:
            hidden = layer(hidden)
        return Hidden(hidden.reshape(len(input_features), -1, _HIDDEN))


def loaded(tensors: dict[str, Tensor]) -> Ge2e:
    """The encoder with these tensors.

    Raises:
        ValueError: they are not its tensors.
    """
    with torch.device("meta"):
        model = Ge2e()
    try:
        model.load_state_dict(tensors, assign=True)
    except RuntimeError as error:
        raise ValueError(" ".join(str(error).split())) from None
    return model.float()


def renamed(state: dict[str, Any]) -> dict[str, Tensor]:
    """The layers' tensors out of the checkpoint, under the names of `Ge2e`.

    Raises:
        ValueError: it is not GE2E's checkpoint.
    """
    source = state.get("model_state")
    if not isinstance(source, dict):
        raise ValueError("no model_state")
    names = {f"lstm.{part}_l{at}": f"layers.{at}.lstm.{part}_l0" for at in range(_LAYERS) for part in _PARTS}
    if odd := names.keys() ^ (source.keys() - _UNUSED):
        raise ValueError(f"missing or unknown tensors such as {min(odd, key=str)}")
    return {theirs: source[ours].detach().clone().contiguous() for ours, theirs in names.items()}


def model_input(samples: NDArray[np.float32]) -> dict[str, Tensor]:
    """A sound as the encoder takes it: `input_features` [1, windows, 160, 40], `attention_mask` [1, windows · 160].

    A quiet sound is made louder, never a loud one quieter, and silence follows to the end of the last window.

    Args:
        samples: mono at 16 kHz, in [-1, 1], [n].
    """
    mel = _mel(_levelled(samples.astype(np.float64)))
    windows = 1 + math.ceil(max(0, len(mel) - _FRAMES) / _STEP)
    frames = np.arange(windows)[:, None] * _STEP + np.arange(_FRAMES)
    padded = np.pad(mel, ((0, int(frames[-1, -1]) + 1 - len(mel)), (0, 0)))
    return {
        "input_features": torch.from_numpy(padded[frames].astype(np.float32))[None],
        "attention_mask": torch.from_numpy((frames < len(mel)).reshape(1, -1).astype(np.int64)),
    }


def _levelled(samples: NDArray[np.float64]) -> NDArray[np.float64]:
    level = float(np.sqrt(np.mean(samples**2)))
    wanted: float = 10 ** (_LOUDNESS_DB / 20)
    return samples * (wanted / level) if 0 < level < wanted else samples


def _mel(samples: NDArray[np.float64]) -> NDArray[np.float64]:
    """Power in each band, not its logarithm, [frames, 40], as librosa 0.10 computes it."""
    around = np.pad(samples, _FFT // 2)
    framed = np.lib.stride_tricks.sliding_window_view(around, _FFT)[::_HOP]
    window, bands = _filters()
    power: NDArray[np.float64] = np.abs(np.fft.rfft(framed * window, axis=1)) ** 2 @ bands
    return power


@cache
def _filters() -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """A periodic Hann window [400], and Slaney's mel bands [201, 40]."""
    from transformers.audio_utils import mel_filter_bank

    bands = mel_filter_bank(_FFT // 2 + 1, _BANDS, 0.0, RATE / 2, RATE, norm="slaney", mel_scale="slaney")
    return np.hanning(_FFT + 1)[:-1], bands
