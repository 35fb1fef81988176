# SPDX-License-Identifier: Apache-2.0
"""The line between a site and its coordinator: cut, restored, and with a certificate that is over."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from veil.server.pki import issue_certificate
from veil.simulations.deployment import Deployment


class Cable:
    """A TCP line that can be cut."""

    def __init__(self, target: int) -> None:
        self._target, self._listener = target, socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._listener.settimeout(0.1)
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self._whole, self._ended = True, threading.Event()
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def cut(self) -> None:
        self._whole = False
        for one in (one for pair in self._pairs for one in pair):
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def restore(self) -> None:
        self._whole = True

    def close(self) -> None:
        self._ended.set()
        self._threads[0].join()
        self.cut()
        for thread in self._threads[1:]:
            thread.join()
        for one in (one for pair in self._pairs for one in pair):
            one.close()
        self._listener.close()

    def _accept(self) -> None:
        while not self._ended.is_set():
            with suppress(OSError):
                near, _ = self._listener.accept()
                if not self._whole:
                    near.close()
                    continue
                near.settimeout(None)
                try:
                    far = socket.create_connection(("127.0.0.1", self._target))
                except OSError:
                    near.close()
                    continue
                self._pairs.append((near, far))
                for one, other in ((near, far), (far, near)):
                    self._threads.append(threading.Thread(target=_pump, args=(one, other)))
                    self._threads[-1].start()


def _pump(source: socket.socket, sink: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(65536):
            sink.sendall(data)
    for one in (source, sink):
        with suppress(OSError):
            one.shutdown(socket.SHUT_RDWR)


@pytest.fixture(scope="module")
def cable(clinics: Any) -> Iterator[Cable]:
    """Celle's line to the coordinator; whoever cuts it restores it."""
    opened = Cable(clinics.deployment.home.settings.port)
    move(clinics.deployment, opened.port)
    clinics.connected("Celle")
    yield opened
    opened.close()
    move(clinics.deployment, clinics.deployment.home.settings.port)


def move(deployment: Deployment, port: int) -> None:
    """Let Celle's agent reach the coordinator by another port."""
    if "Celle" in deployment.processes:
        deployment.processes.pop("Celle").end()
    path: Path = deployment.site_folder("Celle") / "site.toml"
    lines = [
        f'url = "https://127.0.0.1:{port}"' if one.startswith("url = ") else one for one in path.read_text().split("\n")
    ]
    path.write_text("\n".join(lines))
    deployment.start_site("Celle")


def test_an_expired_certificate_is_refused_by_every_site_and_exchanged_in_passing(
    clinics: Any, within: Callable[[str, str], None]
) -> None:
    pki = clinics.deployment.home.folder / "pki"
    issue_certificate(pki, ["127.0.0.1"], days=1, at=datetime.now(UTC) - timedelta(days=3))
    for name in ("Aachen", "Bonn", "Celle"):
        within(name, "certificate has expired")
    issue_certificate(pki, ["127.0.0.1"])
    clinics.connected("Aachen", "Bonn", "Celle")
    clinics.finish(clinics.submit(clinics.plan(rounds=2)))


@pytest.mark.long
def test_cut_and_restored_while_it_trains(clinics: Any, cable: Cable) -> None:
    job = clinics.submit(clinics.plan(rounds=10, round_timeout_s=10))
    clinics.reach(job, 2)
    cable.cut()
    clinics.deployment.wait_for(lambda: "cannot be reached" in clinics.deployment.log("Celle"), "the agent's word")
    clinics.reach(job, job.status.rounds_done + 1)
    cable.restore()
    state = clinics.finish(job)
    assert state.cohort == ("Aachen", "Bonn", "Celle")


@pytest.mark.long
def test_cut_before_the_offer_is_answered(clinics: Any, cable: Cable) -> None:
    cable.cut()
    job = clinics.submit()
    clinics.deployment.wait_for(lambda: job.status.sites.get("Bonn") == "ready", "Bonn's answer")
    cable.restore()
    state = clinics.finish(job)
    assert state.cohort == ("Aachen", "Bonn", "Celle")


@pytest.fixture
def within(clinics: Any) -> Callable[[str, str], None]:
    """Wait until a process writes some words into its log."""
    return lambda name, words: clinics.deployment.wait_for(lambda: words in clinics.deployment.log(name), words)
