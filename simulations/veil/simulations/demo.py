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
