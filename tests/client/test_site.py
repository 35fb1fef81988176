# SPDX-License-Identifier: Apache-2.0
"""Tests of `veil.client.site`: review, spend, train, record, answer, in that order, and never an exception."""

from __future__ import annotations

import math
import sqlite3
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from veil.client import site as module
from veil.client.ledger import Ledger
from veil.client.release import draw
from veil.client.site import Consent, Site
from veil.client.units import Units
from veil.common.delivery import Chunk, FileEntry, Manifest, Position, Progress, Standing
from veil.common.errors import RefusalCode, RefusalError, TableError
from veil.common.evaluation import EVALUATION
from veil.common.exchange import Offer, OfferReply, RoundReply, RoundRequest, Willingness
from veil.common.head import CENTRE, WEIGHT, initial_adapter
from veil.common.noise import spacing
from veil.common.plan import RunPlan
from veil.common.plan_sections import Backbone, Evaluation
from veil.common.schedule import ReleaseKind, schedule
from veil.common.update import Adapter
from veil.common.weights import WEIGHTS_NAME
from veil.common.wire import decode_reply, encode_reply
from veil.simulations.unprivate_noise import FixedNoise, NoNoise

MakePlan = Callable[..., RunPlan]
MakeRequest = Callable[..., RoundRequest]
MakeSite = Callable[..., Site]


def line_count(tmp_path: Path) -> int:
    with sqlite3.connect(tmp_path / "ledger.sqlite") as other:
        (count,) = other.execute("SELECT count(*) FROM line").fetchone()
    other.close()
    return int(count)


def points(reply: RoundReply) -> dict[str, bytes]:
    assert reply.update is not None, reply.refusal
    return {name: value.tobytes() for name, value in reply.update.points.items()}


@pytest.mark.parametrize(
    "training", [{"rounds": 30}, {"algorithm": "dp-fedavg", "rounds": 3, "sample_rate": 0.25}], ids=["fedsgd", "fedavg"]
)
def test_a_whole_plan_is_answered_for_exactly_its_budget(
    training: dict[str, Any], make_plan: MakePlan, make_request: MakeRequest, make_site: MakeSite
) -> None:
    plan, site = make_plan(training), make_site(epsilon_per_run=3.0, epsilon_lifetime=3.0)
    for release in schedule(plan):
        reply = site.answer(make_request(plan, release.round))
        assert (reply.site, reply.job, reply.round) == ("Ulm", "job", release.round)
        assert reply.update is not None
    assert 2.99 < site.ledger.spent(1e-5).epsilon <= 3.0
    assert [entry.mechanism for entry in site.ledger.entries()] == [release.mechanism for release in schedule(plan)]
    another = site.answer(make_request(plan, 0, job="another"))
    assert another.refusal is RefusalCode.BUDGET
    assert len(site.ledger.entries()) == len(schedule(plan))


def test_a_plan_above_the_budget_is_refused_before_its_first_round(
    make_plan: MakePlan, make_request: MakeRequest, make_site: MakeSite, tmp_path: Path
) -> None:
    site = make_site(epsilon_per_run=2.99)
    assert site.answer(make_request(make_plan())).refusal is RefusalCode.BUDGET
    assert line_count(tmp_path) == 0


def test_the_line_is_written_before_the_records_are_opened(
    make_plan: MakePlan,
    make_request: MakeRequest,
    make_site: MakeSite,
    make_units: Callable[..., Units],
    tmp_path: Path,
) -> None:
    seen = []

    def units(_: RunPlan) -> Units:
        seen.append(line_count(tmp_path))
        return make_units(5)

    make_site(units=units).answer(make_request(make_plan()))
    assert seen == [1]


def test_a_refusal_never_opens_the_records(make_plan: MakePlan, make_request: MakeRequest, make_site: MakeSite) -> None:
    def units(_: RunPlan) -> Units:
        pytest.fail("a refused request must not touch a record")

    site = make_site(units=units, epsilon_per_run=2.0)
    plan = make_plan()
    for request, code in (
        (make_request(plan), RefusalCode.BUDGET),
        (make_request(plan, 9, kind=ReleaseKind.GRADIENT), RefusalCode.MALFORMED),
        (make_request(make_plan(target_delta=0.1)), RefusalCode.POLICY),
        (make_request(plan, nominal_units=math.nan), RefusalCode.MALFORMED),
    ):
        assert site.answer(request).refusal is code


def test_the_answer_is_stored_before_it_leaves(
    make_plan: MakePlan, make_request: MakeRequest, make_site: MakeSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A ledger that cannot store the bytes lets nothing out; the line stays, and the next attempt is paid again."""
    site, request = make_site(), make_request(make_plan())

    def full(*_: object) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "record_reply", full)
        assert site.answer(request).refusal is RefusalCode.INTERNAL
    assert len(site.ledger.entries()) == 1
    assert site.answer(request).update is not None
    assert len(site.ledger.entries()) == 2


def test_a_second_delivery_during_the_first_gets_the_same_answer(
    make_plan: MakePlan, make_request: MakeRequest, make_site: MakeSite, make_units: Callable[..., Units]
) -> None:
    """Both drew noise, both were paid, one answer is all that ever leaves."""
    request, inner = make_request(make_plan()), make_site()
    early: list[RoundReply] = []

    def units(_: RunPlan) -> Units:
        if not early:
            early.append(inner.answer(request))
        return make_units(40)

    late = make_site(units=units).answer(request)
    assert points(late) == points(early[0])
    assert len(inner.ledger.entries()) == 2


def test_a_repeated_request_gets_the_same_bytes_also_after_a_restart(
    make_plan: MakePlan, make_request: MakeRequest, make_site: MakeSite
) -> None:
    """Also with another head: what was drawn is what there is."""
    plan, site = make_plan(), make_site()
    first = site.answer(make_request(plan, 1))
    moved = dict(initial_adapter(plan, 6).tensors)
    moved[WEIGHT] = np.ones((3, 7), np.float32)
    for one in (site, make_site()):
        assert points(one.answer(make_request(plan, 1))) == points(first)
        assert points(one.answer(make_request(plan, 1, adapter=Adapter(tensors=moved)))) == points(first)
    assert len(site.ledger.entries()) == 1


@pytest.mark.parametrize("bits", [8, 16, 32])
@pytest.mark.parametrize("algorithm", ["dp-fedsgd", "dp-fedavg"])
def test_an_answer_is_as_narrow_as_the_plan_says_by_its_noised_numbers_alone(
    algorithm: str, bits: int, make_plan: MakePlan, make_request: MakeRequest, make_site: MakeSite
) -> None:
    """The noise is many times the clean sum, so that a lattice chosen by that sum would be another one."""
    document = make_plan({"algorithm": algorithm}, target_epsilon=0.05).model_dump(mode="json")
    plan = RunPlan.model_validate({**document, "wire": {"update_bits": bits}, "evaluation": {}})
    site = make_site(noise=lambda request: FixedNoise(0, "Ulm", request.round))
    boundless = site.policy.limits.model_copy(update={"epsilon_per_run": math.inf, "epsilon_lifetime": math.inf})
    site = replace(site, policy=site.policy.model_copy(update={"limits": boundless}))
    for release in schedule(plan)[:-1]:
        request, sent = make_request(plan, release.round), bits if release.round else 32
        units = site.units(plan)
        assert isinstance(units, Units)
        noised, clean = (
            draw(request, release, units, source(0, "Ulm", release.round)) for source in (FixedNoise, NoNoise)
        )
        reply = site.answer(request)
        assert reply.update is not None
        assert reply.update.to_bytes() == noised.narrowed(sent).to_bytes()
        assert points(reply) == points(site.answer(request)), "a second time it comes from the ledger"
        assert {one.dtype for one in reply.update.points.values()} == {np.dtype(f"int{sent}")}
        assert sent != 8 or reply.update.spacing > 4 * clean.narrowed(sent).spacing
    assert schedule(plan)[-1].update_bits == 32


def test_another_round_or_job_gets_other_noise(
    make_plan: MakePlan, make_request: MakeRequest, make_site: MakeSite, make_units: Callable[..., Units]
) -> None:
    """No records at all: the three answers are noise alone, and different."""
    plan, site = make_plan(), make_site(units=lambda _: make_units(0))
    answers = [
        points(site.answer(make_request(plan, round_, job=job)))[WEIGHT]
        for round_, job in ((1, "a"), (2, "a"), (1, "b"))
    ]
    assert len(set(answers)) == 3


@pytest.mark.parametrize(
    "error",
    [
        ValueError("Erika Mustermann, born 1964-08-12"),
        TableError("Erika Mustermann", "a name", "look"),
        KeyError("Erika Mustermann"),
        MemoryError("Erika Mustermann"),
        RecursionError("Erika Mustermann"),
        sqlite3.DatabaseError("Erika Mustermann"),
    ],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize("where", ["units", "noise", "draw"])
def test_an_error_inside_becomes_a_code_and_its_text_stays(
    where: str,
    error: Exception,
    make_plan: MakePlan,
    make_request: MakeRequest,
    make_site: MakeSite,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object) -> Any:
        raise error

    if where == "draw":
        monkeypatch.setattr(module, "draw", fail)
    site = make_site(**({where: fail} if where != "draw" else {}))
    reply = site.answer(make_request(make_plan()))
    assert reply.refusal is RefusalCode.INTERNAL
    assert reply.update is None
    message = encode_reply(reply)
    sent = repr(message) + "".join(str(dict(record)) for record in message.config_records.values())
    assert "Erika" not in sent
    assert "internal" in sent
    assert decode_reply(message) == reply


def test_the_operator_reads_why(
    make_plan: MakePlan, make_request: MakeRequest, make_site: MakeSite, caplog: pytest.LogCaptureFixture
) -> None:
    make_site(epsilon_per_run=1.0).answer(make_request(make_plan()))
    assert "limits.epsilon_per_run = 1" in caplog.text


odd_arrays = st.sampled_from(
    [
        np.zeros((3, 7), np.float32),
        np.zeros((3, 6), np.float32),
        np.zeros(0, np.float32),
        np.zeros((0, 7), np.float32),
        np.full((3, 7), np.nan, np.float32),
        np.full((3, 7), 3e38, np.float32),
        np.zeros((3, 7), np.int64),
        np.array("text"),
    ]
)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    round_=st.one_of(st.integers(-2, 5), st.integers()),
    kind=st.sampled_from(ReleaseKind),
    job=st.text(max_size=5),
    size=st.one_of(st.just(50.0), st.floats()),
    weight=odd_arrays,
    centre=odd_arrays,
    epsilon=st.sampled_from([1e-3, 3.0, 1000.0]),
)
def test_no_request_makes_a_site_raise(
    round_: int,
    kind: ReleaseKind,
    job: str,
    size: float,
    weight: Any,
    centre: Any,
    epsilon: float,
    make_plan: MakePlan,
    make_request: MakeRequest,
    make_site: MakeSite,
) -> None:
    request = RoundRequest(
        plan=make_plan(target_epsilon=epsilon),
        job=job,
        round=round_,
        kind=kind,
        adapter=Adapter(tensors={WEIGHT: weight, CENTRE: centre}),
        nominal_units=size,
    )
    reply = make_site(epsilon_lifetime=1e6, epsilon_per_run=1e6).answer(request)
    assert (reply.update is None) != (reply.refusal is None)


def test_a_request_without_tensors_is_a_code(
    make_plan: MakePlan, make_request: MakeRequest, make_site: MakeSite
) -> None:
    reply = make_site().answer(make_request(make_plan(), 1, adapter=Adapter(tensors={})))
    assert reply.refusal is RefusalCode.MALFORMED


@pytest.mark.parametrize("source", [FixedNoise, NoNoise])
def test_noise_that_is_not_private_does_not_leave_a_real_site(
    source: type[FixedNoise], make_plan: MakePlan, make_request: MakeRequest, make_site: MakeSite
) -> None:
    site = make_site(noise=lambda request: source(0, "Ulm", request.round), epsilon_per_run=1e6, epsilon_lifetime=1e6)
    assert site.answer(make_request(make_plan())).refusal is RefusalCode.BUDGET
    assert site.ledger.entries() == ()


def test_an_empty_site_answers_like_any_other(
    make_plan: MakePlan, make_request: MakeRequest, make_site: MakeSite, make_units: Callable[..., Units]
) -> None:
    plan, site = make_plan(), make_site(units=lambda _: make_units(0))
    for round_ in range(4):
        update = site.answer(make_request(plan, round_)).update
        assert update is not None
        (values,) = update.points.values()
        assert len(np.unique(values)) == values.size


def labelled(labels: list[int]) -> Units:
    count = len(labels)
    features = np.random.default_rng(0).normal(size=(count, 6))
    return Units(features=features, labels=np.array(labels, np.int64), unit=np.arange(count), count=count)


def test_a_malformed_head_is_refused_whatever_the_records_are(
    make_plan: MakePlan, make_request: MakeRequest, make_site: MakeSite
) -> None:
    """An answer here and an error there would tell, without noise, whether a site has a record of a class."""
    plan = make_plan()
    tensors = {WEIGHT: np.zeros((2, 7), np.float32), CENTRE: np.zeros(6, np.float32)}
    request = make_request(plan, 1, adapter=Adapter(tensors=tensors))
    without, with_one = (
        make_site(units=lambda _, labels=labels: labelled(labels)).answer(request).refusal
        for labels in ([0, 1, 0, 1], [0, 1, 0, 1, 2])
    )
    assert (without is None) == (with_one is None)


def test_a_malformed_head_costs_nothing(make_plan: MakePlan, make_request: MakeRequest, make_site: MakeSite) -> None:
    tensors = {WEIGHT: np.zeros((2, 7), np.float32), CENTRE: np.zeros(6, np.float32)}
    site = make_site()
    site.answer(make_request(make_plan(), 1, adapter=Adapter(tensors=tensors)))
    assert site.ledger.entries() == ()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_promise_close_to_zero_does_not_show_the_clean_sum(
    make_plan: MakePlan, make_request: MakeRequest, make_site: MakeSite, make_units: Callable[..., Units]
) -> None:
    """ε = 1e-15 at δ = 1e-300 is within the plan's ranges: refused, or two answers on the same records differ."""
    plan = make_plan({"rounds": 30, "centre": False}, target_epsilon=1e-15, target_delta=1e-300)
    units = make_units(40)
    replies = [
        make_site(units=lambda _: units).answer(make_request(plan, 1, job=job, kind=ReleaseKind.GRADIENT))
        for job in ("first", "second")
    ]
    if any(reply.update is None for reply in replies):
        return
    first, second = (np.frombuffer(points(reply)[WEIGHT], np.int32) for reply in replies)
    assert (first != second).all()


def test_a_job_that_changes_its_plan_gets_nothing_new(
    make_plan: MakePlan, make_request: MakeRequest, make_site: MakeSite
) -> None:
    """A coordinator that changes the plan of a job in its middle gets no second answer to a round."""
    site = make_site()
    first = site.answer(make_request(make_plan(), 1))
    changed = site.answer(make_request(make_plan(target_epsilon=1.0), 1))
    assert changed.refusal is not None or points(changed) == points(first)
    assert site.answer(make_request(make_plan(target_epsilon=1.0), 2)).refusal is RefusalCode.PLAN_CHANGED
    assert len(site.ledger.entries()) == 1


def test_the_noise_of_an_answer_has_the_sites_own_sigma(
    make_plan: MakePlan, make_request: MakeRequest, make_site: MakeSite, make_units: Callable[..., Units]
) -> None:
    """An empty site, a wide head: standard deviation σ·C within 5.1 standard errors (false alarm 4e-7)."""
    plan, width = make_plan(), 4000
    site = make_site(units=lambda _: make_units(0, width=width))
    update = site.answer(make_request(plan, 1, width=width)).update
    assert update is not None
    mechanism = schedule(plan)[1].mechanism
    values = update.points[WEIGHT] * spacing(mechanism.max_grad_norm)
    ratio = float(np.mean(values**2)) / (mechanism.noise_multiplier * mechanism.max_grad_norm) ** 2
    assert abs(ratio - 1) < 5.1 * math.sqrt(2 / values.size)


class Shelf:
    """Backbones that are here or not; what a delivery does is scripted."""

    def __init__(self, *, here: bool, does: Callable[[], Progress] | None = None) -> None:
        self.here, self.does = here, does
        self.pieces = 0

    def has(self, backbone: Backbone) -> bool:
        return self.here

    def begin(self, manifest: Manifest, backbone: Backbone) -> Progress:
        return self.write(None)

    def write(self, chunk: Chunk | None) -> Progress:
        self.pieces += 1
        assert self.does is not None
        return self.does()


PINNED = Backbone(source="package:small/model", sha256="a" * 64, licence="MIT")
MANIFEST = Manifest(entries=(FileEntry(name=WEIGHTS_NAME, size=4, sha256="a" * 64),))
PIECE = Chunk(manifest=MANIFEST.digest, position=Position(name=WEIGHTS_NAME, offset=0), data=b"four")


def offered(plan: RunPlan, *, backbone: bool = False) -> Offer:
    text = {"backbone": PINNED, "task": plan.task.model_copy(update={"kind": "text-classification"})}
    return Offer(plan=plan.model_copy(update=text) if backbone else plan, job="job")


def says(consent: Consent) -> dict[str, Any]:
    return {"consent": lambda job, plan: consent}


@pytest.mark.parametrize(
    ("consent", "backbone", "here", "willingness"),
    [
        (Consent.GIVEN, False, False, Willingness.READY),
        (Consent.GIVEN, True, True, Willingness.READY),
        (Consent.GIVEN, True, False, Willingness.LACKS_BACKBONE),
        (Consent.PENDING, False, False, Willingness.PENDING),
        (Consent.PENDING, True, False, Willingness.PENDING),
    ],
)
def test_an_offer_is_answered_with_one_word(
    consent: Consent,
    backbone: bool,
    here: bool,
    willingness: Willingness,
    make_plan: MakePlan,
    make_site: MakeSite,
) -> None:
    site = replace(make_site(), backbones=Shelf(here=here), **says(consent))
    reply = site.consider(offered(make_plan(), backbone=backbone))
    assert reply == OfferReply(job="job", willingness=willingness)


@pytest.mark.parametrize(
    ("limits", "consent", "code"),
    [
        ({}, Consent.DENIED, RefusalCode.APPROVAL),
        ({"epsilon_per_run": 2.0}, Consent.GIVEN, RefusalCode.BUDGET),
        ({"epsilon_per_run": 2.0}, Consent.PENDING, RefusalCode.BUDGET),
        ({"delta": 1e-6}, Consent.GIVEN, RefusalCode.POLICY),
        ({"licences": ("Apache-2.0",)}, Consent.GIVEN, RefusalCode.POLICY),
    ],
)
def test_an_offer_that_cannot_be_taken_is_refused_with_its_code(
    limits: dict[str, Any], consent: Consent, code: RefusalCode, make_plan: MakePlan, make_site: MakeSite
) -> None:
    site = replace(make_site(**limits), backbones=Shelf(here=True), **says(consent))
    reply = site.consider(offered(make_plan(), backbone=True))
    assert reply == OfferReply(job="job", willingness=Willingness.REFUSED, refusal=code)


def test_an_offer_costs_nothing_and_opens_no_record(make_plan: MakePlan, make_site: MakeSite, tmp_path: Path) -> None:
    def units(_: RunPlan) -> Units:
        pytest.fail("an offer must not touch a record")

    site = make_site(units=units)
    assert site.consider(offered(make_plan())).willingness is Willingness.READY
    assert line_count(tmp_path) == 0


def test_an_offer_in_mid_run_is_priced_by_what_is_left(
    make_plan: MakePlan, make_request: MakeRequest, make_site: MakeSite
) -> None:
    """Rounds already paid for are not counted twice; a second run of the same plan has no room."""
    plan, site = make_plan(), make_site(epsilon_per_run=3.0, epsilon_lifetime=3.0)
    for round_ in (0, 1):
        assert site.answer(make_request(plan, round_)).update is not None
    assert site.consider(Offer(plan=plan, job="job")).willingness is Willingness.READY
    assert site.consider(Offer(plan=plan, job="again")).refusal is RefusalCode.BUDGET


def test_an_error_while_considering_becomes_a_code(make_plan: MakePlan, make_site: MakeSite) -> None:
    def fail(job: str, plan: RunPlan) -> Consent:
        raise OSError("Erika Mustermann")

    reply = replace(make_site(), consent=fail).consider(offered(make_plan()))
    assert reply == OfferReply(job="job", willingness=Willingness.REFUSED, refusal=RefusalCode.INTERNAL)


@pytest.mark.parametrize(
    ("consent", "backbone", "limits", "code"),
    [
        (Consent.PENDING, True, {}, RefusalCode.APPROVAL),
        (Consent.DENIED, True, {}, RefusalCode.APPROVAL),
        (Consent.GIVEN, False, {}, RefusalCode.APPROVAL),
        (Consent.GIVEN, True, {"licences": ("Apache-2.0",)}, RefusalCode.POLICY),
        (Consent.GIVEN, True, {"epsilon_lifetime": 2.0}, RefusalCode.BUDGET),
    ],
)
def test_no_byte_is_taken_for_a_run_that_was_not_approved(
    consent: Consent,
    backbone: bool,
    limits: dict[str, Any],
    code: RefusalCode,
    make_plan: MakePlan,
    make_site: MakeSite,
) -> None:
    shelf = Shelf(here=False)
    site = replace(make_site(**limits), backbones=shelf, **says(consent))
    progress = site.receive((offered(make_plan(), backbone=backbone), MANIFEST))
    assert progress == Progress(manifest=MANIFEST.digest, standing=Standing.REFUSED, refusal=code)
    assert shelf.pieces == 0


def refuse() -> Progress:
    raise RefusalError(RefusalCode.BACKBONE, "Erika", "a name", "look")


def fail() -> Progress:
    raise OSError("Erika")


@pytest.mark.parametrize(("does", "code"), [(refuse, RefusalCode.BACKBONE), (fail, RefusalCode.INTERNAL)])
def test_a_piece_that_cannot_be_taken_is_a_code(
    does: Callable[[], Progress], code: RefusalCode, make_plan: MakePlan, make_site: MakeSite
) -> None:
    site = replace(make_site(), backbones=Shelf(here=False, does=does))
    for piece in (PIECE, (offered(make_plan(), backbone=True), MANIFEST)):
        progress = site.receive(piece)
        assert progress == Progress(manifest=MANIFEST.digest, standing=Standing.REFUSED, refusal=code)


def test_a_piece_of_an_approved_backbone_reaches_the_shelf(make_plan: MakePlan, make_site: MakeSite) -> None:
    done = Progress(manifest=MANIFEST.digest, standing=Standing.COMPLETE)
    shelf = Shelf(here=False, does=lambda: done)
    site = replace(make_site(), backbones=shelf)
    assert site.receive((offered(make_plan(), backbone=True), MANIFEST)) == done
    assert site.receive(PIECE) == done
    assert shelf.pieces == 2


def test_an_approval_taken_back_ends_a_run_in_its_middle(
    make_plan: MakePlan, make_request: MakeRequest, make_site: MakeSite
) -> None:
    """Also for a round that was answered before: nothing more leaves."""
    said = [Consent.GIVEN]
    plan, site = make_plan(), replace(make_site(), consent=lambda job, plan: said[-1])
    assert site.answer(make_request(plan, 1)).update is not None
    for word in (Consent.DENIED, Consent.PENDING):
        said.append(word)
        for round_ in (1, 2):
            assert site.answer(make_request(plan, round_)).refusal is RefusalCode.APPROVAL
    assert len(site.ledger.entries()) == 1
    said.append(Consent.GIVEN)
    assert site.answer(make_request(plan, 2)).update is not None


@pytest.mark.parametrize(("limits", "told"), [({}, None), ({"release_counts": True}, 40)])
def test_the_number_of_units_leaves_only_where_it_was_declared_public(
    limits: dict[str, Any], told: int | None, make_plan: MakePlan, make_request: MakeRequest, make_site: MakeSite
) -> None:
    site = make_site(**limits)
    for round_ in range(4):
        reply = site.answer(make_request(make_plan(), round_))
        assert reply.units == told
        config = encode_reply(reply).config_records["config"]
        assert ("units" in config) == (told is not None)
        assert decode_reply(encode_reply(reply)).units == told


def test_units_held_out_are_counted_where_the_number_is_public_and_a_plan_is_answered_for_its_budget(
    make_plan: MakePlan, make_request: MakeRequest, make_site: MakeSite, make_units: Callable[..., Units]
) -> None:
    plan = make_plan().model_copy(update={"evaluation": Evaluation()})
    units = replace(make_units(30), held=make_units(7))
    site = make_site(units=lambda _: units, release_counts=True, epsilon_per_run=3.0, epsilon_lifetime=3.0)
    replies = [site.answer(make_request(plan, release.round)) for release in schedule(plan)]
    assert [reply.units for reply in replies] == [37] * 5
    assert [list(points(reply)) for reply in replies] == [[CENTRE], [WEIGHT], [WEIGHT], [WEIGHT], [EVALUATION]]
    assert points(site.answer(make_request(plan, 4))) == points(replies[-1])
    assert len(site.ledger.entries()) == 5


def test_a_refusal_tells_no_number_of_units(
    make_plan: MakePlan, make_request: MakeRequest, make_site: MakeSite
) -> None:
    reply = make_site(release_counts=True, epsilon_per_run=1.0).answer(make_request(make_plan()))
    assert (reply.refusal, reply.units, reply.head) == (RefusalCode.BUDGET, None, "")


def test_a_witness_that_this_ledger_never_held_is_refused(
    make_plan: MakePlan, make_request: MakeRequest, make_site: MakeSite
) -> None:
    """The coordinator saw a line that is not here: an old copy was put in the ledger's place."""
    plan, site = make_plan(), make_site()
    first = site.answer(make_request(plan))
    assert site.answer(make_request(plan, 1, witness="f" * 64)).refusal is RefusalCode.LEDGER
    assert len(site.ledger.entries()) == 1
    second = site.answer(make_request(plan, 1, witness=first.head))
    assert second.update is not None
    assert second.head != first.head
    assert site.answer(make_request(plan, 2, witness=first.head)).update is not None
