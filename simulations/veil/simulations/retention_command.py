# SPDX-License-Identifier: Apache-2.0
"""`veil retention`: how much of what a pretrained model knew is still in the tuned one, by public records.

Promises that both models see the same records on the same processor, that figures of features stand beside what chance
gives, and that nothing is computed of a model whose head alone was tuned: below it, it is the pretrained one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from veil.client.examples import read_table
from veil.common.errors import InputError, RunError, TableError
from veil.common.plan import RunPlan
from veil.common.plan_sections import Task
from veil.common.retention import Perplexities, Retention, perplexities, retention
from veil.server.model import TunedModel

if TYPE_CHECKING:
    from veil.common.backbone import FrozenBackbone
    from veil.common.preprocessing import ModelInput, Reader

LEAST: Final = 3
"""Records below which nothing can be said."""

CAVEAT: Final = (
    "the records are taken to be public: such figures of private ones would be a release that no ledger accounts for"
)

Stage = Callable[[str, int], Callable[[int], None]]


@dataclass(frozen=True, kw_only=True, slots=True)
class FeaturesLeft:
    """A tuned model's features beside the pretrained one's.

    Attributes:
        same: each record's beside its own.
        chance: each record's beside another's; of the neighbours, nearest/(n - 1).
    """

    same: Retention
    chance: Retention


@dataclass(frozen=True, kw_only=True, slots=True)
class WordsLeft:
    """A tuned language model's losses beside the pretrained one's.

    Attributes:
        tokens: how many were predicted: of each text those after the first.
        perplexities: of both models.
    """

    tokens: int
    perplexities: Perplexities


@dataclass(frozen=True, kw_only=True, slots=True)
class Left:
    """What is left of a pretrained model.

    Attributes:
        plan: by which it was tuned.
        found: None where the head alone was tuned: all is left, and no record is read.
        records: how many were read.
        of: how many the table has.
    """

    plan: RunPlan
    found: FeaturesLeft | WordsLeft | None = None
    records: int = 0
    of: int = 0


def measure(model: TunedModel, table: Path, columns: Mapping[str, str | None], *, limit: int, stage: Stage) -> Left:
    """Compare a tuned model with the pretrained one in its folder.

    Args:
        model: the tuned model.
        table: of public records, .csv, .tsv or .parquet; paths in it are relative to its folder.
        columns: the input column by modality; None for one that is not named.
        limit: how many records to draw, at most, by the plan's seed.
        stage: opens a progress bar of a name and a length.

    Raises:
        InputError: for a model that has no features or losses to compare, or a column of what it does not read.
        TableError: the table or a record cannot be read, or there are too few.
        RunError: a model's features or losses are not numbers.
    """
    plan = model.plan
    column = _column(plan.task, columns)
    if model.backbone is None or not plan.transfer.deep:
        return Left(plan=plan)
    cells = _cells(table, column)
    drawn = [cells[place] for place in np.random.default_rng(plan.seed).permutation(len(cells))[:limit]]

    from veil.common.backbone import load_backbone

    frozen = load_backbone(model.backbone.pinned, plan.task, base=Path())
    if plan.task.form == "generation":
        found: FeaturesLeft | WordsLeft = _words_left(model, frozen, drawn, stage)
    else:
        records = drawn if plan.task.modality == "text" else [table.parent / cell.strip() for cell in drawn]
        found = _features_left(model, frozen, records, stage)
    return Left(plan=plan, found=found, records=len(drawn), of=len(cells))


def _column(task: Task, columns: Mapping[str, str | None]) -> str:
    """The input column, which is of the one kind that the model reads."""
    if task.modality == "tabular" or task.form == "detection":
        raise InputError(
            f'a model of task.kind = "{task.kind}"',
            "a model of texts, images or sounds that says classes, labels or a number, or labels of words, answers "
            "or how a text goes on",
            "numeric columns have no pretrained model; of a detector, compare the boxes of veil predict",
        )
    given = [name for name, column in columns.items() if column is not None]
    column = columns[task.modality]
    if column is None or len(given) > 1:
        raise InputError(
            " and ".join(f"--{name}" for name in given) or "no column",
            f"--{task.modality} and no other, as the model reads {task.modality}",
            f"name the column of the table that holds it: --{task.modality} COLUMN",
        )
    return column


def _cells(table: Path, column: str) -> list[str]:
    """A column of text or of paths, a row each."""
    values = read_table(table, [column])[column]
    cells = ["" if missing else str(cell) for cell, missing in zip(values, values.isna(), strict=True)]
    empty = [row for row, cell in enumerate(cells, 1) if not cell.strip()]
    if empty:
        raise TableError(
            f'{table}: column "{column}" is empty in row {empty[0]}; {len(empty)} such rows',
            "a value in every row",
            "fill them in or leave the rows out",
        )
    if len(cells) < LEAST:
        raise TableError(f"{table}: {len(cells)} records", f"at least {LEAST}, better 200", "add public records")
    return cells


def _features_left(
    model: TunedModel, frozen: FrozenBackbone, records: Sequence[str] | Sequence[Path], stage: Stage
) -> FeaturesLeft:
    from veil.common.tunable import TunableModel

    before = frozen.encode(records, advance=stage("pretrained model", len(records)))
    tuned = TunableModel(frozen, model.plan)  # which changes the network, so that the other has to be asked before
    with tuned.at(model.adapter):
        after = tuned.features(records, advance=stage("tuned model", len(records)))
    _check_finite(before, after)
    same, others = retention(before, after), retention(before, np.roll(after, 1, axis=0))
    chance = same.nearest / (same.records - 1)
    return FeaturesLeft(
        same=same,
        chance=Retention(
            records=same.records, cka=others.cka, cosine=others.cosine, neighbours=chance, nearest=same.nearest
        ),
    )


def _words_left(model: TunedModel, frozen: FrozenBackbone, texts: Sequence[str], stage: Stage) -> WordsLeft:
    from veil.common.tunable import TunableModel

    network, reader, _ = frozen.parts()
    before = _losses(lambda inputs: network(**inputs), reader, texts, stage("pretrained model", len(texts)))
    tuned = TunableModel(frozen, model.plan)  # as above
    with tuned.at(model.adapter):
        after = _losses(tuned, reader, texts, stage("tuned model", len(texts)))
    _check_finite(before, after)
    if len(before) < 2:
        raise TableError(f"texts with {len(before)} tokens to predict", "at least 2", "give longer texts")
    return WordsLeft(tokens=len(before), perplexities=perplexities(before, after))


def _losses(
    ask: Callable[[ModelInput], Any], reader: Reader, texts: Sequence[str], advance: Callable[[int], None]
) -> NDArray[np.float64]:
    """Cross-entropy of each text's tokens from the second on, nats, [tokens]."""
    import torch
    from torch.nn import functional

    found = []
    for text in texts:
        inputs = reader.read(text)
        with torch.no_grad():
            scores = ask(inputs).logits[0, :-1].double()
        found.append(functional.cross_entropy(scores, inputs["input_ids"][0, 1:], reduction="none").numpy())
        advance(1)
    return np.concatenate(found)


def _check_finite(before: NDArray[np.floating], after: NDArray[np.floating]) -> None:
    for name, numbers in (("pretrained", before), ("tuned", after)):
        if not np.isfinite(numbers).all():
            raise RunError(
                f"the {name} model gives features or losses that are not finite",
                "numbers",
                "look at the records, tune anew with a lower learning rate, or take another backbone",
            )


def document(left: Left) -> dict[str, Any]:
    """The JSON document."""
    found = left.found
    features = perplexity = None
    if isinstance(found, FeaturesLeft):
        chance = {name: getattr(found.chance, name) for name in ("cka", "cosine", "neighbours")}
        features = {**asdict(found.same), "by_chance": chance}
    elif isinstance(found, WordsLeft):
        perplexity = {**asdict(found.perplexities), "tokens": found.tokens}
    return {
        "plan": left.plan.name,
        "mode": left.plan.transfer.mode,
        "unchanged": found is None,
        "records": left.records,
        "of": left.of,
        "seed": left.plan.seed,
        "features": features,
        "perplexity": perplexity,
        "caveat": CAVEAT,
    }


def lines(left: Left) -> list[str]:
    """What a person reads."""
    plan, found = left.plan, left.found
    if found is None:
        return [
            f'{plan.name}: transfer.mode = "{plan.transfer.mode}" tunes a new output layer alone; the pretrained model '
            "below it is unchanged",
            "retention 1 by construction; nothing was computed and no record was read",
        ]
    told = _of_features(found) if isinstance(found, FeaturesLeft) else _of_words(found)
    return [
        f'{plan.name}: transfer.mode = "{plan.transfer.mode}"; {left.records} of {left.of} records, drawn by seed '
        f"{plan.seed}, before and after tuning",
        *told,
        CAVEAT,
    ]


def _of_features(found: FeaturesLeft) -> list[str]:
    same, chance = found.same, found.chance
    meanings = {
        "cka": "what the model tells apart, 0 to 1; 1: as before, but for rotation and scale (linear CKA)",
        "cosine": "where each record lies, -1 to 1; 1: a head made for the pretrained model would still fit",
        "neighbours": f"share of a record's {same.nearest} nearest that are still its nearest, 0 to 1",
    }
    return [
        f"{'':<10}  {'left':>6}  {'chance':>6}",
        *(
            f"{name:<10}  {getattr(same, name):>6.3f}  {getattr(chance, name):>6.3f}  {meaning}"
            for name, meaning in meanings.items()
        ),
        "1 is nothing forgotten; chance is nothing left: each record's features beside another's, of the neighbours "
        f"{same.nearest}/({same.records} - 1)",
        "a high CKA with a low cosine is a model that turned its features and still knows what it knew",
    ]


def _of_words(found: WordsLeft) -> list[str]:
    told = found.perplexities
    low, high = (float(told.ratio * np.exp(sign * 1.96 * told.standard_error)) for sign in (-1, 1))
    return [
        f"perplexity  {told.before:.4g} before, {told.after:.4g} after, of {found.tokens} tokens: among how many "
        "equally likely tokens the model hesitates",
        f"ratio       {told.ratio:.4f}, 95 % {low:.4f} to {high:.4f}, tokens taken as independent, which makes this "
        "too narrow",
        "1 is nothing forgotten, above 1 is forgotten; below 1 the model reads these texts better than before",
    ]
