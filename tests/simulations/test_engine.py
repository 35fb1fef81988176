# SPDX-License-Identifier: Apache-2.0
"""Both engines run the same apps: with the noise fixed they give the same adapter, bit for bit."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from veil.client.ledger import entries_by_site
from veil.common.errors import InputError, RunError
from veil.simulations import engine
from veil.simulations.engines import Engine
from veil.simulations.grid import InProcessGrid
from veil.simulations.process_grid import ProcessGrid

ENGINES = ("inprocess", "processes")


@pytest.mark.long
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


def test_processes_give_the_adapter_that_inprocess_gives(
    write_plan: Callable[..., Path], veil: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    """And every site's chain is whole in the one ledger that they share."""
    plan = write_plan(simulation={"noise": "fixed", "baselines": []})
    for name in ("inprocess", "processes"):
        assert veil("simulate", plan, "--output", tmp_path / name, "--engine", name)[0] == 0
    adapters = [(tmp_path / name / "model" / "head" / "head.safetensors").read_bytes() for name in ENGINES]
    assert adapters[0] == adapters[1]
    spends = [entries_by_site(tmp_path / name / "ledger.sqlite") for name in ENGINES]
    assert {site: len(lines) for site, lines in spends[0].items()} == {
        site: len(lines) for site, lines in spends[1].items()
    }


def test_a_lost_process_ends_the_run_and_none_is_left() -> None:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        if context.node_config["partition-id"] == 1:
            os._exit(7)
        return Message(RecordDict({"config": ConfigRecord({"process": os.getpid()})}), reply_to=message)

    with ProcessGrid(app, 3, processes=3, begin=lambda number: None) as grid:
        first, _, third = (grid.create_message(RecordDict(), "train", node, "") for node in grid.get_node_ids())
        replies = list(grid.send_and_receive([first, third]))
        pids = [int(str(one.content.config_records["config"]["process"])) for one in replies]
        assert len({*pids, os.getpid()}) == 3
        messages = [grid.create_message(RecordDict(), "train", node, "") for node in grid.get_node_ids()]
        with pytest.raises(RunError, match="exit code 7"):
            grid.send_and_receive(messages)
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_without_forks_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("multiprocessing.get_all_start_methods", lambda: ["spawn"])
    with pytest.raises(InputError, match="--engine inprocess"):
        engine.check_engine(Engine.PROCESSES)


def test_without_ray_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"veil\[ray\]"):
        engine.check_engine(Engine.RAY)


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
