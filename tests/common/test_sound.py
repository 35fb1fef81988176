# SPDX-License-Identifier: Apache-2.0
"""Tests of `veil.common.sound`: every kind of WAV file gives the same sound, and nothing else is taken for one."""

from __future__ import annotations

import wave
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from scipy.io import wavfile

from veil.common.errors import TableError
from veil.common.sound import read_sound

RATE = 16_000


def tone(seconds: float = 0.5, rate: int = RATE, hertz: float = 440.0) -> npt.NDArray[np.float64]:
    return np.asarray(0.5 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate))


def write(path: Path, samples: npt.NDArray[Any], *, bits: int = 16, rate: int = RATE) -> Path:
    """Samples in [-1, 1], [n] or [n, channels], as PCM; by the standard library, which knows 24 bits."""
    scaled = np.round(samples * (2 ** (bits - 1) - 1)).astype(np.int64) + (128 if bits == 8 else 0)
    low_bytes = scaled.astype("<i8").reshape(-1, 1).view(np.uint8)[:, : bits // 8]
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1 if samples.ndim == 1 else samples.shape[1])
        file.setsampwidth(bits // 8)
        file.setframerate(rate)
        file.writeframes(low_bytes.tobytes())
    return path


def read(path: Path, rate: int = RATE, max_seconds: float = 10.0) -> npt.NDArray[np.float32]:
    return read_sound(path, rate=rate, max_seconds=max_seconds)


def largest_difference(one: npt.NDArray[Any], other: npt.NDArray[Any]) -> float:
    assert one.shape == other.shape
    return float(np.abs(one - other).max())


@pytest.mark.parametrize("bits", [8, 16, 24, 32])
def test_pcm_of_every_width_is_the_sound(tmp_path: Path, bits: int) -> None:
    found = read(write(tmp_path / "a.wav", tone(), bits=bits))
    assert found.dtype == np.float32
    assert largest_difference(found, tone()) < 2.0 ** (2 - bits) + 1e-7


@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_floating_point_is_taken_as_it_is(tmp_path: Path, kind: type[np.floating[Any]]) -> None:
    wavfile.write(tmp_path / "a.wav", RATE, (3 * tone()).astype(kind))
    assert largest_difference(read(tmp_path / "a.wav"), 3 * tone()) < 1e-6


def test_channels_are_averaged(tmp_path: Path) -> None:
    both = np.stack([tone(hertz=440), tone(hertz=880)], axis=1)
    assert largest_difference(read(write(tmp_path / "a.wav", both)), both.mean(axis=1)) < 1e-4


@pytest.mark.parametrize("own", [8_000, 11_025, 44_100])
def test_another_rate_is_the_same_sound(tmp_path: Path, own: int) -> None:
    found = read(write(tmp_path / "a.wav", tone(rate=own), rate=own))
    inner = slice(800, -800)
    assert largest_difference(found[inner], tone()[: len(found)][inner]) < 5e-3


def test_what_comes_after_max_seconds_changes_nothing(tmp_path: Path) -> None:
    first, second = tone(0.5), tone(0.5, hertz=1000)
    one = read(write(tmp_path / "a.wav", first), max_seconds=0.5)
    other = read(write(tmp_path / "b.wav", np.concatenate([first, second])), max_seconds=0.5)
    assert len(one) == 8000
    assert np.array_equal(one, other)


def test_a_short_sound_is_followed_by_silence(tmp_path: Path) -> None:
    found = read(write(tmp_path / "a.wav", tone(0.01)))
    assert len(found) == 1600
    assert not found[160:].any()


@pytest.mark.parametrize("content", [b"fLaC\x00\x00\x00\x22", b"OggS\x00\x02", b"ID3\x03", b"", b"RIFF"])
def test_what_is_no_wav_file_is_refused_with_a_remedy(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.wav").write_bytes(content)
    with pytest.raises(TableError, match=r"a\.wav.*WAV file.*convert it"):
        read(tmp_path / "a.wav")


@pytest.mark.parametrize("kept", [30, 44, 1000, -1])
def test_a_file_that_was_cut_is_refused(tmp_path: Path, kept: int) -> None:
    content = write(tmp_path / "a.wav", tone()).read_bytes()
    (tmp_path / "a.wav").write_bytes(content[:kept])
    with pytest.raises(TableError, match=r"sound .*a\.wav"):
        read(tmp_path / "a.wav")


def test_no_samples_and_samples_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TableError, match="no samples"):
        read(write(tmp_path / "empty.wav", np.zeros(0)))
    wavfile.write(tmp_path / "nan.wav", RATE, np.array([0.0, np.nan], np.float32))
    with pytest.raises(TableError, match="not finite"):
        read(tmp_path / "nan.wav")


def test_a_rate_that_no_recorder_has_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TableError, match="10 samples a second"):
        read(write(tmp_path / "a.wav", tone(), rate=10))


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TableError, match="No such file"):
        read(tmp_path / "a.wav")
