# SPDX-License-Identifier: Apache-2.0
"""A model that was tuned below its head, as stock classes read it: its tensors merged, or LoRA's apart in peft's form.

Promises that a merged model was loaded once more by its stock class, and that every tensor came back.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from safetensors.torch import save_file
from torch import nn

from veil.common.backbone import load_backbone
from veil.common.errors import InputError, RunError
from veil.common.plan_sections import Backbone
from veil.common.trained import is_tuned, parameter_of
from veil.common.unfreezing import unfreeze
from veil.common.weights import WEIGHTS_NAME, sha256_of

if TYPE_CHECKING:
    from veil.server.model import TunedModel

PEFT_WEIGHTS: Final = "adapter_model.safetensors"


def write_merged(tuned: TunedModel, folder: Path) -> None:
    """Replace the pretrained weights in a model's folder by the tuned ones, LoRA's changes added to what they change.

    Args:
        tuned: of a mode that leaves no module of its own in the model.
        folder: as `TunedModel.save` writes it.

    Raises:
        InputError: for an encoder that is half of a model, which no stock class loads alone.
        RunError: when what was written is not what is loaded.
    """
    told = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if told.get("is_encoder_decoder"):
        raise InputError(
            f'half of a {told["model_type"]}, tuned with transfer.mode = "{tuned.plan.transfer.mode}", to hf',
            "a model that was tuned whole",
            "use --to safetensors for its tensors, and `veil predict` for the whole",
        )
    merged = {name: one.clone() for name, one in _unwrapped(_tuned(tuned)).state_dict().items()}
    save_file(merged, folder / WEIGHTS_NAME, metadata={"format": "pt"})
    told = {**told, "dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(told, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    written = Backbone(source=f"path:{folder.absolute()}", sha256=sha256_of(folder / WEIGHTS_NAME))
    loaded = load_backbone(written, tuned.plan.task, base=folder).parts()[0].state_dict()
    if loaded.keys() != merged.keys() or not all(torch.equal(one, merged[name]) for name, one in loaded.items()):
        raise RunError(f"{folder}: other tensors than were written", "the merged ones", "report this, with the plan")


def write_peft(tuned: TunedModel, folder: Path) -> None:
    """Write LoRA's tensors as `peft.PeftModel.from_pretrained` reads them beside the pretrained model.

    Args:
        tuned: with transfer.mode = "lora".
        folder: that is there.
    """
    config: Any = _tuned(tuned).peft_config["default"]
    config.base_model_name_or_path = tuned.plan.backbone.source if tuned.plan.backbone else None
    config.inference_mode = True
    config.save_pretrained(folder)
    tensors = {
        f"base_model.model.{parameter_of(name).replace('.default.', '.')}": torch.tensor(one)
        for name, one in tuned.adapter.tensors.items()
        if is_tuned(name)
    }
    save_file(tensors, folder / PEFT_WEIGHTS, metadata={"format": "pt"})


def _tuned(tuned: TunedModel) -> Any:
    """The backbone with the adapter's tensors in their places."""
    if tuned.backbone is None:
        raise ValueError("a model without a backbone; expected one that was tuned below its head")
    model = tuned.backbone.another().parts()[0]
    places = unfreeze(model, tuned.plan.transfer, seed=tuned.plan.seed).parameters
    with torch.no_grad():
        for name, one in tuned.adapter.tensors.items():
            if is_tuned(name):
                places[name].copy_(torch.tensor(one))
    return model


def _unwrapped(model: nn.Module) -> Any:
    """Layers that peft put around others merged into these."""
    for path, layer in list(model.named_modules()):
        if hasattr(layer, "get_base_layer") and hasattr(layer, "merge"):
            layer.merge()
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, layer.get_base_layer())
    if hasattr(model, "peft_config"):
        del model.peft_config
    return model
