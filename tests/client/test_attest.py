# SPDX-License-Identifier: Apache-2.0
"""Tests of `veil.client.attest`: a statement says what the ledger says, and nothing that a record could change."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import veil
from veil.client.attest import code_sha256, read_audit
from veil.client.ledger import Ledger
from veil.client.site import Site
from veil.client.units import Units
from veil.common.errors import RefusalCode
from veil.common.exchange import Offer, RoundRequest, StatementReply
from veil.common.keys import NodeKey
from veil.common.noise import OSNoise
from veil.common.plan import RunPlan
from veil.common.privacy import spent, spent_over_runs
from veil.common.schedule import schedule
from veil.common.statement import Statement
from veil.simulations.unprivate_noise import FixedNoise

MakePlan = Callable[..., RunPlan]
MakeRequest = Callable[..., RoundRequest]
MakeSite = Callable[..., Site]
DELTA = 1e-5


def run(site: Site, plan: RunPlan, make_request: MakeRequest, job: str = "job") -> None:
    for release in schedule(plan):
        assert site.answer(make_request(plan, release.round, job=job)).refusal is None


def said(reply: StatementReply) -> Statement:
    assert reply.signed is not None and reply.signed.genuine, reply.refusal
    return Statement.from_text(reply.signed.text)


@pytest.fixture
def plan(make_plan: MakePlan) -> RunPlan:
    return make_plan({"rounds": 3}, target_epsilon=2.0)


def test_a_statement_is_signed_with_the_sites_key_and_holds_what_the_plan_did(
    plan: RunPlan, make_request: MakeRequest, make_site: MakeSite, key: NodeKey
) -> None:
    site = make_site()
    run(site, plan, make_request)
    reply = site.attest(Offer(plan=plan, job="job"))
    stated = said(reply)
    assert reply.signed is not None and reply.signed.public_pem == key.public_pem
    assert (stated.site, stated.job, stated.plan_sha256) == ("Ulm", "job", plan.sha256)
    assert (stated.noise, stated.sampler, stated.simulation) == ("os", "full-batch", False)
    assert [(one.kind, one.first, one.last, one.count) for one in stated.releases] == [
        ("centre", 0, 0, 1),
        ("gradient", 1, 3, 3),
    ]
    assert list(stated.mechanisms()) == [release.mechanism for release in schedule(plan)]
    assert stated.this_run.epsilon == spent(stated.mechanisms(), DELTA).epsilon
    assert stated.lifetime == stated.this_run
    assert (stated.ledger_head, stated.ledger_lines) == (site.ledger.head(), 8)
    assert (stated.limits.epsilon_per_run, stated.limits.epsilon_lifetime) == (8.0, 8.0)
    assert stated.code_sha256 == code_sha256() and stated.versions["veil"]


def test_earlier_runs_are_counted_without_their_names(
    plan: RunPlan, make_plan: MakePlan, make_request: MakeRequest, make_site: MakeSite
) -> None:
    site, earlier = make_site(), make_plan({"rounds": 2}, target_epsilon=1.0)
    run(site, earlier, make_request, job="the rival's study")
    run(site, plan, make_request)
    stated = said(site.attest(Offer(plan=plan, job="job")))
    runs = [[release.mechanism for release in schedule(one)] for one in (earlier, plan)]
    assert [one.this_run for one in stated.ledger] == [False, True]
    assert stated.lifetime.epsilon == spent_over_runs(runs, DELTA).epsilon
    assert (stated.this_run.epsilon or 0) < (stated.lifetime.epsilon or 0)
    assert "rival" not in stated.text


def test_a_round_that_is_drawn_again_stands_twice(
    plan: RunPlan, make_request: MakeRequest, make_site: MakeSite, make_units: Callable[..., Units]
) -> None:
    """The first draw of the last round dies after the spend."""
    found, calls = make_units(40), []

    def dies(of: RunPlan) -> Units:
        calls.append(of)
        if len(calls) == len(schedule(plan)):
            raise OSError("the disk is gone")
        return found

    site = make_site(units=dies)
    for round_ in (0, 1, 2, 3, 3):
        site.answer(make_request(plan, round_))
    stated = said(site.attest(Offer(plan=plan, job="job")))
    assert [(one.first, one.last, one.count) for one in stated.releases] == [(0, 0, 1), (1, 3, 4)]
    assert (stated.this_run.epsilon or 0) > spent([one.mechanism for one in schedule(plan)], DELTA).epsilon


def test_a_statement_is_the_same_whatever_the_records_are(
    plan: RunPlan, make_request: MakeRequest, make_units: Callable[..., Units], tmp_path: Path, make_site: MakeSite
) -> None:
    """Two sites with other records, of another number; the ledger's hashes and times are all that differ."""
    texts = []
    for index, count in enumerate((1, 200)):
        found = make_units(count, seed=index)
        site = make_site(units=lambda _, found=found: found)
        job = f"job-{index}"
        ledger = Ledger(tmp_path / f"{index}.sqlite", "Ulm", NodeKey.generate())
        other = Site(**{**{name: getattr(site, name) for name in Site.__slots__}, "ledger": ledger})
        run(other, plan, make_request, job=job)
        stated = said(other.attest(Offer(plan=plan, job=job)))
        ledger.close()
        changing = {"job": "", "ledger_head": "0" * 64, "time": ""}
        texts.append(stated.model_copy(update=changing).text)
    assert texts[0] == texts[1]


def test_noise_that_is_not_private_is_named_and_costs_no_number(
    plan: RunPlan, make_request: MakeRequest, make_site: MakeSite
) -> None:
    site = make_site(noise=lambda request: OSNoise() if request.round else FixedNoise(1, "Ulm", 0))
    request = make_request(plan, 0)
    site.ledger.spend(
        "job", schedule(plan)[0], noise=site.noise(request).name, plan=plan.sha256, review=lambda entries: None
    )
    stated = said(site.attest(Offer(plan=plan, job="job")))
    assert (stated.noise, stated.this_run.epsilon, stated.lifetime.epsilon) == ("fixed", None, None)


def test_a_run_that_the_ledger_does_not_know_gets_no_statement(
    plan: RunPlan, make_plan: MakePlan, make_request: MakeRequest, make_site: MakeSite
) -> None:
    """What a site did for others is told to those it did something for."""
    site = make_site()
    run(site, plan, make_request)
    assert site.attest(Offer(plan=plan, job="another")).refusal is RefusalCode.APPROVAL
    changed = Offer(plan=make_plan({"rounds": 4}), job="job")
    assert site.attest(changed).refusal is RefusalCode.PLAN_CHANGED


def test_a_defect_becomes_a_code(
    plan: RunPlan, make_request: MakeRequest, make_site: MakeSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = make_site()
    run(site, plan, make_request)

    def break_down(*_: object, **__: object) -> None:
        raise ZeroDivisionError("record 17")

    monkeypatch.setattr("veil.client.site.make_statement", break_down)
    assert site.attest(Offer(plan=plan, job="job")) == StatementReply(job="job", refusal=RefusalCode.INTERNAL)


@pytest.mark.parametrize(
    ("content", "record"),
    [
        ('{"epsilon": 1.5, "plan_sha256": "PLAN"}', {"epsilon": 1.5, "plan_sha256": "PLAN"}),
        ('{"epsilon": 1.5, "plan_sha256": "another"}', None),
        ("[1]", None),
        ("{", None),
        ('{"epsilon": NaN, "plan_sha256": "PLAN"}', None),
        ('{"plan_sha256": "PLAN", "x": "' + "y" * 70_000 + '"}', None),
        (None, None),
    ],
)
def test_the_last_audit_is_attached_where_it_is_of_this_plan(
    content: str | None, record: Any, tmp_path: Path, plan: RunPlan, make_request: MakeRequest, make_site: MakeSite
) -> None:
    path = tmp_path / "audit.json"
    if content is not None:
        path.write_text(content.replace("PLAN", plan.sha256), encoding="utf-8")
    record = record and {**record, "plan_sha256": plan.sha256}
    assert read_audit(path, plan.sha256) == record
    site = make_site()
    run(site, plan, make_request)
    audited = Site(**{**{name: getattr(site, name) for name in Site.__slots__}, "audit": path})
    assert said(audited.attest(Offer(plan=plan, job="job"))).audit == record


def test_the_codes_hash_is_what_sha256sum_says_of_the_source_files() -> None:
    listed = 'for root in "$@"; do (cd "$root" && find . -name "*.py" -printf "%P\\n" | xargs sha256sum); done'
    script = f"({listed}) | LC_ALL=C sort -k2 | sha256sum"
    said = subprocess.run(["bash", "-c", script, "_", *veil.__path__], capture_output=True, text=True, check=True)
    code_sha256.cache_clear()
    assert said.stdout.split()[0] == code_sha256()
