# SPDX-License-Identifier: Apache-2.0
"""Tests of `veil.client.review` and `policy`: what a site refuses, from plan, policy and ledger alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from veil.client.ledger import Entry, Ledger, total
from veil.client.policy import Limits, SitePolicy
from veil.client.review import affordable, release_of, remaining, review_history, review_plan, review_request
from veil.common.errors import RefusalCode, RefusalError
from veil.common.exchange import RoundRequest
from veil.common.head import CENTRE, WEIGHT
from veil.common.plan import RunPlan
from veil.common.plan_sections import Backbone, Evaluation
from veil.common.privacy import Mechanism, spent
from veil.common.schedule import ReleaseKind, schedule
from veil.common.update import Adapter

MakePlan = Callable[..., RunPlan]
MakeRequest = Callable[..., RoundRequest]


def limits(**change: Any) -> Limits:
    return Limits(**{"epsilon_per_run": 8.0, "epsilon_lifetime": 8.0, **change})


def refused(request: RoundRequest, given: Limits) -> RefusalError:
    with pytest.raises(RefusalError) as caught:
        review_request(request, given)
    return caught.value


@pytest.mark.parametrize(
    ("plan_unit", "site_unit", "allowed"),
    [
        ("record", "record", True),
        ("patient", "patient", True),
        ("record", "patient", False),
        ("patient", "record", False),
    ],
)
def test_a_plan_for_another_unit_is_refused(
    plan_unit: str, site_unit: str, allowed: bool, make_plan: MakePlan, make_request: MakeRequest
) -> None:
    request = make_request(make_plan(unit=plan_unit))
    if allowed:
        review_request(request, limits(unit=site_unit))
    else:
        error = refused(request, limits(unit=site_unit))
        assert error.code is RefusalCode.POLICY
        assert f'privacy.unit = "{plan_unit}"' in str(error)
        assert f'unit = "{site_unit}"' in str(error)


def test_a_larger_delta_is_refused(make_plan: MakePlan, make_request: MakeRequest) -> None:
    request = make_request(make_plan(target_delta=1e-5))
    review_request(request, limits(delta=1e-5))
    review_request(request, limits(delta=1e-4))
    error = refused(request, limits(delta=9.9e-6))
    assert error.code is RefusalCode.POLICY
    assert "privacy.target_delta = 1e-05" in str(error)
    assert "limits.delta = 9.9e-06" in str(error)


def test_more_records_of_a_patient_than_allowed_are_refused(make_plan: MakePlan, make_request: MakeRequest) -> None:
    request = make_request(make_plan(unit="patient", max_records_per_patient=5))
    review_request(request, limits(unit="patient", max_records_per_patient=5))
    error = refused(request, limits(unit="patient", max_records_per_patient=4))
    assert error.code is RefusalCode.POLICY
    assert "privacy.max_records_per_patient = 5" in str(error)


@pytest.mark.parametrize(
    ("weight", "centre"),
    [
        ((2, 7), (6,)),
        ((4, 7), (6,)),
        ((3, 6), (6,)),
        ((3, 7), (7,)),
        ((7,), (6,)),
        ((1, 3, 7), (6,)),
        ((3, 7), (1, 6)),
        ((0, 7), (6,)),
        (None, (6,)),
        ((3, 7), None),
        (None, None),
    ],
)
def test_an_adapter_of_another_shape_than_the_plans_is_refused(
    weight: tuple[int, ...] | None, centre: tuple[int, ...] | None, make_plan: MakePlan, make_request: MakeRequest
) -> None:
    """Before a record is opened: a head without a class's row would fail only where a record has that class."""
    shapes = {WEIGHT: weight, CENTRE: centre}
    tensors = {name: np.zeros(shape, np.float32) for name, shape in shapes.items() if shape is not None}
    request = make_request(make_plan(), 1, adapter=Adapter(tensors=tensors))
    assert refused(request, limits()).code is RefusalCode.MALFORMED


def test_tensors_beyond_the_plans_are_refused(make_plan: MakePlan, make_request: MakeRequest) -> None:
    honest = make_request(make_plan(), 1)
    review_request(honest, limits())
    more = Adapter(tensors={**honest.adapter.tensors, "more": np.zeros(1, np.float32)})
    assert refused(make_request(make_plan(), 1, adapter=more), limits()).code is RefusalCode.MALFORMED


@pytest.mark.parametrize("size", [0.0, 0.999, -5.0, math.inf, -math.inf, math.nan])
def test_a_nominal_size_that_is_none_is_refused(size: float, make_plan: MakePlan, make_request: MakeRequest) -> None:
    assert refused(make_request(make_plan(), nominal_units=size), limits()).code is RefusalCode.MALFORMED


@pytest.mark.parametrize("round_", [0, 1, 3])
def test_the_mechanism_is_the_sites_own(round_: int, make_plan: MakePlan, make_request: MakeRequest) -> None:
    plan = make_plan()
    assert release_of(make_request(plan, round_)) == schedule(plan)[round_]


@pytest.mark.parametrize(
    ("round_", "kind"),
    [(-1, "gradient"), (4, "gradient"), (2**70, "gradient"), (0, "gradient"), (1, "centre"), (1, "delta")],
)
def test_a_round_the_plan_does_not_have_is_refused(
    round_: int, kind: str, make_plan: MakePlan, make_request: MakeRequest
) -> None:
    with pytest.raises(RefusalError) as caught:
        release_of(make_request(make_plan(), round_, kind=ReleaseKind(kind)))
    assert caught.value.code is RefusalCode.MALFORMED


@pytest.mark.parametrize(
    ("round_", "kind"),
    [(0, "evaluation"), (1, "evaluation"), (3, "evaluation"), (4, "gradient"), (4, "centre"), (5, "evaluation")],
)
def test_an_evaluation_has_its_own_round_and_no_other(
    round_: int, kind: str, make_plan: MakePlan, make_request: MakeRequest
) -> None:
    plan = make_plan().model_copy(update={"evaluation": Evaluation()})
    assert release_of(make_request(plan, 4)).kind is ReleaseKind.EVALUATION
    with pytest.raises(RefusalError) as caught:
        release_of(make_request(plan, round_, kind=ReleaseKind(kind)))
    assert caught.value.code is RefusalCode.MALFORMED
    with pytest.raises(RefusalError):
        release_of(make_request(make_plan(), 4, kind=ReleaseKind.EVALUATION))


def entries_of(plan: RunPlan, upto: int, job: str = "job") -> list[Entry]:
    return [
        Entry(job=job, round=one.round, mechanism=one.mechanism, noise="os", plan=plan.sha256)
        for one in schedule(plan)
        if one.round < upto
    ]


def review(request: RoundRequest, given: Limits, *, noise: str = "os") -> Callable[[Sequence[Entry]], None]:
    """The check as a site makes it: this round and all that the plan has after it."""
    left = remaining(request, release_of(request))
    return affordable(request.plan, request.job, left, given, noise=noise)


def verdict(request: RoundRequest, before: list[Entry], given: Limits, noise: str = "os") -> str:
    """Which limit a request would pass, or an empty word."""
    try:
        review(request, given, noise=noise)(before)
    except RefusalError as error:
        assert error.code is RefusalCode.BUDGET
        return "lifetime" if "epsilon_lifetime" in str(error) else "run"
    return ""


@pytest.mark.parametrize("round_", [0, 1, 17, 30])
def test_a_thirty_round_plan_costs_exactly_its_budget_in_every_round(
    round_: int, make_plan: MakePlan, make_request: MakeRequest
) -> None:
    """Everything so far plus everything that is left: the same sum at the start as at the end."""
    plan = make_plan({"rounds": 30})
    request, before = make_request(plan, round_), entries_of(plan, round_)
    assert verdict(request, before, limits(epsilon_per_run=3.0)) == ""
    assert verdict(request, before, limits(epsilon_per_run=2.998)) == "run"
    assert verdict(request, before, limits(epsilon_lifetime=2.998)) == "lifetime"


def test_the_whole_remaining_plan_counts_and_not_the_next_round(make_plan: MakePlan, make_request: MakeRequest) -> None:
    """One round of thirty alone would be affordable; a check of that alone would stop a run in its middle."""
    plan = make_plan({"rounds": 30})
    first = spent([schedule(plan)[0].mechanism], 1e-5).epsilon
    assert first < 1.0
    assert verdict(make_request(plan, 0), [], limits(epsilon_per_run=1.0)) == "run"


def test_one_burned_attempt_too_many_is_refused(make_plan: MakePlan, make_request: MakeRequest) -> None:
    plan = make_plan({"rounds": 30})
    burned = [*entries_of(plan, 5), entries_of(plan, 5)[-1]]
    assert verdict(make_request(plan, 5), burned, limits(epsilon_per_run=3.0)) == "run"
    assert verdict(make_request(plan, 5), burned, limits(epsilon_per_run=3.2)) == ""


def test_a_round_that_was_left_out_costs_nothing(make_plan: MakePlan, make_request: MakeRequest) -> None:
    plan = make_plan({"rounds": 30})
    joined_late = [entry for entry in entries_of(plan, 11) if entry.round in (0, 10)]
    assert verdict(make_request(plan, 11), joined_late, limits(epsilon_per_run=2.7)) == ""


def test_a_second_job_adds_to_the_lifetime_and_not_to_the_run(make_plan: MakePlan, make_request: MakeRequest) -> None:
    plan = make_plan()
    done = entries_of(plan, 99, job="first")
    second = make_request(plan, 0, job="second")
    assert verdict(second, done, limits(epsilon_per_run=3.0, epsilon_lifetime=8.0)) == ""
    assert verdict(second, done, limits(epsilon_per_run=3.0, epsilon_lifetime=3.0)) == "lifetime"
    together = spent([entry.mechanism for entry in done] * 2, 1e-5).epsilon
    assert 3.0 < together < 6.0
    assert verdict(second, done, limits(epsilon_lifetime=together * 1.0001)) == ""
    assert verdict(second, done, limits(epsilon_lifetime=together * 0.9999)) == "lifetime"


def test_a_second_sampled_job_is_projected_with_the_rule_it_will_be_charged_by(
    make_plan: MakePlan, make_request: MakeRequest
) -> None:
    """Two runs of sampled steps: a coordinator may have read the first before it planned the second."""
    plan = make_plan({"algorithm": "dp-fedavg", "sample_rate": 0.2, "rounds": 2})
    done, next_ = entries_of(plan, 99, job="first"), entries_of(plan, 99, job="second")
    fixed = spent([entry.mechanism for entry in (*done, *next_)], 1e-5).epsilon
    charged = total([*done, *next_], 1e-5).epsilon
    assert charged > 1.05 * fixed
    second = make_request(plan, 0, job="second")
    assert verdict(second, done, limits(epsilon_per_run=3.0, epsilon_lifetime=fixed)) == "lifetime"
    assert verdict(second, done, limits(epsilon_per_run=3.0, epsilon_lifetime=charged)) == ""
    grown = [total([*done, *next_[:count]], 1e-5).epsilon for count in range(len(next_) + 1)]
    assert grown == sorted(grown) and grown[0] <= 3.0 and grown[-1] == charged


def test_a_job_keeps_the_plan_it_began_with(make_plan: MakePlan, make_request: MakeRequest) -> None:
    """Mechanisms chosen after earlier answers would not compose as a plan does."""
    before = entries_of(make_plan({"rounds": 30}), 5)
    changed = make_plan({"rounds": 29})
    request = make_request(changed, 5)
    with pytest.raises(RefusalError) as caught:
        review(request, limits())(before)
    assert caught.value.code is RefusalCode.PLAN_CHANGED
    assert verdict(make_request(changed, 5, job="another"), before, limits()) == ""


def test_one_ledger_has_one_unit(make_plan: MakePlan, make_request: MakeRequest) -> None:
    before = entries_of(make_plan(), 2, job="old")
    request = make_request(make_plan(unit="patient"))
    with pytest.raises(RefusalError) as caught:
        review(request, limits(unit="patient"))(before)
    assert caught.value.code is RefusalCode.POLICY


@pytest.mark.parametrize("noise", ["fixed", "none"])
def test_noise_that_is_not_private_is_never_affordable(
    noise: str, make_plan: MakePlan, make_request: MakeRequest
) -> None:
    assert verdict(make_request(make_plan()), [], limits(epsilon_per_run=1e300), noise) == "run"


def test_one_unprivate_line_ends_the_lifetime(make_plan: MakePlan, make_request: MakeRequest) -> None:
    mechanism = Mechanism(noise_multiplier=100.0, max_grad_norm=1.0)
    spoiled = [Entry(job="old", round=0, mechanism=mechanism, noise="fixed", plan="")]
    assert verdict(make_request(make_plan()), spoiled, limits(epsilon_lifetime=1e300)) == "lifetime"


def test_the_sites_delta_counts_and_not_the_plans(make_plan: MakePlan, make_request: MakeRequest) -> None:
    """At a larger δ the same releases have a smaller ε."""
    request = make_request(make_plan(target_delta=1e-6))
    assert verdict(request, [], limits(epsilon_per_run=2.9, delta=1e-6)) == "run"
    assert verdict(request, [], limits(epsilon_per_run=2.9, delta=1e-5)) == ""


def test_a_refusal_says_value_limit_and_remedy(make_plan: MakePlan, make_request: MakeRequest) -> None:
    request = make_request(make_plan())
    with pytest.raises(RefusalError) as caught:
        review(request, limits(epsilon_per_run=1.5))([])
    text = str(caught.value)
    assert "would reach epsilon 3 " in text
    assert "limits.epsilon_per_run = 1.5" in text
    assert "smaller target_epsilon" in text


@pytest.mark.parametrize(
    ("licences", "allowed"), [((), True), (("MIT", "Apache-2.0"), True), (("MIT",), False)], ids=["any", "on", "off"]
)
def test_weights_under_a_licence_that_is_not_on_the_list_are_refused(
    licences: tuple[str, ...], allowed: bool, make_plan: MakePlan
) -> None:
    backbone = Backbone(source="package:model", sha256="0" * 64, licence="Apache-2.0")
    plan = make_plan().model_copy(update={"backbone": backbone})
    if allowed:
        review_plan(plan, limits(licences=licences))
    else:
        with pytest.raises(RefusalError, match=r'licence = "Apache-2.0".*limits.licences = MIT') as caught:
            review_plan(plan, limits(licences=licences))
        assert caught.value.code is RefusalCode.POLICY


def test_a_line_that_the_coordinator_saw_must_be_in_the_ledger(
    make_plan: MakePlan, make_request: MakeRequest, open_ledger: Callable[..., Ledger]
) -> None:
    """Otherwise this is an older copy, whatever the anchor says."""
    ledger = open_ledger()
    review_history(make_request(make_plan()), ledger)
    review_history(make_request(make_plan(), witness=ledger.head()), ledger)
    with pytest.raises(RefusalError, match="the coordinator saw ledger line 777777777777") as caught:
        review_history(make_request(make_plan(), witness="7" * 64), ledger)
    assert caught.value.code is RefusalCode.LEDGER


def test_what_is_left_of_a_plan_begins_with_the_round_itself(make_plan: MakePlan, make_request: MakeRequest) -> None:
    request = make_request(make_plan(), 2)
    assert remaining(request, release_of(request)) == schedule(request.plan)[2:]


@pytest.mark.parametrize("name", ["epsilon_per_run", "epsilon_lifetime", "delta"])
@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, math.nan])
def test_a_limit_is_positive_and_finite(name: str, value: float) -> None:
    with pytest.raises(ValidationError):
        limits(**{name: value})


def test_an_unknown_or_missing_limit_is_an_error() -> None:
    with pytest.raises(ValidationError):
        limits(epsilon=3.0)
    with pytest.raises(ValidationError):
        Limits(epsilon_per_run=3.0)  # type: ignore[call-arg]
    with pytest.raises(ValidationError):
        SitePolicy(name="", limits=limits())
