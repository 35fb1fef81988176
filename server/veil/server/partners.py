# SPDX-License-Identifier: Apache-2.0
"""The first questions of a run with distributed noise: each site's public masking key, and its word on the others'.

Promises that a key is passed on only under the name of the site that signed it; whether it is the right one, each site
judges by what its own operator pinned, not by this; and that who would refuse the cohort is found before a round costs
the others anything.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from flwr.app import Message
from flwr.serverapp import Grid

from veil.common.errors import RefusalCode
from veil.common.exchange import KeyReply, Offer
from veil.common.keys import canonical_pem
from veil.common.masking import Member
from veil.common.plan import RunPlan
from veil.common.wire import KEYS, WireError, decode_key_reply, encode_offer

KEYS_S = 30.0
"""Seconds that a site has to name its key; one that does not answer takes no part."""


def ask_for_partners(
    grid: Grid,
    plan: RunPlan,
    job: str,
    *,
    site_of: Callable[[int], str] | None,
    keys: Mapping[str, bytes] | None = None,
    timeout_s: float = KEYS_S,
) -> Partners:
    """Ask every site of a grid, and then whether it would share noise with the others; who would not is left out.

    Args:
        grid: the sites.
        plan: what is about to run.
        job: the run.
        site_of: the enrolled site behind a Flower node; without it, a key's own word for its site is taken.
        keys: public keys of enrolled sites, PEM; a masking key that another one signed is not taken.
        timeout_s: after which a site counts as silent.

    Returns:
        those that share noise with each other, and why others do not.
    """
    whom = _Asked(grid=grid, offer=Offer(plan=plan, job=job), site_of=site_of, keys=keys, timeout_s=timeout_s)
    found, agreed = whom.answers(list(grid.get_node_ids())), False
    while len(found) >= plan.cohort.min_sites and not agreed:
        asked = tuple(sorted(found.values(), key=lambda one: one.site))
        found = whom.answers(list(found), asked)
        agreed = len(found) == len(asked)
    return Partners(members=found, refusals=whom.refusals)


@dataclass(frozen=True, kw_only=True, slots=True)
class Partners:
    """Who shares noise in a run.

    Attributes:
        members: the sites' parts, by Flower node.
        refusals: sites that do not, and why; one that said nothing at all is in neither.
    """

    members: dict[int, Member]
    refusals: dict[str, str]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Asked:
    grid: Grid
    offer: Offer
    site_of: Callable[[int], str] | None
    keys: Mapping[str, bytes] | None
    timeout_s: float
    refusals: dict[str, str] = field(default_factory=dict)

    def answers(self, nodes: list[int], members: tuple[Member, ...] = ()) -> dict[int, Member]:
        """Those of the nodes that answer with a key of their own."""
        content = encode_offer(replace(self.offer, members=members))
        messages = [Message(content, node, f"query.{KEYS}") for node in nodes]
        found: dict[int, Member] = {}
        for reply in self.grid.send_and_receive(messages, timeout=self.timeout_s) if messages else ():
            node = reply.metadata.src_node_id
            answer = _read(reply)
            if answer is None or answer.member is None:
                self.refusals[self._name(node)] = str(RefusalCode.INTERNAL if answer is None else answer.refusal)
            elif self._own(answer.member, node) and not _known(answer.member, found):
                found[node] = answer.member
            else:
                self.refusals[self._name(node)] = RefusalCode.MALFORMED.value
        return found

    def _name(self, node: int) -> str:
        return f"node {node}" if self.site_of is None else self.site_of(node)

    def _own(self, member: Member, node: int) -> bool:
        """Whether a site speaks for itself."""
        if self.site_of is not None and member.site != self.site_of(node):
            return False
        if self.keys is not None and canonical_pem(self.keys.get(member.site, b"")) != member.public_pem:
            return False
        return member.genuine


def _read(reply: Message) -> KeyReply | None:
    if reply.has_error():
        return None
    try:
        return decode_key_reply(reply.content)
    except WireError:
        return None


def _known(member: Member, found: Mapping[int, Member]) -> bool:
    return any(member.site == one.site or member.masking_key == one.masking_key for one in found.values())
