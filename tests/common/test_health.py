# SPDX-License-Identifier: Apache-2.0
"""Tests of `veil.common.health`: SERVING means that every check passed a moment ago, over a real channel."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from veil.common import health
from veil.common.errors import InputError
from veil.common.health import HealthServer

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
ADDRESS = "127.0.0.1:0"
DEADLINE_S = 20.0
"""After which a test gives up; none waits so long when all is well."""


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checks every 10 ms, that are old after half a second."""
    monkeypatch.setattr(health, "_PERIOD_S", 0.01)
    monkeypatch.setattr(health, "_STALE_S", 0.5)


class Asking:
    """A client of a health server."""

    def __init__(self, channel: grpc.Channel) -> None:
        self._stub = health_pb2_grpc.HealthStub(channel)

    def now(self, name: str = "") -> int:
        request = health_pb2.HealthCheckRequest(service=name)
        return int(self._stub.Check(request, timeout=DEADLINE_S).status)

    def comes(self, status: int, name: str = "") -> bool:
        """Whether a service gets to a status, as a watcher is told."""
        return any(told == status for told in self.told(name))

    def told(self, name: str = "") -> Iterator[int]:
        """What a watcher is told."""
        request = health_pb2.HealthCheckRequest(service=name)
        for answer in self._stub.Watch(request, timeout=DEADLINE_S):
            yield int(answer.status)


@contextmanager
def asking(server: HealthServer) -> Iterator[Asking]:
    with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        yield Asking(channel)


def test_all_checks_pass() -> None:
    with HealthServer(ADDRESS, {"link": lambda: True, "runs": lambda: True}) as server, asking(server) as ask:
        assert all(ask.comes(SERVING, name) for name in ("link", "runs", ""))
        assert ask.now() == SERVING


def test_one_check_that_fails_is_the_whole_that_fails() -> None:
    with HealthServer(ADDRESS, {"link": lambda: False, "runs": lambda: True}) as server, asking(server) as ask:
        assert ask.comes(SERVING, "runs")
        assert (ask.now("link"), ask.now("")) == (NOT_SERVING, NOT_SERVING)
        assert server.working()["link"] is False


def test_what_fails_and_recovers_is_told_at_once() -> None:
    fine = [True]
    with HealthServer(ADDRESS, {"link": lambda: fine[0]}) as server, asking(server) as ask:
        assert ask.comes(SERVING)
        fine[0] = False
        assert ask.comes(NOT_SERVING)
        fine[0] = True
        assert ask.comes(SERVING)


def test_a_check_that_raises_does_not_serve_and_is_asked_again(caplog: pytest.LogCaptureFixture) -> None:
    broken = [True]

    def check() -> bool:
        if broken[0]:
            raise OSError("the disk is gone")
        return True

    with HealthServer(ADDRESS, {"link": check, "runs": lambda: True}) as server, asking(server) as ask:
        assert ask.comes(SERVING, "runs")
        assert ask.now("link") == NOT_SERVING
        assert "the health check link failed" in caplog.text
        assert "the disk is gone" in caplog.text
        broken[0] = False
        assert ask.comes(SERVING, "link")


def test_a_check_that_hangs_does_not_serve_and_holds_up_no_other() -> None:
    hang, release = threading.Event(), threading.Event()

    def check() -> bool:
        if hang.is_set():
            release.wait(DEADLINE_S)
        return True

    with HealthServer(ADDRESS, {"link": check, "runs": lambda: True}) as server, asking(server) as ask:
        assert ask.comes(SERVING)
        hang.set()
        assert ask.comes(NOT_SERVING, "link")
        assert ask.comes(NOT_SERVING, "")
        assert ask.comes(SERVING, "runs")
        release.set()
        hang.clear()
        assert ask.comes(SERVING, "")


def test_before_the_first_check_nothing_serves_even_on_a_machine_that_just_started(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The monotonic clock starts at zero with the machine."""
    release = threading.Event()
    server = HealthServer(ADDRESS, {"link": lambda: release.wait(DEADLINE_S)})
    with monkeypatch.context() as patch:
        patch.setattr(time, "monotonic", lambda: 0.25)
        assert server.working() == {"link": False}
    with server, asking(server) as ask:
        assert ask.now("link") == ask.now("") == NOT_SERVING
        release.set()
        assert ask.comes(SERVING)


def test_an_unknown_service_is_not_found() -> None:
    with HealthServer(ADDRESS, {"link": lambda: True}) as server, asking(server) as ask:
        with pytest.raises(grpc.RpcError) as error:
            ask.now("other")
        assert code(error.value) is grpc.StatusCode.NOT_FOUND


def test_after_the_end_nobody_answers() -> None:
    with HealthServer(ADDRESS, {"link": lambda: True}) as server, asking(server) as ask:
        assert ask.comes(SERVING)
    with asking(server) as ask, pytest.raises(grpc.RpcError) as error:
        ask.now()
    assert code(error.value) is grpc.StatusCode.UNAVAILABLE


def test_a_watcher_is_not_left_believing() -> None:
    """It hears NOT_SERVING, or where that comes too late, that the line is cut."""
    watching = threading.Event()
    heard: list[object] = []

    def watch(ask: Asking) -> None:
        try:
            for status in ask.told():
                heard.append(status)
                watching.set()
        except grpc.RpcError as error:
            heard.append(code(error))

    server = HealthServer(ADDRESS, {"link": lambda: True})
    with asking(server) as ask:
        with server:
            assert ask.comes(SERVING)
            listening = threading.Thread(target=watch, args=(ask,))
            listening.start()
            assert watching.wait(DEADLINE_S)
        listening.join()
    assert heard[0] == SERVING
    assert heard[-1] in (NOT_SERVING, grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)


@pytest.mark.parametrize("address", ["127.0.0.1:{port}", "256.0.0.1:80", "127.0.0.1:x"])
def test_an_address_that_cannot_be_had_is_named(address: str) -> None:
    with HealthServer(ADDRESS, {}) as server:
        wanted = address.format(port=server.port)
        with pytest.raises(InputError, match=f"health address {wanted}"):
            HealthServer(wanted, {})


def code(error: BaseException) -> grpc.StatusCode:
    assert isinstance(error, grpc.Call)
    found: Callable[[], grpc.StatusCode] = error.code
    return found()
