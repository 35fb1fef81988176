# SPDX-License-Identifier: Apache-2.0
"""Tests of `veil.common.supervision`: real processes, and a child that does not outlive its parent."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from veil.common import supervision
from veil.common.supervision import Child

DEADLINE_S = 20.0
"""After which a test gives up; none waits so long when all is well."""

SAY = "import os, sys\nwire = int(sys.argv[1])\n"
WAITING = SAY + "import signal\nos.write(wire, b'x')\nsignal.pause()\n"
STUBBORN = SAY + "import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nos.write(wire, b'x')\nsignal.pause()\n"
TELLING = (
    SAY
    + """import json
told = {"arguments": sys.argv[2:], "stdin": sys.stdin.read(), "environment": dict(os.environ)}
os.write(wire, json.dumps(told).encode())
"""
)
BOUND = (
    SAY
    + """import signal
from veil.common.supervision import end_with_parent
end_with_parent()
os.write(wire, b'x')
signal.pause()
"""
)
LATE = (
    SAY
    + """import signal, time
from veil.common.supervision import end_with_parent
parent = os.getppid()
os.write(wire, b'x')
while os.getppid() == parent:
    time.sleep(0.01)
end_with_parent()
signal.pause()
"""
)
COUNTED = (
    SAY
    + """import veil.common.supervision as supervision
real, looks = os.getppid, []
def counted():
    looks.append(1)
    if len(looks) == 5:
        os.write(wire, b'looked')
    return real()
os.getppid = counted
supervision._WATCH_S = 0.001
"""
)
PARENT = """
import signal, sys
from veil.common.supervision import Child
child = Child(sys.argv[1], [sys.argv[2]], keep=[int(sys.argv[2])])
signal.pause()
"""

Start = Callable[..., Child]


class Wire:
    """What children write, and when the last of them is gone."""

    def __init__(self) -> None:
        self._ours, self.theirs = os.pipe()

    def read(self) -> bytes:
        """The next words; empty when nobody is left who could say any."""
        ready, _, _ = select.select([self._ours], [], [], DEADLINE_S)
        assert ready, "nobody says anything, and nobody ended"
        return os.read(self._ours, 1 << 20)

    def hang_up(self) -> None:
        """Keep no own end to write to."""
        if self.theirs >= 0:
            os.close(self.theirs)
            self.theirs = -1

    def close(self) -> None:
        self.hang_up()
        os.close(self._ours)


@pytest.fixture
def wire() -> Iterator[Wire]:
    made = Wire()
    yield made
    made.close()


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Makes a module that `python -m` finds; gives its name."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)

    def write(text: str) -> str:
        (tmp_path / "child_of_a_test.py").write_text(text, encoding="utf-8")
        return "child_of_a_test"

    return write


@pytest.fixture
def start(module: Callable[[str], str], wire: Wire) -> Iterator[Start]:
    """Starts a child that holds the wire's other end; ended with the test."""
    children: list[Child] = []

    def make(text: str, *arguments: str) -> Child:
        children.append(Child(module(text), [str(wire.theirs), *arguments], keep=[wire.theirs]))
        wire.hang_up()
        return children[-1]

    yield make
    for child in children:
        child.kill()


def test_a_child_runs_until_it_is_asked_to_end(start: Start, wire: Wire) -> None:
    child = start(WAITING)
    assert wire.read() == b"x"
    assert child.exit_code is None
    os.kill(child.pid, 0)
    assert child.end() == child.exit_code == -signal.SIGTERM
    assert wire.read() == b""


def test_a_child_that_ended_says_how(start: Start, wire: Wire) -> None:
    child = start(SAY + "sys.exit(7)")
    assert wire.read() == b""
    assert child.end() == child.exit_code == 7


def test_a_child_that_does_not_listen_is_made_to_end(start: Start, wire: Wire, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervision, "_KILL_AFTER_S", 0.05)
    child = start(STUBBORN)
    assert wire.read() == b"x"
    assert child.end() == child.exit_code == -signal.SIGKILL


def test_a_stopped_child_can_be_killed(start: Start, wire: Wire) -> None:
    child = start(WAITING)
    assert wire.read() == b"x"
    os.kill(child.pid, signal.SIGSTOP)
    assert child.kill() == -signal.SIGKILL
    assert child.kill() == -signal.SIGKILL


def test_a_child_gets_its_arguments_and_no_terminal(start: Start, wire: Wire) -> None:
    start(TELLING, "--odd", "two words", "")
    told = json.loads(wire.read())
    assert told["arguments"] == ["--odd", "two words", ""]
    assert told["stdin"] == ""
    added = set(told["environment"]) - set(os.environ) - {"LC_CTYPE"}
    assert {name: told["environment"][name] for name in added} == {"VEIL_PARENT_PID": str(os.getpid())}


def test_variables_of_a_child_are_those_that_its_parent_has_not(
    module: Callable[[str], str], wire: Wire, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VEIL_SET", "by the operator")
    child = Child(module(TELLING), [str(wire.theirs)], [wire.theirs], variables={"VEIL_SET": "x", "VEIL_FREE": "y"})
    wire.hang_up()
    told = json.loads(wire.read())["environment"]
    child.kill()
    assert (told["VEIL_SET"], told["VEIL_FREE"]) == ("by the operator", "y")


@pytest.mark.parametrize("text", [BOUND, LATE], ids=["while it works", "before it could look"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_child_ends_with_its_parent(
    module: Callable[[str], str], wire: Wire, text: str, number: signal.Signals
) -> None:
    """The wire ends when the last process that holds it does."""
    words = [sys.executable, "-c", PARENT, module(text), str(wire.theirs)]
    with subprocess.Popen(words, pass_fds=[wire.theirs]) as parent:
        wire.hang_up()
        assert wire.read() == b"x"
        os.kill(parent.pid, number)
        assert parent.wait() == -number
    assert wire.read() == b""


def test_a_child_stays_while_its_parent_does(start: Start, wire: Wire) -> None:
    child = start(COUNTED + BOUND)
    heard = b""
    while heard.count(b"looked") == 0:
        heard += wire.read() or pytest.fail("it ended")
    assert child.exit_code is None
    assert child.end() == -signal.SIGTERM
