# SPDX-License-Identifier: Apache-2.0
"""A federation of sounds: three sites' recordings, the real speech encoder, a head that tells them apart."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy.io import wavfile

from veil.common.pickled import GE2E

Veil = Callable[..., tuple[int, str, str]]
RATE = 8_000
TASK = {"kind": "audio-classification", "labels": ["low", "high"], "bounds": None, "max_seconds": 1.0}
BACKBONE = {"source": GE2E.source, "sha256": next(iter(GE2E.safetensors)), "licence": "Apache-2.0"}


def voice(pitch: float, random: np.random.Generator) -> np.ndarray[Any, np.dtype[np.int16]]:
    time = np.arange(int(0.6 * RATE)) / RATE
    sound = sum(np.sin(2 * np.pi * k * pitch * time) / k for k in range(1, 8))
    return np.asarray(3000 * sound + 30 * random.normal(size=len(time)), np.int16)


@pytest.fixture
def sounds(tmp_path: Path) -> pd.DataFrame:
    """Ten recordings at each of three sites, low and high voices in turn."""
    random = np.random.default_rng(0)
    rows = []
    for index in range(30):
        label = ("low", "high")[index % 2]
        pitch = random.uniform(*{"low": (90, 120), "high": (250, 330)}[label])
        wavfile.write(tmp_path / f"{index}.wav", RATE, voice(pitch, random))
        rows.append({"path": f"{index}.wav", "label": label, "site": ("Bern", "Graz", "Ulm")[index // 10]})
    return pd.DataFrame(rows)


@pytest.fixture
def write(write_plan: Callable[..., Path], sounds: pd.DataFrame) -> Callable[[], Path]:
    """Eight recordings a site are too few for noise; how sounds are read does not depend on it."""
    return lambda: write_plan(
        sounds,
        backbone=BACKBONE,
        task=TASK,
        training={"rounds": 10},
        simulation={"features": None, "audio": "path", "baselines": [], "selector": False, "noise": "none"},
    )


def test_sounds_are_told_apart_and_a_new_one_is_recognised(
    veil: Veil, write: Callable[[], Path], tmp_path: Path
) -> None:
    code, out, err = veil("simulate", write(), "--output", tmp_path / "out", "--json")
    assert code == 0, err
    report = json.loads(out)
    assert report["plan"]["task"]["kind"] == "audio-classification"
    assert report["metrics"]["federated"]["accuracy"] > 0.8
    for name, pitch in (("low", 105), ("high", 290)):
        wavfile.write(tmp_path / "new.wav", RATE, voice(pitch, np.random.default_rng(7)))
        code, out, err = veil("predict", tmp_path / "out" / "model", tmp_path / "new.wav", "--json")
        assert code == 0, err
        assert [row["label"] for row in json.loads(out)] == [name]


def test_a_damaged_sound_is_named(veil: Veil, write: Callable[[], Path], tmp_path: Path) -> None:
    plan = write()
    (tmp_path / "3.wav").write_bytes(b"RIFF")
    code, _, err = veil("simulate", plan, "--output", tmp_path / "out")
    assert code == 2
    assert "3.wav" in err and "WAV" in err
