# SPDX-License-Identifier: Apache-2.0
"""A child process that does not outlive its parent, and a parent that knows how its child is.

Promises that a child ends soon after its parent, however that one ended, that ending it takes bounded time, and that
nothing secret is in its command line or environment.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

_KILL_AFTER_S = 5.0
_WATCH_S = 0.5
_PARENT = "VEIL_PARENT_PID"


class Child:
    """A Python module run as a process of its own.

    Args:
        module: what `python -m` runs.
        arguments: its command line.
        keep: file descriptors that it inherits.
        log: file that its output is added to; without one, its parent's.
        variables: of its environment, where its parent has none of the name.
    """

    def __init__(
        self,
        module: str,
        arguments: Sequence[str],
        keep: Sequence[int] = (),
        log: Path | None = None,
        variables: Mapping[str, str] | None = None,
    ) -> None:
        self.started_at = time.monotonic()
        with contextlib.ExitStack() as opened:
            output = None if log is None else opened.enter_context(log.open("ab"))
            self._process = subprocess.Popen(  # noqa: S603 - our own interpreter and modules
                [sys.executable, "-m", module, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=tuple(keep),
                env={**(variables or {}), **os.environ, _PARENT: str(os.getpid())},
            )

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """How it ended, None while it runs."""
        return self._process.poll()

    def end(self) -> int:
        """Ask it to end, then make it.

        Returns:
            its exit code.
        """
        self._process.terminate()
        try:
            return self._process.wait(_KILL_AFTER_S)
        except subprocess.TimeoutExpired:
            return self.kill()

    def kill(self) -> int:
        """End it at once, hung or not.

        Returns:
            its exit code.
        """
        self._process.kill()
        return self._process.wait()


def end_with_parent() -> None:
    """End this process when the one that started it is gone, also if it went first; called by a child, once."""
    parent = int(os.environ.get(_PARENT, os.getppid()))

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_WATCH_S)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
