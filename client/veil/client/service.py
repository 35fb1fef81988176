# SPDX-License-Identifier: Apache-2.0
"""`veil site start`: the agent with its executor, health service and metrics, until it is told to stop.

Promises that the executor is tried before the coordinator hears of the site, that every part ends with it, and that
agent and executor load their libraries at the same time.
"""

from __future__ import annotations

import contextlib
import logging
import os
import ssl
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from veil.client.site_file import SiteFile
from veil.client.workbench import EXECUTOR, Workbench
from veil.common.errors import InputError, RunError
from veil.common.keys import NodeKey

if TYPE_CHECKING:
    from veil.client.agent import Agent

_FREE_BYTES = 64 << 20
"""Disk space below which the site no longer counts as working."""

_log = logging.getLogger(__name__)


def serve_site(path: Path, file: SiteFile, stop: threading.Event, *, executor: str = EXECUTOR) -> None:
    """Run one site's agent.

    Args:
        path: the site file.
        file: what it says.
        stop: set to end.
        executor: module of the executor; only rehearsals name another than the site's own.

    Raises:
        VeilError: when it cannot begin.
    """
    key, ca = NodeKey.load(file.agent.key), _read_ca(file)
    file.agent.state.mkdir(parents=True, exist_ok=True, mode=0o700)
    os.environ["HF_HUB_OFFLINE"] = "1"  # inherited by the executor: no delivered configuration makes it call a hub
    workbench = Workbench(path.absolute(), file.agent.round_timeout_s, executor)
    with contextlib.ExitStack() as stack:
        stack.callback(workbench.close)
        workbench.begin()
        _serve(file, key, ca, workbench, stack).run(stop)


def _serve(file: SiteFile, key: NodeKey, ca: bytes, workbench: Workbench, stack: contextlib.ExitStack) -> Agent:
    """The agent behind its health service and metrics, once its executor answers."""
    from veil.client.agent import Agent
    from veil.client.connection import Connection
    from veil.client.metrics import serve_metrics
    from veil.common.health import HealthServer

    agent = Agent(
        site=file.name,
        connect=lambda: Connection(file.coordinator.address, ca, key, file.agent.node),
        workbench=workbench,
        status_file=file.agent.status,
        counts=file.limits.release_counts,
    )
    checks = {
        "veil.site.connection": agent.connected,
        "veil.site.executor": workbench.works,
        "veil.site.disk": lambda: _free_bytes(file.agent.state) > _FREE_BYTES,
    }
    _try_executor(workbench)
    health = HealthServer(file.agent.health_address, checks)
    stack.enter_context(health)
    if file.agent.metrics_address:
        stack.callback(serve_metrics(file.agent.metrics_address, agent.tally, health.working))
    return agent


def _try_executor(workbench: Workbench) -> None:
    """Fail early: a ledger in use, a missing key or a damaged file ends the agent with its message."""
    if not workbench.works():
        raise RunError(
            "the executor does not start", "a site that can be opened", "read the lines above; veil site doctor looks"
        )


def _read_ca(file: SiteFile) -> bytes:
    try:
        pem = file.coordinator.ca.read_bytes()
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=pem.decode("ascii"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"coordinator.ca = {file.coordinator.ca} ({error})",
            "the certificate that the coordinator's operator gave",
            "veil site init takes it from the invitation",
        ) from None
    return pem


def _free_bytes(folder: Path) -> int:
    disk = os.statvfs(folder)
    return disk.f_bavail * disk.f_frsize
