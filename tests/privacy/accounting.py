# SPDX-License-Identifier: Apache-2.0
"""Mistakes with ε: what is left out of it, and what it is computed with.

Reference figures are worked out here, as lower bounds on the truth: the exact Gaussian curve, and privacy-loss
distributions rounded to the optimistic side.
"""

from __future__ import annotations

import math
import tracemalloc
import uuid
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from functools import cache
from typing import Any

import numpy as np
from dp_accounting import pld
from dp_accounting.pld.privacy_loss_distribution import from_gaussian_mechanism
from opacus.accountants.analysis.gdp import compute_eps_poisson
from scipy.optimize import brentq
from scipy.stats import norm
from tests.privacy.scene import (
    BOUND,
    drawn,
    fedavg,
    mechanism,
    plan,
    replaced,
    request,
    silent,
    stage,
    units,
    update_of,
)
from tests.privacy.scene import batch as batch_of

from veil.client import books, ledger, review
from veil.client.books import Entry, total
from veil.client.ledger import Claim, Ledger
from veil.client.release import gradient_update
from veil.client.units import Units
from veil.common import schedule as schedule_module
from veil.common.errors import RefusalCode
from veil.common.plan import RunPlan
from veil.common.privacy import Mechanism, PrivacyBudget, PrivacySpent, accounting, spent
from veil.common.schedule import Release, schedule

DELTA = 1e-5


def at_least(mechanisms: Sequence[Mechanism], delta: float = DELTA) -> float:
    """No true ε of these mechanisms is smaller."""
    if all(one.sample_rate == 1.0 for one in mechanisms):
        return _exact_gaussian(math.sqrt(sum(one.steps / one.noise_multiplier**2 for one in mechanisms)), delta)
    counted: dict[tuple[float, float], int] = {}
    for one in mechanisms:
        key = (one.noise_multiplier, one.sample_rate)
        counted[key] = counted.get(key, 0) + one.steps
    return _optimistic(tuple(counted.items()), delta)


def _exact_gaussian(mu: float, delta: float) -> float:
    """ε of a μ-Gaussian release (Balle & Wang 2018), solved here."""

    def excess(epsilon: float) -> float:
        return float(norm.cdf(mu / 2 - epsilon / mu) - math.exp(epsilon) * norm.cdf(-epsilon / mu - mu / 2)) - delta

    return 0.0 if excess(0.0) <= 0 else float(brentq(excess, 0.0, 300.0, xtol=1e-12)) - 1e-9


@cache
def _optimistic(terms: tuple[tuple[tuple[float, float], int], ...], delta: float) -> float:
    losses = [
        from_gaussian_mechanism(
            sigma, value_discretization_interval=1e-3, sampling_prob=rate, pessimistic_estimate=False
        ).self_compose(steps)
        for (sigma, rate), steps in terms
    ]
    whole = losses[0]
    for loss in losses[1:]:
        whole = whole.compose(loss)
    return float(whole.get_epsilon_for_delta(delta))


def guard_rounds_add_up() -> None:
    """After each round the ledger's ε is that of all rounds so far."""
    with stage() as scene:
        site, done = scene.site(drawn(5)), []
        for release in schedule(plan()):
            update_of(site.answer(request(plan(), release.round, 6)))
            done.append(release.mechanism)
            shown, true = site.ledger.spent(DELTA).epsilon, at_least(done)
            assert shown >= true, f"ε = {shown:.2f} shown after {len(done)} rounds that cost {true:.2f}"


def _totals(variant: Any) -> AbstractContextManager[None]:
    return replaced((ledger, "total", variant), (review, "total", variant))


def engine_rebuilt() -> AbstractContextManager[None]:
    """The accountant is made anew in every round and knows that round only."""
    return _totals(lambda entries, delta, job=None: total(entries[-1:], delta))


def _answered(site: Any, of: RunPlan, job: str) -> RefusalCode | None:
    """Every round of a run; the word with which it ended early."""
    for release in schedule(of):
        reply = site.answer(request(of, release.round, 6, job))
        if reply.update is None:
            return RefusalCode(reply.refusal)
    return None


def guard_runs_add_up() -> None:
    """Two runs cost what they cost together, and a third that the lifetime has no room for is refused."""
    with stage() as scene:
        site = scene.site(drawn(5), epsilon_per_run=3.1, epsilon_lifetime=5.0)
        assert [_answered(site, plan(), job) for job in ("first", "second")] == [None, None]
        shown = site.ledger.spent(DELTA).epsilon
        true = at_least([release.mechanism for release in schedule(plan())] * 2)
        assert shown >= true, f"ε = {shown:.2f} shown for two runs that cost {true:.2f}"
        assert _answered(site, plan(), "third") is RefusalCode.BUDGET


def runs_forgotten() -> AbstractContextManager[None]:
    """Each run has a budget of its own, and nobody adds them up."""

    def variant(entries: Sequence[Entry], delta: float, job: str | None = None) -> PrivacySpent:
        return total(entries, delta, job or (entries[-1].job if entries else None))

    return _totals(variant)


def guard_trials_count() -> None:
    """Three trials with different rates cost what three runs cost, whichever of them is kept."""
    with stage() as scene:
        site, trials = scene.site(drawn(5)), [plan({"learning_rate": rate}) for rate in (0.1, 1.0, 10.0)]
        for number, of in enumerate(trials):
            assert _answered(site, of, f"trial {number}") is None
        shown = site.ledger.spent(DELTA).epsilon
    true = at_least([release.mechanism for of in trials for release in schedule(of)])
    assert shown >= true, f"ε = {shown:.2f} shown for three trials that cost {true:.2f}"


def trials_free() -> AbstractContextManager[None]:
    """Runs that look for a good rate are not written down; only the best would be."""
    spend, record = Ledger.spend, Ledger.record_reply

    def variant(self: Ledger, job: str, release: Release, **told: Any) -> Claim:
        return Claim(seq=-1) if job.startswith("trial") else spend(self, job, release, **told)

    def recording(self: Ledger, claim: Claim, reply: bytes) -> bytes:
        return reply if claim.seq < 0 else record(self, claim, reply)

    return replaced((Ledger, "spend", variant), (Ledger, "record_reply", recording))


_FEW = ((0.8, 0.032, 32), (0.6, 0.01, 20), (1.0, 0.1, 30), (5.0, 1.0, 30))


def guard_few_steps() -> None:
    """A ledger of few sampled steps never shows less than an optimistic privacy-loss distribution."""
    for sigma, rate, steps in _FEW:
        one = mechanism(sigma, sample_rate=rate, steps=steps)
        shown = total([Entry(job="job", round=1, mechanism=one, noise="os", plan="")], DELTA).epsilon
        assert shown >= at_least([one]), f"ε = {shown:.2f} shown, at least {at_least([one]):.2f} spent"


def central_limit() -> AbstractContextManager[None]:
    """Opacus' GDP accountant, which takes few steps for infinitely many."""

    def variant(runs: Iterable[Iterable[Mechanism]], delta: float) -> PrivacySpent:
        ((one,),) = (tuple(run) for run in runs)
        return PrivacySpent(epsilon=_central_limit(one, delta), delta=delta, by_accountant={})

    return replaced((books, "spent_over_runs", variant))


def _central_limit(one: Mechanism, delta: float) -> float:
    return float(
        compute_eps_poisson(
            steps=one.steps, noise_multiplier=one.noise_multiplier, sample_rate=one.sample_rate, delta=delta
        )
    )


def guard_calibration() -> None:
    """What a plan asks for is not below what its schedule costs."""
    for of in (_renamed(fedavg(0.1), 8.0), plan(), plan(target_epsilon=8.0)):
        true = at_least([release.mechanism for release in schedule(_renamed(of, of.privacy.target_epsilon))])
        assert true <= of.privacy.target_epsilon, f"asked {of.privacy.target_epsilon}, spent {true:.2f}"


def _renamed(of: RunPlan, epsilon: float) -> RunPlan:
    """The same plan under a new name, so that no schedule is remembered, with another ε."""
    privacy = of.privacy.model_copy(update={"target_epsilon": epsilon})
    return of.model_copy(update={"name": uuid.uuid4().hex, "privacy": privacy})


def calibrated_by_limit() -> AbstractContextManager[None]:
    """Noise is found for the central-limit accountant's ε."""

    def variant(budget: PrivacyBudget, *, steps: int, sample_rate: float = 1.0, **told: Any) -> Mechanism:
        def excess(sigma: float) -> float:
            one = mechanism(sigma, sample_rate=sample_rate, steps=steps)
            return _central_limit(one, budget.target_delta) - budget.target_epsilon

        bound, unit = told["max_grad_norm"], told["unit"]
        sigma = float(brentq(excess, 0.5, 100.0))
        return Mechanism(noise_multiplier=sigma, max_grad_norm=bound, sample_rate=sample_rate, steps=steps, unit=unit)

    return replaced((schedule_module, "calibrate", variant))


def guard_hostile_plan() -> None:
    """A million steps of little noise are answered without a privacy-loss distribution, in little memory."""
    built: list[object] = []

    def tripped(self: object, *_: object, **__: object) -> None:
        built.append(self)
        raise MemoryError

    delta = DELTA * (1 + np.random.default_rng().random())  # no answer is remembered
    tracemalloc.start()
    try:
        with replaced((pld.PLDAccountant, "_maybe_compose", tripped)):
            for rate in (1.0, 0.5):
                shown = spent([mechanism(0.3, sample_rate=rate, steps=1_000_000)], delta).epsilon
                assert shown > 1000, f"ε = {shown:.1f} for a million steps of hardly any noise"
    except MemoryError:
        pass
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert not built, "a privacy-loss distribution of gigabytes was begun"
    assert peak < 2**26, f"{peak >> 20} MiB for one answer"


def no_limit() -> AbstractContextManager[None]:
    """The tight accountant is asked whatever the plan says."""
    return replaced((accounting, "PLD_LIMIT", math.inf))


def guard_relation() -> None:
    """Sums move by at most C between the neighbours that a mechanism's record names."""
    named = schedule(plan())[1].mechanism.to_record()["relation"]
    moved = _moved_by(named)
    assert moved <= BOUND, f"{named} neighbours move the sum by {moved / BOUND:.2f} C"


def _moved_by(relation: str) -> float:
    """How far two opposed records move a sum, when one is added or when one takes the other's place."""
    features = np.vstack([np.ones((1, 6)), np.ones((1, 6))])
    weight = np.zeros((3, 7))

    def summed(records: Units) -> np.ndarray[Any, np.dtype[np.float64]]:
        update = gradient_update(weight, batch_of(records), mechanism(), silent())
        return np.asarray(update.points["head.weight"] * update.spacing)

    one, other = (summed(units(features[:1], [label])) for label in (0, 1))
    nobody = summed(units(np.zeros((0, 6)), []))
    apart = {"add-or-remove-one": (one, nobody), "replace-one": (one, other)}[relation]
    return float(np.linalg.norm(apart[0] - apart[1]))


def replacement_claimed() -> AbstractContextManager[None]:
    """The same noise is sold as protection against replacing a record."""
    ours = Mechanism.to_record

    def variant(self: Mechanism) -> dict[str, Any]:
        return {**ours(self), "relation": "replace-one"}

    return replaced((Mechanism, "to_record", variant))
