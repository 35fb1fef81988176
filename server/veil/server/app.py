# SPDX-License-Identifier: Apache-2.0
"""The ServerApp: one run of a plan over a Grid.

Promises that the same app runs in process, on Ray and on a SuperLink; the grid is all that differs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from veil.common.mismatch import Mismatch
from veil.common.plan import RunPlan
from veil.common.update import Adapter
from veil.common.wire import encode_adapter
from veil.server.anomaly import AnomalyModel
from veil.server.partners import ask_for_partners
from veil.server.state import RoundRecord, RunState
from veil.server.statements import Evidence, ask_for_statements
from veil.server.strategy import SumOfUpdates


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What a run leaves behind.

    Attributes:
        job: the run's name.
        adapter: the tuned part.
        records: its rounds.
        estimated_units: public or released number of all units that train.
        evaluation: see `RunState`.
        mismatch: see `RunState`.
        evidence: what the sites stated, signed, at the end.
        anomaly: see `Descent`.
    """

    job: str
    adapter: Adapter
    records: tuple[RoundRecord, ...]
    estimated_units: float
    evaluation: dict[str, tuple[int, ...]]
    mismatch: dict[str, Mismatch]
    evidence: Evidence
    anomaly: AnomalyModel | None = None


def server_app(
    plan: RunPlan,
    *,
    job: str,
    state: RunState,
    watch: Callable[[RunState], None],
    deliver: Callable[[Outcome], None],
    site_of: Callable[[int], str] | None = None,
    keys: Mapping[str, bytes] | None = None,
) -> ServerApp:
    """The one ServerApp of simulation and deployment.

    Args:
        plan: what to run.
        job: identity of the run; kept when it is submitted again.
        state: where to start, or to go on.
        watch: called after each round.
        deliver: called once, at the end.
        site_of: the enrolled site behind a Flower node; see `SumOfUpdates`.
        keys: public keys of enrolled sites; see `ask_for_statements`.
    """
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        resumed = bool(state.records)
        shared = plan.privacy.noise == "distributed"
        partners = ask_for_partners(grid, plan, job, site_of=site_of, keys=keys) if shared else None
        strategy = SumOfUpdates(plan=plan, job=job, state=state, watch=watch, site_of=site_of, partners=partners)
        strategy.start(
            grid=grid,
            initial_arrays=encode_adapter(state.descent.adapter),
            num_rounds=len(strategy.releases),
            timeout=plan.cohort.round_timeout_s,
        )
        deliver(
            Outcome(
                job=job,
                adapter=state.descent.adapter,
                records=tuple(state.records),
                estimated_units=state.descent.units,
                evaluation=state.evaluation,
                mismatch=state.mismatch,
                evidence=ask_for_statements(
                    grid, plan, job, site_of=site_of, keys=keys, nodes=None if resumed else strategy.asked
                ),
                anomaly=state.descent.anomaly,
            )
        )

    return app
