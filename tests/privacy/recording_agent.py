# SPDX-License-Identifier: Apache-2.0
"""`veil site start` with a record of every request as it is handed to TLS: SITE_FILE and OUTPUT on the command line.

A line of OUTPUT is one request: its path, its headers and its body; or a part of a question, as it came; or what the
coordinator answered to a reply: which parts of it are still to be sent.
"""

from __future__ import annotations

import base64
import json
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import httpx

from veil.client import connection, service
from veil.client.connection import Connection
from veil.client.site_file import read_site_file
from veil.common.logs import log_json_lines
from veil.common.supervision import end_with_parent


def main() -> None:
    end_with_parent()
    log_json_lines()
    path, output = Path(sys.argv[1]), Path(sys.argv[2])
    mutex = threading.Lock()

    def record(request: httpx.Request) -> None:
        body = base64.b64encode(request.read()).decode("ascii")
        line = json.dumps({"path": request.url.path, "headers": sorted(request.headers), "body": body})
        with mutex, output.open("a", encoding="ascii") as file:
            file.write(line + "\n")

    def keep(response: httpx.Response) -> None:
        """What the coordinator sent: a reply's part that equals one of these is not sent back."""
        told = {"pull-object": "pulled", "push-messages": "wanted"}.get(response.request.url.path.rpartition("/")[2])
        if response.is_success and told:
            body = base64.b64encode(response.read()).decode("ascii")
            with mutex, output.open("a", encoding="ascii") as file:
                file.write(json.dumps({told: body}) + "\n")

    class RecordedConnection(Connection):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            hooks = self._client._client.event_hooks
            hooks["request"].append(record)
            hooks["response"].append(keep)

    setattr(connection, "Connection", RecordedConnection)  # noqa: B010 - the seam between the agent and its line
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda number, frame: stop.set())
    service.serve_site(path, read_site_file(path), stop)


if __name__ == "__main__":
    main()
