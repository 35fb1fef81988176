# SPDX-License-Identifier: Apache-2.0
"""The ServerApp: one run of a plan over a Grid.

Promises that the same app runs in process, on Ray and on a SuperLink; the grid is all that differs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from veil.common.plan import RunPlan
from veil.common.update import Adapter
from veil.common.wire import encode_adapter
from veil.server.descent import Descent
from veil.server.strategy import RoundRecord, SumOfUpdates


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What a run leaves behind.

    Attributes:
        adapter: the tuned part.
        records: its rounds.
        estimated_units: public or released number of all units.
    """

    adapter: Adapter
    records: tuple[RoundRecord, ...]
    estimated_units: float


def server_app(
    plan: RunPlan,
    *,
    job: str,
    adapter: Adapter,
    sites: int,
    watch: Callable[[RoundRecord, Descent], None],
    deliver: Callable[[Outcome], None],
) -> ServerApp:
    """The one ServerApp of simulation and deployment.

    Args:
        plan: what to run.
        job: identity of the run; kept when it is submitted again.
        adapter: where to start.
        sites: how many sites take part.
        watch: called after each round.
        deliver: called once, at the end.
    """
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        descent = Descent.start(plan, adapter, sites)
        strategy = SumOfUpdates(plan=plan, job=job, descent=descent, sites=sites, watch=watch)
        strategy.start(
            grid=grid,
            initial_arrays=encode_adapter(adapter),
            num_rounds=len(strategy.releases),
            timeout=plan.cohort.round_timeout_s,
        )
        deliver(
            Outcome(
                adapter=descent.adapter,
                records=tuple(strategy.records),
                estimated_units=descent.units,
            )
        )

    return app
