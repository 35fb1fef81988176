# SPDX-License-Identifier: Apache-2.0
"""`veil plan`: from a plan and a few sizes to a forecast, as a document and as lines on a screen.

Promises that what was assumed stands beside what was forecast, and that no record and no table is opened.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from veil.common.errors import InputError
from veil.common.pickled import kind_of
from veil.common.plan import RunPlan
from veil.common.weights import locate
from veil.simulations.forecast import LITTLE, Forecast, Outcome, check_played, training_units
from veil.simulations.made_up import Sizes

SUPPOSED = 0.6
"""Part of what lies between the most frequent class and 1 that a head reaches without privacy, if nothing is said."""

CAVEAT: Final = (
    "records are made up, none was read: real ones are harder or easier, and differ between sites; "
    "benchmarks/FORECAST.md has how far such forecasts were from measured runs"
)


def expected_accuracy(shares: Sequence[float]) -> float:
    """What a head is supposed to reach without privacy, 0 to 1."""
    return max(shares) + SUPPOSED * (1 - max(shares))


def sizes_of(
    plan: RunPlan,
    *,
    sites: int | None,
    units: int | None,
    width: int | None,
    shares: Sequence[float],
    expected: float | None,
    base: Path,
) -> Sizes:
    """What is expected, with the plan's own figures where nothing else is said.

    Args:
        plan: names the classes, the fewest sites, perhaps the units of each.
        sites: how many; without it, as many as the plan simulates, or else `cohort.min_sites`.
        units: of each site; without it, `cohort.nominal_units`.
        width: features of a record; without it, the backbone's, or the plan's columns.
        shares: of the classes, in the plan's order; equal when empty.
        expected: accuracy without privacy, 0 to 1; without it, `expected_accuracy`.
        base: the folder that a relative path of the backbone starts from.

    Raises:
        InputError: for sizes that are missing or cannot be.
        PlanError: for a plan that cannot be forecast.
    """
    check_played(plan)
    classes = len(plan.task.labels)
    told = tuple(shares) or (1 / classes,) * classes
    if len(told) != classes:
        raise InputError(f"{len(told)} class shares for {classes} labels", "one for each", "repeat --share")
    nominal = units if units is not None else plan.cohort.nominal_units
    if nominal is None:
        raise InputError("no --units, and no cohort.nominal_units", "how many units a site has", "give --units")
    least = plan.cohort.min_sites
    if sites is not None and sites < least:
        raise InputError(f"{sites} sites", f"cohort.min_sites = {least} or more", "give --sites, or lower min_sites")
    played = plan.simulation.sites if plan.simulation is not None else None
    return Sizes(
        sites=sites if sites is not None else max(least, played or least),
        units=nominal,
        width=width if width is not None else _width(plan, base),
        shares=told,
        expected=expected_accuracy(told) if expected is None else expected,
    )


def _width(plan: RunPlan, base: Path) -> int:
    """Features of a record, from the plan or the configuration beside the pinned weights."""
    if plan.backbone is None:
        columns = plan.simulation.features if plan.simulation is not None else None
        found = plan.task.width or len(columns or ())
    else:
        weights = locate(plan.backbone, base=base, network=False)
        kind = kind_of(weights.weights_file)
        found = _hidden(weights.folder / "config.json") if kind is None else kind.width
    if not found:
        raise InputError("a plan that does not say how many features a record has", "their number", "give --width")
    return found


def _hidden(configuration: Path) -> int:
    try:
        told = json.loads(configuration.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return 0
    found = next((told[key] for key in ("hidden_size", "hidden_dim", "d_model") if key in told), 0)
    return found if isinstance(found, int) else 0


def document(found: Forecast) -> dict[str, Any]:
    """The JSON document; accuracies, losses and shares from 0 to 1."""
    plan, sizes = found.plan, found.sizes
    return {
        "plan": plan.name,
        "verdict": "don't" if found.drowns(found.planned) else "run",
        "made_up": True,
        "caveat": CAVEAT,
        "sizes": {
            "sites": sizes.sites,
            "units_per_site": sizes.units,
            "training_units_per_site": training_units(plan, sizes.units),
            "made_up_records": found.made_up_records,
            "width": sizes.width,
            "class_shares": list(sizes.shares),
            "expected_accuracy": sizes.expected,
        },
        "epsilon": plan.privacy.target_epsilon,
        "delta": plan.privacy.target_delta,
        "colluding_sites": plan.cohort.colluding(sizes.sites),
        "seed": plan.seed,
        "seeds": len(found.not_private),
        "majority": sizes.majority,
        "not_private": _spread(found.not_private),
        "planned": _row(found, found.planned),
        "others": [_row(found, one) for one in found.others],
        "advised": _row(found, found.advised),
        "smallest_site": {"useful": found.smallest.useful, "little_loss": found.smallest.little_loss},
    }


def _row(found: Forecast, one: Outcome) -> dict[str, Any]:
    return {
        "noise": one.noise,
        "rounds": one.rounds,
        "accuracy": _spread(one.accuracies),
        "loss": _spread(one.losses),
        "kept": found.kept(one),
        "drowns": found.drowns(one),
    }


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def lines(found: Forecast) -> list[str]:
    """What a person reads."""
    plan, sizes, smallest = found.plan, found.sizes, found.smallest
    shares = ", ".join(f"{label} {share:.0%}" for label, share in zip(plan.task.labels, sizes.shares, strict=True))
    return [
        f"{plan.name}: {sizes.sites} sites of {sizes.units:,} units, {sizes.width} features, ε = "
        f"{plan.privacy.target_epsilon:g} at δ = {plan.privacy.target_delta:g}; {shares}",
        f"supposed: accuracy {100 * sizes.expected:.1f} % without privacy, all units in one place; "
        f"the most frequent class alone {100 * sizes.majority:.1f} %",
        f"{'noise':<12} {'rounds':>6}  {'accuracy, %':>20}  {'loss, points':>20}",
        *(_line(found, one) for one in (found.planned, *found.others)),
        f"advised: {_advice(found)}",
        f"smallest useful site, run like that: {_units(smallest.useful)}; "
        f"to lose at most {100 * LITTLE:g} points: {_units(smallest.little_loss)}",
        CAVEAT,
    ]


def _line(found: Forecast, one: Outcome) -> str:
    notes = ["the plan's"] if one is found.planned else []
    notes += ["the noise drowns the signal"] if found.drowns(one) else []
    return (
        f"{one.noise:<12} {one.rounds:>6}  {_percent(one.accuracies):>20}  {_percent(one.losses):>20}  "
        f"{', '.join(notes)}"
    ).rstrip()


def _advice(found: Forecast) -> str:
    best = found.advised
    if found.drowns(best):
        return "don't; no mode and number of rounds that was tried helps"
    if best is found.planned:
        return "run it as it is"
    gain = 100 * (found.planned.loss - best.loss)
    return f'privacy.noise = "{best.noise}", training.rounds = {best.rounds}: {gain:.1f} points better'


def _percent(values: Sequence[float]) -> str:
    return f"{100 * statistics.median(values):.1f} ({100 * min(values):.1f} to {100 * max(values):.1f})"


def _units(count: int | None) -> str:
    return "none, however large" if count is None else f"{count:,} units"
