# SPDX-License-Identifier: Apache-2.0
"""A coordinator and agents as processes of their own on this machine: real TLS, real keys, real ledgers, loopback.

Promises that every process it started has ended when it is left, and that each is ended by its own process id.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from veil.client.joining import join
from veil.client.site_file import SITE_FILE, SiteFile, read_site_file
from veil.common.errors import RunError
from veil.common.invitation import Invitation
from veil.common.keys import NodeKey
from veil.common.statement import key_fingerprint
from veil.common.supervision import Child
from veil.server.home import Home, Settings
from veil.server.jobs import Job
from veil.server.link import open_link_state
from veil.server.pki import issue_certificate, make_authority
from veil.server.roster import Roster

_LOOPBACK = "127.0.0.1"
_START_S = 180.0
_POLL_S = 0.1


@dataclass(kw_only=True)
class Deployment:
    """One coordinator and its sites, below one folder.

    Attributes:
        folder: holds `coordinator`, `sites/NAME` and `log/NAME`.
        home: the coordinator's folder.
        sites: name to the site's file.
        processes: name to the running process; `coordinator`, or a site's name.
    """

    folder: Path
    home: Home
    sites: dict[str, SiteFile] = field(default_factory=dict)
    processes: dict[str, Child] = field(default_factory=dict)

    @classmethod
    def create(cls, folder: Path, **settings: Any) -> Self:
        """Make a coordinator's folder for loopback, on free ports.

        Args:
            folder: a new folder.
            settings: other settings of coordinator.toml.
        """
        link, page, health = free_ports(3)
        values = {
            "hosts": (_LOOPBACK,),
            "listen": _LOOPBACK,
            "port": link,
            "page_address": f"{_LOOPBACK}:{page}",
            "health_address": f"{_LOOPBACK}:{health}",
            **settings,
        }
        home = Home.create(folder / "coordinator", Settings(**values))
        make_authority(home.folder / "pki", "Veil on this machine")
        issue_certificate(home.folder / "pki", [_LOOPBACK])
        return cls(folder=folder, home=home)

    def __enter__(self) -> Self:
        """Start the coordinator and wait until its link answers."""
        try:
            self.start_coordinator()
        except BaseException:
            self.end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End whatever still runs."""
        self.end()

    def end(self) -> None:
        """End every process, the sites' first and all at once."""
        coordinator = self.processes.pop("coordinator", None)
        with ThreadPoolExecutor() as pool:
            list(pool.map(Child.end, self.processes.values()))
        self.processes.clear()
        if coordinator is not None:
            coordinator.end()

    def start_coordinator(self) -> None:
        """Start it and wait until its link answers.

        Raises:
            RunError: when it does not.
        """
        self._start("coordinator", "veil.simulations", ["coordinator", "start", "--home", str(self.home.folder)])
        self.wait_for(lambda: _listening(self.home.settings.port), "the coordinator's link")

    def add_site(self, name: str, *, data: Mapping[str, Any], limits: Mapping[str, Any], **agent: Any) -> SiteFile:
        """Invite and enrol a site; the coordinator must run.

        Args:
            name: the site's.
            data: its `[data]`.
            limits: its `[limits]`.
            agent: further keys of its `[agent]`.
        """
        invitation = self.invite(name)
        answers = {"data": data, "limits": limits, "agent": {"health_address": "", "metrics_address": "", **agent}}
        self.sites[name] = join(invitation, self.site_folder(name), lambda: answers)
        return self.sites[name]

    def introduce(self) -> None:
        """Pin every site's key at every other, as their operators do after they read them out to each other."""
        pins = {name: key_fingerprint(NodeKey.load(file.agent.key).public_pem) for name, file in self.sites.items()}
        for name in self.sites:
            path = self.site_folder(name) / SITE_FILE
            lines = [f"{json.dumps(other)} = {json.dumps(pin)}\n" for other, pin in pins.items() if other != name]
            with path.open("a", encoding="utf-8") as file:
                file.write("\n[peers]\n" + "".join(lines))
            self.sites[name] = read_site_file(path)

    def invite(self, name: str) -> Invitation:
        """An invitation for a site, as the coordinator's operator makes it."""
        ca = self.home.path(self.home.settings.ca).read_text(encoding="ascii")
        with closing(Roster(self.home.roster, open_link_state(self.home.database).state())) as roster:
            return roster.invite(name, self.home.url, ca, valid_days=1)

    def start_site(self, name: str, *, fixed_noise: bool = False) -> None:
        """Start a site's agent; with repeatable noise, which is not private, only in a rehearsal."""
        path = self.site_folder(name) / SITE_FILE
        if fixed_noise:
            self._start(name, "veil.simulations.fixed_noise_agent", [str(path)])
        else:
            self._start(name, "veil.simulations", ["site", "start", "--home", str(path.parent)])

    def kill(self, name: str) -> None:
        """End a process as a power cut would."""
        self.processes.pop(name).kill()

    def site_folder(self, name: str) -> Path:
        """A site's folder."""
        return self.folder / "sites" / name

    def log(self, name: str) -> str:
        """What a process wrote so far, all its lives."""
        return (self.folder / "log" / name).read_text(encoding="utf-8")

    def finish(self, job: Job, timeout_s: float, watch: Callable[[Job], None] = lambda job: None) -> None:
        """Wait until a run is over.

        Raises:
            RunError: when that takes too long.
        """

        def over() -> bool:
            watch(job)
            return job.status.phase.over

        self.wait_for(over, f"the end of run {job.name}", timeout_s)

    def wait_for(self, reached: Callable[[], bool], what: str, timeout_s: float = _START_S) -> None:
        """Wait for something.

        Raises:
            RunError: when it takes too long, or a process of this deployment is gone.
        """
        end = time.monotonic() + timeout_s
        while not reached():
            gone = [name for name, child in self.processes.items() if child.exit_code is not None]
            if gone or time.monotonic() > end:
                raise RunError(
                    f"{what} did not come ({', '.join(gone) or 'nothing'} ended early)",
                    f"it within {timeout_s:g} s",
                    f"read {self.folder / 'log'}",
                )
            time.sleep(_POLL_S)

    def _start(self, name: str, module: str, arguments: list[str]) -> None:
        (self.folder / "log").mkdir(exist_ok=True)
        self.processes[name] = Child(module, arguments, log=self.folder / "log" / name)


def free_ports(count: int) -> list[int]:
    """Ports of the loopback interface that nobody listens on now."""
    with ExitStack() as held:
        sockets = [held.enter_context(socket.create_server((_LOOPBACK, 0))) for _ in range(count)]
        return [int(one.getsockname()[1]) for one in sockets]


def _listening(port: int) -> bool:
    try:
        socket.create_connection((_LOOPBACK, port), timeout=1.0).close()
    except OSError:
        return False
    return True
