# SPDX-License-Identifier: Apache-2.0
"""What came in a round: each reply checked and taken once, single updates by site or the masked ones of a cohort.

Promises that what is hostile is refused by name and changes nothing, and that a masked sum is given out only when it is
no longer than honest sites' could be.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from flwr.app import Message

from veil.common.errors import RefusalCode
from veil.common.exchange import RoundReply
from veil.common.masking import unmask
from veil.common.privacy import NoiseShares
from veil.common.schedule import Release, ReleaseKind
from veil.common.update import MaskedUpdate, Update
from veil.common.wire import decode_reply, payload_bytes
from veil.server.state import ALL_SITES, RunState
from veil.server.validation import check_sum, counted_together, counted_units, validate, validate_masked

_log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Intake:
    """One attempt at a round.

    Attributes:
        job: the run.
        release: the round.
        state: of the run; ledger heads and noisy counts are noted there.
        name_of: the enrolled site behind a Flower node, or a word for the node.
        named: whether nodes are enrolled sites; a simulated site's own word for its name is taken.
        hidden: whether masked updates are asked for.
        accepted: single updates by site.
        masked: masked ones by site.
        nodes: Flower nodes of the replies that can be used.
        refusals: site to reason.
        bytes_up: payload of the largest reply.
        attempts: cohorts that were asked for this release, this one too.
    """

    job: str
    release: Release
    state: RunState
    name_of: Callable[[int], str]
    named: bool
    hidden: bool
    accepted: dict[str, Update] = field(default_factory=dict)
    masked: dict[str, MaskedUpdate] = field(default_factory=dict)
    nodes: set[int] = field(default_factory=set)
    refusals: dict[str, str] = field(default_factory=dict)
    bytes_up: int = 0
    attempts: int = 1

    @property
    def sites(self) -> set[str]:
        """Those whose numbers can be used."""
        return set(self.accepted) | set(self.masked)

    def take(self, replies: Iterable[Message]) -> None:
        """Take replies in."""
        for message in replies:
            if message.has_error():
                self.refusals[self.name_of(message.metadata.src_node_id)] = RefusalCode.INTERNAL.value
            else:
                self._take(message)

    def released(self, shares: NoiseShares | None) -> dict[str, Update]:
        """What there is to sum: single updates by site, or the one sum of the masked ones.

        Raises:
            RunError: for a sum that honest sites cannot have sent.
        """
        if shares is None:
            return {name: self.accepted[name] for name in sorted(self.accepted)}
        total = unmask([self.masked[name] for name in sorted(self.masked)])
        counts = {} if self.release.kind is ReleaseKind.CENTRE else self.state.units
        counted_sites = {site for one in self.state.records[:1] for site in one.sites}
        units = counts.get(ALL_SITES) if set(self.masked) <= counted_sites else None
        check_sum(total, self.release, self.state.descent, shares, units=units)
        together = counted_together(total, self.release, shares, self._classes)
        if together is not None:
            self.state.units[ALL_SITES] = together
        return {ALL_SITES: total}

    def _take(self, message: Message) -> None:
        node = self.name_of(message.metadata.src_node_id)
        try:
            reply = decode_reply(message.content)
            site = node if self.named else reply.site
            update, masked = self._validated(reply, site)
            size = payload_bytes(message.content)
        except Exception:  # hostile content fails in many ways
            _log.warning("%s sent what cannot be taken", node, exc_info=True)
            self.refusals[node] = RefusalCode.MALFORMED.value
            return
        if reply.refusal is not None:
            self.refusals[site] = str(reply.refusal)
            return
        if site in self.sites:
            self.refusals[node] = RefusalCode.REPLAY.value
            return
        self.nodes.add(message.metadata.src_node_id)
        self.bytes_up = max(self.bytes_up, size)
        if reply.head:
            self.state.heads[site] = reply.head
        if reply.units is not None:
            self.state.declared[site] = reply.units
        if masked is not None:
            self.masked[site] = masked
        if update is not None:
            self.accepted[site] = update
            counted = counted_units(update, self.release, self._classes)
            if counted is not None:
                self.state.units[site] = counted

    def _validated(self, reply: RoundReply, site: str) -> tuple[Update | None, MaskedUpdate | None]:
        descent = self.state.descent
        if self.hidden:
            return None, validate_masked(reply, self.job, self.release, descent)
        return validate(reply, self.job, self.release, descent, units=self._most_units(site)), None

    def _most_units(self, site: str) -> float | None:
        """How many units a site may have: by its own noisy count, or, without one, as many as any site; where they are
        still being counted, as many as the plan allows."""
        counts = {} if self.release.kind is ReleaseKind.CENTRE else self.state.units
        return counts.get(site, max(counts.values(), default=None))

    @property
    def _classes(self) -> int:
        return len(self.state.descent.weight)
