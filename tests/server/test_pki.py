# SPDX-License-Identifier: Apache-2.0
"""Tests of `veil.server.pki`: what is issued is accepted by a strict client, and a crash leaves a pair that fits."""

from __future__ import annotations

import os
import ssl
import stat
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from veil.common.errors import InputError
from veil.server.pki import LINK_DAYS, issue_certificate, make_authority
from veil.server.tls_certificate import check_brought, describe

HOSTS = ["localhost", "127.0.0.1", "::1"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_authority(tmp_path / "coordinator", "Study 7")
    return tmp_path / "coordinator"


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def handshake(folder: Path, host: str, ca: Path | None = None) -> None:
    """TLS between a server with the folder's pair and a client as strict as Python 3.13's, in memory."""
    client = ssl.create_default_context(cafile=ca or folder / "ca.pem")
    client.verify_flags |= ssl.VERIFY_X509_STRICT | ssl.VERIFY_X509_PARTIAL_CHAIN
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(folder / "link.pem", folder / "link.key")
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [client.wrap_bio(down, up, server_hostname=host), server.wrap_bio(up, down, server_side=True)]
    while ends:
        for end in list(ends):
            try:
                end.do_handshake()
                ends.remove(end)
            except ssl.SSLWantReadError:
                continue


def test_an_authority_and_its_key(folder: Path) -> None:
    facts = describe((folder / "ca.pem").read_bytes())
    assert facts.subject == "CN=Study 7"
    assert 3648 <= facts.days_left <= 3650
    assert mode(folder / "ca.key") == 0o600
    assert mode(folder) == 0o700


def test_an_authority_is_never_overwritten(folder: Path) -> None:
    before = [(folder / name).read_bytes() for name in ("ca.pem", "ca.key")]
    with pytest.raises(InputError, match="exists"):
        make_authority(folder, "Another")
    assert [(folder / name).read_bytes() for name in ("ca.pem", "ca.key")] == before


def test_a_key_left_by_a_crash_gets_its_certificate(folder: Path) -> None:
    key, old = (folder / "ca.key").read_bytes(), (folder / "ca.pem").rename(folder / "old.pem")
    make_authority(folder, "Study 7")
    assert (folder / "ca.key").read_bytes() == key
    issue_certificate(folder, HOSTS)
    handshake(folder, "localhost")
    handshake(folder, "localhost", ca=old)


@pytest.mark.parametrize("name", ["", "x" * 65])
def test_a_name_that_fits_no_certificate_is_refused_before_a_file_is_written(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="1 to 64 characters"):
        make_authority(tmp_path / "new", name)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("host", HOSTS)
def test_a_strict_client_accepts_the_chain(folder: Path, host: str) -> None:
    issue_certificate(folder, HOSTS)
    handshake(folder, host)


def test_a_strict_client_refuses_another_host_and_another_authority(folder: Path, tmp_path: Path) -> None:
    issue_certificate(folder, HOSTS)
    with pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"):
        handshake(folder, "veil.example")
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(folder, "localhost", ca=make_authority(tmp_path / "other", "Study 7"))


def test_the_pair_fits_and_says_what_was_asked(folder: Path) -> None:
    chain, key = issue_certificate(folder, ["veil.example", "10.0.0.1", "veil.example"], days=30)
    facts = check_brought(chain, key, ["veil.example", "10.0.0.1"])
    assert facts.hosts == ("veil.example", "10.0.0.1")
    assert facts.days_left == 29
    assert (mode(key), mode(key.resolve().parent)) == (0o600, 0o700)
    assert chain.read_bytes().count(b"BEGIN CERTIFICATE") == 2


def test_issuing_again_replaces_key_and_certificate_and_leaves_no_old_key(folder: Path) -> None:
    before = [path.read_bytes() for path in issue_certificate(folder, HOSTS)]
    after = [path.read_bytes() for path in issue_certificate(folder, HOSTS)]
    assert before[0] != after[0]
    assert before[1] != after[1]
    handshake(folder, "localhost")
    assert len([path for path in folder.rglob("link.key") if not path.is_symlink()]) == 1


class Crash(BaseException):
    """The power goes."""


@pytest.mark.parametrize("call", ["mkdir", "open", "fsync", "symlink", "replace", "unlink"])
def test_a_crash_while_rotating_leaves_a_pair_that_fits(
    folder: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """Before each single call on the file system, in turn; repeating completes it."""
    issue_certificate(folder, HOSTS)
    for survived in range(40):
        crashed = _issue_until(folder, monkeypatch, call, survived)
        handshake(folder, "localhost")
        issue_certificate(folder, HOSTS)
        handshake(folder, "localhost")
        if not crashed:
            assert survived > 0, f"{call} is never called"
            return
    raise AssertionError("it never came to its end")


def _issue_until(folder: Path, monkeypatch: pytest.MonkeyPatch, call: str, survived: int) -> bool:
    """Issue, and crash after so many calls."""
    real: Callable[..., object] = getattr(os, call)
    left = survived

    def failing(*args: object, **options: object) -> object:
        nonlocal left
        if left == 0:
            raise Crash
        left -= 1
        return real(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, call, failing)
        try:
            issue_certificate(folder, HOSTS)
        except Crash:
            return True
    return False


@pytest.mark.parametrize(
    ("hosts", "days", "message"),
    [
        ([], 30, "no host"),
        (["https://veil.example"], 30, "leave scheme and port out"),
        (HOSTS, 0, "at least one day"),
        (HOSTS, -5, "at least one day"),
    ],
)
def test_what_cannot_be_issued_changes_nothing(folder: Path, hosts: list[str], days: int, message: str) -> None:
    chain, _ = issue_certificate(folder, HOSTS)
    before = chain.read_bytes()
    with pytest.raises(InputError, match=message):
        issue_certificate(folder, hosts, days=days)
    assert chain.read_bytes() == before


def test_a_certificate_does_not_outlast_its_authority(folder: Path) -> None:
    chain, _ = issue_certificate(folder, HOSTS, days=10**9)
    end = describe((folder / "ca.pem").read_bytes()).not_after
    assert describe(chain.read_bytes()).not_after == end
    with pytest.raises(InputError, match="within the authority's time"):
        issue_certificate(folder, HOSTS, at=end + timedelta(days=1))


def test_an_ordinary_certificate_starts_a_little_early_for_clocks_that_are_late(folder: Path) -> None:
    now = datetime.now(UTC).replace(microsecond=0)
    facts = describe(issue_certificate(folder, HOSTS, at=now)[0].read_bytes())
    assert facts.not_before == now - timedelta(hours=1)
    assert facts.not_after == now + timedelta(days=LINK_DAYS)


def test_a_missing_or_mixed_up_authority_is_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="make an authority first"):
        issue_certificate(tmp_path, HOSTS)
    make_authority(tmp_path / "other", "Study 8")
    (tmp_path / "other" / "ca.key").replace(folder / "ca.key")
    with pytest.raises(InputError, match=r"is not the key of ca\.pem"):
        issue_certificate(folder, HOSTS)
