# SPDX-License-Identifier: Apache-2.0
"""`veil coordinator start`: the link, a runner for each run under way, and what tells how they are.

Promises that a lost or hung child is replaced, that a run goes on from its checkpoint, also after the whole machine was
off, and that no two coordinators work on one folder.
"""

from __future__ import annotations

import fcntl
import logging
import os
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

from veil.common.errors import InputError
from veil.common.supervision import Child
from veil.server.home import PULSE_PATH, Home
from veil.server.jobs import Job, Phase

MOST_RUNNERS = 4
"""Runs that are under way at once; the others wait their turn."""

HUNG_S = 300.0
"""A runner that does nothing for so long is replaced."""

HUNG_LINK_S = 30.0
"""A link that does not answer for so long is replaced."""

MOST_LOSSES = 5
"""A run whose runner was lost so often without a round in between is given up."""

_TICK_S = 0.2
_ASK_LINK_S = 5.0
_RESTART_S = 1.0

_log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class _Runner:
    """A runner and what is remembered of those before it."""

    child: Child
    rounds_done: int
    losses: int = 0


@dataclass(kw_only=True)
class Supervisor:
    """The processes of one coordinator.

    Attributes:
        home: its folder.
        spawn: makes a child process of a module and its command line.
    """

    home: Home
    spawn: Callable[[str, Sequence[str]], Child] = Child
    _link: Child | None = None
    _asked_link: float = 0.0
    _link_answered: float = 0.0
    _certified: float = 0.0
    _runners: dict[str, _Runner] = field(default_factory=dict)

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """The right to work on the folder.

        Raises:
            InputError: when another coordinator has it.
        """
        handle = os.open(self.home.pid_file, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            other = os.read(handle, 32).decode("ascii", "replace").strip()
            os.close(handle)
            raise InputError(
                f"{self.home.folder} is in use by process {other}",
                "one coordinator for one folder",
                "end that process first",
            ) from None
        os.ftruncate(handle, 0)
        os.write(handle, str(os.getpid()).encode("ascii"))
        try:
            yield
        finally:
            os.close(handle)

    def begin(self) -> None:
        """Start the link and do not wait: its libraries load while the coordinator loads its own.

        What fails is tried again, and told, by `run`.
        """
        with suppress(OSError):
            self._keep_link()

    def end(self) -> None:
        """End the children."""
        for runner in self._runners.values():
            runner.child.end()
        if self._link is not None:
            self._link.end()

    def run(self, stop: threading.Event) -> None:
        """Keep everything going until told to stop; then end the children."""
        try:
            while not stop.is_set():
                for keep in (self._keep_link, self._keep_runners):
                    try:
                        keep()
                    except OSError as error:
                        _log.error("the coordinator's folder cannot be used now: %s", error)
                stop.wait(_TICK_S)
        finally:
            self.end()

    def link_works(self) -> bool:
        """Whether the link answers with a certificate that sites accept, and can read its database."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.load_verify_locations(cafile=self.home.path(self.home.settings.ca))
        return self._link_answers(context)

    def _link_answers(self, context: ssl.SSLContext) -> bool:
        listen = self.home.settings.listen
        address = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(listen, listen)  # noqa: S104 - compared, not listened on
        host = f"[{address}]" if ":" in address else address
        import httpx

        try:
            with httpx.Client(verify=context, trust_env=False, timeout=3.0) as client:
                return client.get(f"https://{host}:{self.home.settings.port}{PULSE_PATH}").status_code == 204
        except httpx.HTTPError:
            return False

    def runs_work(self) -> bool:
        """Whether every runner did something lately."""
        now = time.time()
        under_way = [job for job in Job.all(self.home.runs) if job.name in self._runners]
        return all(now - job.beat_at < HUNG_S for job in under_way)

    def _keep_link(self) -> None:
        certified = self._exchanged_at()
        if self._link is not None:
            if self._link.exit_code is not None:
                _log.error("the link ended with code %s", self._link.exit_code)
            elif self._link_hangs():
                _log.error("the link hangs; it is replaced")
                self._link.kill()
            elif certified == self._certified:
                return
            else:
                _log.info("the certificate was exchanged; the link starts anew with it")
                self._link.end()
            time.sleep(max(0.0, self._link.started_at + _RESTART_S - time.monotonic()))
        self._certified, self._link_answered = certified, time.monotonic()
        self._link = self.spawn("veil.server.link_server", [str(self.home.folder)])

    def _link_hangs(self) -> bool:
        """Whether the link has not answered for long, whatever its certificate says."""
        now = time.monotonic()
        if self._link is None or now - self._asked_link < _ASK_LINK_S:
            return False
        self._asked_link = now
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        if self._link_answers(context):
            self._link_answered = now
        return now - self._link_answered > HUNG_LINK_S

    def _exchanged_at(self) -> float:
        """When the certificate was last exchanged; as before while it is missing, which is the midst of an exchange."""
        try:
            return self.home.path(self.home.settings.certificate).stat().st_mtime
        except FileNotFoundError:
            return self._certified

    def _keep_runners(self) -> None:
        for job in Job.all(self.home.runs):
            phase = job.status.phase
            runner = self._runners.get(job.name)
            if runner is not None and runner.child.exit_code is None:
                self._end_if_hung(job, runner)
            elif runner is not None:
                self._after(job, runner)
            elif not phase.over and len(self._runners) < MOST_RUNNERS:
                self._start(job, losses=0)

    def _start(self, job: Job, losses: int) -> None:
        job.beat()
        child = self.spawn("veil.server.runner", [str(self.home.folder), job.name])
        self._runners[job.name] = _Runner(child=child, rounds_done=job.status.rounds_done, losses=losses)

    def _end_if_hung(self, job: Job, runner: _Runner) -> None:
        if time.time() - job.beat_at > HUNG_S:
            _log.error("the runner of %s hangs; it is replaced", job.name)
            runner.child.kill()

    def _after(self, job: Job, runner: _Runner) -> None:
        """A runner ended: either the run is over, or the runner was lost."""
        del self._runners[job.name]
        status = job.status
        if status.phase.over:
            return
        losses = runner.losses + 1 if status.rounds_done == runner.rounds_done else 1
        _log.error(
            "the runner of %s was lost (code %s) after round %d", job.name, runner.child.exit_code, status.rounds_done
        )
        if losses > MOST_LOSSES:
            job.note(phase=Phase.FAILED, message=f"its runner was lost {losses} times; the coordinator's log has more")
        else:
            time.sleep(max(0.0, runner.child.started_at + _RESTART_S - time.monotonic()))
            self._start(job, losses)
