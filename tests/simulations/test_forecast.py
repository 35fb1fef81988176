# SPDX-License-Identifier: Apache-2.0
"""`veil plan`: more units and a larger ε never cost more, a hopeless plan is called so, and nonsense is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from veil.client.units import Units
from veil.common.errors import InputError, PlanError, RefusalError
from veil.common.head import WEIGHT
from veil.common.plan import RunPlan
from veil.simulations import forecast as forecasting
from veil.simulations.forecast import Forecast, Outcome, forecast
from veil.simulations.made_up import TEST_RECORDS, MadeUpTask, Sizes
from veil.simulations.trial import MOST_RECORDS, made, train

Veil = Callable[..., tuple[int, str, str]]
SIZES = Sizes(sites=5, units=80, width=20, shares=(0.5, 0.5), expected=0.8)


def plan_at(epsilon: float, noise: str = "local", **cohort: int) -> RunPlan:
    """A plan for numeric features."""
    return RunPlan.model_validate(
        {
            "name": "small",
            "task": {"kind": "tabular-classification", "labels": ["well", "ill"], "width": 20},
            "privacy": {"target_epsilon": epsilon, "noise": noise},
            "cohort": cohort,
        }
    )


@cache
def told(epsilon: float, units: int = 80) -> Forecast:
    """A forecast that several tests look at; no other number of rounds and few sizes are tried."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forecasting, "ROUNDS", ())
        patch.setattr(forecasting, "LADDER", (10, 40, 160))
        return forecast(plan_at(epsilon), replace(SIZES, units=units), seeds=3)


def width_of(*outcomes: Outcome) -> float:
    """The larger spread of their losses."""
    return max(max(one.losses) - min(one.losses) for one in outcomes)


def by_noise(found: Forecast) -> dict[str, Outcome]:
    """The plan as it is, and with the other mode."""
    return {one.noise: one for one in (found.planned, found.others[0])}


def test_a_larger_epsilon_never_costs_more() -> None:
    small, middle, large = (told(epsilon).planned for epsilon in (0.3, 1.0, 8.0))
    assert middle.loss <= small.loss + width_of(small, middle)
    assert large.loss <= middle.loss + width_of(middle, large)
    assert large.loss < small.loss - 0.1


def test_more_units_never_cost_more() -> None:
    few, many = told(1.0).planned, told(1.0, units=800).planned
    assert many.loss < few.loss


@pytest.mark.parametrize("epsilon", [0.3, 1.0, 8.0])
def test_shared_noise_never_costs_more(epsilon: float) -> None:
    modes = by_noise(told(epsilon))
    assert modes["distributed"].loss <= modes["local"].loss + width_of(*modes.values())


def test_shared_noise_is_advised_where_it_pays_only() -> None:
    assert told(1.0).advised.noise == "distributed"
    assert told(8.0, units=800).advised.noise == "local"


def test_a_hopeless_plan_is_called_so() -> None:
    hopeless = told(0.3, units=10)
    assert hopeless.drowns(hopeless.planned)
    with pytest.raises(RefusalError, match="don't: of what 5 sites of 10 units could learn") as refused:
        hopeless.check()
    assert refused.value.exit_code == 3


def test_a_good_plan_is_not() -> None:
    found = told(8.0, units=800)
    found.check()
    assert not found.drowns(found.planned) and found.kept(found.planned) > 0.9


def test_the_smallest_useful_site_shrinks_with_epsilon() -> None:
    strict, loose = told(0.3).smallest, told(8.0).smallest
    assert loose.useful is not None and loose.little_loss is not None
    assert loose.useful <= (strict.useful or 161)
    assert loose.useful <= loose.little_loss


def test_the_expected_accuracy_is_reached_without_privacy() -> None:
    assert np.median(told(1.0).not_private) == pytest.approx(0.8, abs=0.03)


def test_the_same_seed_gives_the_same_forecast() -> None:
    first = told(8.0)
    told.cache_clear()
    assert told(8.0) == first


def some_units(copies: int = 1) -> Units:
    task = MadeUpTask.draw(8, (0.5, 0.5), np.random.default_rng(1))
    features, labels = task.records(60, np.random.default_rng(2))
    count = 60 * copies
    return Units(
        features=np.tile(features, (copies, 1)), labels=np.tile(labels, copies), unit=np.arange(count), count=count
    )


def test_a_unit_that_stands_for_two_is_two_units() -> None:
    plan = plan_at(3.0)
    two = train(plan, some_units(copies=2), sites=3, seed=4)
    one = train(plan, some_units(), sites=3, stands_for=2.0, seed=4)
    assert one.tensors[WEIGHT] == pytest.approx(two.tensors[WEIGHT], abs=1e-3)
    assert train(plan, some_units(), sites=3, seed=4).tensors[WEIGHT] != pytest.approx(two.tensors[WEIGHT], abs=1e-2)


def test_local_noise_is_shared_noise_with_one_honest_site() -> None:
    local = train(plan_at(3.0), some_units(), sites=3, seed=4)
    shared = train(
        plan_at(3.0, "distributed", min_sites=3, colluding_sites=2, retries=0), some_units(), sites=3, seed=4
    )
    assert np.array_equal(local.tensors[WEIGHT], shared.tensors[WEIGHT])


def test_asking_some_of_the_sites_costs_accuracy_but_runs() -> None:
    some = train(plan_at(3.0, sites_per_round=2), some_units(), sites=3, seed=4)
    assert np.isfinite(some.tensors[WEIGHT]).all()
    assert not np.array_equal(some.tensors[WEIGHT], train(plan_at(3.0), some_units(), sites=3, seed=4).tensors[WEIGHT])


def test_made_up_records_are_bounded_and_have_their_shares() -> None:
    assert made(10**9, 20) == MOST_RECORDS and made(10**9, 100_000) == 10 and made(300, 20) == 300
    task = MadeUpTask.draw(20, (0.7, 0.2, 0.1), np.random.default_rng(0))
    _, labels = task.records(TEST_RECORDS, np.random.default_rng(1))
    assert np.bincount(labels) / TEST_RECORDS == pytest.approx([0.7, 0.2, 0.1], abs=0.04)  # 4 standard errors


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"sites": 0}, "sites = 0"),
        ({"units": 0}, "units = 0"),
        ({"width": -1}, "width = -1"),
        ({"shares": (0.5, 0.6)}, "class shares"),
        ({"shares": (1.0,)}, "class shares"),
        ({"shares": (1.5, -0.5)}, "class shares"),
        ({"expected": 0.5}, "an expected accuracy of 0.5"),
        ({"expected": 1.0}, "an expected accuracy of 1"),
    ],
)
def test_sizes_that_cannot_be(change: dict[str, float], words: str) -> None:
    with pytest.raises(InputError, match=words):
        replace(SIZES, **change)  # type: ignore[arg-type]


def test_an_accuracy_that_so_few_records_cannot_reach() -> None:
    task = MadeUpTask.draw(20, (0.2,) * 5, np.random.default_rng(0))
    with pytest.raises(InputError, match="3 records of 20 features"):
        task.reaching(0.9, 3, seed=0)


def test_only_the_recipe_that_is_played_is_forecast() -> None:
    averaging = plan_at(1.0).model_copy(
        update={"training": plan_at(1.0).training.model_copy(update={"algorithm": "dp-fedavg"})}
    )
    with pytest.raises(PlanError, match="dp-fedavg"):
        forecast(averaging, SIZES)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forecasting, "ROUNDS", (10,))
    monkeypatch.setattr(forecasting, "LADDER", (40, 160))


def test_the_screen(veil: Veil, write_plan: Callable[..., Path], quick: None) -> None:
    code, out, err = veil("plan", write_plan(), "--units", 400, "--width", 12, "--seeds", 2)
    assert code == 0, err
    assert out.startswith("small: 2 sites of 400 units, 12 features, ε = 8")
    assert "the plan's" in out and "advised: " in out and "smallest useful site" in out and "made up" in out


def test_the_document(veil: Veil, write_plan: Callable[..., Path], quick: None) -> None:
    shares = ["--share", "0.7", "--share", "0.3", "--seeds", 2]
    code, out, err = veil("plan", write_plan(), "--units", 400, "--sites", 4, *shares, "--expected", 0.9, "--json")
    assert code == 0, err
    document = json.loads(out)
    assert document["verdict"] == "run" and document["seeds"] == 2 and document["majority"] == 0.7
    assert document["sizes"]["width"] == 2 and document["sizes"]["made_up_records"] == 1600
    assert {one["noise"] for one in (document["planned"], *document["others"])} == {"local", "distributed"}
    assert document["planned"]["loss"]["low"] <= document["planned"]["loss"]["median"]


def test_the_command_says_dont(veil: Veil, write_plan: Callable[..., Path], quick: None) -> None:
    plan = write_plan(privacy={"target_epsilon": 0.05})
    code, out, err = veil("plan", plan, "--units", 30, "--width", 12, "--seeds", 2, "--json")
    assert code == 3 and json.loads(out)["verdict"] == "don't"
    assert "don't" in err and "Remedy: " in err


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "no --units"),
        (["--units", 40, "--sites", 1], "cohort.min_sites = 2"),
        (["--units", 40, "--share", 0.5], "1 class shares for 2 labels"),
        (["--units", 40, "--share", 0.9, "--share", 0.1, "--expected", 0.85], "an expected accuracy of 0.85"),
        (["--units", 0], "--units"),
    ],
)
def test_nonsense_is_refused(veil: Veil, write_plan: Callable[..., Path], words: list[str], expected: str) -> None:
    code, out, err = veil("plan", write_plan(), *words)
    assert code == 2 and out == ""
    assert expected in err and "Traceback" not in err
