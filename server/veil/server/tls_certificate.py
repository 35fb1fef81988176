# SPDX-License-Identifier: Apache-2.0
"""Reading certificates and keys: what a certificate says, and whether one that was issued elsewhere will do.

Promises that a brought certificate that cannot work is refused with its reason, before a site could trip over it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key

from veil.common.errors import InputError

_LABEL = re.compile(r"(?!-)[a-z0-9_-]{1,63}(?<!-)")


@dataclass(frozen=True, kw_only=True, slots=True)
class CertificateFacts:
    """What a certificate says.

    Attributes:
        subject: whom it names, RFC 4514.
        hosts: DNS names and IP addresses it covers.
        not_before: its first moment.
        not_after: its last moment.
        days_left: whole days until then; negative when it is over.
    """

    subject: str
    hosts: tuple[str, ...]
    not_before: datetime
    not_after: datetime
    days_left: int


def describe(pem: bytes, at: datetime | None = None) -> CertificateFacts:
    """What the first certificate of a PEM text says.

    Args:
        pem: the text.
        at: the moment from which days are counted; now, when None.

    Raises:
        InputError: when there is none.
    """
    leaf = first_certificate(pem, "the text")
    left = leaf.not_valid_after_utc - (at or datetime.now(UTC))
    return CertificateFacts(
        subject=leaf.subject.rfc4514_string(),
        hosts=_hosts(leaf),
        not_before=leaf.not_valid_before_utc,
        not_after=leaf.not_valid_after_utc,
        days_left=math.floor(left / timedelta(days=1)),
    )


def check_brought(certificate: Path, key: Path, hosts: Sequence[str], at: datetime | None = None) -> CertificateFacts:
    """Check a certificate that was issued elsewhere.

    Args:
        certificate: the chain in PEM, the coordinator's own certificate first.
        key: its private key in PEM, unencrypted; a group may read it, others may not.
        hosts: what it must cover; a wildcard covers one label.
        at: the moment it must be valid at; now, when None.

    Raises:
        InputError: when the key does not fit, the time is not within the certificate's, or a host is not covered.
    """
    now = at or datetime.now(UTC)
    pem = read_file(certificate, "a certificate in PEM")
    facts = describe(pem, now)
    if not fits(first_certificate(pem, str(certificate)), read_key(key)):
        raise InputError(f"{key} is not the key of {certificate}", "one pair", "give the key it was issued for")
    if not facts.not_before <= now <= facts.not_after:
        raise InputError(
            f"{certificate} is valid from {facts.not_before} to {facts.not_after}",
            f"a certificate valid at {now}",
            "renew it, or set the clock",
        )
    missing = [host for host in hosts if not _covers(facts.hosts, host)]
    if missing:
        raise InputError(
            f"{certificate} covers {', '.join(facts.hosts) or 'no host'}, not {', '.join(missing)}",
            "every host as a subject alternative name",
            "have it issued for these hosts, or give the sites another address",
        )
    return facts


def first_certificate(pem: bytes, where: str) -> x509.Certificate:
    """The first certificate of a PEM text.

    Raises:
        InputError: when there is none; `where` says what was read.
    """
    try:
        return x509.load_pem_x509_certificates(pem)[0]
    except ValueError:
        raise InputError(f"{where} holds no certificate", "a certificate in PEM", "give the right file") from None


def read_file(path: Path, expectation: str, remedy: str = "give the right file") -> bytes:
    """A file's content.

    Raises:
        InputError: when it cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} ({error.strerror})", expectation, remedy) from None


def read_key(path: Path) -> PrivateKeyTypes:
    """An unencrypted private key in PEM.

    Raises:
        InputError: when it cannot be read, or everyone can read it.
    """
    pem = read_file(path, "a private key in PEM")
    if path.stat().st_mode & 0o007:
        raise InputError(f"{path} can be read by everyone", "permissions 0600 or 0640", f"chmod o= {path}")
    try:
        return load_pem_private_key(pem, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        expectation = "an unencrypted private key in PEM"
        raise InputError(f"{path} holds no usable key", expectation, "give the right file") from None


def fits(certificate: x509.Certificate, key: PrivateKeyTypes) -> bool:
    """Whether a key is the certificate's."""
    form = (Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return certificate.public_key().public_bytes(*form) == key.public_key().public_bytes(*form)


def general_name(host: str) -> x509.DNSName | x509.IPAddress:
    """A host as certificates name it.

    Raises:
        InputError: when it is neither a DNS name in ASCII nor an IP address.
    """
    try:
        return x509.IPAddress(ip_address(host))
    except ValueError:
        lower = host.lower()
    if len(lower) > 253 or not all(_LABEL.fullmatch(label) for label in lower.split(".")):
        raise InputError(f"host {host!r}", "a DNS name (in ASCII) or an IP address", "leave scheme and port out")
    return x509.DNSName(lower)


def _hosts(certificate: x509.Certificate) -> tuple[str, ...]:
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return ()
    addresses = names.get_values_for_type(x509.IPAddress)
    return (*names.get_values_for_type(x509.DNSName), *map(str, addresses))


def _covers(covered: Sequence[str], host: str) -> bool:
    name = general_name(host)
    if isinstance(name, x509.IPAddress):
        return str(name.value) in covered
    known = {one.lower() for one in covered}
    _, dot, parent = name.value.partition(".")
    return name.value in known or (bool(dot) and f"*.{parent}" in known)
