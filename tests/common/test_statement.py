# SPDX-License-Identifier: Apache-2.0
"""Tests of `veil.common.statement`: one written form, a signature over every character, nothing out of bounds."""

from __future__ import annotations

import json
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from veil.common.keys import NodeKey, canonical_pem
from veil.common.privacy import Mechanism, NeighboringRelation, PrivacyUnit
from veil.common.statement import (
    MAX_RELEASES,
    Cost,
    LedgerRun,
    Releases,
    Repeated,
    SignedStatement,
    StatedLimits,
    Statement,
    canonical,
    expanded,
    key_fingerprint,
    noise_of,
    sampler_of,
    summed_up,
)

GRADIENT = Mechanism(noise_multiplier=7.1, max_grad_norm=0.5)
SAMPLED = Mechanism(noise_multiplier=1.3, max_grad_norm=0.5, sample_rate=0.25, steps=4)


def statement(**change: Any) -> Statement:
    fields: dict[str, Any] = {
        "simulation": False,
        "site": 'Bonn "am Rhein" ☃',
        "job": "job",
        "plan_sha256": "0" * 64,
        "unit": PrivacyUnit.RECORD,
        "relation": NeighboringRelation.ADD_OR_REMOVE_ONE,
        "sampler": "full-batch",
        "noise": "os",
        "releases": (Releases(first=1, last=3, kind="gradient", mechanism=GRADIENT, count=4),),
        "ledger": (LedgerRun(this_run=True, noise="os", mechanisms=(Repeated(mechanism=GRADIENT, count=4),)),),
        "ledger_head": "1" * 64,
        "ledger_lines": 8,
        "delta": 1e-5,
        "this_run": Cost(epsilon=1.0, by_accountant={"pld": 1.0, "rdp": None}),
        "lifetime": Cost(epsilon=None, by_accountant={}),
        "limits": StatedLimits(epsilon_per_run=4.0, epsilon_lifetime=8.0, unit=PrivacyUnit.RECORD),
        "backbone_sha256": None,
        "code_sha256": "2" * 64,
        "versions": {"veil": "1"},
        "audit": {"epsilon": 0.5},
        "time": "2030-01-01T00:00:00+00:00",
        **change,
    }
    return Statement(**fields)


def test_a_statement_is_read_as_it_was_written_and_has_one_form() -> None:
    written = statement().text
    assert Statement.from_text(written) == statement()
    assert written.isascii() and written == canonical(json.loads(written))
    assert f'"{GRADIENT.noise_multiplier.hex()}"' in written


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        statement().text + " ",
        statement().text.replace('"delta":1e-05', '"delta":0.00001'),
        statement().text.replace('"ledger_lines":8', '"ledger_lines":"8"'),
        statement().text.replace('"simulation":false', '"simulation":0'),
        statement().text.replace('"steps":1', '"steps":1.0'),
        statement().text.replace('"0x1.0000000000000p-1"', '"0x1p-1"'),
        statement().text.replace('"noise":"os"', '"noise":"os","noisy":1', 1),
        statement().text.replace('"epsilon":1.0', '"epsilon":NaN'),
        statement().text.replace('{"epsilon":0.5}', "[" * 200_000),
    ],
)
def test_any_other_form_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        Statement.from_text(text)


@pytest.mark.parametrize(
    ("first", "last", "count"), [(3, 1, 1), (1, 3, 2), (0, MAX_RELEASES + 9, MAX_RELEASES), (0, 0, MAX_RELEASES + 1)]
)
def test_releases_are_one_a_round_or_more_and_not_without_end(first: int, last: int, count: int) -> None:
    with pytest.raises(ValueError, match=r"count|releases"):
        Releases(first=first, last=last, kind="gradient", mechanism=GRADIENT, count=count)


def test_a_statement_that_would_exhaust_its_reader_is_refused() -> None:
    many = Repeated(mechanism=GRADIENT, count=MAX_RELEASES)
    with pytest.raises(ValueError, match="more than"):
        statement(ledger=(LedgerRun(this_run=True, noise="os", mechanisms=(many, many)),))


def test_a_signature_covers_every_character_and_is_made_for_this_purpose() -> None:
    key = NodeKey.generate()
    signed = SignedStatement.sign(statement(), key)
    assert signed.genuine and signed.public_pem == key.public_pem
    other = statement(time="2030-01-01T00:00:01+00:00").text
    assert not SignedStatement(text=other, signature=signed.signature, public_pem=key.public_pem).genuine
    bare = key.sign(signed.text.encode())
    assert not SignedStatement(text=signed.text, signature=bare, public_pem=key.public_pem).genuine
    stranger = NodeKey.generate().public_pem
    assert not SignedStatement(text=signed.text, signature=signed.signature, public_pem=stranger).genuine


def test_only_keys_of_known_curves_count_and_in_one_form() -> None:
    pem = NodeKey.generate().public_pem
    assert canonical_pem(pem) == canonical_pem(b"\n" + pem + b"\n\n") == pem
    other = (
        ec.generate_private_key(ec.SECP521R1())
        .public_key()
        .public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    )
    assert canonical_pem(other) is None and canonical_pem(b"no key") is None
    assert key_fingerprint(pem) == key_fingerprint(pem + b"\n") != key_fingerprint(b"no key")


def test_mechanisms_are_counted_and_counted_out_again() -> None:
    done = [GRADIENT, SAMPLED, GRADIENT]
    summed = summed_up([(one, None) for one in done])
    assert [(one.mechanism, one.count) for one in summed] == [(GRADIENT, 2), (SAMPLED, 1)]
    assert list(expanded(summed)) == [GRADIENT, GRADIENT, SAMPLED]


def test_samplers_and_noise_have_their_words() -> None:
    assert (sampler_of([GRADIENT]), sampler_of([])) == ("full-batch", "full-batch")
    assert sampler_of([GRADIENT, SAMPLED]) == "poisson 0.25, 1"
    assert (noise_of(["os", "os"]), noise_of(["os", "fixed"])) == ("os", "fixed, os")
    assert statement().private and not statement(noise="fixed, os").private
