# SPDX-License-Identifier: Apache-2.0
"""`veil backbones` on the command line: what it prints, what it refuses, and that it refuses before it reads."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save_file

from veil.common.plan_sections import Backbone, Task
from veil.common.weights import fingerprint
from veil.simulations import backbone_choice

Veil = Callable[..., tuple[int, str, str]]


class ModelOfWords:
    """Features of a text by its words: the sharper its weights, the more of the class they show."""

    width = 8

    def __init__(self, sharpness: float) -> None:
        self._sharpness = sharpness

    def encode(self, inputs: Sequence[str], *, advance: Callable[[int], None]) -> NDArray[np.float32]:
        random = np.random.default_rng(0)
        rows = random.normal(size=(len(inputs), self.width)).astype(np.float32)
        rows[:, 0] += [self._sharpness if "fever" in text else -self._sharpness for text in inputs]
        advance(len(inputs))
        return rows


def pin(folder: Path, sharpness: float, *, beside: str = "vocab.txt") -> str:
    """Weights in a folder, pinned as `veil backbone` prints them."""
    folder.mkdir()
    save_file({"sharpness": np.array([sharpness], np.float32)}, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    (folder / beside).write_text("{}")
    found = fingerprint(f"path:{folder.name}", base=folder.parent)
    return (
        f'[backbone]\nsource = "{found.source}"\nsha256 = "{found.sha256}"\nfiles_sha256 = "{found.files_sha256}"\n'
        f'licence = "MIT"\n'
    )


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stands in for transformers: the sources of the models that were loaded."""
    from safetensors.numpy import load_file

    loaded: list[str] = []

    def find(backbone: Backbone, task: Task, *, base: Path, device: str) -> ModelOfWords:
        loaded.append(backbone.source)
        weights = load_file(base / backbone.source.removeprefix("path:") / "model.safetensors")
        return ModelOfWords(float(weights["sharpness"][0]))

    monkeypatch.setattr(backbone_choice, "find_backbone", find)
    return loaded


@pytest.fixture
def scene(tmp_path: Path, write_plan: Callable[..., Path], records: pd.DataFrame) -> Callable[..., tuple[Path, Path]]:
    """A plan of short notes with a dull backbone, and the file of a sharp candidate."""

    def make(*, beside: str = "vocab.txt", **sections: Any) -> tuple[Path, Path]:
        records["body"] = np.where(records["label"] == "ill", "fever", "no complaint") + " " + records["patient"]
        dull = dict(line.replace('"', "").split(" = ") for line in pin(tmp_path / "dull", 0.1).splitlines()[1:])
        candidate = tmp_path / "sharp.toml"
        candidate.write_text(pin(tmp_path / "sharp", 4.0, beside=beside), encoding="utf-8")
        text = {"features": None, "text": "body", **sections.pop("simulation", {})}
        task = {"kind": "text-classification", "bounds": None}
        return write_plan(records, backbone=dull, task=task, simulation=text, **sections), candidate

    return make


Scene = Callable[..., tuple[Path, Path]]


def test_a_row_for_each_candidate_the_better_first(veil: Veil, scene: Scene, found: list[str]) -> None:
    plan, candidate = scene()
    code, out, err = veil("backbones", plan, "--candidate", candidate, "--public", "--records", "60")
    assert code == 0, err
    first, heads, sharp, dull, *rest = out.splitlines()
    assert first.startswith("small: 60 records declared public, 2 classes, drawn by seed 3")
    assert heads.split()[:2] == ["backbone", "LogME"]
    assert sharp.startswith("path:sharp") and "0.0 ± 0.0" in sharp and sharp.endswith("MIT")
    assert dull.startswith("path:dull")
    assert "say nothing about private records" in rest[-1]
    assert sorted(found) == ["path:dull", "path:sharp"]


def test_the_document_has_every_figure(veil: Veil, scene: Scene, found: list[str]) -> None:
    plan, candidate = scene()
    code, out, err = veil("backbones", plan, "--candidate", candidate, "--candidate", candidate, "--public", "--json")
    assert code == 0 and err == ""
    document = json.loads(out)
    assert document["declared_public"] is True and "private records" in document["caveat"]
    assert 0 < document["records"] < 120, "records that the simulation tests on stay out"
    sharp, dull = document["candidates"]
    assert (sharp["source"], dull["source"]) == ("path:sharp", "path:dull")
    assert sharp["logme"] > dull["logme"] and sharp["probe_accuracy"] > 0.95 > dull["probe_accuracy"]
    assert sharp["probe_behind_best"] == 0
    assert dull["probe_behind_best"] == pytest.approx(sharp["probe_accuracy"] - dull["probe_accuracy"])
    assert dull["probe_standard_error"] > 0 and dull["probe_behind_best_standard_error"] > 0
    assert 0 < dull["spread"] <= 1 and 0 < sharp["spread"] <= 1
    assert sharp["width"] == 8 and sharp["licence"] == "MIT" and sharp["seconds_per_record"] > 0
    folder = plan.parent / "sharp"
    assert sharp["bytes_on_disk"] == sum(file.stat().st_size for file in folder.iterdir())


def test_a_table_that_is_not_declared_public_is_refused_unread(veil: Veil, scene: Scene, found: list[str]) -> None:
    plan, candidate = scene()
    (plan.parent / "records.csv").unlink()
    code, out, err = veil("backbones", plan, "--candidate", candidate)
    assert code == 3 and out == "" and found == []
    assert "not declared public" in err and "release" in err and "--public" in err
    assert veil("backbones", plan, "--candidate", candidate, "--public")[0] == 2


def test_a_candidate_of_another_modality_is_refused_before_any_work(veil: Veil, scene: Scene, found: list[str]) -> None:
    plan, candidate = scene(beside="preprocessor_config.json")
    (plan.parent / "records.csv").unlink()
    code, out, err = veil("backbones", plan, "--candidate", candidate, "--public")
    assert code == 2 and out == "" and found == []
    assert "path:sharp has no tokenizer" in err and "text input" in err


def test_a_text_model_is_no_candidate_for_images(veil: Veil, scene: Scene, write_plan: Callable[..., Path]) -> None:
    plan, candidate = scene()
    dull = pin(plan.parent / "eyes", 1.0, beside="preprocessor_config.json")
    own = dict(line.replace('"', "").split(" = ") for line in dull.splitlines()[1:])
    images = {"features": None, "image": "path"}
    task = {"kind": "image-classification", "bounds": None}
    code, _, err = veil(
        "backbones", write_plan(backbone=own, task=task, simulation=images), "--candidate", candidate, "--public"
    )
    assert code == 2 and "path:sharp has no preprocessor_config.json" in err


def test_a_candidate_that_is_not_the_pinned_one(veil: Veil, scene: Scene, found: list[str]) -> None:
    plan, candidate = scene()
    save_file({"sharpness": np.array([9.0], np.float32)}, plan.parent / "sharp" / "model.safetensors")
    code, _, err = veil("backbones", plan, "--candidate", candidate, "--public")
    assert code == 2 and "the pinned SHA-256" in err and found == []


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[backbone]\nsource = 'path:sharp'\n", "missing key backbone.sha256"),
        ("name = 'no backbone'\n", "missing key backbone.source"),
        ("[backbone", "valid TOML"),
    ],
)
def test_a_file_that_pins_nothing(veil: Veil, scene: Scene, tmp_path: Path, text: str, words: str) -> None:
    plan, candidate = scene()
    candidate.write_text(text, encoding="utf-8")
    code, _, err = veil("backbones", plan, "--candidate", candidate, "--public")
    assert code == 2 and words in err and "sharp.toml" in err


def test_a_plan_without_a_table_or_a_backbone(veil: Veil, scene: Scene, write_plan: Callable[..., Path]) -> None:
    plan, candidate = scene()
    before, _, after = plan.read_text(encoding="utf-8").partition("[simulation]")
    plan.write_text(f"{before}[backbone]{after.partition('[backbone]')[2]}", encoding="utf-8")
    code, _, err = veil("backbones", plan, "--candidate", candidate, "--public")
    assert code == 2 and "has no [simulation]" in err
    code, _, err = veil("backbones", write_plan(), "--candidate", candidate, "--public")
    assert code == 2 and "numeric features and no [backbone]" in err


def test_records_of_one_class_cannot_be_judged(veil: Veil, scene: Scene, found: list[str]) -> None:
    plan, candidate = scene(simulation={"labels": {"ill": "well", "well": "well"}, "allow_single_class_sites": True})
    code, _, err = veil("backbones", plan, "--candidate", candidate, "--public")
    assert code == 2 and "of 1 class" in err


def test_without_a_candidate_there_is_nothing_to_compare(veil: Veil, scene: Scene) -> None:
    plan, _ = scene()
    assert veil("backbones", plan, "--public")[0] == 2


def test_the_lines_that_veil_backbone_prints_are_a_plan_s(veil: Veil, tmp_path: Path) -> None:
    """Pinned, and ready to be filled in: what nobody states stays empty."""
    pin(tmp_path / "model", 1.0)
    code, out, _ = veil("backbone", f"path:{tmp_path / 'model'}")
    told = tomllib.loads(out)["backbone"]
    assert code == 0 and Backbone.model_validate(told).sha256 == told["sha256"]
    assert (told["licence"], told["trained_on"], told["citation"]) == ("", "", "")
