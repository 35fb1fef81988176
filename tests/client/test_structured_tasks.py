# SPDX-License-Identifier: Apache-2.0
"""A site's records with a structure: read or refused by their row, and no hostile one moves a sum by more than C."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as kinds
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from veil.client.examples import Examples, read_examples
from veil.client.records import SiteRecords, look
from veil.client.site_file import parse_site
from veil.client.tuned_gradient import clipped_tuned_sum
from veil.client.tuned_release import outcome_update
from veil.client.tuned_units import TunedUnits, tuned_units
from veil.client.units import bounded_units
from veil.common.errors import PlanError, TableError
from veil.common.evaluation_forms import vector_norm
from veil.common.lazy_backbone import find_backbone
from veil.common.plan import RunPlan
from veil.common.plan_sections import Columns, Task
from veil.common.privacy import Mechanism, PrivacyUnit
from veil.common.trained import trained_in
from veil.common.tunable import TunableModel, load_tunable
from veil.common.update import Adapter
from veil.common.weights import fingerprint
from veil.simulations.unprivate_noise import NoNoise

SIZE: dict[str, Any] = {
    "vocab_size": 257,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}
ROWS: dict[str, list[tuple[str, ...]]] = {
    "text-tokens": [("took aspirin today", "O DRUG O"), ("no drug", "O O"), ("ibuprofen " * 30, "DRUG " * 30)],
    "text-answers": [("he took aspirin", "aspirin"), ("she did", "she"), ("x" * 60 + " no more", "no more")],
    "text-generation": [("q:", "yes"), ("ask me:", "no, never"), ("z" * 90, "\x00" * 90)],
}
TABLE = {"path": "r.csv", "text": "t", "question": "q", "label": "l", "sites": 2}
LABELS: dict[str, Any] = {"text-tokens": {"labels": ["O", "DRUG"]}, "text-generation": {"answer_length": 12}}


def write_table(folder: Path, kind: str, rows: list[tuple[str, ...]]) -> tuple[Path, Columns]:
    path, form = folder / "records.csv", kind.partition("-")[2]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("text", "truth", "question"))
        writer.writerows((*row, "which?") for row in rows)
    told: dict[str, Any] = {"text": "text", "label": "truth", "form": form}
    return path, Columns(**told, question="question" if form == "answers" else None)


def read(folder: Path, kind: str, rows: list[tuple[str, ...]]) -> Examples:
    path, columns = write_table(folder, kind, rows)
    return read_examples(path, columns, Task(kind=kind, **LABELS.get(kind, {})), unit=PrivacyUnit.RECORD)  # type: ignore[arg-type]  # a kind by name


def test_a_question_stands_before_its_text(tmp_path: Path) -> None:
    examples = read(tmp_path, "text-answers", ROWS["text-answers"])
    assert examples.inputs[0] == "which?\nhe took aspirin"
    assert examples.truths == ("aspirin", "she", "no more")
    assert examples.take(np.array([1])).truths == ("she",)


@pytest.mark.parametrize(
    ("kind", "row", "message"),
    [
        ("text-tokens", ("took it", "O"), "row 2: 1 labels for 2 words"),
        ("text-tokens", ("took it", "O DOSE"), 'row 2: label "DOSE"'),
        ("text-answers", ("he took aspirin", "heparin"), 'row 2: the answer "heparin" is not in the text'),
        ("text-generation", ("ask:", " "), "row 2: no text"),
    ],
)
def test_a_truth_that_is_none_is_refused_by_its_row(
    kind: str, row: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    with pytest.raises(TableError, match=message):
        read(tmp_path, kind, [ROWS[kind][0], row])


def made(kind: str, folder: Path) -> tuple[TunableModel, RunPlan]:
    torch.manual_seed(7)
    model: Any
    if kind == "text-generation":
        model = kinds.LlamaForCausalLM(kinds.LlamaConfig(**SIZE, eos_token_id=2))
    else:
        model = kinds.BertModel(kinds.BertConfig(**SIZE), add_pooling_layer=False)
    model.save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: place for place, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    plan = RunPlan.model_validate(
        {
            "name": "structured",
            "backbone": {"source": f"path:{folder}", "sha256": fingerprint(f"path:{folder}", base=Path()).sha256},
            "task": {"kind": kind, "max_length": 40, **LABELS.get(kind, {})},
            "transfer": {"mode": "last-layers"},
            "training": {"rounds": 2, "learning_rate": 1.0},
            "privacy": {"target_epsilon": 8.0},
            "cohort": {"nominal_units": 10},
        }
    )
    assert plan.backbone is not None
    return load_tunable(find_backbone(plan.backbone, plan.task, base=Path()), plan), plan


def units_of(model: TunableModel, plan: RunPlan, examples: Examples, held: Any = None) -> TunedUnits:
    def bounded(rows: Any) -> Any:
        return bounded_units(
            rows, labels=examples.labels, names=examples.units, max_records=8, key=bytes(32), held=held
        )

    return tuned_units(bounded, lambda: np.zeros((len(examples), 1)), examples, model, plan)


@pytest.mark.parametrize("kind", ROWS)
def test_no_record_moves_the_sum_by_more_than_the_bound(kind: str, tmp_path: Path) -> None:
    model, plan = made(kind, tmp_path)
    examples = read(tmp_path, kind, ROWS[kind])
    noise = np.random.default_rng(2)
    start = model.initial().tensors
    adapter = Adapter(
        tensors={name: (one + noise.normal(size=one.shape)).astype(np.float32) for name, one in start.items()}
    )
    trained = trained_in(plan, 1, model.shapes)
    whole = units_of(model, plan, examples)
    every = np.ones(3, dtype=np.bool_)
    for bound in (1e-3, 0.1):
        total = clipped_tuned_sum(whole, adapter, trained, every, bound)
        for gone in range(3):
            without = clipped_tuned_sum(whole, adapter, trained, np.arange(3) != gone, bound)
            moved = float(np.linalg.norm(total - without))
            assert 0 < moved <= bound * (1 + 1e-6)


@pytest.mark.parametrize("kind", ROWS)
def test_an_evaluation_is_of_held_out_units_and_bounded(kind: str, tmp_path: Path) -> None:
    model, plan = made(kind, tmp_path)
    units = units_of(model, plan, read(tmp_path, kind, ROWS[kind]), held=np.array([False, True, True]))
    assert units.rows.held is not None
    norm = vector_norm(plan.task.form, len(plan.task.labels))
    mechanism = Mechanism(noise_multiplier=1.0, max_grad_norm=norm, unit=PrivacyUnit.RECORD)
    with model.at(model.initial()):
        update = outcome_update(units.rows.held, units, plan.task, mechanism, NoNoise(0, "a", 1))
    (points,) = update.points.values()
    assert 0 < np.linalg.norm(points.astype(np.float64)) * update.spacing <= 2 * norm * (1 + 1e-9)


@pytest.mark.parametrize("kind", ROWS)
def test_a_deployed_site_reads_its_own_table(kind: str, tmp_path: Path) -> None:
    model, plan = made(kind, tmp_path)
    write_table(tmp_path, kind, ROWS[kind])
    form = plan.task.form
    data: dict[str, Any] = {"table": "records.csv", "text": "text", "label": "truth", "form": form}
    if form == "answers":
        data["question"] = "question"
    if form == "tokens":
        data["labels"] = {"O": "O", "DRUG": "DRUG"}
    document = {
        "name": "Ulm",
        "data": data,
        "limits": {"epsilon_per_run": 9.0, "epsilon_lifetime": 9.0, "unit": "record"},
        "coordinator": {"url": "https://veil.example", "ca": "ca.pem"},
    }
    site = parse_site(document, tmp_path / "site.toml")
    records = SiteRecords(site, lambda backbone, task: find_backbone(backbone, task, base=Path()))
    units = records(plan)
    assert isinstance(units, TunedUnits)
    assert (units.count, units.truths) == (3, read(tmp_path, kind, ROWS[kind]).truths)
    assert records.model(plan).shapes == model.shapes
    assert (look(site).records, look(site).labels) == (3, {})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"transfer": {"mode": "head"}}, "tune more"),
        ({"training": {"centre": True}}, "leave it out"),
        ({"task": {"kind": "text-generation"}}, "name a rate"),
        ({"task": {"kind": "text-generation", "labels": ["a"]}}, "leave them out"),
        ({"task": {"kind": "text-tokens"}}, "name them"),
        ({"task": {"kind": "text-generation", "max_length": 16, "answer_length": 16}}, "leave room"),
        ({"cohort": {}}, "nominal_units"),
        ({"training": {"algorithm": "dp-fedavg"}}, "use dp-fedsgd"),
        ({"simulation": {**TABLE, "group": "sex"}}, "by group"),
        ({"simulation": {**TABLE, "partition": "dirichlet"}}, "divide them"),
        ({"simulation": {**TABLE, "baselines": ["head_only"]}}, "head alone"),
        ({"simulation": {**TABLE, "labels": {"1": "a"}}}, "label column holds none"),
        ({"simulation": {"path": "r.csv", "text": "t", "label": "l", "sites": 2}}, "have a question column"),
        ({"transfer": {"mode": "prompt"}, "task": {"kind": "image-detection", "labels": ["a"]}}, "for text"),
    ],
)
def test_what_cannot_work_is_refused_in_the_plan(changes: dict[str, Any], message: str) -> None:
    document = {
        "name": "structured",
        "backbone": {"source": "package:none", "sha256": "0" * 64},
        "task": {"kind": "text-answers"},
        "transfer": {"mode": "lora"},
        "privacy": {"target_epsilon": 8.0},
        "cohort": {"nominal_units": 10},
        **changes,
    }
    with pytest.raises((PlanError, ValueError), match=message):
        RunPlan.model_validate(document)
