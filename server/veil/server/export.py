# SPDX-License-Identifier: Apache-2.0
"""`veil export`: a tuned model in the forms other programs read, each with a model card and the lines that use it.

Promises that what a form cannot hold is refused by name, and that an export carries the hashes of plan and pretrained
weights, the labels, and the licence as it was stated.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from veil.common.errors import InputError
from veil.common.head import CENTRE, HEAD_FILE, WEIGHT
from veil.common.plan import RunPlan
from veil.common.plan_sections import STRUCTURED
from veil.common.update import Adapter
from veil.server.export_card import export_card
from veil.server.export_structured import goes_on, write_going_on
from veil.server.export_target import Target
from veil.server.lineage import Lineage
from veil.server.model import TunedModel
from veil.server.onnx_head import Bounds, onnx_head
from veil.server.usage import (
    ADAPTER_FILE,
    ONNX_FILE,
    bare_tensors,
    for_numpy,
    for_onnx,
    for_peft,
    for_tensors,
    for_transformers,
)

if TYPE_CHECKING:
    from veil.common.lazy_backbone import LazyBackbone

CARD: Final = "README.md"
USAGE: Final = "usage.py"


@dataclass(frozen=True, kw_only=True, slots=True)
class _Source:
    """What is exported.

    Attributes:
        model: its folder.
        tuned: the model.
        columns: its numeric columns in order, with their public bounds; None where a backbone gives the features.
    """

    model: Path
    tuned: TunedModel
    columns: Mapping[str, Bounds] | None

    @property
    def metadata(self) -> dict[str, str]:
        """What a file carries in its own header, text by text."""
        plan = self.tuned.plan
        told = {
            "veil_version": version("veil"),
            "plan_sha256": plan.sha256,
            "task": plan.task.kind,
            "transfer_mode": plan.transfer.mode,
            "labels": json.dumps(list(self.tuned.labels), ensure_ascii=False),
        }
        if plan.backbone is not None:
            told |= {"backbone_sha256": plan.backbone.sha256, "backbone_source": plan.backbone.source}
            told["backbone_licence"] = plan.backbone.licence or "not stated"
        if self.columns is not None:
            told["columns"] = json.dumps(dict(self.columns), ensure_ascii=False)
        return told

    @property
    def preprocessor(self) -> dict[str, Any]:
        """What turns pictures or sounds into what the backbone takes; empty for text."""
        file = self.model / "preprocessor_config.json"
        told: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        return told


Writer = Callable[[_Source, Path], str]
"""Writes a form's files into a folder; gives the lines of Python that use them."""


def export(model: Path, target: Target, folder: Path, *, columns: Sequence[str] = ()) -> tuple[str, ...]:
    """Write an export.

    Args:
        model: the folder `model` of a finished run.
        target: the form.
        folder: that is there, and empty.
        columns: names of the numeric columns in the order they were trained in; without them, as the run's report says.

    Returns:
        the names of the files, sorted.

    Raises:
        InputError: the model cannot be read or does not fit the form; nothing was written then.
        WeightsError: its backbone cannot be loaded.
    """
    tuned = TunedModel.load(model)
    lineage = Lineage.of(model, tuned.plan)
    source = _Source(model=model, tuned=tuned, columns=_columns(tuned, columns or lineage.features))
    lines = _writer(tuned, target)(source, folder)
    (folder / USAGE).write_text(lines, encoding="utf-8")
    (folder / CARD).write_text(export_card(tuned.plan, target, lineage, lines), encoding="utf-8")
    return tuple(sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()))


def missing_part(plan: RunPlan, target: Target) -> str:
    """What of the model an export in a form does not hold, for who asked for it; empty where it holds all."""
    if target is not Target.ONNX or plan.task.modality == "tabular" or plan.task.form in STRUCTURED:
        return ""
    tuned = f" as {plan.transfer.mode} tuned it" if plan.transfer.deep else ""
    return f"the file holds the output layer alone: it reads features of the backbone{tuned}, which --to hf writes"


def _writer(tuned: TunedModel, target: Target) -> Writer:
    mode = tuned.plan.transfer.mode
    if tuned.plan.task.form in STRUCTURED:
        return partial(_going_on, target) if goes_on(tuned, target) else _own_modules
    if target not in _WRITERS[mode]:
        raise InputError(
            f'a model with transfer.mode = "{mode}" to {target}',
            "safetensors: it brings modules that no stock class has",
            "use --to safetensors for its tensors, and `veil predict` for its answers",
        )
    return _WRITERS[mode][target]


def _columns(tuned: TunedModel, names: Sequence[str]) -> Mapping[str, Bounds] | None:
    """A numeric model's columns; where nothing but their number is known, and nothing else is needed, places."""
    width, bounds = tuned.adapter.tensors[CENTRE].size, tuned.plan.task.bounds
    if tuned.plan.task.modality != "tabular":
        return None
    if not names and not bounds:
        names = [f"column {place + 1}" for place in range(width)]
    if len(names) != width or len(set(names)) != width or not set(bounds) <= set(names):
        raise InputError(
            f"columns {', '.join(names) or 'not named'}",
            f"{width} columns, {', '.join(bounds)} among them" if bounds else f"{width} columns",
            "name each with --column, in the order they were trained in",
        )
    return {name: bounds.get(name) for name in names}


def _hugging_face(source: _Source, folder: Path) -> str:
    """The model's own folder, which is one already, with the lines that lead from record to answers."""
    tuned, task = source.tuned, source.tuned.plan.task
    backbone = _backbone(source, Target.HF)
    folder.rmdir()  # `save` makes it
    tuned.save(folder)
    if tuned.plan.transfer.deep:
        from veil.server.merging import write_merged

        write_merged(tuned, folder)
        (folder / HEAD_FILE).write_bytes(_head(tuned).to_bytes())
        (folder / "veil.json").unlink()  # to Veil, a tuned model is a pretrained one and what was tuned, apart
    return for_transformers(task, backbone.pooling, source.preprocessor)


def _peft(source: _Source, folder: Path) -> str:
    """LoRA as peft has it, and the head beside it."""
    from veil.server.merging import write_peft

    backbone, task = _backbone(source, Target.SAFETENSORS), source.tuned.plan.task
    write_peft(source.tuned, folder)
    (folder / HEAD_FILE).parent.mkdir()
    (folder / HEAD_FILE).write_bytes(save(_tensors(_head(source.tuned)), metadata=source.metadata))
    return for_peft(task, backbone.pooling, source.preprocessor, backbone.sha256)


def _safetensors(source: _Source, folder: Path) -> str:
    tuned, task = source.tuned, source.tuned.plan.task
    if tuned.plan.transfer.deep and (task.form in STRUCTURED or _is_ge2e(source)):
        return _own_modules(source, folder)
    (folder / ADAPTER_FILE).write_bytes(save(_tensors(tuned.adapter), metadata=source.metadata))
    if not tuned.plan.transfer.deep:
        return for_numpy(task, source.columns)
    backbone = _backbone(source, Target.SAFETENSORS)
    return for_tensors(task, backbone.pooling, source.preprocessor, backbone.sha256)


def _own_modules(source: _Source, folder: Path) -> str:
    """The tensors alone, where no stock class gives the answers: modules of Veil's own, answers with a structure."""
    (folder / ADAPTER_FILE).write_bytes(save(_tensors(source.tuned.adapter), metadata=source.metadata))
    return bare_tensors(ADAPTER_FILE)


def _going_on(target: Target, source: _Source, folder: Path) -> str:
    """A model that writes, as a stock class reads it."""
    return write_going_on(source.tuned, target, folder)


def _onnx(source: _Source, folder: Path) -> str:
    task, columns = source.tuned.plan.task, source.columns
    bounds = None if columns is None else tuple(columns.values())
    made = onnx_head(source.tuned.adapter, task, bounds=bounds, metadata=source.metadata)
    (folder / ONNX_FILE).write_bytes(made)
    return for_onnx(task, columns)


def _backbone(source: _Source, target: Target) -> LazyBackbone:
    """The pretrained model, where transformers has a class for it."""
    backbone, kind = source.tuned.backbone, source.tuned.plan.task.kind
    if backbone is None:
        raise InputError(
            f'task.kind = "{kind}" to {target}',
            "a model with a pretrained backbone",
            "use --to onnx, which holds the whole model",
        )
    if _is_ge2e(source):
        raise InputError(
            f"the speech encoder GE2E to {target}",
            "a backbone that transformers has a class for",
            "use --to onnx for the head, and `veil predict` for the whole",
        )
    return backbone


def _is_ge2e(source: _Source) -> bool:
    from veil.common import ge2e

    told = json.loads((source.model / "config.json").read_text(encoding="utf-8"))
    return bool(told.get("model_type") == ge2e.MODEL_TYPE)


def _head(tuned: TunedModel) -> Adapter:
    return Adapter(tensors={name: tuned.adapter.tensors[name] for name in (WEIGHT, CENTRE)})


def _tensors(adapter: Adapter) -> dict[str, NDArray[np.float32]]:
    return {name: np.ascontiguousarray(one) for name, one in sorted(adapter.tensors.items())}


_OWN_TENSORS: Final[Mapping[Target, Writer]] = {
    Target.HF: _hugging_face,
    Target.SAFETENSORS: _safetensors,
    Target.ONNX: _onnx,
}
_WRITERS: Final[Mapping[str, Mapping[Target, Writer]]] = {
    "head": _OWN_TENSORS,
    "last-layers": _OWN_TENSORS,
    "gradual": _OWN_TENSORS,
    "bias": _OWN_TENSORS,
    "full": _OWN_TENSORS,
    "lora": {**_OWN_TENSORS, Target.SAFETENSORS: _peft},
    "adapter": {Target.SAFETENSORS: _own_modules},
    "prompt": {Target.SAFETENSORS: _own_modules},
}
"""By mode of transfer, what each form holds of it; the last two bring modules that no stock class has."""
