# SPDX-License-Identifier: Apache-2.0
"""Tasks with a structure from a plan to an answer: three sites, two rounds, private, on tiny random models."""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import transformers as kinds
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from veil.common.weights import fingerprint

Veil = Callable[..., tuple[int, str, str]]

SIZE: dict[str, Any] = {
    "vocab_size": 257,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}
TABLES = {
    "text-tokens": {"text": "took aspirin today", "truth": "O DRUG O"},
    "text-answers": {"text": "he took aspirin", "question": "which?", "truth": "aspirin"},
    "text-generation": {"text": "ask me:", "truth": "no, never"},
    "image-detection": {"text": "cell.png", "truth": '[["cell", 0.2, 0.2, 0.8, 0.8]]'},
}
TASKS: dict[str, dict[str, Any]] = {
    "text-tokens": {"labels": ["O", "DRUG"], "max_length": 24},
    "text-answers": {"max_length": 32},
    "text-generation": {"max_length": 24, "answer_length": 12},
    "image-detection": {"labels": ["cell"], "image_size": 32},
}
SECOND = {
    "text-tokens": "macro_f1",
    "text-answers": "token_f1",
    "text-generation": "token_loss",
    "image-detection": "precision",
}
SAID = {"text-tokens": "labels", "text-answers": "answer", "text-generation": "text", "image-detection": "boxes"}


def write_weights(folder: Path, kind: str) -> None:
    torch.manual_seed(7)
    model: Any
    if kind == "image-detection":
        small = {name: value for name, value in SIZE.items() if name not in ("vocab_size", "max_position_embeddings")}
        config = kinds.YolosConfig(**small, image_size=[32, 32], patch_size=8, num_detection_tokens=4)
        model = kinds.YolosForObjectDetection(config)
    elif kind == "text-generation":
        model = kinds.LlamaForCausalLM(kinds.LlamaConfig(**SIZE, eos_token_id=2))
    else:
        model = kinds.BertModel(kinds.BertConfig(**SIZE), add_pooling_layer=False)
    model.save_pretrained(folder / "weights")
    (folder / "weights" / "preprocessor_config.json").write_text('{"image_mean": [0, 0, 0], "image_std": [1, 1, 1]}')
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: place for place, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "weights" / "tokenizer.json"))
    (folder / "weights" / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')


def write(folder: Path, kind: str) -> Path:
    write_weights(folder, kind)
    if kind == "image-detection":
        Image.fromarray(np.eye(40, dtype=np.uint8) * 255).save(folder / "cell.png")
    pd.DataFrame([TABLES[kind]] * 18).to_csv(folder / "records.csv", index=False)
    sha256 = fingerprint(f"path:{folder / 'weights'}", base=Path()).sha256
    question = 'question = "question"' if kind == "text-answers" else ""
    baselines = '["local_only"]' if kind == "text-tokens" else "[]"
    task = "\n".join(f"{key} = {json.dumps(value)}" for key, value in TASKS[kind].items())
    (folder / "plan.toml").write_text(
        f"""
        name = "structured"
        [backbone]
        source = "path:weights"
        sha256 = "{sha256}"
        [task]
        kind = "{kind}"
        {task}
        [transfer]
        mode = "lora"
        [training]
        rounds = 2
        learning_rate = 0.5
        [privacy]
        target_epsilon = 8.0
        target_delta = 1e-3
        [cohort]
        nominal_units = 8
        [evaluation]
        holdout = 0.5
        share = 0.5
        [simulation]
        path = "records.csv"
        {"image" if kind == "image-detection" else "text"} = "text"
        {question}
        label = "truth"
        sites = 3
        baselines = {baselines}
        """
    )
    return folder / "plan.toml"


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing:FutureWarning")  # peft's own
@pytest.mark.parametrize("kind", TABLES)
def test_a_federation_learns_and_its_model_answers(
    kind: str, veil: Veil, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plan, output = write(tmp_path, kind), tmp_path / "out"
    code, _, err = veil("simulate", plan, "--output", output)
    assert code == 0, err
    report = json.loads((output / "report.json").read_text())
    assert report["private"]
    assert all(site["epsilon"] <= 8.0 for site in report["sites"])
    assert {"accuracy", "loss", SECOND[kind]} <= report["metrics"]["federated"].keys()
    assert {"accuracy", "count"} <= report["evaluation"].keys()
    asked = tmp_path / "records.csv"
    options: tuple[str | Path, ...] = ("--json", "--output", tmp_path / "said.csv", "--column", "text")
    options = options if kind != "text-answers" else (*options[:3], "--column", "question", *options[3:])
    code, out, err = veil("predict", output / "model", asked, *options)
    assert code == 0, err
    told = json.loads(out)
    assert len(told) == 18
    assert all(set(one) == {"input", SAID[kind]} for one in told)
    if kind == "text-tokens":
        assert all(len(one["labels"]) == 3 and set(one["labels"]) <= {"O", "DRUG"} for one in told)
    if kind == "text-answers":
        assert all(one["answer"] in "he took aspirin" for one in told)
    assert list(pd.read_csv(tmp_path / "said.csv").columns) == ["input", SAID[kind]]

    assert veil("export", output / "model", "--to", "safetensors", "--output", tmp_path / "tensors")[0] == 0
    code, _, err = veil("export", output / "model", "--to", "hf", "--output", tmp_path / "hf")
    if kind != "text-generation":
        assert (tmp_path / "tensors" / "adapter.safetensors").is_file()
        assert code == 2 and "no stock class" in err
        return
    assert code == 0, err
    choices: tuple[tuple[str, list[str]], ...] = (("hf", []), ("tensors", [str(tmp_path / "weights")]))
    for kept, arguments in choices:
        monkeypatch.setattr(sys, "argv", ["usage.py", *arguments, "ask me:"])
        runpy.run_path(str(tmp_path / kept / "usage.py"))
        assert capsys.readouterr().out.removesuffix("\n") == told[0]["text"]


def test_a_question_without_a_text_is_refused(tmp_path: Path) -> None:
    from veil.common.errors import InputError
    from veil.common.plan_sections import Task
    from veil.simulations.inputs import read_inputs

    task = Task(kind="text-answers")
    with pytest.raises(InputError, match="a line's end"):
        read_inputs("which?", task, [])
    assert read_inputs("which?\nhe took aspirin", task, []).records == ("which?\nhe took aspirin",)
