# SPDX-License-Identifier: Apache-2.0
"""The gRPC health service (`grpc.health.v1`) of an agent and of a coordinator.

Promises that SERVING means "did its work a moment ago", as its checks say, and that a check that raises or hangs counts
as NOT_SERVING.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Self

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from veil.common.errors import InputError

_log = logging.getLogger(__name__)
_PERIOD_S = 1.0
_STALE_S = 5.0

Check = Callable[[], bool]


def serving(address: str, service: str = "", timeout_s: float = 5.0) -> bool:
    """Ask a health service, as a container engine does.

    Args:
        address: host:port.
        service: the check's name; the empty name is all of them together.
        timeout_s: how long to wait for the answer.
    """
    with grpc.insecure_channel(address) as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(service=service), timeout=timeout_s
            )
        except grpc.RpcError:
            return False
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


class HealthServer:
    """Serves the state of named checks; the empty name is all of them together.

    Args:
        address: host:port to listen on; "" only checks and serves nothing.
        checks: service name to what tells whether it works.

    Raises:
        InputError: when the address cannot be bound.
    """

    def __init__(self, address: str, checks: Mapping[str, Check]) -> None:
        self._checks = dict(checks)
        self._checked_at = dict.fromkeys(self._checks, -math.inf)
        self._ended = threading.Event()
        self._service = health.HealthServicer()
        self._server = grpc.server(ThreadPoolExecutor(max_workers=4), options=[("grpc.so_reuseport", 0)])
        health_pb2_grpc.add_HealthServicer_to_server(self._service, self._server)
        try:
            self.port = int(self._server.add_insecure_port(address)) if address else 0
        except RuntimeError:
            raise InputError(
                f"health address {address}", "an address that is free", "choose another, or end who uses it"
            ) from None

    def __enter__(self) -> Self:
        """Start to serve and to check."""
        self._set_all()
        self._server.start()
        for name in self._checks:
            threading.Thread(target=self._check, args=(name,), daemon=True).start()
        threading.Thread(target=self._publish, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Say NOT_SERVING and stop."""
        self._ended.set()
        self._service.enter_graceful_shutdown()
        self._server.stop(grace=0.5).wait()

    def working(self) -> dict[str, bool]:
        """Which checks passed within the last seconds."""
        now = time.monotonic()
        return {name: now - at < _STALE_S for name, at in self._checked_at.items()}

    def _check(self, name: str) -> None:
        """One check over and over, in a thread of its own: one that hangs holds up no other."""
        while not self._ended.is_set():
            try:
                if self._checks[name]():
                    self._checked_at[name] = time.monotonic()
                else:
                    self._checked_at[name] = -math.inf
            except Exception:
                self._checked_at[name] = -math.inf
                _log.exception("the health check %s failed", name)
            self._ended.wait(_PERIOD_S)

    def _publish(self) -> None:
        while not self._ended.wait(_PERIOD_S / 4):
            self._set_all()

    def _set_all(self) -> None:
        working = self.working()
        for name, fine in {**working, "": all(working.values())}.items():
            status = health_pb2.HealthCheckResponse.SERVING if fine else health_pb2.HealthCheckResponse.NOT_SERVING
            self._service.set(name, status)
