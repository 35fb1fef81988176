# SPDX-License-Identifier: Apache-2.0
"""TRANSFER.md and transfer.json out of the runs of transfer.py."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median
from typing import Any

Rows = list[dict[str, Any]]
_PLACE, _LENGTHS = "{tables}", "{lengths}"


def write_page(rows: Rows, lengths: Rows, studies: list[str], folder: Path) -> None:
    """Write both; the words are the template's."""
    template = (folder / "TRANSFER.template.md").read_text(encoding="utf-8")
    rows.sort(key=lambda row: studies.index(row["study"]))
    kept = [{key: value for key, value in row.items() if key != "plan"} for row in rows]
    (folder / "transfer.json").write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    lines = [line for name in studies for line in _study([row for row in rows if row["study"] == name])]
    text = template.replace(_PLACE, "\n".join(lines)).replace(_LENGTHS, "\n".join(_lengths(lengths)))
    (folder / "TRANSFER.md").write_text(text, encoding="utf-8")


def _lengths(rows: Rows) -> list[str]:
    table = [f"| {row['study']} | {row['mode']} | {row['ratio']:.0f} |" for row in rows]
    return ["| records and model | mode | below the head / head |", "|---|---|---|", *table]


def _study(rows: Rows) -> list[str]:
    if all(row["mode"].startswith("head") for row in rows):
        return []
    first, noises = rows[0], [one for one in ("os", "none") if any(row["noise"] == one for row in rows)]
    what = {"os": f"ε = {first['epsilon']:g}", "none": "no noise"}
    head = {noise: f"{words} | above the head | macro-F1" for noise, words in what.items()}
    lines = [
        f"\n### {first['study']}\n",
        f"{first['units']} training units in {first['sites']} sites; {first['judged']} held-out records.\n",
        f"| mode | numbers that train | rounds | {' | '.join(head[one] for one in noises)} | seeds |",
        f"|---|---|---|{'---|---|---|' * len(noises)}---|",
    ]
    modes = list(dict.fromkeys(row["mode"] for row in rows))
    lines += [_line(mode, rows, noises) for mode in modes]
    return lines + _curves(rows, modes, noises)


def _line(mode: str, rows: Rows, noises: list[str]) -> str:
    mine = [row for row in rows if row["mode"] == mode]
    heads = {(row["noise"], row["seed"]): row["accuracy"] for row in rows if row["mode"] == _head_of(mode, rows)}
    cells = []
    for noise in noises:
        runs = [row for row in mine if row["noise"] == noise]
        gains = [row["accuracy"] - heads[noise, row["seed"]] for row in runs if (noise, row["seed"]) in heads]
        cells += [
            _spread([row["accuracy"] for row in runs]),
            _spread(gains, "+") if not mode.startswith("head") else "",
            _spread([row["macro_f1"] for row in runs]),
        ]
    training, first = mine[0]["plan"]["training"], mine[0]["plan"]["transfer"].get("head_rounds", 0)
    deep = f"{first} of the head, {training['rounds'] - first} of a sample of {training.get('sample_rate') or 1:g}"
    rounds = deep if first else f"{training['rounds']}"
    seeds = len({row["seed"] for row in mine})
    return f"| {mode} | {mine[0]['trained']:,} | {rounds} | {' | '.join(cells)} | {seeds} |"


def _head_of(mode: str, rows: Rows) -> str:
    """The head with the same kind of noise, where there is one."""
    shared = "head (distributed noise)"
    return shared if "distributed noise" in mode and any(row["mode"] == shared for row in rows) else "head"


def _curves(rows: Rows, modes: list[str], noises: list[str]) -> list[str]:
    """Median accuracy along the way, for each mode and noise."""
    lines = ["\nAccuracy (%) after each quarter of the rounds, medians:\n"]
    lines += ["| mode | noise | 1/4 | 1/2 | 3/4 | end |", "|---|---|---|---|---|---|"]
    for mode in modes:
        for noise in noises:
            runs = [row for row in rows if (row["mode"], row["noise"]) == (mode, noise)]
            curves = [[point["accuracy"] for point in row["curve"]] for row in runs]
            if curves:
                points = " | ".join(f"{median(values):.1f}" for values in zip(*curves, strict=True))
                label = "none" if noise == "none" else f"ε = {runs[0]['epsilon']:g}"
                lines.append(f"| {mode} | {label} | {points} |")
    return lines


def _spread(values: list[float], sign: str = "") -> str:
    if not values:
        return "not run"
    shown = f"{median(values):{sign}.1f}"
    return shown if len(values) == 1 else f"{shown} ({min(values):{sign}.1f} to {max(values):{sign}.1f})"
