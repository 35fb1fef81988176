# SPDX-License-Identifier: Apache-2.0
"""Plans, records, requests and sites for the tests of `veil.client`; all small, all numeric."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from veil.client.ledger import Ledger
from veil.client.policy import Limits, SitePolicy
from veil.client.site import Site
from veil.client.units import Units
from veil.common.exchange import RoundRequest
from veil.common.head import initial_adapter
from veil.common.noise import OSNoise
from veil.common.plan import RunPlan
from veil.common.schedule import schedule

WIDTH = 6
LABELS = ["no", "yes", "maybe"]


@pytest.fixture
def make_plan() -> Callable[..., RunPlan]:
    """A plan of three classes; `training` is a table, further keywords belong to `privacy`."""

    def make(training: dict[str, Any] | None = None, **privacy: Any) -> RunPlan:
        return RunPlan.model_validate(
            {
                "name": "client",
                "task": {"kind": "tabular-classification", "labels": LABELS},
                "training": {"rounds": 3, **(training or {})},
                "privacy": {"target_epsilon": 3.0, **privacy},
                "cohort": {"nominal_units": 50},
            }
        )

    return make


@pytest.fixture
def make_units() -> Callable[..., Units]:
    """Random records; `count` units of 1 to `most` records each."""

    def make(count: int, *, most: int = 1, seed: int = 0, width: int = WIDTH) -> Units:
        random = np.random.default_rng(seed)
        sizes = random.integers(1, most + 1, size=count)
        unit = np.repeat(np.arange(count), sizes)
        return Units(
            features=random.normal(size=(len(unit), width)),
            labels=random.integers(0, len(LABELS), size=len(unit)),
            unit=unit,
            count=count,
        )

    return make


@pytest.fixture
def make_request() -> Callable[..., RoundRequest]:
    """The request of a round as an honest coordinator sends it, with a zero head; keywords change it."""

    def make(plan: RunPlan, round_: int = 0, *, width: int = WIDTH, **change: Any) -> RoundRequest:
        honest: dict[str, Any] = {
            "plan": plan,
            "job": "job",
            "round": round_,
            "kind": change.get("kind") or next(one.kind for one in schedule(plan) if one.round == round_),
            "adapter": initial_adapter(plan, width),
            "nominal_units": 50.0,
        }
        return RoundRequest(**{**honest, **change})

    return make


@pytest.fixture
def open_ledger(tmp_path: Path) -> Iterator[Callable[..., Ledger]]:
    """Further connections to one file, closed at the end."""
    opened: list[Ledger] = []

    def connect(site: str = "Ulm") -> Ledger:
        opened.append(Ledger(tmp_path / "ledger.sqlite", site))
        return opened[-1]

    yield connect
    for ledger in opened:
        ledger.close()


@pytest.fixture
def make_site(open_ledger: Callable[..., Ledger], make_units: Callable[..., Units]) -> Callable[..., Site]:
    """A site with its own connection to the ledger; keywords other than the site's own belong to its limits."""

    def make(
        *,
        units: Callable[[RunPlan], Units] | None = None,
        noise: Callable[[RoundRequest], Any] = lambda _: OSNoise(),
        **limits: Any,
    ) -> Site:
        records = make_units(40, most=3)
        return Site(
            policy=SitePolicy(name="Ulm", limits=Limits(**{"epsilon_per_run": 8, "epsilon_lifetime": 8, **limits})),
            ledger=open_ledger(),
            units=units or (lambda _: records),
            noise=noise,
        )

    return make
