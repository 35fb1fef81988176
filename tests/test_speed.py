# SPDX-License-Identifier: Apache-2.0
"""The harness of `make bench` counts detached processes' memory, leaves none behind, and writes what it measured."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest

SPEED = Path(__file__).parents[1] / "benchmarks" / "speed"
HELD_MB = 48
GRANDCHILD = f"""
import signal, sys
held = b"\\1" * ({HELD_MB} << 20)
sys.stdout.write("ready\\n"); sys.stdout.flush()
signal.pause()
"""
CHILD = f"""
import json, subprocess, sys, time
held = b"\\1" * ({HELD_MB} << 20)
detached = subprocess.Popen([sys.executable, "-c", {GRANDCHILD!r}], start_new_session=True, stdout=subprocess.PIPE)
detached.stdout.readline()
time.sleep(1.0)
print(json.dumps({{"seconds": 2.0, "client_rounds": 10, "detached": detached.pid}}))
"""


def module(name: str) -> ModuleType:
    """A module of the bench, which is not installed."""
    found = importlib.util.spec_from_file_location(f"speed_{name}", SPEED / f"{name}.py")
    if found is None or found.loader is None:
        pytest.fail(f"{name}.py is not there")
    loaded = importlib.util.module_from_spec(found)
    sys.modules[found.name] = loaded
    found.loader.exec_module(loaded)
    return loaded


def ended(pid: int) -> bool:
    """Whether a process is gone, or at most waits for whoever collects it."""
    stat = Path(f"/proc/{pid}/stat")
    return not stat.exists() or stat.read_text(encoding="utf-8").rpartition(") ")[2].startswith("Z")


def test_memory_of_a_detached_grandchild_counts_and_it_is_ended(tmp_path: Path) -> None:
    """The child and its grandchild, in another session, hold 48 MiB each; both are gone afterwards."""
    measured = module("measure").measure([sys.executable, "-c", CHILD], environment=dict(os.environ), folder=tmp_path)

    assert measured.code == 0, measured.stderr
    assert 2 * HELD_MB <= measured.peak_mb <= 2 * HELD_MB + 60
    assert ended(json.loads(measured.stdout)["detached"])


def test_a_program_past_its_limit_is_stopped(tmp_path: Path) -> None:
    """A limit of no time at all ends a program that would wait for ever, and says so."""
    command = [sys.executable, "-c", "import signal; signal.pause()"]

    measured = module("measure").measure(command, environment=dict(os.environ), folder=tmp_path, limit_s=0.0)

    assert measured.code is None


def test_an_answer_is_read_also_where_two_processes_share_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SPEED))
    said = 'starting\n{"seconds": 2.0}{"seconds": 3.0}\n'
    measured = module("measure").Measured(code=0, stdout=said, stderr="", peak_mb=1.0, samples=4, process_seconds=5.0)
    assert module("run").read_answer(measured)["seconds"] == 2.0


def test_rows_replace_a_workload_whole_and_the_rest_of_the_page_stays(tmp_path: Path) -> None:
    """Ratios of different runs do not compare, so no row of an older run of the same workload is left."""
    report = module("report")
    figures = {"seconds": 2.0, "fastest_s": 1.5, "slowest_s": 2.5, "client_rounds": 10, "repeats": 3, "peak_mb": 80.0}
    older = [report.Row(workload="a", system="gone"), report.Row(workload="b", system="kept", **figures)]
    (tmp_path / "RESULTS.md").write_text("above\n<!-- speed -->\nold\n<!-- /speed -->\nbelow\n", encoding="utf-8")
    report.save(older, "Machine: one.", tmp_path)

    report.save([report.Row(workload="a", system="new", note="failed: exit 1", **figures)], "Machine: two.", tmp_path)

    stored = json.loads((tmp_path / "speed.json").read_text(encoding="utf-8"))
    page = (tmp_path / "RESULTS.md").read_text(encoding="utf-8")
    assert [(row["workload"], row["system"]) for row in stored] == [("a", "new"), ("b", "kept")]
    wanted = {"workload", "system", "seconds", "client_rounds_per_s", "peak_mb", "wire_bytes", "ratio_to_floor"}
    assert wanted <= set(stored[0])
    assert "| new | 2.00 (1.50 to 2.50) | 10 |" in page
    assert page.startswith("above\n<!-- speed -->\nMachine: two.")
    assert page.endswith("<!-- /speed -->\nbelow\n")
    assert (tmp_path / "speed.png").stat().st_size > 0
