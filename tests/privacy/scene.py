# SPDX-License-Identifier: Apache-2.0
"""A plan, records, a request and a site for the guards of this folder, on the product's own path from end to end.

Records without features make every column but the last pure noise: what a guard sees there, a site added.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from numpy.typing import NDArray

from veil.client.backbone_store import BackboneStore
from veil.client.head_batch import HeadBatch
from veil.client.ledger import Ledger
from veil.client.policy import Limits, SitePolicy
from veil.client.site import Consent, Site
from veil.client.units import Units
from veil.common.exchange import RoundReply, RoundRequest
from veil.common.head import CENTRE, WEIGHT, initial_adapter
from veil.common.keys import NodeKey
from veil.common.noise import OSNoise
from veil.common.plan import RunPlan
from veil.common.plan_sections import Evaluation
from veil.common.privacy import Mechanism
from veil.common.schedule import Release, ReleaseKind, schedule
from veil.common.update import Update
from veil.simulations.unprivate_noise import NoNoise

Floats = NDArray[np.float64]
LABELS = ("no", "yes", "maybe")
NOMINAL = 50.0
"""The public size that requests name."""

BOUND = 0.5
"""C of every plan and mechanism here."""


@contextmanager
def replaced(*seams: tuple[object, str, object]) -> Iterator[None]:
    """Other parts in the place of ours, until the block ends."""
    with ExitStack() as parts:
        for owner, name, part in seams:
            parts.enter_context(patch.object(owner, name, part))
        yield


def plan(training: dict[str, Any] | None = None, **privacy: Any) -> RunPlan:
    """Three classes, three rounds after the centring one; `training` is a table, keywords belong to `privacy`."""
    return RunPlan.model_validate(
        {
            "name": "suite",
            "task": {"kind": "tabular-classification", "labels": LABELS},
            "training": {"rounds": 3, **(training or {})},
            "privacy": {"target_epsilon": 3.0, "max_grad_norm": BOUND, **privacy},
            "cohort": {"nominal_units": int(NOMINAL)},
        }
    )


def evaluated() -> RunPlan:
    """With an evaluation at the end."""
    return plan().model_copy(update={"evaluation": Evaluation()})


def fedavg(rate: float = 0.2, rounds: int = 1) -> RunPlan:
    """Local steps on samples, without a centring round."""
    return plan({"algorithm": "dp-fedavg", "rounds": rounds, "sample_rate": rate, "centre": False})


def mechanism(sigma: float = 2.0, **change: Any) -> Mechanism:
    """σ = 2 and C = 0.5 but for what is named."""
    return Mechanism(**{"noise_multiplier": sigma, "max_grad_norm": BOUND, **change})


def units(features: Any, labels: Any, unit: Any = None) -> Units:
    """Records [n, d] with classes [n]; each its own unit unless said otherwise."""
    rows = np.asarray(features)
    of = np.arange(len(rows)) if unit is None else np.asarray(unit)
    return Units(features=rows, labels=np.asarray(labels, np.int64), unit=of, count=int(of.max(initial=-1)) + 1)


def drawn(count: int, width: int = 6, seed: int = 0) -> Units:
    """Random records, each its own unit."""
    random = np.random.default_rng(seed)
    return units(random.normal(size=(count, width)), random.integers(0, len(LABELS), size=count))


def blank(count: int, width: int) -> Units:
    """Records without features: their gradient is zero but in the intercept's column."""
    return units(np.zeros((count, width)), np.arange(count) % len(LABELS))


def chosen(records: Units, keep: list[int]) -> Units:
    """Some records, each its own unit."""
    return units(records.features[keep], records.labels[keep])


def batch(records: Units) -> HeadBatch:
    """The head's view around a zero centre."""
    return HeadBatch.of(records, np.zeros(records.features.shape[1]))


def silent() -> NoNoise:
    """No noise, to see what is under it."""
    return NoNoise(0, "suite", 0)


def request(of: RunPlan, round_: int, width: int, job: str = "job", **change: Any) -> RoundRequest:
    """A round as an honest coordinator asks it, with a zero head."""
    kind = next(one.kind for one in schedule(of) if one.round == round_)
    honest = {"plan": of, "job": job, "round": round_, "kind": kind, "nominal_units": NOMINAL}
    return RoundRequest(**{**honest, "adapter": initial_adapter(of, width), **change})


@cache
def key() -> NodeKey:
    """One key pair for all sites here."""
    return NodeKey.generate()


@dataclass(kw_only=True)
class Stage:
    """Sites in one folder, closed at the end.

    Attributes:
        folder: where their ledgers are.
        ledgers: what was opened.
    """

    folder: Path
    ledgers: list[Ledger] = field(default_factory=list)

    def ledger(self, name: str) -> Ledger:
        """A connection to a site's ledger, as after a restart."""
        self.ledgers.append(Ledger(self.folder / f"{name}.sqlite", name, key()))
        return self.ledgers[-1]

    def site(self, records: Units | Callable[[RunPlan], Units], name: str = "Ulm", **limits: Any) -> Site:
        """A site with these records; keywords belong to its limits."""
        allowed = Limits(**{"epsilon_per_run": 50, "epsilon_lifetime": 50, **limits})
        return Site(
            policy=SitePolicy(name=name, limits=allowed),
            ledger=self.ledger(name),
            units=records if callable(records) else lambda _: records,
            noise=lambda _: OSNoise(),
            consent=lambda job, of: Consent.GIVEN,
            backbones=BackboneStore(self.folder / "backbones", mirror=None, accept=False),
        )


@contextmanager
def stage() -> Iterator[Stage]:
    """A folder for sites, gone at the end."""
    with tempfile.TemporaryDirectory() as folder:
        opened = Stage(folder=Path(folder))
        try:
            yield opened
        finally:
            for ledger in opened.ledgers:
                ledger.close()


def update_of(reply: RoundReply) -> Update:
    """The update, which must be there."""
    assert reply.update is not None, f"round {reply.round} was refused: {reply.refusal}"
    return reply.update


def numbers(update: Update) -> Floats:
    """The released numbers of the one tensor."""
    (points,) = update.points.values()
    return np.asarray(points * update.spacing, np.float64)


def added(update: Update, release: Release, rate: float = 4.0) -> Floats:
    """What noise blank records' releases hold, over the standard deviation that the release was charged for.

    Args:
        update: a release on `blank` records.
        release: as the ledger has it.
        rate: dp-fedavg's learning rate.
    """
    paid = release.mechanism
    scale = paid.noise_multiplier * paid.max_grad_norm
    if release.kind is ReleaseKind.DELTA:
        scale *= rate * math.sqrt(paid.steps) / (paid.sample_rate * NOMINAL)
    return np.asarray((numbers(update)[..., :-1] / scale).ravel(), np.float64)


def noise_of(site: Site, of: RunPlan, width: int, job: str = "job") -> list[Floats]:
    """The noise of every round of a run at a site with `blank` records, in units of what its ledger was charged."""
    found = []
    for release in schedule(of):
        update = update_of(site.answer(request(of, release.round, width, job)))
        charged = site.ledger.entries()[-1].mechanism
        told = Release(round=release.round, kind=release.kind, mechanism=charged)
        found.append(added(update, told))
    return found


__all__ = [
    "BOUND",
    "CENTRE",
    "LABELS",
    "NOMINAL",
    "WEIGHT",
    "Floats",
    "Stage",
    "added",
    "batch",
    "blank",
    "chosen",
    "drawn",
    "evaluated",
    "fedavg",
    "mechanism",
    "noise_of",
    "numbers",
    "plan",
    "replaced",
    "request",
    "silent",
    "stage",
    "units",
    "update_of",
]
