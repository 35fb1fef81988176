# SPDX-License-Identifier: Apache-2.0
"""The rounds of a run on Flower's FedAvg: who is asked, what is taken in, what is kept of it.

Promises that a reply touches the model only after its job, round, tensor, shape and lattice were checked, that every
site counts once, and that a round with fewer sites than the plan's minimum stops the run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg

from veil.common.errors import RefusalCode, RunError
from veil.common.exchange import RoundReply, RoundRequest
from veil.common.plan import RunPlan
from veil.common.schedule import Release, ReleaseKind, schedule
from veil.common.update import Update
from veil.common.wire import (
    WireError,
    decode_reply,
    encode_adapter,
    encode_request,
    payload_bytes,
)
from veil.server.descent import Descent


@dataclass(frozen=True, kw_only=True, slots=True)
class RoundRecord:
    """What happened in one round, for the report.

    Attributes:
        round: 0 for the centring round, then 1, 2, …
        kind: what was released.
        sites: names of the sites whose updates were used.
        refusals: site to reason.
        bytes_down: payload of one request.
        bytes_up: payload of the largest reply.
        seconds: from asking to having aggregated.
    """

    round: int
    kind: ReleaseKind
    sites: tuple[str, ...]
    refusals: dict[str, str]
    bytes_down: int
    bytes_up: int
    seconds: float


class SumOfUpdates(FedAvg):
    """Ask every site of the cohort, check each reply, sum.

    Args:
        plan: the run's plan.
        job: identity of the run.
        descent: the state, advanced round by round.
        sites: number of sites to wait for before the first round.
        watch: called after each round with its record and the state.
    """

    def __init__(
        self,
        *,
        plan: RunPlan,
        job: str,
        descent: Descent,
        sites: int,
        watch: Callable[[RoundRecord, Descent], None],
    ) -> None:
        super().__init__(
            fraction_train=1.0,
            fraction_evaluate=0.0,
            min_train_nodes=sites,
            min_available_nodes=sites,
        )
        self.plan, self.job, self.descent = plan, job, descent
        self.releases = schedule(plan)
        self.records: list[RoundRecord] = []
        self._watch = watch
        self._asked_at = 0.0
        self._bytes_down = 0

    def summary(self) -> None:
        """Nothing: the report says it all."""

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """The round's request, once for each site."""
        release = self.releases[server_round - 1]
        request = RoundRequest(
            plan=self.plan,
            job=self.job,
            round=release.round,
            kind=release.kind,
            adapter=self.descent.adapter,
            nominal_units=self.descent.nominal_units,
        )
        content = encode_request(request)
        self._asked_at, self._bytes_down = time.monotonic(), payload_bytes(content)
        messages = list(super().configure_train(server_round, arrays, config, grid))
        for message in messages:
            message.content = content
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Check, sum, descend."""
        release = self.releases[server_round - 1]
        accepted: dict[str, Update] = {}
        refusals: dict[str, str] = {}
        largest = 0
        for message in replies:
            if message.has_error():
                refusals[f"node {message.metadata.src_node_id}"] = RefusalCode.INTERNAL.value
                continue
            largest = max(largest, payload_bytes(message.content))
            self._take(message, release, accepted, refusals)
        if len(accepted) < self.plan.cohort.min_sites:
            raise _too_few(release, len(accepted), self.plan.cohort.min_sites, refusals)
        self.descent.apply(release, [accepted[name] for name in sorted(accepted)])
        record = RoundRecord(
            round=release.round,
            kind=release.kind,
            sites=tuple(sorted(accepted)),
            refusals=refusals,
            bytes_down=self._bytes_down,
            bytes_up=largest,
            seconds=time.monotonic() - self._asked_at,
        )
        self.records.append(record)
        self._watch(record, self.descent)
        return encode_adapter(self.descent.adapter), None

    def _take(self, message: Message, release: Release, accepted: dict[str, Update], refusals: dict[str, str]) -> None:
        try:
            reply = decode_reply(message.content)
            update = validate(reply, self.job, release, self.descent)
        except WireError:
            refusals[f"node {message.metadata.src_node_id}"] = RefusalCode.MALFORMED.value
            return
        if update is None:
            refusals[reply.site] = str(reply.refusal)
        elif reply.site in accepted:
            refusals[f"node {message.metadata.src_node_id}"] = RefusalCode.REPLAY.value
        else:
            accepted[reply.site] = update


def validate(reply: RoundReply, job: str, release: Release, descent: Descent) -> Update | None:
    """A reply's update, or None for a refusal.

    Raises:
        WireError: for another job or round, or a tensor that is not the one asked for.
    """
    if reply.update is None:
        return None
    if (reply.job, reply.round) != (job, release.round):
        raise WireError(f"a reply to round {reply.round} of {reply.job}")
    name, shape = descent.expected_shape(release)
    if set(reply.update.points) != {name} or reply.update.points[name].shape != shape:
        raise WireError(f"an update of other tensors than {name} {shape}")
    if reply.update.spacing != release.spacing:
        raise WireError("an update on another lattice")
    return reply.update


def _too_few(release: Release, replies: int, needed: int, refusals: dict[str, str]) -> RunError:
    why = ", ".join(f"{site}: {code}" for site, code in sorted(refusals.items())) or "no reply in time"
    return RunError(
        f"round {release.round} had {replies} usable replies ({why})",
        f"at least cohort.min_sites = {needed}",
        "ask the refusing sites for their reason, or lower cohort.min_sites",
    )
