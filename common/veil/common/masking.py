# SPDX-License-Identifier: Apache-2.0
"""Masked sums: each site hides its release behind masks that cancel in the sum over the whole cohort and nowhere else.

Promises that a release and its masks are read apart by nobody who lacks the key of one of the site's honest partners,
that no two sessions share a mask, and that a session names the run, the round, the attempt and every member's key. In
the manner of Bonawitz et al. 2017 without shares of secrets: a site that drops out ends the attempt. X25519 (RFC 7748),
HKDF (RFC 5869), ChaCha20 (RFC 8439).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from numpy.typing import NDArray

from veil.common.keys import NodeKey, verify
from veil.common.statement import MOST_SHARING, canonical, key_fingerprint
from veil.common.update import MaskedUpdate, Update, unpacked

WORD_BITS = 48
"""Of a masked number: sums of 2²⁷ units on the lattice of 2²⁰ points a bound, at one and a half times float32."""

MOST_MEMBERS = MOST_SHARING
"""Of a cohort: more would cost every site more than a round is worth."""

_HALF, _ALL = np.uint64(1 << (WORD_BITS - 1)), np.uint64((1 << WORD_BITS) - 1)
_KEY, _PAIR, _SIGNED = b"veil masking key 1\0", b"veil mask 1\0", b"veil masking key\n"


@dataclass(frozen=True, kw_only=True, slots=True)
class Member:
    """One site of a cohort, as the others see it.

    Attributes:
        site: its name.
        masking_key: its public X25519 key, 32 bytes.
        signature: of name and masking key, by its node key.
        public_pem: its node key's public half, PEM, by whose fingerprint others know it.
    """

    site: str
    masking_key: bytes
    signature: bytes
    public_pem: bytes

    @property
    def genuine(self) -> bool:
        """Whether the masking key is the node key's owner's own."""
        return verify(self.public_pem, self.signature, _signed(self.site, self.masking_key))

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the node key."""
        return key_fingerprint(self.public_pem)


@dataclass(frozen=True, kw_only=True, slots=True, repr=False)
class MaskingKey:
    """A site's part in masked sums; printing it shows nothing secret.

    Attributes:
        site: whose.
        private: the X25519 key, derived from the node key: one secret to guard and to restore.
        node: the node key.
    """

    site: str
    private: X25519PrivateKey
    node: NodeKey

    @classmethod
    def of(cls, node: NodeKey, site: str) -> MaskingKey:
        """The masking key of a node key's owner; a node key of several sites, as in a simulation, gives several."""
        return _derived(node, site)

    @property
    def public(self) -> bytes:
        """The public half, 32 bytes."""
        return self.private.public_key().public_bytes_raw()

    @property
    def member(self) -> Member:
        """What others are to know, signed."""
        signature = self.node.sign(_signed(self.site, self.public))
        return Member(site=self.site, masking_key=self.public, signature=signature, public_pem=self.node.public_pem)

    def mask(self, update: Update, members: Sequence[Member], session: bytes) -> MaskedUpdate:
        """Hide a release behind one mask for each other member.

        Args:
            update: noised lattice points.
            members: the whole cohort, this site among them.
            session: from `session_of`.

        Raises:
            ValueError: for points beyond ±2⁴⁷, or a key that is no point of the curve.
        """
        words = {name: _word(points) for name, points in sorted(update.points.items())}
        for other in members:
            if other.site == self.site:
                continue
            stream = self._stream(other, session)
            for name, word in words.items():
                drawn = stream.update(bytes(word.size * WORD_BITS // 8))
                mask = unpacked(np.frombuffer(drawn, dtype="<u2").reshape(*word.shape, 3))
                words[name] = (word + mask if self.site < other.site else word - mask) & _ALL
        return MaskedUpdate(words=words, spacing=update.spacing)

    def _stream(self, other: Member, session: bytes) -> CipherContext:
        """The key stream that this pair has in this session."""
        secret = self.private.exchange(X25519PublicKey.from_public_bytes(other.masking_key))
        pair = canonical(sorted((self.site, other.site))).encode()
        key = HKDF(algorithm=hashes.SHA256(), length=32, salt=session, info=_PAIR + pair).derive(secret)
        return Cipher(ChaCha20(key, bytes(16)), mode=None).encryptor()

    def __repr__(self) -> str:
        return f"MaskingKey({self.site!r})"


@lru_cache(maxsize=4096)
def _derived(node: NodeKey, site: str) -> MaskingKey:
    secret = node.private.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())
    seed = HKDF(algorithm=hashes.SHA256(), length=32, salt=None, info=_KEY + site.encode()).derive(secret)
    return MaskingKey(site=site, private=X25519PrivateKey.from_private_bytes(seed), node=node)


def session_of(*, job: str, plan: str, round_: int, kind: str, attempt: int, members: Sequence[Member]) -> bytes:
    """What masks are derived for, 32 bytes: another run, plan, round, attempt, member or key gives another.

    Args:
        job: the run.
        plan: SHA-256 of its plan.
        round_: its round.
        kind: what is released.
        attempt: counts the cohorts that were asked for this release.
        members: the whole cohort, in any order.
    """
    cohort = sorted([one.site, one.masking_key.hex(), one.fingerprint] for one in members)
    return hashlib.sha256(canonical([job, plan, round_, kind, attempt, cohort]).encode()).digest()


def unmask(updates: Sequence[MaskedUpdate]) -> Update:
    """The sum over the whole cohort, where the masks cancel: points within ±2⁴⁷, 64 bits.

    Anything else than every member's update of one session gives numbers without meaning.

    Raises:
        ValueError: for updates of different tensors, shapes or spacings, or none.
    """
    if not updates:
        raise ValueError("no masked updates; expected the whole cohort's")
    shapes = {(one.spacing, *((name, word.shape) for name, word in sorted(one.words.items()))) for one in updates}
    if len(shapes) != 1:
        raise ValueError("masked updates of different shapes or lattices; expected one of all members")
    return Update(
        points={
            name: _points(np.sum([one.words[name] for one in updates], axis=0, dtype=np.uint64))
            for name in updates[0].words
        },
        spacing=updates[0].spacing,
    )


def _word(points: NDArray[np.signedinteger]) -> NDArray[np.uint64]:
    wide = points.astype(np.int64)
    if wide.size and not -(2 ** (WORD_BITS - 1)) <= wide.min() <= wide.max() < 2 ** (WORD_BITS - 1):
        raise ValueError(f"lattice points beyond ±2^{WORD_BITS - 1}")
    return wide.view(np.uint64) & _ALL


def _points(words: NDArray[np.uint64]) -> NDArray[np.int64]:
    return (((words & _ALL) ^ _HALF) - _HALF).view(np.int64)


def _signed(site: str, public: bytes) -> bytes:
    return _SIGNED + site.encode() + b"\n" + public
