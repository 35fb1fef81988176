# SPDX-License-Identifier: Apache-2.0
"""The documents say what the code says: keys, ranges, defaults, commands, errors, modules, paths and links."""

from __future__ import annotations

import ast
import functools
import os
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

import click
import pytest
import typer
from pydantic.fields import FieldInfo
from pydantic_core import to_jsonable_python

from veil.common import errors
from veil.common.plan import RunPlan, Section
from veil.simulations.cli import app

ROOT = Path(__file__).parents[1]
SOURCE_ROOTS = ("common", "client", "server", "simulations")
UNREAD = {"runs", "build", "dist", "shared"}
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
            heading = line.lstrip("# ").strip("`[]")
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
def reference() -> str:
    return (ROOT / "common" / "README.md").read_text(encoding="utf-8")


@functools.cache
def plan_rows() -> dict[str, Row]:
    """Dotted key → its row in common/README.md."""
    found: dict[str, Row] = {}
    for heading, rows in tables(reference()):
        for row in rows:
            if "key" in row:
                section = "" if heading == "Top level" else f"{heading}."
                key = section + row["key"].strip("`")
                assert key not in found, f"{key} stands twice"
                found[key] = row
    return found


def section_of(field: FieldInfo) -> type[Section] | None:
    """The section a field holds, also behind `| None`."""
    for kind in (field.annotation, *get_args(field.annotation)):
        if isinstance(kind, type) and issubclass(kind, Section):
            return kind
    return None


def plan_fields(model: type[Section] = RunPlan, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Dotted key and field of everything that a plan can say."""
    for name, field in model.model_fields.items():
        yield prefix + name, field
        if inner := section_of(field):
            yield from plan_fields(inner, f"{prefix}{name}.")


FIELDS = dict(plan_fields())


def test_the_plan_reference_has_every_key_and_no_other() -> None:
    assert set(plan_rows()) == set(FIELDS)
    assert len(FIELDS) > 45


@pytest.mark.parametrize("key", FIELDS)
def test_a_key_has_a_meaning_and_a_type(key: str) -> None:
    row = plan_rows()[key]
    assert len(row["meaning"]) > 10
    assert row["type and range"]


@pytest.mark.parametrize("key", [key for key in FIELDS if not section_of(FIELDS[key])])
def test_a_key_is_described_in_the_code(key: str) -> None:
    assert FIELDS[key].description, f"{key} has no Field(description=...) in plan.py"


@pytest.mark.parametrize("key", FIELDS)
def test_a_shown_default_is_the_code_s(key: str) -> None:
    field, shown = FIELDS[key], plan_rows()[key]["default"]
    if field.is_required():
        assert shown == "required"
        return
    default = field.get_default(call_default_factory=True)
    if default is None:
        assert shown == "none"
    elif isinstance(default, Section):
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


@pytest.mark.parametrize("key", [key for key in FIELDS if any(True for _ in bounds(FIELDS[key]))])
def test_a_shown_range_is_the_code_s(key: str) -> None:
    shown = plan_rows()[key]["type and range"]
    for words, value in bounds(FIELDS[key]):
        expected = words.format(re.escape(number(value)))
        assert re.search(rf"(?<![\d.])(?:{expected})(?![\d.])", shown), f"{key}: {shown!r} lacks {expected}"
    told = {float(one) for one in re.findall(r"(?<![\w^.-])\d+(?:\.\d+)?", shown.replace("2^63", ""))}
    assert told <= {float(value) for _, value in bounds(FIELDS[key])}, f"{key}: {shown!r} names a bound of its own"


def choices(annotation: Any) -> set[str]:
    """The words a key may have, where they are listed."""
    if get_origin(annotation) is Literal:
        return set(get_args(annotation))
    if get_origin(annotation) in (Union, UnionType, tuple):
        return set().union(*(choices(one) for one in get_args(annotation)))
    if isinstance(annotation, type) and issubclass(annotation, str) and annotation is not str:
        return {str(one) for one in getattr(annotation, "__members__", {}).values()}
    return set()


@pytest.mark.parametrize("key", [key for key in FIELDS if choices(FIELDS[key].annotation)])
def test_shown_choices_are_the_code_s(key: str) -> None:
    shown = set(re.findall(r'"([\w-]+)"', plan_rows()[key]["type and range"]))
    assert shown == choices(FIELDS[key].annotation)


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


def rows_by(column: str) -> dict[str, Row]:
    return {row[column].strip("`"): row for _, rows in tables(reference()) for row in rows if column in row}


def test_every_exception_stands_in_the_reference_with_its_exit_code() -> None:
    rows = rows_by("error")
    assert set(rows) == set(exception_classes())
    for name, row in rows.items():
        code = getattr(getattr(errors, name, None), "exit_code", "-")
        assert row["exit code"] == str(code), name


def test_every_refusal_code_stands_in_the_reference() -> None:
    shown = {code: row["name"].strip("`") for code, row in rows_by("code").items()}
    assert shown == {code.value: f"RefusalCode.{code.name}" for code in errors.RefusalCode}


def commands() -> dict[str, click.Command]:
    root = typer.main.get_command(app)
    assert isinstance(root, click.Group)
    return {f"veil {name}": command for name, command in root.commands.items()}


def words_of(command: click.Command) -> set[str]:
    """Every word of a command that a person types or fills in."""
    found: set[str] = set()
    for parameter in command.params:
        if isinstance(parameter, click.Argument):
            found.add(parameter.make_metavar(click.Context(command)).strip("[]"))
        elif "--help" not in parameter.opts:
            found |= {*parameter.opts, *parameter.secondary_opts}
    return found


def test_every_command_stands_in_the_reference_and_no_other() -> None:
    assert set(rows_by("command")) == set(commands())


@pytest.mark.parametrize("name", commands())
def test_every_argument_and_option_stands_in_its_command_s_row(name: str) -> None:
    shown = set(re.findall(r"`([^`]+)`", rows_by("command")[name]["words and options"]))
    words = words_of(commands()[name])
    assert words <= shown, f"not documented: {sorted(words - shown)}"
    assert {one for one in shown if one.startswith("-")} <= words, "an option that the command does not have"


@pytest.mark.parametrize("module", MODULES, ids=lambda one: str(one.relative_to(ROOT)))
def test_every_module_is_named_where_its_root_is_described(module: Path) -> None:
    root, _, package, *inside = module.relative_to(ROOT).parts
    texts = [(ROOT / name).read_text(encoding="utf-8") for name in ("ARCHITECTURE.md", f"{root}/README.md")]
    name = "/".join(inside)
    assert package == root
    assert any(re.search(rf"(?<![\w/]){re.escape(name)}", text) for text in texts), f"{name} is named nowhere"


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
