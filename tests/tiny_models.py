# SPDX-License-Identifier: Apache-2.0
"""Tiny random models of transformers' own classes, saved as anybody's would be, and plans that tune them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from veil.common.plan import RunPlan
from veil.common.plan_sections import Backbone
from veil.common.weights import fingerprint

WORDS = [
    "a",
    "cough",
    "fever",
    "rash",
    "no",
    "pain",
    "well",
    "ill",
    "and",
    "the",
    "of",
    "mild",
    "severe",
    "since",
    "day",
    "two",
    "made",
    "up",
]
PADDING, UNKNOWN = "[PAD]", "[UNK]"
LENGTH = 12
SIDE = 32

_SIZE = {"hidden_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 16}
_SPREAD = 0.4
"""Standard deviation of the weights, such that every one of them matters."""


def _bert(**changes: Any) -> Any:
    size: dict[str, Any] = {**_SIZE, **changes}
    config = transformers.BertConfig(vocab_size=24, max_position_embeddings=34, initializer_range=_SPREAD, **size)
    return transformers.BertModel(config)


def _gpt2() -> Any:
    ids: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 0}
    config = transformers.GPT2Config(
        vocab_size=24, n_positions=34, n_embd=8, n_layer=3, n_head=2, initializer_range=_SPREAD, **ids
    )
    return transformers.GPT2Model(config)


def _vit() -> Any:
    config = transformers.ViTConfig(image_size=SIDE, patch_size=16, initializer_range=_SPREAD, **_SIZE)  # type: ignore[arg-type]  # numbers
    return transformers.ViTModel(config)


def _resnet() -> Any:
    return transformers.ResNetModel(
        transformers.ResNetConfig(embedding_size=4, hidden_sizes=[8, 8, 8], depths=[1, 1, 1])
    )


def _efficientnet() -> Any:
    config = transformers.EfficientNetConfig(
        image_size=SIDE,
        initializer_range=1.0,
        width_coefficient=0.0125,
        depth_coefficient=0.3,
        depth_divisor=4,
        in_channels=[32, 320, 640],
        out_channels=[320, 640, 640],
        kernel_sizes=[3, 3, 3],
        strides=[1, 2, 1],
        num_block_repeats=[1, 1, 1],
        expand_ratios=[1, 2, 2],
        depthwise_padding=[],
        hidden_dim=16,
    )
    return transformers.EfficientNetModel(config)


MAKERS: Mapping[str, Callable[..., Any]] = {
    "bert": _bert,
    "gpt2": _gpt2,
    "vit": _vit,
    "resnet": _resnet,
    "efficientnet": _efficientnet,
}
TEXT = ("bert", "gpt2")


def tiny_model(family: str, **changes: Any) -> Any:
    """A model in eval mode, the same each time."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = MAKERS[family](**changes).eval()
        for weight in (one for one in model.parameters() if one.ndim == 4):  # else little comes through
            torch.nn.init.normal_(weight, std=2 / weight[0].numel() ** 0.5)
        return model


def save_tiny(folder: Path, family: str) -> Backbone:
    """The model's folder, with what reads its records, as a plan pins it."""
    tiny_model(family).save_pretrained(folder)
    if family in TEXT:
        names = {word: place for place, word in enumerate([PADDING, UNKNOWN, *WORDS])}
        words = Tokenizer(models.WordLevel(names, unk_token=UNKNOWN))
        words.pre_tokenizer = pre_tokenizers.Whitespace()
        reader = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token=PADDING, unk_token=UNKNOWN)
        reader.save_pretrained(folder)
    else:
        scaling = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]}
        (folder / "preprocessor_config.json").write_text(json.dumps(scaling), encoding="utf-8")
    source = f"path:{folder}"
    return Backbone(source=source, sha256=fingerprint(source, base=Path()).sha256)


def deep_plan(backbone: Backbone, family: str, transfer: Mapping[str, Any], **sections: Any) -> RunPlan:
    """A plan of three classes; keywords change or add sections."""
    modality, size = ("text", {"max_length": LENGTH}) if family in TEXT else ("image", {"image_size": SIDE})
    document: dict[str, Any] = {
        "backbone": {"source": backbone.source, "sha256": backbone.sha256},
        "task": {"kind": f"{modality}-classification", "labels": ["no", "yes", "maybe"], **size},
        "transfer": dict(transfer),
        "training": {"rounds": 3, "centre": False},
        "privacy": {"target_epsilon": 8.0},
        "cohort": {"nominal_units": 50},
    }
    for name, change in sections.items():
        document[name] = {**document.get(name, {}), **change}
    return RunPlan.model_validate({"name": "tuned", "seed": 5, **document})
