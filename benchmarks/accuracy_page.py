# SPDX-License-Identifier: Apache-2.0
"""The accuracy study's files: accuracy.json and its part of RESULTS.md.

Promises, beside each aim, the figures that decide it, met or not.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable
from pathlib import Path

from accuracy_rows import COMPARED, DIVISIONS, METHODS, OWN, Gap, Results, Row, Run, row, set_name
from figures import EPSILONS

LARGE_SITES = 200
"""Training units of a site, on average, from which the aims against pooling hold."""


def save(runs: Iterable[Run], folder: Path) -> None:
    """Put rows in the place of older ones; write accuracy.json and RESULTS.md.

    Args:
        runs: everything in the work file.
        folder: where both files and RESULTS.template.md are.
    """
    store = folder / "accuracy.json"
    groups: dict[tuple[object, ...], list[Run]] = {}
    for run in sorted(runs, key=lambda run: run.seed):
        if run.method in METHODS:
            groups.setdefault(run.key[:-1], []).append(run)
    older = [Row(**one) for one in json.loads(store.read_text(encoding="utf-8"))] if store.exists() else []
    rows = {(one.set, one.method, one.epsilon): one for one in [*older, *map(row, groups.values())]}
    ordered = sorted(rows.values(), key=_order)
    store.write_text(json.dumps([one.__dict__ for one in ordered], indent=1) + "\n", encoding="utf-8")
    results, template = folder / "RESULTS.md", (folder / "RESULTS.template.md").read_text(encoding="utf-8")
    page = results.read_text(encoding="utf-8") if results.exists() else ""
    for name, text in sections(Results(ordered)).items():
        template = template.replace(f"{{{{{name}}}}}", text)
    results.write_text(template.replace("{{speed}}", speed_section(page)), encoding="utf-8")


def _order(one: Row) -> tuple[int, str, int, float]:
    return (list(OWN).index(one.set.split(",")[0]), one.set, list(METHODS).index(one.method), one.epsilon or 0.0)


def speed_section(page: str) -> str:
    """What `make bench` wrote between its markers, to be kept."""
    return page.partition("<!-- speed -->")[2].partition("<!-- /speed -->")[0].strip()


def sections(results: Results) -> dict[str, str]:
    """The parts of the page by their name in the template."""
    return {
        "accuracy": main_table(results),
        "aims": aims(results),
        "divisions": division_table(results),
        "checks": check_table(results),
        "sites": site_table(results),
        "means": demo_mean(results),
    }


def main_table(results: Results) -> str:
    """Every set and ε against every method."""
    lines = [
        f"| set | ε | {' | '.join(METHODS[method].title for method in COMPARED)} |",
        f"|---|---|{'---|' * len(COMPARED)}",
    ]
    for name in results.sets():
        for epsilon in EPSILONS:
            cells = [_cell(results.find(name, method, epsilon)) for method in COMPARED]
            lines.append(f"| {name} | {epsilon:g} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(found: Row | None) -> str:
    if found is None:
        return "-"
    return f"{found.mean:.1f} ± {found.sd:.1f}" if found.seeds > 1 else f"{found.mean:.1f}"


def site_table(results: Results) -> str:
    """How each set is divided, and what the tuning chose for it."""
    lines = [
        "| set | divided | units that a site trains on: fewest, mean, most | FedAvg tuned, ε = 1 | ε = 3 | ε = 8 |",
        "|---|---|---|---|---|---|",
    ]
    for name in results.sets():
        sites = results.sites(name)
        sizes = "-" if sites is None else ", ".join(f"{size:g}" for size in sites.units)
        found = [results.find(name, "fedavg-opacus-tuned", epsilon) for epsilon in EPSILONS]
        settings = [one.settings[0] if one is not None and one.settings else "-" for one in found]
        lines.append(f"| {name} | {OWN[name]} | {sizes} | {' | '.join(settings)} |")
    return "\n".join(lines)


def aims(results: Results) -> str:
    """What Veil is meant to reach, and whether it does."""
    sets = results.sets()
    large = [name for name in sets if (one := results.sites(name)) is not None and one.units[1] >= LARGE_SITES]
    where = f"sites of {LARGE_SITES} units on average"
    near = _gaps(results, sets, EPSILONS, "veil-distributed", "centralized-dp")
    near_at_3 = _gaps(results, large, (3.0,), "veil-distributed", "pooled")
    near_at_1 = _gaps(results, large, (1.0,), "veil-distributed", "pooled")
    above = _gaps(results, sets, EPSILONS, "veil-local", "fedavg-opacus")
    above_at_1 = _gaps(results, sets, (1.0,), "veil-local", "fedavg-opacus")
    return "\n".join(
        [
            "| aim | met | worst | how many |",
            "|---|---|---|---|",
            _aim("distributed noise within 1 point of pooled with DP", near, -1.0),
            _aim(f"distributed noise within 2 points of pooled without privacy at ε = 3, {where}", near_at_3, -2.0),
            _aim(f"distributed noise within 4 points of it at ε = 1, {where}", near_at_1, -4.0),
            _aim("local noise never below usual FedAvg + Opacus", above, 0.0),
            _mean_aim("local noise 4 points above it at ε = 1, mean over the sets", above_at_1, 4.0),
            *(_steady(results, method) for method in ("veil-local", "veil-distributed")),
        ]
    )


def _gaps(results: Results, sets: Iterable[str], epsilons: Iterable[float], method: str, other: str) -> dict[str, Gap]:
    found = {f"{name} at {eps:g}": results.gap(name, eps, method, other) for name in sets for eps in epsilons}
    return {where: gap for where, gap in found.items() if gap is not None}


def _aim(text: str, gaps: dict[str, Gap], least: float) -> str:
    if not gaps:
        return f"| {text} | - | not measured | - |"
    worst = min(gaps, key=lambda where: gaps[where].mean)
    missed = [f"{where} {gap}" for where, gap in gaps.items() if gap.mean < least]
    listed = f"; missed: {', '.join(missed)}" if missed else ""
    return (
        f"| {text} | {'no' if missed else 'yes'} | {worst}: {gaps[worst]} | "
        f"{len(gaps) - len(missed)} of {len(gaps)}{listed} |"
    )


def _mean_aim(text: str, gaps: dict[str, Gap], least: float) -> str:
    if not gaps:
        return f"| {text} | - | not measured | - |"
    mean = statistics.fmean(gap.mean for gap in gaps.values())
    shown = ", ".join(f"{where} {gap}" for where, gap in gaps.items())
    return f"| {text} | {'yes' if mean >= least else 'no'} | mean {mean:+.1f} | {shown} |"


def _steady(results: Results, method: str) -> str:
    text = f"{METHODS[method].title}: other divisions change it by less than the spread of the seeds"
    pairs = {
        f"{name}, {division} at {epsilon:g}": pair
        for name in results.sets()
        for division in DIVISIONS[name]
        for epsilon in EPSILONS
        if (pair := _divided(results, name, division, method, epsilon)) is not None
    }
    if not pairs:
        return f"| {text} | - | not measured | - |"
    gaps = {where: Gap.between(there, here) for where, (here, there) in pairs.items()}
    worst = max(gaps, key=lambda where: abs(gaps[where].mean))
    missed = [f"{where} {gaps[where]}" for where, pair in pairs.items() if not _within(*pair)]
    listed = f"; missed: {', '.join(missed)}" if missed else ""
    return (
        f"| {text} | {'no' if missed else 'yes'} | {worst}: {gaps[worst]} | "
        f"{len(gaps) - len(missed)} of {len(gaps)}{listed} |"
    )


def _divided(results: Results, name: str, division: str, method: str, epsilon: float) -> tuple[Row, Row] | None:
    """The set's own division and another one."""
    here, there = results.find(name, method, epsilon), results.find(set_name(name, division), method, epsilon)
    return None if here is None or there is None else (here, there)


def _within(here: Row, there: Row) -> bool:
    return abs(there.mean - here.mean) <= max(here.sd, there.sd)


def division_table(results: Results) -> str:
    """The sum-based rows under other divisions of the same training records."""
    lines = [
        "| set | divided | ε | local noise | difference | distributed noise | difference |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in results.sets():
        for division in DIVISIONS[name]:
            for epsilon in EPSILONS:
                pairs = [
                    _divided(results, name, division, method, epsilon) for method in ("veil-local", "veil-distributed")
                ]
                cells = [
                    "- | -" if pair is None else f"{_cell(pair[1])} | {Gap.between(pair[1], pair[0])}" for pair in pairs
                ]
                lines.append(f"| {name} | {division} | {epsilon:g} | {' | '.join(cells)} |")
    return "\n".join(lines)


def check_table(results: Results) -> str:
    """What is beside the comparison."""
    lines = ["| set | row | ε | seeds | accuracy |", "|---|---|---|---|---|"]
    for name in results.sets():
        for method in list(METHODS)[len(COMPARED) :]:
            for epsilon in METHODS[method].epsilons:
                found = results.find(name, method, epsilon)
                if found is not None:
                    shown = "none" if epsilon is None else f"{epsilon:g}"
                    lines.append(f"| {name} | {METHODS[method].title} | {shown} | {found.seeds} | {_cell(found)} |")
    return "\n".join(lines)


def demo_mean(results: Results) -> str:
    """The demo's mean over its splits."""
    found = results.find("demo", "demo", 3.0)
    if found is None:
        return "The demo was not measured."
    return f"The demo, mean over its {found.seeds} splits at ε = 3: {found.mean:.2f} %."
