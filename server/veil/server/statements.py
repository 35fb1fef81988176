# SPDX-License-Identifier: Apache-2.0
"""The last question of a run: each site of the cohort is asked to state, signed, what it did.

Promises that a site which does not answer, or answers with what is not its own, is named with the reason and holds
nobody up for longer than the time given; what a statement says is not judged here.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

from flwr.app import Message
from flwr.serverapp import Grid

from veil.common.errors import RefusalCode
from veil.common.exchange import Offer, StatementReply
from veil.common.keys import canonical_pem
from veil.common.plan import RunPlan
from veil.common.statement import SignedStatement, Statement
from veil.common.wire import STATEMENT, WireError, decode_statement_reply, encode_offer

STATEMENT_S = 30.0
"""Seconds that a site has to make its statement."""

NO_ANSWER = "no answer in time"

_log = logging.getLogger(__name__)


@dataclass(kw_only=True, slots=True)
class Evidence:
    """What sites said of a run.

    Attributes:
        statements: by site.
        missing: sites without one, and why.
    """

    statements: dict[str, SignedStatement] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)


def ask_for_statements(
    grid: Grid,
    plan: RunPlan,
    job: str,
    *,
    site_of: Callable[[int], str] | None,
    keys: Mapping[str, bytes] | None = None,
    nodes: Collection[int] | None = None,
    timeout_s: float = STATEMENT_S,
) -> Evidence:
    """Ask every site of a grid.

    Args:
        grid: the sites.
        plan: what was run.
        job: the run.
        site_of: the enrolled site behind a Flower node; without it, a statement's own word for its site is taken.
        keys: public keys of enrolled sites, PEM; a statement signed with another one is not taken.
        nodes: the only ones to ask, where it is known that no other took part.
        timeout_s: after which a site counts as silent.
    """
    content = encode_offer(Offer(plan=plan, job=job))
    asked = grid.get_node_ids() if nodes is None else sorted(nodes)
    silent = {node: site_of(node) if site_of else f"node {node}" for node in asked}
    messages = [Message(content, node, f"query.{STATEMENT}") for node in silent]
    said = Evidence()
    for reply in grid.send_and_receive(messages, timeout=timeout_s) if messages else ():
        name = silent.pop(reply.metadata.src_node_id, None)
        if name is not None:
            _take(said, reply, name, job, plan, known=site_of is not None, keys=keys)
    said.missing.update(dict.fromkeys(silent.values(), NO_ANSWER))
    return said


def _take(
    said: Evidence,
    reply: Message,
    name: str,
    job: str,
    plan: RunPlan,
    *,
    known: bool,
    keys: Mapping[str, bytes] | None,
) -> None:
    answer = _read(reply)
    if answer.signed is None:
        said.missing[name] = str(answer.refusal)
        return
    try:
        statement = _checked(answer.signed, job, plan)
        if known and statement.site != name:
            raise ValueError(f"the statement of {statement.site!r}")
        if keys is not None and canonical_pem(keys.get(name, b"")) != answer.signed.public_pem:
            raise ValueError("another key than it was enrolled with")
        if statement.site in said.statements:
            raise ValueError(f"a second statement of {statement.site!r}")
    except ValueError as error:
        _log.warning("%s sent no statement of its own: %s", name, error)
        said.missing[name] = RefusalCode.MALFORMED.value
    else:
        said.statements[statement.site] = answer.signed


def _read(reply: Message) -> StatementReply:
    if reply.has_error():
        return StatementReply(job="", refusal=RefusalCode.INTERNAL)
    try:
        return decode_statement_reply(reply.content)
    except WireError:
        return StatementReply(job="", refusal=RefusalCode.MALFORMED)


def _checked(signed: SignedStatement, job: str, plan: RunPlan) -> Statement:
    """What is signed.

    Raises:
        ValueError: when it is not signed, no statement, or of another run.
    """
    statement = Statement.from_text(signed.text)
    if not signed.genuine:
        raise ValueError("a signature that does not fit")
    if (statement.job, statement.plan_sha256) != (job, plan.sha256):
        raise ValueError(f"a statement of run {statement.job!r}")
    return statement
