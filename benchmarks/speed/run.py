# SPDX-License-Identifier: Apache-2.0
"""`make bench`: Veil and its peers on the same work on this machine, one after the other, in turns.

Promises each system its own process, each peer its own environment (never Veil's), medians over repeats, the memory of
the whole tree of processes, and a note beside every figure that was measured on less than the whole workload.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from measure import Measured, measure
from report import Row, machine, save
from workloads import NAMES, prepare

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
LIMIT_S = 900.0


@dataclass(frozen=True, kw_only=True, slots=True)
class System:
    """One system that is measured.

    Attributes:
        name: its word in tables and speed.json.
        script: its program, below this folder.
        workloads: those it can do.
        environment: the peer's requirements file without its ending; None for Veil's own interpreter.
        launcher: options of the interpreter before the script.
        variables: set in its environment.
        changes: keys of a workload that are set otherwise, by workload.
        notes: what a reader must know, by workload.
        at_most: repeats that it gets at most, because one takes long.
    """

    name: str
    script: str
    workloads: str
    environment: str | None = None
    launcher: Sequence[str] = ()
    variables: dict[str, str] = field(default_factory=dict)
    changes: dict[str, dict[str, object]] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    at_most: int = 9


ONE_THREAD = {"OMP_NUM_THREADS": "1"}
PFL_NOTE = "no per-record clipping: the batch's gradient is clipped, noise once for the sum of all sites"
TEN_SITES = {"sites": 10, "cohort": 10}
SYSTEMS = (
    System(name="floor", script="floor.py", workloads="abc", notes={"c": "with one pass of the backbone"}),
    System(
        name="veil",
        script="veil_side.py",
        workloads="abc",
        notes={"c": "reads its table itself; features of the held-out notes too"},
    ),
    System(
        name="veil-processes",
        script="veil_side.py",
        workloads="ab",
        variables={"SPEED_ENGINE": "processes"},
        notes={"a": "--engine processes, one per core", "b": "--engine processes"},
    ),
    System(
        name="veil-fedsgd",
        script="veil_side.py",
        workloads="a",
        variables={"SPEED_VEIL": "dp-fedsgd", "SPEED_ENGINE": "processes"},
        notes={
            "a": "--engine processes; Veil's default algorithm: one clipped sum of all records a round, not 10 steps"
        },
    ),
    System(
        name="veil-second",
        script="veil_side.py",
        workloads="c",
        variables={"SPEED_VEIL": "second"},
        notes={"c": "a second run on the same notes: features from the cache"},
    ),
    System(
        name="flower-ray-opacus",
        script="peers/flower_opacus.py",
        workloads="ac",
        environment="flower",
        changes={"a": {"rounds": 5}},
        notes={
            "a": "ε asked of Opacus each round, as in its example; 5 rounds of 20 measured, not extrapolated",
            "c": "backbone in every round's forward pass; a pass of batches of 32 and an evaluation a round, as in its "
            "example",
        },
        at_most=1,
    ),
    System(
        name="flower-ray-opacus-unjudged",
        script="peers/flower_opacus.py",
        workloads="c",
        environment="flower",
        variables={"SPEED_EVALUATE": "no"},
        notes={"c": "backbone in every round's forward pass; a pass of batches of 32 a round; no client evaluates"},
        at_most=1,
    ),
    System(
        name="flower-ray-opacus-no-epsilon",
        script="peers/flower_opacus.py",
        workloads="a",
        environment="flower",
        variables={"SPEED_EPSILON": "no"},
        notes={"a": "the same, ε never asked"},
        at_most=2,
    ),
    System(
        name="flower-ray",
        script="peers/flower_opacus.py",
        workloads="b",
        environment="flower",
        notes={"b": "no Opacus"},
        at_most=2,
    ),
    System(
        name="flower-ray-cached",
        script="peers/flower_cached.py",
        workloads="c",
        environment="flower",
        notes={"c": "features of every note once, before the rounds"},
        at_most=2,
    ),
    System(
        name="pfl",
        script="peers/pfl_sim.py",
        workloads="ab",
        environment="pfl",
        variables=ONE_THREAD,
        changes={"a": {"threads": 1}, "b": {"threads": 1}},
        notes={"a": f"one process; {PFL_NOTE}", "b": "one process"},
        at_most=2,
    ),
    System(
        name="pfl-2-processes",
        script="peers/pfl_sim.py",
        workloads="ab",
        environment="pfl",
        launcher=("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"),
        variables=ONE_THREAD,
        changes={"a": {"threads": 1}, "b": {"threads": 1}},
        notes={"a": f"torchrun; {PFL_NOTE}", "b": "torchrun"},
        at_most=2,
    ),
    System(
        name="nvflare",
        script="peers/nvflare_sim.py",
        workloads="ab",
        environment="nvflare",
        changes={"a": TEN_SITES, "b": TEN_SITES | {"rounds": 30}},
        notes={
            "a": "10 sites instead of 100, each a process: 200 client-rounds measured, not extrapolated",
            "b": "10 clients instead of 1,000, each a process; 30 rounds of 100 measured, not extrapolated",
        },
        at_most=1,
    ),
)


def main() -> None:
    """Measure what is asked for and write speed.json, RESULTS.md and the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workloads", default=",".join(NAMES), help="a,b,c or some of them")
    parser.add_argument("--systems", help="names, with commas between; without it, all. The floor always runs")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "bench", help="environments, data, logs")
    parser.add_argument("--output", type=Path, default=HERE.parent, help="folder of speed.json and RESULTS.md")
    chosen = parser.parse_args()
    work = chosen.work.resolve()
    names = chosen.systems.split(",") if chosen.systems else [system.name for system in SYSTEMS]
    unknown = set(names) - {system.name for system in SYSTEMS}
    if unknown:
        parser.error(f"no such system: {', '.join(sorted(unknown))}")
    systems = [system for system in SYSTEMS if system.name in {"floor", *names}]
    described = machine()
    for name in chosen.workloads.split(","):
        save(compare(name, systems, chosen.repeats, work), described, chosen.output)


def compare(workload: str, systems: Sequence[System], repeats: int, work: Path) -> list[Row]:
    """One workload: every system in turn, as often as asked, and the medians."""
    able = [system for system in systems if workload in system.workloads]
    interpreters = {system.name: interpreter(system.environment, work) for system in able}
    document = prepare(workload, work)
    answers: dict[str, list[dict[str, object]]] = {system.name: [] for system in able}
    for turn in range(repeats):
        for system in able:
            if turn < system.at_most:
                one = run_once(system, interpreters[system.name], document, work)
                print(json.dumps({"workload": workload, "system": system.name, "turn": turn} | one), flush=True)
                answers[system.name].append(one)
    floor = answers["floor"]
    if failed := [str(one["failed"]) for one in floor if "failed" in one]:
        sys.exit(f"The floor of {workload} was not measured, so nothing can be compared: {failed[0]}")
    return [row(workload, system, answers[system.name], floor) for system in able if answers[system.name]]


def interpreter(name: str | None, work: Path) -> Path:
    """A peer's own Python with exactly its requirements, set up if they changed; Veil's own for None."""
    if name is None:
        return Path(sys.executable)
    wanted = HERE / "peers" / f"{name}.txt"
    folder = work / "environments" / name
    installed = folder / "installed.txt"
    python = folder / "bin" / "python"
    if not installed.is_file() or installed.read_bytes() != wanted.read_bytes():
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "-qq", "--no-deps", "-r", str(wanted)], check=True)
        shutil.copyfile(wanted, installed)
    return python


def run_once(system: System, python: Path, document: dict[str, object], work: Path) -> dict[str, object]:
    """Run one system once.

    Returns:
        what it answered, with memory and time of the whole process; or {"failed": reason}.
    """
    folder = work / "runs" / f"{document['workload']}-{system.name}"
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "own").mkdir(parents=True)
    asked = document | system.changes.get(str(document["workload"]), {}) | {"folder": str(folder / "own")}
    (folder / "workload.json").write_text(json.dumps(asked), encoding="utf-8")
    quiet = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_HOME": str(folder / "own"), "HF_HUB_OFFLINE": "1"}
    environment = {**os.environ, **quiet, **system.variables}
    environment.pop("PYTHONPATH", None)
    command = [str(python), *system.launcher, str(HERE / system.script), str(folder / "workload.json")]
    measured = measure(command, environment=environment, folder=folder, limit_s=LIMIT_S)
    return read_answer(measured)


def read_answer(measured: Measured) -> dict[str, object]:
    """The program's last JSON line, with what was seen from outside."""
    if measured.code is None:
        return {"failed": f"not done after {LIMIT_S:.0f} s"}
    lines = [line for line in measured.stdout.splitlines() if line.startswith('{"')]
    if measured.code or not lines:
        last = (measured.stderr.strip() or measured.stdout.strip()).splitlines()[-1:]
        return {"failed": f"exit {measured.code}: {' '.join(last)[:300]}"}
    answer: dict[str, object]
    answer, _ = json.JSONDecoder().raw_decode(lines[-1])  # two processes may have written on one line
    seen = {"peak_mb": measured.peak_mb, "samples": measured.samples, "process_seconds": measured.process_seconds}
    return answer | seen


def row(workload: str, system: System, answers: Sequence[dict[str, object]], floor: Sequence[dict[str, object]]) -> Row:
    """The medians of one system's answers."""
    note = system.notes.get(workload, "")
    done = [answer for answer in answers if "failed" not in answer]
    if not done:
        return Row(workload=workload, system=system.name, note=f"failed: {answers[0]['failed']}. {note}".strip())
    seconds = [_number(answer["seconds"]) for answer in done]
    client_rounds = int(_number(done[0]["client_rounds"]))
    bare = statistics.median(_number(answer["seconds"]) / _number(answer["client_rounds"]) for answer in floor)
    middle = statistics.median(seconds)
    wire = done[0].get("wire_bytes")
    return Row(
        workload=workload,
        system=system.name,
        seconds=round(middle, 3),
        client_rounds_per_s=round(client_rounds / middle, 2),
        peak_mb=statistics.median(_number(answer["peak_mb"]) for answer in done),
        wire_bytes=None if wire is None else int(_number(wire)),
        ratio_to_floor=round(middle / client_rounds / bare, 2),
        client_rounds=client_rounds,
        repeats=len(done),
        fastest_s=min(seconds),
        slowest_s=max(seconds),
        process_seconds=statistics.median(_number(answer["process_seconds"]) for answer in done),
        accuracy=_optional(done[0].get("accuracy")),
        version=str(done[0].get("version", "")),
        note=note,
    )


def _number(value: object) -> float:
    if not isinstance(value, int | float):
        raise TypeError(f"{value!r} in an answer; expected a number")
    return float(value)


def _optional(value: object) -> float | None:
    return None if value is None else _number(value)


if __name__ == "__main__":
    main()
