# SPDX-License-Identifier: Apache-2.0
"""Tests of `veil.client.metrics`: what Prometheus reads is what the agent did, and whether its parts work."""

from __future__ import annotations

import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from veil.client.agent import Tally
from veil.client.metrics import serve_metrics
from veil.common.errors import InputError


def free_address() -> str:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return f"127.0.0.1:{listener.getsockname()[1]}"


@contextmanager
def served(tally: Tally, working: Mapping[str, bool]) -> Iterator[str]:
    address = free_address()
    end = serve_metrics(address, tally, lambda: working)
    try:
        yield f"http://{address}/metrics"
    finally:
        end()


def read(url: str) -> dict[tuple[str, str], float]:
    text = httpx.get(url, trust_env=False).raise_for_status().text
    return {
        (sample.name, next(iter(sample.labels.values()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_outcomes_and_states_are_told_as_they_are_now() -> None:
    tally, working = Tally(released=3, refused={"budget": 2}), {"executor": True, "disk": False}
    with served(tally, working) as url:
        assert read(url) == {
            ("veil_site_rounds_total", "released"): 3.0,
            ("veil_site_rounds_total", "budget"): 2.0,
            ("veil_site_working", "executor"): 1.0,
            ("veil_site_working", "disk"): 0.0,
        }
        tally.released, working["disk"] = 4, True
        later = read(url)
    assert later["veil_site_rounds_total", "released"] == 4.0
    assert later["veil_site_working", "disk"] == 1.0


def test_nothing_but_the_agent_s_own_numbers_is_served() -> None:
    """No job names, no process or platform metrics of the library."""
    with served(Tally(last={"job": "secret-study", "outcome": "released"}), {}) as url:
        assert "secret-study" not in httpx.get(url, trust_env=False).text
        assert set(read(url)) == {("veil_site_rounds_total", "released")}


def test_an_ended_server_answers_no_more() -> None:
    with served(Tally(), {}) as url:
        read(url)
    with pytest.raises(httpx.ConnectError):
        httpx.get(url, trust_env=False)


def test_an_address_in_use_is_said_so() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        with pytest.raises(InputError, match=r"agent\.metrics_address = 127"):
            serve_metrics(address, Tally(), dict)


@pytest.mark.parametrize("address", ["127.0.0.1:99999", "256.0.0.1:1"])
def test_an_address_that_cannot_be_is_said_so(address: str) -> None:
    with pytest.raises(InputError, match="metrics_address"):
        serve_metrics(address, Tally(), dict)
