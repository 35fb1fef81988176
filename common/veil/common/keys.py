# SPDX-License-Identifier: Apache-2.0
"""A site's key pair: what it proves its identity with, and what it signs its ledger with.

Promises that a private key is written readable by its owner alone and never over another one. New keys are on the
curve P-256: Flower's node authentication takes it, and it signs a ledger line in a twelfth of the time that P-384
needs. Keys on P-384, which earlier versions made, go on signing.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, cast

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)

from veil.common.errors import InputError

_HASHES: Final[Mapping[str, hashes.HashAlgorithm]] = {"secp256r1": hashes.SHA256(), "secp384r1": hashes.SHA384()}
"""What is hashed with, by curve (FIPS 186-5, section 6.1: no weaker than the curve)."""

KEY_KINDS: Final = "P-256 or P-384"
"""The curves, in words."""


@dataclass(frozen=True, kw_only=True, slots=True, repr=False)
class NodeKey:
    """A key pair; printing it shows nothing secret.

    Attributes:
        private: the private half.
    """

    private: ec.EllipticCurvePrivateKey

    @classmethod
    def generate(cls) -> NodeKey:
        """A new key pair."""
        return cls(private=ec.generate_private_key(ec.SECP256R1()))

    @classmethod
    def load(cls, path: Path) -> NodeKey:
        """Read an unencrypted PEM file.

        Raises:
            InputError: when it is missing, readable by others, or not such a key.
        """
        try:
            mode, pem = path.stat().st_mode, path.read_bytes()
        except OSError as error:
            raise InputError(
                f"{path} ({error.strerror})", "the site's private key", "veil site init makes it"
            ) from None
        if mode & 0o077:
            raise InputError(f"{path} can be read by others", "permissions 0600", f"chmod 600 {path}")
        try:
            private = load_pem_private_key(pem, password=None)
        except (ValueError, TypeError, UnsupportedAlgorithm):
            private = None
        if not isinstance(private, ec.EllipticCurvePrivateKey) or private.curve.name not in _HASHES:
            raise InputError(f"{path} is no such key", f"a {KEY_KINDS} private key in PEM", "restore it from backup")
        return cls(private=private)

    def save(self, path: Path) -> None:
        """Write the private half to a new file of mode 0600.

        Raises:
            InputError: when the file is there already.
        """
        pem = self.private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        try:
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            raise InputError(f"{path} exists", "no key there yet", "keep it; a new key is a new identity") from None
        with os.fdopen(handle, "wb") as file:
            file.write(pem)
            file.flush()
            os.fsync(file.fileno())

    @property
    def public_pem(self) -> bytes:
        """The public half, PEM, as Flower's SuperLink stores it."""
        return self.private.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)

    def sign(self, message: bytes) -> bytes:
        """An ECDSA signature (FIPS 186-5) of `message`."""
        return self.private.sign(message, _ecdsa(self.private.curve))

    def __repr__(self) -> str:
        return "NodeKey(…)"


def verify(public_pem: bytes, signature: bytes, message: bytes) -> bool:
    """Whether `signature` of `message` was made with the private half of `public_pem`; False for the unreadable."""
    public = public_key(public_pem)
    if public is None:
        return False
    try:
        public.verify(signature, message, _ecdsa(public.curve))
    except InvalidSignature:
        return False
    return True


def canonical_pem(pem: bytes) -> bytes | None:
    """A public key's one PEM form, as Flower compares it byte for byte; None for what is no key of Veil's."""
    public = public_key(pem)
    return None if public is None else public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def public_key(pem: bytes) -> ec.EllipticCurvePublicKey | None:
    """A public key that Veil verifies with; None for what is none."""
    try:
        public = load_pem_public_key(pem)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        return None
    known = isinstance(public, ec.EllipticCurvePublicKey) and public.curve.name in _HASHES
    return cast("ec.EllipticCurvePublicKey", public) if known else None


def _ecdsa(curve: ec.EllipticCurve) -> ec.ECDSA:
    return ec.ECDSA(_HASHES[curve.name])
