# SPDX-License-Identifier: Apache-2.0
"""What a person sees: progress while it runs, a table at the end.

Promises bars on a terminal, plain lines elsewhere, and "not private" in words where it is so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from veil.client.personal import Origin
from veil.common.plan import RunPlan
from veil.server.run_report import evaluation_report
from veil.server.statement_page import shown
from veil.simulations.evaluation import HEADLINES, Scores
from veil.simulations.report import SimulationResult, SiteResult
from veil.simulations.selection import SiteSelection

_WRITTEN = "report.json, picture.png, statement.html, model-card.html, certificate.json, ledger.sqlite, model/"
_NAMES = (
    ("federated", "together (Veil)"),
    ("head_only", "together, output layer alone"),
    ("local_only", "one site alone, with DP (mean of sites)"),
    ("centralized_dp", "all records in one place, with DP"),
    ("non_private", "all records in one place, NOT private"),
)

_KEEPS = {Origin.FEDERATED: "together", Origin.BLEND: "corrected", Origin.LOCAL: "alone"}
_ROWS = 40

_GUESSING = 0.98
"""Of a guess's loss, in nats, from where nothing was learnt."""


class Screen:
    """Progress on stderr.

    Args:
        quiet: show nothing.
    """

    def __init__(self, *, quiet: bool) -> None:
        self._console = Console(stderr=True, quiet=quiet)
        self._bars = Progress(
            TextColumn("{task.description:<18}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )

    def __enter__(self) -> Screen:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def stage(self, name: str, total: int) -> Callable[[int], None]:
        """A new bar, or a line where there is no terminal; nothing for a stage without steps."""
        if not total:
            return lambda done: None
        if not self._console.is_terminal:
            self._console.print(f"{name}: {total}", highlight=False)
            return lambda done: None
        task = self._bars.add_task(name, total=total)

        def advance(done: int) -> None:
            self._bars.advance(task, done)

        return advance


def show_result(result: SimulationResult, output: Path) -> None:
    """Print the final table and where things are."""
    console = Console(width=None if Console().is_terminal else 100)
    if not result.private:
        console.print("[bold red]NOT PRIVATE[/]: simulation without the operating system's noise")
    console.print(_site_table(result))
    for name, words in _NAMES:
        if name in result.metrics:
            scores = result.metrics[name]
            console.print(f"{words:<40} {_told(scores, result.plan)}", highlight=False)
    released = evaluation_report(result.plan, result.evaluation, result.records)
    if released is not None:
        console.print(f"{'together, as the sites released it':<40} {_released(released, result.plan)}", highlight=False)
    if result.groups is not None:
        console.print(f"{'together, largest gap between groups':<40} {_gap(**result.groups['gaps']['accuracy'])}")
    if result.selections:
        console.print(_selector_table(result))
    if learnt_nothing(result):
        console.print(
            f"[bold red]no better than guessing[/]: ε = {result.plan.privacy.target_epsilon:g} leaves these sites "
            "nothing to learn; `veil plan` says what would",
            highlight=False,
        )
    console.print(f"\n{output}: {_WRITTEN}", highlight=False, soft_wrap=True)


def learnt_nothing(result: SimulationResult) -> bool:
    """Whether the federated classifier's loss is about that of naming every class alike."""
    task, found = result.plan.task, result.metrics["federated"]
    return task.form == "classification" and found.loss > _GUESSING * math.log(len(task.labels))


def _gap(*, value: float | None, low: float, high: float, reason: str, **_: object) -> str:
    if value is None:
        return f"accuracy not known: {reason}"
    return f"accuracy {100 * value:5.1f} points ({100 * low:.1f} to {100 * high:.1f})"


def _told(scores: Scores, plan: RunPlan) -> str:
    """A model's exact figures."""
    first = f"{HEADLINES[plan.task.form]} {100 * scores.headline:5.1f} %"
    if scores.second is not None:
        return f"{first}   {scores.second[0].replace('_', ' ')} {scores.second[1]:.4g}   loss {scores.loss:.4g}"
    if scores.macro_f1 is None:
        return f"{first}   MAE {scores.mae:.4g}   RMSE {scores.rmse:.4g}"
    return f"{first}   macro F1 {100 * scores.macro_f1:5.1f} %"


def _released(evaluation: Mapping[str, Any], plan: RunPlan) -> str:
    """The first figure of those that the sites released."""
    number = plan.task.form == "regression"
    name, figure = ("MAE", evaluation["mae"]) if number else (HEADLINES[plan.task.form], evaluation["accuracy"])
    if figure["value"] is None:
        return f"{name} not known: {figure['reason']}"
    value, low, high = (figure[key] for key in ("value", "low", "high"))
    if number:
        return f"{name} {value:.4g} ({low:.4g} to {high:.4g})"
    return f"{name} {100 * value:5.1f} % ({100 * low:.1f} to {100 * high:.1f} %)"


def _site_table(result: SimulationResult) -> Table:
    unit = result.plan.privacy.unit.value
    figure = HEADLINES[result.plan.task.form]
    table = Table(title=f"{result.plan.name}: {figure} in % on held-out records", title_justify="left")
    table.add_column("site")
    names = ["records", "ε spent", "alone, own", "together, own", "alone, all sites'"]
    for name in names if unit == "record" else ["records", "patients", *names[1:]]:
        table.add_column(name, justify="right")
    for site in result.sites[:_ROWS]:
        table.add_row(*_row(site, patients=unit != "record"))
    if len(result.sites) > _ROWS:
        table.caption = f"{len(result.sites) - _ROWS} more in report.json"
    return table


def _selector_table(result: SimulationResult) -> Table:
    table = Table(
        title="\nWhat joining gave: accuracy in % on own held-out records; own heads without noise",
        title_justify="left",
    )
    table.add_column("site")
    for name in ("alone", "together", "together, corrected", "keeps", "gain, points"):
        table.add_column(name, justify="right")
    table.add_column("found")
    for site in result.sites[:_ROWS]:
        if site.selection:
            table.add_row(site.name, *_selector_row(site.selection))
    table.caption = "± 1.96 standard errors; what a site compares and keeps stays there: ε = 0"
    return table


def _selector_row(selection: SiteSelection) -> list[str]:
    accuracies = [selection.accuracy(origin).value for origin in (Origin.LOCAL, Origin.FEDERATED, Origin.BLEND)]
    gain = selection.gain
    return [
        *(f"{100 * value:.1f}" for value in accuracies),
        _KEEPS[selection.chosen],
        f"{100 * gain.value:+.1f} ± {100 * (gain.high - gain.value):.1f}",
        ", ".join(finding.value.replace("_", " ") for finding in selection.findings),
    ]


def _row(site: SiteResult, *, patients: bool) -> list[str]:
    epsilon = shown(site.spent.epsilon) if math.isfinite(site.spent.epsilon) else "not private"
    counts = [str(site.records), str(site.units)] if patients else [str(site.records)]
    scores = (site.local_only, site.federated, site.local_only_everywhere)
    return [site.name, *counts, epsilon, *(f"{100 * s.headline:.1f}" if s else "-" for s in scores)]
