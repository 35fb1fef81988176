# SPDX-License-Identifier: Apache-2.0
"""`veil plan --memory`: what a run's processes hold at most, as a document and as lines.

Promises that it loads what a site's executor would load and counts on that, and that no record and no table is opened.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from veil.common.backbone import FrozenBackbone
from veil.common.errors import PlanError
from veil.common.lazy_backbone import find_backbone
from veil.common.memory import (
    Footprint,
    MemoryPlan,
    coordinator_memory,
    held_now,
    site_memory,
    size_of,
    weigh,
)
from veil.common.plan import RunPlan
from veil.common.privacy import PrivacyUnit
from veil.common.schedule import schedule
from veil.common.tunable import load_tunable

NO_FORECAST: Final = (
    'accuracy is forecast for transfer.mode = "head" only: forecast the plan with that, and simulate it as it is on '
    "public records like the sites'"
)
_EXECUTOR: Final = ("veil.client.deployed", "veil.client.tuned_release", "pandas")
"""What a site's executor has imported by its first round."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunMemory:
    """What the processes of a run hold.

    Attributes:
        plan: which.
        sites: how many.
        records: of a site; None where as many as may be are counted.
        found: sizes of the model.
        site: of one.
        coordinator: of the run.
    """

    plan: RunPlan
    sites: int
    records: int | None
    found: Footprint
    site: MemoryPlan
    coordinator: MemoryPlan


def run_memory(plan: RunPlan, *, sites: int | None, units: int | None, base: Path) -> RunMemory:
    """Count what a run of a plan holds.

    Args:
        plan: with a backbone.
        sites: how many; without it, `cohort.min_sites`.
        units: of each site; without it, `cohort.nominal_units`.
        base: the folder that a relative path of the backbone starts from.

    Raises:
        PlanError: when the mode does not fit the backbone, or the plan has none.
        WeightsError: when the backbone is not to be had.
    """
    _import_as_executor(plan)
    if plan.backbone is None:
        raise PlanError("a plan without a backbone", "one whose records a pretrained model reads", "name a [backbone]")
    lazy = find_backbone(plan.backbone, plan.task, base=base, device="cpu")
    found = load_tunable(lazy, plan).footprint() if plan.transfer.deep else _head_footprint(lazy.another(), plan)
    asked, records = sites or plan.cohort.min_sites, _records(plan, units)
    return RunMemory(
        plan=plan,
        sites=asked,
        records=records,
        found=found,
        site=site_memory(plan, found, records=records),
        coordinator=coordinator_memory(found, sites=asked),
    )


def _head_footprint(loaded: FrozenBackbone, plan: RunPlan) -> Footprint:
    held, (model, reader, _), head = held_now(), loaded.parts(), len(plan.task.labels) * (loaded.width + 1)
    record = reader.largest()
    with torch.inference_mode():
        _, widest = weigh(model, lambda: model(**record))
    return Footprint(
        held=held,
        weights=size_of((*model.parameters(), *model.buffers())),
        adapter=head + loaded.width,
        released=head,
        width=loaded.width,
        kept=0,
        widest=widest,
        remembered=0,
        read=size_of(record.values()),
    )


def document(found: RunMemory) -> dict[str, Any]:
    """The JSON document; sizes in bytes."""
    return {
        "plan": found.plan.name,
        "mode": found.plan.transfer.mode,
        "forecast": NO_FORECAST if found.plan.transfer.deep else None,
        "sites": found.sites,
        "records_per_site": found.records,
        "numbers_down": found.found.adapter,
        "numbers_up": found.found.released,
        "memory": {"site": _document(found.site), "coordinator": _document(found.coordinator)},
    }


def _document(one: MemoryPlan) -> dict[str, Any]:
    return {"peak": one.peak, "while": one.moment, "parts": dict(one.parts)}


def lines(found: RunMemory) -> Sequence[str]:
    """What a person reads."""
    records = "as many records as may be remembered" if found.records is None else f"{found.records:,} records"
    return [
        f'{found.plan.name}: transfer.mode = "{found.plan.transfer.mode}", {found.found.adapter:,} numbers to each of '
        f"{found.sites} sites and {found.found.released:,} from it in a round",
        f"a site's executor, {records}: {_line(found.site)}",
        f"the coordinator's run (counted, not measured): {_line(found.coordinator)}",
        *([NO_FORECAST] if found.plan.transfer.deep else []),
    ]


def _line(one: MemoryPlan) -> str:
    parts = sorted(one.parts.items(), key=lambda part: -part[1])
    told = ", ".join(f"{name} {size / 1e6:,.0f}" for name, size in parts if size >= 5e5)
    return f"{one.peak / 1e9:.2f} GB while {one.moment} (MB: {told})"


def _records(plan: RunPlan, units: int | None) -> int | None:
    """The most that so many units can have; None where nobody says how many there are."""
    count = units or plan.cohort.nominal_units
    several = plan.privacy.max_records_per_patient if plan.privacy.unit is PrivacyUnit.PATIENT else 1
    return None if count is None else count * several


def _import_as_executor(plan: RunPlan) -> None:
    """Hold what an executor holds: its modules, and what calibrating the noise brings."""
    for name in _EXECUTOR:
        importlib.import_module(name)
    schedule(plan)
