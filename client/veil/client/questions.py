# SPDX-License-Identifier: Apache-2.0
"""What `veil site init` still has to ask: the options that were given become answers in the shape of site.toml.

Promises to ask at a terminal only; elsewhere a missing answer is an error that names its option.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import typer

from veil.common.errors import InputError

Answers = dict[str, dict[str, Any]]
_INPUTS = ("text", "image", "audio", "features")
_LIMITS = {"epsilon_per_run": "Most ε of one run", "epsilon_lifetime": "Most ε for ever"}


def as_table(given: str | None) -> str | None:
    """A path from the shell starts where the shell is, one in site.toml where the file is."""
    return given if given is None or "://" in given else str(Path(given).absolute())


def as_map(pairs: list[str]) -> dict[str, str] | None:
    """RAW=LABEL, several times.

    Raises:
        InputError: for one without =.
    """
    if not all("=" in pair for pair in pairs):
        raise InputError(f"--map {' '.join(pairs)}", "RAW=LABEL", "write the raw label, =, and the plan's label")
    return dict(pair.split("=", 1) for pair in pairs) or None


def answered(given: Answers) -> Answers:
    """The options, and an answer for each that is needed and was not given.

    Args:
        given: data, limits and agent; None for what was not given.

    Raises:
        InputError: when an answer is not usable, or there is nobody to ask.
    """
    data, limits = given["data"], given["limits"]
    data["table"] = data["table"] or as_table(_ask("Table of the records (file or database URL)", "--table"))
    data["label"] = data["label"] or _ask("Column with the label", "--label")
    data["labels"] = data["labels"] or as_map(_ask_labels())
    if not any(data[kind] for kind in _INPUTS):
        kind, columns = _ask_input()
        data[kind] = columns
    for name, words in _LIMITS.items():
        if limits[name] is None:
            limits[name] = _number(_ask(words, f"--{name.replace('_', '-')}"), name)
    return {part: {key: value for key, value in one.items() if value is not None} for part, one in given.items()}


def _ask_labels() -> list[str]:
    said = _ask("What a plan calls each value of that column (1=ill, 0=well)", "--map")
    return [pair.strip() for pair in said.split(",")]


def _ask_input() -> tuple[str, str | list[str]]:
    kind = _ask(f"What are the records: {', '.join(_INPUTS)}", "--text, --image, --audio or --feature")
    if kind not in _INPUTS:
        raise InputError(f"records of kind {kind!r}", f"one of {', '.join(_INPUTS)}", "answer with one of them")
    columns = _ask("Column (several numeric ones separated by commas)", "--text, --image, --audio or --feature")
    return kind, [name.strip() for name in columns.split(",")] if kind == "features" else columns


def _ask(question: str, option: str) -> str:
    if not sys.stdin.isatty():
        raise InputError(f"nothing said about: {question}", f"the option {option}", "give it, or run at a terminal")
    return str(typer.prompt(question))


def _number(text: str, name: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise InputError(f"{name} = {text}", "a number", "answer with a number such as 4") from None
