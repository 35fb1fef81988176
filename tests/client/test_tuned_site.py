# SPDX-License-Identifier: Apache-2.0
"""Tests of `veil.client.site` and `veil.client.records` for plans that tune more than a head: a model is examined, and
an adapter held against it, before the ledger has a line."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from tests.tiny_models import deep_plan

from veil.client.records import SiteRecords
from veil.client.site import Consent, Site
from veil.client.site_file import SiteFile, parse_site
from veil.client.tuned_units import TunedUnits
from veil.common.errors import RefusalCode
from veil.common.exchange import RoundRequest
from veil.common.head import CENTRE, WEIGHT
from veil.common.lazy_backbone import find_backbone
from veil.common.plan import RunPlan
from veil.common.plan_sections import Backbone, Task
from veil.common.schedule import schedule
from veil.common.trained import GRADIENT, released_size, trained_in, tuned_name
from veil.common.tunable import TunableModel
from veil.common.update import Adapter

SHAPES: dict[str, tuple[int, ...]] = {WEIGHT: (3, 5), CENTRE: (4,), tuned_name(1, "layer.weight"): (2, 2)}
FAKE = Backbone(source="path:m", sha256="a" * 64)
MakeSite = Callable[..., Site]


def zeros(shapes: dict[str, tuple[int, ...]]) -> Adapter:
    return Adapter(tensors={name: np.zeros(shape, np.float32) for name, shape in shapes.items()})


def request_of(plan: RunPlan, adapter: Adapter, round_: int = 1) -> RoundRequest:
    kind = next(one.kind for one in schedule(plan) if one.round == round_)
    return RoundRequest(plan=plan, job="job", round=round_, kind=kind, adapter=adapter, nominal_units=50.0)


def untouchable(plan: RunPlan) -> Any:
    pytest.fail("a refused request must not touch a record")


class TestAdapters:
    """A site whose model has the tensors of `SHAPES`."""

    @pytest.fixture
    def site(self, make_site: MakeSite) -> Site:
        model = cast(TunableModel, SimpleNamespace(shapes=SHAPES))
        return dataclasses.replace(make_site(units=untouchable), model=lambda _: model)

    @pytest.mark.parametrize(
        "change",
        [
            {WEIGHT: (3, 6)},
            {WEIGHT: (2, 5)},
            {CENTRE: (5,)},
            {tuned_name(1, "layer.weight"): (4,)},
            {tuned_name(1, "layer.weight"): None},
            {tuned_name(2, "layer.weight"): (2, 2), tuned_name(1, "layer.weight"): None},
            {tuned_name(2, "other.weight"): (1,)},
        ],
    )
    def test_one_of_other_tensors_is_malformed_and_costs_nothing(
        self, change: dict[str, tuple[int, ...] | None], site: Site
    ) -> None:
        shapes = {name: shape for name, shape in {**SHAPES, **change}.items() if shape is not None}
        plan = deep_plan(FAKE, "bert", {"mode": "last-layers"})
        assert site.answer(request_of(plan, zeros(shapes))).refusal is RefusalCode.MALFORMED
        assert not site.ledger.entries()

    def test_a_head_s_adapter_for_such_a_plan_is_malformed(self, site: Site) -> None:
        plan = deep_plan(FAKE, "bert", {"mode": "last-layers"})
        heads = zeros({WEIGHT: SHAPES[WEIGHT], CENTRE: SHAPES[CENTRE]})
        assert site.answer(request_of(plan, heads)).refusal is RefusalCode.MALFORMED
        assert not site.ledger.entries()

    def test_tuned_tensors_for_a_head_s_plan_are_malformed(self, site: Site) -> None:
        plan = deep_plan(FAKE, "bert", {"mode": "head"})
        assert site.answer(request_of(plan, zeros(SHAPES))).refusal is RefusalCode.MALFORMED
        assert not site.ledger.entries()

    def test_the_right_one_is_paid_for(self, site: Site) -> None:
        """So that the others are refused for what they are."""
        paid = dataclasses.replace(site, units=lambda _: cast(Any, None))
        plan = deep_plan(FAKE, "bert", {"mode": "last-layers"})
        assert paid.answer(request_of(plan, zeros(SHAPES))).refusal is RefusalCode.INTERNAL
        assert len(site.ledger.entries()) == 1


def test_a_site_without_such_models_says_so(make_site: MakeSite) -> None:
    site, plan = make_site(units=untouchable), deep_plan(FAKE, "bert", {"mode": "last-layers"})
    assert site.answer(request_of(plan, zeros(SHAPES))).refusal is RefusalCode.DATA
    assert not site.ledger.entries()


@pytest.mark.parametrize("reason", ["consent", "policy"])
def test_no_model_is_loaded_for_a_run_that_is_not_wanted(reason: str, make_site: MakeSite) -> None:
    """Loading one takes long, and the operator has not agreed."""
    site = make_site(units=untouchable, **({"licences": ["MIT"]} if reason == "policy" else {}))
    if reason == "consent":
        site = dataclasses.replace(site, consent=lambda job, plan: Consent.PENDING)
    plan = deep_plan(FAKE, "bert", {"mode": "last-layers"})
    reply = dataclasses.replace(site, model=untouchable).answer(request_of(plan, zeros(SHAPES)))
    assert reply.refusal is (RefusalCode.APPROVAL if reason == "consent" else RefusalCode.POLICY)
    assert not site.ledger.entries()


def spoilt(network: Any) -> None:
    """Each look at a record differs from the last."""
    query = network.encoder.layer[2].attention.self.query
    query.register_forward_hook(lambda module, inputs, output: output + torch.randn_like(output))


class TestDeployed:
    """A site with a table of texts, a tiny BERT in its store, and a ledger."""

    @pytest.fixture
    def file(self, tmp_path: Path) -> SiteFile:
        rows = ["mild cough,1", "fever,1", "no pain,0", "well,0", "a severe rash,1"]
        (tmp_path / "reports.csv").write_text("\n".join(["body,ill", *rows]) + "\n", encoding="utf-8")
        document = {
            "name": "Ulm",
            "data": {"table": "reports.csv", "text": "body", "label": "ill", "labels": {"1": "yes", "0": "no"}},
            "limits": {"epsilon_per_run": 8.0, "epsilon_lifetime": 8.0},
            "coordinator": {"url": "https://veil.example", "ca": "ca.pem"},
        }
        return parse_site(document, tmp_path / "site.toml")

    @pytest.fixture
    def plan(self, tiny: Callable[[str], Backbone]) -> RunPlan:
        return deep_plan(tiny("bert"), "bert", {"mode": "last-layers"})

    @pytest.fixture
    def open_site(self, file: SiteFile, make_site: MakeSite) -> Callable[..., Site]:
        def make(change: Callable[[Any], None] = lambda network: None) -> Site:
            def find(backbone: Backbone, task: Task) -> Any:
                found = find_backbone(backbone, task, base=Path(), device="cpu")
                another = found.another

                def changed(*args: Any, **named: Any) -> Any:
                    made = another(*args, **named)
                    change(made.parts()[0])
                    return made

                found.another = changed  # type: ignore[method-assign]  # the seam at which a model is spoilt
                return found

            records = SiteRecords(file, find)
            return dataclasses.replace(make_site(), units=records, model=records.model)

        return make

    @pytest.fixture
    def start(self, plan: RunPlan, tuned: Callable[..., Any]) -> Adapter:
        return cast(Adapter, tuned("bert", "last-layers").model.initial())

    def test_a_whole_plan_is_answered_for_its_budget(
        self, plan: RunPlan, start: Adapter, open_site: Callable[..., Site]
    ) -> None:
        site = open_site()
        shapes = {name: one.shape for name, one in start.tensors.items()}
        for release in schedule(plan):
            reply = site.answer(request_of(plan, start, release.round))
            assert reply.update is not None, reply.refusal
            size = released_size(shapes, trained_in(plan, release.round, shapes))
            assert {name: points.shape for name, points in reply.update.points.items()} == {GRADIENT: (size,)}
        assert [one.mechanism for one in site.ledger.entries()] == [one.mechanism for one in schedule(plan)]
        assert 7.9 < site.ledger.spent(1e-5).epsilon <= 8.0

    def test_units_share_the_one_model_and_read_the_table_s_texts(
        self, plan: RunPlan, open_site: Callable[..., Site]
    ) -> None:
        site = open_site()
        units = site.units(plan)
        assert isinstance(units, TunedUnits) and site.model is not None
        assert units.model is site.model(plan)
        assert (units.count, units.total) == (5, 5)
        (first, *_), *_ = units.records(np.ones(5, bool))
        assert (first.key, int(first.target)) == ("mild cough", 1)

    def test_an_unsound_model_costs_nothing_and_no_record_is_read(
        self, plan: RunPlan, start: Adapter, open_site: Callable[..., Site], caplog: pytest.LogCaptureFixture
    ) -> None:
        site = open_site(spoilt)
        reply = dataclasses.replace(site, units=untouchable).answer(request_of(plan, start))
        assert reply.refusal is RefusalCode.INTERNAL
        assert not site.ledger.entries()
        assert "differs from one look at a record to the next" in caplog.text, "the operator's log says why"

    def test_a_mode_that_does_not_fit_costs_nothing(
        self, tiny: Callable[[str], Backbone], start: Adapter, open_site: Callable[..., Site]
    ) -> None:
        site = open_site()
        plan = deep_plan(tiny("bert"), "bert", {"mode": "last-layers", "layers": 4})
        assert site.answer(request_of(plan, start)).refusal is RefusalCode.INTERNAL
        assert not site.ledger.entries()
