# SPDX-License-Identifier: Apache-2.0
"""Tests of `veil.client.audit_log`: whoever has the log and the public key checks it with other tools than Veil's."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_public_key

from veil.client.audit_log import build_log
from veil.client.deployed import assemble
from veil.client.site_file import SiteFile, read_site_file
from veil.common.errors import InputError
from veil.common.exchange import RoundRequest
from veil.common.keys import NodeKey
from veil.common.plan import RunPlan

ROUNDS = 3
LINES = 2 * ROUNDS


@pytest.fixture
def file(
    make_home: Callable[..., Path], make_plan: Callable[..., RunPlan], make_request: Callable[..., RoundRequest]
) -> SiteFile:
    """A deployed site that answered three rounds from its own table."""
    file = read_site_file(make_home(limits={"approval": "auto-within-limits"}) / "site.toml")
    site = assemble(file)
    with closing(site.ledger):
        for round_ in range(ROUNDS):
            assert site.answer(make_request(make_plan(), round_)).update is not None
    return file


def check(text: str, public_pem: bytes) -> list[str]:
    """An officer's own check, from the file and the key alone: SHA-256 chain, ECDSA over P-256 with SHA-256."""
    document = json.loads(text)
    public = load_pem_public_key(public_pem)
    assert isinstance(public, ec.EllipticCurvePublicKey)
    before = hashlib.sha256(b"veil ledger\n" + document["site"].encode()).hexdigest()
    wrong = []
    for number, line in enumerate(document["ledger"]["lines"], start=1):
        if line["prev"] != before or json.loads(line["body"])["seq"] != number:
            wrong.append(f"{number} does not follow")
        if hashlib.sha256((line["prev"] + line["body"]).encode()).hexdigest() != line["hash"]:
            wrong.append(f"{number} was changed")
        try:
            signed = b"veil ledger line\n" + line["hash"].encode()
            public.verify(bytes.fromhex(line["signature"]), signed, ec.ECDSA(hashes.SHA256()))
        except InvalidSignature:
            wrong.append(f"{number} is not signed")
        before = line["hash"]
    if before != document["ledger"]["head"]:
        wrong.append("the end is missing")
    return wrong


def test_the_log_is_checked_without_this_program(file: SiteFile, key: NodeKey) -> None:
    text = json.dumps(build_log(file))
    assert len(json.loads(text)["ledger"]["lines"]) == LINES
    assert check(text, key.public_pem) == []
    assert json.loads(text)["public_key"].encode() == key.public_pem


def rewritten(line: dict[str, str]) -> None:
    """A cheaper line, with its hash made right."""
    body = json.loads(line["body"])
    body["round"] = 9
    line["body"] = json.dumps(body, sort_keys=True, separators=(",", ":"))
    line["hash"] = hashlib.sha256((line["prev"] + line["body"]).encode()).hexdigest()


CHANGES: dict[str, Callable[[list[dict[str, str]]], None]] = {
    "a body": lambda lines: lines[2].update(body=lines[2]["body"].replace('"round":1', '"round":2')),
    "a body and its hash": lambda lines: rewritten(lines[2]),
    "the last body and its hash": lambda lines: rewritten(lines[-1]),
    "a signature": lambda lines: lines[2].update(signature=lines[3]["signature"]),
    "a line left out": lambda lines: lines.__delitem__(2),
    "the first left out": lambda lines: lines.__delitem__(0),
    "the last left out": lambda lines: lines.__delitem__(-1),
    "two exchanged": lambda lines: lines.insert(2, lines.pop(3)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_log_is_found_without_this_program(change: str, file: SiteFile, key: NodeKey) -> None:
    document = build_log(file)
    before = json.dumps(document)
    CHANGES[change](document["ledger"]["lines"])
    assert json.dumps(document) != before
    assert check(json.dumps(document), key.public_pem) != []


def test_another_site_s_key_does_not_fit(file: SiteFile) -> None:
    assert len(check(json.dumps(build_log(file)), NodeKey.generate().public_pem)) == LINES


def test_the_log_holds_no_record_and_no_answer(file: SiteFile, key: NodeKey) -> None:
    text = json.dumps(build_log(file))
    table = (file.folder / "table.csv").read_text(encoding="utf-8")
    cells = [cell for row in table.splitlines()[1:] for cell in row.split(",")[:-1]]
    assert len(cells) > 200
    for cell in cells:
        assert cell.lstrip("-")[:9] not in text
    with closing(sqlite3.connect(file.agent.ledger)) as ledger:
        replies = [bytes(row[0]) for row in ledger.execute("SELECT bytes FROM reply")]
    assert len(replies) == ROUNDS
    for reply in replies:
        assert hashlib.sha256(reply).hexdigest() in text
        for start in range(0, len(reply) - 8, 8):
            assert reply[start : start + 8].hex() not in text
    private = file.agent.key.read_text(encoding="ascii").splitlines()[1]
    assert private not in text


def test_every_decision_stands_in_it_with_its_plan(file: SiteFile, make_plan: Callable[..., RunPlan]) -> None:
    (decision,) = build_log(file)["decisions"]
    plan = make_plan().public()
    assert (decision["run"], decision["decision"], decision["decided"]) == ("job", "pending", "")
    assert decision["plan_sha256"] == plan.sha256
    assert RunPlan.from_json(json.dumps(decision["plan"])) == plan


def test_what_everything_cost_stands_in_it(file: SiteFile) -> None:
    spent: dict[str, Any] = build_log(file)["spent"]
    assert 0 < spent["epsilon"] < 3.0
    assert spent["runs"] == {"job": spent["epsilon"]}
    assert (spent["delta"], spent["unit"]) == (1e-5, "record")


def test_a_ledger_that_was_tampered_with_says_so_in_its_log(file: SiteFile, key: NodeKey) -> None:
    with closing(sqlite3.connect(file.agent.ledger)) as other, other:
        other.execute("DROP TRIGGER line_stays")
        other.execute("UPDATE line SET body = replace(body, '\"round\":1', '\"round\":2')")
    document = build_log(file)
    assert any("changed" in finding for finding in document["ledger"]["findings"])
    assert check(json.dumps(document), key.public_pem) != []


def test_without_a_ledger_there_is_no_log(make_home: Callable[..., Path]) -> None:
    with pytest.raises(InputError, match=r"ledger\.sqlite is missing"):
        build_log(read_site_file(make_home() / "site.toml"))
