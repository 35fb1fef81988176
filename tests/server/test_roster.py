# SPDX-License-Identifier: Apache-2.0
"""Tests of `veil.server.roster`: a secret admits one key, Flower knows a node only for a site that stands here."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from flwr.server.superlink.linkstate import LinkState

from veil.common.errors import InputError, RunError
from veil.common.invitation import Invitation, digest
from veil.common.keys import NodeKey
from veil.server.pki import make_authority
from veil.server.roster import Roster

NOON = datetime(2030, 5, 1, 12, tzinfo=UTC)
URL = "https://veil.example:8443"
FLOWERS_WARNING = pytest.mark.filterwarnings("ignore:No path_separator:DeprecationWarning")


class Crash(BaseException):
    """The power goes."""


class FakeNodes:
    """Flower's link state: a key that was deleted is never taken again."""

    def __init__(self) -> None:
        self.active: dict[bytes, int] = {}
        self.deleted: set[bytes] = set()
        self.before_create: Callable[[], None] = lambda: None
        self.after_create: Callable[[], None] = lambda: None

    def create_node(
        self, owner_aid: str, owner_name: str, public_key: bytes, heartbeat_interval: float, *, name: str | None = None
    ) -> int:
        self.before_create()
        if public_key in self.active or public_key in self.deleted:
            raise ValueError("a key that was ever known")
        self.active[public_key] = 2**64 - 1 - len(self.active) - len(self.deleted)
        self.after_create()
        return self.active[public_key]

    def delete_node(self, owner_aid: str, node_id: int) -> None:
        (key,) = [key for key, number in self.active.items() if number == node_id]
        del self.active[key]
        self.deleted.add(key)

    def get_node_id_by_public_key(self, public_key: bytes) -> int | None:
        return self.active.get(public_key)


class Clock:
    """A time of day that a test moves."""

    def __init__(self) -> None:
        self.now = NOON

    def __call__(self) -> datetime:
        return self.now


@pytest.fixture(scope="module")
def ca(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_authority(tmp_path_factory.mktemp("pki"), "Study 7").read_text(encoding="ascii")


@pytest.fixture
def nodes() -> FakeNodes:
    return FakeNodes()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def roster(tmp_path: Path, nodes: FakeNodes, clock: Clock) -> Iterator[Roster]:
    with closing(Roster(tmp_path / "roster.sqlite", nodes, clock)) as opened:
        yield opened


@pytest.fixture
def invite(roster: Roster, ca: str) -> Callable[..., Invitation]:
    def make(name: str = "Ulm", days: int = 7) -> Invitation:
        return roster.invite(name, URL, ca, days)

    return make


Invite = Callable[..., Invitation]


def key() -> bytes:
    return NodeKey.generate().public_pem


def test_an_invitation_says_where_until_when_and_whom_to_trust(invite: Invite, ca: str) -> None:
    invitation = invite()
    assert (invitation.site, invitation.url, invitation.ca) == ("Ulm", URL, ca)
    assert invitation.expires == NOON + timedelta(days=7)
    assert invitation.secret != invite("Bonn").secret


def test_an_admitted_site_stands_in_the_roster_and_in_flower(roster: Roster, nodes: FakeNodes, invite: Invite) -> None:
    public = key()
    assert roster.admit(invite().secret, public) == "Ulm"
    (site,) = roster.sites()
    assert (site.name, site.public_pem, site.enrolled_at, site.revoked_at) == ("Ulm", public, NOON, None)
    assert nodes.active == {public: site.node_id}
    assert site.node_id is not None and roster.name_of(site.node_id) == "Ulm"


@FLOWERS_WARNING
def test_flowers_own_link_state_takes_the_site(tmp_path: Path, link_state: LinkState, ca: str) -> None:
    with closing(Roster(tmp_path / "roster.sqlite", link_state)) as roster:
        public = key()
        roster.admit(roster.invite("Ulm", URL, ca, 1).secret, public)
        node_id = link_state.get_node_id_by_public_key(public)
        assert node_id is not None and roster.name_of(node_id) == "Ulm"
        roster.revoke("Ulm")
        assert link_state.get_node_id_by_public_key(public) is None
        with pytest.raises(InputError, match="the key is or was that of site Ulm"):
            roster.admit(roster.invite("Ulm", URL, ca, 1).secret, public)


def test_the_same_application_again_changes_nothing(
    roster: Roster, nodes: FakeNodes, invite: Invite, clock: Clock
) -> None:
    public, secret = key(), invite().secret
    roster.admit(secret, public)
    before = roster.sites()
    clock.now += timedelta(days=30)
    assert roster.admit(secret, public) == "Ulm"
    assert (roster.sites(), len(nodes.active)) == (before, 1)


def test_a_key_is_compared_in_one_form(roster: Roster, invite: Invite) -> None:
    public, secret = key(), invite().secret
    roster.admit(secret, public)
    assert roster.admit(secret, public.replace(b"\n", b"\r\n") + b"\n") == "Ulm"
    assert len(roster.sites()) == 1


def test_a_spent_secret_admits_no_other_key(roster: Roster, nodes: FakeNodes, invite: Invite) -> None:
    public, secret = key(), invite().secret
    roster.admit(secret, public)
    with pytest.raises(InputError, match="the invitation for Ulm is spent"):
        roster.admit(secret, key())
    assert list(nodes.active) == [public]


def test_an_unknown_secret_is_refused(roster: Roster, nodes: FakeNodes, invite: Invite) -> None:
    with pytest.raises(InputError, match="the secret is unknown"):
        roster.admit(invite().secret[::-1], key())
    assert (roster.sites(), nodes.active) == ((), {})


def test_an_invitation_ends_at_its_moment(roster: Roster, invite: Invite, clock: Clock) -> None:
    late, punctual = invite("Ulm", 1).secret, invite("Bonn", 1).secret
    clock.now = NOON + timedelta(days=1) - timedelta(microseconds=1)
    assert roster.admit(punctual, key()) == "Bonn"
    clock.now = NOON + timedelta(days=1)
    with pytest.raises(InputError, match="ended on 2030-05-02"):
        roster.admit(late, key())


def test_a_newer_invitation_withdraws_the_unused_one(roster: Roster, invite: Invite) -> None:
    old, new = invite().secret, invite().secret
    with pytest.raises(InputError, match="unknown"):
        roster.admit(old, key())
    assert roster.admit(new, key()) == "Ulm"


def test_an_enrolled_name_is_not_invited_again(roster: Roster, invite: Invite) -> None:
    roster.admit(invite().secret, key())
    with pytest.raises(InputError, match="site Ulm is enrolled"):
        invite()


@pytest.mark.parametrize("days", [10**7, 10**12])
def test_an_invitation_that_would_never_end_is_refused(invite: Invite, days: int) -> None:
    with pytest.raises(InputError, match=rf"no invitation can be made \({days} days\)"):
        invite(days=days)


@pytest.mark.parametrize("name", ["", " Ulm", "Ulm\n", "<b>", "U" * 81])
def test_a_name_out_of_form_is_refused(roster: Roster, invite: Invite, name: str) -> None:
    with pytest.raises(InputError, match="site: "):
        invite(name)


def test_one_key_is_one_site(roster: Roster, invite: Invite) -> None:
    public = key()
    roster.admit(invite().secret, public)
    with pytest.raises(InputError, match="the key is or was that of site Ulm"):
        roster.admit(invite("Bonn").secret, public)
    assert [site.name for site in roster.sites()] == ["Ulm"]


@pytest.mark.parametrize(
    "private",
    [ec.generate_private_key(ec.SECP521R1()), rsa.generate_private_key(public_exponent=65537, key_size=2048)],
    ids=["P-521", "RSA"],
)
def test_a_key_of_another_kind_spends_nothing(
    roster: Roster, invite: Invite, private: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey
) -> None:
    secret = invite().secret
    foreign = private.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    for unusable in (foreign, b"", b"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n"):
        with pytest.raises(InputError, match="a P-256 or P-384 public key"):
            roster.admit(secret, unusable)
    assert roster.admit(secret, key()) == "Ulm"


def test_a_revoked_site_is_turned_out_for_good(roster: Roster, nodes: FakeNodes, invite: Invite, clock: Clock) -> None:
    public, secret = key(), invite().secret
    roster.admit(secret, public)
    (node_id,) = nodes.active.values()
    clock.now += timedelta(hours=1)
    roster.revoke("Ulm")
    assert (nodes.active, nodes.deleted) == ({}, {public})
    assert roster.name_of(node_id) is None
    assert roster.sites()[0].revoked_at == NOON + timedelta(hours=1)
    with pytest.raises(InputError, match="was revoked"):
        roster.admit(secret, public)
    with pytest.raises(InputError, match="is spent"):
        roster.admit(secret, key())


def test_a_revoked_name_may_be_invited_with_a_new_key(roster: Roster, invite: Invite) -> None:
    roster.admit(invite().secret, key())
    roster.revoke("Ulm")
    roster.admit(invite().secret, key())
    assert [site.revoked_at is None for site in roster.sites()] == [False, True]


def test_revoking_withdraws_an_unused_invitation(roster: Roster, invite: Invite) -> None:
    secret = invite().secret
    roster.revoke("Ulm")
    with pytest.raises(InputError, match="unknown"):
        roster.admit(secret, key())
    with pytest.raises(InputError, match="an enrolled or invited site"):
        roster.revoke("Ulm")


def test_many_keys_at_once_with_one_secret_admit_one(tmp_path: Path, nodes: FakeNodes, ca: str) -> None:
    """Half of the threads through another connection, as another process would."""
    count, path = 8, tmp_path / "roster.sqlite"
    barrier = threading.Barrier(count)
    with closing(Roster(path, nodes)) as one, closing(Roster(path, nodes)) as other:
        secret = one.invite("Ulm", URL, ca, 1).secret

        def apply(roster: Roster) -> bool:
            public = key()
            barrier.wait()
            try:
                return roster.admit(secret, public) == "Ulm"
            except InputError:
                return False

        with ThreadPoolExecutor(count) as pool:
            assert sum(pool.map(apply, [one, other] * (count // 2))) == 1
        assert len(one.sites()) == len(nodes.active) == 1


@pytest.mark.parametrize("moment", ["before_create", "after_create"])
def test_an_admission_cut_in_two_is_completed_by_doing_it_again(
    roster: Roster, nodes: FakeNodes, invite: Invite, moment: str
) -> None:
    public, secret = key(), invite().secret

    def crash() -> None:
        raise Crash

    setattr(nodes, moment, crash)
    with pytest.raises(Crash):
        roster.admit(secret, public)
    (half,) = roster.sites()
    assert (half.name, half.node_id) == ("Ulm", None)
    setattr(nodes, moment, lambda: None)
    assert roster.admit(secret, public) == "Ulm"
    assert nodes.active == {public: roster.sites()[0].node_id}


@pytest.mark.parametrize("moment", ["before_create", "after_create"])
def test_a_half_admitted_site_can_be_revoked(roster: Roster, nodes: FakeNodes, invite: Invite, moment: str) -> None:
    public, secret = key(), invite().secret

    def crash() -> None:
        raise Crash

    setattr(nodes, moment, crash)
    with pytest.raises(Crash):
        roster.admit(secret, public)
    setattr(nodes, moment, lambda: None)
    roster.revoke("Ulm")
    with pytest.raises(InputError, match="was revoked"):
        roster.admit(secret, public)
    assert nodes.active == {}


def test_a_key_that_flower_does_not_take_is_a_run_error_with_a_way_out(
    roster: Roster, nodes: FakeNodes, invite: Invite
) -> None:
    public, secret = key(), invite().secret
    nodes.deleted.add(public)
    with pytest.raises(RunError, match="revoke Ulm, have the site make a new key"):
        roster.admit(secret, public)
    roster.revoke("Ulm")
    assert roster.admit(invite().secret, key()) == "Ulm"


def test_the_file_holds_the_hash_and_never_the_secret(tmp_path: Path, roster: Roster, invite: Invite) -> None:
    secret = invite().secret
    roster.admit(secret, key())
    written = b"".join(path.read_bytes() for path in tmp_path.glob("roster.sqlite*"))
    assert digest(secret) in written
    assert secret.encode() not in written


def test_the_roster_is_there_after_a_restart(tmp_path: Path, nodes: FakeNodes, clock: Clock, ca: str) -> None:
    path = tmp_path / "roster.sqlite"
    with closing(Roster(path, nodes, clock)) as roster:
        secret, public = roster.invite("Ulm", URL, ca, 1).secret, key()
        roster.admit(secret, public)
        before = roster.sites()
    with closing(Roster(path, nodes, clock)) as roster:
        assert roster.sites() == before
        assert roster.admit(secret, public) == "Ulm"
