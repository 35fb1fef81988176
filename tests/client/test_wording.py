# SPDX-License-Identifier: Apache-2.0
"""Tests of `veil.client.wording`: what the operator reads is computed here, and the network's words stay words."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from veil.client.ledger import Entry
from veil.client.policy import Limits
from veil.client.review import affordable
from veil.client.site_file import SiteFile, parse_site
from veil.client.wording import REFUSALS, Price, describe_plan, price
from veil.common.errors import RefusalCode, RefusalError
from veil.common.plan import RunPlan
from veil.common.plan_sections import Evaluation
from veil.common.privacy import spent
from veil.common.schedule import schedule

SHA256 = "abcdef012345" + "0" * 52
MakePlan = Callable[..., RunPlan]


def limits(**change: Any) -> Limits:
    return Limits(**{"epsilon_per_run": 8.0, "epsilon_lifetime": 8.0, **change})


def site(limits: dict[str, Any] | None = None, **data: Any) -> SiteFile:
    columns = {"table": "reports.csv", "features": ["a", "b"], "label": "ill", "labels": {"1": "yes"}, **data}
    document = {
        "name": "Ulm",
        "data": {key: value for key, value in columns.items() if value is not None},
        "limits": {"epsilon_per_run": 8.0, "epsilon_lifetime": 8.0, **(limits or {})},
        "coordinator": {"url": "https://veil.example", "ca": "ca.pem"},
    }
    return parse_site(document, Path("/srv/veil/site.toml"))


TEXT: dict[str, Any] = {"features": None, "text": "body"}


def text_plan(backbone: dict[str, Any] | None = None, **change: Any) -> RunPlan:
    document = {
        "name": "adverse events",
        "task": {"kind": "text-classification", "labels": ["no", "yes"]},
        "backbone": {"source": "package:small/model", "sha256": SHA256, "licence": "MIT", **(backbone or {})},
        "training": {"rounds": 3},
        "privacy": {"target_epsilon": 3.0},
        **change,
    }
    return RunPlan.model_validate(document)


def done(plan: RunPlan, job: str, rounds: int | None = None) -> list[Entry]:
    """Ledger lines of a run's first rounds."""
    return [
        Entry(job=job, round=one.round, mechanism=one.mechanism, noise="os", plan=plan.sha256)
        for one in schedule(plan)[:rounds]
    ]


def said(plan: RunPlan, site_file: SiteFile, entries: list[Entry] | None = None, **more: Any) -> str:
    return "\n".join(describe_plan(plan, "job 7", site_file, entries or [], **more))


def test_a_new_run_costs_what_its_schedule_costs(make_plan: MakePlan) -> None:
    plan = make_plan()
    cost = price(plan, "job", limits(), [])
    exact = spent([one.mechanism for one in schedule(plan)], 1e-5).epsilon
    assert (cost.run, cost.before, cost.after) == (exact, 0.0, exact)
    assert cost.run <= plan.privacy.target_epsilon


def test_rounds_already_spent_are_not_charged_twice(make_plan: MakePlan) -> None:
    plan = make_plan()
    new = price(plan, "job", limits(), [])
    for rounds in range(1, 5):
        halfway = price(plan, "job", limits(), done(plan, "job", rounds))
        assert halfway.run == pytest.approx(new.run)
        assert halfway.after == pytest.approx(new.after)
        assert 0 < halfway.before <= halfway.after * (1 + 1e-9)


def test_other_runs_count_for_ever_but_not_for_this_run(make_plan: MakePlan) -> None:
    plan, other = make_plan(), make_plan(target_epsilon=2.0)
    before = done(other, "other")
    cost = price(plan, "job", limits(), before)
    assert cost.run == pytest.approx(price(plan, "job", limits(), []).run)
    assert cost.before == pytest.approx(spent([one.mechanism for one in before], 1e-5).epsilon)
    assert cost.after > max(cost.run, cost.before)


def test_noise_that_is_not_private_costs_everything(make_plan: MakePlan) -> None:
    plan = make_plan()
    line = Entry(job="x", round=0, mechanism=schedule(plan)[0].mechanism, noise="fixed", plan=plan.sha256)
    cost = price(plan, "job", limits(), [line])
    assert math.isinf(cost.before)
    assert not cost.affordable
    assert "passes a limit" in said(plan, site(), [line])


@pytest.mark.parametrize(
    ("per_run", "lifetime", "spent_before"),
    [(8.0, 8.0, False), (2.0, 8.0, False), (8.0, 2.0, False), (3.0, 3.0, False), (8.0, 3.1, True), (3.0, 8.0, True)],
)
def test_the_price_says_what_the_review_decides(
    per_run: float, lifetime: float, spent_before: bool, make_plan: MakePlan
) -> None:
    plan = make_plan()
    given = limits(epsilon_per_run=per_run, epsilon_lifetime=lifetime)
    entries = done(make_plan(target_epsilon=2.0), "other") if spent_before else []
    try:
        affordable(plan, "job", schedule(plan), given, noise="os")(entries)
        allowed = True
    except RefusalError as error:
        assert error.code is RefusalCode.BUDGET
        allowed = False
    assert price(plan, "job", given, entries).affordable is allowed


def test_a_limit_that_is_just_reached_is_not_passed() -> None:
    given = limits(epsilon_per_run=1.0, epsilon_lifetime=2.0)
    assert Price(run=1.0, before=1.0, after=2.0, limits=given).affordable
    assert not Price(run=1.0 + 1e-9, before=1.0, after=2.0, limits=given).affordable
    assert not Price(run=1.0, before=1.0, after=2.0 + 1e-9, limits=given).affordable


def test_a_run_of_numbers_in_plain_words(make_plan: MakePlan) -> None:
    words = said(make_plan(), site(labels={"1": "yes", "0": "no"}))
    assert 'Run "client", job job 7: tabular-classification into no, yes, maybe.' in words
    assert "no pretrained model" in words
    assert "from reports.csv: numbers from a, b; label from ill (1 → yes, 0 → no)." in words
    assert "Rounds: 3 and a centring round, each with at least 2 sites." in words
    assert "cannot be done" not in words
    assert "passes a limit" not in words


def test_what_leaves_is_counted(make_plan: MakePlan) -> None:
    """Two features: 1 × 3 numbers once, then 3 classes × 3 numbers three times."""
    words = said(make_plan(), site())
    assert "Leaves this site: 4 releases" in words
    assert "1 × the mean of the features with a count (centre) of 3 numbers" in words
    assert "3 × a sum of gradients (head.weight) of 9 numbers" in words
    assert "30 numbers in all" in words
    assert "No record, count, loss or error text." in words


def test_an_evaluation_is_told_with_what_it_holds_out(make_plan: MakePlan) -> None:
    plan = make_plan().model_copy(update={"evaluation": Evaluation(holdout=0.25)})
    words = said(plan, site())
    assert "Leaves this site: 5 releases" in words
    assert "1 × how often the model is right, by class, and its loss (evaluation) of 9 numbers" in words
    assert "39 numbers in all" in words
    assert "No record, exact count, exact loss or error text." in words
    assert "Held out at this site: 25% of the units never train" in words
    assert "Held out" not in said(make_plan(), site())


def test_local_steps_are_called_changes_of_weights(make_plan: MakePlan) -> None:
    words = said(make_plan(training={"algorithm": "dp-fedavg", "rounds": 2, "sample_rate": 1.0}), site())
    assert "2 × a change of weights (head.weight) of 9 numbers" in words


def test_one_message_is_called_what_it_is(make_plan: MakePlan) -> None:
    """Two features: 3 products, then 3 classes × 3 numbers."""
    words = said(make_plan(training={"algorithm": "one-shot", "rounds": 1}), site())
    assert "Leaves this site: 1 releases: 1 × sums of the features' products and of the features by class" in words
    assert "with counts (statistics) of 12 numbers, 12 numbers in all" in words
    assert "Rounds: 1, each with" in words
    one_shot = RunPlan.model_validate({**json.loads(text_plan().to_json()), "training": {"algorithm": "one-shot"}})
    assert "of features × (features + 1) / 2 + 2 × (features + 1) numbers" in said(one_shot, site(**TEXT))


def test_without_a_known_width_sizes_are_formulas() -> None:
    words = said(text_plan(), site(**TEXT))
    assert "of 2 × (features + 1) numbers" in words
    assert "in all" not in words
    assert "of 770 numbers" in said(text_plan(), site(**TEXT), width=384)


def test_a_number_of_units_is_named_only_where_it_leaves(make_plan: MakePlan) -> None:
    assert "your number of units" not in said(make_plan(), site())
    assert "your number of units (release_counts = true)" in said(make_plan(), site({"release_counts": True}))


def test_the_price_is_told_beside_the_limits(make_plan: MakePlan) -> None:
    plan = make_plan()
    cost = price(plan, "job 7", limits(), [])
    words = said(plan, site({"delta": 1e-5}))
    assert f"Price at δ = 1e-05: ε {cost.run:.4g} for this run (your limit 8)." in words
    assert f"Everything so far ε 0; after this run ε {cost.after:.4g} (your limit 8 for ever)." in words
    assert "the agent refuses it" in said(plan, site({"epsilon_per_run": 1.0}))


def test_whom_the_promise_protects_is_told(make_plan: MakePlan) -> None:
    assert "each single record" in said(make_plan(), site())
    words = said(make_plan(unit="patient", max_records_per_patient=4), site(patient="mrn"))
    assert "each patient as a whole (at most 4 records of one take part)" in words
    assert "patient from mrn" in words


@pytest.mark.parametrize(
    ("licence", "licences", "words"),
    [
        ("MIT", [], "licence MIT)"),
        ("", [], "licence not named)"),
        ("MIT", ["MIT"], "licence MIT, on your list)"),
        ("GPL-3.0", ["MIT"], "licence GPL-3.0, NOT on your list)"),
        ("", ["MIT"], "licence not named, NOT on your list)"),
    ],
)
def test_weights_are_named_with_hash_and_licence(licence: str, licences: list[str], words: str) -> None:
    text = said(text_plan({"licence": licence}), site({"licences": licences}, **TEXT))
    assert "package:small/model (SHA-256 abcdef012345…" in text
    assert words in text


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (TEXT, "text from body"),
        ({"features": None, "text_template": "{age} years"}, "text from {age} years"),
        ({"features": None, "image": "path"}, "images from path"),
        ({"features": None, "audio": "path"}, "sounds from path"),
    ],
)
def test_the_columns_that_are_read_are_named(data: dict[str, Any], words: str, make_plan: MakePlan) -> None:
    assert words in said(make_plan(), site(**data))


@pytest.mark.parametrize(
    ("data", "width", "words"),
    [
        (TEXT, None, "the run needs tabular-classification, and [data] names text columns"),
        ({"labels": {"1": "ja", "0": "no"}}, None, "[data.labels] names ja, which the run does not know"),
        ({}, 3, "the run needs 3 numeric columns, and [data] names 2"),
    ],
)
def test_a_run_that_cannot_be_done_says_so(
    data: dict[str, Any], width: int | None, words: str, make_plan: MakePlan
) -> None:
    plan = make_plan()
    plan = plan.model_copy(update={"task": plan.task.model_copy(update={"width": width})})
    assert f"This cannot be done: {words}" in said(plan, site(**data))


def test_a_password_in_the_table_s_address_is_not_shown(make_plan: MakePlan) -> None:
    address = "postgresql://u:hush@h/db?password=hush"
    words = said(make_plan(), site(table=address, query="SELECT * FROM t"))
    assert "postgresql://u:***@h/db" in words
    assert "hush" not in words


HOSTILE = [
    "\x1b[2Jgone",
    "a\rb",
    "a\nPrice at δ = 0: ε 0",
    "\x9b31m",
    "\u202egnp.exe",
    "\u2028x",
    "\0",
    "\x07",
    "\u200b",
]


@pytest.mark.parametrize("words", HOSTILE)
def test_words_from_the_network_cannot_paint_the_screen(words: str) -> None:
    plan = text_plan(
        {"source": f"path:x{words}", "licence": words},
        task={"kind": "text-classification", "labels": ["no", f"yes{words}"]},
    )
    lines = describe_plan(plan, f"job{words}", site(**TEXT, labels={"0": "no"}), [])
    assert "".join(lines).isprintable()
    assert len(lines) == len(describe_plan(text_plan(), "job", site(**TEXT, labels={"0": "no"}), []))
    assert "�" in lines[0]


def test_words_without_end_are_cut() -> None:
    lines = describe_plan(text_plan({"source": f"path:{'x' * 50_000}"}), "j" * 50_000, site(**TEXT), [])
    assert max(map(len, lines)) < 1000
    assert "…" in lines[0]


def test_every_refusal_has_words_and_a_remedy() -> None:
    assert set(REFUSALS) == {code.value for code in RefusalCode}
    for words in REFUSALS.values():
        assert words.meaning[-1] != "." != words.remedy[-1]
    assert len({words.meaning for words in REFUSALS.values()}) == len(REFUSALS)
