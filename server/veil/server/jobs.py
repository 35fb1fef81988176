# SPDX-License-Identifier: Apache-2.0
"""A run's folder: the plan it was started with, how far it is, and what the operator wants of it.

Promises that its status is replaced whole, and that a run goes on after a crash under the same name: the name is what
the sites' ledgers know it by.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from pathlib import Path

from veil.common.durable import sync_folder, write_new
from veil.common.errors import InputError
from veil.common.plan import RunPlan


class Phase(StrEnum):
    """Where a run is."""

    SUBMITTED = "submitted"
    OFFERING = "offering"
    DELIVERING = "delivering"
    TRAINING = "training"
    FINISHED = "finished"
    FAILED = "failed"
    STOPPED = "stopped"

    @property
    def over(self) -> bool:
        """Whether nothing more happens by itself."""
        return self in (Phase.FINISHED, Phase.FAILED, Phase.STOPPED)


@dataclass(frozen=True, kw_only=True, slots=True)
class Status:
    """How a run is.

    Attributes:
        phase: where it is.
        rounds_done: rounds whose aggregate is in the checkpoint.
        rounds: rounds of the plan, the centring round counted.
        sites: site to what it last said: ready, pending, replied, or a refusal's code.
        message: why it failed, for the coordinator's operator.
        updated: seconds since the epoch.
    """

    phase: Phase = Phase.SUBMITTED
    rounds_done: int = 0
    rounds: int = 0
    sites: dict[str, str] = field(default_factory=dict)
    message: str = ""
    updated: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One run's folder.

    Attributes:
        folder: where it is; its name is the run's.
    """

    folder: Path

    @classmethod
    def submit(cls, runs: Path, plan: RunPlan, sites: tuple[str, ...]) -> Job:
        """Put a run where the coordinator finds it.

        Args:
            runs: the folder of all runs.
            plan: what to run, with everything pinned.
            sites: whom to ask.
        """
        name = f"{plan.name}-{uuid.uuid4().hex[:12]}"
        partial = runs / f".{name}.partial"
        partial.mkdir(parents=True)
        write_new(partial / "plan.json", plan.public().to_json().encode("utf-8"))
        write_new(partial / "sites.json", json.dumps(sites).encode("utf-8"))
        job = cls(folder=runs / name)
        partial.rename(job.folder)
        sync_folder(runs)
        return job

    @classmethod
    def find(cls, runs: Path, name: str) -> Job:
        """A run by its name, or by the beginning of it.

        Raises:
            InputError: when there is none or more than one.
        """
        found = [job for job in cls.all(runs) if job.name == name] or [
            job for job in cls.all(runs) if job.name.startswith(name)
        ]
        if len(found) != 1:
            known = ", ".join(job.name for job in cls.all(runs)) or "none"
            raise InputError(
                f"{len(found)} runs named {name}", f"one of: {known}", "veil coordinator status lists them"
            )
        return found[0]

    @classmethod
    def all(cls, runs: Path) -> list[Job]:
        """All runs, oldest first; one that is still being submitted is none yet."""
        plans = [path for path in runs.glob("*/plan.json") if not path.parent.name.startswith(".")]
        return [cls(folder=path.parent) for path in sorted(plans, key=lambda path: path.stat().st_mtime)]

    @property
    def name(self) -> str:
        """The run's name."""
        return self.folder.name

    @property
    def plan(self) -> RunPlan:
        """What is run."""
        return RunPlan.from_json((self.folder / "plan.json").read_text(encoding="utf-8"))

    @property
    def sites(self) -> tuple[str, ...]:
        """Whom to ask."""
        return tuple(json.loads((self.folder / "sites.json").read_text(encoding="utf-8")))

    @property
    def checkpoint(self) -> Path:
        """State after the last complete round."""
        return self.folder / "checkpoint.safetensors"

    @property
    def status(self) -> Status:
        """How it is."""
        try:
            fields = json.loads((self.folder / "status.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            return Status()
        return Status(**{**fields, "phase": Phase(fields["phase"])})

    def note(self, **changes: object) -> None:
        """Write a changed status."""
        status = replace(self.status, updated=time.time(), **changes)  # type: ignore[arg-type]  # named by the caller
        partial = self.folder / ".status.partial"
        with partial.open("w", encoding="utf-8") as file:
            json.dump(asdict(status), file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(self.folder / "status.json")

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """The right to work on the run; waits for a runner that is about to end."""
        with (self.folder / "lock").open("wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def beat(self) -> None:
        """Say that its runner is at work."""
        (self.folder / "beat").touch()

    @property
    def beat_at(self) -> float:
        """When its runner last said so, seconds since the epoch."""
        try:
            return (self.folder / "beat").stat().st_mtime
        except FileNotFoundError:
            return 0.0

    @property
    def stop_wanted(self) -> bool:
        """Whether the operator wants it to end."""
        return (self.folder / "stop").exists()

    def stop(self) -> None:
        """Ask it to end.

        Raises:
            InputError: when it is over.
        """
        if self.status.phase.over:
            raise InputError(
                f"run {self.name} is {self.status.phase}", "a run under way", "veil coordinator status lists them"
            )
        (self.folder / "stop").touch()

    def resume(self) -> None:
        """Ask a run that stopped or failed to go on from its checkpoint.

        Raises:
            InputError: when it is under way or finished.
        """
        phase = self.status.phase
        if phase not in (Phase.FAILED, Phase.STOPPED):
            raise InputError(
                f"run {self.name} is {phase}", "a run that failed or was stopped", "veil coordinator status"
            )
        (self.folder / "stop").unlink(missing_ok=True)
        self.note(phase=Phase.SUBMITTED, message="")
