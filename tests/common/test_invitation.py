# SPDX-License-Identifier: Apache-2.0
"""Tests of `veil.common.invitation`: what is handed over is what arrives, and the secret shows nowhere else."""

from __future__ import annotations

import base64
import stat
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from veil.common.errors import InputError
from veil.common.invitation import Application, Invitation, digest, problems
from veil.common.keys import NodeKey

INVITED_BY = "Zm9ydHktdHdvIGFuZCBzb21lIG1vcmUgYnl0ZXMgaGU"
NOON = datetime(2030, 5, 1, 12, tzinfo=UTC)


def certificate(name: str) -> str:
    key = NodeKey.generate().private
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    made = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(NOON)
        .not_valid_after(NOON + timedelta(days=1))
        .sign(key, hashes.SHA384())
    )
    return made.public_bytes(Encoding.PEM).decode()


CA = certificate("one")


def invitation(**change: Any) -> Invitation:
    fields = {"site": "Ulm", "url": "https://veil.example:8443", "secret": INVITED_BY, "expires": NOON, "ca": CA}
    return Invitation.model_validate({**fields, **change})


def written(given: Invitation, tmp_path: Path) -> str:
    given.write(tmp_path / "Ulm.invitation")
    return (tmp_path / "Ulm.invitation").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"site": "St. Elsewhere - ward_7"},
        {"url": "https://10.0.0.1:443"},
        {"url": "https://[::1]:8443"},
        {"expires": datetime(2030, 5, 1, 14, tzinfo=timezone(timedelta(hours=2)))},
        {"ca": CA + certificate("two")},
    ],
)
def test_a_written_invitation_is_read_as_the_same(tmp_path: Path, change: dict[str, Any]) -> None:
    given = invitation(**change)
    given.write(tmp_path / "file")
    assert Invitation.read(tmp_path / "file") == given


def test_an_invitation_file_is_private_and_new(tmp_path: Path) -> None:
    written(invitation(), tmp_path)
    assert stat.S_IMODE((tmp_path / "Ulm.invitation").stat().st_mode) == 0o600
    with pytest.raises(InputError, match="exists"):
        written(invitation(site="Bonn"), tmp_path)
    assert Invitation.read(tmp_path / "Ulm.invitation").site == "Ulm"


def test_words_around_the_certificates_are_dropped() -> None:
    assert invitation(ca=f"Hospital root\n{CA}''' trailing").ca == CA


def test_an_invitation_ends_at_its_moment() -> None:
    assert not invitation().expired(NOON - timedelta(microseconds=1))
    assert invitation().expired(NOON)
    assert invitation().expired(NOON.astimezone(timezone(timedelta(hours=-5))))


@pytest.mark.parametrize(
    "url",
    [
        "http://veil.example:8443",
        "https://veil.example",
        "https://veil.example:8443/",
        "https://veil.example:8443/v1",
        "https://user@veil.example:8443",
        "https://:8443",
        "https://veil.example:0",
        "https://veil.example:99999",
        "https://veil.example:84 43",
        'https://veil.example:8443"',
        "veil.example:8443",
        "",
    ],
)
def test_an_address_is_https_host_and_port(url: str) -> None:
    with pytest.raises(ValidationError) as error:
        invitation(url=url)
    assert problems(error.value).startswith("url: ")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("secret", INVITED_BY[:-1]),
        ("secret", INVITED_BY + "A"),
        ("secret", INVITED_BY[:-1] + "+"),
        ("site", ""),
        ("site", 'Ulm"\nurl = "https://evil.example:1'),
        ("expires", datetime(2030, 5, 1)),
        ("ca", "no certificate"),
        ("ca", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"),
        ("more", "x"),
    ],
)
def test_a_value_out_of_form_is_refused_by_name(key: str, value: object) -> None:
    with pytest.raises(ValidationError) as error:
        invitation(**{key: value})
    assert problems(error.value).startswith(f"{key}: ")


@pytest.mark.parametrize("line", ["site = ", "url = ", "secret = ", "expires = "])
def test_a_missing_line_is_named(tmp_path: Path, line: str) -> None:
    text = written(invitation(), tmp_path)
    broken = "\n".join(one for one in text.splitlines() if not one.startswith(line))
    with pytest.raises(InputError, match=rf"\({line.split()[0]}: Field required\)"):
        Invitation.parse(broken)


def test_a_file_that_is_no_toml_or_not_there_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        Invitation.parse("site = ")
    with pytest.raises(InputError, match="FileNotFoundError"):
        Invitation.read(tmp_path / "none")
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="UnicodeDecodeError"):
        Invitation.read(tmp_path / "binary")


def test_the_secret_stands_in_no_repr_and_no_error(tmp_path: Path) -> None:
    applied = Application.sign(INVITED_BY, NodeKey.generate())
    assert INVITED_BY not in repr(invitation()) + str(invitation()) + repr(applied) + str(applied)
    text = written(invitation(), tmp_path)
    for broken in (
        text.replace(INVITED_BY, INVITED_BY + "!"),
        text.replace(f'"{INVITED_BY}"', INVITED_BY),
        text.replace("site", "sit"),
    ):
        with pytest.raises(InputError) as error:
            Invitation.parse(broken)
        assert INVITED_BY not in str(error.value)
        assert error.value.__cause__ is None
    with pytest.raises(ValidationError) as raw:
        Application(secret=INVITED_BY + "!", public_key="", signature="")
    assert INVITED_BY not in str(raw.value) + repr(raw.value)


def test_an_application_proves_its_key_for_its_secret_only() -> None:
    key = NodeKey.generate()
    applied = Application.sign(INVITED_BY, key)
    assert applied.is_proven()
    assert Application.model_validate_json(applied.model_dump_json()).is_proven()
    assert not applied.model_copy(update={"secret": INVITED_BY[::-1]}).is_proven()
    assert not applied.model_copy(update={"public_key": NodeKey.generate().public_pem.decode()}).is_proven()


def test_a_signature_made_for_something_else_is_no_proof() -> None:
    """Without the context string, a signature under the ledger could pass for one under an application."""
    key = NodeKey.generate()
    other = key.sign(digest(INVITED_BY) + key.public_pem)
    applied = Application.sign(INVITED_BY, key).model_copy(update={"signature": base64.b64encode(other).decode()})
    assert not applied.is_proven()


@settings(max_examples=50, deadline=None)
@given(public_key=st.text(max_size=80), signature=st.text(max_size=80))
def test_any_text_is_an_application_that_proves_nothing(public_key: str, signature: str) -> None:
    assert not Application(secret=INVITED_BY, public_key=public_key, signature=signature).is_proven()
