# SPDX-License-Identifier: Apache-2.0
"""Tests of `veil.client.chain`: whatever is changed, removed, moved, doubled or signed by another is named."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from veil.client.chain import Fault, Finding, Line, examine, genesis, seal
from veil.common.keys import NodeKey

KEY = NodeKey.generate()
LENGTH = 6


def chain(site: str = "Ulm", key: NodeKey = KEY, length: int = LENGTH) -> list[Line]:
    lines: list[Line] = []
    for number in range(length):
        lines.append(seal({"kind": "spend", "what": number}, lines[-1].head if lines else genesis(site), key))
    return lines


LINES = chain()


def found(lines: Sequence[Line], *, site: str = "Ulm", key: NodeKey = KEY) -> tuple[Finding, ...]:
    return examine(lines, after=genesis(site), public_pem=key.public_pem)


def faults(lines: Sequence[Line]) -> list[tuple[int, Fault]]:
    return [(finding.seq, finding.fault) for finding in found(lines)]


def resealed(line: Line, key: NodeKey, **change: object) -> Line:
    """A line with another body whose hash and signature are right."""
    body = json.dumps({**line.fields, **change}, sort_keys=True, separators=(",", ":")).encode()
    hash_ = hashlib.sha256(line.prev.encode() + body).hexdigest()
    return replace(line, body=body, hash=hash_, signature=key.sign(b"veil ledger line\n" + hash_.encode()))


@pytest.mark.parametrize("length", [0, 1, LENGTH])
def test_a_chain_as_it_was_written_is_whole(length: int) -> None:
    assert found(LINES[:length]) == ()


def test_lines_are_numbered_from_one_and_linked() -> None:
    assert [line.seq for line in LINES] == list(range(1, LENGTH + 1))
    assert [line.prev for line in LINES] == [genesis("Ulm").hash, *(line.hash for line in LINES[:-1])]


def test_the_hash_is_sha256_of_the_former_hash_and_the_body() -> None:
    assert all(line.hash == hashlib.sha256(line.prev.encode() + line.body).hexdigest() for line in LINES)


def test_a_part_is_examined_from_a_known_line_on() -> None:
    assert examine(LINES[3:], after=LINES[2].head, public_pem=KEY.public_pem) == ()
    assert examine(LINES[3:], after=LINES[1].head, public_pem=KEY.public_pem) != ()


@pytest.mark.parametrize("where", range(LENGTH))
def test_a_changed_body_is_found_at_its_line(where: int) -> None:
    body = LINES[where].body.replace(b'"what":', b'"that":')
    assert faults([*LINES[:where], replace(LINES[where], body=body), *LINES[where + 1 :]]) == [
        (where + 1, Fault.CHANGED)
    ]


@pytest.mark.parametrize("where", range(LENGTH - 1))
def test_a_removed_line_is_found(where: int) -> None:
    assert faults([*LINES[:where], *LINES[where + 1 :]]) == [(where + 1, Fault.REMOVED)]


def test_lines_cut_off_at_the_end_leave_a_whole_chain() -> None:
    """What this module cannot find; the anchor does."""
    assert found(LINES[:-2]) == ()


def test_exchanged_lines_are_found_under_their_old_numbers_and_under_new_ones() -> None:
    exchanged = [LINES[0], LINES[2], LINES[1], *LINES[3:]]
    assert found(exchanged)
    renumbered = [replace(line, seq=seq) for seq, line in enumerate(exchanged, start=1)]
    assert [fault for _, fault in faults(renumbered)] == [Fault.REORDERED] * 2


def test_a_removed_line_is_not_hidden_by_new_numbers() -> None:
    closed = [replace(line, seq=seq) for seq, line in enumerate([*LINES[:2], *LINES[3:]], start=1)]
    assert faults(closed) == [(seq, Fault.REORDERED) for seq in range(3, LENGTH)]


def test_a_line_signed_with_another_key_is_found() -> None:
    """Also one whose hash is right."""
    forged = resealed(LINES[2], NodeKey.generate(), what="nothing")
    assert (3, Fault.SIGNATURE) in faults([*LINES[:2], forged, *LINES[3:]])


def test_a_line_that_the_site_itself_wrote_anew_does_not_fit_the_next() -> None:
    forged = resealed(LINES[2], KEY, what="nothing")
    assert faults([*LINES[:2], forged, *LINES[3:]]) == [(4, Fault.REORDERED)]


def test_no_line_fits_another_sites_chain_or_key() -> None:
    assert found(LINES, site="Graz")
    assert [one.fault for one in found(LINES, key=NodeKey.generate())] == [Fault.SIGNATURE] * LENGTH


def test_a_signature_made_for_another_purpose_is_none() -> None:
    signed = replace(LINES[0], signature=KEY.sign(LINES[0].hash.encode()))
    assert faults([signed]) == [(1, Fault.SIGNATURE)]


def test_a_body_that_is_no_object_is_an_error() -> None:
    with pytest.raises(ValueError, match="no JSON object"):
        replace(LINES[0], body=b"[]").fields  # noqa: B018


def flipped(content: bytes, at: int, by: int) -> bytes:
    return content[:at] + bytes([content[at] ^ by]) + content[at + 1 :]


@st.composite
def byte_changes(draw: st.DrawFn) -> list[Line]:
    """The chain with one byte of one part of one line changed."""
    where = draw(st.integers(0, LENGTH - 1))
    by = draw(st.integers(1, 255))
    line = LINES[where]
    match draw(st.sampled_from(["body", "prev", "hash", "signature"])):
        case "body":
            changed = replace(line, body=flipped(line.body, draw(st.integers(0, len(line.body) - 1)), by))
        case "prev":
            changed = replace(line, prev=flipped(line.prev.encode(), draw(st.integers(0, 63)), by).decode("latin-1"))
        case "hash":
            changed = replace(line, hash=flipped(line.hash.encode(), draw(st.integers(0, 63)), by).decode("latin-1"))
        case _:
            at = draw(st.integers(0, len(line.signature) - 1))
            changed = replace(line, signature=flipped(line.signature, at, by))
    return [*LINES[:where], changed, *LINES[where + 1 :]]


@settings(max_examples=100, deadline=None)
@given(lines=byte_changes())
def test_any_changed_byte_is_found(lines: list[Line]) -> None:
    assert found(lines)


@settings(max_examples=100, deadline=None)
@given(order=st.lists(st.integers(0, LENGTH - 1), max_size=LENGTH + 2), renumber=st.booleans())
def test_any_choice_of_lines_but_a_beginning_of_the_chain_is_found(order: list[int], renumber: bool) -> None:
    """Removed, exchanged, doubled, in any combination, with the numbers they had or with new ones."""
    lines = [LINES[where] for where in order]
    if renumber:
        lines = [replace(line, seq=seq) for seq, line in enumerate(lines, start=1)]
    assert bool(found(lines)) == (order != list(range(len(order))))


@pytest.mark.parametrize(
    "rewrite",
    [lambda line: replace(line, seq=0), lambda line: replace(line, seq=-1), lambda line: replace(line, seq=99)],
    ids=["zero", "negative", "far"],
)
def test_a_line_under_another_number_is_found(rewrite: Callable[[Line], Line]) -> None:
    assert found(sorted([*LINES[:2], rewrite(LINES[2]), *LINES[3:]], key=lambda line: line.seq))
