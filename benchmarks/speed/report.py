# SPDX-License-Identifier: Apache-2.0
"""What the measurements say: benchmarks/speed.json, the part of RESULTS.md between the speed markers, a picture.

Promises to replace the workloads that were measured and to leave everything else as it stands.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

TITLES = {
    "a": "DP head: 100 sites x 500 records x 384 features x 10 classes, 20 rounds of 10 local steps, every site",
    "b": "LR-MNIST shape, not private: 1,000 clients x 60 records x 784 features x 10 classes, 10 a round, 100 rounds",
    "c": "The heart demo end to end: raw notes of four hospitals, MiniLM, 30 rounds",
}
OPENING, CLOSING = "<!-- speed -->", "<!-- /speed -->"


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One system on one workload; figures are medians over repeats, None where it failed.

    Attributes:
        workload: a, b or c.
        system: its name.
        seconds: from the call that starts the simulation to the end of the last round.
        client_rounds_per_s: trainings of one site in one round, by the second.
        peak_mb: largest memory of all its processes together, in MiB (PSS).
        wire_bytes: of the adapter, down and up, for one client-round; None where the system does not tell.
        ratio_to_floor: seconds a client-round over those of the floor in the same run.
        client_rounds: those that were run.
        repeats: runs that the medians are over.
        fastest_s: the shortest of them.
        slowest_s: the longest of them.
        process_seconds: of the whole process, imports and shutdown included.
        accuracy: on the training features, or held-out notes for (c).
        version: of the system.
        note: how the work differs.
    """

    workload: str
    system: str
    seconds: float | None = None
    client_rounds_per_s: float | None = None
    peak_mb: float | None = None
    wire_bytes: int | None = None
    ratio_to_floor: float | None = None
    client_rounds: int | None = None
    repeats: int = 0
    fastest_s: float | None = None
    slowest_s: float | None = None
    process_seconds: float | None = None
    accuracy: float | None = None
    version: str = ""
    note: str = ""

    @property
    def seconds_each(self) -> float | None:
        """Seconds a client-round."""
        return None if self.seconds is None or not self.client_rounds else self.seconds / self.client_rounds


def machine() -> str:
    """This machine in one line, with how busy it is."""
    cpu = _value(Path("/proc/cpuinfo"), "model name")
    memory = int(_value(Path("/proc/meminfo"), "MemTotal").split()[0]) / 2**20
    load = os.getloadavg()[0]
    return (
        f"Machine: {cpu}, {os.cpu_count()} cores, {memory:.0f} GiB, {platform.system()} {platform.release()}, "
        f"Python {platform.python_version()}, {datetime.now(UTC):%Y-%m-%d}, load {load:.1f} before the run."
    )


def _value(path: Path, key: str) -> str:
    for line in path.read_text(encoding="utf-8").splitlines():
        name, _, value = line.partition(":")
        if name.strip() == key:
            return value.strip()
    return "unknown"


def save(rows: Sequence[Row], described: str, folder: Path) -> None:
    """Put rows in the place of all older ones of the same workloads; write speed.json, RESULTS.md, speed.png."""
    store = folder / "speed.json"
    merged = merge(_stored(store), rows)
    store.write_text(json.dumps([asdict(row) for row in merged], indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    results = folder / "RESULTS.md"
    text = results.read_text(encoding="utf-8") if results.exists() else f"{OPENING}\n{CLOSING}\n"
    picture = "![milliseconds a client-round and memory, by system and workload](speed.png)"
    results.write_text(replaced(text, f"{described}\n\n{picture}\n\n{tables(merged)}"), encoding="utf-8")
    draw(merged, folder / "speed.png")


def _stored(store: Path) -> list[Row]:
    if not store.exists():
        return []
    return [Row(**one) for one in json.loads(store.read_text(encoding="utf-8"))]


def merge(older: Iterable[Row], newer: Sequence[Row]) -> list[Row]:
    """Newer rows, and older ones of the workloads that were not measured; the floor first, then by speed.

    Rows of one workload are always of one run: ratios of different runs do not compare.
    """
    measured = {row.workload for row in newer}
    kept = [row for row in older if row.workload not in measured]
    return sorted([*newer, *kept], key=_order)


def _order(row: Row) -> tuple[str, bool, float]:
    each = row.seconds_each
    return row.workload, row.system != "floor", float("inf") if each is None else each


def replaced(text: str, section: str) -> str:
    """A text with its part between the markers exchanged.

    Raises:
        ValueError: without the markers.
    """
    before, opening, rest = text.partition(OPENING)
    _, closing, after = rest.partition(CLOSING)
    if not opening or not closing:
        raise ValueError(f"RESULTS.md has no {OPENING} … {CLOSING}; expected both")
    return f"{before}{OPENING}\n{section.strip()}\n{CLOSING}{after}"


def tables(rows: Sequence[Row]) -> str:
    """A heading and a table for each workload."""
    parts = []
    for name in sorted({row.workload for row in rows}):
        own = [row for row in rows if row.workload == name]
        parts.append(f"### ({name}) {TITLES[name]}\n\n{table(own)}")
    versions = sorted({row.version for row in rows if row.version})
    return "\n\n".join(parts) + f"\n\nVersions: {'; '.join(versions)}."


def table(rows: Sequence[Row]) -> str:
    """One workload's rows."""
    lines = [
        "| system | seconds | client-rounds | client-rounds/s | x floor | peak MiB | bytes down + up | accuracy | |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        columns = (
            row.system,
            _spread(row),
            _shown(row.client_rounds),
            _shown(row.client_rounds_per_s),
            _shown(row.ratio_to_floor),
            _shown(row.peak_mb),
            _shown(row.wire_bytes),
            "-" if row.accuracy is None else f"{100 * row.accuracy:.1f} %",
            row.note,
        )
        lines.append(f"| {' | '.join(columns)} |")
    return "\n".join(lines)


def _spread(row: Row) -> str:
    """Median with the fastest and the slowest run."""
    if row.seconds is None or row.fastest_s is None or row.slowest_s is None:
        return "-"
    if row.repeats == 1:
        return f"{_shown(row.seconds)} (one run)"
    return f"{_shown(row.seconds)} ({_shown(row.fastest_s)} to {_shown(row.slowest_s)})"


def _shown(value: float | None) -> str:
    if value is None:
        return "-"
    if isinstance(value, int) or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def draw(rows: Sequence[Row], path: Path) -> None:
    """Milliseconds a client-round and memory of every system, a line for each workload."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    done = [row for row in rows if row.seconds_each is not None]
    names = sorted({row.workload for row in done})
    if not names:
        return
    figure, axes = plt.subplots(len(names), 2, figsize=(11, 1.0 + 2.4 * len(names)), squeeze=False)
    for line, name in zip(axes, names, strict=True):
        own = [row for row in done if row.workload == name][::-1]
        systems = [row.system for row in own]
        colours = ["tab:blue" if system.startswith("veil") else "0.6" for system in systems]
        for axis, values, words in (
            (line[0], [1000 * (row.seconds_each or 0.0) for row in own], "ms a client-round, log scale"),
            (line[1], [row.peak_mb or 0.0 for row in own], "peak MiB, all processes"),
        ):
            bars = axis.barh(systems, values, color=colours)
            axis.bar_label(bars, labels=[_shown(value) for value in values], padding=3, fontsize=8)
            axis.set_title(f"({name}) {words}", fontsize=9)
            axis.tick_params(labelsize=8)
            axis.margins(x=0.15)
        line[0].set_xscale("log")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
