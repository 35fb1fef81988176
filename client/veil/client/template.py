# SPDX-License-Identifier: Apache-2.0
"""Clinical notes out of table rows: a `text_template` is parsed once and rendered for any number of rows.

Promises that a clause naming a missing value is left out whole, and that one record gives one text whether
its values came as ``1``, ``1.0`` or ``"1"``.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from string import Formatter
from typing import TYPE_CHECKING, TypeVar

from veil.common.errors import TableError
from veil.common.plan_sections import Columns

if TYPE_CHECKING:
    import pandas as pd

MISSING_WORDS = frozenset({"", "NA", "N/A", "NaN", "nan", "NaT", "NULL", "null", "None", "<NA>"})
"""Canonical cells that mean "no value", unless a mapping declares them to be one."""

_NUMBER = re.compile(r"[+-]?(0|[1-9][0-9]*)(\.[0-9]*)?")
_KINDS: dict[str, type] = {**dict.fromkeys("bdoxX", int), **dict.fromkeys("eEfFgGn%", float), "s": str}
_LISTED = 40

T = TypeVar("T")


def canonical(raw: object) -> str:
    """One text for all ways of writing a value: ``1``, ``1.0`` and ``"1.00"`` are all ``"1"``.

    Truth values become ``true`` or ``false``; a decimal number loses trailing zeros and a plus sign; a number
    with leading zeros is a code and stays as it is, and so does any other text, less the blanks around it.
    """
    text = str(raw).strip()
    if text.lower() in {"true", "false"}:
        return text.lower()
    number = _NUMBER.fullmatch(text)
    if number is None:
        return text
    whole, fraction = text.lstrip("+").partition(".")[0], (number[2] or "").rstrip("0").rstrip(".")
    return "0" if whole == "-0" and not fraction else whole + fraction


def canonical_keys(mapping: Mapping[str, T], where: str) -> dict[str, T]:
    """`mapping` with its raw values made canonical.

    Raises:
        TableError: when two ways of writing one value mean different things; `where` names the mapping.
    """
    found: dict[str, T] = {}
    for raw, target in mapping.items():
        if found.setdefault(canonical(raw), target) != target:
            value = f'{where}."{raw}" = "{target}" and elsewhere "{found[canonical(raw)]}"'
            raise TableError(value, "one meaning for a value, however it is written", "remove one of the two")
    return found


def require_columns(names: Iterable[str], available: Sequence[str], where: str) -> None:
    """Check that a table has the columns that are asked of it, each of them once.

    Args:
        names: the columns that are needed.
        available: the columns of the table, as its header has them.
        where: the table's name for the message.

    Raises:
        TableError: naming a column that is missing, what exists and the nearest name; or a column that the
            header has twice.
    """
    for name in names:
        if available.count(name) > 1:
            value = f'{where}: the header has column "{name}" {available.count(name)} times'
            raise TableError(value, "every column that is read once", "rename or remove the others")
        if name not in available:
            expectation = f"one of {_listed(available)}"
            raise TableError(f'{where}: no column "{name}"', expectation, _near(name, available))


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(f'"{name}"' for name in names[:_LISTED]) + more


def _near(name: str, available: Sequence[str]) -> str:
    folded = {one.casefold(): one for one in available}
    near = difflib.get_close_matches(name.casefold(), list(folded), n=1)
    return f'did you mean "{folded[near[0]]}"?' if near else "correct the name, or the table's header"


@dataclass(frozen=True, slots=True)
class Place:
    """One ``{column:FORMAT}`` of a template.

    Attributes:
        column: the column whose value goes there.
        spec: the format, ``""`` for the value's canonical text.
        words: canonical value → word, when the plan gives words for the column.
        missing: canonical values that mean "not known".
    """

    column: str
    spec: str
    words: Mapping[str, str] | None
    missing: frozenset[str]

    def render(self, cells: Iterable[object]) -> list[str | None]:
        """The text of every cell [n], None where the value is missing.

        Raises:
            TableError: for a value without a word, or not a number where the format needs one.
        """
        known: dict[str, str | None] = {}
        texts: list[str | None] = []
        for row, cell in enumerate(cells, start=1):
            key = canonical(cell)
            if key not in known:
                known[key] = self._text(key, row)
            texts.append(known[key])
        return texts

    def _text(self, key: str, row: int) -> str | None:
        if key in self.missing:
            return None
        if self.words is not None and key in self.words:
            return format(self.words[key], self.spec)
        if key in MISSING_WORDS:
            return None
        if self.words is not None:
            raise TableError(
                f'column "{self.column}", row {row}: no word for the value "{key}"',
                f"one of the values in values.{self.column}: {_listed(tuple(self.words))}",
                f"add it to values.{self.column}, or to missing_values.{self.column} if it means not known",
            )
        return self._formatted(key, row)

    def _formatted(self, key: str, row: int) -> str:
        kind = _KINDS[self.spec[-1]] if self.spec else str
        if kind is str:
            return format(key, self.spec)
        try:
            number = float(key)
            if math.isfinite(number) and (kind is float or number == int(number)):
                return format(int(number) if kind is int else number, self.spec)
        except ValueError:
            pass
        raise TableError(
            f'column "{self.column}", row {row}: the value "{key}"',
            f'a {"whole" if kind is int else "finite"} number for the format ":{self.spec}" in text_template',
            f"correct the table, drop the format, or add the value to missing_values.{self.column}",
        )


@dataclass(frozen=True, slots=True)
class Template:
    """A parsed `text_template`.

    Attributes:
        clauses: the parts between commas, each a row of literal texts and places.
    """

    clauses: tuple[tuple[str | Place, ...], ...]

    @classmethod
    def parse(cls, columns: Columns) -> Template:
        """Parse `columns.text_template` with its `values` and `missing_values`.

        Raises:
            TableError: for a template that names no column, or has an unbalanced brace, an attribute or index
                access, a conversion, a nested or wrong format; for words or missing values of a column that
                the template does not name.
        """
        clauses: list[list[str | Place]] = [[]]
        for literal, field, spec, conversion in _parsed(columns.text_template or ""):
            first, *others = literal.split(",")
            clauses[-1].append(first)
            clauses.extend([other] for other in others)
            if field is not None:
                clauses[-1].append(_place(field, spec or "", conversion, columns))
        template = cls(tuple(tuple(clause) for clause in clauses))
        template._check_named(columns)
        return template

    def _check_named(self, columns: Columns) -> None:
        if not self.columns:
            value = f'text_template = "{columns.text_template or ""}" names no column'
            raise TableError(value, "at least one {column} place", "put a column's name in braces")
        for key, mapping in (("values", columns.values), ("missing_values", columns.missing_values)):
            for column in mapping:
                if column not in self.columns:
                    value = f'{key}.{column}: text_template has no place "{{{column}}}"'
                    raise TableError(value, f"one of {_listed(self.columns)}", _near(column, self.columns))

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that are named, each once, in the order of the sentence."""
        named = [part.column for clause in self.clauses for part in clause if isinstance(part, Place)]
        return tuple(dict.fromkeys(named))

    def render(self, table: pd.DataFrame) -> tuple[str, ...]:
        """The text of every row.

        Args:
            table: n rows with at least `columns`, values raw.

        Returns:
            n texts; one is ``""`` when every clause of its row is left out.

        Raises:
            TableError: for a column that the table lacks, a value without a word, or one that is not a number
                where a format needs one (rows count from 1).
        """
        require_columns(self.columns, [str(name) for name in table.columns], "the table")
        cells = {name: table[name].tolist() for name in self.columns}
        clauses = [_clause_texts(clause, cells, len(table)) for clause in self.clauses]
        rows = zip(*clauses, strict=True)
        return tuple(",".join(text for text in row if text is not None).strip() for row in rows)


def _clause_texts(clause: tuple[str | Place, ...], cells: Mapping[str, list[object]], rows: int) -> list[str | None]:
    parts = [[part] * rows if isinstance(part, str) else part.render(cells[part.column]) for part in clause]
    return [None if None in row else "".join(map(str, row)) for row in zip(*parts, strict=True)]


def _parsed(template: str) -> list[tuple[str, str | None, str | None, str | None]]:
    try:
        return list(Formatter().parse(template))
    except ValueError as error:
        raise TableError(
            f'text_template = "{template}": {error}',
            "balanced braces around a column's name",
            "close the brace, or write {{ for a brace that is meant as text",
        ) from None


def _place(field: str, spec: str, conversion: str | None, columns: Columns) -> Place:
    words = columns.values.get(field)
    plain = field and not set(field) & set(".[]") and conversion is None
    if not plain or not _fits(spec, words):
        shown = field + (f"!{conversion}" if conversion else "") + (f":{spec}" if spec else "")
        raise TableError(
            f'text_template: the place "{{{shown}}}"',
            "{column} or {column:FORMAT}, the format ending in its type letter, such as :.0f, :d, :g or :s",
            "name a whole column (no . [ ] !), and for a column with words in values use no number format",
        )
    return Place(
        column=field,
        spec=spec,
        words=None if words is None else canonical_keys(words, f"values.{field}"),
        missing=frozenset(canonical(value) for value in columns.missing_values.get(field, ())),
    )


def _fits(spec: str, words: Mapping[str, str] | None) -> bool:
    kind = _KINDS.get(spec[-1]) if spec else str
    if kind is None or (words is not None and kind is not str):
        return False
    try:
        format(kind(), spec)
    except ValueError:
        return False
    return True
