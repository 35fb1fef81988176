# SPDX-License-Identifier: Apache-2.0
"""A web application behind real TLS on a free loopback port."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import uvicorn
from fastapi import FastAPI

Serve = Callable[[FastAPI, tuple[Path, Path]], str]


@contextmanager
def served(app: FastAPI, pair: tuple[Path, Path]) -> Iterator[str]:
    chain, key = pair
    config = uvicorn.Config(
        app,
        ssl_certfile=chain,
        ssl_keyfile=key,
        lifespan="off",
        ws="none",
        log_config=None,
        timeout_graceful_shutdown=1,
    )
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            time.sleep(0.005)
        yield f"https://127.0.0.1:{listener.getsockname()[1]}"
        server.should_exit = True
        thread.join()


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Serve an application with a certificate chain and its key until the test ends; gives the address."""
    with ExitStack() as open_servers:
        yield lambda app, pair: open_servers.enter_context(served(app, pair))
