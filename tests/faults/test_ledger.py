# SPDX-License-Identifier: Apache-2.0
"""The ledger of a running agent: a full disk, a second agent, an old copy put back."""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest


@contextmanager
def full_disk(pid: int, largest: int) -> Iterator[None]:
    """Let no file of a process grow beyond a size, as on a disk that is full."""
    before = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (largest, before[1]))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, before)


def veil(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "veil.simulations", *words], capture_output=True, text=True, check=False, timeout=60
    )


def test_a_full_disk_stops_the_site_before_it_trains_and_not_the_run(clinics: Any) -> None:
    job = clinics.submit(clinics.plan(rounds=10))
    clinics.reach(job, 2)
    with full_disk(clinics.executor("Celle"), 16 << 10):
        clinics.deployment.wait_for(lambda: job.status.sites.get("Celle") == "ledger", "Celle's refusal")
    state = clinics.finish(job)
    assert state.records[-1].sites == ("Aachen", "Bonn", "Celle"), "with room again, it takes part again"
    assert "disk" in clinics.deployment.log("Celle")
    assert "ledger" in json.loads(veil_status(clinics))["refused"]


def veil_status(clinics: Any) -> str:
    done = veil("site", "status", "--json", "--home", str(clinics.deployment.site_folder("Celle")))
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_second_agent_on_the_same_ledger_does_not_start(clinics: Any) -> None:
    done = veil("site", "start", "--home", str(clinics.deployment.site_folder("Bonn")))
    assert done.returncode != 0
    assert "in use" in done.stderr
    clinics.finish(clinics.submit(clinics.plan(rounds=2)))


@pytest.mark.long
def test_an_old_copy_of_the_state_is_found_out_by_the_anchor(clinics: Any, tmp_path: Path) -> None:
    deployment = clinics.deployment
    state, home = deployment.sites["Aachen"].agent.state, str(deployment.site_folder("Aachen"))
    clinics.finish(clinics.submit(clinics.plan(rounds=2)))
    stop(deployment, "Aachen")
    shutil.copytree(state, tmp_path / "old")
    deployment.start_site("Aachen")
    clinics.connected("Aachen")
    clinics.finish(clinics.submit(clinics.plan(rounds=2)))
    stop(deployment, "Aachen")
    with put_back({state: tmp_path / "old"}):
        done = veil("site", "start", "--home", home)
        assert done.returncode != 0
        assert "anchor remembers" in done.stderr
        found = veil("site", "ledger", "verify", "--home", home)
        assert found.returncode == 4
        assert "anchor" in found.stdout


@pytest.mark.long
def test_an_old_copy_with_its_old_anchor_is_found_out_by_the_coordinator(clinics: Any, tmp_path: Path) -> None:
    deployment, agent = clinics.deployment, clinics.deployment.sites["Aachen"].agent
    job = clinics.submit(clinics.plan(rounds=12))
    clinics.reach(job, 2)
    stop(deployment, "Aachen")
    shutil.copytree(agent.state, tmp_path / "state")
    shutil.copy2(agent.anchor, tmp_path / "anchor")
    deployment.start_site("Aachen")
    clinics.reach(job, job.status.rounds_done + 2)
    deployment.wait_for(lambda: job.status.sites.get("Aachen") == "replied", "an answer that the copy does not hold")
    stop(deployment, "Aachen")
    with put_back({agent.state: tmp_path / "state", agent.anchor: tmp_path / "anchor"}):
        deployment.start_site("Aachen")
        deployment.wait_for(lambda: job.status.sites.get("Aachen") == "ledger", "the refusal")
        stop(deployment, "Aachen")
    deployment.start_site("Aachen")
    clinics.finish(job)


@contextmanager
def put_back(copies: dict[Path, Path]) -> Iterator[None]:
    """Older copies in the place of files and folders, for as long as the block lasts."""
    for place, copy in copies.items():
        place.rename(place.with_name(f"{place.name}.newest"))
        copy.rename(place)
    yield
    for place, copy in copies.items():
        place.rename(copy)
        place.with_name(f"{place.name}.newest").rename(place)


def stop(deployment: Any, name: str) -> None:
    deployment.processes.pop(name).end()
