# SPDX-License-Identifier: Apache-2.0
"""How long Veil's commands and processes take to start, and which heavy libraries each one loads, to STARTUP.md.

Promises fresh processes only, a real coordinator and site with a finished run behind them, medians with the smallest
and the largest, and CPU seconds beside wall seconds, since another process on the machine changes only the latter.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from veil.common.health import serving
from veil.common.plan import RunPlan
from veil.server.jobs import Job, Phase
from veil.server.submission import submit
from veil.simulations.deployment import Deployment, free_ports

HERE = Path(__file__).parent
SITES = ("Aachen", "Bonn")
HEAVY = (
    "torch",
    "opacus",
    "transformers",
    "flwr",
    "pandas",
    "pyarrow",
    "sqlalchemy",
    "sklearn",
    "matplotlib",
    "dp_accounting",
    "scipy",
    "numpy",
    "pydantic",
    "cryptography",
    "grpc",
    "httpx",
    "fastapi",
    "PIL",
    "rich",
)
VEIL = "import sys; from veil.simulations.cli import run_command; sys.exit(run_command(sys.argv[1:]))"
LOADED = "\nprint(*(one for one in {heavy!r} if one in sys.modules), file=sys.stderr)"
WORD = "import sys; from veil.simulations.cli import run_command; run_command(sys.argv[1:])" + LOADED
PROCESS = "import sys, importlib; importlib.import_module(sys.argv[1])" + LOADED
TICKS = os.sysconf("SC_CLK_TCK")
REPORT = """\
# Seconds until it is there

{repeats} fresh processes of each, one after the other, on {cores} CPU cores ({machine}, Python {python}): the median,
with the smallest and the largest. CPU counts user and system time of all processes that belong to it. What each loads
is looked for among {heavy}. Written by

    python benchmarks/startup.py --repeats {repeats}

## Commands

On a coordinator of two sites and a site with one run of four rounds behind it.

| command | CPU s | wall s | loads |
| --- | --- | --- | --- |
{words}

## Processes, until they are loaded

| process | CPU s | wall s | loads |
| --- | --- | --- | --- |
{processes}

## Services, from their start until their health says SERVING

A coordinator is its own process and its link; a site is an agent and its executor, which has read its table by then and
is connected to the coordinator.

| service | CPU s | wall s |
| --- | --- | --- |
{services}
"""
PLAN = {
    "name": "startup",
    "task": {"kind": "tabular-classification", "labels": ["well", "ill"], "width": 2},
    "training": {"rounds": 3},
    "privacy": {"target_epsilon": 2.0},
    "cohort": {"min_sites": 2},
}


@dataclass(frozen=True, kw_only=True)
class Start:
    """One start.

    Attributes:
        cpu_s: user and system seconds of the processes.
        wall_s: from the beginning until it is there.
    """

    cpu_s: float
    wall_s: float


def timed(command: Sequence[str]) -> Start:
    """One command to its end."""
    before = time.perf_counter()
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, used = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {child.returncode}")
    return Start(cpu_s=used.ru_utime + used.ru_stime, wall_s=time.perf_counter() - before)


def loads(code: str, words: Sequence[str]) -> str:
    """Which heavy libraries a fresh process has loaded after some code."""
    script = code.format(heavy=HEAVY)
    done = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True, check=True)
    return done.stderr.splitlines()[-1]


def cpu_s(pid: int) -> float:
    """User and system seconds of a process and of those it started that run."""
    total = 0.0
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text(encoding="ascii").rpartition(")")[2].split()
            except OSError:
                continue
            if int(entry.name) == pid or int(fields[1]) == pid:
                total += (int(fields[11]) + int(fields[12])) / TICKS
    return total


def until_serving(deployment: Deployment, name: str, start: Callable[[], None], address: str) -> Start:
    """Start a service and wait for its health; then end it."""
    before = time.perf_counter()
    start()
    deployment.wait_for(lambda: serving(address), f"{name} serving")
    passed = time.perf_counter() - before
    child = deployment.processes.pop(name)
    used = cpu_s(child.pid)
    child.end()
    return Start(cpu_s=used, wall_s=passed)


@contextmanager
def federation(folder: Path) -> Iterator[tuple[Deployment, Job]]:
    """A coordinator and two sites, after a run."""
    with Deployment.create(folder) as deployment:
        for name in SITES:
            table = folder / f"{name}.csv"
            rows = [f"{one % 7},{one % 5},{'ill' if one % 2 else 'well'}" for one in range(200)]
            table.write_text("\n".join(["a,b,outcome", *rows]), encoding="utf-8")
            labels = {"well": "well", "ill": "ill"}
            data = {"table": str(table), "features": ["a", "b"], "label": "outcome", "labels": labels}
            limits = {"epsilon_per_run": 4.0, "epsilon_lifetime": 8.0, "approval": "auto-within-limits"}
            deployment.add_site(name, data=data, limits=limits, health_address=f"127.0.0.1:{free_ports(1)[0]}")
            deployment.start_site(name)
        job = submit(deployment.home, RunPlan.model_validate(PLAN), base=Path.cwd(), sites=())
        deployment.finish(job, 300.0)
        if job.status.phase is not Phase.FINISHED:
            raise SystemExit(job.status.message)
        yield deployment, job


def commands(deployment: Deployment, job: Job) -> dict[str, list[str]]:
    """What is shown of a command, and the whole of it."""
    site = ["--home", str(deployment.site_folder(SITES[0]))]
    coordinator = ["--home", str(deployment.home.folder)]
    keys = job.folder / "keys"
    keys.mkdir()
    for name, file in deployment.sites.items():
        (keys / f"{name}.pem").write_bytes(public(file.agent.key))
    (keys / "coordinator.pem").write_bytes(public(deployment.home.folder / "coordinator.key"))
    certificate = ["certificate", "verify", str(job.folder / "result" / "certificate.json"), "--keys", str(keys)]
    return {
        "veil --help": ["--help"],
        "veil version": ["version"],
        "veil site init --help": ["site", "init", "--help"],
        "veil site status": ["site", "status", *site],
        "veil site approve": ["site", "approve", *site],
        "veil site ledger show": ["site", "ledger", "show", *site],
        "veil site ledger verify": ["site", "ledger", "verify", *site],
        "veil certificate verify": certificate,
        "veil coordinator status": ["coordinator", "status", *coordinator],
        "veil health": ["health", deployment.home.settings.health_address],
    }


def public(key: Path) -> bytes:
    """The public half of a key, PEM."""
    return subprocess.run(
        [sys.executable, "-c", VEIL, "certificate", "key", key], capture_output=True, check=True
    ).stdout


def row(name: str, starts: Sequence[Start], *rest: str) -> str:
    def spread(values: Sequence[float]) -> str:
        return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"

    cells = [name, spread([one.cpu_s for one in starts]), spread([one.wall_s for one in starts]), *rest]
    return f"| {' | '.join(cells)} |"


def measure(folder: Path, repeats: int) -> dict[str, str]:
    """The three tables."""
    with federation(folder) as (deployment, job):
        words = []
        for name, line in commands(deployment, job).items():
            starts = [timed([sys.executable, "-c", VEIL, *line]) for _ in range(repeats)]
            words.append(row(f"`{name}`", starts, loads(WORD, line) or "none"))
        processes = []
        for name, module in {
            "agent": "veil.client.agent",
            "executor": "veil.client.deployed",
            "coordinator's page": "veil.server.page",
            "link": "veil.server.link_server",
            "runner": "veil.server.runner",
        }.items():
            starts = [timed([sys.executable, "-c", f"import {module}"]) for _ in range(repeats)]
            processes.append(row(name, starts, loads(PROCESS, [module])))
        for name in SITES:
            deployment.processes.pop(name).end()
        services = [row("site", [site_start(deployment) for _ in range(repeats)])]
        deployment.processes.pop("coordinator").end()
        services.append(row("coordinator", [coordinator_start(deployment) for _ in range(repeats)]))
    return {"words": "\n".join(words), "processes": "\n".join(processes), "services": "\n".join(services)}


def site_start(deployment: Deployment) -> Start:
    name = SITES[0]
    address = deployment.sites[name].agent.health_address
    return until_serving(deployment, name, lambda: deployment.start_site(name), address)


def coordinator_start(deployment: Deployment) -> Start:
    address = deployment.home.settings.health_address
    return until_serving(deployment, "coordinator", deployment.start_coordinator, address)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=10, help="fresh processes of each")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="veil-startup-") as folder:
        tables = measure(Path(folder), asked.repeats)
    report = REPORT.format(
        repeats=asked.repeats,
        cores=os.cpu_count(),
        machine=platform.machine(),
        python=platform.python_version(),
        heavy=", ".join(HEAVY),
        **tables,
    )
    (HERE / "STARTUP.md").write_text(report, encoding="utf-8")
    print(report)


if __name__ == "__main__":
    main()
