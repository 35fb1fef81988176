# SPDX-License-Identifier: Apache-2.0
"""One federation of simulated sites, from a laid-down workspace to its outcome.

Promises that what ran is what would run deployed: the ServerApp, the ClientApp, a ledger for each site.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable

from veil.client.app import client_app
from veil.common.errors import RunError
from veil.common.head import initial_adapter
from veil.common.plan import RunPlan
from veil.common.update import Adapter
from veil.server.app import Outcome, server_app
from veil.server.state import RunState
from veil.simulations.engine import run_apps
from veil.simulations.engines import Engine
from veil.simulations.workspace import Workspace, keep_own_ledgers

LARGE_HEAD = 2**16
"""Numbers of a head from which on its products are worth more than one thread."""


def federate(
    plan: RunPlan,
    workspace: Workspace,
    *,
    sites: int,
    width: int,
    engine: Engine = Engine.INPROCESS,
    watch: Callable[[RunState], None] = lambda state: None,
    initial: Adapter | None = None,
) -> Outcome:
    """Run a plan over a workspace's sites.

    Args:
        plan: what to run.
        workspace: where the sites are.
        sites: how many there are.
        width: number of features.
        engine: where the apps run.
        watch: called after each round.
        initial: what a tuned model starts from; without it, a zero head.

    Raises:
        VeilError: whatever stopped the run.
    """
    outcomes: list[Outcome] = []
    server = server_app(
        plan.public(),
        job=f"{plan.name}-{uuid.uuid4().hex[:12]}",
        state=RunState.start(plan.public(), initial or initial_adapter(plan, width), sites),
        watch=watch,
        deliver=outcomes.append,
    )
    large = len(plan.task.labels) * width >= LARGE_HEAD
    threads = os.cpu_count() or 1 if large else 1
    run_apps(engine, server, client_app(workspace), sites, threads=threads, begin=keep_own_ledgers)
    workspace.gather()
    if not outcomes:
        raise RunError("the run ended without a model", "a tuned adapter", "look at the lines above")
    return outcomes[0]
