# SPDX-License-Identifier: Apache-2.0
"""Both engines run the same apps: with the noise fixed they give the same adapter, bit for bit."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from veil.common.errors import InputError
from veil.simulations import engine
from veil.simulations.grid import InProcessGrid


def test_ray_gives_the_adapter_that_inprocess_gives(
    write_plan: Callable[..., Path], veil: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    plan = write_plan(simulation={"noise": "fixed", "baselines": []})
    assert veil("simulate", plan, "--output", tmp_path / "inprocess", "--engine", "inprocess")[0] == 0
    command = [sys.executable, "-m", "veil.simulations", "simulate", str(plan)]
    done = subprocess.run(
        [*command, "--output", str(tmp_path / "ray"), "--engine", "ray"],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    one, two = ((tmp_path / name / "model" / "head" / "head.safetensors").read_bytes() for name in ("inprocess", "ray"))
    assert one == two


def test_without_ray_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"veil\[ray\]"):
        engine.check_engine(engine.Engine.RAY)


def test_the_grid_keeps_each_nodes_state_between_rounds() -> None:
    app = ClientApp()
    seen: list[tuple[int, int]] = []

    @app.train()
    def train(message: Message, context: Context) -> Message:
        number = int(str(context.node_config["partition-id"]))
        seen.append((number, len(context.state)))
        context.state[f"visit-{len(context.state)}"] = ConfigRecord()
        return Message(content=RecordDict(), reply_to=message)

    grid = InProcessGrid(app, 2)
    for _ in range(2):
        messages = [grid.create_message(RecordDict(), "train", node, "") for node in grid.get_node_ids()]
        assert len(list(grid.send_and_receive(messages))) == 2
    assert seen == [(0, 0), (1, 0), (0, 1), (1, 1)]
