# SPDX-License-Identifier: Apache-2.0
"""Tests of `veil.common.keys`: one owner, known curves, and no signature that fits by accident."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

from veil.common.errors import InputError
from veil.common.keys import NodeKey, verify

MESSAGE = b"round 3"


@pytest.fixture
def key() -> NodeKey:
    return NodeKey.generate()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "node.key"


def public_pem(private: ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey) -> bytes:
    return private.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def put(path: Path, content: bytes, mode: int = 0o600) -> Path:
    path.write_bytes(content)
    path.chmod(mode)
    return path


def test_a_saved_key_is_its_owner_s_alone_and_comes_back(key: NodeKey, path: Path) -> None:
    key.save(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert NodeKey.load(path).public_pem == key.public_pem


def test_a_key_is_never_written_over_another(key: NodeKey, path: Path) -> None:
    key.save(path)
    before = path.read_bytes()
    with pytest.raises(InputError, match="exists"):
        NodeKey.generate().save(path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o660])
def test_a_key_that_others_can_touch_is_refused(key: NodeKey, path: Path, mode: int) -> None:
    key.save(path)
    path.chmod(mode)
    with pytest.raises(InputError, match="can be read by others"):
        NodeKey.load(path)


def test_a_missing_key_is_named(path: Path) -> None:
    with pytest.raises(InputError, match=r"node\.key \(No such file"):
        NodeKey.load(path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n",
        ec.generate_private_key(ec.SECP521R1()).private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
        ed25519.Ed25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
        NodeKey.generate().private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"word")),
        NodeKey.generate().public_pem,
    ],
    ids=["empty", "garbage", "another curve", "another kind", "encrypted", "public"],
)
def test_anything_but_a_plain_key_of_a_known_curve_is_refused(path: Path, content: bytes) -> None:
    with pytest.raises(InputError, match="is no such key"):
        NodeKey.load(put(path, content))


def test_a_signature_fits_its_message_and_key_only(key: NodeKey) -> None:
    signature = key.sign(MESSAGE)
    assert verify(key.public_pem, signature, MESSAGE)
    assert not verify(key.public_pem, signature, MESSAGE + b"0")
    assert not verify(key.public_pem, signature[:-1] + bytes([signature[-1] ^ 1]), MESSAGE)
    assert not verify(NodeKey.generate().public_pem, signature, MESSAGE)


@pytest.mark.parametrize("signature", [b"", b"\x30\x00", bytes(96)])
def test_what_is_no_signature_does_not_fit(key: NodeKey, signature: bytes) -> None:
    assert not verify(key.public_pem, signature, MESSAGE)


@pytest.mark.parametrize(
    "pem",
    [
        b"",
        b"no key",
        b"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n",
        # SubjectPublicKeyInfo of an elliptic-curve key on 1.2.3.4, a curve that nobody has
        b"-----BEGIN PUBLIC KEY-----\nMBYwDgYHKoZIzj0CAQYDKgMEAwQABAEC\n-----END PUBLIC KEY-----\n",
        public_pem(ed25519.Ed25519PrivateKey.generate()),
    ],
    ids=["empty", "text", "garbage", "unknown curve", "another kind"],
)
def test_what_is_no_key_fits_nothing(key: NodeKey, pem: bytes) -> None:
    assert not verify(pem, key.sign(MESSAGE), MESSAGE)


def test_a_signature_by_another_curve_does_not_count() -> None:
    private = ec.generate_private_key(ec.SECP521R1())
    signature = private.sign(MESSAGE, ec.ECDSA(hashes.SHA512()))
    assert not verify(public_pem(private), signature, MESSAGE)


def test_a_key_of_an_earlier_version_goes_on_signing(path: Path) -> None:
    """On P-384, with SHA-384, as its earlier signatures are."""
    earlier = NodeKey(private=ec.generate_private_key(ec.SECP384R1()))
    earlier.save(path)
    signature = NodeKey.load(path).sign(MESSAGE)
    assert verify(earlier.public_pem, signature, MESSAGE)
    earlier.private.public_key().verify(signature, MESSAGE, ec.ECDSA(hashes.SHA384()))
    assert NodeKey.generate().private.curve.name == "secp256r1"


def test_printing_a_key_shows_nothing(key: NodeKey) -> None:
    assert repr(key) == str(key) == f"{key}" == "NodeKey(…)"
