# SPDX-License-Identifier: Apache-2.0
"""Tests of `veil.server.enrolment`: an invitation enrols one site, and whoever has none learns nothing."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI
from flwr.server.superlink.linkstate import LinkState

from veil.client.enrol import enrol
from veil.common.errors import InputError, RunError
from veil.common.invitation import ENROL_PATH, Application, Invitation
from veil.common.keys import NodeKey
from veil.server import enrolment
from veil.server.enrolment import FAILURES_PER_MINUTE, MAX_BODY_BYTES, enrolment_router
from veil.server.home import Home
from veil.server.roster import Roster

pytestmark = pytest.mark.filterwarnings("ignore:No path_separator:DeprecationWarning")

REFUSED = (403, {"code": "refused"})
BUSY = (429, {"code": "busy"})
Serve = Callable[[FastAPI, tuple[Path, Path]], str]
Answer = tuple[int, object]


class Clock:
    """Seconds and time of day that a test moves."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.start = datetime(2030, 5, 1, 12, tzinfo=UTC)

    def of_day(self) -> datetime:
        return self.start + timedelta(seconds=self.seconds)


class Door:
    """The route without a network: what an address sends, and what it gets."""

    def __init__(self, roster: Roster, clock: Clock, ca: str) -> None:
        self.roster, self._ca = roster, ca
        self.app = FastAPI()
        self.app.include_router(enrolment_router(roster, lambda: clock.seconds))

    def invite(self, name: str = "Ulm", days: int = 7) -> str:
        return self.roster.invite(name, "https://localhost:8443", self._ca, days).secret

    def post(self, content: str | bytes | AsyncIterator[bytes], address: str = "10.0.0.1") -> Answer:
        async def ask() -> Answer:
            transport = httpx.ASGITransport(self.app, client=(address, 1))
            async with httpx.AsyncClient(transport=transport, base_url="https://localhost") as client:
                response = await client.post(ENROL_PATH, content=content)
            return response.status_code, response.json()

        return asyncio.run(ask())

    def apply(self, secret: str, key: NodeKey, address: str = "10.0.0.1") -> Answer:
        return self.post(Application.sign(secret, key).model_dump_json(), address)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def roster(tmp_path: Path, link_state: LinkState, clock: Clock) -> Iterator[Roster]:
    with closing(Roster(tmp_path / "roster.sqlite", link_state, clock.of_day)) as opened:
        yield opened


@pytest.fixture
def door(home: Home, roster: Roster, clock: Clock) -> Door:
    return Door(roster, clock, home.path(home.settings.ca).read_text(encoding="ascii"))


def test_an_invited_site_is_enrolled(door: Door, link_state: LinkState) -> None:
    key = NodeKey.generate()
    assert door.apply(door.invite(), key) == (200, {"site": "Ulm"})
    assert door.roster.sites()[0].public_pem == key.public_pem
    assert link_state.get_node_id_by_public_key(key.public_pem) == door.roster.sites()[0].node_id


def test_the_secret_is_good_once(door: Door) -> None:
    secret = door.invite()
    door.apply(secret, NodeKey.generate())
    assert door.apply(secret, NodeKey.generate()) == REFUSED
    assert len(door.roster.sites()) == 1


def test_a_replayed_application_is_harmless(door: Door) -> None:
    """Whoever recorded the words can only repeat them: the key in them is the site's own."""
    recorded = Application.sign(door.invite(), NodeKey.generate()).model_dump_json()
    assert door.post(recorded) == (200, {"site": "Ulm"})
    before = door.roster.sites()
    assert door.post(recorded, "203.0.113.9") == (200, {"site": "Ulm"})
    assert door.roster.sites() == before
    door.roster.revoke("Ulm")
    assert door.post(recorded) == REFUSED


def test_an_expired_invitation_is_refused_like_any_other(door: Door, clock: Clock) -> None:
    secret = door.invite(days=1)
    clock.seconds = 86_400.0
    assert door.apply(secret, NodeKey.generate()) == REFUSED
    assert door.roster.sites() == ()


def test_a_signature_of_another_key_is_refused_and_spends_nothing(door: Door) -> None:
    secret, own, other = door.invite(), NodeKey.generate(), NodeKey.generate()
    stolen = Application.sign(secret, own).model_copy(update={"public_key": other.public_pem.decode()})
    assert door.post(stolen.model_dump_json()) == REFUSED
    assert door.apply(secret, own) == (200, {"site": "Ulm"})


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"null",
        b"[]",
        b"{",
        b"\xff\xfe",
        b'{"secret": 1, "public_key": 2, "signature": 3}',
        b'{"secret": "\\ud800", "public_key": "", "signature": ""}',
        b"[" * 60_000,
    ],
)
def test_what_is_no_application_is_refused(door: Door, content: bytes) -> None:
    assert door.post(content) == REFUSED


def test_an_unknown_secret_gets_the_same_answer_as_a_spent_or_ended_one(door: Door, clock: Clock) -> None:
    spent, ended = door.invite("Ulm"), door.invite("Bonn", days=1)
    door.apply(spent, NodeKey.generate())
    clock.seconds = 86_400.0
    answers = [door.apply(one, NodeKey.generate()) for one in (spent, ended, spent[::-1])]
    assert answers == [REFUSED] * 3


def test_a_large_body_is_not_read_to_its_end(door: Door) -> None:
    read = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal read
        while True:
            read += 8192
            yield b" " * 8192

    assert door.post(endless()) == (413, {"code": "large"})
    assert read <= MAX_BODY_BYTES + 2 * 8192
    assert door.post(b" " * MAX_BODY_BYTES) == REFUSED
    assert door.post(b" " * (MAX_BODY_BYTES + 1)) == (413, {"code": "large"})


def test_a_body_that_never_ends_is_given_up(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    async def stuck() -> AsyncIterator[bytes]:
        yield b"{"
        await asyncio.Event().wait()

    monkeypatch.setattr(enrolment, "_READ_S", 0.02)
    assert door.post(stuck()) == (408, {"code": "slow"})


def test_guessing_is_slowed_down_by_address(door: Door, clock: Clock) -> None:
    key, secret = NodeKey.generate(), door.invite()
    for _ in range(FAILURES_PER_MINUTE):
        assert door.apply(secret[::-1], key) == REFUSED
    assert door.apply(secret, key) == BUSY
    assert door.roster.sites() == ()
    clock.seconds = 59.9
    assert door.apply(secret, key) == BUSY
    assert door.apply(door.invite("Bonn"), NodeKey.generate(), "10.0.0.2") == (200, {"site": "Bonn"})
    clock.seconds = 60.0
    assert door.apply(secret, key) == (200, {"site": "Ulm"})


def test_a_granted_application_counts_for_nothing(door: Door) -> None:
    """A hundred sites behind one address may enrol in one minute."""
    key, secret = NodeKey.generate(), door.invite()
    for _ in range(FAILURES_PER_MINUTE + 2):
        assert door.apply(secret, key) == (200, {"site": "Ulm"})


def test_a_flood_of_addresses_is_not_remembered_for_ever(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(enrolment, "_ADDRESSES", 2)
    for number in range(FAILURES_PER_MINUTE):
        door.post(b"", "10.0.0.1")
        assert door.post(b"", f"10.0.1.{number}") == REFUSED
    assert door.post(b"", "10.0.0.1") == BUSY
    door.post(b"", "10.0.0.2")
    door.post(b"", "10.0.0.3")
    assert door.post(b"", "10.0.0.1") == REFUSED


def test_flowers_refusal_is_told_as_unavailable(tmp_path: Path, clock: Clock, home: Home) -> None:
    class NoNodes:
        def create_node(self, *args: object, **options: object) -> int:
            return 0

        def delete_node(self, owner_aid: str, node_id: int) -> None:
            raise AssertionError("there is none")

        def get_node_id_by_public_key(self, public_key: bytes) -> int | None:
            return None

    with closing(Roster(tmp_path / "other.sqlite", NoNodes(), clock.of_day)) as roster:
        door = Door(roster, clock, home.path(home.settings.ca).read_text(encoding="ascii"))
        assert door.apply(door.invite(), NodeKey.generate()) == (503, {"code": "unavailable"})


def test_nothing_but_an_application_is_taken(door: Door) -> None:
    async def ask() -> list[int]:
        transport = httpx.ASGITransport(door.app)
        async with httpx.AsyncClient(transport=transport, base_url="https://localhost") as client:
            return [(await client.request(verb, ENROL_PATH)).status_code for verb in ("GET", "PUT", "DELETE")]

    assert asyncio.run(ask()) == [405] * 3


def test_the_reason_is_in_the_log_and_the_secret_nowhere(
    door: Door, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    secret, own = door.invite(), NodeKey.generate()
    application = Application.sign(secret, own)
    door.post(application.model_dump_json().replace('"signature"', '"more"'))
    door.post(application.model_copy(update={"signature": "AAAA"}).model_dump_json())
    door.apply(secret, own)
    door.apply(secret, NodeKey.generate())
    for reason in ("cannot be read", "does not fit the key", "site Ulm enrolled", "is spent"):
        assert reason in caplog.text
    assert secret not in caplog.text + repr(application) + repr(door.roster.sites())
    assert all(secret.encode() not in path.read_bytes() for path in tmp_path.rglob("*sqlite*"))


@pytest.fixture
def link(home: Home, link_state: LinkState, serve: Serve) -> Iterator[tuple[str, Roster]]:
    """The route behind real TLS, and its roster with the real time."""
    with closing(Roster(home.roster, link_state)) as roster:
        app = FastAPI()
        app.include_router(enrolment_router(roster))
        settings = home.settings
        yield serve(app, (home.path(settings.certificate), home.path(settings.key))), roster


@pytest.fixture
def invitation(home: Home, link: tuple[str, Roster]) -> Invitation:
    url, roster = link
    return roster.invite("Ulm", url, home.path(home.settings.ca).read_text(encoding="ascii"), 7)


def test_a_site_enrols_over_tls_as_often_as_it_likes(link: tuple[str, Roster], invitation: Invitation) -> None:
    key = NodeKey.generate()
    enrol(invitation, key)
    enrol(invitation, key)
    (site,) = link[1].sites()
    assert (site.name, site.public_pem) == ("Ulm", key.public_pem)


def test_over_tls_a_used_invitation_is_an_error_for_the_operator(invitation: Invitation) -> None:
    enrol(invitation, NodeKey.generate())
    with pytest.raises(InputError, match="refuses the invitation for Ulm") as error:
        enrol(invitation, NodeKey.generate())
    assert invitation.secret not in str(error.value)


def test_over_tls_too_many_attempts_are_an_error_for_the_operator(invitation: Invitation) -> None:
    wrong = invitation.model_copy(update={"secret": invitation.secret[::-1]})
    for _ in range(FAILURES_PER_MINUTE):
        with pytest.raises(InputError, match="refuses"):
            enrol(wrong, NodeKey.generate())
    with pytest.raises(RunError, match="takes no application now"):
        enrol(invitation, NodeKey.generate())
