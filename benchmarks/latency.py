# SPDX-License-Identifier: Apache-2.0
"""What a round costs on the wire and in processes: Veil's agents beside Flower's own, same apps, same sites, one run.

Promises that both sides do the same work: the demo's records at three sites, the same ServerApp and ClientApp, the same
machine, one after the other. The figure is seconds from asking the sites to having aggregated their replies.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from veil.common.plan import RunPlan
from veil.server.state import RunState
from veil.server.submission import submit
from veil.simulations.demo import dealt_demo_plan
from veil.simulations.deployment import Deployment, free_ports
from veil.simulations.rehearsal import enrol
from veil.simulations.screen import Screen
from veil.simulations.simulate import prepare

HERE = Path(__file__).parent
SITES = 3
PROJECT = """\
[project]
name = "stock"
version = "1.0.0"
license = { file = "LICENSE" }
dependencies = ["flwr>=1.41.0"]

[tool.flwr.app]
publisher = "veil"
fab-format-version = 1
flwr-version-target = "1.41.0"

[tool.flwr.app.components]
serverapp = "stock.server:app"
clientapp = "stock.client:app"

[tool.flwr.app.config]
"""
SERVER = """\
import json
from pathlib import Path

from flwr.serverapp import ServerApp

from veil.common.head import initial_adapter
from veil.common.plan import RunPlan
from veil.server.app import server_app
from veil.server.state import RunState

FOLDER = Path({folder!r})
app = ServerApp()


@app.main()
def main(grid, context):
    plan = RunPlan.from_json((FOLDER / "plan.json").read_text())
    state = RunState.start(plan, initial_adapter(plan, {width}), {sites})

    def watch(state):
        (FOLDER / "rounds.json").write_text(json.dumps([one.seconds for one in state.records]))

    server_app(plan, job="stock", state=state, watch=watch, deliver=lambda outcome: None)(grid, context)
"""
CLIENT = """\
from pathlib import Path

from veil.client.app import client_app
from veil.client.deployed import assemble
from veil.client.site_file import read_site_file

app = client_app(lambda context: assemble(read_site_file(Path(str(context.node_config["site"])))))
"""
WHO = {"veil": "Veil: link, runner, agents with executors, TLS", "flower": "Flower 1.41: SuperLink, SuperNodes, no TLS"}
REPORT = """\
# Seconds of a round

From asking three sites to having aggregated their replies: a head on MiniLM's features, the demo's records, everything
on one machine with 2 CPU cores, one system after the other. Both run Veil's ServerApp and ClientApp. Written by

    python benchmarks/latency.py --rounds {rounds} --stock-rounds {stock_rounds}

| system | rounds | median after the first (smallest to largest) | first |
|---|---|---|---|
{rows}

Flower's rounds take {ratio:.0f} times as long. It starts a Python with all libraries for every message, and asks for
replies every three seconds; Veil's executor stays, and both of its ends look several times a second.
"""
CONNECTION = """\
[superlink]
default = "bench"

[superlink.bench]
address = "127.0.0.1:{port}"
insecure = true
"""


def plan_of(rounds: int) -> RunPlan:
    plan = dealt_demo_plan(SITES)
    return plan.model_copy(update={"training": plan.training.model_copy(update={"rounds": rounds})})


def veil_rounds(deployment: Deployment, plan: RunPlan) -> list[float]:
    """Seconds of each round over Veil's link and agents."""
    for name in deployment.sites:
        deployment.start_site(name)
    job = submit(deployment.home, plan, base=Path.cwd(), sites=())
    deployment.finish(job, 600)
    for name in deployment.sites:
        deployment.processes.pop(name).end()
    return [record.seconds for record in RunState.load(job.checkpoint, job.plan).records]


def stock_rounds(deployment: Deployment, plan: RunPlan, width: int, folder: Path) -> list[float]:
    """Seconds of each round over Flower's SuperLink and SuperNodes, which start a process for every message."""
    app, home, port = folder / "app", folder / "flwr", free_ports(1)[0]
    (app / "stock").mkdir(parents=True)
    home.mkdir()
    (app / "pyproject.toml").write_text(PROJECT)
    (app / "LICENSE").write_text("Apache-2.0\n")
    (app / "stock" / "__init__.py").write_text("")
    (app / "stock" / "server.py").write_text(SERVER.format(folder=str(folder), width=width, sites=SITES))
    (app / "stock" / "client.py").write_text(CLIENT)
    (home / "config.toml").write_text(CONNECTION.format(port=port))
    (folder / "plan.json").write_text(plan.public().to_json())
    with ExitStack() as processes:
        link = ["flower-superlink", "--insecure", "--host", "127.0.0.1", "--port", str(port)]
        processes.enter_context(flower([*link, "--disable-runtime-dependency-installation"], home, folder / "link.log"))
        time.sleep(5)
        for name in deployment.sites:
            site = deployment.site_folder(name).resolve() / "site.toml"
            words = ["flower-supernode", "--insecure", "--superlink", f"127.0.0.1:{port}", "--host", "127.0.0.1"]
            words += ["--port", str(free_ports(1)[0]), "--node-config", f'site="{site}"']
            processes.enter_context(flower(words, home, folder / f"{name}.log"))
        processes.enter_context(flower(["flwr", "run", str(app), "--stream"], home, folder / "run.log"))
        done, end = folder / "rounds.json", time.monotonic() + 300
        while not done.exists() or len(json.loads(done.read_text() or "[]")) <= plan.training.rounds:
            if time.monotonic() > end:
                sys.exit(f"Flower's run did not end; its logs are in {folder}")
            time.sleep(0.5)
        return list(map(float, json.loads(done.read_text())))


@contextmanager
def flower(words: list[str], home: Path, log: Path) -> Iterator[None]:
    """One of Flower's programs with all that it starts."""
    binaries = Path(sys.executable).parent
    environment = {
        **os.environ,
        "PATH": f"{binaries}:{os.environ['PATH']}",
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "NO_PROXY": "127.0.0.1,localhost",
    }
    with log.open("wb") as output:
        process = subprocess.Popen(
            [binaries / words[0], *words[1:]], env=environment, stdout=output, stderr=output, start_new_session=True
        )
    try:
        yield
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=30, help="Veil's rounds")
    parser.add_argument("--stock-rounds", type=int, default=5, help="Flower's rounds")
    asked = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="veil-latency-"))
    plan, stock = plan_of(asked.rounds), plan_of(asked.stock_rounds)
    if plan.simulation is None:
        raise SystemExit("the demo has no simulation section")
    with Screen(quiet=False) as screen:
        pool, _ = prepare(plan, plan.simulation, Path.cwd(), screen)
    with Deployment.create(folder / "federation") as deployment:
        enrol(deployment, pool, plan.simulation, Path.cwd(), runs=2)
        ours = veil_rounds(deployment, plan)
    theirs = stock_rounds(deployment, stock, pool.features.shape[1], folder)
    shutil.rmtree(folder)
    figures = {
        name: {
            "rounds": len(seconds),
            "median_s": round(statistics.median(seconds[1:]), 3),
            "min_s": round(min(seconds[1:]), 3),
            "max_s": round(max(seconds[1:]), 3),
            "first_s": round(seconds[0], 3),
        }
        for name, seconds in {"veil": ours, "flower": theirs}.items()
    }
    ratio = figures["flower"]["median_s"] / figures["veil"]["median_s"]
    rows = [
        f"| {WHO[name]} | {one['rounds']} | {one['median_s']} ({one['min_s']} to {one['max_s']}) | {one['first_s']} |"
        for name, one in figures.items()
    ]
    (HERE / "LATENCY.md").write_text(
        REPORT.format(rows="\n".join(rows), ratio=ratio, rounds=asked.rounds, stock_rounds=asked.stock_rounds),
        encoding="utf-8",
    )
    print(json.dumps({**figures, "ratio": round(ratio, 1)}, indent=2))


if __name__ == "__main__":
    main()
