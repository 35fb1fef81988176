# SPDX-License-Identifier: Apache-2.0
"""What a person sees: progress while it runs, a table at the end.

Promises bars on a terminal, plain lines elsewhere, and "not private" in words where it is so.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from veil.server.run_report import evaluation_report
from veil.simulations.report import SimulationResult, SiteResult

_WRITTEN = "report.json, picture.png, statement.html, model-card.html, certificate.json, ledger.sqlite, model/"
_NAMES = (
    ("federated", "together (Veil)"),
    ("local_only", "one site alone, with DP (mean of sites)"),
    ("centralized_dp", "all records in one place, with DP"),
    ("non_private", "all records in one place, NOT private"),
)


_ROWS = 40


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
            console.print(
                f"{words:<40} accuracy {100 * scores.accuracy:5.1f} %   macro F1 {100 * scores.macro_f1:5.1f} %",
                highlight=False,
            )
    released = evaluation_report(result.plan, result.evaluation)
    if released is not None:
        console.print(
            f"{'together, as the sites released it':<40} {_released(**released['accuracy'])}", highlight=False
        )
    console.print(f"\n{output}: {_WRITTEN}", highlight=False, soft_wrap=True)


def _released(*, value: float | None, low: float, high: float, reason: str, **_: object) -> str:
    if value is None:
        return f"accuracy not known: {reason}"
    return f"accuracy {100 * value:5.1f} % ({100 * low:.1f} to {100 * high:.1f} %)"


def _site_table(result: SimulationResult) -> Table:
    unit = result.plan.privacy.unit.value
    table = Table(title=f"{result.plan.name}: accuracy in % on held-out records", title_justify="left")
    table.add_column("site")
    names = ["records", "ε spent", "alone, own", "together, own", "alone, all sites'"]
    for name in names if unit == "record" else ["records", "patients", *names[1:]]:
        table.add_column(name, justify="right")
    shown = result.sites if len(result.sites) <= _ROWS else result.sites[:_ROWS]
    for site in shown:
        table.add_row(*_row(site, patients=unit != "record"))
    if len(shown) < len(result.sites):
        table.caption = f"{len(result.sites) - len(shown)} more in report.json"
    return table


def _row(site: SiteResult, *, patients: bool) -> list[str]:
    epsilon = f"{site.spent.epsilon:.3f}" if math.isfinite(site.spent.epsilon) else "not private"
    counts = [str(site.records), str(site.units)] if patients else [str(site.records)]
    scores = (site.local_only, site.federated, site.local_only_everywhere)
    return [site.name, *counts, epsilon, *(f"{100 * s.accuracy:.1f}" if s else "-" for s in scores)]
