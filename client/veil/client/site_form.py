# SPDX-License-Identifier: Apache-2.0
"""A new site.toml out of an operator's answers, with a comment for every key.

Promises that the file says what was answered and nothing else: what was not answered stands in a comment.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, get_origin

from veil.client.site_file import SiteFile, parse_site
from veil.common.errors import InputError
from veil.common.plan_sections import Section

_HEAD = """\
# What this site allows, and where its records are. This file never leaves the site.
# Paths are relative to its folder. A line behind "# " shows a default or an example.
"""

_EXAMPLES: Mapping[str, Any] = {
    "text": "body",
    "text_template": "{age} years, {sex}",
    "image": "path",
    "audio": "path",
    "question": "asked",
    "features": ["age", "heart_rate"],
    "patient": "mrn",
    "group": "sex",
    "query": "SELECT body, label FROM reports",
    "password_file": "keys/database.password",
    "mirror": "weights",
    "max_memory_gb": 8.0,
    "labels": {"1": "adverse_event"},
    "groups": {"0": "women", "1": "men"},
    "values": {"sex": {"0": "woman", "1": "man"}},
    "missing_values": {"age": [-1]},
    "peers": {"st-elsewhere": "2c26b46b68ffc68ff99b453c1d30413413422d706483bfa0f98a5e886266e7ae"},
}
"""For keys whose default says nothing."""


def write_site_file(path: Path, answers: Mapping[str, Any]) -> SiteFile:
    """Write a new site.toml.

    Args:
        path: a file that does not exist yet; it gets mode 0600, as a URL in it may hold a password.
        answers: in the shape of the file: `{"name": …, "data": {"table": …, …}, "limits": {…}, "coordinator": {…}}`.

    Returns:
        what the file says.

    Raises:
        InputError: when the answers are no site's file, or the file is there already; nothing is written then.
    """
    site = parse_site(answers, path)
    limits = {"unit": site.limits.unit, **answers["limits"]}
    text = "\n".join([_HEAD, *_section(SiteFile, (), {**answers, "limits": limits})])
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise InputError(f"{path} exists", "no site file there yet", "edit it, or choose another folder") from None
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(text.rstrip("\n") + "\n")
    return site


def _section(kind: type[Section], where: tuple[str, ...], answers: Mapping[str, Any]) -> Iterator[str]:
    """The lines of one section: its own keys first, then those it shares with a plan, then the tables in it."""
    if where:
        yield _header(where)
    fields = sorted(kind.model_fields.items(), key=lambda item: item[0] not in kind.__annotations__)
    for key, field in fields:
        if not _is_table(field.annotation):
            default = _EXAMPLES.get(key, field.get_default(call_default_factory=True))
            yield f"# {field.description}"
            yield _line(key, answers.get(key), default)
    yield ""
    for key, field in fields:
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from _section(field.annotation, (*where, key), answers.get(key) or {})
        elif _is_table(field.annotation):
            yield f"# {field.description}"
            given = answers.get(key)
            yield from (("" if given else "# ") + line for line in _table((*where, key), given or _EXAMPLES[key]))
            yield ""


def _is_table(annotation: Any) -> bool:
    return get_origin(annotation) is dict or (isinstance(annotation, type) and issubclass(annotation, Section))


def _table(where: tuple[str, ...], items: Mapping[str, Any]) -> Iterator[str]:
    inner = {key: value for key, value in items.items() if isinstance(value, Mapping)}
    if not inner:
        yield _header(where)
        yield from (f"{_key(key)} = {_value(value)}" for key, value in items.items())
    for key, value in inner.items():
        yield from _table((*where, key), value)


def _line(key: str, given: Any, default: Any) -> str:
    return f"# {key} = {_value(default)}" if given is None else f"{key} = {_value(given)}"


def _header(where: Sequence[str]) -> str:
    return f"[{'.'.join(map(_key, where))}]"


def _key(name: str) -> str:
    bare = name.isascii() and name.replace("_", "").replace("-", "").isalnum()
    return name if bare else _value(name)


def _value(value: Any) -> str:
    """TOML of a text, number, truth value or list: JSON's form, but for the one control character JSON lets through."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_value, value))}]"
    plain = value.value if isinstance(value, Enum) else str(value) if isinstance(value, Path) else value
    return json.dumps(plain, ensure_ascii=False, allow_nan=False).replace("\x7f", "\\u007f")
