# SPDX-License-Identifier: Apache-2.0
"""The coordinator's own certificate authority, and the certificate it issues for the link.

Promises that an authority is never overwritten, that private keys are readable by their owner alone, and that the
link's key and certificate are exchanged in one step: whatever crashes when, the two files fit each other.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from veil.common.durable import PUBLIC, sync_folder, write_new
from veil.common.errors import InputError
from veil.server.tls_certificate import first_certificate, fits, general_name, read_file, read_key

AUTHORITY_DAYS: Final = 3650
"""How long an authority lasts."""

LINK_DAYS: Final = 397
"""How long the link's certificate lasts unless told otherwise."""

_SKEW = timedelta(hours=1)


def make_authority(folder: Path, name: str) -> Path:
    """Make a certificate authority: `ca.pem` and `ca.key` in a folder, EC P-384.

    A key without a certificate, left by a crash, gets its certificate.

    Args:
        folder: its place, made when missing.
        name: the authority's name, at most 64 characters.

    Returns:
        the certificate's file.

    Raises:
        InputError: when there is an authority already, or the name is unusable.
    """
    certificate, key_file = folder / "ca.pem", folder / "ca.key"
    if certificate.exists():
        raise InputError(f"{certificate} exists", "no authority there yet", "keep it: the sites trust it")
    subject = _subject(name)
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    if key_file.exists():
        key = _authority_key(key_file)
    else:
        key = ec.generate_private_key(ec.SECP384R1())
        write_new(key_file, _key_pem(key))
    start = datetime.now(UTC) - _SKEW
    builder = _certificate(subject, key.public_key(), start, start + timedelta(days=AUTHORITY_DAYS))
    builder = (
        builder.issuer_name(subject)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(key_cert_sign=True, crl_sign=True), critical=True)
    )
    write_new(certificate, builder.sign(key, hashes.SHA384()).public_bytes(Encoding.PEM), PUBLIC)
    return certificate


def issue_certificate(
    folder: Path, hosts: Sequence[str], *, days: int = LINK_DAYS, at: datetime | None = None
) -> tuple[Path, Path]:
    """Issue the link's certificate, or a new one with a new key in place of the last.

    `link.pem` (with its authority behind it) and `link.key` are names that lead through one symbolic link into a folder
    with the pair; exchanging that link exchanges both.

    Args:
        folder: the authority's.
        hosts: DNS names and IP addresses under which sites reach the coordinator.
        days: how long it lasts, at most as long as the authority.
        at: the moment of issue; now, when None.

    Returns:
        the files of the chain and of the key.

    Raises:
        InputError: when there is no usable authority, or hosts or days are unusable.
    """
    authority, authority_key = _authority(folder)
    now = at or datetime.now(UTC)
    end = min(now + timedelta(days=min(days, AUTHORITY_DAYS)), authority.not_valid_after_utc)
    if days < 1 or end <= now:
        raise InputError(
            f"a certificate of {days} days, until {end:%Y-%m-%d}",
            "at least one day, within the authority's time",
            "ask for more days, or make a new authority and invite the sites again",
        )
    key = ec.generate_private_key(ec.SECP384R1())
    unsigned = _leaf(key.public_key(), hosts, now, end).issuer_name(authority.subject)
    issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key())
    leaf = unsigned.add_extension(issuer, critical=False).sign(authority_key, hashes.SHA384())
    pair = folder / f"link-{leaf.serial_number:x}"
    pair.mkdir(mode=0o700)
    write_new(pair / "link.key", _key_pem(key))
    write_new(pair / "link.pem", b"".join(one.public_bytes(Encoding.PEM) for one in (leaf, authority)), PUBLIC)
    _exchange(folder, pair)
    return folder / "link.pem", folder / "link.key"


def _exchange(folder: Path, pair: Path) -> None:
    """Let the names lead to a new pair, and remove the last one."""
    link = folder / "link"
    last = link.resolve() if link.is_symlink() else None
    _point(link, pair.name)
    for name in ("link.key", "link.pem"):
        _point(folder / name, f"link/{name}")
    if last is not None and last.parent == folder.resolve():
        shutil.rmtree(last, ignore_errors=True)


def _point(link: Path, target: str) -> None:
    fresh = link.with_name(f".{link.name}.fresh")
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(target)
    fresh.replace(link)
    sync_folder(link.parent)


def _authority(folder: Path) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    path = folder / "ca.pem"
    pem = read_file(path, "the authority's certificate", "make an authority first")
    certificate, key = first_certificate(pem, str(path)), _authority_key(folder / "ca.key")
    if not fits(certificate, key):
        raise InputError(f"{folder / 'ca.key'} is not the key of ca.pem", "one pair", "restore both from a backup")
    return certificate, key


def _authority_key(path: Path) -> ec.EllipticCurvePrivateKey:
    key = read_key(path)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise InputError(f"{path} holds another kind of key", "an elliptic-curve key", "restore it from a backup")
    return key


def _leaf(
    public: ec.EllipticCurvePublicKey, hosts: Sequence[str], at: datetime, end: datetime
) -> x509.CertificateBuilder:
    names = [general_name(host) for host in dict.fromkeys(hosts)]
    if not names:
        raise InputError("no host", "a DNS name or an IP address", "say under which name sites reach the coordinator")
    return (
        _certificate(_subject("Veil link"), public, at - _SKEW, end)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(digital_signature=True), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
    )


def _certificate(
    subject: x509.Name, public: ec.EllipticCurvePublicKey, start: datetime, end: datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(start)
        .not_valid_after(end)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
    )


def _usage(*, digital_signature: bool = False, key_cert_sign: bool = False, crl_sign: bool = False) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=digital_signature,
        key_cert_sign=key_cert_sign,
        crl_sign=crl_sign,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _subject(name: str) -> x509.Name:
    try:
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    except ValueError:
        raise InputError(f"an authority named {name!r}", "1 to 64 characters", "choose a shorter name") from None


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
