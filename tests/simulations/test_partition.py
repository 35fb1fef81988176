# SPDX-License-Identifier: Apache-2.0
"""Tests of `veil.simulations.partition`: properties over drawn federations, and each refusal on a small one.

Drawn examples carry no inputs of interest; only labels, units and sites matter here.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from veil.client.examples import Examples
from veil.common.errors import InputError
from veil.common.plan_sections import Simulation
from veil.simulations.partition import Share, partition

LABELS = ("a", "b", "c")


def examples(labels: list[int], units: list[str] | None = None, sites: list[str] | None = None) -> Examples:
    return Examples(
        inputs=("x",) * len(labels),
        labels=np.array(labels, dtype=np.int64),
        units=np.array(units if units is not None else [str(n) for n in range(len(labels))], dtype=np.str_),
        sites=None if sites is None else np.array(sites, dtype=np.str_),
    )


def simulation(**given: Any) -> Simulation:
    return Simulation(**{"path": "t.csv", "text": "body", "label": "label", "site": "site", **given})


def divided(pooled: Examples, delta: float = 1e-9, seed: int = 0, **given: Any) -> tuple[Share, ...]:
    return partition(pooled, simulation(**given), seed=seed, delta=delta, labels=LABELS)


def as_lists(shares: tuple[Share, ...]) -> list[tuple[str, list[int], list[int]]]:
    return [(share.site, share.train.tolist(), share.test.tolist()) for share in shares]


def unit_names(pooled: Examples, rows: Any) -> set[str]:
    return set(pooled.units[rows].tolist())


pools = st.lists(
    st.tuples(st.integers(0, 2), st.integers(0, 25), st.sampled_from(["Ulm", "Bern", "Graz"])),
    min_size=30,
    max_size=90,
)
ways = st.sampled_from(["iid", "dirichlet", "site-column"])
fractions = st.floats(0.05, 0.6)


@given(pool=pools, way=ways, fraction=fractions, sites=st.integers(1, 4), seed=st.integers(0, 5))
@settings(max_examples=150, deadline=None)
def test_every_record_once_no_unit_divided_and_the_same_seed_the_same_shares(
    pool: list[tuple[int, int, str]], way: str, fraction: float, sites: int, seed: int
) -> None:
    labels, patients, places = (list(part) for part in zip(*pool, strict=True))
    pooled = examples(labels, [f"p{n}" for n in patients], places)
    given_: dict[str, Any] = {
        "partition": way,
        "sites": sites,
        "alpha": 1.0,
        "test_fraction": fraction,
        "allow_single_class_sites": True,
    }
    try:
        shares = divided(pooled, seed=seed, **given_)
    except InputError as error:
        assume("training unit" not in str(error))
        raise
    rows = np.concatenate([part for share in shares for part in (share.train, share.test)])
    assert sorted(rows.tolist()) == list(range(len(pool)))
    assert rows.dtype == np.int64
    names = [share.site for share in shares]
    assert names == sorted(names)
    held: list[set[str]] = []
    for share in shares:
        train, test = unit_names(pooled, share.train), unit_names(pooled, share.test)
        assert not train & test
        assert len(train) >= 2
        assert len(test) >= 1
        wanted = fraction * (len(train) + len(test))
        assert abs(len(test) - wanted) <= 0.5 or len(test) == 1
        held.append(train | test)
        if way == "site-column":
            assert pooled.sites is not None
            assert set(pooled.sites[np.concatenate([share.train, share.test])].tolist()) == {share.site}
    if way != "site-column":
        assert sum(map(len, held)) == len(set.union(*held)), "a patient is at two sites"
    assert as_lists(shares) == as_lists(divided(pooled, seed=seed, **given_))


@given(units=st.integers(12, 60), sites=st.integers(1, 4))
@settings(max_examples=50, deadline=None)
def test_iid_sites_differ_by_one_unit_at_most(units: int, sites: int) -> None:
    shares = divided(examples([n % 2 for n in range(units)]), sites=sites, allow_single_class_sites=True)
    sizes = [len(share.train) + len(share.test) for share in shares]
    assert len(sizes) == sites
    assert max(sizes) - min(sizes) <= 1


@given(seed=st.integers(0, 200))
@settings(max_examples=50, deadline=None)
def test_the_test_units_have_the_classes_of_the_site(seed: int) -> None:
    pooled = examples([0] * 40 + [1] * 20 + [2] * 10, sites=["one"] * 70)
    (share,) = divided(pooled, seed=seed, partition="site-column", test_fraction=0.2)
    assert np.bincount(pooled.labels[share.test]).tolist() == [8, 4, 2]


@given(seed=st.integers(0, 100))
@settings(max_examples=50, deadline=None)
def test_the_only_unit_of_a_class_stays_in_training(seed: int) -> None:
    pooled = examples([0, 0, 0, 0, 1], sites=["one"] * 5)
    (share,) = divided(pooled, seed=seed, partition="site-column", test_fraction=0.5)
    assert set(pooled.labels[share.train].tolist()) == {0, 1}


def test_another_seed_gives_other_shares() -> None:
    pooled = examples([n % 2 for n in range(40)])
    assert as_lists(divided(pooled, seed=1, sites=2)) != as_lists(divided(pooled, seed=2, sites=2))


def test_the_global_generator_is_left_alone() -> None:
    before = np.random.get_state(legacy=False)
    divided(examples([n % 2 for n in range(40)]), sites=2)
    np.testing.assert_equal(np.random.get_state(legacy=False), before)


def test_a_patient_at_two_sites_is_two_units_one_at_each() -> None:
    pooled = examples([0, 1] * 6, [f"p{n // 2 % 3}" for n in range(12)], ["Bern"] * 6 + ["Aarau"] * 6)
    first, second = divided(pooled, partition="site-column")
    assert (first.site, second.site) == ("Aarau", "Bern")
    for share in (first, second):
        assert unit_names(pooled, share.train) | unit_names(pooled, share.test) == {"p0", "p1", "p2"}
        assert not unit_names(pooled, share.train) & unit_names(pooled, share.test)


def test_sites_without_a_column_are_numbered_in_order() -> None:
    pooled = examples([n % 2 for n in range(200)])
    assert [share.site for share in divided(pooled, sites=2)] == ["site-1", "site-2"]
    ten = [share.site for share in divided(pooled, sites=10, allow_single_class_sites=True)]
    assert (ten[0], ten[-1]) == ("site-01", "site-10")


def test_a_small_alpha_shifts_labels_more_than_a_large_one() -> None:
    pooled = examples([n % 2 for n in range(2000)])

    def spread(alpha: float) -> float:
        shares = divided(pooled, partition="dirichlet", sites=4, alpha=alpha, allow_single_class_sites=True)
        return float(np.std([pooled.labels[share.train].mean() for share in shares]))

    assert spread(0.3) > 0.1 > 0.05 > spread(1000.0)


@given(seed=st.integers(0, 200))
@settings(max_examples=30, deadline=None)
def test_a_unit_goes_by_its_most_frequent_class(seed: int) -> None:
    units = [f"p{n:02d}" for n in range(40) for _ in range(3)]
    labels = [label for n in range(40) for label in ((0, 0, 1) if n < 20 else (0, 1, 1))]
    pooled = examples(labels, units, ["one"] * 120)
    (share,) = divided(pooled, seed=seed, partition="site-column", test_fraction=0.25)
    held = unit_names(pooled, share.test)
    assert len(held) == 10
    assert len([name for name in held if name < "p20"]) == 5


def test_dirichlet_draws_again_until_every_site_can_train() -> None:
    pooled = examples([n % 2 for n in range(60)])
    for seed in range(20):
        shares = divided(pooled, seed=seed, partition="dirichlet", sites=5, alpha=0.5, allow_single_class_sites=True)
        assert min(len(share.train) for share in shares) >= 2


def refusal(pooled: Examples, **given: Any) -> str:
    with pytest.raises(InputError) as caught:
        divided(pooled, **given)
    assert all((caught.value.value, caught.value.expectation, caught.value.remedy))
    return str(caught.value)


def test_refused_more_sites_than_units() -> None:
    assert "5 sites and 2 units" in refusal(examples([0, 1, 0, 1], ["p", "p", "q", "q"]), sites=5)
    assert "0 units" in refusal(examples([], [], []), partition="site-column")


def test_refused_site_column_without_sites() -> None:
    assert "carry no site" in refusal(examples([0, 1]), partition="site-column")


def test_refused_site_without_a_training_unit() -> None:
    tiny = refusal(examples([0] * 8, ["p"] * 8), sites=1)
    assert 'site "site-1" has 1 training unit.' in tiny
    none = refusal(examples([n % 2 for n in range(6)]), partition="dirichlet", sites=6, alpha=1e-6)
    assert "has no training units." in none
    assert "simulation.alpha" in none


def test_refused_site_with_fewer_than_two_training_units() -> None:
    pooled = examples([0, 1] * 6, sites=["Bern"] * 10 + ["Ulm"] * 2)
    assert 'site "Ulm" has 1 training unit.' in refusal(pooled, partition="site-column")


def test_refused_site_of_one_class_unless_allowed() -> None:
    pooled = examples([0, 1] * 5 + [1] * 10, sites=["Bern"] * 10 + ["Ulm"] * 10)
    message = refusal(pooled, partition="site-column")
    assert 'site "Ulm" has training records of the class "b" only' in message
    for way_out in ("allow_single_class_sites", "alpha", "leave the site out"):
        assert way_out in message
    assert len(divided(pooled, partition="site-column", allow_single_class_sites=True)) == 2


def test_refused_delta_that_the_smallest_site_cannot_give() -> None:
    pooled = examples([0, 1] * 35, sites=["Bern"] * 60 + ["Ulm"] * 10)
    message = refusal(pooled, delta=1 / 8, partition="site-column")
    assert 'delta = 0.125 with 8 training units at site "Ulm"' in message
    assert "below 0.125" in message
    assert len(divided(pooled, delta=math.nextafter(1 / 8, 0), partition="site-column")) == 2


def test_the_delta_that_is_advised_is_not_rounded_up() -> None:
    pooled = examples([0, 1] * 10, sites=["one"] * 20)  # 16 training units after 4 are held out
    assert "below 0.0625" in refusal(pooled, delta=0.5, partition="site-column")
    pooled = examples([0, 1] * 15, sites=["one"] * 30)  # 24, and 1/24 = 0.041666…
    assert "below 0.0416," in refusal(pooled, delta=0.5, partition="site-column")
