# SPDX-License-Identifier: Apache-2.0
"""Which of a pretrained model's tensors train, by mode: its own, or small new ones in or beside them.

Promises that everything else stays frozen, that a model the mode does not fit is refused by the name of what does not
fit, and that new tensors start so that the model answers as it did before.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from veil.common.errors import PlanError
from veil.common.plan_sections import Transfer
from veil.common.trained import tuned_name

_SMALL = 0.02
"""Standard deviation of new tensors that do not start at zero, as that of most pretrained ones."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Unfrozen:
    """What trains.

    Attributes:
        parameters: by the adapter's name for them.
        blocks: the model's blocks, lowest first; empty where it has none.
        below: whether anything below the blocks trains.
    """

    parameters: dict[str, nn.Parameter]
    blocks: tuple[nn.Module, ...]
    below: bool


def unfreeze(model: nn.Module, transfer: Transfer, *, seed: int) -> Unfrozen:
    """Freeze a model but for what a mode trains, adding to it what the mode brings.

    Args:
        model: a pretrained model, changed in place.
        transfer: mode and its numbers.
        seed: public, for new tensors.

    Raises:
        PlanError: when the mode does not fit the model.
    """
    _check_statistics(model)
    model.requires_grad_(False)
    path, blocks = blocks_of(model)
    if not blocks and transfer.mode not in ("full", "bias"):
        raise PlanError(
            f'transfer.mode = "{transfer.mode}" for {type(model).__name__}, which has no list of blocks',
            "a model whose layers are in a ModuleList, as transformers' are",
            'choose mode = "full", "bias" or "head"',
        )
    top = transfer.top or len(blocks)
    if top > len(blocks) and blocks:
        raise PlanError(
            f"transfer.layers = {top} for {type(model).__name__} with {len(blocks)} blocks",
            f"at most {len(blocks)}",
            "lower transfer.layers",
        )
    generator = torch.Generator().manual_seed(seed % 2**63)
    chosen = blocks[len(blocks) - top :]
    match transfer.mode:
        case "adapter":
            found = _bottlenecks(model, chosen, transfer.bottleneck, generator)
        case "lora":
            found = _low_rank(model, path, blocks, chosen, transfer, generator)
        case "prompt":
            found = _prompt(model, transfer.prompt_length, generator)
        case _:
            found = {}
    model.eval()  # the new modules too
    depths = dict(_depths(model, path, len(blocks)))
    if not found:
        found = {
            name: one
            for name, one in model.named_parameters()
            if one.is_floating_point() and _wanted(name, depths[name], transfer, top)
        }
    for one in found.values():
        one.requires_grad_(True)
    parameters = {tuned_name(depths.get(name, len(blocks) + 1), name): one for name, one in sorted(found.items())}
    if not parameters:
        raise PlanError(
            f'transfer.mode = "{transfer.mode}" finds nothing to train in {type(model).__name__}',
            "a model with tensors of that kind",
            'choose another mode, or "head"',
        )
    return Unfrozen(
        parameters=parameters,
        blocks=blocks,
        below=any(depths.get(name, len(blocks) + 1) > len(blocks) for name in found),
    )


def blocks_of(model: nn.Module) -> tuple[str, tuple[nn.Module, ...]]:
    """Name of the list that holds most of a model's tensors, and its modules, lowest first."""
    lists = [(name, one) for name, one in model.named_modules() if isinstance(one, nn.ModuleList) and len(one) > 1]
    sizes = [sum(p.numel() for p in one.parameters()) for _, one in lists]
    if not lists:
        return "", ()
    name, modules = lists[max(range(len(lists)), key=lambda index: (sizes[index], -index))]
    return name, tuple(modules)


def _depths(model: nn.Module, path: str, count: int) -> Iterator[tuple[str, int]]:
    """Each parameter's depth: 0 after the blocks, 1 at the top block, …, one more than the lowest's before them."""
    inside = f"{path}."
    names = [name for name, _ in model.named_parameters()]
    first = next((place for place, name in enumerate(names) if path and name.startswith(inside)), len(names))
    for place, name in enumerate(names):
        if path and name.startswith(inside):
            yield name, count - int(name.removeprefix(inside).partition(".")[0])
        else:
            yield name, count + 1 if place < first else 0


def _wanted(name: str, depth: int, transfer: Transfer, top: int) -> bool:
    if transfer.mode == "full":
        return True
    if transfer.mode == "bias":
        return "bias" in name.rpartition(".")[2] and (transfer.layers is None or depth <= top)
    return depth <= top


def _check_statistics(model: nn.Module) -> None:
    """Refuse what would make a record's gradient depend on others, or not be a gradient at all."""
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None:
            raise PlanError(
                f"module {name} ({type(module).__name__}) without running statistics",
                "normalisation whose statistics were fixed in pretraining",
                "choose a backbone that keeps them, or one with LayerNorm or GroupNorm",
            )
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse:
            raise PlanError(
                f"module {name} ({type(module).__name__}) with sparse gradients",
                "dense gradients, whose length can be clipped",
                "load the model with sparse = False",
            )


class _Bottleneck(nn.Module):
    """h + U gelu(D h): D narrow, U zero at first (Houlsby et al. 2019, one module a block)."""

    def __init__(self, width: int, bottleneck: int, dimension: int, generator: torch.Generator) -> None:
        super().__init__()
        self.dimension = dimension
        self.down = nn.Parameter(torch.randn(bottleneck, width, generator=generator) / math.sqrt(width))
        self.up = nn.Parameter(torch.zeros(width, bottleneck))

    def forward(self, hidden: Tensor) -> Tensor:
        rows = hidden.movedim(self.dimension, -1)
        change = nn.functional.gelu(rows @ self.down.T) @ self.up.T
        return hidden + change.movedim(-1, self.dimension)


def _bottlenecks(
    model: nn.Module, chosen: Sequence[nn.Module], bottleneck: int, generator: torch.Generator
) -> dict[str, nn.Parameter]:
    """One behind each chosen block; as wide as the block's output, which a made-up record shows."""
    names = {id(module): name for name, module in model.named_modules()}
    found: dict[str, nn.Parameter] = {}
    for block in chosen:
        width, dimension = _output_width(block, model)
        adapter = _Bottleneck(width, bottleneck, dimension, generator)
        block.register_module("veil_adapter", adapter)
        block.register_forward_hook(_behind)
        found |= {f"{names[id(block)]}.veil_adapter.{part}": getattr(adapter, part) for part in ("down", "up")}
    return found


def _behind(block: Any, inputs: Any, output: Any) -> Any:
    if isinstance(output, tuple):
        return (block.veil_adapter(output[0]), *output[1:])
    return block.veil_adapter(output)


def _output_width(block: nn.Module, model: nn.Module) -> tuple[int, int]:
    """Width of a block's output and the dimension it lies along: the channels of convolutions, else the last one."""
    convolutions = [one for one in block.modules() if isinstance(one, nn.Conv2d)]
    if convolutions:
        return convolutions[-1].out_channels, 1
    recurrent = [one for one in block.modules() if isinstance(one, nn.RNNBase)]
    width = recurrent[-1].hidden_size if recurrent else getattr(getattr(model, "config", None), "hidden_size", None)
    if isinstance(width, int):
        return width, -1
    linear = [one for one in block.modules() if isinstance(one, nn.Linear)]
    if not linear:
        raise PlanError(
            f'transfer.mode = "adapter" for a block {type(block).__name__} without layers whose width is known',
            "a block whose width is known",
            'choose mode = "last-layers"',
        )
    return linear[-1].out_features, -1


def _low_rank(
    model: nn.Module,
    path: str,
    blocks: Sequence[nn.Module],
    chosen: Sequence[nn.Module],
    transfer: Transfer,
    generator: torch.Generator,
) -> dict[str, nn.Parameter]:
    """peft's LoRA (Hu et al. 2021) in the attention of the chosen blocks; B zero, A from the public seed."""
    from peft import LoraConfig, inject_adapter_in_model

    targets = [
        f"{path}.{index}.{name}"
        for index, block in enumerate(blocks)
        if any(block is one for one in chosen)
        for name in _projections(block)
    ]
    if not targets:
        raise PlanError(
            f'transfer.mode = "lora" for {type(model).__name__}, whose blocks have no projections of attention',
            "a transformer",
            'choose mode = "last-layers" or "adapter"',
        )
    fan_in = any(type(one).__name__ == "Conv1D" for one in model.modules())
    alpha: Any = transfer.alpha  # peft says int, and divides
    config = LoraConfig(
        r=transfer.rank, lora_alpha=alpha, target_modules=targets, lora_dropout=0.0, fan_in_fan_out=fan_in
    )
    inject_adapter_in_model(config, model)
    found = {name: one for name, one in model.named_parameters() if ".lora_" in name}
    for name, one in sorted(found.items()):
        if ".lora_A." in name:
            with torch.no_grad():
                one.copy_(torch.randn(one.shape, generator=generator) / math.sqrt(one.shape[1]))
    return found


_QUERY_VALUE = ("query", "value", "q_lin", "v_lin", "q_proj", "v_proj", "c_attn", "qkv", "q", "v")


def _projections(block: nn.Module) -> list[str]:
    return [name for name, _ in block.named_modules() if name.rpartition(".")[2] in _QUERY_VALUE]


def _prompt(model: nn.Module, length: int, generator: torch.Generator) -> dict[str, nn.Parameter]:
    """Vectors that stand before the record's own tokens (Lester et al. 2021); see `veil.common.tunable`."""
    embedding = None
    with suppress(AttributeError, NotImplementedError):  # transformers' word for a model that reads no tokens
        embedding = model.get_input_embeddings()  # type: ignore[operator]  # transformers'
    if not isinstance(embedding, nn.Embedding):
        raise PlanError(
            f'transfer.mode = "prompt" for {type(model).__name__}, which has no embedding of tokens',
            "a model of text",
            'choose mode = "lora" or "adapter"',
        )
    scale = float(embedding.weight.std()) or _SMALL
    prompt = nn.Parameter(torch.randn(length, embedding.embedding_dim, generator=generator) * scale)
    model.register_parameter("veil_prompt", prompt)
    return {"veil_prompt": prompt}
