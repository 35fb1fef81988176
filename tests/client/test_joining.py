# SPDX-License-Identifier: Apache-2.0
"""Tests of `veil.client.joining`: a folder that is made once, finished when it was cut off, and holds no secret."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

from veil.client.joining import join
from veil.client.site_file import SITE_FILE, read_site_file
from veil.common.errors import InputError, RunError
from veil.common.invitation import ENROL_PATH, Application, Invitation
from veil.common.keys import NodeKey

Serve = Callable[[FastAPI, tuple[Path, Path]], str]
Invite = Callable[..., Invitation]

SECRET = "s3cret_" + "A" * 36
ANSWERS: dict[str, Any] = {
    "data": {"table": "/srv/table.csv", "text": "body", "label": "ill", "labels": {"1": "yes"}},
    "limits": {"epsilon_per_run": 4.0, "epsilon_lifetime": 8.0},
}


class Door:
    """A coordinator that enrols one key; `open` says whether it does."""

    def __init__(self) -> None:
        self.open = True
        self.keys: list[str] = []
        self.app = FastAPI()
        self.app.add_api_route(ENROL_PATH, self.enrol, methods=["POST"])

    async def enrol(self, request: Request) -> JSONResponse:
        application = Application.model_validate_json(await request.body())
        wrong_key = bool(self.keys) and application.public_key != self.keys[0]
        if not self.open or application.secret != SECRET or not application.is_proven() or wrong_key:
            return JSONResponse({"code": "refused"}, 403)
        self.keys.append(application.public_key)
        return JSONResponse({"site": "Ulm"})


@pytest.fixture
def door() -> Door:
    return Door()


@pytest.fixture
def invitation(door: Door, serve: Serve, authority: Path) -> Invitation:
    url = serve(door.app, (authority / "link.pem", authority / "link.key"))
    return invited(url, (authority / "ca.pem").read_text(encoding="ascii"))


def invited(url: str, ca: str) -> Invitation:
    expires = datetime.now(UTC) + timedelta(days=1)
    return Invitation(site="Ulm", url=url, secret=SECRET, expires=expires, ca=ca)


def nobody_asks() -> Mapping[str, Any]:
    pytest.fail("what is in site.toml is not asked for again")


def contents(home: Path) -> dict[str, bytes]:
    return {str(path.relative_to(home)): path.read_bytes() for path in home.rglob("*") if path.is_file()}


def test_a_folder_is_made_and_the_site_enrolled(invitation: Invitation, door: Door, tmp_path: Path) -> None:
    home = tmp_path / "new" / "site"
    file = join(invitation, home, lambda: ANSWERS)
    assert (file.name, file.coordinator.url) == ("Ulm", invitation.url)
    assert sorted(contents(home)) == ["keys/coordinator.pem", "keys/node.key", SITE_FILE]
    assert read_site_file(home / SITE_FILE) == file
    assert file.coordinator.ca.read_text(encoding="ascii") == invitation.ca
    key = NodeKey.load(file.agent.key)
    assert door.keys == [key.public_pem.decode("ascii")]
    assert [path.stat().st_mode & 0o777 for path in (home, home / "keys", file.agent.key)] == [0o700, 0o700, 0o600]


def test_doing_it_again_changes_nothing(invitation: Invitation, door: Door, tmp_path: Path) -> None:
    join(invitation, tmp_path / "site", lambda: ANSWERS)
    first = contents(tmp_path / "site")
    join(invitation, tmp_path / "site", nobody_asks)
    assert contents(tmp_path / "site") == first
    assert len(door.keys) == 2
    assert len(set(door.keys)) == 1


@pytest.mark.parametrize("lost", [[], ["keys/coordinator.pem"], ["keys/coordinator.pem", "keys/node.key"]])
def test_what_was_cut_off_goes_on_where_it_stopped(
    lost: list[str], invitation: Invitation, door: Door, tmp_path: Path
) -> None:
    home, door.open = tmp_path / "site", False
    with pytest.raises(InputError, match="refuses the invitation"):
        join(invitation, home, lambda: ANSWERS)
    for name in lost:
        (home / name).unlink()
    kept = contents(home)
    door.open = True
    join(invitation, home, nobody_asks)
    assert {name: contents(home)[name] for name in kept} == kept
    assert len(door.keys) == 1


def test_a_coordinator_that_is_away_can_be_asked_later(authority: Path, tmp_path: Path) -> None:
    away = invited("https://127.0.0.1:1", (authority / "ca.pem").read_text(encoding="ascii"))
    with pytest.raises(RunError, match="cannot be reached"):
        join(away, tmp_path / "site", lambda: ANSWERS)
    assert (tmp_path / "site" / SITE_FILE).exists()


def test_the_secret_and_the_private_key_are_written_nowhere_else(
    invitation: Invitation,
    door: Door,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    caplog.set_level("DEBUG")
    home = tmp_path / "site"
    door.open = False
    with pytest.raises(InputError) as refused:
        join(invitation, home, lambda: ANSWERS)
    door.open = True
    file = join(invitation, home, nobody_asks)
    said = "".join([caplog.text, *capfd.readouterr(), repr(refused.value), str(refused.value), repr(file)])
    private = file.agent.key.read_text(encoding="ascii").splitlines()[1]
    assert SECRET not in said
    assert private not in said
    assert private not in "".join(door.keys)
    for name, content in contents(home).items():
        assert SECRET.encode() not in content
        assert name == "keys/node.key" or private.encode() not in content


def test_an_answer_that_is_not_usable_leaves_nothing_behind(invitation: Invitation, door: Door, tmp_path: Path) -> None:
    wrong = {**ANSWERS, "limits": {"epsilon_per_run": -1.0, "epsilon_lifetime": 8.0}}
    with pytest.raises(InputError, match="epsilon_per_run"):
        join(invitation, tmp_path / "site", lambda: wrong)
    assert not (tmp_path / "site").exists()
    assert door.keys == []


def test_answers_cannot_choose_name_and_coordinator(invitation: Invitation, tmp_path: Path) -> None:
    other = {"name": "Bonn", "coordinator": {"url": "https://evil.example", "ca": "x"}}
    file = join(invitation, tmp_path / "site", lambda: {**ANSWERS, **other})
    assert (file.name, file.coordinator.url) == ("Ulm", invitation.url)


@pytest.mark.parametrize("change", [{"site": "Bonn"}, {"url": "https://127.0.0.1:2"}])
def test_another_site_s_folder_is_left_alone(
    change: dict[str, str], invitation: Invitation, door: Door, tmp_path: Path
) -> None:
    join(invitation, tmp_path / "site", lambda: ANSWERS)
    before = contents(tmp_path / "site")
    with pytest.raises(InputError, match="another folder"):
        join(invitation.model_copy(update=change), tmp_path / "site", nobody_asks)
    assert contents(tmp_path / "site") == before
    assert len(door.keys) == 1


def test_another_authority_is_not_put_in_the_place_of_the_first(
    invitation: Invitation, door: Door, tmp_path: Path
) -> None:
    file = join(invitation, tmp_path / "site", lambda: ANSWERS)
    file.coordinator.ca.write_text("another\n", encoding="ascii")
    with pytest.raises(InputError, match="another authority"):
        join(invitation, tmp_path / "site", nobody_asks)
    assert file.coordinator.ca.read_text(encoding="ascii") == "another\n"
    assert len(door.keys) == 1
