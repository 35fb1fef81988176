# SPDX-License-Identifier: Apache-2.0
"""One run in a process of its own: offer it to the sites, give them the backbone, run the rounds, write the result.

Promises that each round's aggregate is in the checkpoint before the next is asked for, and that started again after any
crash it goes on from there under the same job name, so that the sites' ledgers recognise every round.
"""

from __future__ import annotations

import logging
import sys
import time
import traceback
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path

from flwr.app import Context, Message, RecordDict
from sqlalchemy.exc import SQLAlchemyError

from veil.common.delivery import Chunk, Manifest, Progress, Standing
from veil.common.errors import RefusalCode, RunError, VeilError
from veil.common.exchange import Offer, OfferReply, Willingness
from veil.common.logs import log_json_lines
from veil.common.plan import RunPlan
from veil.common.schedule import schedule
from veil.common.supervision import end_with_parent
from veil.common.wire import (
    CHUNK,
    MANIFEST,
    OFFER,
    WireError,
    decode_offer_reply,
    decode_progress,
    encode_chunk,
    encode_manifest,
    encode_offer,
)
from veil.server.app import Outcome, server_app
from veil.server.delivery import BackboneShelf, deliver
from veil.server.home import Home
from veil.server.jobs import Job, Phase
from veil.server.link import open_link_state
from veil.server.link_grid import LinkGrid, RunLostError
from veil.server.result import initial_state, write_result
from veil.server.roster import Roster
from veil.server.state import RunState

_OFFER_S = 5.0
_PIECE_S = 60.0
_ASK_AGAIN_S = 1.0

_log = logging.getLogger(__name__)


class Runner:
    """One run.

    Args:
        home: the coordinator's folder.
        job: the run's.
        grid: the line to the sites.
        nodes: enrolled site to its Flower node.
        keys: enrolled site to its public key, PEM.
    """

    def __init__(
        self, home: Home, job: Job, grid: LinkGrid, nodes: dict[str, int], keys: Mapping[str, bytes] | None = None
    ) -> None:
        self._home, self._job, self._grid, self._nodes, self._keys = home, job, grid, nodes, keys
        self._names = {node: name for name, node in nodes.items()}
        self._seconds: dict[str, float] = {}
        self.plan = job.plan

    def run(self) -> None:
        """Run to the end.

        Raises:
            VeilError: when it cannot be finished; the checkpoint stays.
        """
        if self._job.stop_wanted:
            raise RunError("the run was stopped", "a run to its end", "veil coordinator resume goes on with it")
        self._job.note(rounds=len(schedule(self.plan)))
        state = self._recover()
        if state is None:
            state = self._gather()
            state.save(self._job.checkpoint)
        self._train(state)

    def _recover(self) -> RunState | None:
        if not self._job.checkpoint.exists():
            return None
        state = RunState.load(self._job.checkpoint, self.plan)
        missing = sorted(set(state.cohort) - set(self._nodes))
        if missing:
            _log.warning("no longer enrolled: %s", ", ".join(missing))
        return state

    def _gather(self) -> RunState:
        """Offer the run until every site has decided, or the time for it is over."""
        self._job.note(phase=Phase.OFFERING)
        answers = self._offer(until=time.monotonic() + self.plan.cohort.approval_timeout_s)
        declined = {name: str(answer.refusal) for name, answer in answers.items() if answer.refusal}
        lacking = [name for name, answer in answers.items() if answer.willingness is Willingness.LACKS_BACKBONE]
        cohort = [name for name, answer in answers.items() if answer.willingness is Willingness.READY]
        if lacking:
            self._job.note(phase=Phase.DELIVERING)
            for name, refusal in self._deliver(lacking).items():
                if refusal is None:
                    cohort.append(name)
                else:
                    declined[name] = refusal.value
        for name in sorted(set(self._nodes) - set(cohort) - set(declined)):
            declined[name] = RefusalCode.APPROVAL.value if name in answers else "no-answer"
        if len(cohort) < self.plan.cohort.min_sites:
            raise _too_few(cohort, declined, self.plan)
        state = initial_state(self.plan, self._home.shelf, len(cohort))
        state.cohort, state.declined = tuple(sorted(cohort)), declined
        return state

    def _offer(self, until: float) -> dict[str, OfferReply]:
        content = encode_offer(Offer(plan=self.plan, job=self._job.name))
        answers: dict[str, OfferReply] = {}
        patience = _OFFER_S
        while True:
            undecided = {name for name in self._nodes if _undecided(answers.get(name))}
            if not undecided or time.monotonic() >= until:
                return answers
            asked = dict.fromkeys(undecided, (OFFER, content))
            for name, reply in self._ask(asked, min(patience, until - time.monotonic())).items():
                try:
                    answers[name] = decode_offer_reply(reply)
                except WireError:
                    answers[name] = _malformed(self._job.name)
            said = {name: str(answer.refusal or answer.willingness) for name, answer in answers.items()}
            self._job.note(sites=said)
            if undecided - answers.keys():
                patience = min(2 * patience, _PIECE_S)  # hashing a large backbone takes a site long
            time.sleep(_ASK_AGAIN_S)

    def _ask(self, questions: Mapping[str, tuple[str, RecordDict]], timeout_s: float) -> dict[str, RecordDict]:
        """A question to each of some sites, action and content; those that answered, with what they said."""
        self._grid.enough = 1
        messages = [
            Message(content, self._nodes[name], f"query.{action}") for name, (action, content) in questions.items()
        ]
        replies = self._grid.send_and_receive(messages, timeout=timeout_s)
        return {self._names[reply.metadata.src_node_id]: reply.content for reply in replies if not reply.has_error()}

    def _deliver(self, names: list[str]) -> dict[str, RefusalCode | None]:
        """Give the backbone to the sites that lack it; per site None, or why it has none."""
        if self.plan.backbone is None:
            return dict.fromkeys(names, RefusalCode.MALFORMED)
        offer, shelf = Offer(plan=self.plan, job=self._job.name), BackboneShelf(self._home.shelf)
        manifest = shelf.manifest(self.plan.backbone, base=self._home.shelf)

        def ask(pieces: Mapping[str, Manifest | Chunk]) -> dict[str, Progress]:
            replies = self._ask({name: _carry(piece, offer) for name, piece in pieces.items()}, _PIECE_S)
            return {name: _progress(reply) for name, reply in replies.items()}

        return deliver(ask, names, manifest, shelf.chunk, timeout_s=self.plan.cohort.approval_timeout_s)

    def _train(self, state: RunState) -> None:
        self._job.note(phase=Phase.TRAINING, rounds_done=len(state.records))
        self._grid.cohort = [self._nodes[name] for name in state.cohort if name in self._nodes]
        if len(self._grid.cohort) < self.plan.cohort.min_sites:
            raise _too_few(sorted(set(state.cohort) & set(self._nodes)), state.declined, self.plan)
        shared = self.plan.privacy.noise == "distributed"  # a masked sum needs every site that was asked
        self._grid.enough = len(self._grid.cohort) if shared else self.plan.cohort.min_sites
        outcomes: list[Outcome] = []
        app = server_app(
            self.plan,
            job=self._job.name,
            state=state,
            watch=self._watch,
            deliver=outcomes.append,
            site_of=lambda node: self._names.get(node, f"node {node}"),
            keys=self._keys,
        )
        began = time.monotonic()
        app(
            self._grid,
            Context(run_id=self._grid.run.run_id, node_id=1, node_config={}, state=RecordDict(), run_config={}),
        )
        self._seconds["federation_s"] = round(time.monotonic() - began, 3)
        evidence = outcomes[0].evidence
        evidence.missing.update({name: "no longer enrolled" for name in state.cohort if name not in self._nodes})
        write_result(self.plan, self._home, self._job, state, self._seconds, evidence)

    def _watch(self, state: RunState) -> None:
        state.save(self._job.checkpoint)
        last = state.records[-1]
        said = {**dict.fromkeys(state.cohort, "no reply"), **dict.fromkeys(last.sites, "replied"), **last.refusals}
        self._job.note(rounds_done=len(state.records), sites={**state.declined, **said})


def _carry(piece: Manifest | Chunk, offer: Offer) -> tuple[str, RecordDict]:
    if isinstance(piece, Manifest):
        return MANIFEST, encode_manifest(piece, offer)
    return CHUNK, encode_chunk(piece)


def _progress(reply: RecordDict) -> Progress:
    try:
        return decode_progress(reply)
    except WireError:
        return Progress(manifest="", standing=Standing.REFUSED, refusal=RefusalCode.MALFORMED)


def _undecided(answer: OfferReply | None) -> bool:
    return answer is None or answer.willingness is Willingness.PENDING


def _malformed(job: str) -> OfferReply:
    return OfferReply(job=job, willingness=Willingness.REFUSED, refusal=RefusalCode.MALFORMED)


def _too_few(cohort: list[str], declined: dict[str, str], plan: RunPlan) -> RunError:
    why = ", ".join(f"{name}: {code}" for name, code in sorted(declined.items())) or "nobody else is enrolled"
    return RunError(
        f"{len(cohort)} sites take part ({why})",
        f"at least cohort.min_sites = {plan.cohort.min_sites}",
        "ask the sites' operators; veil coordinator resume asks again",
    )


def run_job(home: Home, job: Job) -> None:
    """Run one job to its end and note how it ended."""
    state = open_link_state(home.database).state()
    with closing(Roster(home.roster, state)) as roster:
        sites = [site for site in roster.sites() if site.revoked_at is None and site.name in job.sites]
    nodes = {site.name: site.node_id for site in sites if site.node_id}
    keys = {site.name: site.public_pem for site in sites}

    def stopped() -> bool:
        job.beat()
        return job.stop_wanted

    grid = LinkGrid(state, stopped=stopped)
    try:
        with job.exclusive(), grid.running():
            Runner(home, job, grid, nodes, keys).run()
    except VeilError as error:
        _log.error("run %s: %s", job.name, error)
        job.note(phase=Phase.STOPPED if job.stop_wanted else Phase.FAILED, message=str(error))
    except (OSError, SQLAlchemyError, RunLostError):
        _log.exception("the runner of %s gives up; another one goes on from the checkpoint", job.name)
        sys.exit(1)
    except Exception:
        _log.exception("run %s failed", job.name)
        job.note(phase=Phase.FAILED, message=traceback.format_exc(limit=-1).strip().splitlines()[-1])
    else:
        job.note(phase=Phase.FINISHED, message="")


def main() -> None:
    """The runner's process: HOME and JOB on the command line."""
    end_with_parent()
    log_json_lines()
    home = Home.open(Path(sys.argv[1]))
    run_job(home, Job.find(home.runs, sys.argv[2]))


if __name__ == "__main__":
    main()
