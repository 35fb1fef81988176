# SPDX-License-Identifier: Apache-2.0
"""What a task asks of one record on a model that is tuned below its head: how it is read, its loss, its answer.

Promises that a record's loss looks at that record alone, and that each form of task is one class behind one Protocol.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, Final, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from veil.common.backbone import Pooling
from veil.common.boxes import box_loss, found_shares, seen, targets_of
from veil.common.plan_sections import Task
from veil.common.preprocessing import ModelInput, Reader
from veil.common.structured_quality import TOKEN_LOSS_CAP, answer_shares, word_outcome
from veil.common.text_reading import PromptReader, QuestionReader, WordReader
from veil.common.truths import Box, boxes_of, words_of

Truth = int | float | NDArray[np.float64] | str
"""A class, a number from 0 to 1, labels 0 or 1 [c], or what `veil.common.truths` made of a truth with a structure."""

IGNORED: Final = -100
"""Target of a place that no loss looks at."""

_LONGEST: Final = 30
"""Tokens of an answer, at most."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """One record as the model takes it.

    Attributes:
        inputs: what the model reads; None for a record that cannot be read, which counts as zero.
        target: what is right.
        key: by which its frozen part is remembered; None where it is not.
    """

    inputs: ModelInput | None
    target: Tensor
    key: Hashable = None


class Network(Protocol):
    """The model as a task sees it."""

    def __call__(self, inputs: ModelInput, **options: Any) -> Any:
        """transformers' output for one record, of its own tokens alone."""
        ...

    def score(self, rows: Tensor) -> Tensor:
        """The head's scores of features, [n, d] to [n, rows]."""
        ...


class TaskHead(Protocol):
    """One form of task.

    Attributes:
        rows: of the head's weight; 0 where the model brings its own head.
    """

    rows: int

    def record(self, told: Any, truth: Truth | None) -> Record:
        """A record as the model takes it; without truth, to be answered.

        Raises:
            TableError: it cannot be read.
        """
        ...

    def largest(self) -> Record:
        """A made-up record of the greatest size there can be, with a target."""
        ...

    def loss(self, network: Network, record: Record) -> Tensor:
        """Of one record, nats."""
        ...

    def answer(self, network: Network, told: Any) -> Any:
        """What the model says: numbers from 0 to 1, [c]; or what a form with a structure says, as JSON has it."""
        ...

    def unread(self, network: Network) -> Any:
        """What is said of a record that cannot be read."""
        ...

    def outcome(self, network: Network, told: Any, truth: str) -> NDArray[np.float64]:
        """How good the answer is, of forms with a structure: see `veil.common.structured_quality`; last its loss."""
        ...


class _Pooled:
    """One row of features a record: classes, labels each for itself, or a number."""

    def __init__(self, task: Task, reader: Reader, pooling: Pooling) -> None:
        self._form, self._reader, self._pooling = task.form, reader, pooling
        self.rows = len(task.labels)

    def record(self, told: Any, truth: Truth | None) -> Record:
        return Record(inputs=self._reader.read(told), target=self._target(truth), key=told)

    def largest(self) -> Record:
        return Record(inputs=self._reader.largest(), target=self._target(None))

    def loss(self, network: Network, record: Record) -> Tensor:
        scores = self._scores(network, record)
        if self._form == "classification":
            return functional.cross_entropy(scores, record.target[None])
        return functional.binary_cross_entropy_with_logits(scores[0], record.target, reduction="sum")

    def answer(self, network: Network, told: Any) -> NDArray[np.float64]:
        return self._chances(self._scores(network, self.record(told, None)))

    def unread(self, network: Network) -> NDArray[np.float64]:
        return self._chances(network.score(torch.zeros(1, self._pooling.width)))

    def outcome(self, network: Network, told: Any, truth: str) -> NDArray[np.float64]:
        raise NotImplementedError("an answer without a structure is judged by veil.common.evaluation_forms")

    def _chances(self, scores: Tensor) -> NDArray[np.float64]:
        """Answers from scores [1, c], each from 0 to 1, [c]."""
        sure = scores.detach().double()
        found = torch.softmax(sure, dim=1) if self._form == "classification" else torch.sigmoid(sure)
        return np.asarray(found[0].numpy(), dtype=np.float64)

    def _scores(self, network: Network, record: Record) -> Tensor:
        inputs = record.inputs or {}
        return network.score(self._pooling.pool(network(inputs), inputs))

    def _target(self, truth: Truth | None) -> Tensor:
        """A class, or numbers from 0 to 1, [rows]; of a record to be answered, any."""
        if self._form == "classification":
            return torch.tensor(0 if truth is None else int(np.asarray(truth)))
        numbers = np.zeros(self.rows) if truth is None else np.asarray(truth)
        return torch.tensor(numbers.reshape(self.rows), dtype=torch.float32)


class _Text:
    """What is always read: a text is there or it is not."""

    def unread(self, network: Network) -> dict[str, Any]:
        return {}


class _Words(_Text):
    """A label for each word, read off its first token; words that `max_length` cuts off are not looked at."""

    def __init__(self, task: Task, reader: WordReader) -> None:
        self._reader, self._labels = reader, task.labels
        self.rows = len(task.labels)

    def record(self, told: str, truth: Truth | None) -> Record:
        inputs, first = self._reader.words(told)
        target = torch.full((inputs["input_ids"].shape[1],), IGNORED)
        for label, place in zip(words_of(str(truth or "")), first, strict=False):
            if place is not None:
                target[place] = label
        return Record(inputs=inputs, target=target, key=told)

    def largest(self) -> Record:
        inputs = self._reader.largest()
        return Record(inputs=inputs, target=torch.zeros(inputs["input_ids"].shape[1], dtype=torch.int64))

    def loss(self, network: Network, record: Record) -> Tensor:
        return _mean_loss(self._scores(network, record), record.target)

    def answer(self, network: Network, told: str) -> dict[str, Any]:
        said = self._said(network, told)
        return {"labels": [None if label is None else self._labels[label] for label in said]}

    def outcome(self, network: Network, told: str, truth: str) -> NDArray[np.float64]:
        record = self.record(told, truth)
        scores = self._scores(network, record)
        labelled = record.target != IGNORED
        loss = float(_mean_loss(scores, record.target))
        said = scores[labelled].argmax(dim=1).tolist()
        return word_outcome(said, record.target[labelled].tolist(), self.rows, loss)

    def _said(self, network: Network, told: str) -> list[int | None]:
        """A label's place for each word; None for one that was cut off."""
        _, first = self._reader.words(told)
        found = self._scores(network, self.record(told, None)).argmax(dim=1)
        return [None if place is None else int(found[place]) for place in first]

    def _scores(self, network: Network, record: Record) -> Tensor:
        """[tokens, labels]"""
        return network.score(network(record.inputs or {}).last_hidden_state[0])


class _Answer(_Text):
    """Where in a text a question's answer starts and ends (Devlin et al. 2019); the first token stands for nowhere."""

    def __init__(self, reader: QuestionReader) -> None:
        self._reader = reader
        self.rows = 2

    def record(self, told: str, truth: Truth | None) -> Record:
        inputs, spans = self._reader.question(told)
        places = (0, 0) if truth is None else self._reader.places(told, str(truth), spans)
        return Record(inputs=inputs, target=torch.tensor(places), key=told)

    def largest(self) -> Record:
        inputs = self._reader.largest()
        return Record(inputs=inputs, target=torch.tensor((1, 2)))

    def loss(self, network: Network, record: Record) -> Tensor:
        return functional.cross_entropy(self._scores(network, record), record.target)

    def answer(self, network: Network, told: str) -> dict[str, Any]:
        return {"answer": self._said(self._scores(network, self.record(told, None)), told)}

    def outcome(self, network: Network, told: str, truth: str) -> NDArray[np.float64]:
        record = self.record(told, truth)
        scores = self._scores(network, record)
        loss = float(functional.cross_entropy(scores, record.target))
        return np.array([*answer_shares(self._said(scores, told), truth), loss])

    def _said(self, scores: Tensor, told: str) -> str:
        """The characters between the likeliest start and end in the text, "" where nowhere is likelier."""
        _, spans = self._reader.question(told)
        inside = torch.tensor([span is not None for span in spans])
        both = scores[0][:, None] + scores[1][None]
        allowed = torch.ones_like(both).triu().tril(_LONGEST - 1).bool() & inside[:, None] & inside[None]
        if not allowed.any():
            return ""
        best = int(both.masked_fill(~allowed, -torch.inf).argmax())
        start, end = spans[best // len(spans)], spans[best % len(spans)]
        if start is None or end is None or both[0, 0] > both.flatten()[best]:
            return ""
        return self._reader.text(told)[start[0] : end[1]].strip()

    def _scores(self, network: Network, record: Record) -> Tensor:
        """[start and end, tokens]"""
        return network.score(network(record.inputs or {}).last_hidden_state[0]).T


class _Generation(_Text):
    """How a text goes on, token by token, by the model's own head over its vocabulary."""

    def __init__(self, task: Task, reader: PromptReader) -> None:
        self._reader, self._longest = reader, task.answer_length
        self.rows = 0

    def record(self, told: str, truth: Truth | None) -> Record:
        prompt = self._reader.prompt(told)
        going_on = [] if truth is None else self._reader.continuation(str(truth))
        target = [IGNORED] * (len(prompt) - 1) + going_on
        inputs = self._reader.inputs([*prompt, *going_on[:-1]])
        return Record(inputs=inputs, target=torch.tensor(target, dtype=torch.int64), key=(told, truth))

    def largest(self) -> Record:
        inputs = self._reader.largest()
        ids = inputs["input_ids"][0]
        target = torch.cat([ids[1:], ids[:1]])
        target[: -self._longest] = IGNORED
        return Record(inputs=inputs, target=target)

    def loss(self, network: Network, record: Record) -> Tensor:
        return _mean_loss(self._scores(network, record), record.target)

    def answer(self, network: Network, told: str) -> dict[str, Any]:
        """Greedy: the likeliest token each time, up to the end or `answer_length`."""
        ids = self._reader.prompt(told)
        output = network(self._reader.inputs(ids), use_cache=True)
        written: list[int] = []
        while len(written) < self._longest:
            token = int(output.logits[0, -1].argmax())
            if token == self._reader.end:
                break
            written.append(token)
            following = {"input_ids": torch.tensor([[token]])}
            output = network(following, past_key_values=output.past_key_values, use_cache=True)
        return {"text": self._reader.written(written)}

    def outcome(self, network: Network, told: str, truth: str) -> NDArray[np.float64]:
        record = self.record(told, truth)
        scores = self._scores(network, record)
        loss, place = float(_mean_loss(scores, record.target)), record.target != IGNORED
        right = scores[place].argmax(dim=1) == record.target[place]
        return np.array([int(right.sum()) / max(1, len(right)), loss / TOKEN_LOSS_CAP, loss])

    def _scores(self, network: Network, record: Record) -> Tensor:
        """[tokens, vocabulary]"""
        logits: Tensor = network(record.inputs or {}).logits
        return logits[0]


class _Detection:
    """Objects in an image: a label, or nothing, and a box for each of the model's detection tokens."""

    def __init__(self, task: Task, reader: Reader) -> None:
        self._reader, self._labels = reader, task.labels
        self.rows = len(task.labels) + 1

    def record(self, told: Any, truth: Truth | None) -> Record:
        boxes = () if truth is None else boxes_of(str(truth))
        return Record(inputs=self._reader.read(told), target=targets_of(boxes), key=told)

    def largest(self) -> Record:
        box = Box(label=0, sides=(0.25, 0.25, 0.75, 0.75))
        return Record(inputs=self._reader.largest(), target=targets_of((box,)))

    def loss(self, network: Network, record: Record) -> Tensor:
        return box_loss(*self._proposals(network, record), record.target)

    def answer(self, network: Network, told: Any) -> dict[str, Any]:
        said = seen(*self._proposals(network, self.record(told, None)))
        names = ("label", "probability", "box")
        return {"boxes": [dict(zip(names, (self._labels[one[0]], *one[1:]), strict=True)) for one in said]}

    def unread(self, network: Network) -> dict[str, Any]:
        return {"boxes": []}

    def outcome(self, network: Network, told: Any, truth: str) -> NDArray[np.float64]:
        record = self.record(told, truth)
        scores, proposed = self._proposals(network, record)
        loss = float(box_loss(scores, proposed, record.target))
        return np.array([*found_shares(seen(scores, proposed), boxes_of(truth)), loss])

    def _proposals(self, network: Network, record: Record) -> tuple[Tensor, Tensor]:
        """Scores [n, labels + 1], and centre, width and height of each box, [n, 4]."""
        output = network(record.inputs or {})
        proposed = output.pred_boxes[0]
        return network.score(output.last_hidden_state[0, -len(proposed) :]), proposed


def _mean_loss(scores: Tensor, target: Tensor) -> Tensor:
    """Mean cross-entropy of the places that count; 0 where none does, as of a record whose words are all cut off."""
    if not (target != IGNORED).any():
        return scores.sum() * 0.0
    return functional.cross_entropy(scores, target, ignore_index=IGNORED)


def task_head(task: Task, reader: Reader, pooling: Pooling) -> TaskHead:
    """The class of a task's form."""
    match task.form, reader:
        case "tokens", WordReader():
            return _Words(task, reader)
        case "answers", QuestionReader():
            return _Answer(reader)
        case "generation", PromptReader():
            return _Generation(task, reader)
    if task.form == "detection":
        return _Detection(task, reader)
    return _Pooled(task, reader, pooling)
