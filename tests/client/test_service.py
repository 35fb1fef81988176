# SPDX-License-Identifier: Apache-2.0
"""Tests of `veil.client.service`: an agent with all its parts, from its start to its end; the executor is a fake."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from veil.client import agent as agent_module
from veil.client import service
from veil.client.service import serve_site
from veil.client.site_file import read_site_file
from veil.client.standing import standing
from veil.client.workbench import Workbench
from veil.common.errors import InputError, RunError
from veil.common.health import serving

MakeHome = Callable[..., Path]
PATIENCE_S = 20.0


def free_addresses(count: int) -> list[str]:
    listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    addresses = [f"127.0.0.1:{listener.getsockname()[1]}" for listener in listeners]
    for listener in listeners:
        listener.close()
    return addresses


def wait_until(what: str, true: Callable[[], bool]) -> None:
    pause = threading.Event()
    for _ in range(int(PATIENCE_S / 0.02)):
        if true():
            return
        pause.wait(0.02)
    pytest.fail(f"{what} did not come within {PATIENCE_S:g} s")


@pytest.fixture
def benches(monkeypatch: pytest.MonkeyPatch) -> list[Workbench]:
    """Every workbench that a service makes."""
    made: list[Workbench] = []

    class Seen(Workbench):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            made.append(self)

    monkeypatch.setattr(service, "Workbench", Seen)
    monkeypatch.setattr(agent_module, "_RETRY_S", (0.05, 0.05))
    return made


@contextmanager
def running(home: Path, executor: str) -> Iterator[None]:
    stop = threading.Event()
    path = home / "site.toml"
    thread = threading.Thread(target=serve_site, args=(path, read_site_file(path), stop), kwargs={"executor": executor})
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(PATIENCE_S)
        assert not thread.is_alive()


def metrics(address: str) -> str:
    try:
        return httpx.get(f"http://{address}/metrics", trust_env=False).text
    except httpx.ConnectError:
        return ""


def test_all_parts_work_and_end_together(make_home: MakeHome, fake_executor: str, benches: list[Workbench]) -> None:
    """The coordinator is away: that part says so, the others work."""
    health, page = free_addresses(2)
    home = make_home(agent={"health_address": health, "metrics_address": page})
    with running(home, fake_executor):
        for part in ("executor", "disk"):
            wait_until(part, lambda part=part: serving(health, f"veil.site.{part}"))  # type: ignore[misc]
        assert not serving(health, "veil.site.connection")
        assert not serving(health)
        wait_until("metrics", lambda: 'veil_site_working{part="veil.site.executor"} 1.0' in metrics(page))
        assert 'veil_site_working{part="veil.site.connection"} 0.0' in metrics(page)
        assert standing(read_site_file(home / "site.toml")).agent.startswith("not connected")
        (bench,) = benches
        pid = bench.pid
        assert pid is not None
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert not serving(health, "veil.site.disk")
    assert metrics(page) == ""
    assert (home / "state").stat().st_mode & 0o777 == 0o700


def test_without_addresses_nothing_is_served_to_others(
    make_home: MakeHome, fake_executor: str, benches: list[Workbench], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("veil.client.metrics.serve_metrics", lambda *_: pytest.fail("no metrics were asked for"))
    with running(make_home(), fake_executor):
        wait_until("the executor", lambda: bool(benches) and benches[0].pid is not None)


def test_an_executor_that_does_not_start_ends_the_agent_before_the_coordinator_hears_of_it(
    make_home: MakeHome, fake_executor: str, benches: list[Workbench], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "veil.client.connection.Connection", lambda *_: pytest.fail("the coordinator must not hear of it")
    )
    home = make_home()
    with pytest.raises(RunError, match="the executor does not start"):
        serve_site(home / "site.toml", read_site_file(home / "site.toml"), threading.Event(), executor="no_such_module")
    assert benches[0].pid is None


@pytest.mark.parametrize("missing", ["node.key", "coordinator.pem"])
def test_a_missing_file_is_said_before_anything_starts(
    missing: str, make_home: MakeHome, benches: list[Workbench]
) -> None:
    home = make_home()
    (home / "keys" / missing).unlink()
    with pytest.raises(InputError, match=missing):
        serve_site(home / "site.toml", read_site_file(home / "site.toml"), threading.Event())
    assert benches == []


@pytest.mark.parametrize("content", [b"", b"no certificate", b"\xff\xfe"])
def test_an_authority_s_file_that_is_not_usable_is_said_before_anything_starts(
    content: bytes, make_home: MakeHome, benches: list[Workbench]
) -> None:
    home = make_home()
    (home / "keys" / "coordinator.pem").write_bytes(content)
    with pytest.raises(InputError, match=r"coordinator\.ca = "):
        serve_site(home / "site.toml", read_site_file(home / "site.toml"), threading.Event())
    assert benches == []


@pytest.mark.parametrize("setting", ["health_address", "metrics_address"])
def test_an_address_in_use_ends_the_agent_with_its_executor(
    setting: str, make_home: MakeHome, fake_executor: str, benches: list[Workbench]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        home = make_home(agent={setting: f"127.0.0.1:{listener.getsockname()[1]}"})
        file = read_site_file(home / "site.toml")
        with pytest.raises(InputError, match="address"):
            serve_site(home / "site.toml", file, threading.Event(), executor=fake_executor)
    assert benches[0].pid is None


def test_a_full_disk_is_no_working_site(
    make_home: MakeHome, fake_executor: str, benches: list[Workbench], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "_FREE_BYTES", 1 << 60)
    (health,) = free_addresses(1)
    with running(make_home(agent={"health_address": health}), fake_executor):
        wait_until("the executor", lambda: serving(health, "veil.site.executor"))
        assert not serving(health, "veil.site.disk")
