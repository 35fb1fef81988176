# SPDX-License-Identifier: Apache-2.0
"""Texts with a structure to token ids: words that are labelled, a question and its text, a prompt and how it goes on.

Promises that which characters a token stands for is the tokenizer's own word, and that what is cut off for length is
cut off by public numbers alone.
"""

from __future__ import annotations

import re
import threading
from pathlib import Path
from typing import Any, Final

from veil.common.plan_sections import Task
from veil.common.preprocessing import ModelInput, TextReader, unpadded
from veil.common.truths import question_and_text

Span = tuple[int, int]
"""Characters from the first up to the second."""

_WORD: Final = re.compile(r"\S+")


class _Locked(TextReader):
    """Tokenizers change with every other way of cutting, so one thread asks at a time."""

    def __init__(self, folder: Path, max_length: int) -> None:
        super().__init__(folder, max_length)
        if not self.tokenizer.is_fast:
            raise ValueError("a tokenizer that does not say which characters its tokens stand for")
        self._mutex = threading.Lock()

    def _ask(self, *texts: str, **options: Any) -> Any:
        with self._mutex:
            return self.tokenizer(*texts, **options)


class WordReader(_Locked):
    """Words with blanks between."""

    def words(self, record: str) -> tuple[ModelInput, list[int | None]]:
        """Tokens, and for each word the place of the first token that stands for any of it; None for one cut off."""
        told = self._ask(record, truncation=True, max_length=self.max_length, return_offsets_mapping=True)
        places: list[int | None] = []
        for word in _WORD.finditer(record):
            places.append(_first(told["offset_mapping"], word.start(), word.end()))
        return unpadded(told["input_ids"]), places


class QuestionReader(_Locked):
    """A question and a text, as `veil.common.truths.asked` joins them; the text is cut, and a question longer than half
    of `max_length`."""

    def question(self, record: str) -> tuple[ModelInput, list[Span | None]]:
        """Tokens of both, and for each token its characters of the text; None for one of anything else."""
        question, text = question_and_text(record)
        alone = self._ask(question, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        kept = alone[: self.max_length // 2]
        question = question[: kept[-1][1]] if kept else ""
        told = self._ask(
            question, text, truncation="only_second", max_length=self.max_length, return_offsets_mapping=True
        )
        spans = [
            (int(first), int(last)) if part == 1 and first < last else None
            for part, (first, last) in zip(told.sequence_ids(0), told["offset_mapping"], strict=True)
        ]
        return unpadded(told["input_ids"]), spans

    def places(self, record: str, answer: str, spans: list[Span | None]) -> Span:
        """First and last token of an answer's first place in the text; 0 and 0 where it is cut off."""
        start = self.text(record).find(answer)
        inside = [(0, 0) if span is None else span for span in spans]
        first, last = _first(inside, start, start + len(answer)), _last(inside, start, start + len(answer))
        if start < 0 or first is None or last is None or inside[last][1] < start + len(answer.rstrip()):
            return 0, 0
        return first, last

    @staticmethod
    def text(record: str) -> str:
        """The text that a question is on."""
        return question_and_text(record)[1]


class PromptReader(_Locked):
    """A text that goes on: what is written follows a blank, and ends with the tokenizer's own mark, if it has one."""

    def __init__(self, folder: Path, max_length: int, answer_length: int) -> None:
        super().__init__(folder, max_length)
        self._answer_length = answer_length
        self.end: int | None = self.tokenizer.eos_token_id

    def prompt(self, text: str) -> list[int]:
        """Its first tokens, so many that a continuation has room."""
        ids: list[int] = self._ask(text)["input_ids"]
        return ids[: self.max_length - self._answer_length] or [self.padding]

    def continuation(self, text: str) -> list[int]:
        """A continuation's tokens and the end, cut to `answer_length`."""
        ids: list[int] = self._ask(f" {text.strip()}", add_special_tokens=False)["input_ids"]
        return [*ids, *([] if self.end is None else [self.end])][: self._answer_length]

    def inputs(self, ids: list[int]) -> ModelInput:
        """Tokens as the model takes them."""
        return unpadded(ids)

    def written(self, ids: list[int]) -> str:
        """The text of tokens."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True)).strip()


def _first(spans: Any, start: int, end: int) -> int | None:
    """The first token that stands for any of some characters."""
    return next(iter(_standing(spans, start, end)), None)


def _last(spans: Any, start: int, end: int) -> int | None:
    return next(iter(_standing(spans, start, end)[::-1]), None)


def _standing(spans: Any, start: int, end: int) -> list[int]:
    return [place for place, (first, last) in enumerate(spans) if first < last and first < end and last > start]


def text_reader(task: Task, folder: Path) -> TextReader | None:
    """The way to read the texts of a task whose answers have a structure; None for any other task."""
    match task.form:
        case "tokens":
            return WordReader(folder, task.max_length)
        case "answers":
            return QuestionReader(folder, task.max_length)
        case "generation":
            return PromptReader(folder, task.max_length, task.answer_length)
    return None
