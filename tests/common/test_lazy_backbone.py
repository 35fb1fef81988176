# SPDX-License-Identifier: Apache-2.0
"""Tests of `veil.common.lazy_backbone`: what is known before a model is loaded, and that no unpinned byte ever is."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from veil.common import lazy_backbone
from veil.common.errors import InputError, WeightsError
from veil.common.lazy_backbone import LazyBackbone, chosen_device, find_backbone
from veil.common.plan_sections import Backbone, Task
from veil.common.weights import fingerprint

TEXT = Task(kind="text-classification", labels=("no", "yes"), max_length=32)
IMAGE = Task(kind="image-classification", labels=("no", "yes"), image_size=64)
SOUND = Task(kind="audio-classification", labels=("no", "yes"), max_seconds=2.0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Weights and a configuration that no library could make a model of."""
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"x": np.zeros(3, np.float32)}, folder / "model.safetensors")
    (folder / "config.json").write_text('{"model_type": "none"}')
    return folder


@pytest.fixture
def pinned(folder: Path) -> Backbone:
    return Backbone(source="path:model", sha256=fingerprint("path:model", base=folder.parent).sha256)


@pytest.fixture
def find(folder: Path, pinned: Backbone) -> Callable[[Task], LazyBackbone]:
    return lambda task: find_backbone(pinned, task, base=folder.parent, device="cpu")


Find = Callable[[Task], LazyBackbone]


def test_what_features_depend_on_is_known_without_loading(find: Find, pinned: Backbone, folder: Path) -> None:
    found = find(TEXT)
    assert found.sha256 == pinned.sha256
    told = json.loads(found.preprocessing)
    assert (told["max_length"], told["image_size"], told["device"]) == (32, None, "cpu")
    assert told["libraries"]["torch"] == torch.__version__
    assert told["files"] == fingerprint("path:model", base=folder.parent).files_sha256
    with pytest.raises(WeightsError, match="a complete model"):
        found.encode(["a text"])


def test_each_of_it_shows(find: Find, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = [find(TEXT).preprocessing, find(IMAGE).preprocessing]
    keys.append(find(TEXT.model_copy(update={"max_length": 33})).preprocessing)
    keys.append(find(IMAGE.model_copy(update={"image_size": 65})).preprocessing)
    keys.append(find(SOUND).preprocessing)
    keys.append(find(SOUND.model_copy(update={"max_seconds": 3.0})).preprocessing)
    (folder / "config.json").write_text('{"model_type": "other"}')
    keys.append(find(TEXT).preprocessing)
    (folder / "vocab.txt").write_text("a")
    keys.append(find(TEXT).preprocessing)
    monkeypatch.setattr(lazy_backbone, "version", lambda name: "9.9")
    keys.append(find(TEXT).preprocessing)
    monkeypatch.setattr(lazy_backbone, "_source_digest", lambda name: "another Veil")
    keys.append(find(TEXT).preprocessing)
    monkeypatch.setattr(lazy_backbone, "chosen_device", lambda device: "cuda")
    keys.append(find(TEXT).preprocessing)
    assert len(set(keys)) == len(keys)


def test_what_does_not_change_features_does_not_show(find: Find) -> None:
    relabelled = TEXT.model_copy(update={"labels": ("a", "b", "c"), "image_size": 65})
    assert find(relabelled).preprocessing == find(TEXT).preprocessing


def test_it_is_saved_without_being_loaded(find: Find, folder: Path, tmp_path: Path) -> None:
    find(TEXT).save(tmp_path / "saved")
    saved = {path.name: path.read_bytes() for path in (tmp_path / "saved").iterdir()}
    assert saved == {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
@pytest.mark.parametrize("change", ["other bytes", "gone"])
def test_files_that_change_after_they_were_found_are_refused(
    name: str, change: str, find: Find, folder: Path, tmp_path: Path
) -> None:
    """Features in a cache hide nothing: neither saving nor loading takes other files."""
    found = find(TEXT)
    (folder / name).unlink()
    if change == "other bytes":
        (folder / name).write_text("{}")
    for use in (lambda: found.save(tmp_path / "saved"), lambda: found.encode(["a text"]), lambda: found.width):
        with pytest.raises(WeightsError, match=r"SHA-256|no weights"):
            use()
    assert not (tmp_path / "saved").exists()


@pytest.mark.parametrize("change", [{"sha256": "a" * 64}, {"files_sha256": "a" * 64}, {"source": "path:absent"}])
def test_files_that_are_not_the_pinned_ones_are_not_found(
    change: dict[str, Any], pinned: Backbone, folder: Path
) -> None:
    with pytest.raises(WeightsError):
        find_backbone(pinned.model_copy(update=change), TEXT, base=folder.parent, device="cpu")


def test_threads_load_it_once(find: Find, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[object] = []

    def load(backbone: Backbone, task: Task, **named: object) -> SimpleNamespace:
        loaded.append(named["device"])
        return SimpleNamespace(width=7)

    monkeypatch.setattr("veil.common.backbone.load_backbone", load)
    found = find(TEXT)
    with ThreadPoolExecutor(4) as pool:
        assert [*pool.map(lambda _: found.width, range(8))] == [7] * 8
    assert loaded == ["cpu"]


@pytest.mark.parametrize(("there", "chosen"), [(True, "cuda"), (False, "cpu")])
def test_the_device_is_a_gpu_where_there_is_one(there: bool, chosen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lazy_backbone, "version", lambda name: "2.13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    assert chosen_device("auto") == chosen
    assert chosen_device("cpu") == "cpu"


def test_neither_finding_nor_saving_imports_torch(folder: Path, pinned: Backbone, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from veil.common.lazy_backbone import find_backbone\n"
        "from veil.common.plan import Backbone, Task\n"
        "task = Task(kind='text-classification', labels=('no', 'yes'))\n"
        f"pinned = Backbone(source={pinned.source!r}, sha256={pinned.sha256!r})\n"
        f"find_backbone(pinned, task, base=Path({str(folder.parent)!r}), device='cpu').save(Path({str(tmp_path)!r}))\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_gpu_that_is_not_there_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """A build for processors alone need not be asked."""
    monkeypatch.setattr(lazy_backbone, "version", lambda name: "2.13.0+cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(InputError, match='device = "cuda"'):
        chosen_device("cuda")
