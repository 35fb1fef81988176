# SPDX-License-Identifier: Apache-2.0
"""Tests of `veil.client.site_form`: what is written parses again to what was answered."""

from __future__ import annotations

import copy
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from veil.client.site_file import SiteFile, parse_site, read_site_file
from veil.client.site_form import write_site_file
from veil.common.errors import InputError
from veil.common.plan_sections import Section

SMALL: dict[str, Any] = {
    "name": "Ulm",
    "data": {"table": "reports.csv", "text": "body", "label": "adverse", "labels": {"1": "yes"}},
    "limits": {"epsilon_per_run": 4.0, "epsilon_lifetime": 8.0},
    "coordinator": {"url": "https://veil.example:9300", "ca": "ca.pem"},
}
NASTY = 'a "b" \\ c\n\t\x7f\x01 # é 😀'
FULL: list[dict[str, Any]] = [
    {
        "name": NASTY,
        "data": {
            "table": "a\\b.parquet",
            "text_template": "{age} years, {sex}",
            "values": {"sex": {"0": "woman", "1.0": NASTY}, "a.b": {NASTY: "x"}},
            "missing_values": {"age": [-1, 2.5, "?", True]},
            "label": "adverse",
            "form": "multilabel",
            "labels": {"1": "yes", NASTY: "no", "": "none"},
            "patient": "mrn",
            "group": "sex",
            "groups": {"0": "women", NASTY: "men"},
        },
        "limits": {
            "epsilon_per_run": 1e-3,
            "epsilon_lifetime": 8,
            "delta": 1e-7,
            "unit": "record",
            "max_records_per_patient": 3,
            "release_counts": True,
            "approval": "auto-within-limits",
            "licences": ["Apache-2.0", "MIT"],
            "accept_backbone": False,
            "min_cohort": 5,
            "colluding_of_ten": 1,
        },
        "peers": {"Bonn": "0" * 64, f"{NASTY}!": "f" * 64},
        "coordinator": {"url": "https://veil.example", "ca": "/etc/ca.pem"},
        "agent": {
            "state": "here",
            "key": "k",
            "anchor": "a",
            "health_address": "",
            "metrics_address": "0.0.0.0:1",
            "round_timeout_s": 1.5,
            "mirror": "m",
            "cache_precision": "float16",
            "cache_max_gb": 0.5,
            "max_memory_gb": 2.5,
            "device": "cpu",
        },
    },
    {**SMALL, "data": {"table": "t.csv", "image": "path", "label": "l", "labels": {"l": "m"}}},
    {**SMALL, "data": {"table": "t.csv", "audio": "path", "label": "l", "labels": {"l": "m"}}},
    {**SMALL, "data": {"table": "t.csv", "text": "a", "question": "q", "form": "answers", "label": "l"}},
    {**SMALL, "data": {"table": "t.csv", "features": ["a", NASTY], "label": "l", "labels": {"l": "m"}}},
    {
        **SMALL,
        "data": {
            "table": "sqlite:///a.db",
            "query": "SELECT a, 'x' AS l\nFROM t WHERE b LIKE '%\"%'",
            "password_file": "p",
            "text": "a",
            "label": "l",
            "labels": {"l": "m"},
        },
    },
]


def keys(kind: type[Section] = SiteFile, prefix: str = "") -> dict[str, str]:
    """Dotted key → description, of every key but the sections."""
    found: dict[str, str] = {}
    for name, field in kind.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            found |= keys(field.annotation, f"{prefix}{name}.")
        else:
            found[prefix + name] = field.description or ""
    return found


def written(folder: Path, answers: dict[str, Any]) -> str:
    write_site_file(folder / "site.toml", answers)
    return (folder / "site.toml").read_text(encoding="utf-8")


@pytest.mark.parametrize("answers", [SMALL, *FULL])
def test_what_is_written_parses_again_to_the_same_values(answers: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "site.toml"
    before = copy.deepcopy(answers)
    returned = write_site_file(path, answers)
    assert answers == before
    assert read_site_file(path) == returned == parse_site(answers, path)
    said = tomllib.loads(path.read_text(encoding="utf-8"))
    for section in ("data", "limits", "coordinator", "agent", "peers"):
        given = {key: value for key, value in answers.get(section, {}).items() if value}
        assert given.items() <= said.get(section, {}).items()


def test_the_answers_above_cover_every_key() -> None:
    plain = {"name", "peers"}
    given = {f"{name}.{key}" for one in FULL for name, part in one.items() if name not in plain for key in part}
    assert given | plain == set(keys()) and plain <= set(FULL[0])


@pytest.mark.parametrize("key", keys())
def test_every_key_stands_in_the_file_under_its_description(key: str, tmp_path: Path) -> None:
    text = written(tmp_path, SMALL)
    name = re.escape(key.rpartition(".")[2])
    below = text.split(f"# {keys()[key]}\n")
    assert any(re.match(rf"(# )?({name} = |\[{re.escape(key)})", part) for part in below[1:])


def test_what_was_not_answered_stands_in_a_comment(tmp_path: Path) -> None:
    said = tomllib.loads(written(tmp_path, SMALL))
    assert said == {**SMALL, "limits": {"unit": "record", **SMALL["limits"]}, "agent": {}}


def test_every_comment_can_be_taken_away(tmp_path: Path) -> None:
    lines = written(tmp_path, SMALL).splitlines()
    examples = [line[2:] for line in lines if re.match(r"# (\S+ = |\[)", line)]
    seen: set[str] = set().union(*(tomllib.loads(line) for line in examples))
    assert len(examples) > 20
    assert {"query", "patient", "mirror", "delta", "age", "data"} <= seen


def test_the_effective_unit_is_written_down(tmp_path: Path) -> None:
    answers = {**SMALL, "data": {**SMALL["data"], "patient": "mrn"}}
    assert tomllib.loads(written(tmp_path, answers))["limits"]["unit"] == "patient"


def test_only_the_owner_can_read_the_file(tmp_path: Path) -> None:
    written(tmp_path, SMALL)
    assert (tmp_path / "site.toml").stat().st_mode & 0o777 == 0o600


def test_an_existing_file_stays(tmp_path: Path) -> None:
    path = tmp_path / "site.toml"
    path.write_text("mine", encoding="utf-8")
    with pytest.raises(InputError, match="exists"):
        write_site_file(path, SMALL)
    assert path.read_text(encoding="utf-8") == "mine"


def test_wrong_answers_write_nothing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"limits\.epsilon_per_run"):
        write_site_file(tmp_path / "site.toml", {**SMALL, "limits": {"epsilon_per_run": 0, "epsilon_lifetime": 1}})
    with pytest.raises(InputError, match="missing key limits"):
        write_site_file(tmp_path / "site.toml", {key: SMALL[key] for key in SMALL if key != "limits"})
    assert not list(tmp_path.iterdir())
