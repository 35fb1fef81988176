# SPDX-License-Identifier: Apache-2.0
"""Distributed noise over real agents: whole sums or none, also when a site is killed in the middle of a run."""

from __future__ import annotations

import json
from contextlib import closing
from typing import Any

import pytest

from veil.client.books import total_alone
from veil.client.ledger import entries_of, total
from veil.client.lines import LineFile


@pytest.mark.long
def test_a_site_killed_in_the_middle_ends_one_attempt_and_the_others_pay_for_it(clinics: Any) -> None:
    clinics.at_work()
    job = clinics.submit(clinics.plan(noise="distributed", rounds=12, round_timeout_s=6))
    clinics.reach(job, 4)
    clinics.deployment.kill("Bonn")
    state = clinics.finish(job)
    attempts = {record.round: record.attempts for record in state.records}
    broken = [round_ for round_, count in attempts.items() if count == 2]
    assert len(broken) == 1 and set(attempts.values()) == {1, 2}
    assert state.records[broken[0]].sites == state.records[-1].sites == ("Aachen", "Celle")
    for name in ("Aachen", "Celle"):
        entries = [one for one in entries_of(clinics.deployment.sites[name].agent.ledger, name) if one.job == job.name]
        assert len(entries) == len(state.records) + 1
        assert [one.shares.sites for one in entries if one.shares].count(3) == broken[0] + 1
        assert total(entries, 1e-5).epsilon <= 2.0 < total_alone(entries, 1e-5).epsilon
    certificate = json.loads((job.folder / "result" / "certificate.json").read_text(encoding="utf-8"))
    assert set(certificate["statements"]) == {"Aachen", "Celle"}


def test_a_key_that_nobody_pinned_keeps_everybody_else_out(clinics: Any) -> None:
    """Celle's operator lost the key and enrolled anew: its partners refuse to mask against it."""
    clinics.at_work()
    file = clinics.deployment.sites["Celle"]
    path = file.folder / "site.toml"
    before = path.read_text(encoding="utf-8")
    pinned = file.peers["Aachen"]
    clinics.deployment.kill("Celle")
    path.write_text(before.replace(pinned, "0" * 64), encoding="utf-8")
    try:
        clinics.restart("Celle")
        job = clinics.submit(clinics.plan(noise="distributed", round_timeout_s=6, min_sites=3))
        clinics.deployment.finish(job, 60)
        assert job.status.phase.value == "failed" and "Celle: policy" in job.status.message
        with closing(LineFile(file.agent.ledger, reading=True)) as book:
            assert not [line for line in book.lines("Celle") if line.fields.get("job") == job.name]
    finally:
        clinics.deployment.kill("Celle")
        path.write_text(before, encoding="utf-8")
