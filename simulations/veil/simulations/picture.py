# SPDX-License-Identifier: Apache-2.0
"""The picture of a run: quality and ε against rounds, and the federation beside what it is compared with.

Promises one PNG that stands alone on a slide, and says "not private" where a run was not.
"""

from __future__ import annotations

import math
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from veil.simulations.evaluation import HEADLINES
from veil.simulations.report import SimulationResult
from veil.simulations.selection import Overall

_BLUE, _ORANGE, _GREEN, _GREY, _LIGHT, _INK = "#2457a6", "#d9772b", "#3b8a5c", "#8a8f98", "#d5d8dd", "#22262b"
_NAMES = {
    "non_private": "all records pooled, no privacy",
    "centralized_dp": "all records pooled, with DP",
    "federated": "together (Veil)",
    "head_only": "together, output layer alone",
    "local_only": "one site alone, with DP (mean)",
    "chosen": "each site keeps the better head, own records",
    "local": "each site its own head, no noise, own records",
}


def draw_picture(result: SimulationResult, path: Path) -> None:
    """Draw a finished run.

    Args:
        result: the run.
        path: where the PNG goes.
    """
    figure = Figure(figsize=(12, 5.6), dpi=150, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    rounds, bars = figure.subplots(1, 2, width_ratios=(1.15, 1))
    _draw_rounds(rounds, result)
    _draw_bars(bars, result)
    figure.suptitle(_title(result), fontsize=14, fontweight="bold", color=_INK, x=0.012, ha="left")
    figure.savefig(path)


def _title(result: SimulationResult) -> str:
    privacy = result.plan.privacy
    count = f"{len(result.sites)} sites"
    if not result.private:
        return f"{result.plan.name}: {count}, NOT PRIVATE (simulation without the operating system's noise)"
    worst = max(site.spent.epsilon for site in result.sites)
    return (
        f"{result.plan.name}: {count}, each at ε = {worst:.2f}, δ = {privacy.target_delta:g} per {privacy.unit.value}"
    )


def _draw_rounds(axes: Axes, result: SimulationResult) -> None:
    x = [point.round for point in result.curve]
    shown = HEADLINES[result.plan.task.form]
    axes.plot(x, [100 * p.scores.headline for p in result.curve], color=_BLUE, lw=2.5, label=f"{shown}, together")
    for name, style in (("non_private", ":"), ("local_only", "--")):
        if name in result.metrics:
            level = 100 * result.metrics[name].headline
            axes.axhline(level, color=_GREY, ls=style, lw=1.5, label=f"{_NAMES[name]}: {level:.1f} %")
    _bare(axes)
    axes.set_xlabel("round (0 centres the features)")
    axes.set_ylabel(f"{shown} on all sites' held-out records, %", color=_BLUE)
    if all(math.isfinite(point.epsilon) for point in result.curve):
        twin = axes.twinx()
        twin.plot(x, [p.epsilon for p in result.curve], color=_ORANGE, lw=2)
        twin.set_ylabel("ε spent so far", color=_ORANGE)
        twin.set_ylim(0, 1.08 * result.plan.privacy.target_epsilon)
        twin.spines[["top", "left"]].set_visible(False)
    axes.legend(loc="lower right", frameon=False, fontsize=9)


def _draw_bars(axes: Axes, result: SimulationResult) -> None:
    rows = [
        (_NAMES[name], result.metrics[name].headline, _BLUE if name == "federated" else _GREY)
        for name in ("non_private", "centralized_dp", "federated", "head_only", "local_only")
        if name in result.metrics
    ]
    if result.selections:
        accuracies = Overall.of(result.selections).accuracies
        rows += [(_NAMES[name], accuracies[name].value, _GREEN) for name in ("chosen", "local")]
    if len(result.sites) <= 12:
        rows += [
            (f"{site.name} alone, with DP", site.local_only_everywhere.headline, _LIGHT)
            for site in result.sites
            if site.local_only_everywhere
        ]
    rows.reverse()
    places = range(len(rows))
    axes.barh(places, [100 * value for _, value, _ in rows], color=[color for *_, color in rows], height=0.7)
    axes.set_yticks(places, [label for label, *_ in rows])
    for place, (_, value, _) in zip(places, rows, strict=True):
        axes.text(100 * max(value, 0.0) + 0.8, place, f"{100 * value:.1f}", va="center", fontsize=10, color=_INK)
    axes.set_xlim(min(0.0, *(100 * value for _, value, _ in rows)), 108)
    axes.set_xlabel(f"{HEADLINES[result.plan.task.form]} on held-out records,\nof all sites where not said, %")
    _bare(axes)
    axes.tick_params(axis="y", length=0)


def _bare(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_LIGHT)
    axes.tick_params(colors=_INK, labelsize=10)
    axes.grid(axis="x", color=_LIGHT, lw=0.6)
    axes.set_axisbelow(True)
