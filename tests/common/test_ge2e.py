# SPDX-License-Identifier: Apache-2.0
"""The converted GE2E is the original network, and what it hears is what it was trained to hear.

The references are built here in another way: one LSTM of three layers with the package's tensors, transformers'
spectrogram. The sounds are synthesised.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy.io import wavfile
from torch import Tensor, nn
from transformers.audio_utils import mel_filter_bank, spectrogram, window_function

from veil.common import ge2e
from veil.common.backbone import FrozenBackbone, load_backbone
from veil.common.conversion import converted
from veil.common.errors import TableError, WeightsError
from veil.common.pickled import GE2E
from veil.common.plan_sections import Backbone, Task
from veil.common.weights import fingerprint, sha256_of

TASK = Task(kind="audio-classification", labels=("no", "yes"), max_seconds=4.0)


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VEIL_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def source() -> dict[str, Tensor]:
    file = fingerprint(GE2E.source, base=Path()).weights_file
    loaded = torch.load(file, map_location="cpu", weights_only=True)["model_state"]
    assert isinstance(loaded, dict)
    return loaded


@pytest.fixture(scope="module")
def backbone() -> FrozenBackbone:
    return load_backbone(Backbone(source=GE2E.source, sha256=next(iter(GE2E.safetensors))), TASK, base=Path())


def voice(seconds: float, pitch: float, seed: int = 0) -> npt.NDArray[np.float32]:
    """Harmonics of a gliding pitch, loud and soft in turn, and a little noise."""
    time = np.arange(round(seconds * ge2e.RATE)) / ge2e.RATE
    phase = 2 * np.pi * np.cumsum(pitch * (1 + 0.1 * np.sin(6 * time))) / ge2e.RATE
    sound = sum(np.sin(k * phase) / k for k in range(1, 12)) * (1.1 + np.sin(20 * time))
    noise = np.random.default_rng(seed).normal(size=len(time))
    return (0.05 * sound + 0.001 * noise).astype(np.float32)


@pytest.fixture(scope="module")
def sounds(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("sounds")
    for index, (seconds, pitch) in enumerate([(0.4, 110), (1.0, 220), (1.7, 150), (3.3, 180)]):
        wavfile.write(folder / f"{index}.wav", ge2e.RATE, voice(seconds, pitch))
    return sorted(folder.iterdir())


def test_every_tensor_of_the_layers_is_there_bit_by_bit(source: dict[str, Tensor]) -> None:
    written = load_file(converted(fingerprint(GE2E.source, base=Path())).weights_file)
    assert len(written) == 12
    for layer in range(3):
        for part in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
            assert torch.equal(written[f"layers.{layer}.lstm.{part}_l0"], source[f"lstm.{part}_l{layer}"])


def test_a_cache_that_another_veil_wrote_is_written_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own manifest agrees, and yet it is not what this code makes of the source."""
    monkeypatch.setenv("VEIL_CACHE", str(tmp_path))
    pinned = fingerprint(GE2E.source, base=Path())
    good = converted(pinned)
    assert good.sha256 == GE2E.safetensors[pinned.sha256]
    save_file({"other": torch.zeros(1)}, good.weights_file)
    manifest = json.loads((good.folder / "manifest.json").read_text())
    manifest["files"]["model.safetensors"] = sha256_of(good.weights_file)
    (good.folder / "manifest.json").write_text(json.dumps(manifest))
    assert converted(pinned) == good
    assert sha256_of(good.weights_file) == good.sha256


def test_features_are_the_mean_of_the_original_s_top_layer(
    backbone: FrozenBackbone, source: dict[str, Tensor], sounds: list[Path]
) -> None:
    reference = nn.LSTM(40, 256, 3, batch_first=True)
    reference.load_state_dict({name[5:]: one for name, one in source.items() if name.startswith("lstm.")})
    heard = ge2e.model_input(wavfile.read(sounds[3])[1])
    with torch.inference_mode():
        top = reference(heard["input_features"][0])[0].reshape(-1, 256)
    expected = top[heard["attention_mask"][0].bool()].mean(0)
    assert (backbone.width, backbone.modality) == (256, "audio")
    assert expected.std() > 0.05
    assert np.abs(backbone.encode(sounds[3:])[0] - expected.numpy()).max() < 1e-5


def test_a_sound_s_features_are_its_own_to_the_last_bit(backbone: FrozenBackbone, sounds: list[Path]) -> None:
    together = backbone.encode(sounds)
    assert np.isfinite(together).all()
    assert np.array_equal(together[::-1], backbone.encode(sounds[::-1]))
    assert np.array_equal(together[1:2], backbone.encode(sounds[1:2]))


def test_like_sounds_have_like_features(backbone: FrozenBackbone, tmp_path: Path) -> None:
    for name, pitch, seed in (("low", 100, 0), ("low again", 100, 1), ("high", 300, 0)):
        wavfile.write(tmp_path / f"{name}.wav", ge2e.RATE, voice(1.0, pitch, seed))
    low, again, high = backbone.encode([tmp_path / f"{name}.wav" for name in ("low", "low again", "high")])
    assert np.linalg.norm(low - again) < 0.2 * np.linalg.norm(low - high)


def test_the_spectrogram_is_that_of_the_reference() -> None:
    samples = voice(1.0, 150)
    expected = spectrogram(
        samples,
        window_function(400, "hann"),
        frame_length=400,
        hop_length=160,
        power=2.0,
        pad_mode="constant",
        mel_filters=mel_filter_bank(201, 40, 0.0, 8000.0, 16_000, norm="slaney", mel_scale="slaney"),
    ).T
    heard = ge2e.model_input(samples)
    found = heard["input_features"][0, 0, : len(expected)].numpy()
    assert heard["attention_mask"].sum() == len(expected) == 101
    assert np.abs(found - expected).max() < 1e-5 * expected.max()


@pytest.mark.parametrize(
    ("seconds", "windows", "frames"), [(0.1, 1, 11), (1.59, 1, 160), (1.6, 2, 161), (2.39, 2, 240), (2.4, 3, 241)]
)
def test_windows_cover_the_sound_and_the_mask_leaves_out_the_silence(seconds: float, windows: int, frames: int) -> None:
    heard = ge2e.model_input(voice(seconds, 150))
    assert heard["input_features"].shape == (1, windows, 160, 40)
    at = torch.cat([window * 80 + torch.arange(160) for window in range(windows)])
    assert torch.equal(heard["attention_mask"][0].bool(), at < frames)
    assert not heard["input_features"].reshape(-1, 40)[at >= frames].any()


def test_a_quiet_sound_is_made_louder_and_a_loud_one_left() -> None:
    sound = voice(1.0, 150)
    loud, quiet = (ge2e.model_input(sound * factor)["input_features"] for factor in (4.0, 0.01))
    assert torch.allclose(loud, 16 * ge2e.model_input(sound)["input_features"], rtol=1e-4)
    level = float(np.sqrt(np.mean(sound**2)))
    assert torch.allclose(loud, quiet * (4 * level / 10**-1.5) ** 2, rtol=1e-3)
    assert not ge2e.model_input(np.zeros(1600, np.float32))["input_features"].any()


@pytest.mark.parametrize("change", ["no model_state", "one tensor fewer", "one tensor more"])
def test_another_checkpoint_is_refused(source: dict[str, Tensor], tmp_path: Path, change: str) -> None:
    state = {**source, "extra": torch.zeros(1)}
    if change == "one tensor fewer":
        state = {name: one for name, one in source.items() if name != "lstm.bias_hh_l2"}
    torch.save(source if change == "no model_state" else {"model_state": state}, tmp_path / "pretrained.pt")
    with pytest.raises(WeightsError, match=r"no model_state|bias_hh_l2|extra"):
        converted(fingerprint(f"path:{tmp_path}", base=Path()))


def test_a_damaged_sound_is_said_by_its_place(backbone: FrozenBackbone, sounds: list[Path], tmp_path: Path) -> None:
    (tmp_path / "bad.wav").write_bytes(sounds[0].read_bytes()[:100])
    places: dict[int, TableError] = {}
    found = backbone.encode([sounds[0], tmp_path / "bad.wav"], unreadable=places.__setitem__)
    assert list(places) == [1]
    assert found[0].any()
    assert not found[1].any()
    with pytest.raises(TableError, match=r"bad\.wav"):
        backbone.encode([tmp_path / "bad.wav"])
