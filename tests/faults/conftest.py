# SPDX-License-Identifier: Apache-2.0
"""Three clinics and a coordinator as real processes over TLS, and what must hold of their books after any fault."""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from veil.client.ledger import entries_of
from veil.client.lines import LineFile
from veil.client.verification import verify
from veil.common.health import serving
from veil.common.keys import NodeKey
from veil.common.plan import RunPlan
from veil.common.schedule import schedule
from veil.server.jobs import Job, Phase
from veil.server.state import RunState
from veil.server.submission import submit
from veil.simulations.deployment import Deployment, free_ports

COLUMNS = ("age", "pulse", "weight", "height")
SITES = ("Aachen", "Bonn", "Celle")
LABELS = {"well": "well", "ill": "ill"}
FINISH_S = 180.0
"""Deadline on a machine that has more to do; whatever fails, fails before."""


def children(pid: int) -> dict[str, int]:
    """Python modules that a process runs as children, with their process ids; ended ones are left out."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                words = (entry / "cmdline").read_bytes().split(b"\0")
            except (OSError, ValueError):
                continue
            if parent == pid and b"-m" in words:
                found[words[words.index(b"-m") + 1].decode()] = int(entry.name)
    return found


@dataclass(kw_only=True)
class Clinics:
    """A deployment with words for what tests do to it.

    Attributes:
        deployment: its processes.
    """

    deployment: Deployment

    def plan(self, *, rounds: int = 8, noise: str = "local", **cohort: Any) -> RunPlan:
        return RunPlan.model_validate(
            {
                "name": "faults",
                "task": {"kind": "tabular-classification", "labels": ["well", "ill"], "width": len(COLUMNS)},
                "training": {"rounds": rounds},
                "privacy": {"target_epsilon": 2.0, "noise": noise},
                "cohort": {"min_sites": 2, "round_timeout_s": 20, **cohort},
            }
        )

    def submit(self, plan: RunPlan | None = None, sites: tuple[str, ...] = ()) -> Job:
        return submit(self.deployment.home, plan or self.plan(), base=Path.cwd(), sites=sites)

    def reach(self, job: Job, rounds: int) -> None:
        """Wait until so many rounds are in the checkpoint."""

        def reached() -> bool:
            return job.status.rounds_done >= rounds or job.status.phase.over

        self.deployment.wait_for(reached, f"round {rounds}", FINISH_S)
        assert not job.status.phase.over, f"the fault would come after the end: {job.status.message}"

    def finish(self, job: Job) -> RunState:
        """Wait for the end, which must be a good one; every ledger must tell at least what the coordinator has."""
        self.deployment.finish(job, FINISH_S)
        status = job.status
        assert status.phase is Phase.FINISHED, status.message
        state = RunState.load(job.checkpoint, job.plan)
        assert [record.round for record in state.records] == [one.round for one in schedule(job.plan)]
        assert (job.folder / "result" / "report.json").is_file()
        self.check_books(job, state)
        return state

    def check_books(self, job: Job, state: RunState) -> None:
        """No ledger under-counts, none holds two answers to one round, every chain is whole."""
        mechanisms = {one.round: one.mechanism for one in schedule(job.plan)}
        for name, file in self.deployment.sites.items():
            path, key = file.agent.ledger, NodeKey.load(file.agent.key)
            if not path.exists():
                assert not any(name in record.sites for record in state.records)
                continue
            assert verify(path, name, key.public_pem, anchor=file.agent.anchor).findings == ()
            spent = [entry for entry in entries_of(path, name) if entry.job == job.name]
            assert all(entry.mechanism == mechanisms[entry.round] and entry.noise == "os" for entry in spent)
            answered = Counter(record.round for record in state.records if name in record.sites)
            assert not answered - Counter(entry.round for entry in spent), f"{name} spent less than it released"
            assert max(self.answers(name, job).values(), default=0) <= 1

    def answers(self, name: str, job: Job) -> Counter[tuple[int, str]]:
        """How many different answers a site's ledger holds for each round of a run, and each masked sum of it."""
        with closing(LineFile(self.deployment.sites[name].agent.ledger, reading=True)) as book:
            fields = [line.fields for line in book.lines(name)]
        spends = [one for one in fields if one["kind"] == "spend" and one["job"] == job.name]
        rounds = {one["seq"]: (one["round"], one.get("masking", {}).get("session", "")) for one in spends}
        return Counter(rounds[one["spend"]] for one in fields if one["kind"] == "reply" and one["spend"] in rounds)

    def executor(self, name: str) -> int:
        """Process id of a site's executor, once it is there."""
        agent = self.deployment.processes[name].pid
        self.deployment.wait_for(lambda: "veil.client.deployed" in children(agent), f"the executor of {name}")
        return children(agent)["veil.client.deployed"]

    def server_part(self, module: str) -> int:
        """Process id of the coordinator's link or runner."""
        coordinator = self.deployment.processes["coordinator"].pid
        self.deployment.wait_for(lambda: module in children(coordinator), module)
        return children(coordinator)[module]

    def connected(self, *names: str) -> None:
        """Wait until sites are connected, as the coordinator's status shows it."""
        from veil.server.overview import Overview

        overview = Overview(self.deployment.home)

        def all_are() -> bool:
            return set(names) <= {site.name for site in overview.sites() if site.connected}

        self.deployment.wait_for(all_are, f"{names} connected")

    def mend(self) -> None:
        """Let every process that should be there be there again."""
        if "coordinator" not in self.deployment.processes:
            self.deployment.start_coordinator()
        self.restart(*(name for name in self.deployment.sites if name not in self.deployment.processes))

    def at_work(self) -> None:
        """Wait until every site is connected and its executor answers: health says working, not process up."""
        self.connected(*self.deployment.sites)
        addresses = [file.agent.health_address for file in self.deployment.sites.values()]
        self.deployment.wait_for(lambda: all(map(serving, addresses)), "every site at work", FINISH_S)

    def restart(self, *names: str) -> None:
        """Start sites and wait for each one's own word: Flower counts a killed one as connected for a while."""

        def connections() -> list[int]:
            return [self.deployment.log(name).count("connected to the coordinator") for name in names]

        before = connections()
        for name in names:
            self.deployment.start_site(name)

        def all_are_back() -> bool:
            return all(now > then for now, then in zip(connections(), before, strict=True))

        self.deployment.wait_for(all_are_back, f"{names} connected", FINISH_S)


def write_table(path: Path, seed: int, count: int = 60) -> Path:
    random = np.random.default_rng(seed)
    label = random.integers(0, 2, size=count)
    frame = pd.DataFrame(random.normal(size=(count, len(COLUMNS))) + label[:, None], columns=list(COLUMNS))
    frame.assign(outcome=np.where(label == 1, "ill", "well")).to_csv(path, index=False)
    return path


Limits = Mapping[str, Any]
LIMITS: Limits = {
    "epsilon_per_run": 4.0,
    "epsilon_lifetime": 1000.0,
    "approval": "auto-within-limits",
    "min_cohort": 2,
}


def enrol(deployment: Deployment, name: str, *, limits: Limits = LIMITS, **agent: Any) -> None:
    table = write_table(deployment.folder / f"{name}.csv", seed=sum(map(ord, name)))
    data = {"table": str(table), "features": list(COLUMNS), "label": "outcome", "labels": LABELS}
    health = f"127.0.0.1:{free_ports(1)[0]}"
    deployment.add_site(name, data=data, limits=limits, health_address=health, round_timeout_s=30.0, **agent)


@pytest.fixture(scope="session")
def open_clinics(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Deployment]:
    return lambda: Deployment.create(tmp_path_factory.mktemp("clinics"))


@pytest.fixture
def clinics_of() -> Callable[[Deployment], Clinics]:
    return lambda deployment: Clinics(deployment=deployment)


@pytest.fixture(scope="session")
def clinics(open_clinics: Callable[[], Deployment]) -> Iterator[Clinics]:
    """Three sites that grant what their limits allow, up and connected."""
    with open_clinics() as deployment:
        for name in SITES:
            enrol(deployment, name)
        deployment.introduce()
        for name in SITES:
            deployment.start_site(name)
        opened = Clinics(deployment=deployment)
        opened.connected(*SITES)
        yield opened


@pytest.fixture(autouse=True)
def _mended(request: pytest.FixtureRequest) -> Iterator[None]:
    """What one test broke is whole again before the next."""
    yield
    if "clinics" in request.fixturenames:
        clinics: Clinics = request.getfixturevalue("clinics")
        clinics.mend()
        clinics.connected(*SITES)


@pytest.fixture
def freeze() -> Iterator[Callable[[int], None]]:
    """Stop a process without ending it, at the latest until the test ends."""
    frozen: list[int] = []

    def stop(pid: int) -> None:
        os.kill(pid, signal.SIGSTOP)
        frozen.append(pid)

    yield stop
    for pid in frozen:
        try:
            os.kill(pid, signal.SIGCONT)
        except ProcessLookupError:
            continue
    time.sleep(0.1)
