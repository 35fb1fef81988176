# SPDX-License-Identifier: Apache-2.0
"""Sound files to samples: a WAV file in, one channel at the encoder's rate out.

Promises samples that depend on the file, the rate and the public length alone; a file that is damaged, or no WAV, is
a `TableError` that names it.
"""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from veil.common.errors import TableError

SUFFIXES: Final = (".wav", ".wave")
_MOST_BYTES: Final = 1 << 30
_RATES: Final = (1_000, 400_000)
_SHORTEST_S: Final = 0.1
_CUT_SHORT: Final = "Reached EOF prematurely"


def read_sound(path: Path, *, rate: int, max_seconds: float) -> NDArray[np.float32]:
    """A WAV file's samples: channels averaged, cut to `max_seconds`, resampled, silence up to a tenth of a second.

    Args:
        path: PCM of 8 to 32 bits, or floating point.
        rate: samples a second that the encoder hears.
        max_seconds: what comes later is left out.

    Returns:
        float32 [n], whole numbers scaled to [-1, 1].

    Raises:
        TableError: the file cannot be read, or is none of these.
    """
    try:
        own_rate, samples = _samples(path, max_seconds)
        heard = _resampled(samples, own_rate, rate)
    except Exception as error:  # a damaged file fails inside SciPy in many ways, all of them the file's
        raise TableError(
            f"sound {path}: {str(error).strip() or type(error).__name__}",
            "a complete WAV file, PCM of 8 to 32 bits or floating point",
            f"replace the file, convert it (ffmpeg -i {path.name} {path.stem}.wav), or remove its row",
        ) from None
    return np.pad(heard, (0, max(0, math.ceil(_SHORTEST_S * rate) - len(heard))))


def _samples(path: Path, max_seconds: float) -> tuple[int, NDArray[np.float64]]:
    """The file's rate and its first samples, one channel."""
    from scipy.io import wavfile

    if (size := path.stat().st_size) > _MOST_BYTES:
        raise ValueError(f"{size} bytes, more than a record can have")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", message=_CUT_SHORT)
        rate, found = wavfile.read(path)
    if not _RATES[0] <= rate <= _RATES[1]:
        raise ValueError(f"{rate} samples a second")
    found = found[: math.ceil(max_seconds * rate)]
    if found.size == 0:
        raise ValueError("no samples")
    scaled = _scaled(found)
    if not np.isfinite(scaled).all():
        raise ValueError("samples that are not finite")
    return rate, scaled if scaled.ndim == 1 else scaled.mean(axis=1)


def _scaled(samples: NDArray[np.generic]) -> NDArray[np.float64]:
    """Whole numbers to [-1, 1]: 8 bits are unsigned, and SciPy puts 24 bits into the upper ones of 32."""
    numbers = samples.astype(np.float64)
    if samples.dtype.kind == "f":
        return numbers
    half = 2.0 ** (8 * samples.dtype.itemsize - 1)
    return (numbers - half if samples.dtype.kind == "u" else numbers) / half


def _resampled(samples: NDArray[np.float64], own_rate: int, rate: int) -> NDArray[np.float32]:
    from scipy.signal import resample_poly

    common = math.gcd(own_rate, rate)
    heard: NDArray[np.float64] = resample_poly(samples, rate // common, own_rate // common)
    return heard.astype(np.float32)
