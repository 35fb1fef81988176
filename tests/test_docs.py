# SPDX-License-Identifier: Apache-2.0
"""The documents say what the code says: keys, ranges, defaults, commands, errors, modules, paths and links."""

from __future__ import annotations

import ast
import functools
import os
import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

import click
import pytest
import typer
from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import to_jsonable_python

from veil.client.site_file import SiteFile
from veil.client.wording import REFUSALS
from veil.common import errors
from veil.common.plan import RunPlan
from veil.common.plan_sections import Section
from veil.server.home import Settings
from veil.simulations.cli import app

ROOT = Path(__file__).parents[1]
SOURCE_ROOTS = ("common", "client", "server", "simulations")
UNREAD = {"runs", "build", "dist", "shared"}
COMMON, CLIENT, SERVER = "common/README.md", "client/README.md", "server/README.md"
MODULES = sorted(one for root in SOURCE_ROOTS for one in (ROOT / root / "veil").rglob("*.py"))

Row = dict[str, str]


def documents() -> list[Path]:
    """Every Markdown file of the repository."""
    found: list[Path] = []
    for folder, inside, files in os.walk(ROOT):
        inside[:] = [name for name in inside if not name.startswith(".") and name not in UNREAD]
        found += [(Path(folder) / name).relative_to(ROOT) for name in files if name.endswith(".md")]
    return sorted(found)


def prose(text: str) -> str:
    """A document without its code blocks."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)


def resolves(path: str, document: Path) -> bool:
    """Whether a path is there: from the root, from the document's folder, or from the package in it."""
    folder = (ROOT / document).parent
    package = folder / "veil" / folder.name
    if any((base / path).exists() for base in (ROOT, folder, package)):
        return True
    return path in nested_names()


@functools.cache
def nested_names() -> frozenset[str]:
    """What a module is called for short: `plan.py`, `privacy/accounting.py`."""
    return frozenset("/".join(one.parts[-depth:]) for one in MODULES for depth in (1, 2))


def tables(text: str) -> Iterator[tuple[str, list[Row]]]:
    """Every table with the heading it stands under."""
    heading, header, rows = "", [""], list[Row]()
    for line in [*text.splitlines(), ""]:
        if line.startswith("#"):
            heading = line.lstrip("# ")
        if not line.startswith("|"):
            if rows:
                yield heading, rows
            header, rows = [""], []
            continue
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if header == [""]:
            header = cells
        elif not set(line) <= set("|- :"):
            rows.append(dict(zip(header, cells, strict=True)))


@functools.cache
def text_of(document: str) -> str:
    return (ROOT / document).read_text(encoding="utf-8")


def rows_by(column: str, document: str) -> dict[str, Row]:
    """What stands in a column → its row, over all tables of a document that have that column."""
    found: dict[str, Row] = {}
    for heading, rows in tables(text_of(document)):
        section = re.fullmatch(r"`\[(.+)\]`", heading)
        for row in rows:
            if column in row:
                name = (f"{section[1]}." if section else "") + row[column].strip("`")
                assert name not in found, f"{name} stands twice in {document}"
                found[name] = row
    return found


FILES: dict[str, type[Section]] = {COMMON: RunPlan, CLIENT: SiteFile, SERVER: Settings}
"""The file whose keys a document lists."""


@dataclass(frozen=True, kw_only=True)
class Key:
    """A key of a TOML file, as the code has it."""

    document: str
    name: str
    field: FieldInfo
    required: bool

    def __str__(self) -> str:
        return f"{self.document.partition('/')[0]}:{self.name}"

    @property
    def row(self) -> Row:
        return rows_by("key", self.document)[self.name]


def section_of(field: FieldInfo) -> type[Section] | None:
    """The section a field holds, also behind `| None`."""
    for kind in (field.annotation, *get_args(field.annotation)):
        if isinstance(kind, type) and issubclass(kind, Section):
            return kind
    return None


def required(model: type[Section]) -> set[str]:
    """What a section cannot do without, as it says itself when it is given nothing."""
    try:
        model.model_validate({}, context={"folder": Path()})
    except ValidationError as error:
        return {str(one["loc"][0]) for one in error.errors() if one["type"] == "missing"}
    return set()


def keys_of(document: str, model: type[Section], prefix: str = "") -> Iterator[Key]:
    """Everything that a file can say, by its dotted key."""
    needed = required(model)
    for name, field in model.model_fields.items():
        yield Key(document=document, name=prefix + name, field=field, required=name in needed)
        if inner := section_of(field):
            yield from keys_of(document, inner, f"{prefix}{name}.")


KEYS = [key for document, model in FILES.items() for key in keys_of(document, model)]


@pytest.mark.parametrize(("document", "least"), [(COMMON, 50), (CLIENT, 35), (SERVER, 8)])
def test_a_reference_has_every_key_and_no_other(document: str, least: int) -> None:
    known = {key.name for key in KEYS if key.document == document}
    assert set(rows_by("key", document)) == known
    assert len(known) >= least


@pytest.mark.parametrize("key", KEYS, ids=str)
def test_a_key_has_a_meaning_and_a_type(key: Key) -> None:
    assert len(key.row["meaning"]) > 10
    assert key.row["type and range"]


@pytest.mark.parametrize("key", [key for key in KEYS if not section_of(key.field)], ids=str)
def test_a_key_is_described_in_the_code(key: Key) -> None:
    assert key.field.description, f"{key} has no Field(description=...)"


@pytest.mark.parametrize("key", KEYS, ids=str)
def test_a_shown_default_is_the_code_s(key: Key) -> None:
    shown = key.row["default"]
    default = key.field.get_default(call_default_factory=True)
    if key.required:
        assert shown == "required"
    elif default is None:
        assert shown == "none"
    elif section_of(key.field):
        assert shown == "its defaults"
    else:
        assert shown.startswith("`")
        (value,) = tomllib.loads(f"x = {shown.strip('`')}").values()
        plain = to_jsonable_python(default)
        assert (value, type(value)) == (plain, type(plain))


def bounds(field: FieldInfo) -> Iterator[tuple[str, float]]:
    """Each bound of a number with the words that announce it."""
    for limit in field.metadata:
        for name, words in (("ge", "{0}|at least {0}"), ("gt", "above {0}"), ("le", "to {0}|at most {0}")):
            if (value := getattr(limit, name, None)) is not None:
                yield words, value
        if (value := getattr(limit, "lt", None)) is not None:
            yield "below {0}", value


def number(value: float) -> str:
    return "2^63" if value == 2**63 else f"{value:.0f}" if value == int(value) else f"{value:g}"


@pytest.mark.parametrize("key", [key for key in KEYS if any(True for _ in bounds(key.field))], ids=str)
def test_a_shown_range_is_the_code_s(key: Key) -> None:
    shown = key.row["type and range"]
    for words, value in bounds(key.field):
        expected = words.format(re.escape(number(value)))
        assert re.search(rf"(?<![\d.])(?:{expected})(?![\d.])", shown), f"{key}: {shown!r} lacks {expected}"
    told = {float(one) for one in re.findall(r"(?<![\w^.-])\d+(?:\.\d+)?", shown.replace("2^63", ""))}
    assert told <= {float(value) for _, value in bounds(key.field)}, f"{key}: {shown!r} names a bound of its own"


def choices(annotation: Any) -> set[str | int]:
    """The words or numbers a key may have, where they are listed."""
    if get_origin(annotation) is Literal:
        return set(get_args(annotation))
    if get_origin(annotation) in (Union, UnionType, tuple):
        return set().union(*(choices(one) for one in get_args(annotation)))
    if isinstance(annotation, type) and issubclass(annotation, str) and annotation is not str:
        return {str(one) for one in getattr(annotation, "__members__", {}).values()}
    return set()


@pytest.mark.parametrize("key", [key for key in KEYS if choices(key.field.annotation)], ids=str)
def test_shown_choices_are_the_code_s(key: Key) -> None:
    cell = key.row["type and range"]
    shown = set(re.findall(r'"([\w-]+)"', cell)) | {int(one) for one in re.findall(r"`(\d+)`", cell)}
    assert shown == choices(key.field.annotation)


def exception_classes() -> dict[str, str]:
    """Name → module of every exception class that the sources define."""
    found = {}
    for module in MODULES:
        for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                bases = [ast.unparse(base).rpartition(".")[2] for base in node.bases]
                if any(base.endswith(("Error", "Exception")) for base in bases):
                    found[node.name] = module.name
    return found


def test_every_exception_stands_in_the_reference_with_its_exit_code() -> None:
    rows = rows_by("error", COMMON)
    assert set(rows) == set(exception_classes())
    for name, row in rows.items():
        code = getattr(getattr(errors, name, None), "exit_code", "-")
        assert row["exit code"] == str(code), name


def test_every_refusal_code_stands_in_the_reference_and_no_other() -> None:
    assert set(rows_by("code", CLIENT)) == set(errors.RefusalCode) == set(REFUSALS)


@pytest.mark.parametrize("code", errors.RefusalCode)
def test_a_refusal_is_told_in_the_words_of_the_screen(code: errors.RefusalCode) -> None:
    row, words = rows_by("code", CLIENT)[code], REFUSALS[code]
    assert (row["meaning"].replace("`", ""), row["remedy"].replace("`", "")) == (words.meaning, words.remedy)


def leaves(command: click.Command, name: str) -> Iterator[tuple[str, click.Command]]:
    """Every command that does something, by all its words."""
    if not isinstance(command, click.Group):
        yield name, command
        return
    for word, inner in command.commands.items():
        yield from leaves(inner, f"{name} {word}")


COMMANDS = dict(leaves(typer.main.get_command(app), "veil"))


def document_of(command: str) -> str:
    """Where a command is described: with the side whose operator types it."""
    return {"site": CLIENT, "coordinator": SERVER}.get(command.split()[1], COMMON)


def words_of(command: click.Command) -> set[str]:
    """Every word of a command that a person types or fills in."""
    found: set[str] = set()
    for parameter in command.params:
        if isinstance(parameter, click.Argument):
            found.add(parameter.make_metavar(click.Context(command)).strip("[]"))
        elif "--help" not in parameter.opts:
            found |= {*parameter.opts, *parameter.secondary_opts}
    return found


def options_of(command: click.Command) -> list[click.Option]:
    return [one for one in command.params if isinstance(one, click.Option)]


def words_shown(name: str) -> str:
    return rows_by("command", document_of(name))[name]["words and options"]


@pytest.mark.parametrize("document", [COMMON, CLIENT, SERVER])
def test_every_command_stands_in_its_reference_and_no_other(document: str) -> None:
    assert set(rows_by("command", document)) == {name for name in COMMANDS if document_of(name) == document}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_argument_and_option_stands_in_its_command_s_row(name: str) -> None:
    shown = set(re.findall(r"`([^`]+)`", words_shown(name)))
    words = words_of(COMMANDS[name])
    assert words <= shown, f"not documented: {sorted(words - shown)}"
    assert {one for one in shown if one.startswith("-")} <= words, "an option that the command does not have"


@pytest.mark.parametrize("name", COMMANDS)
def test_the_shown_defaults_of_a_command_are_the_code_s(name: str) -> None:
    own = [one for one in options_of(COMMANDS[name]) if not one.envvar and not one.is_flag and not one.required]
    assert set(re.findall(r"default `([^`]+)`", words_shown(name))) == {str(one.default) for one in own if one.default}
    for flag in options_of(COMMANDS[name]):
        if flag.secondary_opts:
            usual = flag.opts[0] if flag.default else flag.secondary_opts[0]
            assert re.findall(rf"`({'|'.join((*flag.opts, *flag.secondary_opts))})` \(default", words_shown(name)) == [
                usual
            ]


@pytest.mark.parametrize("name", [name for name in COMMANDS if any(one.envvar for one in options_of(COMMANDS[name]))])
def test_an_option_from_the_environment_is_told_above_its_table_with_its_default(name: str) -> None:
    for option in options_of(COMMANDS[name]):
        if option.envvar:
            told = f"default `{option.default}`, or what `{option.envvar}` says"
            assert told in prose(text_of(document_of(name))).replace("\n", " ")


@pytest.mark.parametrize("module", MODULES, ids=lambda one: str(one.relative_to(ROOT)))
def test_every_module_is_named_where_its_root_is_described(module: Path) -> None:
    root, _, package, *inside = module.relative_to(ROOT).parts
    assert package == root
    assert f"`{'/'.join(inside)}`" in text_of(f"{root}/README.md")


def links(text: str) -> list[str]:
    """Targets of a document's links that point into the repository."""
    targets = re.findall(r"\]\(([^)\s]+)\)", prose(text))
    return [one for one in targets if not re.match(r"[a-z]+:", one)]


def anchors(text: str) -> set[str]:
    """What a document's headings are called in a link."""
    headings = re.findall(r"^#+ (.+)$", prose(text), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", one.lower()).strip().replace(" ", "-") for one in headings}


@pytest.mark.parametrize("document", documents(), ids=str)
def test_every_relative_link_leads_somewhere(document: Path) -> None:
    for target in links((ROOT / document).read_text(encoding="utf-8")):
        path, _, anchor = target.partition("#")
        file = (ROOT / document).parent / path if path else ROOT / document
        assert file.exists(), f"{document} links to {target}, which is not there"
        if anchor:
            assert anchor in anchors(file.read_text(encoding="utf-8")), f"{document}: no heading for {target}"


@pytest.mark.parametrize("document", documents(), ids=str)
def test_no_document_names_a_file_that_is_not_there(document: Path) -> None:
    named = re.findall(r"`([\w./-]+\.(?:py|md))`", prose((ROOT / document).read_text(encoding="utf-8")))
    absent = [path for path in named if not resolves(path, document)]
    assert not absent, f"{document} names {absent}"


def test_documents_are_found_and_read() -> None:
    assert {"README.md", "PRIVACY.md", "common/README.md"} <= {str(one) for one in documents()}
    assert not resolves("tests/common/test_nothing.py", Path("PRIVACY.md"))
    assert not resolves("nothing.py", Path("PRIVACY.md"))
    assert "nowhere.md" in links("see [this](nowhere.md)\n")
