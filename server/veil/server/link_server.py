# SPDX-License-Identifier: Apache-2.0
"""The link's process: the link's application behind uvicorn and TLS.

Promises TLS 1.2 or later with the coordinator's own certificate, a bound on what an unknown peer can make it read, and
that it ends with its coordinator.
"""

from __future__ import annotations

import logging
import ssl
import sys
from pathlib import Path

import uvicorn
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from veil.common.logs import log_json_lines
from veil.common.supervision import end_with_parent
from veil.server.enrolment import enrolment_router
from veil.server.home import Home
from veil.server.link import link_app, open_link_state
from veil.server.roster import Roster

MAX_BODY_BYTES = 8 << 20
"""Largest request body; Flower sends arrays in pieces of 5 MiB."""

_KEEP_ALIVE_S = 30
_CONNECTIONS = 256

_log = logging.getLogger(__name__)


class BodyLimit:
    """Cuts a request off whose body is larger than allowed; Flower reads the body before it checks who sends it.

    Args:
        app: what it protects.
        limit: bytes.
    """

    def __init__(self, app: ASGIApp, limit: int = MAX_BODY_BYTES) -> None:
        self._app, self._limit = app, limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if not declared.isdigit() or int(declared) > self._limit:
            await send({"type": "http.response.start", "status": 413, "headers": [(b"content-length", b"0")]})
            await send({"type": "http.response.body", "body": b""})
            return
        seen = 0

        async def counted() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            return message if seen <= self._limit else {"type": "http.disconnect"}

        async def answered(message: Message) -> None:
            too_large = seen > self._limit and message["type"] == "http.response.start"
            await send({**message, "status": 413} if too_large else message)

        await self._app(scope, counted, answered)


def serve(home: Home) -> None:
    """Serve until terminated."""
    state = open_link_state(home.database).state()
    app = link_app(home.database, enrolment_router(Roster(home.roster, state)))
    settings = home.settings
    config = uvicorn.Config(
        BodyLimit(app),
        host=settings.listen,
        port=settings.port,
        ssl_certfile=home.path(settings.certificate),
        ssl_keyfile=home.path(settings.key),
        log_config=None,
        access_log=False,
        server_header=False,
        lifespan="off",
        ws="none",
        timeout_keep_alive=_KEEP_ALIVE_S,
        limit_concurrency=_CONNECTIONS,
    )
    config.load()
    if config.ssl is not None:
        config.ssl.minimum_version = ssl.TLSVersion.TLSv1_2
    _log.info("the link listens on %s:%d", settings.listen, settings.port)
    uvicorn.Server(config).run()


def main() -> None:
    """The link's process: HOME on the command line."""
    end_with_parent()
    log_json_lines()
    serve(Home.open(Path(sys.argv[1])))


if __name__ == "__main__":
    main()
