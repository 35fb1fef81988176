# SPDX-License-Identifier: Apache-2.0
"""A coordinator that lies about a masked sum: what each site answers, what it costs, and what the liar learns."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from veil.client.backbone_store import BackboneStore
from veil.client.books import total_alone
from veil.client.ledger import Ledger, total
from veil.client.policy import Limits, SitePolicy
from veil.client.site import Consent, Site
from veil.client.units import Units
from veil.common.errors import RefusalCode
from veil.common.exchange import Offer, RoundReply, RoundRequest, Willingness
from veil.common.head import WEIGHT, initial_adapter
from veil.common.keys import NodeKey
from veil.common.masking import MaskingKey, Member, unmask
from veil.common.noise import OSNoise
from veil.common.plan import RunPlan
from veil.common.schedule import ReleaseKind, schedule
from veil.common.statement import key_fingerprint
from veil.common.update import Update

NAMES = ("Bonn", "Genf", "Linz", "Ulm")
WIDTH = 6
DRAWN: list[int] = []


class CountedNoise(OSNoise):
    """Counts how often noise was drawn."""

    def gaussian(self, count: int) -> np.ndarray:
        DRAWN.append(count)
        return super().gaussian(count)


def _same(records: Units, plan: RunPlan) -> Units:
    return records


@pytest.fixture(scope="module")
def keys() -> dict[str, NodeKey]:
    return {name: NodeKey.generate() for name in NAMES}


@pytest.fixture
def plan() -> RunPlan:
    return RunPlan.model_validate(
        {
            "name": "masked",
            "task": {"kind": "tabular-classification", "labels": ["no", "yes", "maybe"]},
            "training": {"rounds": 3},
            "privacy": {"target_epsilon": 3.0, "noise": "distributed"},
            "cohort": {"nominal_units": 40, "min_sites": 3},
        }
    )


@pytest.fixture
def sites(
    keys: dict[str, NodeKey], tmp_path: Path, make_units: Callable[..., Units]
) -> Iterator[Callable[..., dict[str, Site]]]:
    """Four sites that pinned each other; keywords belong to their limits."""
    ledgers: list[Ledger] = []

    def make(**limits: Any) -> dict[str, Site]:
        DRAWN.clear()
        pins = {name: key_fingerprint(key.public_pem) for name, key in keys.items()}
        made = {}
        for number, name in enumerate(NAMES):
            ledgers.append(Ledger(tmp_path / f"{name}.sqlite", name, keys[name]))
            records = make_units(40, seed=number)
            made[name] = Site(
                policy=SitePolicy(
                    name=name,
                    limits=Limits(**{"epsilon_per_run": 3, "epsilon_lifetime": 3, **limits}),
                    peers={other: pin for other, pin in pins.items() if other != name},
                ),
                ledger=ledgers[-1],
                units=partial(_same, records),
                noise=lambda request: CountedNoise(),
                consent=lambda job, plan: Consent.GIVEN,
                backbones=BackboneStore(tmp_path / "backbones", mirror=None, accept=False),
            )
        return made

    yield make
    for ledger in ledgers:
        ledger.close()


@pytest.fixture
def members(keys: dict[str, NodeKey]) -> tuple[Member, ...]:
    return tuple(MaskingKey.of(keys[name], name).member for name in NAMES)


def request(plan: RunPlan, members: tuple[Member, ...], round_: int = 1, **change: Any) -> RoundRequest:
    kind = next(one.kind for one in schedule(plan) if one.round == round_)
    honest: dict[str, Any] = {
        "plan": plan,
        "job": "job",
        "round": round_,
        "kind": kind,
        "adapter": initial_adapter(plan, WIDTH),
        "nominal_units": 40.0,
        "members": members,
    }
    return RoundRequest(**{**honest, **change})


def revealed(replies: list[RoundReply]) -> np.ndarray:
    """The released numbers in units of the clipping bound, as whoever adds these replies reads them."""
    assert all(one.masked is not None for one in replies), [one.refusal for one in replies]
    total_: Update = unmask([one.masked for one in replies if one.masked is not None])
    return total_.points[WEIGHT] * 2.0**-20


MakeSites = Callable[..., dict[str, Site]]
Members = tuple[Member, ...]


def test_a_whole_run_costs_the_plans_epsilon_and_the_bare_share_more(
    plan: RunPlan, sites: MakeSites, members: Members
) -> None:
    asked = sites()
    for release in schedule(plan):
        replies = [site.answer(request(plan, members, release.round)) for site in asked.values()]
        assert all(one.masked is not None and one.update is None for one in replies)
    for site in asked.values():
        spent = total(site.ledger.entries(), 1e-5).epsilon
        assert 2.0 < spent <= 3.0, "two rounds to spare are not used"
        assert total_alone(site.ledger.entries(), 1e-5).epsilon > 1.5 * spent


def test_the_sum_has_the_noise_that_the_plan_promises_and_a_single_site_less(
    plan: RunPlan, sites: MakeSites, members: Members
) -> None:
    """Wide tensors: 3 x 7 numbers in 40 sessions. One colluding site of four: shares of σ/√3."""
    asked = sites(epsilon_per_run=1000, epsilon_lifetime=1000)
    release = next(one for one in schedule(plan) if one.kind is ReleaseKind.GRADIENT)
    sums = []
    for attempt in range(40):
        replies = [site.answer(request(plan, members, 1, attempt=attempt)) for site in asked.values()]
        sums.append(revealed(replies))
    deviation = float(np.std(np.array(sums), axis=0, ddof=1).mean())
    wanted = release.mechanism.noise_multiplier * np.sqrt(4 / 3)
    assert deviation == pytest.approx(wanted, rel=0.12)
    assert abs(deviation / release.mechanism.noise_multiplier - 2) > 0.5, "as if every site had added all of it"


def test_a_replayed_attempt_gets_the_recorded_bytes_and_no_second_draw(
    plan: RunPlan, sites: MakeSites, members: Members
) -> None:
    site = sites()["Ulm"]
    first = site.answer(request(plan, members))
    drawn, spent = len(DRAWN), len(site.ledger.entries())
    moved = initial_adapter(plan, WIDTH)
    moved = replace(moved, tensors={**moved.tensors, WEIGHT: moved.tensors[WEIGHT] + 1})
    for again in (request(plan, members), request(plan, members, adapter=moved)):
        reply = site.answer(again)
        assert first.masked is not None and reply.masked is not None
        assert np.array_equal(reply.masked.words[WEIGHT], first.masked.words[WEIGHT])
    assert (len(DRAWN), len(site.ledger.entries())) == (drawn, spent)


def test_a_site_that_is_dropped_after_masking_leaves_nothing_readable(
    plan: RunPlan, sites: MakeSites, members: Members
) -> None:
    asked = sites()
    replies = [site.answer(request(plan, members)) for site in asked.values()]
    assert np.abs(revealed(replies)).max() < 1e3
    for missing in range(len(replies)):
        assert np.abs(revealed([*replies[:missing], *replies[missing + 1 :]])).max() > 1e5


def test_asking_anew_without_a_site_is_a_new_spend_with_fresh_noise_and_other_masks(
    plan: RunPlan, sites: MakeSites, members: Members
) -> None:
    asked = sites()
    first = {name: site.answer(request(plan, members)) for name, site in asked.items()}
    left = tuple(one for one in members if one.site != "Bonn")
    second = {name: asked[name].answer(request(plan, left, attempt=1)) for name in NAMES if name != "Bonn"}
    assert np.abs(revealed(list(second.values()))).max() < 1e3
    mixed = [second["Genf"], first["Linz"], first["Ulm"], first["Bonn"]]
    assert np.abs(revealed(mixed)).max() > 1e5
    assert len(asked["Genf"].ledger.entries()) == 2 and len(asked["Bonn"].ledger.entries()) == 1
    shares = [entry.shares for entry in asked["Genf"].ledger.entries()]
    assert [(one.sites, one.colluding) for one in shares if one] == [(4, 1), (3, 0)]


def test_attempts_without_end_stop_at_the_sites_own_limit(plan: RunPlan, sites: MakeSites, members: Members) -> None:
    site = sites()["Ulm"]
    codes = [site.answer(request(plan, members, attempt=attempt)).refusal for attempt in range(12)]
    assert codes[0] is None and codes[-1] is RefusalCode.BUDGET
    assert total(site.ledger.entries(), 1e-5).epsilon <= 3.0


def lie(what: str, members: Members, keys: dict[str, NodeKey]) -> tuple[Members, RefusalCode]:
    """A cohort as a lying coordinator sends it to Ulm."""
    honest = {one.site: one for one in members}
    mallory = NodeKey.generate()
    own = MaskingKey.of(mallory, "Bonn")
    forged = {
        "swapped key": replace(honest["Bonn"], masking_key=own.public),
        "another identity": own.member,
        "its own signature under the pinned key": replace(own.member, public_pem=honest["Bonn"].public_pem),
    }
    if what in forged:
        return (forged[what], *members[1:]), RefusalCode.POLICY
    stranger = MaskingKey.of(mallory, "Alma").member
    return {
        "a stranger": ((stranger, *members), RefusalCode.POLICY),
        "too few": (members[2:], RefusalCode.POLICY),
        "nobody else": (members[3:], RefusalCode.POLICY),
        "without the site": (members[:3], RefusalCode.MALFORMED),
        "another key for the site": (
            (*members[:3], MaskingKey.of(mallory, "Ulm").member),
            RefusalCode.MALFORMED,
        ),
        "a site twice": ((members[0], members[0], *members[1:]), RefusalCode.MALFORMED),
        "one key under two names": (
            (members[0], replace(members[1], masking_key=members[0].masking_key), *members[2:]),
            RefusalCode.MALFORMED,
        ),
        "no cohort at all": ((), RefusalCode.MALFORMED),
    }[what]


@pytest.mark.parametrize(
    "what",
    [
        "swapped key",
        "another identity",
        "its own signature under the pinned key",
        "a stranger",
        "too few",
        "nobody else",
        "without the site",
        "another key for the site",
        "a site twice",
        "one key under two names",
        "no cohort at all",
    ],
)
def test_a_lie_about_the_cohort_is_refused_before_it_costs_anything(
    what: str, plan: RunPlan, sites: MakeSites, members: Members, keys: dict[str, NodeKey]
) -> None:
    site = sites()["Ulm"]
    cohort, code = lie(what, members, keys)
    assert site.answer(request(plan, cohort)).refusal is code
    assert site.ledger.entries() == () and not DRAWN


def test_a_cohort_in_a_plan_with_local_noise_is_refused(plan: RunPlan, sites: MakeSites, members: Members) -> None:
    """The site would add its share only, where the plan says that it adds all."""
    local = plan.model_copy(update={"privacy": plan.privacy.model_copy(update={"noise": "local"})})
    site = sites()["Ulm"]
    assert site.answer(request(local, members)).refusal is RefusalCode.MALFORMED
    assert site.ledger.entries() == ()


def test_a_plan_that_counts_on_more_honest_sites_than_the_owner_does_is_refused(
    plan: RunPlan, sites: MakeSites, members: Members
) -> None:
    trusting = plan.model_copy(update={"cohort": plan.cohort.model_copy(update={"colluding_sites": 0})})
    assert sites()["Ulm"].answer(request(trusting, members)).refusal is RefusalCode.POLICY
    assert sites(colluding_of_ten=0)["Ulm"].answer(request(trusting, members)).refusal is None


def test_a_site_that_pinned_nobody_declines_the_offer_and_names_no_key(plan: RunPlan, sites: MakeSites) -> None:
    site = sites()["Ulm"]
    alone = replace(site, policy=site.policy.model_copy(update={"peers": {}}))
    offer = Offer(plan=plan, job="job")
    assert (alone.consider(offer).willingness, alone.consider(offer).refusal) == (
        Willingness.REFUSED,
        RefusalCode.POLICY,
    )
    assert alone.share_key(offer).refusal is RefusalCode.POLICY
    half = dict(list(site.policy.peers.items())[:1])
    hardly = replace(site, policy=site.policy.model_copy(update={"peers": half}))
    assert hardly.consider(offer).refusal is RefusalCode.POLICY, "with one partner no sum of three is possible"
    member = site.share_key(offer).member
    assert site.consider(offer).willingness is Willingness.READY and member is not None and member.genuine
