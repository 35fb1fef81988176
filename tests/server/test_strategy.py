# SPDX-License-Identifier: Apache-2.0
"""What the coordinator takes in: checked replies, each site once, enough of them; and what it makes of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from veil.common.errors import RefusalCode, RunError
from veil.common.evaluation import EVALUATION, EVALUATION_NORM, quality
from veil.common.exchange import RoundReply
from veil.common.head import CENTRE, WEIGHT, initial_adapter
from veil.common.noise import spacing
from veil.common.plan import RunPlan
from veil.common.schedule import CENTRE_NORM, COUNT_WEIGHT, ReleaseKind, schedule
from veil.common.update import Adapter, Update
from veil.common.wire import WireError, encode_reply
from veil.server.descent import Descent, shrink, steps_of
from veil.server.run_report import build_run_report
from veil.server.state import RunState
from veil.server.steps import Steps
from veil.server.strategy import SumOfUpdates
from veil.server.validation import validate

WIDTH = 3


def plan(**sections: Any) -> RunPlan:
    return RunPlan.model_validate(
        {
            "name": "p",
            "task": {"kind": "tabular-classification", "labels": ["a", "b"]},
            **sections,
            "privacy": {"target_epsilon": 3.0, "max_grad_norm": 0.5, **sections.get("privacy", {})},
        }
    )


def descent(chosen: RunPlan, sites: int = 2) -> Descent:
    return Descent.start(chosen, initial_adapter(chosen, WIDTH), sites)


def centre_update(mean: list[float], units: int) -> Update:
    sums = np.array([*(np.array(mean) * units), COUNT_WEIGHT * units])
    points = np.rint(sums / spacing(CENTRE_NORM)).astype(np.int64)
    return Update(points={CENTRE: points}, spacing=spacing(CENTRE_NORM)).narrowed(32)


def gradient_update(value: float, bound: float = 0.5) -> Update:
    points = np.full((2, WIDTH + 1), round(value / spacing(bound)))
    return Update(points={WEIGHT: points}, spacing=spacing(bound)).narrowed(32)


def reply(update: Update, **change: Any) -> RoundReply:
    return RoundReply(**{"site": "s", "job": "j", "round": 1, "update": update, **change})


def test_the_noisy_count_becomes_the_number_of_units() -> None:
    state = descent(plan())
    state.apply(schedule(state.plan)[0], [centre_update([0.9, 0, 0], 400), centre_update([0.9, 0, 0], 200)])
    assert state.units == pytest.approx(600, rel=1e-5)
    assert state.nominal_units == pytest.approx(300, rel=1e-5)
    assert 0.8 < state.centre[0] < 0.9 and np.allclose(state.centre[1:], 0, atol=1e-5)


def test_a_public_size_is_taken_as_it_stands() -> None:
    state = descent(plan(cohort={"nominal_units": 50}))
    state.apply(schedule(state.plan)[0], [centre_update([0.9, 0, 0], 400)])
    assert state.units == 100


def test_a_gradient_step_is_rate_over_units_times_the_sum() -> None:
    state = descent(plan(training={"learning_rate": 2.0}, cohort={"nominal_units": 50}))
    state.apply(schedule(state.plan)[1], [gradient_update(3.0), gradient_update(4.0)])
    assert np.allclose(state.weight, -2.0 / 100 * 7.0, rtol=1e-6)


def test_a_gradient_step_on_some_sites_stands_for_all() -> None:
    """The one site of two that was asked counts twice."""
    cohort = {"nominal_units": 50, "min_sites": 1, "sites_per_round": 1}
    state = descent(plan(training={"learning_rate": 2.0}, cohort=cohort))
    state.apply(schedule(state.plan)[1], [gradient_update(3.0)])
    assert np.allclose(state.weight, -2.0 / 100 * 6.0, rtol=1e-6)


def test_a_delta_step_is_the_plain_mean() -> None:
    state = descent(plan(training={"algorithm": "dp-fedavg", "rounds": 2}))
    state.apply(schedule(state.plan)[1], [gradient_update(1.0), gradient_update(2.0)])
    assert np.allclose(state.weight, 1.5, rtol=1e-5)


def test_the_order_of_replies_does_not_matter() -> None:
    random = np.random.default_rng(0)
    updates = [
        Update(points={WEIGHT: random.integers(-(2**50), 2**50, (2, WIDTH + 1))}, spacing=spacing(0.5))
        for _ in range(5)
    ]
    states = [descent(plan()), descent(plan())]
    for state, order in zip(states, (updates, updates[::-1]), strict=True):
        state.apply(schedule(state.plan)[1], order)
    assert np.array_equal(states[0].weight, states[1].weight)


def test_shrinking_removes_a_mean_that_is_only_noise_and_keeps_a_clear_one() -> None:
    random = np.random.default_rng(0)
    assert np.linalg.norm(shrink(random.normal(size=400) * 0.1, 0.1)) < 0.6
    clear = np.ones(400)
    assert np.allclose(shrink(clear, 1e-3), clear, rtol=1e-5)
    assert not shrink(np.zeros(4), 0.1).any()


@pytest.mark.parametrize(("epsilon", "momentum"), [(0.05, False), (0.3, True)])
def test_rounds_of_noise_leave_each_weight_with_the_rule_s_noise(epsilon: float, momentum: bool) -> None:
    """Forty runs on sums that are noise alone: ν = 1 where no cap is in the way, with momentum and without."""
    chosen = plan(
        privacy={"target_epsilon": epsilon}, cohort={"nominal_units": 5000}, training={"rounds": 30, "centre": False}
    )
    random, release = np.random.default_rng(0), schedule(chosen)[0]
    deviation = release.mechanism.noise_multiplier * 2**20
    ends = []
    for _ in range(40):
        state = descent(chosen, sites=4)
        for _ in range(30):
            points = [np.rint(random.normal(size=(2, WIDTH + 1)) * deviation).astype(np.int64) for _ in range(4)]
            state.apply(release, [Update(points={WEIGHT: one}, spacing=release.spacing) for one in points])
        ends.append(state.weight)
    steps = steps_of(chosen, state, 1)
    assert (steps.momentum > 0) is momentum
    assert float(np.std(ends)) == pytest.approx(1.0, rel=0.12)


@pytest.mark.parametrize(("bound", "cap"), [(0.1, 32), (0.5, 32), (1.0, 32), (1.6, 20), (10.0, 16)])
def test_the_rate_is_capped_by_class_and_momentum_does_the_rest(bound: float, cap: float) -> None:
    chosen = plan(privacy={"target_epsilon": 1000.0, "max_grad_norm": bound}, training={"rounds": 1})
    state = descent(chosen)
    state.units = 1e9
    steps = steps_of(chosen, state, 1)
    assert steps.rate == pytest.approx(cap, rel=1e-12)
    assert steps.momentum == 0.9


def test_a_rate_that_the_plan_names_is_taken_without_momentum() -> None:
    chosen = plan(training={"learning_rate": 2.5})
    assert steps_of(chosen, descent(chosen), 1) == Steps(rate=2.5)


def test_many_sites_of_which_some_are_asked_go_as_far_as_all_would_with_their_noise() -> None:
    """A quarter of the sites: a quarter of the units, half the noise, half as far a way."""
    rates = []
    for asked in (100, 25):
        chosen = plan(privacy={"target_epsilon": 0.05}, cohort={"min_sites": 2, "sites_per_round": asked})
        state = descent(chosen, sites=100)
        state.units = 5000.0
        rates.append(steps_of(chosen, state, 1).rate)
    assert rates[0] == pytest.approx(2 * rates[1]) and rates[0] < 32


@pytest.mark.parametrize(
    "wrong",
    [
        reply(gradient_update(1.0), job="other"),
        reply(gradient_update(1.0), round=2),
        reply(Update(points={"backbone": np.zeros((2, 4), np.int32)}, spacing=spacing(0.5))),
        reply(Update(points={WEIGHT: np.zeros((2, 5), np.int32)}, spacing=spacing(0.5))),
        reply(Update(points={**gradient_update(1.0).points, "extra": np.zeros(1, np.int32)}, spacing=spacing(0.5))),
        reply(gradient_update(1.0, bound=0.25)),
        reply(gradient_update(1e6)),
        reply(Update(points={WEIGHT: np.full((2, 4), -(2**63), np.int64)}, spacing=spacing(0.5))),
    ],
)
def test_a_reply_that_is_not_the_one_asked_for(wrong: RoundReply) -> None:
    state = descent(plan())
    with pytest.raises(WireError):
        validate(wrong, "j", schedule(state.plan)[1], state, units=None)


def test_the_right_reply_passes() -> None:
    state = descent(plan())
    assert validate(reply(gradient_update(1.0)), "j", schedule(state.plan)[1], state, units=None) is not None


class FakeMessage:
    """A reply as Flower hands it over."""

    def __init__(self, answer: RoundReply | None) -> None:
        self.content = encode_reply(answer) if answer else None
        self.metadata = type("Metadata", (), {"src_node_id": 7})()

    def has_error(self) -> bool:
        return self.content is None


def strategy(min_sites: int) -> SumOfUpdates:
    chosen = plan(cohort={"min_sites": min_sites, "nominal_units": 10}, training={"centre": False})
    return SumOfUpdates(plan=chosen, job="j", state=RunState(descent=descent(chosen)), watch=lambda state: None)


def test_some_sites_are_asked_by_the_public_seed_and_all_where_it_is_once_a_run() -> None:
    """Two of six in each training round: all six sooner or later, the same ones whenever the plan is run."""
    chosen = plan(cohort={"min_sites": 2, "sites_per_round": 2}, training={"rounds": 12}, evaluation={})
    releases = {release.round: release for release in schedule(chosen)}
    one = SumOfUpdates(
        plan=chosen, job="j", state=RunState.start(chosen, initial_adapter(chosen, WIDTH), 6), watch=print
    )

    def asked(round_: int, order: list[int]) -> list[int]:
        return one._drawn(releases[round_], order)

    nodes = [11, 12, 13, 14, 15, 16]
    drawn = [asked(round_, nodes) for round_ in range(1, 13)]
    assert all(len(set(pair)) == 2 for pair in drawn)
    assert {node for pair in drawn for node in pair} == set(nodes)
    assert drawn == [asked(round_, nodes[::-1]) for round_ in range(1, 13)]
    assert asked(0, nodes) == asked(13, nodes) == nodes


def messages(*answers: RoundReply | None) -> Any:
    return [FakeMessage(answer) for answer in answers]


def test_a_large_site_may_answer_the_centring_round_after_a_small_one() -> None:
    """What the first sites said of their own size bounds no other site."""
    chosen = plan(cohort={"min_sites": 2}, privacy={"target_epsilon": 8.0})
    one = SumOfUpdates(plan=chosen, job="j", state=RunState(descent=descent(chosen)), watch=lambda state: None)
    sizes = {"small": 10, "large": 5000}
    sent = (reply(centre_update([0.9, 0, 0], size), site=site, round=0) for site, size in sizes.items())
    one.aggregate_train(1, messages(*sent))
    assert one.state.records[0].sites == ("large", "small")
    assert one.state.units["small"] < 200 < 5000 < one.state.units["large"]


def test_refusals_and_errors_are_recorded_and_the_rest_is_used() -> None:
    one = strategy(min_sites=1)
    refusal = RoundReply(site="b", job="j", round=1, refusal=RefusalCode.BUDGET)
    one.aggregate_train(1, messages(reply(gradient_update(1.0), site="a"), refusal, None))
    assert one.state.records[0].sites == ("a",)
    assert one.state.records[0].refusals == {"b": "budget", "node 7": "internal"}


def test_a_second_reply_of_one_site_is_not_counted() -> None:
    one = strategy(min_sites=1)
    one.aggregate_train(1, messages(reply(gradient_update(1.0)), reply(gradient_update(1.0))))
    two = strategy(min_sites=1)
    two.aggregate_train(1, messages(reply(gradient_update(1.0))))
    assert np.array_equal(one.state.descent.weight, two.state.descent.weight)
    assert one.state.records[0].refusals == {"node 7": "replay"}


def units_of(one: SumOfUpdates) -> dict[str, object]:
    """Units by site, as the report has them."""
    return {site["name"]: site["units"] for site in build_run_report(one.plan, one.job, one.state, {})["sites"]}


def test_units_that_a_site_declares_stand_in_the_report_and_no_others() -> None:
    one = strategy(min_sites=1)
    one.state.cohort = ("a", "b", "c")
    refusal = RoundReply(site="c", job="j", round=1, refusal=RefusalCode.BUDGET, units=7)
    declares = reply(gradient_update(1.0), site="a", units=120)
    one.aggregate_train(1, messages(declares, reply(gradient_update(1.0), site="b"), refusal))
    assert one.state.declared == {"a": 120}
    assert units_of(one) == {"a": 120, "b": None, "c": None}


def test_units_of_a_reply_that_is_not_taken_are_not_believed() -> None:
    one = strategy(min_sites=1)
    one.state.cohort = ("a", "b")
    twice = reply(gradient_update(1.0), site="a", units=1)
    too_long = reply(gradient_update(1e6), site="b", units=5)
    one.aggregate_train(1, messages(reply(gradient_update(1.0), site="a", units=120), twice, too_long))
    assert units_of(one) == {"a": 120, "b": None}


def test_declared_units_are_the_last_that_were_declared_and_move_no_weight() -> None:
    declaring, silent = strategy(min_sites=1), strategy(min_sites=1)
    for round_, units in ((1, 120), (2, 130)):
        declaring.aggregate_train(round_, messages(reply(gradient_update(1.0), round=round_, units=units)))
        silent.aggregate_train(round_, messages(reply(gradient_update(1.0), round=round_)))
    assert declaring.state.declared == {"s": 130}
    assert np.array_equal(declaring.state.descent.weight, silent.state.descent.weight)


def test_declared_units_belong_to_the_enrolled_site_whatever_it_calls_itself() -> None:
    chosen = plan(cohort={"min_sites": 1, "nominal_units": 10}, training={"centre": False})
    state = RunState(descent=descent(chosen), cohort=("Ulm",))
    one = SumOfUpdates(plan=chosen, job="j", state=state, watch=lambda state: None, site_of=lambda node: "Ulm")
    one.aggregate_train(1, messages(reply(gradient_update(1.0), site="Bonn", units=9)))
    assert (state.declared, state.records[0].sites) == ({"Ulm": 9}, ("Ulm",))


def test_too_few_replies_stop_the_run_and_leave_the_model() -> None:
    one = strategy(min_sites=2)
    refusal = RoundReply(site="b", job="j", round=1, refusal=RefusalCode.POLICY)
    with pytest.raises(RunError, match="b: policy"):
        one.aggregate_train(1, messages(reply(gradient_update(1.0)), refusal))
    assert not one.state.descent.weight.any()
    assert isinstance(one.state.descent.adapter, Adapter)


def centring(means: dict[str, list[float]], **sections: Any) -> SumOfUpdates:
    """A run after its centring round, of sites of 2000 units."""
    chosen = plan(cohort={"min_sites": len(means), **sections}, privacy={"target_epsilon": 8.0})
    one = SumOfUpdates(plan=chosen, job="j", state=RunState(descent=descent(chosen)), watch=lambda state: None)
    sent = (reply(centre_update(mean, 2000), site=site, round=0) for site, mean in means.items())
    one.aggregate_train(1, messages(*sent))
    return one


@pytest.mark.parametrize("aggregation", ["sum", "median", "krum"])
def test_a_site_that_is_unlike_the_others_is_seen_in_the_centring_round(aggregation: str) -> None:
    """Also where updates are aggregated by another rule; the next rounds leave it as it is."""
    near = {site: [0.9, 0.0, 0.0] for site in "abc"}
    one = centring({**near, "odd": [0.0, 0.9, 0.0]}, aggregation=aggregation)
    distances = {name: found.distance.value for name, found in one.state.mismatch.items()}
    near_ones = dict.fromkeys("abc", 0.3 * 2**0.5)
    assert distances == pytest.approx({**near_ones, "odd": 0.9 * 2**0.5}, rel=0.05)
    alike = centring(near, aggregation=aggregation).state.mismatch
    assert {found.verdict.value for found in alike.values()} == {"alike"}
    before = dict(one.state.mismatch)
    one.aggregate_train(2, messages(*(reply(gradient_update(1.0), site=site) for site in ("a", "b", "c", "odd"))))
    assert one.state.mismatch == before
    told = build_run_report(one.plan, one.job, one.state, {})["mismatch"]
    assert [(each["name"], each["verdict"]) for each in told["per_site"]] == [
        (name, "apart") for name in ("a", "b", "c", "odd")
    ]


def test_kinds_are_asked_in_the_plans_order() -> None:
    kinds = [release.kind for release in schedule(plan(training={"rounds": 2}, evaluation={}))]
    assert kinds == [ReleaseKind.CENTRE, ReleaseKind.GRADIENT, ReleaseKind.GRADIENT, ReleaseKind.EVALUATION]


def evaluating(**cohort: Any) -> SumOfUpdates:
    """A run whose next round is its evaluation."""
    chosen = plan(
        cohort={"min_sites": 3, "nominal_units": 10, **cohort},
        training={"centre": False, "rounds": 1},
        evaluation={"holdout": 0.3},
    )
    one = SumOfUpdates(plan=chosen, job="j", state=RunState(descent=descent(chosen)), watch=lambda state: None)
    one.aggregate_train(1, messages(*(reply(gradient_update(1.0), site=site) for site in "abc")))
    return one


def evaluation_update(*counts: float) -> Update:
    points = np.rint(np.array(counts) / spacing(EVALUATION_NORM)).astype(np.int64)
    return Update(points={EVALUATION: points}, spacing=spacing(EVALUATION_NORM)).narrowed(32)


@pytest.mark.parametrize("aggregation", ["sum", "median"])
def test_an_evaluation_is_the_sum_of_the_sites_and_moves_nothing(aggregation: str) -> None:
    """Also where updates are aggregated by another rule, which would leave the largest site's units out, and where a
    site's numbers need a coarser lattice to fit."""
    one = evaluating(aggregation=aggregation)
    before, units = one.state.descent.adapter.to_bytes(), one.state.descent.units
    sent = {site: (8.0 * size, 9.0, 1.0, 2.0, 8.5, 1.5, 4.0) for site, size in (("a", 1), ("b", 2), ("c", 4000))}
    replies = [reply(evaluation_update(*counts), site=site, round=2) for site, counts in sent.items()]
    one.aggregate_train(2, messages(*replies))
    assert (one.state.descent.adapter.to_bytes(), one.state.descent.units) == (before, units)
    kept = np.array([one.state.evaluation[site] for site in "abc"]) * spacing(EVALUATION_NORM)
    np.testing.assert_allclose(kept, list(sent.values()), atol=2e-5)
    assert one.state.records[-1].kind is ReleaseKind.EVALUATION
    report = build_run_report(one.plan, one.job, one.state, {})
    exact = quality(np.sum(list(sent.values()), axis=0), 1.0, ["a", "b"])
    assert report["evaluation"]["count"]["value"] == pytest.approx(exact.count.value, rel=1e-4)
    assert [one["name"] for one in report["evaluation"]["per_site"]] == ["a", "b", "c"]


def test_an_evaluation_of_another_form_is_refused_and_one_with_too_few_stops_the_run() -> None:
    one = evaluating()
    fitting = reply(evaluation_update(*[1.0] * 7), site="a", round=2)
    for wrong in (gradient_update(1.0), evaluation_update(*[1.0] * 6), evaluation_update(*[1e8] * 7)):
        with pytest.raises(RunError, match="node 7: malformed"):
            one.aggregate_train(2, messages(fitting, fitting, reply(wrong, site="b", round=2)))
    assert one.state.evaluation == {}
