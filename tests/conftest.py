# SPDX-License-Identifier: Apache-2.0
"""A web application behind real TLS on a free loopback port, and tiny pretrained models that are tuned."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import uvicorn
from fastapi import FastAPI

if TYPE_CHECKING:
    from veil.common.lazy_backbone import LazyBackbone
    from veil.common.plan import RunPlan
    from veil.common.plan_sections import Backbone
    from veil.common.tunable import TunableModel

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


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """A plan, its model, the network inside, and the backbone that they are of."""

    plan: RunPlan
    model: TunableModel
    network: Any
    backbone: LazyBackbone


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Backbone]:
    """A tiny random model of a family of `tests.tiny_models.MAKERS`, saved once."""
    from tests.tiny_models import save_tiny

    return cache(lambda family: save_tiny(tmp_path_factory.mktemp(family), family))


@pytest.fixture(scope="session")
def tuned(tiny: Callable[[str], Backbone]) -> Callable[..., Tuned]:
    """A model as its plan tunes it: family and mode; further keywords are keys of `transfer`, or sections of the plan.
    It is made once, but where `change` does something to the network before."""
    from tests.tiny_models import deep_plan

    from veil.common.lazy_backbone import find_backbone
    from veil.common.tunable import load_tunable

    def load(family: str, mode: str, change: Callable[[Any], None], options: dict[str, Any]) -> Tuned:
        sections = {name: value for name, value in options.items() if isinstance(value, dict)}
        transfer = {name: value for name, value in options.items() if name not in sections}
        plan = deep_plan(tiny(family), family, {"mode": mode, **transfer}, **sections)
        assert plan.backbone is not None
        backbone = find_backbone(plan.backbone, plan.task, base=Path(), device="cpu")
        another, networks = backbone.another, []

        def changed(*args: Any, **named: Any) -> Any:
            found = another(*args, **named)
            networks.append(found.parts()[0])
            change(networks[-1])
            return found

        backbone.another = changed  # type: ignore[method-assign]  # the seam at which a model is spoilt
        model = load_tunable(backbone, plan)
        return Tuned(plan=plan, model=model, network=networks[-1], backbone=backbone)

    made: dict[str, Tuned] = {}

    def make(family: str, mode: str, change: Callable[[Any], None] | None = None, **options: Any) -> Tuned:
        if change is not None:
            return load(family, mode, change, options)
        key = json.dumps([family, mode, options], sort_keys=True)
        if key not in made:
            made[key] = load(family, mode, lambda network: None, options)
        return made[key]

    return make
