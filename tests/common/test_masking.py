# SPDX-License-Identifier: Apache-2.0
"""Tests of `veil.common.masking` and `veil.common.privacy.shares`: masks cancel in the whole sum and nowhere else."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kstest

from veil.common.keys import NodeKey
from veil.common.masking import WORD_BITS, MaskingKey, Member, session_of, unmask
from veil.common.privacy import Mechanism, NoiseShares, gaussian_mu_squared, spent
from veil.common.update import MaskedUpdate, Update

SITES = ("Bonn", "Genf", "Linz", "Ulm")
KEYS = {site: MaskingKey.of(NodeKey.generate(), site) for site in SITES}
MEMBERS = tuple(KEYS[site].member for site in SITES)
SESSION: dict[str, Any] = {"job": "j", "plan": "p", "round_": 1, "kind": "gradient", "attempt": 0, "members": MEMBERS}
LARGEST = 2 ** (WORD_BITS - 1)


def update(points: Any) -> Update:
    return Update(points={"weight": np.asarray(points, np.int64)}, spacing=0.5)


def masked(points: dict[str, Any], members: tuple[Member, ...] = MEMBERS, **changed: Any) -> list[MaskedUpdate]:
    session = session_of(**{**SESSION, "members": members, **changed})
    return [KEYS[site].mask(update(points[site]), members, session) for site in points]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.integers(-LARGEST // 4, LARGEST // 4 - 1), min_size=3, max_size=3), min_size=4, max_size=4))
def test_the_sum_over_the_cohort_is_exact(rows: list[list[int]]) -> None:
    total = unmask(masked(dict(zip(SITES, rows, strict=True))))
    assert total.points["weight"].tolist() == np.sum(rows, axis=0).tolist() and total.spacing == 0.5


def test_one_masked_update_looks_like_chance_and_so_does_any_sum_but_the_whole() -> None:
    """Uniform over all words: 10 000 equal numbers, masked, pass a Kolmogorov-Smirnov test at 10⁻⁴."""
    hidden = masked({site: np.full(10_000, 7) for site in SITES})
    for chosen in (part for size in (1, 2, 3) for part in itertools.combinations(hidden, size)):
        words = (unmask(chosen).points["weight"] + LARGEST) / 2.0**WORD_BITS
        assert kstest(words, "uniform").pvalue > 1e-4
    assert (unmask(hidden).points["weight"] == 28).all()


@pytest.mark.parametrize(
    "changed",
    [{"job": "k"}, {"plan": "q"}, {"round_": 2}, {"kind": "centre"}, {"attempt": 1}, {"members": MEMBERS[:3]}],
    ids=["job", "plan", "round", "kind", "attempt", "member"],
)
def test_nothing_cancels_between_two_sessions(changed: dict[str, Any]) -> None:
    points = {site: np.zeros(1000) for site in SITES}
    one, other = masked(points), masked({site: points[site] for site in SITES[:1]}, **changed)
    mixed = unmask([other[0], *one[1:]]).points["weight"]
    assert np.std(mixed) > 0.2 * LARGEST


def test_a_swapped_key_is_another_session_and_does_not_cancel() -> None:
    forged = replace(MEMBERS[0], masking_key=MaskingKey.of(NodeKey.generate(), "Bonn").public)
    session = session_of(**{**SESSION, "members": (forged, *MEMBERS[1:])})
    assert session != session_of(**SESSION)


def test_the_order_of_members_does_not_matter() -> None:
    assert session_of(**SESSION) == session_of(**{**SESSION, "members": MEMBERS[::-1]})


def test_a_member_is_genuine_only_as_its_own_key_signed_it() -> None:
    honest = MEMBERS[0]
    assert honest.genuine
    for forged in (
        replace(honest, site="Ulm"),
        replace(honest, masking_key=MEMBERS[1].masking_key),
        replace(honest, public_pem=MEMBERS[1].public_pem),
        replace(honest, public_pem=b"no key"),
    ):
        assert not forged.genuine


def test_one_node_key_gives_every_site_another_masking_key_and_always_the_same() -> None:
    node = NodeKey.generate()
    assert MaskingKey.of(node, "a").public == MaskingKey.of(NodeKey(private=node.private), "a").public
    assert MaskingKey.of(node, "a").public != MaskingKey.of(node, "b").public
    assert "private" not in repr(MaskingKey.of(node, "a"))


def test_bytes_keep_every_word_and_take_six_a_number() -> None:
    (hidden, *_) = masked({site: np.arange(5000) for site in SITES})
    data = hidden.to_bytes()
    again = MaskedUpdate.from_bytes(data)
    assert np.array_equal(again.words["weight"], hidden.words["weight"]) and again.spacing == hidden.spacing
    assert 6 * 5000 < len(data) < 6 * 5000 + 300


@pytest.mark.parametrize("point", [LARGEST, -LARGEST - 1])
def test_a_number_that_would_wrap_is_an_error(point: int) -> None:
    with pytest.raises(ValueError, match="beyond"):
        KEYS["Ulm"].mask(update([point]), MEMBERS, b"s")


def test_a_key_that_is_no_point_of_use_is_an_error() -> None:
    with pytest.raises(ValueError, match="shared key"):
        KEYS["Ulm"].mask(update([1]), (replace(MEMBERS[0], masking_key=bytes(32)), MEMBERS[3]), b"s")


def test_updates_that_do_not_fit_together_are_an_error() -> None:
    hidden = masked({site: [1, 2] for site in SITES})
    with pytest.raises(ValueError, match="different"):
        unmask([hidden[0], replace(hidden[1], spacing=1.0)])
    with pytest.raises(ValueError, match="no masked"):
        unmask([])


@pytest.mark.parametrize(("sites", "colluding"), [(4, 1), (10, 3), (2, 0), (5, 4)])
def test_the_shares_of_the_honest_add_up_to_the_whole(sites: int, colluding: int) -> None:
    shares = NoiseShares(sites=sites, colluding=colluding)
    assert shares.honest * shares.share**2 == pytest.approx(1)
    assert shares.sites * shares.share**2 == pytest.approx(shares.excess)


@settings(max_examples=60, deadline=None)
@given(st.floats(0.3, 50), st.integers(1, 40), st.integers(0, 20))
def test_alone_a_release_costs_as_much_as_its_share_of_the_noise(sigma: float, steps: int, honest: int) -> None:
    """μ² of the share, also where its σ is below what a mechanism may have; never less."""
    shares = NoiseShares(sites=honest + 1, colluding=0)
    mechanism = Mechanism(noise_multiplier=sigma, max_grad_norm=1.0, steps=steps)
    bare = gaussian_mu_squared([shares.unmasked(mechanism)])
    exact = steps * shares.honest / sigma**2
    assert exact * (1 - 1e-12) <= bare * (1 + 1e-9) and bare == pytest.approx(exact, rel=1e-9)


@pytest.mark.parametrize(("sigma", "rate"), [(0.8, 0.1), (0.4, 1.0)])
def test_alone_a_sample_stays_one_where_its_noise_can_be_counted_and_is_a_full_batch_below(
    sigma: float, rate: float
) -> None:
    """Either costs no less than the sample does with that noise, and the second strictly more."""
    sampled = Mechanism(noise_multiplier=sigma, max_grad_norm=1.0, sample_rate=0.1, steps=20)
    bare = NoiseShares(sites=4, colluding=0).unmasked(sampled)
    assert bare.sample_rate == rate
    assert bare.noise_multiplier / bare.steps**0.5 == pytest.approx(sigma / 2 / 20**0.5)
    full = NoiseShares(sites=4, colluding=0).unmasked(replace(sampled, sample_rate=1.0))
    assert spent([sampled], 1e-5).epsilon < spent([bare], 1e-5).epsilon <= spent([full], 1e-5).epsilon


def test_shares_without_an_honest_site_cannot_be() -> None:
    with pytest.raises(ValueError, match="fewer than all"):
        NoiseShares(sites=3, colluding=3)
