# SPDX-License-Identifier: Apache-2.0
"""An agent killed at hundreds of places between review and answer: every draw was paid, no answer comes in two forms.

Each agent is a process of its own with the real site, ledger, anchor and training. Half of the deaths fall on a
bytecode instruction of the ledger, the site or the release, drawn with a fixed seed; the other half are SIGKILLs from
outside after a random time, so that they also fall into SQLite, the training and the system's calls.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import random
import signal
import sqlite3
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import product
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from veil.client import anchor, books, chain, ledger, lines, release, review, site
from veil.client.anchor import Anchor
from veil.client.backbone_store import BackboneStore
from veil.client.ledger import Claim, Ledger
from veil.client.policy import Limits, SitePolicy
from veil.client.review import release_of
from veil.client.site import Consent, Site
from veil.client.units import Units
from veil.client.verification import verify
from veil.common.errors import RefusalError
from veil.common.exchange import RoundRequest
from veil.common.keys import NodeKey
from veil.common.noise import OSNoise
from veil.common.plan import RunPlan
from veil.common.privacy import Mechanism, spent
from veil.common.schedule import Release, schedule

SEED = 20
ROUNDS = 2
SPARE = 2
"""Rounds that a run's limit leaves room for beside the plan's own: more deaths after a spend than that end a run."""

JOBS = ("job", "again")
"""The plan is submitted twice; the lifetime limit leaves room for less than two whole runs with their spares."""

TRACED = {module.__file__ for module in (anchor, books, chain, ledger, lines, release, review, site)}

Say = Callable[[str], None]
Place = tuple[str, int]
OpenLedger = Callable[[Path, NodeKey, Path, Say], Ledger]


class ViolationError(AssertionError):
    """The promise was broken."""


def sound(path: Path, key: NodeKey, anchor: Path, say: Say) -> Ledger:
    return Ledger(path, "Ulm", key, anchor=anchor)


class Announced(OSNoise):
    """The system's noise; says so when it is drawn."""

    def __init__(self, say: Callable[[], None]) -> None:
        self._say = say

    def gaussian(self, count: int) -> NDArray[np.float64]:
        self._say()
        return super().gaussian(count)


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What does not change between runs."""

    key: NodeKey
    units: Units
    requests: Sequence[RoundRequest]
    limits: Limits
    open_ledger: OpenLedger = sound

    def work(self, folder: Path, first: int, say: Say) -> None:
        """One agent's life: open the ledger, answer the rounds from `first` on, tell what leaves."""
        try:
            with closing(self.open_ledger(folder / "ledger.sqlite", self.key, folder / "anchor.json", say)) as opened:
                self.answer_all(opened, folder, first, say)
        except RefusalError as refusal:
            say(f"stop {refusal.code} {refusal}")

    def answer_all(self, opened: Ledger, folder: Path, first: int, say: Say) -> None:
        agent = Site(
            policy=SitePolicy(name="Ulm", limits=self.limits),
            ledger=opened,
            units=lambda _: self.units,
            noise=lambda request: Announced(lambda: say(f"draw {request.job} {request.round}")),
            consent=lambda job, plan: Consent.GIVEN,
            backbones=BackboneStore(folder / "backbones", mirror=None, accept=False),
        )
        for request in self.requests[first:]:
            reply = agent.answer(request)
            if reply.update is None:
                say(f"stop {reply.refusal}")
                return
            say(answer(request.job, request.round, reply.update.to_bytes()))
        say("done")


def answer(job: str, round_: int, reply: bytes) -> str:
    return f"answer {job} {round_} {hashlib.sha256(reply).hexdigest()}"


def cost(mechanisms: Sequence[Mechanism], delta: float) -> float:
    """ε of releases, in whatever order they came."""
    return _cost(tuple(sorted(Counter(mechanisms).items(), key=repr)), delta)


@cache
def _cost(counted: tuple[tuple[Mechanism, int], ...], delta: float) -> float:
    return spent([mechanism for mechanism, count in counted for _ in range(count)], delta).epsilon


@dataclass(kw_only=True)
class Run:
    """The jobs on one fresh ledger, through all its agents' deaths.

    Attributes:
        bench: what does not change.
        folder: of its ledger and anchor.
        draws: how often noise was drawn, by job and round.
        answers: SHA-256 of whatever left, by job and round.
        over: whether the plans are done, or the budget.
    """

    bench: Bench
    folder: Path
    draws: Counter[Place] = field(default_factory=Counter)
    answers: dict[Place, set[str]] = field(default_factory=dict)
    over: bool = False

    @property
    def next(self) -> int:
        """The first request without an answer."""
        return min(len(self.answers), len(self.bench.requests) - 1)

    def hear(self, said: str) -> None:
        """Take down what an agent said before it died."""
        for word, *rest in (line.split(" ") for line in said.splitlines()):
            match word:
                case "draw":
                    self.draws[rest[0], int(rest[1])] += 1
                case "answer":
                    self.answers.setdefault((rest[0], int(rest[1])), set()).add(rest[2])
                case "stop" if rest[0] != "budget":
                    raise ViolationError(f"a killed agent's successor is stopped: {' '.join(rest)}")
                case _:
                    self.over = True

    def check(self) -> None:
        """What must hold after every death."""
        fields = self.written()
        spends = {one["seq"]: (one["job"], one["round"]) for one in fields if one["kind"] == "spend"}
        stored = {(spends[one["spend"]], one["sha256"]) for one in fields if one["kind"] == "reply"}
        paid = Counter(spends.values())
        for place, count in self.draws.items():
            if count > paid[place]:
                raise ViolationError(f"{place} was drawn {count} times and paid {paid[place]} times")
        for place, forms in self.answers.items():
            if len(forms) > 1:
                raise ViolationError(f"{place} left in {len(forms)} forms")
            if not {(place, form) for form in forms} <= stored:
                raise ViolationError(f"what left as {place} is not in the ledger")
        self.check_cost([Mechanism.from_record(one["mechanism"]) for one in fields if one["kind"] == "spend"])
        for job in JOBS:
            own = [Mechanism.from_record(one["mechanism"]) for one in fields if one.get("job") == job]
            if cost(own, self.bench.limits.delta) > self.bench.limits.epsilon_per_run:
                raise ViolationError(f"the limit of {job} is passed")

    def check_cost(self, paid: Sequence[Mechanism]) -> None:
        """ε released ≤ ε spent ≤ the limit."""
        planned = {request.round: release_of(request).mechanism for request in self.bench.requests}
        drawn = [planned[round_] for (_, round_), count in self.draws.items() for _ in range(count)]
        delta = self.bench.limits.delta
        if not cost(drawn, delta) <= cost(paid, delta) <= self.bench.limits.epsilon_lifetime:
            raise ViolationError(f"ε {cost(drawn, delta)} was drawn and {cost(paid, delta)} paid")

    def written(self) -> list[dict[str, Any]]:
        """The ledger's lines, verified."""
        path = self.folder / "ledger.sqlite"
        if not has_lines(path):
            return []
        found = verify(path, "Ulm", self.bench.key.public_pem, anchor=self.folder / "anchor.json").findings
        if found:
            raise ViolationError(f"the chain is broken: {found}")
        with closing(sqlite3.connect(path)) as file:
            return [json.loads(body) for (body,) in file.execute("SELECT body FROM line ORDER BY seq")]


def has_lines(path: Path) -> bool:
    """Whether the ledger got as far as its first line; before that an anchor may be missing."""
    if not path.exists():
        return False
    with closing(sqlite3.connect(path)) as file:
        try:
            (count,) = file.execute("SELECT count(*) FROM line").fetchone()
        except sqlite3.OperationalError:
            return False
    return int(count) > 0


class Fate:
    """Counts the instructions of the traced modules, and kills its own process at the `fatal`-th."""

    def __init__(self, fatal: int | None) -> None:
        self.count, self._fatal = 0, fatal

    def enter(self, frame: FrameType, event: str, arg: Any) -> Any:
        if frame.f_code.co_filename not in TRACED:
            return None
        frame.f_trace_lines, frame.f_trace_opcodes = False, True
        return self._step

    def _step(self, frame: FrameType, event: str, arg: Any) -> Any:
        self.count += event == "opcode"
        if self.count == self._fatal:
            os.kill(os.getpid(), signal.SIGKILL)
        return self._step


def forked(work: Callable[[Say], None]) -> tuple[int, int]:
    """A process that does `work` and writes what it says to the returned pipe; it never returns into the test."""
    reading, writing = os.pipe()

    def say(word: str) -> None:
        os.write(writing, f"{word}\n".encode())

    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)
            work(say)
        except BaseException as error:
            os.write(writing, f"stop error {error!r}\n".encode())
        finally:
            os._exit(0)
    os.close(writing)
    return child, reading


def heard(child: int, reading: int) -> tuple[str, bool]:
    """All that a process said until its end, and whether it was killed."""
    with os.fdopen(reading, "rb") as pipe:
        said = pipe.read().decode()
    _, status = os.waitpid(child, 0)
    return said, os.WIFSIGNALED(status)


def live(run: Run, first: int, *, instruction: int | None = None, after_s: float | None = None) -> bool:
    """One agent in a process of its own, killed at an instruction or after a time; whether it was killed in time."""

    def agent(say: Say) -> None:
        if instruction is not None:
            sys.settrace(Fate(instruction).enter)
        run.bench.work(run.folder, first, say)

    child, reading = forked(agent)
    if after_s is not None:
        time.sleep(after_s)
        os.kill(child, signal.SIGKILL)
    said, killed = heard(child, reading)
    run.hear(said)
    run.check()
    return killed


@dataclass(frozen=True, kw_only=True)
class Size:
    """How long an agent lives that nobody kills."""

    instructions: int
    seconds: float


def measure(bench: Bench, folder: Path) -> Size:
    """One agent through both jobs, in this process: what it imports on its way is there for all who are forked."""
    (folder / "again").mkdir(parents=True)
    fate, former, said = Fate(None), sys.gettrace(), list[str]()
    sys.settrace(fate.enter)
    try:
        bench.work(folder, 0, said.append)
    finally:
        sys.settrace(former)
    assert said[-1] == "done"
    start = time.monotonic()
    assert not live(Run(bench=bench, folder=folder / "again"), 0)
    return Size(instructions=fate.count, seconds=time.monotonic() - start)


def kill_often(bench: Bench, folder: Path, size: Size, kills: int, seed: int, *, outside: bool) -> Counter[str]:
    """Kill agents until there were `kills`; what happened."""
    chosen = random.Random(seed)  # noqa: S311
    seen: Counter[str] = Counter()
    while seen["killed"] < kills:
        run = Run(bench=bench, folder=folder / f"run-{seen['runs']}")
        run.folder.mkdir(parents=True)
        seen["runs"] += 1
        while not run.over and seen["killed"] < kills:
            first = 0 if chosen.random() < 0.4 else run.next
            share = chosen.random() * (1 - first / len(bench.requests))
            from_outside = outside and seen["killed"] % 2 == 1
            killed = live(
                run,
                first,
                instruction=None if from_outside else 1 + int(share * size.instructions),
                after_s=share * size.seconds if from_outside else None,
            )
            seen["killed" if killed else "spared"] += 1
        seen["answered"] += len(run.answers)
        seen["complete"] += len(run.answers) == len(bench.requests)
        seen["burned"] += sum(run.draws.values()) - len(run.answers)
    return seen


@pytest.fixture
def bench(
    key: NodeKey, make_plan: Callable[..., RunPlan], make_request: Callable[..., RoundRequest], make_units: Any
) -> Bench:
    """A centre and two rounds, twice; limits with room for that and a few lost draws."""
    plan = make_plan({"rounds": ROUNDS}, target_epsilon=0.3)
    centre, *rounds = (one.mechanism for one in schedule(plan))
    for count, times in product(range(6), range(9)):  # what is worked out here need not be in each fork
        cost([centre] * count + [rounds[0]] * times, plan.privacy.target_delta)
    limits = Limits(
        epsilon_per_run=cost([centre, *rounds, *[rounds[0]] * SPARE], plan.privacy.target_delta),
        epsilon_lifetime=cost([centre, *rounds] * 2 + [rounds[0]] * SPARE, plan.privacy.target_delta),
    )
    return Bench(
        key=key,
        units=make_units(12, most=2),
        requests=[make_request(plan, one.round, job=job) for job in JOBS for one in schedule(plan)],
        limits=limits,
    )


@pytest.mark.parametrize("kills", [200, pytest.param(1000, marks=pytest.mark.long)])
def test_every_draw_is_paid_through_all_deaths(kills: int, bench: Bench, tmp_path: Path) -> None:
    """In two processes, of half the deaths each."""
    size = measure(bench, tmp_path / "size")

    def worker(number: int) -> Callable[[Say], None]:
        def work(say: Say) -> None:
            gc.freeze()
            seen = kill_often(bench, tmp_path / f"{number}", size, kills // 2, SEED + number, outside=True)
            say(json.dumps(seen))

        return work

    workers = [forked(worker(number)) for number in range(2)]
    said = [heard(*one)[0] for one in workers]
    assert not [one for one in said if one.startswith("stop")], f"seed {SEED}"
    seen = sum((Counter(json.loads(one)) for one in said), Counter[str]())
    assert seen["killed"] == kills
    assert seen["complete"] > kills // 100 and seen["burned"] > kills // 50, f"seed {SEED}: {seen}"


class AnswersFirst(Ledger):
    """Lets the reply out before it is recorded."""

    say: Say
    job: str
    release: Release

    def spend(self, job: str, release: Release, **rest: Any) -> Claim:
        self.job, self.release = job, release
        return super().spend(job, release, **rest)

    def record_reply(self, claim: Claim, reply: bytes) -> bytes:
        self.say(answer(self.job, self.release.round, reply))
        return super().record_reply(claim, reply)


class SpendsLast(Ledger):
    """Pays after the draw."""

    say: Say
    asked: tuple[str, Release, dict[str, Any]]

    def spend(self, job: str, release: Release, **rest: Any) -> Claim:
        self.asked = job, release, rest
        if self._books.answered(job, release) is not None:
            return super().spend(job, release, **rest)
        return Claim(seq=0)

    def record_reply(self, claim: Claim, reply: bytes) -> bytes:
        job, release, rest = self.asked
        return super().record_reply(super().spend(job, release, **rest), reply)


class ForgetsReplies(Ledger):
    """Keeps no reply."""

    say: Say

    def record_reply(self, claim: Claim, reply: bytes) -> bytes:
        return reply


class HastyAnchor(Anchor):
    """Is there before its line."""

    def prepare(self, head: chain.Head) -> None:
        super().prepare(head)
        super().publish()

    def publish(self) -> None:
        pass


class AnchorsFirst(Ledger):
    """Moves the anchor before the line is committed."""

    say: Say

    def __init__(self, path: Path, site: str, key: NodeKey, *, anchor: Path) -> None:
        super().__init__(path, site, key, anchor=anchor)
        self._anchor = HastyAnchor(anchor, key)


@pytest.mark.parametrize("broken", [AnswersFirst, SpendsLast, ForgetsReplies, AnchorsFirst])
def test_a_ledger_that_breaks_the_order_is_found_out(
    broken: type[AnswersFirst | SpendsLast | ForgetsReplies | AnchorsFirst], bench: Bench, tmp_path: Path
) -> None:
    def open_broken(path: Path, key: NodeKey, anchor: Path, say: Say) -> Ledger:
        opened = broken(path, "Ulm", key, anchor=anchor)
        opened.say = say
        return opened

    size = measure(bench, tmp_path / "size")
    with pytest.raises(ViolationError):
        kill_often(replace(bench, open_ledger=open_broken), tmp_path, size, 300, SEED, outside=False)
