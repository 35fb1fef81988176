# SPDX-License-Identifier: Apache-2.0
"""The operator's word on each run: asked once per job, kept in one small file, read by agent and command line alike.

Promises that an approval holds for one job with one plan, the one that was shown, and that nothing in a job's name
reaches a path.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path

from veil.common.durable import sync_folder
from veil.common.errors import InputError, RefusalCode, RefusalError
from veil.common.plan import RunPlan

MAX_PENDING = 1000
"""Runs that may wait at once; a coordinator cannot fill the disk with more."""

MAX_PLAN_BYTES = 1 << 16
"""Longest plan that is kept for the operator to read."""


class Decision(StrEnum):
    """What the operator said so far."""

    PENDING = "pending"
    APPROVED = "approved"
    REFUSED = "refused"


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """A run that asked to use this site.

    Attributes:
        job: the run, as the coordinator calls it.
        plan_sha256: SHA-256 of its plan.
        plan_json: the plan's canonical JSON.
        first_seen: when it asked, UTC, ISO 8601.
        decision: what the operator said.
        decided: when, "" while pending.
    """

    job: str
    plan_sha256: str
    plan_json: str
    first_seen: str
    decision: Decision = Decision.PENDING
    decided: str = ""

    @property
    def plan(self) -> RunPlan:
        """The plan that was put before the operator."""
        return RunPlan.from_json(self.plan_json)


class Approvals:
    """A folder of decisions.

    Args:
        folder: where they are; made when missing.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def note(self, job: str, plan: RunPlan) -> Asked:
        """Write down that a run asks, unless this job asked with this plan before; another plan asks anew.

        Raises:
            RefusalError: with the code `approval` when too many wait, `malformed` for a plan that is too long,
                `plan-changed` for another plan under a job that the operator decided about: the word stays.
        """
        public = plan.public()
        text, digest = public.to_json(), public.sha256
        if len(text.encode()) > MAX_PLAN_BYTES:
            expectation = f"at most {MAX_PLAN_BYTES}"
            remedy = "the coordinator can send a plan that a person can read"
            raise RefusalError(RefusalCode.MALFORMED, f"a plan of {len(text.encode())} bytes", expectation, remedy)
        with self._locked():
            known = self._read(self._path(job))
            if known is not None and known.plan_sha256 == digest:
                return known
            if known is not None and known.decision is not Decision.PENDING:
                raise RefusalError(
                    RefusalCode.PLAN_CHANGED,
                    f"job {job!r} with another plan than the one that was {known.decision}",
                    "the plan that the operator decided about",
                    "the coordinator can start a new job with the new plan",
                )
            if known is None:
                self._refuse_flood()
            asked = Asked(job=job, plan_sha256=digest, plan_json=text, first_seen=_now())
            self._write(asked)
        return asked

    def decide(self, job: str, *, approve: bool, plan_sha256: str) -> Asked:
        """Write the operator's word down.

        Args:
            job: the run.
            approve: whether it may use this site.
            plan_sha256: SHA-256 of the plan that the operator was shown.

        Raises:
            InputError: when no such run asked, or it has come with another plan since.
        """
        with self._locked():
            asked = self._read(self._path(job))
            if asked is None:
                raise InputError(f"job {job!r} never asked", "a run that asked", "look at the list of runs")
            if asked.plan_sha256 != plan_sha256:
                expectation = "the plan that was shown"
                raise InputError(f"job {job!r} has come with another plan since", expectation, "look at the new plan")
            word = Decision.APPROVED if approve else Decision.REFUSED
            decided = replace(asked, decision=word, decided=_now())
            self._write(decided)
        return decided

    def decision(self, job: str, plan_sha256: str) -> Decision:
        """What the operator said about this job with this plan; pending also when it never asked."""
        asked = self._read(self._path(job))
        return asked.decision if asked is not None and asked.plan_sha256 == plan_sha256 else Decision.PENDING

    def runs(self) -> tuple[Asked, ...]:
        """All runs that asked, the oldest first."""
        found = [asked for path in self._folder.glob("*.json") if (asked := self._read(path)) is not None]
        return tuple(sorted(found, key=lambda asked: (asked.first_seen, asked.job)))

    def _refuse_flood(self) -> None:
        waiting = sum(asked.decision is Decision.PENDING for asked in self.runs())
        if waiting >= MAX_PENDING:
            raise RefusalError(
                RefusalCode.APPROVAL,
                f"{waiting} runs wait for the operator",
                f"fewer than {MAX_PENDING}",
                "decide about those that wait",
            )

    def _path(self, job: str) -> Path:
        return self._folder / f"{hashlib.sha256(job.encode(errors='surrogatepass')).hexdigest()}.json"

    def _read(self, path: Path) -> Asked | None:
        try:
            fields = json.loads(path.read_bytes())
            asked = Asked(**{**fields, "decision": Decision(fields["decision"])})
            if asked.plan.sha256 != asked.plan_sha256 or self._path(asked.job) != path:
                raise ValueError("a file about another run")
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, LookupError, InputError):
            remedy = "remove the file; the run will ask again"
            raise InputError(f"{path} cannot be read", "a run's file as Veil writes it", remedy) from None
        return asked

    def _write(self, asked: Asked) -> None:
        """Replace the job's file whole; on the disk when this returns."""
        path = self._path(asked.job)
        partial = path.with_suffix(".partial")
        with partial.open("w", encoding="utf-8") as file:
            json.dump(asdict(asked), file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        sync_folder(self._folder)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """One writer at a time, among processes and threads."""
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle = os.open(self._folder / ".lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
