# SPDX-License-Identifier: Apache-2.0
"""The rounds of a run on Flower's FedAvg: who is asked, what is taken in, what is kept of it.

Promises that a reply touches the model only after it was validated, that every site counts once, that a round with
fewer sites than the plan's minimum stops the run, and that a masked sum is taken whole or asked anew without the sites
that dropped out.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import replace

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg

from veil.common.errors import RunError
from veil.common.exchange import RoundRequest
from veil.common.head import CENTRE
from veil.common.mismatch import mismatches
from veil.common.plan import RunPlan
from veil.common.schedule import CENTRE_NORM, Release, ReleaseKind, schedule, spare_rounds
from veil.common.update import Update, doublings
from veil.common.wire import CONFIG, addressed, encode_adapter, encode_request, payload_bytes
from veil.server.intake import Intake
from veil.server.partners import Partners
from veil.server.state import RoundRecord, RunState

DROPPED_OUT = "dropped-out"
"""Why a site's masked numbers are missing, where it gave no reason itself."""


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
        partners: the sites that share noise; None where each site adds all of it.
    """

    def __init__(
        self,
        *,
        plan: RunPlan,
        job: str,
        state: RunState,
        watch: Callable[[RunState], None],
        site_of: Callable[[int], str] | None = None,
        partners: Partners | None = None,
    ) -> None:
        sites = state.descent.sites if site_of is None else plan.cohort.min_sites
        super().__init__(fraction_train=1.0, fraction_evaluate=0.0, min_train_nodes=sites, min_available_nodes=sites)
        self.plan, self.job, self.state = plan, job, state
        self.releases = schedule(plan)[len(state.records) :]
        self._watch, self._site_of = watch, site_of
        self._partners = None if partners is None else dict(partners.members)
        self._kept_out = {} if partners is None else partners.refusals
        self.asked: set[int] = set()
        self._asked_at = 0.0
        self._bytes_down = 0
        self._round_nodes: set[int] = set()
        self._ask_again: Callable[[list[int], int], Iterable[Message]] = lambda nodes, attempt: ()

    def summary(self) -> None:
        """Nothing: the report says it all."""

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """The round's request, for each site with the last ledger line that was seen of it."""
        release = self.releases[server_round - 1]
        self._asked_at = time.monotonic()
        nodes = [one.metadata.dst_node_id for one in super().configure_train(server_round, arrays, config, grid)]
        if len(nodes) < self.plan.cohort.min_sites:
            raise _too_few(release, len(nodes), self.plan.cohort.min_sites, self._kept_out)
        timeout = self.plan.cohort.round_timeout_s

        def ask_again(survivors: list[int], attempt: int) -> Iterable[Message]:
            return grid.send_and_receive(self._messages(release, survivors, attempt), timeout=timeout)

        self._ask_again = ask_again
        return self._messages(release, nodes, attempt=0)

    def _messages(self, release: Release, nodes: list[int], attempt: int) -> list[Message]:
        descent, partners = self.state.descent, self._partners or {}
        request = RoundRequest(
            plan=self.plan,
            job=self.job,
            round=release.round,
            kind=release.kind,
            adapter=descent.adapter,
            nominal_units=descent.nominal_units,
            members=tuple(sorted((partners[node] for node in nodes if node in partners), key=lambda one: one.site)),
            attempt=attempt,
        )
        content = encode_request(request)
        contents = {node: addressed(content, self.state.heads.get(self._name(node), "")) for node in nodes}
        self._bytes_down = max((payload_bytes(one) for one in contents.values()), default=0)
        return [Message(one, node, MessageType.TRAIN) for node, one in contents.items()]

    def _construct_messages(self, record: RecordDict, node_ids: list[int], message_type: str) -> Iterable[Message]:
        chosen = self._drawn(self.releases[int(str(record.config_records[CONFIG]["server-round"])) - 1], node_ids)
        self.asked.update(chosen)
        self._round_nodes = set(chosen)
        return super()._construct_messages(record, chosen, message_type)

    def _drawn(self, release: Release, nodes: list[int]) -> list[int]:
        """The nodes that a training round asks, by the public seed; what comes once a run asks everybody."""
        asked = self.plan.cohort.sites_per_round
        if self._partners is not None:
            nodes = [node for node in nodes if node in self._partners]
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
        intake = self._intake(release)
        intake.take(replies)
        if self._partners is not None:
            intake = self._completed(release, intake)
        if len(intake.sites) < self.plan.cohort.min_sites:
            raise _too_few(release, len(intake.sites), self.plan.cohort.min_sites, intake.refusals)
        record = RoundRecord(
            round=release.round,
            kind=release.kind,
            sites=tuple(sorted(intake.sites)),
            refusals=intake.refusals,
            bytes_down=self._bytes_down,
            bytes_up=intake.bytes_up,
            seconds=time.monotonic() - self._asked_at,
            attempts=intake.attempts,
        )
        released = intake.released(record.shares(self.plan))
        if release.kind is ReleaseKind.EVALUATION:
            state.evaluation = {name: _points(update, release) for name, update in released.items()}
        else:
            state.descent.apply(release, list(released.values()), record.shares(self.plan))
        if release.kind is ReleaseKind.CENTRE:
            sums = {name: one.points[CENTRE].astype(np.float64) * one.spacing for name, one in released.items()}
            state.mismatch = mismatches(sums, release.mechanism.noise_multiplier * CENTRE_NORM)
        state.records.append(record)
        self._watch(state)
        return encode_adapter(state.descent.adapter), None

    def _intake(self, release: Release) -> Intake:
        return Intake(
            job=self.job,
            release=release,
            state=self.state,
            name_of=self._name,
            named=self._site_of is not None,
            hidden=self._partners is not None,
        )

    def _completed(self, release: Release, intake: Intake) -> Intake:
        """A masked sum of everybody that was asked: what drops out is left out of the run, and the others asked anew.

        Raises:
            RunError: when too few are left, or the plan has no round to spare.
        """
        partners = self._partners or {}
        asked = set(self._round_nodes)
        while dropped := asked - intake.nodes:
            asked -= dropped
            for node in dropped:
                intake.refusals.setdefault(partners.pop(node).site, DROPPED_OUT)
            if len(asked) < self.plan.cohort.min_sites:
                raise _too_few(release, len(asked), self.plan.cohort.min_sites, intake.refusals)
            self._check_spare(release, intake)
            again = replace(self._intake(release), refusals=intake.refusals, attempts=intake.attempts + 1)
            again.take(self._ask_again(sorted(asked), intake.attempts))
            intake = again
        return intake

    def _check_spare(self, release: Release, intake: Intake) -> None:
        used = sum(record.attempts - 1 for record in self.state.records) + intake.attempts - 1
        spare = spare_rounds(self.plan) if release.kind is ReleaseKind.GRADIENT else 0
        if used < spare:
            return
        why = ", ".join(f"{site}: {code}" for site, code in sorted(intake.refusals.items()))
        raise RunError(
            f"round {release.round} ({release.kind.value}) lacks sites ({why})",
            f"every site's masked numbers; cohort.retries = {self.plan.cohort.retries} training rounds may be repeated",
            "veil coordinator resume asks those that are there, within each site's own limits",
        )

    def _name(self, node_id: int) -> str:
        return self._site_of(node_id) if self._site_of else f"node {node_id}"


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
