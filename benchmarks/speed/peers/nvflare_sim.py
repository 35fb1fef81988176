# SPDX-License-Identifier: Apache-2.0
"""NVFlare's simulator: its federated averaging recipe over the same sites and the same local steps.

Promises the mode that is fastest for it, one simulator thread (a process) for every site, kept for all rounds; with
fewer threads than sites it starts a process anew whenever a site takes its turn. The clock stops when the server has
stored the last round's model, before the shutdown.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import sys
import time
from datetime import datetime
from pathlib import Path

import torch
from contract import Workload, accuracy, answer, read_workload
from nvflare.app_opt.pt.recipes.fedavg import FedAvgRecipe
from nvflare.recipe import SimEnv

HERE = Path(__file__).parent
_STAMP = re.compile(r"^(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}) ")


def simulate(work: Workload) -> Path:
    """Run the workload.

    Returns:
        the server's folder.
    """
    recipe = FedAvgRecipe(
        name="head",
        model={"class_path": "nvflare_model.Head", "args": {"width": work.width, "classes": work.classes}},
        min_clients=work.cohort,
        num_rounds=work.rounds,
        train_script=str(HERE / "nvflare_client.py"),
        train_args=str(Path(sys.argv[1]).resolve()),
    )
    recipe.execute(SimEnv(num_clients=work.sites, num_threads=work.sites, workspace_root=work.folder))
    return Path(work.folder) / "head" / "server"


def moments(log: Path, words: str) -> list[float]:
    """When the server's log says some words, in seconds since 1970; a banner has the time of the line before it."""
    found: list[float] = []
    last = ""
    for line in log.read_text(encoding="utf-8").splitlines():
        stamp = _STAMP.match(line)
        last = stamp[1] if stamp else last
        if words in line:
            found.append(datetime.strptime(last, "%Y-%m-%d %H:%M:%S,%f").timestamp())
    return found


def main() -> None:
    """Run the workload and answer."""
    os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
    work = read_workload()
    started = time.time()
    server = simulate(work)
    stored = moments(server / "log.txt", "End persist model on server")
    if len(stored) != work.rounds:
        raise RuntimeError(f"{len(stored)} rounds of {work.rounds} were done")
    model = torch.load(server / "simulate_job" / "app_server" / "FL_global_model.pt", weights_only=False)["model"]
    weight, bias = (torch.as_tensor(model[name]).numpy() for name in ("weight", "bias"))
    answer(
        seconds=round(stored[-1] - started, 3),
        setup_s=round(moments(server / "log.txt", "Round 0 started")[0] - started, 3),
        client_rounds=work.client_rounds,
        wire_bytes=None,
        accuracy=accuracy(weight, bias, work.read_features(), work.read_labels()),
        version=f"nvflare {importlib.metadata.version('nvflare')}, opacus {importlib.metadata.version('opacus')}",
    )


if __name__ == "__main__":
    main()
