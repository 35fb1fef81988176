# SPDX-License-Identifier: Apache-2.0
"""Tests of `veil.client.doctor`: every check is made whatever the others found, and each can fail."""

from __future__ import annotations

import shutil
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import FastAPI

from veil.client import doctor as module
from veil.client import optimizer
from veil.client.doctor import Finding, examine_site
from veil.client.ledger import Ledger
from veil.client.site_file import SiteFile, read_site_file
from veil.common.keys import NodeKey
from veil.common.noise import privatize
from veil.common.plan import RunPlan
from veil.common.plan_sections import Backbone
from veil.common.schedule import schedule
from veil.server.pki import issue_certificate, make_authority

MakePlan = Callable[..., RunPlan]
MakeHome = Callable[..., Path]
Serve = Callable[[FastAPI, tuple[Path, Path]], str]

ALWAYS = ["key", "data", "ledger", "disk", "memory", "coordinator", "private step"]


@pytest.fixture
def file(make_home: MakeHome, serve: Serve, authority: Path) -> SiteFile:
    """A site whose coordinator answers."""
    url = serve(FastAPI(), (authority / "link.pem", authority / "link.key"))
    return read_site_file(make_home(url=url) / "site.toml")


def examined(file: SiteFile, plan: RunPlan | None = None) -> dict[str, Finding]:
    return {finding.name: finding for finding in examine_site(file, plan)}


def bad(found: dict[str, Finding]) -> list[str]:
    return [name for name, finding in found.items() if not finding.fine]


def assert_one_is_bad(file: SiteFile, name: str, words: str, plan: RunPlan | None = None) -> None:
    """The others were made all the same, and it says what to do."""
    found = examined(file, plan)
    assert [one for one in found if one not in ("weights", "price")] == ALWAYS
    assert bad(found) == [name], found
    (line,) = found[name].lines
    assert words in line
    assert "Remedy: " in line


def test_a_site_in_order_passes_every_check(file: SiteFile) -> None:
    found = examined(file)
    assert list(found) == ALWAYS
    assert bad(found) == [], found
    assert "its certificate lasts 396 days; the clocks agree" in found["coordinator"].lines[0]
    assert found["data"].lines[0].startswith("40 records of 40 records from table.csv")
    assert "label yes: 13" in found["data"].lines
    assert found["private step"].lines[-1] == "on made-up records"


def test_with_a_plan_weights_price_and_the_site_s_own_records_are_looked_at(
    file: SiteFile, make_plan: MakePlan
) -> None:
    found = examined(file, make_plan())
    assert list(found) == [*ALWAYS[:-1], "weights", "price", "private step"]
    assert bad(found) == []
    assert any("Price at δ" in line for line in found["price"].lines)
    assert found["private step"].lines[0].startswith("one step on 40 units")
    assert found["private step"].lines[-1] == "on your records"


def test_looking_spends_nothing(file: SiteFile, make_plan: MakePlan) -> None:
    examined(file, make_plan())
    assert not file.agent.ledger.exists()
    assert not file.agent.anchor.exists()


def test_weights_that_are_not_here_are_said_so(file: SiteFile, make_plan: MakePlan) -> None:
    plan = make_plan()
    backbone = Backbone(source="package:no_such_package/model", sha256="a" * 64)
    text = {"backbone": backbone, "task": plan.task.model_copy(update={"kind": "text-classification"})}
    found = examined(file, plan.model_copy(update=text))
    assert "not here" in found["weights"].lines[0]
    assert found["private step"].lines[-1] == "on made-up records"


def test_a_key_that_others_can_read_is_bad(file: SiteFile) -> None:
    file.agent.key.chmod(0o644)
    assert_one_is_bad(file, "key", "can be read by others")


def test_a_table_that_is_not_there_is_bad(file: SiteFile) -> None:
    (file.folder / "table.csv").unlink()
    assert_one_is_bad(file, "data", "table.csv")


def test_a_ledger_that_was_changed_is_bad(file: SiteFile, make_plan: MakePlan, key: NodeKey) -> None:
    plan = make_plan()
    file.agent.state.mkdir()
    with closing(Ledger(file.agent.ledger, file.name, key, anchor=file.agent.anchor)) as ledger:
        ledger.spend("job", schedule(plan)[0], noise="os", plan=plan.sha256, review=lambda entries: None)
    assert bad(examined(file)) == []
    with closing(sqlite3.connect(file.agent.ledger)) as other, other:
        other.execute("DROP TRIGGER line_stays")
        other.execute("UPDATE line SET body = replace(body, '\"round\":0', '\"round\":2')")
    assert_one_is_bad(file, "ledger", "changed")


def test_a_ledger_that_is_gone_but_anchored_is_bad(file: SiteFile, make_plan: MakePlan, key: NodeKey) -> None:
    """Else a doctor would call a lost ledger a new site."""
    plan = make_plan()
    file.agent.state.mkdir()
    with closing(Ledger(file.agent.ledger, file.name, key, anchor=file.agent.anchor)) as ledger:
        ledger.spend("job", schedule(plan)[0], noise="os", plan=plan.sha256, review=lambda entries: None)
    shutil.rmtree(file.agent.state)
    assert_one_is_bad(file, "ledger", "anchor")


@pytest.mark.parametrize(("name", "limit"), [("disk", "_DISK_BYTES"), ("memory", "_MEMORY_BYTES")])
def test_too_little_room_is_bad(name: str, limit: str, file: SiteFile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, limit, 1 << 60)
    assert_one_is_bad(file, name, "MiB")


def test_a_coordinator_that_does_not_answer_is_bad(make_home: MakeHome) -> None:
    assert_one_is_bad(read_site_file(make_home() / "site.toml"), "coordinator", "https://127.0.0.1:1")


def test_a_coordinator_of_another_authority_is_bad(file: SiteFile, tmp_path: Path) -> None:
    other = make_authority(tmp_path / "other", "Study 7")
    file.coordinator.ca.write_bytes(other.read_bytes())
    assert_one_is_bad(file, "coordinator", "certificate verify failed")


def test_a_coordinator_with_a_certificate_for_another_address_is_bad(
    make_home: MakeHome, serve: Serve, tmp_path: Path
) -> None:
    folder = tmp_path / "pki"
    authority = make_authority(folder, "Study 7")
    url = serve(FastAPI(), issue_certificate(folder, ["veil.example"]))
    file = read_site_file(make_home(url=url) / "site.toml")
    file.coordinator.ca.write_bytes(authority.read_bytes())
    assert_one_is_bad(file, "coordinator", "certificate verify failed")


def test_a_certificate_that_ends_soon_is_told_in_time(make_home: MakeHome, serve: Serve, tmp_path: Path) -> None:
    folder = tmp_path / "pki"
    authority = make_authority(folder, "Study 7")
    url = serve(FastAPI(), issue_certificate(folder, ["127.0.0.1"], days=10))
    file = read_site_file(make_home(url=url) / "site.toml")
    file.coordinator.ca.write_bytes(authority.read_bytes())
    assert "lasts 9 days; it ends soon" in examined(file)["coordinator"].lines[0]


@pytest.mark.parametrize("content", [None, b"", b"no certificate"])
def test_an_authority_s_file_that_is_not_usable_is_bad(content: bytes | None, file: SiteFile) -> None:
    if content is None:
        file.coordinator.ca.unlink()
    else:
        file.coordinator.ca.write_bytes(content)
    assert_one_is_bad(file, "coordinator", "coordinator.ca = ")


@pytest.mark.parametrize("offset", [-3600.0, -75.0, 75.0, 3600.0])
def test_a_clock_that_is_off_is_bad(offset: float, file: SiteFile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "time", SimpleNamespace(time=lambda: time.time() + offset))
    assert_one_is_bad(file, "coordinator", "the clocks differ by")


@pytest.mark.parametrize("offset", [-30.0, 30.0])
def test_a_clock_that_is_a_little_off_is_fine(offset: float, file: SiteFile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "time", SimpleNamespace(time=lambda: time.time() + offset))
    assert bad(examined(file)) == []


def test_a_machine_without_noise_is_bad(file: SiteFile, monkeypatch: pytest.MonkeyPatch) -> None:
    def silent(clipped_sum: Any, **how: Any) -> Any:
        return privatize(clipped_sum, **{**how, "noise_multiplier": 0.0})

    monkeypatch.setattr(optimizer, "privatize", silent)
    assert_one_is_bad(file, "private step", "noise of 0.000 times its size")


@pytest.mark.parametrize("error", [MemoryError("no room"), AssertionError("odd"), KeyError("missing")])
def test_a_check_that_breaks_keeps_no_other_from_being_made(
    error: Exception, file: SiteFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_: SiteFile) -> Any:
        raise error

    monkeypatch.setattr(module, "look", broken)
    assert_one_is_bad(file, "data", type(error).__name__)


def test_everything_at_once_is_still_told_one_by_one(make_home: MakeHome, monkeypatch: pytest.MonkeyPatch) -> None:
    home = make_home()
    for path in (home / "table.csv", home / "keys" / "node.key", home / "keys" / "coordinator.pem"):
        path.unlink()
    monkeypatch.setattr(module, "_DISK_BYTES", 1 << 60)
    found = examined(read_site_file(home / "site.toml"))
    assert list(found) == ALWAYS
    assert bad(found) == ["key", "data", "disk", "coordinator"]


def test_a_cell_cannot_paint_the_screen(file: SiteFile) -> None:
    table, cell = file.folder / "table.csv", "\x1b[2Jno" + "x" * 100
    rows = table.read_text(encoding="utf-8").splitlines()
    rows[1] = f"{rows[1].rsplit(',', 1)[0]},{cell}"
    table.write_text("\n".join(rows) + "\n", encoding="utf-8")
    refused = examined(file)["data"]
    assert not refused.fine
    assert "\x1b" not in "".join(refused.lines)
    data = file.data.model_copy(update={"labels": {**file.data.labels, cell: "no"}})
    lines = examined(file.model_copy(update={"data": data}))["data"].lines
    shown = next(line for line in lines if line.startswith("column answer"))
    assert "\x1b" not in "".join(lines)
    assert "…" in shown
