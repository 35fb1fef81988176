# SPDX-License-Identifier: Apache-2.0
"""Mistakes after a crash and with who decides: what is drawn twice, and on whose word a site acts."""

from __future__ import annotations

import hashlib
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from tests.privacy.scene import (
    Stage,
    added,
    blank,
    drawn,
    evaluated,
    mechanism,
    plan,
    replaced,
    request,
    stage,
    update_of,
)
from tests.statistical.checks import check_scale, check_unrelated

from veil.client import site as site_module
from veil.client.ledger import Claim, Ledger
from veil.client.review import release_of
from veil.client.site import Site
from veil.common.errors import RefusalCode, RefusalError
from veil.common.exchange import RoundRequest
from veil.common.noise import OSNoise
from veil.common.plan import RunPlan
from veil.common.privacy import Mechanism
from veil.common.schedule import Release, schedule
from veil.common.update import MaskedUpdate, Update

WIDTH = 2000


def _crashing(scene: Stage, drawn_bytes: list[bytes]) -> None:
    """A site draws round 1, and dies before the answer is recorded."""

    def dies(self: Ledger, claim: Claim, reply: bytes) -> bytes:
        drawn_bytes.append(reply)
        raise KeyboardInterrupt

    with replaced((Ledger, "record_reply", dies)):
        try:
            scene.site(blank(2, WIDTH)).answer(request(plan(), 1, WIDTH))
        except KeyboardInterrupt:
            return
    raise RuntimeError("the site did not draw")


def guard_crash_is_charged() -> None:
    """After a crash between draw and record the round is paid for again; asked a third time, its bytes come back."""
    with stage() as scene:
        _crashing(scene, [])
        site = scene.site(blank(2, WIDTH))
        second, third = (update_of(site.answer(request(plan(), 1, WIDTH))).to_bytes() for _ in range(2))
        paid = len(site.ledger.entries())
    assert paid == 2, f"two draws on the records, {paid} charged"
    assert second == third, "a round that was answered was drawn again"


def drawn_again() -> AbstractContextManager[None]:
    """A round that is asked again is drawn again, on the line that was written for it first."""
    spend, record = Ledger.spend, Ledger.record_reply

    def variant(self: Ledger, job: str, release: Release, **told: Any) -> Claim:
        known = [one for one in self.entries() if (one.job, one.round) == (job, release.round)]
        return Claim(seq=-1) if known else spend(self, job, release, **told)

    def recording(self: Ledger, claim: Claim, reply: bytes) -> bytes:
        return reply if claim.seq < 0 else record(self, claim, reply)

    return replaced((Ledger, "spend", variant), (Ledger, "record_reply", recording))


def guard_crash_draws_anew() -> None:
    """What is drawn after a crash shares nothing with what was drawn before: their difference is no clean number."""
    lost: list[bytes] = []
    with stage() as scene:
        _crashing(scene, lost)
        again = update_of(scene.site(blank(2, WIDTH)).answer(request(plan(), 1, WIDTH)))
    release = next(one for one in schedule(plan()) if one.round == 1)
    check_unrelated(added(Update.from_bytes(lost[0]), release), added(again, release))


def noise_by_round() -> AbstractContextManager[None]:
    """Noise from a secret, the run and the round: repeatable, so that a round can be computed again."""
    ours, seed = Site._release, [0]

    def variant(self: Site, asked: RoundRequest) -> Update | MaskedUpdate:
        digest = hashlib.sha256(f"secret {asked.job} {asked.round}".encode()).digest()
        seed[0] = int.from_bytes(digest[:8], "little")
        return ours(self, asked)

    def repeatable(self: OSNoise, count: int) -> Any:
        return np.random.default_rng(seed[0]).standard_normal(count)

    return replaced((Site, "_release", variant), (OSNoise, "gaussian", repeatable))


@dataclass(frozen=True, kw_only=True)
class PushyRequest(RoundRequest):
    """A request of a coordinator that would choose the mechanism itself."""

    mechanism: Mechanism


def guard_own_mechanism() -> None:
    """Whatever a coordinator adds to its request, line and noise are those of the plan."""
    of = plan()
    weak = mechanism(0.3)
    with stage() as scene:
        site = scene.site(blank(2, WIDTH))
        honest = request(of, 1, WIDTH)
        fields = {name: getattr(honest, name) for name in honest.__dataclass_fields__}
        update = update_of(site.answer(PushyRequest(**fields, mechanism=weak)))
        (entry,) = site.ledger.entries()
    release = next(one for one in schedule(of) if one.round == 1)
    assert entry.mechanism == release.mechanism, f"σ = {entry.mechanism.noise_multiplier} was charged"
    check_scale(added(update, release))


def coordinator_decides() -> AbstractContextManager[None]:
    """The mechanism is taken from the request, as server-side wrappers send it along."""

    def variant(asked: RoundRequest) -> Release:
        own = release_of(asked)
        return Release(round=own.round, kind=own.kind, mechanism=getattr(asked, "mechanism", own.mechanism))

    return replaced((site_module, "release_of", variant))


def guard_refusal_is_blind() -> None:
    """Sites with no record, one, and many answer every round of every plan with the same words."""
    cases: list[tuple[RunPlan, dict[str, Any]]] = [
        (evaluated(), {}),
        (plan(), {"epsilon_per_run": 1.0}),
        (plan(target_delta=1e-3), {}),
    ]
    with stage() as scene:
        for number, (of, limits) in enumerate(cases):
            words = {}
            for count in (0, 1, 40):
                records = replace(drawn(count), held=drawn(count // 2, seed=1))
                site = scene.site(records, name=f"{number} {count}", **limits)
                words[count] = tuple(site.answer(request(of, step.round, 6)).refusal for step in schedule(of))
            assert len(set(words.values())) == 1, f"units → answers: {words}"


def too_few_refused() -> AbstractContextManager[None]:
    """A site with few records says so, and stays away."""
    ours = Site._release

    def variant(self: Site, asked: RoundRequest) -> Update | MaskedUpdate:
        if self.units(asked.plan).count < 10:
            raise RefusalError(RefusalCode.DATA, "few records", "ten", "come back later")
        return ours(self, asked)

    return replaced((Site, "_release", variant))
