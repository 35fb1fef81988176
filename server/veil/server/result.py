# SPDX-License-Identifier: Apache-2.0
"""Both ends of a deployed run: the adapter it starts from, and the folder it leaves behind.

Promises that the result folder appears complete or not at all, and again the same when a crash made it be written
twice.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from veil.common.durable import sync_file, sync_folder
from veil.common.errors import PlanError
from veil.common.head import initial_adapter
from veil.common.plan import RunPlan
from veil.server.delivery import BackboneShelf
from veil.server.documents import write_documents
from veil.server.home import Home
from veil.server.jobs import Job
from veil.server.model import TunedModel
from veil.server.run_report import build_run_report
from veil.server.state import RunState
from veil.server.statements import Evidence

if TYPE_CHECKING:
    from veil.common.lazy_backbone import LazyBackbone


def initial_state(plan: RunPlan, shelf: Path, sites: int) -> RunState:
    """The state before the first round; the head is as wide as the backbone's features.

    Args:
        plan: what is run.
        shelf: the folder of the coordinator's backbones.
        sites: how many sites take part.

    Raises:
        PlanError: when nothing says how many numeric features the sites have, or the mode does not fit the backbone.
        WeightsError: when the coordinator does not hold the backbone.
    """
    backbone = _backbone(plan, shelf)
    if plan.transfer.deep and backbone is not None:
        from veil.common.tunable import load_tunable

        return RunState.start(plan, load_tunable(backbone, plan).initial(), sites)
    width = backbone.width if backbone is not None else plan.task.width
    if width is None:
        raise PlanError(
            "task.width is not given", "the number of numeric columns that every site has", "add task.width"
        )
    return RunState.start(plan, initial_adapter(plan, width), sites)


def write_result(
    plan: RunPlan, home: Home, job: Job, state: RunState, seconds: dict[str, float], evidence: Evidence
) -> None:
    """Write the folder `result` of a run: `model`, `report.json`, and the documents beside it.

    Raises:
        InputError: when the coordinator's signing key cannot be used.
    """
    partial, result = job.folder / ".result.partial", job.folder / "result"
    for leftover in (partial, result):
        if leftover.exists():
            shutil.rmtree(leftover)
    partial.mkdir()
    descent = state.descent
    tuned = TunedModel(
        plan=plan, adapter=descent.adapter, backbone=_backbone(plan, home.shelf), anomaly=descent.anomaly
    )
    tuned.save(partial / "model")
    report = build_run_report(plan, job.name, state, seconds)
    (partial / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    write_documents(
        partial,
        plan,
        job.name,
        records=state.records,
        evidence=evidence,
        report=report,
        key=home.signing_key(),
        simulation=False,
    )
    for path in sorted(partial.rglob("*")):
        sync_file(path)
    partial.rename(result)
    sync_folder(result.parent)


def _backbone(plan: RunPlan, shelf: Path) -> LazyBackbone | None:
    if plan.backbone is None:
        return None
    from veil.common.lazy_backbone import find_backbone

    return find_backbone(BackboneShelf(shelf).find(plan.backbone), plan.task, base=shelf, device="cpu")
