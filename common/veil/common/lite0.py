# SPDX-License-Identifier: Apache-2.0
"""EfficientNet-Lite0 from its PyPI package, under the names and the configuration that transformers reads.

Every tensor of the trunk is taken over bit by bit and computed features stay those of the original network.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor

_BLOCKS: Final = 16
_TRUNK: Final = {
    "_conv_stem": "embeddings.convolution",
    "_bn0": "embeddings.batchnorm",
    "_conv_head": "encoder.top_conv",
    "_bn1": "encoder.top_bn",
}
_BLOCK: Final = {
    "_expand_conv": "expansion.expand_conv",
    "_bn0": "expansion.expand_bn",
    "_depthwise_conv": "depthwise_conv.depthwise_conv",
    "_bn1": "depthwise_conv.depthwise_norm",
    "_project_conv": "projection.project_conv",
    "_bn2": "projection.project_bn",
}
_NORM_PARTS: Final = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
_CLASSIFIER: Final = frozenset({"_fc.weight", "_fc.bias"})
_OPEN_GATE: Final = 30.0
"""Lite0 has no squeeze-and-excite: a gate of sigmoid(30), exactly 1 in float32, changes no channel."""

CONFIG: Final[dict[str, Any]] = {
    "architectures": ["EfficientNetModel"],
    "model_type": "efficientnet",
    "image_size": 224,
    "width_coefficient": 1.0,
    "depth_coefficient": 1.0,
    "hidden_dim": 1280,
    "hidden_act": "relu6",
    "batch_norm_eps": 1e-3,
    "depthwise_padding": [],
    "squeeze_expansion_ratio": 0.0,
}
PREPROCESSOR: Final[dict[str, Any]] = {
    "image_processor_type": "EfficientNetImageProcessor",
    "do_rescale": False,
    "do_normalize": True,
    "image_mean": [127.0, 127.0, 127.0],
    "image_std": [128.0, 128.0, 128.0],
    "include_top": False,
    "resample": 2,
    "size": {"height": 224, "width": 224},
}


def renamed(state: dict[str, Any]) -> dict[str, Tensor]:
    """The trunk's tensors under transformers' names, with open squeeze-and-excite gates between them.

    Raises:
        ValueError: it is not Lite0's state dict.
    """
    source = {str(name): one for name, one in state.items() if isinstance(one, Tensor)}
    names = _tensor_names()
    if odd := names.keys() ^ (source.keys() - _CLASSIFIER):
        raise ValueError(f"missing or unknown tensors such as {min(odd)}")
    result = {theirs: source[ours].detach().clone().contiguous() for ours, theirs in names.items()}
    for block in range(_BLOCKS):
        channels = source[f"_blocks.{block}._bn1.weight"].numel()
        gate = f"encoder.blocks.{block}.squeeze_excite"
        result[f"{gate}.reduce.weight"] = torch.zeros(1, channels, 1, 1)
        result[f"{gate}.reduce.bias"] = torch.zeros(1)
        result[f"{gate}.expand.weight"] = torch.zeros(channels, 1, 1, 1)
        result[f"{gate}.expand.bias"] = torch.full((channels,), _OPEN_GATE)
    return result


def _tensor_names() -> dict[str, str]:
    """Name in the package's state dict → name in transformers' EfficientNetModel, for the whole trunk."""
    layers = dict(_TRUNK)
    for block in range(_BLOCKS):
        for ours, theirs in _BLOCK.items():
            if block > 0 or not theirs.startswith("expansion"):
                layers[f"_blocks.{block}.{ours}"] = f"encoder.blocks.{block}.{theirs}"
    return {
        f"{ours}.{part}": f"{theirs}.{part}"
        for ours, theirs in layers.items()
        for part in (("weight",) if "conv" in ours else _NORM_PARTS)
    }
