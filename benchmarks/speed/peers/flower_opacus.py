# SPDX-License-Identifier: Apache-2.0
"""Flower's Ray simulation of the app in flower_app.py: with Opacus where the workload is private, plain otherwise.

Promises that the clock runs from the call of `run_simulation`, Ray's start included, to the end of the last round.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["SPEED_WORKLOAD"] = str(Path(sys.argv[1]).resolve())
os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])

import flower_app
import flwr
import numpy as np
import opacus
import ray
import torch
from contract import accuracy, answer
from encoder import encode
from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation


def simulate(started: float) -> dict[str, object]:
    """Run the workload in flower_app and say how long it took."""
    work = flower_app.workload()
    server = ServerApp()
    found: dict[str, object] = {}

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        found["setup_s"] = round(time.monotonic() - started, 3)
        strategy = FedAvg(
            fraction_train=work.cohort / work.sites,
            fraction_evaluate=1.0 if flower_app.evaluates() else 0.0,
            min_evaluate_nodes=work.cohort,
            min_train_nodes=work.cohort,
            min_available_nodes=work.sites,
        )
        initial = ArrayRecord(flower_app.new_model().state_dict())
        result = strategy.start(grid=grid, initial_arrays=initial, num_rounds=work.rounds)
        found["seconds"] = round(time.monotonic() - started, 3)
        found["rounds_done"] = len(result.train_metrics_clientapp)
        found["state"] = result.arrays.to_torch_state_dict()
        found["wire_bytes"] = 2 * int(result.train_metrics_clientapp[work.rounds]["bytes"])

    run_simulation(
        server_app=server,
        client_app=flower_app.app,
        num_supernodes=work.sites,
        backend_config={
            "init_args": {"num_cpus": work.threads, "include_dashboard": False},
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
        },
    )
    if found.get("rounds_done") != work.rounds:
        raise RuntimeError(f"{found.get('rounds_done')} rounds of {work.rounds} were done")
    return found


def judged(state: dict[str, torch.Tensor]) -> float:
    """Accuracy on the training features or, for notes, on the held-out notes."""
    work = flower_app.workload()
    weight, bias = state["head.weight"].numpy(), state["head.bias"].numpy()
    if work.test_notes is None:
        return accuracy(weight, bias, work.read_features(), work.read_labels())
    texts, labels = work.read_test()
    features = encode(texts, str(work.backbone), work.max_length).numpy()
    return accuracy(weight, bias, features, np.array(labels))


def finish(found: dict[str, object]) -> None:
    """Print the answer, with the accuracy taken after the clock stopped."""
    state = found.pop("state")
    found.pop("rounds_done")
    answer(
        **found,
        client_rounds=flower_app.workload().client_rounds,
        accuracy=judged(state),
        version=f"flwr {flwr.__version__}, ray {ray.__version__}, opacus {opacus.__version__}",
    )


if __name__ == "__main__":
    finish(simulate(time.monotonic()))
