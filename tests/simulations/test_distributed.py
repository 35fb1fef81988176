# SPDX-License-Identifier: Apache-2.0
"""Runs with distributed noise, whole: as good as they say, over drop-outs and poison, with a certificate that holds."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from veil.client import cohort, release
from veil.client import site as client_site
from veil.client.app import client_app
from veil.client.examples import Examples
from veil.client.site import Site
from veil.common.certificate import RoundSites, assemble
from veil.common.errors import RefusalCode, RefusalError, RunError
from veil.common.exchange import RoundRequest
from veil.common.head import WEIGHT, initial_adapter
from veil.common.keys import NodeKey
from veil.common.masking import Member
from veil.common.plan import RunPlan
from veil.common.privacy import gaussian_sigma
from veil.common.schedule import ReleaseKind, schedule
from veil.common.statement import Cost, SignedStatement, Statement
from veil.common.update import MaskedUpdate, Update
from veil.common.verdict import judge_certificate
from veil.server.app import Outcome, server_app
from veil.server.descent import Descent, steps_of
from veil.server.state import ALL_SITES, RunState
from veil.server.validation import check_sum
from veil.simulations.engine import run_apps
from veil.simulations.engines import Engine
from veil.simulations.partition import Share
from veil.simulations.workspace import Workspace, close_workspaces

SITES, UNITS, WIDTH = 5, 60, 8


def plan(**sections: dict[str, object]) -> RunPlan:
    document: dict[str, dict[str, object]] = {
        "task": {"kind": "tabular-classification", "labels": ["well", "ill"]},
        "training": {"rounds": 6},
        "privacy": {"target_epsilon": 8.0, "noise": "distributed"},
        "cohort": {"min_sites": 3},
        "simulation": {"path": "given", "features": ["x"], "label": "y", "sites": SITES},
    }
    for name, change in sections.items():
        document[name] = {**document.get(name, {}), **change}
    return RunPlan.model_validate({"name": "shared", **document})


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Callable[..., Outcome]]:
    """Run a plan over five sites, of sixty records or divided otherwise; the class is the sign of the first feature."""
    random = np.random.default_rng(0)
    features = random.normal(size=(SITES * UNITS, WIDTH))
    examples = Examples(
        inputs=features,
        labels=(features[:, 0] > 0).astype(np.int64),
        units=np.arange(SITES * UNITS).astype(np.str_),
    )
    shares = tuple(
        Share(site=f"s{index}", train=np.arange(index * UNITS, (index + 1) * UNITS), test=np.zeros(0, np.int64))
        for index in range(SITES)
    )

    def go(
        chosen: RunPlan,
        watch: Callable[[RunState], None] = lambda state: None,
        folder: str = "sites",
        ends: Sequence[int] = (),
    ) -> Outcome:
        order = np.argsort(features[:, 1]) if ends else np.arange(SITES * UNITS)
        divided = tuple(
            Share(site=f"s{index}", train=np.sort(rows), test=np.zeros(0, np.int64))
            for index, rows in enumerate(np.split(order, ends))
        )
        workspace = Workspace.create(tmp_path / folder, chosen, features, examples, divided if ends else shares)
        outcomes: list[Outcome] = []
        state = RunState.start(chosen.public(), initial_adapter(chosen, WIDTH), SITES)
        server = server_app(chosen.public(), job="job", state=state, watch=watch, deliver=outcomes.append)
        run_apps(Engine.INPROCESS, server, client_app(workspace), SITES, threads=1, begin=lambda _: None)
        return outcomes[0]

    yield go
    close_workspaces()


Run = Callable[..., Outcome]


def findings(chosen: RunPlan, outcome: Outcome, statements: Mapping[str, SignedStatement]) -> str:
    """What is wrong with a run's certificate of these statements."""
    made = assemble(
        chosen.public(),
        "job",
        rounds=[RoundSites(round=one.round, kind=one.kind.value, sites=one.sites) for one in outcome.records],
        statements=statements,
        missing={},
        adapter_sha256="3" * 64,
        created="2030-01-01T00:00:00+00:00",
        veil_version="1",
        simulation=True,
        key=NodeKey.generate(),
    )
    return "; ".join(str(one) for one in judge_certificate(made, {}).findings)


def absent(monkeypatch: pytest.MonkeyPatch, site: str, *rounds: int) -> None:
    """A site that refuses some rounds."""
    ours = Site._release

    def release(self: Site, request: RoundRequest) -> Update | MaskedUpdate:
        if self.policy.name == site and request.round in rounds:
            raise RefusalError(RefusalCode.APPROVAL, "a round", "the operator's word", "none")
        return ours(self, request)

    monkeypatch.setattr(Site, "_release", release)


def test_a_sampled_run_learns_and_its_certificate_holds(run: Run, tmp_path: Path) -> None:
    """Each site draws its own sample; bare, its noise counts as what it is, with the sample still secret."""
    chosen = plan(training={"rounds": 12, "sample_rate": 0.5})
    outcome = run(chosen)
    assert outcome.adapter.tensors[WEIGHT][1, 0] > outcome.adapter.tensors[WEIGHT][0, 0]
    said = Statement.from_text(outcome.evidence.statements["s1"].text)
    sampled = [one for one in said.releases if one.kind == ReleaseKind.GRADIENT.value]
    assert [one.mechanism.sample_rate for one in sampled] == [0.5]
    assert sampled[0].shared is not None and sampled[0].shared.sites == SITES
    assert said.this_run_alone is not None
    assert (said.this_run_alone.epsilon or 0) > (said.this_run.epsilon or math.inf)
    assert findings(chosen, outcome, outcome.evidence.statements) == ""


def test_it_learns_and_its_evaluation_is_of_the_sum(run: Run) -> None:
    states: list[RunState] = []
    outcome = run(plan(evaluation={"holdout": 0.3}), states.append)
    weight = outcome.adapter.tensors[WEIGHT]
    moved = weight[1] - weight[0]
    assert np.abs(moved[0]) > 2 * np.abs(moved[1:]).max()
    assert set(outcome.evaluation) == {ALL_SITES} and set(outcome.evidence.statements) == {f"s{i}" for i in range(5)}
    assert 160 < outcome.estimated_units < 260, "210 train"


def test_a_site_that_drops_out_costs_one_attempt_and_is_left_out(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    absent(monkeypatch, "s2", 3)
    outcome = run(plan())
    records = {record.round: record for record in outcome.records}
    assert [records[r].attempts for r in range(7)] == [1, 1, 1, 2, 1, 1, 1]
    assert records[3].refusals == {"s2": "approval"}
    assert "s2" in records[2].sites and all("s2" not in records[r].sites for r in range(3, 7))
    statement = json.loads(outcome.evidence.statements["s1"].text)
    counted = [(one["first"], one["last"], one["count"], one["shared"]["sites"]) for one in statement["releases"]]
    assert counted == [(0, 0, 1, 5), (1, 3, 3, 5), (3, 6, 4, 4)]
    assert statement["this_run"]["epsilon"] <= 8.0 < statement["this_run_alone"]["epsilon"]


def test_more_drop_outs_than_the_plan_spares_end_the_run(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    absent(monkeypatch, "s2", 3)
    with pytest.raises(RunError, match=r"cohort\.retries = 0"):
        run(plan(cohort={"retries": 0}))


def test_a_cohort_below_the_floor_ends_the_run(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    absent(monkeypatch, "s2", 3)
    with pytest.raises(RunError, match="4 usable replies"):
        run(plan(cohort={"min_sites": 5}))


def test_poison_behind_a_mask_is_found_in_the_sum_and_does_not_touch_the_model(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One site sends a thousand times what its records could give; the round is the first to train."""
    ours, states = release.draw, []

    def draw(request: RoundRequest, *rest: object) -> Update:
        update = ours(request, *rest)  # type: ignore[arg-type]  # as they came
        if request.round != 2:
            return update
        return replace(update, points={name: p + (np.int64(1) << 36) for name, p in update.points.items()})

    monkeypatch.setattr(client_site, "draw", draw)
    with pytest.raises(RunError, match="masked sum of round 2 has length"):
        run(plan(), lambda state: states.append(state.descent.weight.copy()))
    assert len(states) == 2, "the last state is the one before the poisoned round"


def test_the_bound_of_a_sum_passes_honest_sites_and_not_twice_as_long_a_sum() -> None:
    chosen = plan()
    release = next(one for one in schedule(chosen) if one.kind is ReleaseKind.GRADIENT)
    state = Descent.start(chosen, initial_adapter(chosen, WIDTH), SITES)
    shares = chosen.cohort.colluding(SITES)
    from veil.common.privacy import NoiseShares

    split = NoiseShares(sites=SITES, colluding=shares)
    noise = release.mechanism.noise_multiplier * np.sqrt(split.excess)
    longest = release.mechanism.max_grad_norm * (300 + noise * (np.sqrt(2 * (WIDTH + 1)) + 6))
    for factor, passes in ((0.99, True), (2.0, False)):
        points = np.zeros((2, WIDTH + 1), np.int64)
        points[0, 0] = int(factor * longest / release.spacing)
        total = Update(points={WEIGHT: points}, spacing=release.spacing)
        if passes:
            check_sum(total, release, state, split, units=300.0)
        else:
            with pytest.raises(RunError, match="length"):
                check_sum(total, release, state, split, units=300.0)


def test_the_rate_rule_counts_on_the_honest_noise() -> None:
    """√h more rate than with local noise, where no cap is in the way."""
    rates = []
    for noise in ("local", "distributed"):
        chosen = plan(privacy={"target_epsilon": 0.05, "noise": noise}, training={"rounds": 30})
        state = Descent.start(chosen, initial_adapter(chosen, WIDTH), SITES)
        state.units = 300.0
        rates.append(steps_of(chosen, state, 1).rate)
    assert rates[1] == pytest.approx(rates[0] * np.sqrt(SITES - 1)) and rates[1] < 32


def test_the_noise_is_sized_for_rounds_to_spare() -> None:
    local, shared = plan(privacy={"noise": "local"}), plan()
    sigmas = [schedule(one)[1].mechanism.noise_multiplier for one in (local, shared)]
    assert sigmas[1] / sigmas[0] == pytest.approx(np.sqrt(8 / 6), rel=1e-3)
    assert gaussian_sigma(local.privacy.budget) < sigmas[0]


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"training": {"algorithm": "dp-fedavg"}}, "masked sums are of dp-fedsgd"),
        ({"cohort": {"aggregation": "median"}}, "nobody sees single updates"),
        ({"wire": {"update_bits": 8}}, "leave it at 32"),
        ({"cohort": {"min_sites": 1}}, "hides nothing"),
        ({"cohort": {"colluding_sites": 3}}, "somebody must be honest"),
    ],
)
def test_what_a_masked_sum_cannot_do_is_refused_in_the_plan(sections: dict[str, dict[str, object]], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        plan(**sections)


def test_a_site_that_would_refuse_the_cohort_is_left_out_before_anything_is_charged(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """s2 knows everybody but s4: it takes no part, and no round is lost for it."""
    ours = cohort._faults

    def faults(members: tuple[Member, ...], peers: dict[str, str], own: str) -> Iterator[str]:
        return ours(members, {name: pin for name, pin in peers.items() if (own, name) != ("s2", "s4")}, own)

    monkeypatch.setattr(cohort, "_faults", faults)
    outcome = run(plan())
    assert all(record.attempts == 1 and record.sites == ("s0", "s1", "s3", "s4") for record in outcome.records)
    monkeypatch.undo()
    cohort._strangers.cache_clear()


def test_a_certificate_holds_and_a_statement_that_misstates_the_sharing_does_not(run: Run, tmp_path: Path) -> None:
    chosen = plan()
    outcome = run(chosen)
    key = NodeKey.load(tmp_path / "sites" / "sites.key")
    honest = Statement.from_text(outcome.evidence.statements["s1"].text)

    def found(said: Statement) -> str:
        return findings(chosen, outcome, {**outcome.evidence.statements, "s1": SignedStatement.sign(said, key)})

    def shared(**change: int) -> dict[str, Any]:
        def one(listed: Any) -> Any:
            return listed.model_copy(update={"shared": listed.shared.model_copy(update=change) if change else None})

        ledger = [
            run.model_copy(update={"mechanisms": tuple(map(one, run.mechanisms))}) if run.this_run else run
            for run in honest.ledger
        ]
        return {"releases": tuple(map(one, honest.releases)), "ledger": tuple(ledger)}

    assert found(honest) == ""
    less = Cost(epsilon=honest.this_run.epsilon, by_accountant={})
    for change, words in (
        (shared(colluding=0), "was not shared as the plan says"),
        (shared(), "was not shared as the plan says"),
        (shared(sites=4), "in a sum of its 5 sites"),
        ({"this_run_alone": less}, "this_run_alone: epsilon"),
        ({"lifetime_alone": None}, "lifetime_alone: stated with and only with masked sums"),
    ):
        assert words in found(honest.model_copy(update=change)), words


@pytest.mark.parametrize("noise", ["local", "distributed"])
def test_without_its_noise_a_run_does_not_see_how_records_are_divided(run: Run, noise: str) -> None:
    """Five equal sites, and five of 10 to 200 records each, one end of a feature to the other: the same adapter."""
    chosen = plan(privacy={"noise": noise}, simulation={"noise": "none"}, cohort={"nominal_units": UNITS})
    evenly, otherwise = run(chosen), run(chosen, folder="others", ends=(200, 250, 270, 290))
    for name, tensor in evenly.adapter.tensors.items():
        assert np.abs(tensor).max() > 0.01
        assert np.allclose(tensor, otherwise.adapter.tensors[name], atol=1e-5)
