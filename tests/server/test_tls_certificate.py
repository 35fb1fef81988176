# SPDX-License-Identifier: Apache-2.0
"""Tests of `veil.server.tls_certificate`: a certificate from elsewhere works or is refused with its reason."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from veil.common.errors import InputError
from veil.server.tls_certificate import check_brought, describe, general_name

NOON = datetime(2030, 5, 1, 12, tzinfo=UTC)
RSA = rsa.generate_private_key(public_exponent=65537, key_size=2048)
Pair = tuple[Path, Path]


def bring(folder: Path, hosts: Sequence[str] = ("veil.example",), password: bytes | None = None) -> Pair:
    """What a hospital's own authority hands out: RSA, valid for ten days from noon."""
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Hospital")])
    builder = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(RSA.public_key())
        .serial_number(7)
        .not_valid_before(NOON)
        .not_valid_after(NOON + timedelta(days=10))
    )
    if hosts:
        names: list[x509.GeneralName] = [
            x509.DNSName(host) if host.startswith("*") else general_name(host) for host in hosts
        ]
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    certificate, key = folder / "brought.pem", folder / "brought.key"
    certificate.write_bytes(builder.sign(RSA, hashes.SHA256()).public_bytes(Encoding.PEM))
    encryption = BestAvailableEncryption(password) if password else NoEncryption()
    key.write_bytes(RSA.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption))
    key.chmod(0o640)
    return certificate, key


def check(pair: Pair, *hosts: str, at: datetime = NOON) -> None:
    check_brought(*pair, hosts or ("veil.example",), at)


def test_a_certificate_is_described(tmp_path: Path) -> None:
    certificate, _ = bring(tmp_path, ["veil.example", "10.0.0.1", "::1"])
    facts = describe(certificate.read_bytes(), NOON)
    assert facts.subject == "CN=Hospital"
    assert facts.hosts == ("veil.example", "10.0.0.1", "::1")
    assert (facts.not_before, facts.not_after, facts.days_left) == (NOON, NOON + timedelta(days=10), 10)


@pytest.mark.parametrize(("hours", "days"), [(1, 9), (239, 0), (240, 0), (241, -1), (265, -2)])
def test_days_left_are_whole_days_and_negative_after_the_end(tmp_path: Path, hours: int, days: int) -> None:
    certificate, _ = bring(tmp_path)
    assert describe(certificate.read_bytes(), NOON + timedelta(hours=hours)).days_left == days


@pytest.mark.parametrize(
    ("covered", "wanted"),
    [
        (["veil.example"], "veil.example"),
        (["veil.example"], "VEIL.example"),
        (["*.hospital.example"], "veil.hospital.example"),
        (["10.0.0.1"], "10.0.0.1"),
        (["::1"], "0:0:0:0:0:0:0:1"),
    ],
)
def test_a_fitting_pair_is_accepted(tmp_path: Path, covered: list[str], wanted: str) -> None:
    facts = check_brought(*bring(tmp_path, covered), [wanted], NOON)
    assert facts.not_after == NOON + timedelta(days=10)


@pytest.mark.parametrize(
    ("covered", "wanted"),
    [
        (["veil.example"], "other.example"),
        (["veil.example"], "sub.veil.example"),
        (["*.hospital.example"], "a.veil.hospital.example"),
        (["*.hospital.example"], "hospital.example"),
        (["10.0.0.1"], "10.0.0.2"),
        (["*.0.0.1"], "10.0.0.1"),
        ([], "Hospital"),
    ],
)
def test_a_host_that_is_not_covered_is_named(tmp_path: Path, covered: list[str], wanted: str) -> None:
    with pytest.raises(InputError, match=rf"covers .*, not {wanted}"):
        check(bring(tmp_path, covered), wanted)


@pytest.mark.parametrize("moment", [NOON - timedelta(seconds=1), NOON + timedelta(days=10, seconds=1)])
def test_a_certificate_out_of_its_time_is_refused(tmp_path: Path, moment: datetime) -> None:
    with pytest.raises(InputError, match="is valid from 2030-05-01"):
        check(bring(tmp_path), at=moment)


def test_the_key_of_another_certificate_is_refused(tmp_path: Path) -> None:
    certificate, key = bring(tmp_path)
    other = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    key.write_bytes(other.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    with pytest.raises(InputError, match="is not the key of"):
        check((certificate, key))


def test_an_encrypted_key_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no usable key.*unencrypted"):
        check(bring(tmp_path, password=b"word"))


def test_a_key_that_everyone_can_read_is_refused(tmp_path: Path) -> None:
    pair = bring(tmp_path)
    pair[1].chmod(0o644)
    with pytest.raises(InputError, match="can be read by everyone"):
        check(pair)


def test_missing_and_empty_files_are_named(tmp_path: Path) -> None:
    certificate, key = bring(tmp_path)
    with pytest.raises(InputError, match=r"none\.pem \(No such file"):
        check((tmp_path / "none.pem", key))
    with pytest.raises(InputError, match=r"none\.key \(No such file"):
        check((certificate, tmp_path / "none.key"))
    certificate.write_bytes(b"")
    with pytest.raises(InputError, match="holds no certificate"):
        check((certificate, key))


@pytest.mark.parametrize(
    "host", ["", "https://veil.example", "veil.example:8443", "a..b", "-a.example", "krankenhäuser.de"]
)
def test_what_is_no_host_is_refused(host: str) -> None:
    with pytest.raises(InputError, match="a DNS name"):
        general_name(host)
