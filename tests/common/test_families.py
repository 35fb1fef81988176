# SPDX-License-Identifier: Apache-2.0
"""Families of models that `load_backbone` takes: tiny random ones of transformers' own classes, saved by it.

What is shown for each: finite features, a record's own to the last bit, nothing in train mode; which model is real is
tested elsewhere (MiniLM, Lite0, GE2E).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from scipy.io import wavfile
from tests.families import (
    IMAGE,
    IMAGE_MODELS,
    SOUND_MODELS,
    TEXT_MODELS,
    WAVE_EXTRACTOR,
    extractor,
    kinds,
    saved,
    write_tokenizer,
)

from veil.common.backbone import FrozenBackbone, load_backbone
from veil.common.errors import WeightsError
from veil.common.plan_sections import Backbone, Task
from veil.common.torchvision_mend import mend_torchvision
from veil.common.weights import fingerprint

TEXTS = ["a rash after the second dose", "", "no event. " * 30, "pain"]


@pytest.fixture(scope="module", autouse=True)
def _mended() -> None:
    """Models are made here before Veil loads one."""
    mend_torchvision()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("pictures")
    coarse = np.random.default_rng(1).integers(0, 256, (3, 5, 4, 3), dtype=np.uint8)
    for index, one in enumerate(coarse):
        Image.fromarray(one).resize((80, 100)).save(folder / f"{index}.png")
    return sorted(folder.iterdir())


@pytest.fixture(scope="module")
def sounds(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("sounds")
    random = np.random.default_rng(2)
    for index, (seconds, rate) in enumerate([(0.5, 8000), (0.01, 16_000), (1.3, 16_000), (2.0, 44_100)]):
        wavfile.write(folder / f"{index}.wav", rate, random.uniform(-0.5, 0.5, round(seconds * rate)))
    return sorted(folder.iterdir())


def load(folder: Path, **task: Any) -> FrozenBackbone:
    sha256 = fingerprint(f"path:{folder}", base=Path()).sha256
    asked = Task(labels=("no", "yes"), **task)
    return load_backbone(Backbone(source=f"path:{folder}", sha256=sha256), asked, base=Path())


def check_own(backbone: FrozenBackbone, records: list[Any]) -> None:
    """Finite, not all alike, the same again, and the same in other company."""
    together = backbone.encode(records)
    assert together.shape == (len(records), backbone.width)
    assert np.isfinite(together).all()
    assert np.linalg.norm(together - together[0], axis=1)[1:].min() > 1e-5
    assert np.array_equal(together[::-1], backbone.encode(records[::-1]))
    assert np.array_equal(together[-1:], backbone.encode(records[-1:]))
    assert not any(one.training for one in backbone._model.modules())
    assert not any(one.requires_grad for one in backbone._model.parameters())


@pytest.mark.parametrize("family", TEXT_MODELS)
def test_text(family: str, tmp_path: Path) -> None:
    folder = saved(TEXT_MODELS[family](), tmp_path)
    write_tokenizer(folder)
    check_own(load(folder, kind="text-classification", max_length=32), TEXTS)


@pytest.mark.parametrize("family", IMAGE_MODELS)
def test_image(family: str, tmp_path: Path, pictures: list[Path]) -> None:
    folder = saved(IMAGE_MODELS[family](), tmp_path)
    (folder / "preprocessor_config.json").write_text(json.dumps(IMAGE))
    backbone = load(folder, kind="image-classification", image_size=64)
    check_own(backbone, pictures)


@pytest.mark.parametrize("family", ["ResNet", "EfficientNet", "MobileNetV2"])
def test_batch_statistics_stay_the_pretrained_ones(family: str, tmp_path: Path, pictures: list[Path]) -> None:
    folder = saved(IMAGE_MODELS[family](), tmp_path)
    (folder / "preprocessor_config.json").write_text(json.dumps(IMAGE))
    backbone = load(folder, kind="image-classification", image_size=64)
    norms = [one for one in backbone._model.modules() if isinstance(one, torch.nn.BatchNorm2d)]
    before = [{name: buffer.clone() for name, buffer in one.named_buffers()} for one in norms]
    assert len(before) > 2 and "running_mean" in before[0]
    backbone.encode(pictures)
    for one, was in zip(norms, before, strict=True):
        assert all(torch.equal(buffer, was[name]) for name, buffer in one.named_buffers())


@pytest.mark.skipif(find_spec("timm") is None, reason="timm is an extra that CI does not install")
@pytest.mark.parametrize(
    ("architecture", "arguments"), [("vgg11_bn", {"mlp_ratio": 0.01}), ("inception_v3", {})], ids=["VGG", "Inception"]
)
def test_image_by_timm(architecture: str, arguments: dict[str, Any], tmp_path: Path, pictures: list[Path]) -> None:
    """The folder as timm's own models lie on the hub: without a model_type, preprocessing in config.json."""
    config = kinds.TimmWrapperConfig(architecture=architecture, model_args=arguments, do_pooling=True)
    folder = saved(kinds.TimmWrapperModel(config), tmp_path)
    told = {"num_classes": 1000, "pretrained_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}}
    (folder / "config.json").write_text(
        json.dumps({"architecture": architecture, "num_features": 1, "model_args": arguments, **told})
    )
    tensors = load_file(folder / "model.safetensors")
    bare = {name.removeprefix("timm_model."): one for name, one in tensors.items()}
    save_file(bare, folder / "model.safetensors", metadata={"format": "pt"})
    check_own(load(folder, kind="image-classification", image_size=96), pictures)


@pytest.mark.skipif(find_spec("timm") is not None, reason="timm is there")
def test_a_model_of_timm_without_timm_is_refused_by_its_name(tmp_path: Path) -> None:
    folder = saved(IMAGE_MODELS["ResNet"](), tmp_path)
    told = {"architecture": "vgg11", "num_classes": 1000, "pretrained_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}}
    (folder / "config.json").write_text(json.dumps(told))
    with pytest.raises(WeightsError, match="timm"):
        load(folder, kind="image-classification", image_size=96)


@pytest.fixture
def speech(tmp_path: Path) -> Callable[..., Path]:
    def make(family: str, **changes: Any) -> Path:
        folder = saved(SOUND_MODELS[family](), tmp_path)
        (folder / "preprocessor_config.json").write_text(json.dumps({**extractor(family), **changes}))
        return folder

    return make


@pytest.mark.parametrize("family", SOUND_MODELS)
def test_sound(family: str, speech: Callable[..., Path], sounds: list[Path]) -> None:
    check_own(load(speech(family), kind="audio-classification", max_seconds=2.0), sounds)


def test_wav2vec2_features_are_the_mean_over_time(speech: Callable[..., Path], sounds: list[Path]) -> None:
    folder = speech("wav2vec2")
    model = kinds.Wav2Vec2Model.from_pretrained(folder).eval()
    heard = kinds.Wav2Vec2FeatureExtractor()(wavfile.read(sounds[2])[1], sampling_rate=16_000, return_tensors="pt")
    with torch.inference_mode():
        expected = model(heard.input_values.float()).last_hidden_state[0].mean(0)
    found = load(folder, kind="audio-classification", max_seconds=2.0).encode(sounds[2:3])[0]
    assert np.abs(found - expected.numpy()).max() < 1e-5


def test_whisper_features_are_the_mean_over_the_sound_s_own_time(
    speech: Callable[..., Path], sounds: list[Path]
) -> None:
    folder = speech("Whisper")
    encoder = kinds.WhisperModel.from_pretrained(folder).eval().get_encoder()
    hearing = kinds.WhisperFeatureExtractor(feature_size=8, chunk_length=2)
    heard = hearing(wavfile.read(sounds[2])[1], sampling_rate=16_000, return_tensors="pt")
    with torch.inference_mode():
        every = encoder(heard.input_features.float()).last_hidden_state[0]
    found = load(folder, kind="audio-classification", max_seconds=2.0).encode(sounds[2:3])[0]
    assert len(every) == 100
    assert np.abs(found - every[:65].mean(0).numpy()).max() < 1e-5


def test_names_of_older_checkpoints_are_understood(speech: Callable[..., Path], sounds: list[Path]) -> None:
    """Weight normalisation used to be saved as weight_g and weight_v."""
    folder = speech("HuBERT")
    expected = load(folder, kind="audio-classification", max_seconds=2.0).encode(sounds)
    old = {"parametrizations.weight.original0": "weight_g", "parametrizations.weight.original1": "weight_v"}
    tensors = load_file(folder / "model.safetensors")
    for new, former in old.items():
        (name,) = [one for one in tensors if one.endswith(new)]
        tensors[name.replace(new, former)] = tensors.pop(name)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert np.array_equal(load(folder, kind="audio-classification", max_seconds=2.0).encode(sounds), expected)


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("wav2vec2", {"feature_extractor_type": "ClapFeatureExtractor"}, "ClapFeatureExtractor"),
        ("wav2vec2", {"feature_extractor_type": None}, "feature_extractor_type"),
        ("Whisper", {"dither": 0.1}, "dither"),
        ("Whisper", {"chunk_length": 1}, "hears 1 s"),
        ("Whisper", {"feature_size": 9}, "max_seconds"),
    ],
)
def test_what_cannot_be_heard_the_same_way_again_is_refused(
    speech: Callable[..., Path], family: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(WeightsError, match=message):
        load(speech(family, **changes), kind="audio-classification", max_seconds=2.0)


def test_a_processor_that_is_not_pinned_is_not_followed(speech: Callable[..., Path], sounds: list[Path]) -> None:
    folder = speech("wav2vec2")
    expected = load(folder, kind="audio-classification", max_seconds=2.0).encode(sounds)
    other = {"feature_extractor": {**WAVE_EXTRACTOR, "do_normalize": False}}
    (folder / "processor_config.json").write_text(json.dumps(other))
    assert np.array_equal(load(folder, kind="audio-classification", max_seconds=2.0).encode(sounds), expected)


def test_a_speech_model_for_images_and_the_reverse(speech: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(WeightsError):
        load(speech("wav2vec2"), kind="image-classification", image_size=64)
    (tmp_path / "vit").mkdir()
    folder = saved(IMAGE_MODELS["ViT"](), tmp_path / "vit")
    (folder / "preprocessor_config.json").write_text(json.dumps(WAVE_EXTRACTOR))
    with pytest.raises(WeightsError):
        load(folder, kind="audio-classification", max_seconds=2.0)
