# SPDX-License-Identifier: Apache-2.0
"""A pretrained model with a head whose upper part trains: scores of a record, and the gradient of one unit.

Promises that a unit's gradient is computed from that unit's records alone, one record at a time, so that it needs
nothing of Opacus' hooks and no module is out of their reach; and that what is frozen stays as it was.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from veil.common.backbone import FrozenBackbone, one_thread_a_record
from veil.common.errors import RefusalCode, RefusalError, RunError, TableError
from veil.common.frozen_prefix import ROOM_BYTES, FrozenPrefix, lowest_trained
from veil.common.head import CENTRE, INTERCEPT, WEIGHT
from veil.common.lazy_backbone import LazyBackbone
from veil.common.memory import READ_BYTES, Footprint, held_now, in_flight, size_of, weigh
from veil.common.plan import RunPlan
from veil.common.plan_sections import STRUCTURED
from veil.common.preprocessing import ModelInput
from veil.common.structured_quality import outcome_size
from veil.common.task_heads import Record, Truth, task_head
from veil.common.trained import released_size, trained_in
from veil.common.unfreezing import unfreeze
from veil.common.update import Adapter

_WINDOW = 8
"""Records whose answers are in memory at once."""

_Asked = TypeVar("_Asked")
_Said = TypeVar("_Said")

_CHANGE = 0.001
"""By how much a step along a gradient should change the loss, nats: far more than float32 rounds it."""

_AGREES = 0.1
"""How far the change may be from that, as part of it."""

_MADE_UP = ("made up",)
"""Key of the examination's record, which is no record's text or path."""

_STIRRED = 0.01
"""Standard deviation by which tensors that start at zero are moved for a look at the others' gradients."""


class TunableModel:
    """The model of a plan.

    Args:
        backbone: a pretrained model of its own, changed in place.
        plan: mode, task, public seed.

    Attributes:
        width: features of a record.
        read_room: what its records as it reads them should take in memory, at most, bytes.

    Raises:
        PlanError: when the mode does not fit the model.
    """

    def __init__(self, backbone: FrozenBackbone, plan: RunPlan) -> None:
        self._plan, self._held = plan, held_now()
        self._model, self._reader, self._pooling = backbone.parts()
        self._buffers = {name: one.clone() for name, one in self._model.named_buffers()}
        unfrozen = unfreeze(self._model, plan.transfer, seed=plan.seed)
        self._tuned, self._blocks, self._below = unfrozen.parameters, unfrozen.blocks, unfrozen.below
        self._start = {name: one.detach().numpy().copy() for name, one in self._tuned.items()}
        self._prefix = FrozenPrefix(self._blocks)
        self._task = task_head(plan.task, self._reader, self._pooling)
        self._head = nn.Parameter(torch.zeros(self._task.rows, backbone.width + 1))
        self._centre = torch.zeros(backbone.width)
        self._mutex = threading.RLock()
        self.width, self.read_room = backbone.width, READ_BYTES
        self._leave_out_unused()

    def initial(self) -> Adapter:
        """What training starts from: a zero head around a zero centre, and the pretrained or new tensors."""
        tensors = {name: self._start[name].copy() for name in self._tuned}
        head = np.zeros(self._head.shape, np.float32)
        return Adapter(tensors={WEIGHT: head, CENTRE: np.zeros(self.width, np.float32), **tensors})

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each tensor of the adapter."""
        tuned = {name: tuple(one.shape) for name, one in self._tuned.items()}
        return {WEIGHT: tuple(self._head.shape), CENTRE: (self.width,), **tuned}

    def record(self, told: str | Path, truth: Truth) -> Record:
        """A record as the model takes it.

        Raises:
            TableError: it cannot be read.
        """
        return self._task.record(told, truth)

    @contextmanager
    def at(self, adapter: Adapter, trained: Sequence[str] = ()) -> Iterator[None]:
        """The model with these tensors, for one thread's use at a time; those in `trained` have gradients inside.

        Raises:
            RefusalError: for an adapter of other tensors.
        """
        found = {name: tensor.shape for name, tensor in adapter.tensors.items()}
        if found != self.shapes:
            raise RefusalError(
                RefusalCode.MALFORMED,
                f"an adapter of {len(found)} tensors",
                f"the {len(self.shapes)} of transfer.mode = {self._plan.transfer.mode}, in their shapes",
                "the coordinator must send the plan's adapter",
            )
        with self._mutex, torch.no_grad():
            for name, one in self._tuned.items():
                one.copy_(torch.tensor(adapter.tensors[name]))
                one.requires_grad_(name in trained)
            self._head.copy_(torch.tensor(adapter.tensors[WEIGHT]))
            self._centre.copy_(torch.tensor(adapter.tensors[CENTRE]))
            chosen = [self._tuned[name] for name in trained or self._tuned]
            self._prefix.freeze(lowest_trained(self._blocks, chosen, self._below))
            with torch.enable_grad():
                yield

    def gradients(
        self, units: Iterator[Sequence[Record]], trained: Sequence[str]
    ) -> Iterator[tuple[Tensor, ...] | None]:
        """Each unit's gradient, in the order of the units; within `at` with the same `trained`.

        Args:
            units: each unit's records.
            trained: the tuned tensors that train.

        Yields:
            float32 tensors of the head and of the tuned tensors in order: the mean over the unit's records of the
            gradient of each one's loss; None for a unit without a record that can be read.
        """
        parameters = (self._head, *(self._tuned[name] for name in trained))
        most = in_flight(sum(one.numel() for one in parameters))
        with one_thread_a_record() as pool:
            yield from _in_order(pool, lambda unit: self._unit_gradient(unit, parameters), units, most)
        self._refuse_drift()

    def probabilities(
        self,
        inputs: Sequence[str] | Sequence[Path],
        *,
        advance: Callable[[int], None] | None = None,
        zero_unreadable: bool = False,
    ) -> NDArray[np.float64]:
        """What the model answers, within `at`, each number from 0 to 1, [n, labels]: see `veil.common.head.predict`.

        Args:
            inputs: texts or paths.
            advance: called after every record with 1.
            zero_unreadable: answer a record that cannot be read as a zero feature would be; for a site's release, where
                an error would tell of the record.

        Raises:
            TableError: a record cannot be read, without `zero_unreadable`.
        """
        answers = np.zeros((len(inputs), len(self._plan.task.labels)))
        say = self._answer_or_zero if zero_unreadable else self._answer
        for place, answer in enumerate(self._each(say, inputs, advance)):
            answers[place] = answer
        return answers

    def answers(
        self, inputs: Sequence[str] | Sequence[Path], *, advance: Callable[[int], None] | None = None
    ) -> list[dict[str, Any]]:
        """What the model answers where an answer has a structure, within `at`: an object a record, as JSON has it.

        Raises:
            TableError: a record cannot be read.
        """
        return list(self._each(self._answer, inputs, advance))

    def features(
        self, inputs: Sequence[str] | Sequence[Path], *, advance: Callable[[int], None] | None = None
    ) -> NDArray[np.float32]:
        """Each record's one row before the head, within `at`, [n, width]: what `FrozenBackbone.encode` gives of the
        pretrained model.

        Args:
            inputs: texts or paths.
            advance: called after every record with 1.

        Raises:
            TableError: a record cannot be read.
            ValueError: the form of task has no one row for a record.
        """
        if self._plan.task.form in STRUCTURED:
            raise ValueError(f"features of task.kind = {self._plan.task.kind}; expected a task of one answer a record")
        rows = np.zeros((len(inputs), self.width), np.float32)
        for place, row in enumerate(self._each(self._features_of, inputs, advance)):
            rows[place] = row
        return rows

    def outcomes(self, inputs: Sequence[str] | Sequence[Path], truths: Sequence[str]) -> NDArray[np.float64]:
        """How good such answers are, within `at`: a row a record, [n, m]; see `veil.common.structured_quality`."""
        found = list(self._each(self._outcome, list(zip(inputs, truths, strict=True)), None))
        return np.stack(found) if found else np.zeros((0, outcome_size(self._plan.task)))

    def _each(
        self, say: Callable[[Any], Any], asked: Sequence[Any], advance: Callable[[int], None] | None
    ) -> Iterator[Any]:
        """What is said of each record, in order."""
        with one_thread_a_record() as pool:
            for start in range(0, len(asked), _WINDOW):
                for said in pool.map(say, asked[start : start + _WINDOW]):
                    yield said
                    if advance is not None:
                        advance(1)

    def footprint(self) -> Footprint:
        """Sizes in the round in which most trains, counted on a made-up record of the greatest size."""
        trained = trained_in(self._plan, self._plan.training.rounds, self.shapes)
        record = self._made_up("weighed")
        with self.at(self.initial(), trained):
            kept, widest = weigh(self._model, lambda: self._loss(record))
        return Footprint(
            held=self._held,
            weights=size_of((*self._model.parameters(), *self._model.buffers())),
            adapter=sum(math.prod(shape) for shape in self.shapes.values()),
            released=released_size(self.shapes, trained),
            width=self.width,
            kept=kept,
            widest=widest,
            remembered=self._prefix.size_of(record.key),
            read=size_of((record.inputs or {}).values()),
        )

    def remember(self, most: int) -> None:
        """From now on what is remembered of records takes at most so many bytes."""
        self.read_room = min(READ_BYTES, most // 2)
        self._prefix.room = min(ROOM_BYTES, most - self.read_room)

    def examine(self) -> None:
        """Before any record is read: every tensor that is to train moves, gradients are what losses differ by, and what
        is remembered of frozen blocks is what they gave. On made-up records and a made-up head, which are forgotten.

        Raises:
            RunError: when it is not so.
        """
        adapter = self._stirred()
        for round_ in sorted({1, self._plan.training.rounds}):
            trained = trained_in(self._plan, round_, self.shapes)
            with self.at(adapter, trained), one_thread_a_record():
                self._examine(trained)
        self._refuse_drift()

    def _stirred(self) -> Adapter:
        """An adapter at which all that trains has a gradient: the head and what starts at zero moved away from it."""
        generator = np.random.default_rng(self._plan.seed)
        tensors = {}
        for name, one in self.initial().tensors.items():
            scale = 1.0 if name == WEIGHT else _STIRRED * float(name != CENTRE and not one.any())
            tensors[name] = one + generator.normal(size=one.shape).astype(np.float32) * np.float32(scale)
        return Adapter(tensors=tensors)

    def _made_up(self, key: Hashable = None) -> Record:
        """A record of the greatest size; pictures and sounds of noise, as black and silence leave modules at rest."""
        generator, largest = torch.Generator().manual_seed(0), self._task.largest()
        inputs = {
            name: torch.randn(one.shape, generator=generator) if one.is_floating_point() else one
            for name, one in (largest.inputs or {}).items()
        }
        return Record(inputs=inputs, target=largest.target, key=key)

    def _leave_out_unused(self) -> None:
        """Tensors that no answer depends on (a pooler beside the mean, gates that are always open) do not train: they
        would carry noise and nothing else."""
        names = tuple(self._tuned)
        with self.at(self._stirred(), names), one_thread_a_record():
            found = self._unit_gradient([self._made_up()], (self._head, *self._tuned.values()))
        used = [name for name, one in zip(names, (found or ())[1:], strict=True) if one.any()]
        for name in set(names) - set(used):
            self._tuned[name].requires_grad_(False)
        self._tuned = {name: self._tuned[name] for name in used}
        if not used:
            raise _unsound("no tensor below the head that an answer depends on")

    def _examine(self, trained: Sequence[str]) -> None:
        parameters = (self._head, *(self._tuned[name] for name in trained))
        record = self._made_up(_MADE_UP)
        looks = [self._unit_gradient([one], parameters) for one in (record, record, self._made_up())]
        for name, *found in zip((WEIGHT, *trained), *(look or () for look in looks), strict=True):
            if not found[0].numel():  # a form of task without a head
                continue
            if not all(torch.equal(one, found[0]) for one in found[1:]):
                raise _unsound(f"the gradient of {name} differs from one look at a record to the next")
            if not (torch.isfinite(found[0]).all() and found[0].any()):
                raise _unsound(f"the gradient of {name} is zero or not finite")
        self._check_direction(record, parameters, looks[0] or ())

    def _check_direction(self, record: Record, parameters: Sequence[nn.Parameter], gradient: Sequence[Tensor]) -> None:
        """A step along the gradient changes the loss by the gradient's length times the step's."""
        squared = sum(float(torch.linalg.vector_norm(one, dtype=torch.float64)) ** 2 for one in gradient)
        before = [one.detach().clone() for one in parameters]
        losses = []
        with torch.no_grad():
            for sign in (0.5, -0.5):
                for one, start, slope in zip(parameters, before, gradient, strict=True):
                    one.copy_(start + slope * (sign * _CHANGE / squared))
                losses.append(float(self._loss(record)))
            for one, start in zip(parameters, before, strict=True):
                one.copy_(start)
        if not abs(losses[0] - losses[1] - _CHANGE) <= _AGREES * _CHANGE:
            raise _unsound(f"a step that should change the loss by {_CHANGE} changes it by {losses[0] - losses[1]:.4g}")

    def _unit_gradient(
        self, records: Sequence[Record], parameters: Sequence[nn.Parameter]
    ) -> tuple[Tensor, ...] | None:
        readable = [record for record in records if record.inputs is not None]
        total: tuple[Tensor, ...] | None = None
        for record in readable:
            with torch.enable_grad():
                loss = self._loss(record) / len(records)
            found = torch.autograd.grad(loss, parameters, allow_unused=True)
            parts = tuple(
                torch.zeros_like(parameter) if one is None else one.contiguous()
                for one, parameter in zip(found, parameters, strict=True)
            )
            total = parts if total is None else tuple(a + b for a, b in zip(total, parts, strict=True))
        return total

    def _loss(self, record: Record) -> Tensor:
        with self._prefix.record(record.key):
            return self._task.loss(self, record)

    def _answer(self, told: str | Path) -> Any:
        with torch.no_grad(), self._prefix.record(told if self._task.rows else None):
            return self._task.answer(self, told)

    def _answer_or_zero(self, told: str | Path) -> Any:
        try:
            return self._answer(told)
        except TableError:
            return self._task.unread(self)

    def _features_of(self, told: str | Path) -> NDArray[np.float32]:
        inputs = self._reader.read(told)
        with torch.no_grad():
            row: NDArray[np.float32] = self._pooling.pool(self(inputs), inputs)[0].numpy()
        return row

    def _outcome(self, asked: tuple[str | Path, str]) -> NDArray[np.float64]:
        try:
            with torch.no_grad(), self._prefix.record(asked[0] if self._task.rows else asked):
                return self._task.outcome(self, *asked)
        except TableError:
            return np.zeros(outcome_size(self._plan.task))

    def score(self, rows: Tensor) -> Tensor:
        """The head's scores of features, [n, d] to [n, rows]: `veil.common.head.head_inputs` and the head, in torch."""
        rows = _unit(_unit(rows) - self._centre)
        constant = torch.full((len(rows), 1), INTERCEPT)
        scores: Tensor = torch.cat([rows, constant], dim=1) / (1 + INTERCEPT**2) ** 0.5 @ self._head.T
        return scores

    def __call__(self, inputs: ModelInput, **options: Any) -> Any:
        """The model's output for one record, of its own tokens alone where others stand before them."""
        prompt: Tensor | None = getattr(self._model, "veil_prompt", None)
        if prompt is None or "past_key_values" in options:
            return self._model(**inputs, **options)
        embedded = self._model.get_input_embeddings()(inputs["input_ids"])  # type: ignore[operator]  # transformers'
        mask = torch.ones(1, len(prompt) + embedded.shape[1], dtype=torch.int64)
        output = self._model(inputs_embeds=torch.cat([prompt[None], embedded], dim=1), attention_mask=mask, **options)
        rows = {name: output[name][:, len(prompt) :] for name in ("last_hidden_state", "logits") if name in output}
        return SimpleNamespace(**rows, past_key_values=output.get("past_key_values"))

    def _refuse_drift(self) -> None:
        for name, buffer in self._model.named_buffers():
            if name in self._buffers and not torch.equal(buffer, self._buffers[name]):
                raise _unsound(f"buffer {name} changed by computing gradients")


def _unit(rows: Tensor) -> Tensor:
    """Rows of length 1; a zero row stays zero."""
    norms = rows.norm(dim=1, keepdim=True)
    return rows / torch.where(norms > 0, norms, torch.ones_like(norms))


def _in_order(
    pool: ThreadPoolExecutor, work: Callable[[_Asked], _Said], asked: Iterable[_Asked], most: int
) -> Iterator[_Said]:
    """What comes of each, in order; no more than `most` are begun and not handed on."""
    begun: deque[Future[_Said]] = deque()
    for one in asked:
        begun.append(pool.submit(work, one))
        if len(begun) == most:
            yield begun.popleft().result()
    while begun:
        yield begun.popleft().result()


def _unsound(found: str) -> RunError:
    return RunError(found, "a model whose trainable part can be trained soundly", "choose another mode or backbone")


def load_tunable(backbone: LazyBackbone, plan: RunPlan) -> TunableModel:
    """The model of a plan.

    Args:
        backbone: where it is; the model it may hold itself stays as it is.
        plan: with a mode that tunes more than the head.

    Raises:
        WeightsError: as `load_backbone`.
        PlanError: when the mode does not fit the model.
    """
    return TunableModel(backbone.another(), plan)
