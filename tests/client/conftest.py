# SPDX-License-Identifier: Apache-2.0
"""Plans, records, requests and sites for the tests of `veil.client`; all small, all numeric."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from veil.client.backbone_store import BackboneStore
from veil.client.ledger import Ledger
from veil.client.policy import Limits, SitePolicy
from veil.client.site import Consent, Site
from veil.client.site_form import write_site_file
from veil.client.units import Units
from veil.common.exchange import RoundRequest
from veil.common.head import initial_adapter
from veil.common.keys import NodeKey
from veil.common.noise import OSNoise
from veil.common.plan import RunPlan
from veil.common.schedule import schedule
from veil.server.pki import issue_certificate, make_authority

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


@pytest.fixture(scope="session")
def key() -> NodeKey:
    """The site's key pair."""
    return NodeKey.generate()


@pytest.fixture
def open_ledger(tmp_path: Path, key: NodeKey) -> Iterator[Callable[..., Ledger]]:
    """Further connections to one file, closed at the end; keywords belong to the ledger."""
    opened: list[Ledger] = []

    def connect(site: str = "Ulm", **options: Any) -> Ledger:
        opened.append(Ledger(tmp_path / "ledger.sqlite", site, options.pop("key", key), **options))
        return opened[-1]

    yield connect
    for ledger in opened:
        ledger.close()


@pytest.fixture
def make_site(
    open_ledger: Callable[..., Ledger], make_units: Callable[..., Units], tmp_path: Path
) -> Callable[..., Site]:
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
            consent=lambda job, plan: Consent.GIVEN,
            backbones=BackboneStore(tmp_path / "backbones", mirror=None, accept=False),
        )

    return make


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A coordinator's authority: a folder with `ca.pem`, and `link.pem` and `link.key` for this machine."""
    folder = tmp_path_factory.mktemp("pki")
    make_authority(folder, "Study 7")
    issue_certificate(folder, ["localhost", "127.0.0.1"])
    return folder


@pytest.fixture
def make_home(tmp_path: Path, key: NodeKey, authority: Path) -> Callable[..., Path]:
    """A site's folder as `veil site init` leaves it, with a table of its own; `limits` and `agent` are tables."""

    def make(
        *, url: str = "https://127.0.0.1:1", limits: dict[str, Any] | None = None, agent: dict[str, Any] | None = None
    ) -> Path:
        home = tmp_path / "site"
        home.mkdir(mode=0o700)
        columns = [f"c{index}" for index in range(WIDTH)]
        random = np.random.default_rng(1)
        rows = [[*map(repr, random.normal(size=WIDTH).tolist()), LABELS[index % 3]] for index in range(40)]
        lines = [",".join(row) for row in [[*columns, "answer"], *rows]]
        (home / "table.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
        document = {
            "name": "Ulm",
            "data": {
                "table": "table.csv",
                "features": columns,
                "label": "answer",
                "labels": {one: one for one in LABELS},
            },
            "limits": {"epsilon_per_run": 8.0, "epsilon_lifetime": 8.0, **(limits or {})},
            "coordinator": {"url": url, "ca": "keys/coordinator.pem"},
            "agent": {"health_address": "", "metrics_address": "", **(agent or {})},
        }
        write_site_file(home / "site.toml", document)
        (home / "keys").mkdir(mode=0o700)
        key.save(home / "keys" / "node.key")
        (home / "keys" / "coordinator.pem").write_bytes((authority / "ca.pem").read_bytes())
        return home

    return make


_FAKE_EXECUTOR = """
import os, sys, time
from multiprocessing.connection import Connection

pipe = Connection(int(sys.argv[1]))
while True:
    try:
        frame = pipe.recv_bytes()
    except EOFError:
        sys.exit(0)
    if frame.endswith(b"hang"):
        time.sleep(600)
    elif frame.endswith(b"crash"):
        os._exit(3)
    elif frame.endswith(b"close"):
        pipe.close()
        time.sleep(600)
    elif frame.endswith(b"half"):
        os.write(pipe.fileno(), b"\\x00\\x00\\x01\\x00half")
        os._exit(0)
    elif frame.endswith(b"stall"):
        os.write(pipe.fileno(), b"\\x00\\x00\\x01\\x00half")
        time.sleep(600)
    else:
        pipe.send_bytes({b"ping": b"ping", b"site": sys.argv[2].encode()}.get(frame, frame[::-1]))
"""


@pytest.fixture
def fake_executor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Name of a module that runs as an executor: a frame says what it does, any other comes back reversed."""
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "fake_executor.py").write_text(_FAKE_EXECUTOR, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "modules"))
    return "fake_executor"
