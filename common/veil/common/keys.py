# SPDX-License-Identifier: Apache-2.0
"""A site's key pair: what it proves its identity with, and what it signs its ledger with.

Promises that a private key is written readable by its owner alone and never over another one; elliptic curve
P-384, as Flower's node authentication takes it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

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

_ECDSA = ec.ECDSA(hashes.SHA384())


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
        return cls(private=ec.generate_private_key(ec.SECP384R1()))

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
        if not isinstance(private, ec.EllipticCurvePrivateKey) or not isinstance(private.curve, ec.SECP384R1):
            raise InputError(f"{path} is no such key", "a P-384 private key in PEM", "restore it from backup")
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
        """An ECDSA signature (FIPS 186-5, SHA-384) of `message`."""
        return self.private.sign(message, _ECDSA)

    def __repr__(self) -> str:
        return "NodeKey(…)"


def verify(public_pem: bytes, signature: bytes, message: bytes) -> bool:
    """Whether `signature` of `message` was made with the private half of `public_pem`; False for the unreadable."""
    try:
        public = load_pem_public_key(public_pem)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        return False
    if not isinstance(public, ec.EllipticCurvePublicKey) or not isinstance(public.curve, ec.SECP384R1):
        return False
    try:
        public.verify(signature, message, _ECDSA)
    except InvalidSignature:
        return False
    return True
