# SPDX-License-Identifier: Apache-2.0
"""SIGKILL of every process at every phase, and processes that hang: the run ends well and the books are right."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any

import pytest

from veil.common.health import serving
from veil.server.jobs import Phase

LINK, RUNNER = "veil.server.link_server", "veil.server.runner"


def strike(clinics: Any, victim: str) -> None:
    """Kill a part; what an operator restarts, is started again."""
    deployment = clinics.deployment
    if victim == "agent":
        deployment.kill("Aachen")
        deployment.start_site("Aachen")
    elif victim == "executor":
        os.kill(clinics.executor("Aachen"), signal.SIGKILL)
    elif victim == "coordinator":
        deployment.kill("coordinator")
        deployment.start_coordinator()
    else:
        os.kill(clinics.server_part({"link": LINK, "runner": RUNNER}[victim]), signal.SIGKILL)


VICTIMS = ("agent", "executor", "runner", "link", "coordinator")
SAMPLE = (("agent", "runner", "link"), ("coordinator", "executor", "agent"))
"""Whom a run of the tests kills, and in which moment; `make test-long` kills everyone in all three."""


@pytest.mark.parametrize(
    "victims", [*SAMPLE, *(pytest.param((victim,) * 3, marks=pytest.mark.long) for victim in VICTIMS)], ids="-".join
)
def test_killed_while_the_run_is_offered_in_the_first_round_and_in_the_middle(
    clinics: Any, victims: tuple[str, str, str], freeze: Callable[[int], None]
) -> None:
    """The run stays offered for as long as Celle does not answer."""
    offered, first, middle = victims
    clinics.at_work()
    celle = clinics.deployment.processes["Celle"].pid
    freeze(celle)
    job = clinics.submit(clinics.plan(rounds=16))
    clinics.deployment.wait_for(lambda: job.status.sites.get("Bonn") == "ready", "Bonn's answer")
    assert job.status.phase.value == "offering"
    strike(clinics, offered)
    os.kill(celle, signal.SIGCONT)
    clinics.deployment.wait_for(lambda: job.status.phase is Phase.TRAINING, "the first round")
    strike(clinics, first)
    clinics.reach(job, 4)
    strike(clinics, middle)
    state = clinics.finish(job)
    assert state.cohort == ("Aachen", "Bonn", "Celle")
    afterwards = {record.round: record.sites for record in state.records[4:]}
    assert ("Aachen", "Bonn", "Celle") in afterwards.values(), f"the victim takes part again: {state.records}"


@pytest.mark.long
def test_a_site_killed_for_good_is_left_behind(clinics: Any) -> None:
    job = clinics.submit(clinics.plan(round_timeout_s=5))
    clinics.reach(job, 3)
    clinics.deployment.kill("Bonn")
    state = clinics.finish(job)
    assert state.records[-1].sites == ("Aachen", "Celle")


@pytest.mark.long
def test_too_few_sites_end_the_run_and_it_can_be_resumed(clinics: Any) -> None:
    job = clinics.submit(clinics.plan(round_timeout_s=8))
    clinics.reach(job, 2)
    for name in ("Aachen", "Bonn"):
        clinics.deployment.kill(name)
    clinics.deployment.finish(job, 60)
    assert job.status.phase is Phase.FAILED
    assert "min_sites" in job.status.message
    clinics.mend()
    clinics.connected("Aachen", "Bonn", "Celle")
    job.resume()
    clinics.finish(job)


def test_a_hung_executor_is_seen_ended_and_replaced(clinics: Any, freeze: Callable[[int], None]) -> None:
    address = clinics.deployment.sites["Celle"].agent.health_address
    clinics.deployment.wait_for(lambda: serving(address), "a healthy agent")
    freeze(clinics.executor("Celle"))
    clinics.deployment.wait_for(lambda: not serving(address), "the hung executor noticed")
    assert serving(address, "veil.site.connection"), "the process is up and connected, and yet does not work"
    job = clinics.submit(clinics.plan(rounds=10))
    state = clinics.finish(job)
    assert "Celle" in state.records[-1].sites or "Celle" in state.declined
    clinics.deployment.wait_for(lambda: serving(address), "a new executor")


@pytest.mark.long
def test_a_straggler_misses_a_round_and_is_not_counted_twice(clinics: Any, freeze: Callable[[int], None]) -> None:
    job = clinics.submit(clinics.plan(rounds=12, round_timeout_s=4))
    clinics.reach(job, 2)
    executor = clinics.executor("Celle")
    freeze(executor)
    done = job.status.rounds_done
    clinics.reach(job, done + 1)
    os.kill(executor, signal.SIGCONT)
    state = clinics.finish(job)
    missed = [record.round for record in state.records if "Celle" not in record.sites]
    assert missed
    assert state.records[-1].sites == ("Aachen", "Bonn", "Celle")


@pytest.mark.long
def test_an_agent_that_hangs_does_not_hold_up_the_run(clinics: Any, freeze: Callable[[int], None]) -> None:
    job = clinics.submit(clinics.plan(rounds=5, round_timeout_s=4))
    clinics.reach(job, 2)
    freeze(clinics.deployment.processes["Celle"].pid)
    state = clinics.finish(job)
    assert "Celle" not in state.records[-1].sites
