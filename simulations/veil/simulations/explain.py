# SPDX-License-Identifier: Apache-2.0
"""Why a tuned model answers as it does: what each word, place or column adds to one answer's score; captum's only room.

Promises that the parts add up to the score's difference from a blank record's within `TOLERANCE`, or that the
explanation says that they do not; and that nothing is written and nothing leaves the process.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_right
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from veil.common.errors import InputError
from veil.common.head import CENTRE, INTERCEPT, WEIGHT, head_inputs
from veil.common.plan_sections import STRUCTURED
from veil.server.model import TunedModel

if TYPE_CHECKING:
    from torch import Tensor, nn

    from veil.common.preprocessing import TextReader
    from veil.common.tunable import TunableModel

CELLS: Final = 7
"""Rows and columns of the grid that an image is explained by."""

STEPS: Final = (32, 64, 128, 256)
"""Steps from the blank record to the record, tried in turn until the parts add up."""

TOLERANCE: Final = 0.02
"""How far the parts' sum may be from the difference they are to explain, as a part of it."""

LEAST: Final = 0.01
"""A gap up to which is none whatever the difference is, in units of the score."""

ORDERS: Final = 6
"""Random orders in which the cells of an image are filled in."""

_AT_ONCE = 4
"""Changed records that are computed at once; more are slower, as they leave the processor's cache."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Explanation:
    """One answer, explained: words and columns by integrated gradients (Sundararajan, Taly & Yan 2017), an image by
    Shapley values of its cells, sampled (Štrumbelj & Kononenko 2010), as the gradients of a network that folds are
    not to be trusted from cell to cell.

    Attributes:
        kind: what the parts are: words in their order, cells of a grid row by row, or columns.
        label: the answer that is explained.
        answer: the model's own number for it, as `TunedModel.predict` gives it.
        score: the label's logit; of one class among several, less the mean of the others', which for two classes is
            the log-odds.
        blank: the score of the blank record: every word replaced by padding, an image of the model's mean colour, or
            a row like the released mean.
        parts: names of the parts.
        added: what each part adds to the score, [parts].
        steps: of the path from the blank record, or orders in which cells were filled in; 0 where no path is needed.
        error: largest standard error of a cell, from the spread over the orders; 0 where nothing is sampled.
    """

    kind: Literal["words", "cells", "columns"]
    label: str
    answer: float
    score: float
    blank: float
    parts: tuple[str, ...]
    added: tuple[float, ...]
    steps: int
    error: float = 0.0

    @property
    def gap(self) -> float:
        """What the parts leave unexplained."""
        return self.score - self.blank - math.fsum(self.added)

    @property
    def complete(self) -> bool:
        """Whether the parts add up."""
        return adds_up(self.gap, self.score - self.blank)


def explain_inputs(
    model: TunedModel,
    records: tuple[str, ...] | tuple[Path, ...] | NDArray[np.float64],
    columns: tuple[str, ...] = (),
    label: str | None = None,
) -> list[Explanation]:
    """Explain each record's answer.

    Args:
        model: the tuned model.
        records: as `TunedModel.predict` takes them.
        columns: numeric features: their names.
        label: whose score is explained; each record's own answer where None.

    Raises:
        InputError: as `Explainer`.
        TableError: an image cannot be read.
    """
    explainer = Explainer(model, columns)
    return [explainer.explain(record, label) for record in records]


def adds_up(gap: float, difference: float) -> bool:
    """Whether a gap is within the tolerance of the difference that is explained."""
    return abs(gap) <= max(LEAST, TOLERANCE * abs(difference))


class Explainer:
    """Explains one tuned model's answers.

    Args:
        model: a tuned model.
        columns: numeric features: their names.

    Raises:
        InputError: for a model or a kind of record that it does not explain, or where captum is not installed.
    """

    def __init__(self, model: TunedModel, columns: tuple[str, ...] = ()) -> None:
        task, mode = model.plan.task, model.plan.transfer.mode
        if mode == "prompt" or task.modality == "audio" or task.form in STRUCTURED:
            raise InputError(
                f'a model of transfer.mode = "{mode}" and task.kind = "{task.kind}"',
                "classes, labels or a number told of text, image or tabular records, and another mode than prompt",
                "compare its answers with veil predict on records that you change by hand",
            )
        _require_captum()
        self._model, self._columns = model, columns
        self._parts, self._tuned = _network_of(model)

    def explain(self, record: str | Path | NDArray[np.float64], label: str | None = None) -> Explanation:
        """Explain one answer.

        Args:
            record: a text, an image's path, or one row of numbers, [d].
            label: whose score is explained; the model's own answer where None.

        Raises:
            InputError: for a label that the model does not know.
            TableError: the image cannot be read.
        """
        alone: Any = record[None] if isinstance(record, np.ndarray) else (record,)
        answers = self._model.predict(alone)[0]
        place = int(answers.argmax()) if label is None else self._place(label)
        told: dict[str, Any] = {"label": self._model.labels[place], "answer": float(answers[place])}
        direction = self._direction(place)
        if isinstance(record, np.ndarray):
            return self._columns_of(record, direction, told)
        from veil.common.backbone import one_thread_a_record

        tuned = self._tuned.at(self._model.adapter) if self._tuned else nullcontext()
        with one_thread_a_record(), tuned:  # more threads wait for each other: measured three times as slow
            if isinstance(record, Path):
                return self._cells_of(record, direction, told)
            return self._words_of(record, direction, told)

    def _place(self, label: str) -> int:
        if label not in self._model.labels:
            raise InputError(f"label {label}", f"one of {', '.join(self._model.labels)}", "give one of these")
        return self._model.labels.index(label)

    def _direction(self, place: int) -> NDArray[np.float64]:
        """The head's row of a label, less the mean of the other classes' rows where one excludes the others, [d + 1]"""
        weight = self._model.adapter.tensors[WEIGHT].astype(np.float64)
        own: NDArray[np.float64] = weight[place]
        if self._model.plan.task.form != "classification":
            return own
        return np.asarray(own - np.delete(weight, place, axis=0).mean(axis=0), dtype=np.float64)

    def _columns_of(
        self, record: NDArray[np.float64], direction: NDArray[np.float64], told: dict[str, Any]
    ) -> Explanation:
        """The score is linear in the head's input, so that gradient times input is exact along any path."""
        from captum.attr import InputXGradient
        from torch import from_numpy

        inputs = head_inputs(record[None], self._model.adapter.tensors[CENTRE])
        weights = from_numpy(direction)
        added = InputXGradient(lambda rows: rows @ weights).attribute(from_numpy(inputs).requires_grad_())
        shares: NDArray[np.float64] = added.detach().numpy()[0]
        names = self._columns or tuple(f"column {place + 1}" for place in range(len(record)))
        return Explanation(
            kind="columns",
            score=float(inputs[0] @ direction),
            blank=float(shares[-1]),
            parts=names,
            added=tuple(map(float, shares[:-1])),
            steps=0,
            **told,
        )

    def _words_of(self, text: str, direction: NDArray[np.float64], told: dict[str, Any]) -> Explanation:
        import torch

        network, reader, pooling = self._network()
        embed = network.get_input_embeddings()  # type: ignore[operator]  # transformers' own method
        said, spans = _spans_of(reader, text)
        with torch.no_grad():
            given, blank = embed(said["input_ids"]), embed(reader.blank(text)["input_ids"])
        there = said["attention_mask"]

        def score(embedded: Tensor) -> Tensor:
            batch = {"inputs_embeds": embedded, "attention_mask": there.expand(len(embedded), -1)}
            return self._score(pooling.pool(network(**batch), batch), direction)

        by_token, scores, steps = _integrated(score, given, blank)
        added = _by_word(by_token[0].sum(-1).tolist(), spans, text)
        return Explanation(
            kind="words",
            score=scores[0],
            blank=scores[1],
            parts=tuple(word for word, _ in added),
            added=tuple(share for _, share in added),
            steps=steps,
            **told,
        )

    def _cells_of(self, path: Path, direction: NDArray[np.float64], told: dict[str, Any]) -> Explanation:
        network, reader, pooling = self._network()
        given = reader.read(path)["pixel_values"]

        def score(pixels: Tensor) -> Tensor:
            batch = {"pixel_values": pixels}
            return self._score(pooling.pool(network(**batch), batch), direction)

        orders, scores = _filled_in(score, given)
        return Explanation(
            kind="cells",
            score=scores[0],
            blank=scores[1],
            parts=tuple(f"row {row}, column {column}" for row in range(1, CELLS + 1) for column in range(1, CELLS + 1)),
            added=tuple(orders.mean(axis=0).tolist()),
            steps=len(orders),
            error=float(orders.std(axis=0, ddof=1).max()) / math.sqrt(len(orders)),
            **told,
        )

    def _network(self) -> tuple[nn.Module, Any, Any]:
        if self._parts is None:
            raise InputError("a text or an image", "numeric features, as the model has no backbone", "give a table")
        return self._parts

    def _score(self, pooled: Tensor, direction: NDArray[np.float64]) -> Tensor:
        """The head on pooled features, [n, d] to [n], in a form that has gradients."""
        import torch

        centre = torch.from_numpy(self._model.adapter.tensors[CENTRE].astype(np.float64))
        weights = torch.from_numpy(direction)
        rows = _unit(_unit(pooled.double()) - centre)
        return (rows @ weights[:-1] + INTERCEPT * weights[-1]) / math.sqrt(1 + INTERCEPT**2)


def _network_of(model: TunedModel) -> tuple[tuple[nn.Module, Any, Any] | None, TunableModel | None]:
    """The network, its reader and its pooling, on the CPU; and, where more than the head is tuned, what puts the tuned
    tensors into it."""
    if model.backbone is None:
        return None, None
    frozen = model.backbone.another()
    network, reader, pooling = frozen.parts()
    parts = (network.cpu(), reader, pooling)
    if not model.plan.transfer.deep:
        return parts, None
    from veil.common.tunable import TunableModel

    return parts, TunableModel(frozen, model.plan)


def _require_captum() -> None:
    from importlib.util import find_spec

    if find_spec("captum") is None:
        raise InputError("captum is not installed", "what attributes answers", "python -m pip install captum==0.9.0")


def _unit(rows: Tensor) -> Tensor:
    """Rows scaled to length 1; a zero row stays zero."""
    lengths = rows.norm(dim=1, keepdim=True)
    directions: Tensor = rows / lengths.where(lengths > 0, lengths.new_ones(()))
    return directions


def _spans_of(reader: TextReader, text: str) -> tuple[dict[str, Tensor], list[tuple[int, int]]]:
    try:
        return reader.read(text), reader.spans(text)
    except NotImplementedError:
        raise InputError(
            "a tokenizer that does not say which characters a token stands for",
            "a fast tokenizer (tokenizer.json)",
            "add tokenizer.json beside the weights",
        ) from None


def _integrated(
    score: Callable[[Tensor], Tensor], given: Tensor, blank: Tensor
) -> tuple[Tensor, tuple[float, float], int]:
    """Attributions of `given` [1, …], the scores of it and of the blank record, and the number of steps."""
    import torch
    from captum.attr import IntegratedGradients

    with torch.no_grad():
        end, start = float(score(given)), float(score(blank))
    method, added, used = IntegratedGradients(score), torch.zeros_like(given), 0
    for used in STEPS:
        added = method.attribute(given, blank, n_steps=used, internal_batch_size=_AT_ONCE).detach()
        if adds_up(end - start - float(added.double().sum()), end - start):
            break
    return added, (end, start), used


def _by_word(tokens: list[float], spans: list[tuple[int, int]], text: str) -> list[tuple[str, float]]:
    """What the words that were read add, in their order; each token's share goes to the word of its first letter.

    Tokens that stand for no character are as in the blank record and add nothing.
    """
    words = list(re.finditer(r"\S+", text)) or list(re.finditer(r".+", text, re.DOTALL))
    starts = [word.start() for word in words]
    added: dict[int, float] = {}
    for share, (first, last) in zip(tokens, spans, strict=True):
        if first < last:
            letter = first + len(text[first:last]) - len(text[first:last].lstrip())
            place = max(0, bisect_right(starts, letter) - 1)
            added[place] = added.get(place, 0.0) + share
    return [(words[place].group(), share) for place, share in added.items()]


def _filled_in(score: Callable[[Tensor], Tensor], given: Tensor) -> tuple[NDArray[np.float64], tuple[float, float]]:
    """What each cell adds when the model's mean colour gives way to the image [1, 3, height, width] cell by cell, in
    random orders, the same in every process: [`ORDERS`, `CELLS`²]; and the scores of the image and of the colour."""
    import torch
    from captum.attr import ShapleyValueSampling

    blank, cells = torch.zeros_like(given), _cells(*given.shape[2:])
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        method, found = ShapleyValueSampling(score), []
        for _ in range(ORDERS):
            added = method.attribute(given, blank, feature_mask=cells, n_samples=1, perturbations_per_eval=_AT_ONCE)
            found.append(_by_cell(added[0, 0].double().numpy(), cells.numpy()))
        return np.array(found), (float(score(given)), float(score(blank)))


def _cells(height: int, width: int) -> Tensor:
    """Each pixel's cell of a coarse grid, row by row, [height, width]."""
    import torch

    rows, columns = torch.arange(height) * CELLS // height, torch.arange(width) * CELLS // width
    return rows[:, None] * CELLS + columns


def _by_cell(pixels: NDArray[np.float64], cells: NDArray[np.int64]) -> NDArray[np.float64]:
    """One value a cell, of pixels that all have their cell's; [height, width] to [`CELLS`²]."""
    return np.asarray(np.bincount(cells.ravel(), weights=pixels.ravel()) / np.bincount(cells.ravel()), dtype=np.float64)
