# SPDX-License-Identifier: Apache-2.0
"""A rehearsal's agent: the deployed one, over the executor with repeatable noise.

Promises the deployed agent in everything else.
"""

from __future__ import annotations

import signal
import sys
import threading
from pathlib import Path

from veil.client.service import serve_site
from veil.client.site_file import read_site_file
from veil.common.logs import log_json_lines
from veil.common.supervision import end_with_parent


def main() -> None:
    """The agent's process: the site file on the command line."""
    end_with_parent()
    log_json_lines()
    stop, path = threading.Event(), Path(sys.argv[1])
    signal.signal(signal.SIGTERM, lambda number, frame: stop.set())
    serve_site(path, read_site_file(path), stop, executor="veil.simulations.fixed_noise_executor")


if __name__ == "__main__":
    main()
