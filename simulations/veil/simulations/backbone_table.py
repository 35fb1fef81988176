# SPDX-License-Identifier: Apache-2.0
"""What `veil backbones` prints: a comparison as a JSON document, and as a table for a person.

Promises that both say what the figures do not tell.
"""

from __future__ import annotations

from typing import Any, Final

from veil.simulations.backbone_choice import Assessment, Comparison

CAVEAT: Final = (
    "these figures are of the public records alone: they say nothing about private records, which they did not see, "
    "and the noise of a private run is not in them: the smaller the spread, the more of a backbone it hides"
)


def document(comparison: Comparison) -> dict[str, Any]:
    """The JSON document."""
    return {
        "plan": comparison.plan.name,
        "declared_public": True,
        "caveat": CAVEAT,
        "records": comparison.records,
        "seed": comparison.plan.seed,
        "candidates": [_row(one, comparison.most_accurate) for one in comparison.assessments],
    }


def _row(one: Assessment, best: Assessment) -> dict[str, Any]:
    figures = one.figures
    behind, error = figures.probe.behind(best.figures.probe)
    return {
        "source": one.candidate.backbone.source,
        "sha256": one.candidate.found.sha256,
        "files_sha256": one.candidate.found.files_sha256,
        "licence": one.candidate.backbone.licence,
        "logme": figures.logme,
        "probe_accuracy": figures.probe.accuracy,
        "probe_standard_error": figures.probe.standard_error,
        "probe_behind_best": behind,
        "probe_behind_best_standard_error": error,
        "spread": figures.spread,
        "width": one.width,
        "bytes_on_disk": one.candidate.bytes_on_disk,
        "seconds_per_record": one.seconds_per_record,
    }


def lines(comparison: Comparison) -> list[str]:
    """What a person reads: a row for each candidate, highest LogME first."""
    plan, rows = comparison.plan, document(comparison)["candidates"]
    wide = max(len("backbone"), *(len(row["source"]) for row in rows))
    heads = (
        f"{'LogME':>8}  {'probe, %':>12}  {'behind best':>12}  {'spread':>6}  {'width':>5}  {'MB':>7}  {'s/record':>8}"
    )
    return [
        f"{plan.name}: {comparison.records} records declared public, {len(plan.task.labels)} classes, drawn by seed "
        f"{plan.seed} from those that the plan's simulation trains on",
        f"{'backbone':<{wide}}  {heads}  licence",
        *(f"{row['source']:<{wide}}  {_cells(row)}" for row in rows),
        "± is a standard error; of two that differ by less, take the one that costs less",
        CAVEAT,
    ]


def _cells(row: dict[str, Any]) -> str:
    probe = f"{100 * row['probe_accuracy']:.1f} ± {100 * row['probe_standard_error']:.1f}"
    behind = f"{100 * row['probe_behind_best']:.1f} ± {100 * row['probe_behind_best_standard_error']:.1f}"
    return (
        f"{row['logme']:>8.4f}  {probe:>12}  {behind:>12}  {row['spread']:>6.3f}  {row['width']:>5}  "
        f"{row['bytes_on_disk'] / 1e6:>7.1f}  {row['seconds_per_record']:>8.4f}  {row['licence'] or 'not named'}"
    )
