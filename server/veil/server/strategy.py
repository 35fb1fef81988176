# SPDX-License-Identifier: Apache-2.0
"""The rounds of a run on Flower's FedAvg: who is asked, what is taken in, what is kept of it.

Promises that a reply touches the model only after it was validated, that every site counts once, and that a round with
fewer sites than the plan's minimum stops the run.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg

from veil.common.errors import RefusalCode, RunError
from veil.common.exchange import RoundRequest
from veil.common.plan import RunPlan
from veil.common.schedule import Release, ReleaseKind, schedule
from veil.common.update import Update, doublings
from veil.common.wire import (
    CONFIG,
    addressed,
    decode_reply,
    encode_adapter,
    encode_request,
    payload_bytes,
)
from veil.server.state import RoundRecord, RunState
from veil.server.validation import counted_units, validate

_log = logging.getLogger(__name__)


class SumOfUpdates(FedAvg):
    """Ask every site of the cohort, check each reply, sum.

    Attributes:
        asked: the nodes that were asked so far.

    Args:
        plan: the run's plan.
        job: identity of the run.
        state: how far the run is; advanced round by round.
        watch: called after each round with its record and the state.
        site_of: the enrolled site behind a Flower node; without it, a site's own word for its name is taken, as
            simulated sites have nobody to pretend to be.
    """

    def __init__(
        self,
        *,
        plan: RunPlan,
        job: str,
        state: RunState,
        watch: Callable[[RunState], None],
        site_of: Callable[[int], str] | None = None,
    ) -> None:
        sites = state.descent.sites if site_of is None else plan.cohort.min_sites
        super().__init__(fraction_train=1.0, fraction_evaluate=0.0, min_train_nodes=sites, min_available_nodes=sites)
        self.plan, self.job, self.state = plan, job, state
        self.releases = schedule(plan)[len(state.records) :]
        self._watch, self._site_of = watch, site_of
        self.asked: set[int] = set()
        self._asked_at = 0.0
        self._bytes_down = 0

    def summary(self) -> None:
        """Nothing: the report says it all."""

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """The round's request, for each site with the last ledger line that was seen of it."""
        release, descent = self.releases[server_round - 1], self.state.descent
        request = RoundRequest(
            plan=self.plan,
            job=self.job,
            round=release.round,
            kind=release.kind,
            adapter=descent.adapter,
            nominal_units=descent.nominal_units,
        )
        self._asked_at = time.monotonic()
        messages = list(super().configure_train(server_round, arrays, config, grid))
        content = encode_request(request)
        for message in messages:
            message.content = addressed(content, self.state.heads.get(self._name(message.metadata.dst_node_id), ""))
        self._bytes_down = payload_bytes(messages[-1].content) if messages else 0
        return messages

    def _construct_messages(self, record: RecordDict, node_ids: list[int], message_type: str) -> Iterable[Message]:
        chosen = self._drawn(self.releases[int(str(record.config_records[CONFIG]["server-round"])) - 1], node_ids)
        self.asked.update(chosen)
        return super()._construct_messages(record, chosen, message_type)

    def _drawn(self, release: Release, nodes: list[int]) -> list[int]:
        """The nodes that a training round asks, by the public seed; what comes once a run asks everybody."""
        asked = self.plan.cohort.sites_per_round
        if asked is None or asked >= len(nodes) or release.kind in (ReleaseKind.CENTRE, ReleaseKind.EVALUATION):
            return nodes
        ordered = sorted(nodes, key=self._name)
        order = np.random.default_rng([self.plan.seed, release.round]).permutation(len(ordered))
        return [ordered[place] for place in sorted(order[:asked])]

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Check, sum, descend; an evaluation is kept as it is, and moves nothing."""
        release, state = self.releases[server_round - 1], self.state
        intake = _Intake()
        for message in replies:
            if message.has_error():
                intake.refusals[self._name(message.metadata.src_node_id)] = RefusalCode.INTERNAL.value
                continue
            self._take(message, release, intake)
        if len(intake.accepted) < self.plan.cohort.min_sites:
            raise _too_few(release, len(intake.accepted), self.plan.cohort.min_sites, intake.refusals)
        if release.kind is ReleaseKind.EVALUATION:
            state.evaluation = {name: _points(intake.accepted[name], release) for name in sorted(intake.accepted)}
        else:
            state.descent.apply(release, [intake.accepted[name] for name in sorted(intake.accepted)])
        state.records.append(
            RoundRecord(
                round=release.round,
                kind=release.kind,
                sites=tuple(sorted(intake.accepted)),
                refusals=intake.refusals,
                bytes_down=self._bytes_down,
                bytes_up=intake.bytes_up,
                seconds=time.monotonic() - self._asked_at,
            )
        )
        self._watch(state)
        return encode_adapter(state.descent.adapter), None

    def _most_units(self, site: str, release: Release) -> float | None:
        """How many units a site may have: by its own noisy count, or, without one, as many as any site; where they are
        still being counted, as many as the plan allows."""
        counts = {} if release.kind is ReleaseKind.CENTRE else self.state.units
        return counts.get(site, max(counts.values(), default=None))

    def _name(self, node_id: int) -> str:
        return self._site_of(node_id) if self._site_of else f"node {node_id}"

    def _take(self, message: Message, release: Release, intake: _Intake) -> None:
        node = self._name(message.metadata.src_node_id)
        try:
            reply = decode_reply(message.content)
            site = node if self._site_of else reply.site
            update = validate(reply, self.job, release, self.state.descent, units=self._most_units(site, release))
            size = payload_bytes(message.content)
        except Exception:  # hostile content fails in many ways
            _log.warning("%s sent what cannot be taken", node, exc_info=True)
            intake.refusals[node] = RefusalCode.MALFORMED.value
            return
        if update is None:
            intake.refusals[site] = str(reply.refusal)
            return
        if site in intake.accepted:
            intake.refusals[node] = RefusalCode.REPLAY.value
            return
        intake.accepted[site], intake.bytes_up = update, max(intake.bytes_up, size)
        if reply.head:
            self.state.heads[site] = reply.head
        if reply.units is not None:
            self.state.declared[site] = reply.units
        counted = counted_units(update, release)
        if counted is not None:
            self.state.units[site] = counted


@dataclass(kw_only=True)
class _Intake:
    """What came in a round."""

    accepted: dict[str, Update] = field(default_factory=dict)
    refusals: dict[str, str] = field(default_factory=dict)
    bytes_up: int = 0


def _points(update: Update, release: Release) -> tuple[int, ...]:
    """In units of the release's own spacing."""
    (points,) = update.points.values()
    step = 2 ** doublings(update.spacing, release.spacing)
    return tuple(point * step for point in points.tolist())


def _too_few(release: Release, replies: int, needed: int, refusals: dict[str, str]) -> RunError:
    why = ", ".join(f"{site}: {code}" for site, code in sorted(refusals.items())) or "no reply in time"
    return RunError(
        f"round {release.round} had {replies} usable replies ({why})",
        f"at least cohort.min_sites = {needed}",
        "ask the refusing sites for their reason; veil coordinator resume goes on when they are back",
    )
