# SPDX-License-Identifier: Apache-2.0
"""Tests of `veil.client.site_file` and `policy`: what site.toml may say, and each way it is refused."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from veil.client.database import Query
from veil.client.policy import Limits, SitePolicy
from veil.client.site_file import SiteFile, parse_site, read_site_file
from veil.common.errors import InputError, PlanError
from veil.common.plan_sections import Section
from veil.common.privacy import PrivacyUnit

DOCUMENT: dict[str, Any] = {
    "name": "Ulm",
    "data": {"table": "reports.csv", "text": "body", "label": "adverse", "labels": {"1": "yes"}},
    "limits": {"epsilon_per_run": 4.0, "epsilon_lifetime": 8.0},
    "coordinator": {"url": "https://veil.example:9300", "ca": "ca.pem"},
}


def document(**change: Any) -> dict[str, Any]:
    """The smallest file, with keys `section__key` set, or removed when None."""
    given = copy.deepcopy(DOCUMENT)
    for key, value in change.items():
        section, _, name = key.partition("__")
        if value is None:
            del given[section][name]
        else:
            given.setdefault(section, {})[name] = value
    return given


def site(folder: Path, **change: Any) -> SiteFile:
    return parse_site(document(**change), folder / "site.toml")


def refusal(folder: Path, **change: Any) -> str:
    with pytest.raises(InputError) as caught:
        site(folder, **change)
    assert all((caught.value.value, caught.value.expectation, caught.value.remedy))
    return str(caught.value)


def fields(kind: type[Section] = SiteFile, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Dotted key and field of everything that a site's file can say."""
    for name, field in kind.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from fields(field.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name, field


@pytest.mark.parametrize("key", dict(fields()))
def test_every_key_is_described(key: str) -> None:
    assert dict(fields())[key].description


def test_the_smallest_file_has_these_defaults(tmp_path: Path) -> None:
    (tmp_path / "site.toml").write_text(
        'name = "Ulm"\n[data]\ntable = "reports.csv"\ntext = "body"\nlabel = "adverse"\n[data.labels]\n"1" = "yes"\n'
        "[limits]\nepsilon_per_run = 4.0\nepsilon_lifetime = 8.0\n"
        '[coordinator]\nurl = "https://veil.example:9300"\nca = "ca.pem"\n',
        encoding="utf-8",
    )
    parsed = read_site_file(tmp_path / "site.toml")
    assert parsed == site(tmp_path)
    assert parsed.folder == tmp_path
    assert parsed.source == tmp_path / "reports.csv"
    assert parsed.policy == SitePolicy(name="Ulm", limits=Limits(epsilon_per_run=4, epsilon_lifetime=8))
    assert (parsed.limits.approval, parsed.limits.release_counts) == ("ask", False)
    assert (parsed.limits.licences, parsed.limits.accept_backbone) == ((), True)
    assert parsed.coordinator.address == "veil.example:9300"
    assert parsed.coordinator.ca == tmp_path / "ca.pem"
    assert parsed.agent.state == tmp_path / "state"
    assert parsed.agent.key == tmp_path / "keys" / "node.key"
    assert parsed.agent.anchor == tmp_path / "keys" / "ledger.anchor"
    assert parsed.agent.mirror is None
    assert parsed.agent.round_timeout_s == 600


def test_paths_are_relative_to_the_file_wherever_the_process_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir("/")
    parsed = site(tmp_path, agent__mirror="weights", agent__state="/srv/veil")
    assert parsed.agent.mirror == tmp_path / "weights"
    assert parsed.agent.state == Path("/srv/veil")


def test_the_patient_is_the_unit_where_a_patient_column_is_named(tmp_path: Path) -> None:
    assert site(tmp_path).limits.unit is PrivacyUnit.RECORD
    assert site(tmp_path, data__patient="mrn").limits.unit is PrivacyUnit.PATIENT
    assert site(tmp_path, data__patient="mrn", limits__unit="record").limits.unit is PrivacyUnit.RECORD
    assert "without data.patient" in refusal(tmp_path, limits__unit="patient")


@pytest.mark.parametrize("key", ["data.tabel", "limits.epsilon", "agent.stat", "colour.red"])
def test_an_unknown_key_is_named(key: str, tmp_path: Path) -> None:
    message = refusal(tmp_path, **{key.replace(".", "__"): "x"})
    assert "unknown key" in message
    assert key.removesuffix(".red") in message


@pytest.mark.parametrize("key", ["data__table", "data__label", "limits__epsilon_per_run", "limits__epsilon_lifetime"])
def test_a_missing_key_is_named(key: str, tmp_path: Path) -> None:
    assert f"missing key {key.replace('__', '.')}" in refusal(tmp_path, **{key: None})


@pytest.mark.parametrize("key", ["epsilon_per_run", "epsilon_lifetime", "delta"])
@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, math.nan])
def test_a_bound_is_positive_and_finite(key: str, value: float, tmp_path: Path) -> None:
    assert f"limits.{key}" in refusal(tmp_path, **{f"limits__{key}": value})


@pytest.mark.parametrize("value", [0.0, math.inf])
def test_a_round_s_time_is_positive_and_finite(value: float, tmp_path: Path) -> None:
    assert "agent.round_timeout_s" in refusal(tmp_path, agent__round_timeout_s=value)


@pytest.mark.parametrize(
    "url",
    ["http://veil.example", "veil.example:9300", "https://", "https://u:p@h", "https://h/path", "https://h?x=1",
     "https://h:0", "https://h:port", "https://h#x"],
)  # fmt: skip
def test_only_https_of_a_host_will_do(url: str, tmp_path: Path) -> None:
    message = refusal(tmp_path, coordinator__url=url)
    assert "coordinator" in message
    assert "https://HOST" in message


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("https://veil.example", "veil.example:443"),
        ("https://10.0.0.1:8443/", "10.0.0.1:8443"),
        ("https://[::1]:8443", "[::1]:8443"),
    ],
)
def test_the_address_is_host_and_port(url: str, address: str, tmp_path: Path) -> None:
    assert site(tmp_path, coordinator__url=url).coordinator.address == address


def test_an_address_may_be_empty_and_is_else_host_and_port(tmp_path: Path) -> None:
    assert site(tmp_path, agent__health_address="").agent.health_address == ""
    assert "agent.health_address" in refusal(tmp_path, agent__health_address="9301")
    assert "agent.metrics_address" in refusal(tmp_path, agent__metrics_address="http://h:1")


@pytest.mark.parametrize("anchor", ["state/ledger.anchor", "keys/../state/anchor"])
def test_the_anchor_is_kept_apart_from_the_ledger(anchor: str, tmp_path: Path) -> None:
    assert "within state" in refusal(tmp_path, agent__anchor=anchor)


def test_a_database_needs_a_query_and_a_file_has_none(tmp_path: Path) -> None:
    assert "without query" in refusal(tmp_path, data__table="postgresql://u@h/db")
    assert "with a file as table" in refusal(tmp_path, data__query="SELECT 1")
    assert "with a file as table" in refusal(tmp_path, **{"data__password_file": "p"})
    assert "not one SELECT" in refusal(tmp_path, data__table="sqlite:///a.db", data__query="DELETE FROM t")
    assert "no SQLAlchemy URL" in refusal(tmp_path, data__table="://x", data__query="SELECT 1")
    files = {"data__table": "sqlite:///a.db", "data__password_file": "keys/p"}
    parsed = site(tmp_path, data__query="SELECT body, adverse FROM t", **files)
    assert isinstance(parsed.source, Query)
    assert parsed.source.folder == tmp_path
    assert parsed.source.password_file == tmp_path / "keys" / "p"


URL = "postgresql+psycopg://u:hush-hush@h/db"


@pytest.mark.parametrize(
    "change",
    [
        {"data__tabel": URL},
        {"data__table": [URL]},
        {"data__table": URL},
        {"data__table": URL, "data__query": "SELECT 1", "data__password_file": "p"},
        {"data__table": URL, "data__query": "DROP TABLE t"},
        {"data__tabel": f"postgresql+psycopg://{'u' * 40}:hush-hush{'h' * 40}@h/db"},
        {"coordinator__url": "https://u:hush-hush@h"},
    ],
)
def test_no_error_shows_a_password(change: dict[str, Any], tmp_path: Path) -> None:
    assert "hush" not in refusal(tmp_path, **change)


def test_printing_shows_no_password(tmp_path: Path) -> None:
    parsed = site(tmp_path, data__table=URL + "?password=hush-hush", data__query="SELECT 1")
    assert "hush" not in f"{parsed!r} {parsed} {parsed.source!r} {parsed.source} {parsed.data.shown_table}"
    assert parsed.data.shown_table == "postgresql+psycopg://u:***@h/db"


def test_a_file_that_is_not_there_or_not_toml_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"site\.toml: No such file"):
        read_site_file(tmp_path / "site.toml")
    (tmp_path / "site.toml").write_text("name = ", encoding="utf-8")
    with pytest.raises(PlanError, match="valid TOML"):
        read_site_file(tmp_path / "site.toml")


def test_a_site_file_cannot_be_changed(tmp_path: Path) -> None:
    with pytest.raises(ValidationError):
        site(tmp_path).limits.epsilon_per_run = 100.0
