# SPDX-License-Identifier: Apache-2.0
"""What tasks with a structure ask of one record: how it is read, its loss, its gradient, its answer.

The models are tiny random ones of transformers' own classes; the tokenizer knows single bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as kinds
from opacus.grad_sample import GradSampleModule
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from torch.nn import functional

from veil.common.boxes import found_shares, overlaps
from veil.common.errors import WeightsError
from veil.common.lazy_backbone import find_backbone
from veil.common.plan import RunPlan
from veil.common.plan_sections import Backbone
from veil.common.trained import parameter_of, trained_in
from veil.common.truths import Box
from veil.common.tunable import TunableModel, load_tunable
from veil.common.update import Adapter
from veil.common.weights import fingerprint

SIZE: dict[str, Any] = {
    "vocab_size": 258,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}
TASKS: dict[str, dict[str, Any]] = {
    "text-tokens": {"labels": ["O", "DRUG"]},
    "text-answers": {},
    "text-generation": {"answer_length": 12},
    "text-multilabel": {"labels": ["a", "b", "c"]},
    "text-regression": {"labels": ["age"], "target": [0, 100]},
}
RECORDS: dict[str, list[tuple[str, Any]]] = {
    "text-tokens": [("took aspirin today", "0 1 0"), ("no drug", "0 0"), ("ibuprofen", "1")],
    "text-answers": [("what?\nhe took aspirin", "aspirin"), ("who?\nshe did", "she"), ("x\nand no more", "no more")],
    "text-generation": [("q:", "yes"), ("ask me:", "no, never"), ("", "maybe")],
    "text-multilabel": [("ab", np.array([1.0, 1, 0])), ("c", np.array([0.0, 0, 1])), ("none", np.zeros(3))],
    "text-regression": [("old", 0.9), ("young", 0.1), ("so", 0.5)],
}


def write_tokenizer(folder: Path) -> None:
    """One token a byte, and one that ends a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: place for place, letter in enumerate([*alphabet, "<end>"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<end>"}'
    )


def saved(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def made(kind: str, folder: Path) -> Path:
    """BERT where features are read, Llama with its own head where a text goes on."""
    torch.manual_seed(5)
    if kind == "text-generation":
        return saved(kinds.LlamaForCausalLM(kinds.LlamaConfig(**SIZE, tie_word_embeddings=True)), folder)
    return saved(kinds.BertModel(kinds.BertConfig(**SIZE), add_pooling_layer=False), folder)


def plan_of(kind: str, folder: Path, mode: str = "last-layers", **changes: Any) -> RunPlan:
    sha256 = fingerprint(f"path:{folder}", base=Path()).sha256
    return RunPlan.model_validate(
        {
            "name": "structured",
            "backbone": {"source": f"path:{folder}", "sha256": sha256},
            "task": {"kind": kind, "max_length": 40, **TASKS[kind]},
            "transfer": {"mode": mode},
            "training": {"rounds": 2, "learning_rate": 1.0, "centre": False},
            "privacy": {"target_epsilon": 8.0},
            "cohort": {"nominal_units": 10},
            **changes,
        }
    )


def loaded(plan: RunPlan) -> TunableModel:
    assert plan.backbone is not None
    return load_tunable(find_backbone(Backbone(**plan.backbone.model_dump()), plan.task, base=Path()), plan)


def stirred(model: TunableModel) -> Adapter:
    """An adapter at which every tensor has a gradient."""
    noise = np.random.default_rng(1)
    tensors = {name: one + 0.3 * noise.normal(size=one.shape) for name, one in model.initial().tensors.items()}
    return Adapter(tensors={name: one.astype(np.float32) for name, one in tensors.items()})


def gradients(model: TunableModel, adapter: Adapter, told: Sequence[tuple[str, Any]]) -> list[tuple[Tensor, ...]]:
    trained = tuple(name for name in adapter.tensors if name.startswith("tuned."))
    units = [[model.record(*one)] for one in told]
    with model.at(adapter, trained):
        return [one for one in model.gradients(iter(units), trained) if one is not None]


@pytest.mark.parametrize(
    ("kind", "mode"),
    [*((kind, "last-layers") for kind in TASKS), *(("text-generation", mode) for mode in ("lora", "prompt", "full"))],
)
def test_every_form_is_examined_and_its_gradients_hold(kind: str, mode: str, tmp_path: Path) -> None:
    model = loaded(plan_of(kind, made(kind, tmp_path), mode))
    model.examine()
    adapter = stirred(model)
    found = gradients(model, adapter, RECORDS[kind])
    again = gradients(model, adapter, RECORDS[kind][::-1])[::-1]
    assert len(found) == 3
    for one, other in zip(found, again, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
        assert sum(float(part.abs().sum()) for part in one) > 0


class _Batched(nn.Module):
    """The tiny model under Opacus: blocks of the batch, then what the task does with each record's own places."""

    def __init__(self, model: nn.Module, head: Tensor) -> None:
        super().__init__()
        self.model, self.head = model, nn.Linear(head.shape[1], head.shape[0], bias=False)
        with torch.no_grad():
            self.head.weight.copy_(head)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        hidden = self.model(input_ids=ids, attention_mask=mask).last_hidden_state
        rows = hidden / hidden.norm(dim=-1, keepdim=True)
        rows = torch.cat([rows, torch.full((*rows.shape[:-1], 1), 0.25)], dim=-1) / (1 + 0.25**2) ** 0.5
        scores: Tensor = self.head(rows)
        return scores


@pytest.mark.filterwarnings("ignore:Full backward hook:UserWarning")
@pytest.mark.parametrize("kind", ["text-tokens", "text-answers"])
def test_the_gradient_of_a_record_is_what_opacus_hooks_give_in_a_batch(kind: str, tmp_path: Path) -> None:
    folder = made(kind, tmp_path)
    model = loaded(plan_of(kind, folder))
    adapter = stirred(model)
    adapter = Adapter(tensors={**adapter.tensors, "centre": np.zeros(16, np.float32)})
    records = [model.record(*one) for one in RECORDS[kind]]
    found = gradients(model, adapter, RECORDS[kind])
    still: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    bare = kinds.BertModel.from_pretrained(folder, add_pooling_layer=False, attn_implementation="eager", **still)
    names = [name for name in adapter.tensors if name.startswith("tuned.")]
    values = {parameter_of(name): torch.tensor(adapter.tensors[name]) for name in names}
    for name, one in bare.named_parameters():
        one.requires_grad_(name in values)
        if name in values:
            one.data.copy_(values[name])
    batched = _Batched(bare, torch.tensor(adapter.tensors["head.weight"]))
    hooked = GradSampleModule(batched.train(), loss_reduction="sum")
    longest = max((one.inputs or {})["input_ids"].shape[1] for one in records)
    ids = torch.stack([_padded((one.inputs or {})["input_ids"][0], longest, 0) for one in records])
    mask = torch.stack([_padded((one.inputs or {})["attention_mask"][0], longest, 0) for one in records])
    scores = hooked(ids, mask)
    losses = [_reference(kind, scores[i][: int(mask[i].sum())], one.target) for i, one in enumerate(records)]
    torch.stack(losses).sum().backward()
    trained = ((name.removeprefix("_module."), one) for name, one in hooked.named_parameters() if one.requires_grad)
    sampled: dict[str, Any] = {name: one.grad_sample for name, one in trained}
    for index, mine in enumerate(found):
        theirs = [sampled["head.weight"][index], *(sampled[f"model.{parameter_of(name)}"][index] for name in names)]
        for a, b in zip(mine, theirs, strict=True):
            assert (a - b).norm() <= 1e-5 * max(1e-2, float(b.norm()))


def _padded(row: Tensor, length: int, value: int) -> Tensor:
    return functional.pad(row, (0, length - len(row)), value=value)


def _reference(kind: str, scores: Tensor, target: Tensor) -> Tensor:
    if kind == "text-tokens":
        return functional.cross_entropy(scores[target >= 0], target[target >= 0])
    return (functional.cross_entropy(scores[:, 0], target[0]) + functional.cross_entropy(scores[:, 1], target[1])) / 2


def test_a_continuation_s_loss_is_transformers_own(tmp_path: Path) -> None:
    folder = made("text-generation", tmp_path)
    model = loaded(plan_of("text-generation", folder))
    reference = kinds.LlamaForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    tokenizer = kinds.AutoTokenizer.from_pretrained(folder)
    prompt, more = tokenizer("ask me:")["input_ids"], [*tokenizer(" no, never")["input_ids"], tokenizer.eos_token_id]
    ids = torch.tensor([[*prompt, *more]])
    with torch.no_grad():
        expected = float(reference(ids, labels=torch.tensor([[-100] * len(prompt) + more])).loss)
    with model.at(model.initial()):
        outcome = model.outcomes(["ask me:"], ["no, never"])[0]
    assert len(more) == 11
    assert outcome[2] == pytest.approx(expected, rel=1e-5)


def test_a_text_goes_on_as_transformers_would_write_it(tmp_path: Path) -> None:
    folder = made("text-generation", tmp_path)
    model = loaded(plan_of("text-generation", folder))
    reference = kinds.LlamaForCausalLM.from_pretrained(folder).eval()
    tokenizer = kinds.AutoTokenizer.from_pretrained(folder)
    asked = tokenizer("ask me:", return_tensors="pt")
    written = reference.generate(**asked, do_sample=False, max_new_tokens=12, pad_token_id=0)[0]
    expected = str(tokenizer.decode(written[asked["input_ids"].shape[1] :], skip_special_tokens=True)).strip()
    with model.at(model.initial()):
        assert model.answers(["ask me:"]) == [{"text": expected}]


def test_a_prompt_is_written_after_as_if_all_were_computed_anew(tmp_path: Path) -> None:
    folder = made("text-generation", tmp_path)
    model = loaded(plan_of("text-generation", folder, "prompt"))
    tokenizer = kinds.AutoTokenizer.from_pretrained(folder)
    ids = list(tokenizer("ask me:")["input_ids"])
    start = len(ids)
    with model.at(stirred(model)), torch.no_grad():
        said = model.answers(["ask me:"])
        for _ in range(12):
            row = torch.tensor([ids])
            ids.append(int(model({"input_ids": row, "attention_mask": torch.ones_like(row)}).logits[0, -1].argmax()))
    written = ids[start : ids.index(256)] if 256 in ids else ids[start:]
    assert said == [{"text": str(tokenizer.decode(written, skip_special_tokens=True)).strip()}]


def test_a_model_that_sees_what_it_is_to_predict_is_refused_before_any_record(tmp_path: Path) -> None:
    torch.manual_seed(5)
    folder = saved(kinds.BertForMaskedLM(kinds.BertConfig(**SIZE)), tmp_path)
    plan = plan_of("text-generation", folder)
    with pytest.raises(WeightsError, match="use a decoder"):
        loaded(plan)


def test_words_are_told_by_their_first_token_and_those_cut_off_are_not(tmp_path: Path) -> None:
    model = loaded(plan_of("text-tokens", made("text-tokens", tmp_path)))
    told = " ".join(["word"] * 12)
    record = model.record(told, " ".join(["1"] * 12))
    assert record.target.tolist() == [1 if place % 5 == 0 else -100 for place in range(40)]
    with model.at(model.initial()):
        said = model.answers([told])[0]["labels"]
    assert said[:8] == ["O"] * 8
    assert said[8:] == [None] * 4


def test_an_answer_that_is_cut_off_stands_at_the_first_token(tmp_path: Path) -> None:
    model = loaded(plan_of("text-answers", made("text-answers", tmp_path)))
    near = model.record("what?\nhe took aspirin", "aspirin").target.tolist()
    far = model.record("what?\n" + "and so on " * 6 + "aspirin", "aspirin").target.tolist()
    half = model.record("what?\n" + "x" * 30 + " aspirin", "aspirin").target.tolist()
    assert near == [13, 19]
    assert (far, half) == ([0, 0], [0, 0])


def test_a_found_answer_is_a_piece_of_the_text(tmp_path: Path) -> None:
    model = loaded(plan_of("text-answers", made("text-answers", tmp_path)))
    with model.at(stirred(model)):
        answers = model.answers([told for told, _ in RECORDS["text-answers"]])
        outcomes = model.outcomes(*zip(*RECORDS["text-answers"], strict=True))
    for (told, _), one in zip(RECORDS["text-answers"], answers, strict=True):
        assert one["answer"] in told.split("\n")[1]
    assert outcomes.shape == (3, 3)
    assert ((outcomes[:, :2] >= 0) & (outcomes[:, :2] <= 1)).all()


def test_numbers_and_labels_are_learnt_below_the_head_by_the_head_s_own_objective(tmp_path: Path) -> None:
    """With only the head's part, the gradient is the closed form's."""
    from veil.common.head import head_inputs, scores
    from veil.common.objective import OBJECTIVES

    for kind in ("text-multilabel", "text-regression"):
        folder = made(kind, tmp_path / kind)
        plan = plan_of(kind, folder)
        model = loaded(plan)
        adapter = stirred(model)
        start = Adapter(tensors={**model.initial().tensors, "head.weight": adapter.tensors["head.weight"]})
        told = RECORDS[kind]
        assert plan.backbone is not None
        features = find_backbone(plan.backbone, plan.task, base=Path()).encode([one for one, _ in told])
        inputs = head_inputs(features, np.zeros(16))
        errors = OBJECTIVES[plan.task.form].errors(
            scores(start.tensors["head.weight"], inputs), np.array([truth for _, truth in told])
        )
        for row, (found, *_), error in zip(inputs, gradients(model, start, told), errors, strict=True):
            assert np.allclose(found.numpy(), np.outer(error, row), atol=1e-5)


def detector(folder: Path) -> TunableModel:
    torch.manual_seed(5)
    shape: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    config = kinds.YolosConfig(
        **shape, num_attention_heads=2, image_size=[32, 32], patch_size=8, num_detection_tokens=5
    )
    model: Any = kinds.YolosForObjectDetection(config)
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text('{"image_mean": [0, 0, 0], "image_std": [1, 1, 1]}')
    sha256 = fingerprint(f"path:{folder}", base=Path()).sha256
    return loaded(
        RunPlan.model_validate(
            {
                "name": "boxes",
                "backbone": {"source": f"path:{folder}", "sha256": sha256},
                "task": {"kind": "image-detection", "labels": ["cell", "dust"], "image_size": 32},
                "transfer": {"mode": "last-layers"},
                "privacy": {"target_epsilon": 8.0},
                "cohort": {"nominal_units": 10},
            }
        )
    )


def test_a_detector_is_examined_and_each_image_stands_alone(tmp_path: Path) -> None:
    model = detector(tmp_path)
    model.examine()
    pictures = []
    for place in range(3):
        pixels = np.random.default_rng(place).integers(0, 255, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{place}.png")
        pictures.append(tmp_path / f"{place}.png")
    truths = ["[[0, 0.1, 0.1, 0.5, 0.5], [1, 0.4, 0.4, 0.9, 0.9]]", "[]", "[[1, 0.0, 0.0, 1.0, 1.0]]"]
    adapter = stirred(model)
    told = list(zip(pictures, truths, strict=True))
    for one, other in zip(gradients(model, adapter, told), gradients(model, adapter, told[::-1])[::-1], strict=True):  # type: ignore[arg-type]  # paths
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    with model.at(adapter):
        outcomes, said = model.outcomes(pictures, truths), model.answers(pictures)
    assert outcomes.shape == (3, 3)
    assert {"label", "probability", "box"} == set(next(box for one in said for box in one["boxes"]))
    assert model.shapes["head.weight"] == (3, 17)


def test_box_loss_is_transformers_own_for_the_same_matching() -> None:
    from transformers.loss.loss_for_object_detection import generalized_box_iou

    random = torch.Generator().manual_seed(3)
    first, second = (torch.rand((4, 4), generator=random) * 0.4 for _ in range(2))
    ours, theirs = (torch.cat([one[:, :2], one[:, :2] + 0.1 + one[:, 2:]], dim=1) for one in (first, second))
    shared, apart = overlaps(ours, theirs)
    assert torch.allclose(shared - apart, generalized_box_iou(ours, theirs), atol=1e-6)


def test_what_was_found_is_counted_once() -> None:
    boxes = (Box(label=0, sides=(0.0, 0.0, 0.5, 0.5)), Box(label=1, sides=(0.5, 0.5, 1.0, 1.0)))
    right = (0, 0.9, [0.0, 0.0, 0.5, 0.5])
    assert found_shares([right], boxes) == (0.5, 1.0)
    assert found_shares([right, right], boxes) == (0.5, 0.5)
    assert found_shares([(1, 0.9, [0.0, 0.0, 0.5, 0.5])], boxes) == (0.0, 0.0)
    assert (found_shares([], boxes), found_shares([], ()), found_shares([right], ())) == ((0, 0), (1, 1), (1, 0))


def test_trained_tensors_are_named(tmp_path: Path) -> None:
    plan = plan_of("text-generation", made("text-generation", tmp_path), "lora")
    model = loaded(plan)
    assert model.shapes["head.weight"] == (0, 1)
    assert len(trained_in(plan, 1, model.shapes)) == 12
