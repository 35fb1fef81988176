# SPDX-License-Identifier: Apache-2.0
"""The embedded demo's plan.

Promises that it needs nothing but installed packages.
"""

from __future__ import annotations

from pathlib import Path

from veil.common.plan import RunPlan, parse_plan


def demo_plan() -> RunPlan:
    """Heart disease in four hospitals, as one-line clinical notes read by MiniLM, at ε = 3."""
    return parse_plan(Path(__file__).with_name("demo.toml"))


def dealt_demo_plan(sites: int) -> RunPlan:
    """The demo's records dealt evenly to some sites, whatever hospital they are from."""
    plan = demo_plan()
    if plan.simulation is None:
        raise ValueError("the demo's plan has no simulation section; expected one")
    dealt = plan.simulation.model_copy(update={"partition": "iid", "site": None, "sites": sites})
    cohort = plan.cohort.model_copy(update={"min_sites": sites})
    return plan.model_copy(update={"simulation": dealt, "cohort": cohort})
