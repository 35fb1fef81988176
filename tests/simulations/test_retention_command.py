# SPDX-License-Identifier: Apache-2.0
"""Tests of `veil retention`: nothing is forgotten where nothing changed, something where something did, and what cannot
be compared is refused by name. Tiny random models, saved as a finished run saves them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from tests.tiny_models import WORDS, deep_plan

from veil.common.head import CENTRE, WEIGHT
from veil.common.lazy_backbone import find_backbone
from veil.common.plan import RunPlan
from veil.common.plan_sections import Backbone
from veil.common.retention import retention
from veil.common.trained import is_tuned
from veil.common.tunable import load_tunable
from veil.common.update import Adapter
from veil.server.model import TunedModel

Veil = Callable[..., tuple[int, str, str]]
Save = Callable[..., Path]
RECORDS = 24
GENERATION: dict[str, Any] = {
    "task": {"kind": "text-generation", "labels": [], "answer_length": 4},
    "training": {"learning_rate": 1.0},
}


@pytest.fixture
def save(tiny: Callable[[str], Backbone], tmp_path: Path) -> Save:
    """A tuned model's folder: its tuned tensors moved by so much from where training starts."""

    def saved(family: str, mode: str, moved: float, **sections: Any) -> Path:
        plan = deep_plan(tiny(family), family, {"mode": mode}, **sections)
        assert plan.backbone is not None
        backbone = find_backbone(plan.backbone, plan.task, base=Path(), device="cpu")
        start, random = load_tunable(backbone, plan).initial(), np.random.default_rng(1)
        tensors = {
            name: one + ((moved if is_tuned(name) else 0.0) * random.normal(size=one.shape)).astype(np.float32)
            for name, one in start.tensors.items()
        }
        folder = tmp_path / f"{family}-{mode}-{moved}"
        TunedModel(plan=plan, adapter=Adapter(tensors=tensors), backbone=backbone).save(folder)
        return folder

    return saved


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """Public sentences, no two of them the same."""
    random = np.random.default_rng(2)
    rows = [" ".join(random.choice(WORDS, size=6 + place % 5)) for place in range(RECORDS)]
    pd.DataFrame({"body": rows, "source": "made up"}).to_csv(tmp_path / "public.csv", index=False)
    return tmp_path / "public.csv"


def told(veil: Veil, *words: str | Path) -> dict[str, Any]:
    code, out, err = veil("retention", *words, "--json")
    assert code == 0, err
    found: dict[str, Any] = json.loads(out)
    return found


def refused(veil: Veil, *words: str | Path) -> str:
    code, out, err = veil("retention", *words)
    assert (code, out) == (2, "")
    assert "Remedy" in err
    return err


def test_tensors_that_did_not_move_forgot_nothing(veil: Veil, save: Save, texts: Path) -> None:
    found = told(veil, save("bert", "lora", 0.0), texts, "--text", "body")
    assert (found["unchanged"], found["records"], found["of"], found["perplexity"]) == (False, RECORDS, RECORDS, None)
    left = [found["features"][name] for name in ("cka", "cosine", "neighbours")]
    assert left == pytest.approx([1.0, 1.0, 1.0], abs=1e-6)


def test_the_further_they_moved_the_more_is_forgotten(veil: Veil, save: Save, texts: Path) -> None:
    near, far = (told(veil, save("bert", "full", moved), texts, "--text", "body") for moved in (0.05, 2.0))
    for name in ("cka", "cosine", "neighbours"):
        assert 1 > near["features"][name] > far["features"][name], name
        assert near["features"][name] > near["features"]["by_chance"][name], name
    assert near["features"]["by_chance"]["neighbours"] == 10 / (RECORDS - 1)


def test_both_sides_are_what_the_models_give_of_the_records_drawn(veil: Veil, save: Save, texts: Path) -> None:
    """Against features computed here from two loads, of the same draw; few records have fewer neighbours."""
    folder = save("bert", "prompt", 0.5)
    found = told(veil, folder, texts, "--text", "body", "--limit", "8")
    model = TunedModel.load(folder)
    assert model.backbone is not None
    drawn = np.random.default_rng(5).permutation(RECORDS)[:8]
    records = [str(pd.read_csv(texts)["body"][place]) for place in drawn]
    tuned = load_tunable(model.backbone, model.plan)
    with tuned.at(model.adapter):
        expected = retention(model.backbone.encode(records), tuned.features(records))
    assert (found["records"], found["of"], found["features"]["nearest"]) == (8, RECORDS, 7)
    for name in ("cka", "cosine", "neighbours"):
        assert found["features"][name] == pytest.approx(getattr(expected, name), abs=1e-6)
    assert expected.cka < 0.999


def test_images_are_read_beside_the_table(veil: Veil, save: Save, tmp_path: Path) -> None:
    random = np.random.default_rng(3)
    for place in range(4):
        Image.fromarray(random.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(tmp_path / f"{place}.png")
    pd.DataFrame({"file": [f"{place}.png" for place in range(4)]}).to_csv(tmp_path / "images.csv", index=False)
    model = save("vit", "last-layers", 0.3)
    code, out, err = veil("retention", model, tmp_path / "images.csv", "--image", "file")
    assert code == 0, err
    assert 'transfer.mode = "last-layers"; 4 of 4 records' in out
    assert "3 nearest" in out and "3/(4 - 1)" in out and "taken to be public" in out
    (tmp_path / "2.png").unlink()
    assert "2.png" in refused(veil, model, tmp_path / "images.csv", "--image", "file")


def test_a_language_model_is_asked_how_it_reads(veil: Veil, save: Save, texts: Path) -> None:
    same = told(veil, save("gpt2", "lora", 0.0, **GENERATION), texts, "--text", "body")
    assert same["features"] is None
    assert same["perplexity"]["ratio"] == pytest.approx(1.0, abs=1e-6)
    words = sum(len(text.split()) - 1 for text in pd.read_csv(texts)["body"])
    assert same["perplexity"]["tokens"] == words
    changed = save("gpt2", "lora", 0.5, **GENERATION)
    other = told(veil, changed, texts, "--text", "body")["perplexity"]
    assert other["before"] == pytest.approx(same["perplexity"]["before"])
    assert other["standard_error"] > 0 and abs(math.log(other["ratio"])) > 1e-3
    code, out, _ = veil("retention", changed, texts, "--text", "body")
    assert code == 0 and f"of {words} tokens" in out and f"ratio       {other['ratio']:.4f}" in out


@pytest.fixture
def head_alone(tiny: Callable[[str], Backbone], tmp_path: Path) -> Path:
    plan = deep_plan(tiny("bert"), "bert", {"mode": "head"})
    assert plan.backbone is not None
    backbone = find_backbone(plan.backbone, plan.task, base=Path(), device="cpu")
    head = Adapter(tensors={WEIGHT: np.ones((3, 9), np.float32), CENTRE: np.zeros(8, np.float32)})
    TunedModel(plan=plan, adapter=head, backbone=backbone).save(tmp_path / "head")
    return tmp_path / "head"


def test_a_head_alone_leaves_the_pretrained_model_as_it_is(veil: Veil, head_alone: Path) -> None:
    """No record is read: the table need not even be there."""
    found = told(veil, head_alone, "nowhere.csv", "--text", "body")
    assert (found["unchanged"], found["records"], found["features"], found["perplexity"]) == (True, 0, None, None)
    code, out, _ = veil("retention", head_alone, "nowhere.csv", "--text", "body")
    assert code == 0 and "is unchanged" in out and "retention 1 by construction" in out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--image", "body"), "--image. Expected: --text and no other"),
        (("--text", "body", "--audio", "body"), "--text and --audio. Expected: --text and no other"),
        ((), "no column. Expected: --text"),
    ],
)
def test_what_the_model_does_not_read_is_refused(
    veil: Veil, head_alone: Path, texts: Path, options: tuple[str, ...], words: str
) -> None:
    assert words in refused(veil, head_alone, texts, *options)


def test_tables_that_cannot_be_read_are_refused(veil: Veil, save: Save, texts: Path, tmp_path: Path) -> None:
    model = save("bert", "lora", 0.0)
    assert 'no column "bodies"' in refused(veil, model, texts, "--text", "bodies")
    (tmp_path / "two.csv").write_text("body,source\nwell,a\nill,a\n")
    assert "2 records. Expected: at least 3" in refused(veil, model, tmp_path / "two.csv", "--text", "body")
    (tmp_path / "holes.csv").write_text("body,source\nwell,a\n,a\nill,a\npain,a\n")
    assert 'column "body" is empty in row 2' in refused(veil, model, tmp_path / "holes.csv", "--text", "body")
    assert "no such file" in refused(veil, model, tmp_path / "gone.csv", "--text", "body")


def test_numeric_columns_have_no_pretrained_model(veil: Veil, texts: Path, tmp_path: Path) -> None:
    told: dict[str, Any] = {"kind": "tabular-classification", "labels": ["no", "yes"]}
    plan = RunPlan.model_validate({"name": "numbers", "task": told, "privacy": {"target_epsilon": 3.0}})
    head = Adapter(tensors={WEIGHT: np.ones((2, 3), np.float32), CENTRE: np.zeros(2, np.float32)})
    TunedModel(plan=plan, adapter=head, backbone=None).save(tmp_path / "numbers")
    assert 'task.kind = "tabular-classification"' in refused(veil, tmp_path / "numbers", texts, "--text", "body")


def test_a_model_that_fell_apart_is_named(veil: Veil, save: Save, texts: Path) -> None:
    code, _, err = veil("retention", save("bert", "last-layers", math.inf), texts, "--text", "body")
    assert code == 4 and "the tuned model gives features" in err
