# SPDX-License-Identifier: Apache-2.0
"""Tests of `veil.common.unfreezing`: each mode trains the right tensors of each family, or says what does not fit.

What is right is written down here by the names that transformers gives, not by the rule under test.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from tests.tiny_models import SIDE, TEXT, tiny_model
from torch import Tensor, nn

from veil.common.errors import PlanError
from veil.common.plan_sections import Transfer
from veil.common.trained import depth_of, parameter_of
from veil.common.unfreezing import blocks_of, unfreeze

FAMILIES = ("bert", "gpt2", "vit", "resnet", "efficientnet")
BLOCKS = {
    "bert": "encoder.layer",
    "gpt2": "h",
    "vit": "layers",
    "resnet": "encoder.stages",
    "efficientnet": "encoder.blocks",
}
ABOVE = {
    "bert": r"pooler\.",
    "gpt2": r"ln_f\.",
    "vit": r"(layernorm|pooler)\.",
    "resnet": "$",
    "efficientnet": r"encoder\.top_",
}
ATTENTION = {
    "bert": r"attention\.self\.(query|value)\.lora_[AB]\.default\.weight",
    "gpt2": r"attn\.c_attn\.lora_[AB]\.default\.weight",
    "vit": r"attention\.(q|v)_proj\.lora_[AB]\.default\.weight",
}


def depth_by_name(family: str, name: str) -> int:
    if found := re.match(re.escape(BLOCKS[family]) + r"\.(\d)\.", name):
        return 3 - int(found[1])
    return 0 if re.match(ABOVE[family], name) else 4


def trained(family: str, **transfer: Any) -> dict[str, int]:
    """Depth of each parameter that trains, by its name in the model."""
    found = unfreeze(tiny_model(family), Transfer.model_validate(transfer), seed=7).parameters
    return {parameter_of(name): depth_of(name) for name in found}


def expected(family: str, wanted: Callable[[str, int], bool]) -> dict[str, int]:
    depths = {name: depth_by_name(family, name) for name, _ in tiny_model(family).named_parameters()}
    return {name: depth for name, depth in depths.items() if wanted(name, depth)}


def record(family: str) -> dict[str, Tensor]:
    if family in TEXT:
        return {"input_ids": torch.tensor([[2, 5, 7, 3, 11]]), "attention_mask": torch.ones(1, 5, dtype=torch.int64)}
    return {"pixel_values": torch.randn(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(2))}


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_are_the_model_s_layers_lowest_first(family: str) -> None:
    model = tiny_model(family)
    path, blocks = blocks_of(model)
    assert path == BLOCKS[family]
    assert [id(one) for one in blocks] == [id(model.get_submodule(f"{path}.{index}")) for index in range(3)]


def test_a_model_without_a_list_of_layers_has_no_blocks() -> None:
    assert blocks_of(nn.Sequential(nn.Linear(2, 2), nn.ModuleList([nn.Linear(2, 2)]))) == ("", ())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("mode", ["last-layers", "gradual"])
def test_top_blocks_and_what_stands_above_them(family: str, mode: str, layers: int) -> None:
    assert trained(family, mode=mode, layers=layers) == expected(family, lambda name, depth: depth <= layers)


@pytest.mark.parametrize("family", FAMILIES)
def test_without_a_number_the_top_block_trains_and_gradually_the_top_two(family: str) -> None:
    assert trained(family, mode="last-layers") == trained(family, mode="last-layers", layers=1)
    assert trained(family, mode="gradual") == trained(family, mode="gradual", layers=2)


@pytest.mark.parametrize("family", FAMILIES)
def test_full_is_every_tensor(family: str) -> None:
    found = trained(family, mode="full")
    assert found == expected(family, lambda name, depth: True)
    assert set(found.values()) >= {1, 2, 3, 4}


@pytest.mark.parametrize("family", FAMILIES)
def test_bias_is_every_bias_and_nothing_else(family: str) -> None:
    found = trained(family, mode="bias")
    assert found == expected(family, lambda name, depth: name.split(".")[-1] == "bias")
    assert len(found) >= 10
    top = trained(family, mode="bias", layers=1)
    assert top == {name: depth for name, depth in found.items() if depth <= 1}
    assert top


@pytest.mark.parametrize("layers", [None, 1, 2])
@pytest.mark.parametrize("family", ["bert", "gpt2", "vit"])
def test_lora_is_two_thin_matrices_at_each_projection_of_attention(family: str, layers: int | None) -> None:
    found = trained(family, mode="lora", rank=2, **({"layers": layers} if layers else {}))
    inside = re.compile(rf"{re.escape(BLOCKS[family])}\.(\d)\.{ATTENTION[family]}")
    assert all(inside.fullmatch(name) for name in found), sorted(found)
    assert sorted(found.values()) == sorted([*range(1, (layers or 3) + 1)] * (2 if family == "gpt2" else 4))
    assert found == {name: depth_by_name(family, name) for name in found}


@pytest.mark.parametrize("layers", [None, 1])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_is_one_bottleneck_behind_each_block(family: str, layers: int | None) -> None:
    found = trained(family, mode="adapter", bottleneck=3, **({"layers": layers} if layers else {}))
    indices = range(3 - (layers or 3), 3)
    names = {f"{BLOCKS[family]}.{index}.veil_adapter.{part}" for index in indices for part in ("down", "up")}
    assert found == {name: depth_by_name(family, name) for name in names}


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_a_prompt_is_one_tensor_below_all_blocks(family: str) -> None:
    found = unfreeze(tiny_model(family), Transfer(mode="prompt", prompt_length=6), seed=7)
    assert {name: tuple(one.shape) for name, one in found.parameters.items()} == {"tuned.004.veil_prompt": (6, 8)}
    assert found.below


@pytest.mark.parametrize(
    ("mode", "below"),
    [("full", True), ("bias", True), ("last-layers", False), ("gradual", False), ("adapter", False), ("lora", False)],
)
def test_it_says_whether_anything_below_the_blocks_trains(mode: str, below: bool) -> None:
    assert unfreeze(tiny_model("bert"), Transfer.model_validate({"mode": mode}), seed=7).below is below


@pytest.mark.parametrize("mode", ["last-layers", "full", "gradual", "bias", "adapter", "lora", "prompt"])
def test_all_else_is_frozen_and_nothing_is_in_train_mode(mode: str) -> None:
    model = tiny_model("bert")
    found = unfreeze(model, Transfer.model_validate({"mode": mode}), seed=7)
    open_ = {id(one) for one in model.parameters() if one.requires_grad}
    assert open_ == {id(one) for one in found.parameters.values()}
    own = {name: id(one) for name, one in model.named_parameters()}
    assert all(own[parameter_of(name)] == id(one) for name, one in found.parameters.items())
    assert not any(one.training for one in model.modules())


@pytest.mark.parametrize("mode", ["lora", "adapter"])
@pytest.mark.parametrize("family", FAMILIES)
def test_new_tensors_leave_what_the_model_says_as_it_was(family: str, mode: str) -> None:
    if mode == "lora" and family not in ATTENTION:
        return
    model, inputs = tiny_model(family), record(family)
    with torch.no_grad():
        before = model(**inputs).last_hidden_state
        found = unfreeze(model, Transfer.model_validate({"mode": mode}), seed=7).parameters
        after = model(**inputs).last_hidden_state
        assert torch.equal(before, after)
        for name, one in found.items():
            assert one.any() != (".lora_B." in name or name.endswith(".up")), f"{name} starts at zero or does not"
        for one in found.values():
            one.add_(torch.randn(one.shape, generator=torch.Generator().manual_seed(1)))
        assert not torch.allclose(before, model(**inputs).last_hidden_state, atol=1e-3), "they take part"


@pytest.mark.parametrize("mode", ["lora", "adapter", "prompt"])
def test_new_tensors_follow_the_public_seed_alone(mode: str) -> None:
    transfer = Transfer.model_validate({"mode": mode})

    def made(seed: int) -> dict[str, Tensor]:
        torch.rand(3)
        return {
            name: one.detach() for name, one in unfreeze(tiny_model("bert"), transfer, seed=seed).parameters.items()
        }

    one, same, other = made(7), made(7), made(8)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_lora_counts_alpha_over_rank_times() -> None:
    """h W' + (alpha/rank) h A' B', as peft has it; GPT-2 keeps its weights the other way round."""
    for family, path in (("bert", "encoder.layer.1.attention.self.query"), ("gpt2", "h.1.attn.c_attn")):
        model = tiny_model(family)
        plain = model.get_submodule(path)
        found = unfreeze(model, Transfer(mode="lora", rank=2, alpha=6.0), seed=7).parameters
        own = {name: one for name, one in found.items() if parameter_of(name).startswith(path)}
        down, up = (next(one for name, one in own.items() if f".lora_{part}." in name) for part in "AB")
        rows = torch.randn(4, 8, generator=torch.Generator().manual_seed(3))
        with torch.no_grad():
            up.normal_(generator=torch.Generator().manual_seed(4))
            expected_rows = plain(rows) + 3.0 * rows @ down.T @ up.T
            assert torch.allclose(model.get_submodule(path)(rows), expected_rows, atol=1e-5)


class Plain(nn.Module):
    """A model of one layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer


class Blocks(nn.Module):
    """Three blocks of one kind."""

    def __init__(self, block: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList([block() for _ in range(3)])


Kind = Literal["last-layers", "full", "gradual", "bias", "adapter", "lora", "prompt"]


@pytest.mark.parametrize(
    ("make", "mode", "names"),
    [
        (lambda: Plain(nn.BatchNorm1d(3, track_running_stats=False)), "full", ["layer", "BatchNorm1d", "statistics"]),
        (lambda: Plain(nn.Embedding(3, 2, sparse=True)), "full", ["layer", "Embedding", "sparse"]),
        (lambda: Plain(nn.EmbeddingBag(3, 2, sparse=True)), "full", ["layer", "EmbeddingBag", "sparse"]),
        *[
            (lambda: tiny_model("bert", num_hidden_layers=1), mode, [mode, "BertModel", "no list of blocks"])
            for mode in ("last-layers", "gradual", "adapter", "lora", "prompt")
        ],
        (lambda: tiny_model("resnet"), "lora", ["lora", "ResNetModel", "attention"]),
        (lambda: tiny_model("efficientnet"), "lora", ["lora", "EfficientNetModel", "attention"]),
        *[
            (lambda family=family: tiny_model(family), "prompt", ["prompt", "Model", "embedding of tokens"])
            for family in ("vit", "resnet", "efficientnet")
        ],
        (lambda: Blocks(nn.Identity), "last-layers", ["last-layers", "Blocks", "nothing to train"]),
        (lambda: Blocks(lambda: nn.Linear(2, 2, bias=False)), "bias", ["bias", "Blocks", "nothing to train"]),
        (lambda: Blocks(lambda: nn.LayerNorm(2)), "adapter", ["adapter", "LayerNorm", "layers"]),
    ],
)
def test_what_does_not_fit_is_refused_by_its_name_with_a_remedy(
    make: Callable[[], nn.Module], mode: Kind, names: list[str]
) -> None:
    with pytest.raises(PlanError) as caught:
        unfreeze(make(), Transfer(mode=mode), seed=7)
    assert all(name in caught.value.value for name in names), caught.value.value
    assert caught.value.expectation and caught.value.remedy


@pytest.mark.parametrize("mode", ["last-layers", "gradual", "bias", "adapter", "lora"])
def test_more_layers_than_there_are_are_refused(mode: Kind) -> None:
    unfreeze(tiny_model("bert"), Transfer(mode=mode, layers=3), seed=7)
    with pytest.raises(PlanError, match=r"transfer\.layers = 4 for BertModel with 3 blocks"):
        unfreeze(tiny_model("bert"), Transfer(mode=mode, layers=4), seed=7)
