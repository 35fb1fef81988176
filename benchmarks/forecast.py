# SPDX-License-Identifier: Apache-2.0
"""How far `veil plan` is from the truth: its forecasts beside measured runs on four sets, to FORECAST.md.

Promises that a forecast sees the plan, numbers of sites and units, class shares and the non-private accuracy, and no
feature; that measured runs are of the same plan by the sites' and the coordinator's own code, on other splits and other
noise for every seed; and that a hopeless plan is among them.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from accuracy import DataSet, asked
from accuracy_rows import OWN
from figures import EPSILONS, spread
from numpy.typing import NDArray

from veil.client.units import Units, bounded_units
from veil.common.plan import RunPlan
from veil.simulations.baselines import Pool
from veil.simulations.evaluation import non_private, score_adapter
from veil.simulations.forecast import DROWNED, LADDER, WORTH, Forecast, Outcome, forecast
from veil.simulations.forecast_command import SUPPOSED, expected_accuracy
from veil.simulations.made_up import Sizes
from veil.simulations.trial import train

HERE = Path(__file__).parent
SETS = ("heart_4hospitals", "sst2", "ade_corpus_v2", "chest_xray_pneumonia")
DONT = "don't"
MODES = ("local", "distributed")
JUDGED = 1000
"""Held-out records that a measured accuracy is of, at least: over several draws of noise where a split has fewer."""

CHOSEN_ON = ("ade_corpus_v2", "chest_xray_pneumonia")
HOPELESS_SET, HOPELESS_UNITS, HOPELESS_EPSILON = "sst2", 30, 0.3

_HEAD = """# Forecast and truth

What `veil plan` says before a run, beside what was measured, {seeds} seeds each; losses of accuracy in points against a
head trained on all training records in one place, without privacy; median (smallest to largest). The plans are those of
`benchmarks/plans`, all defaults. "told" knew the measured non-private accuracy, as one may from public records like
these; "guessed" knew the class shares only, and supposed that a head reaches {part:.0%} of what lies between the most
frequent class and 1 (at ε = 1 only). Measured runs add up all sites' sums at once and the noise of all of them: sums
do not see the partition. Where a split has few held-out records, its measured accuracy is the mean over several draws
of the noise. Written by

    python benchmarks/forecast.py --datasets FOLDER --seeds {seeds}

The shape of the made-up features, one for all, was chosen on `ade_corpus_v2` and `chest_xray_pneumonia`: the spectrum
between those of their features; where the classes differ, by how fast a head learns without privacy (its accuracy on
100 to 2,700 records) and by their losses, measured with an earlier rule for the rate, of which the one set wants more
and the other less. `heart_4hospitals` and `sst2` took no part.

"""


@dataclass(frozen=True, kw_only=True)
class Case:
    """Sites of some size, with records.

    Attributes:
        name: of the set.
        plan: with ε.
        pools: the set divided, by seed.
        sites: how many.
        units: of each, that train; None: as many as there are.
    """

    name: str
    plan: RunPlan
    pools: tuple[Pool, ...]
    sites: int
    units: int | None = None

    def pooled(self, pool: Pool) -> tuple[Units, NDArray[np.int64]]:
        """All training units of a split, at most `units` a site, and the rows of their records."""
        rows = np.concatenate([share.train for share in pool.shares])
        names = pool.examples.units
        if self.units is not None:
            kept = np.random.default_rng(pool.plan.seed).permutation(np.unique(names[rows]))
            rows = rows[np.isin(names[rows], kept[: self.units * self.sites])]
        most = self.plan.privacy.max_records_per_patient
        units = bounded_units(pool.features[rows], pool.examples.labels[rows], names[rows], max_records=most, key=b"")
        return units, rows

    def sizes(self, expected: float | None) -> Sizes:
        """What the forecast is told."""
        units, _ = self.pooled(self.pools[0])
        shares = np.bincount(self.pools[0].examples.labels) / len(self.pools[0].examples.labels)
        told = tuple(float(share) for share in shares)
        return Sizes(
            sites=self.sites,
            units=max(1, round(units.count / self.sites)),
            width=self.pools[0].features.shape[1],
            shares=told,
            expected=expected_accuracy(told) if expected is None else expected,
        )

    def without_privacy(self) -> list[float]:
        """Accuracy of the reference, by seed."""
        return [self._without_privacy(pool) for pool in self.pools]

    def _without_privacy(self, pool: Pool) -> float:
        _, rows = self.pooled(pool)
        features, labels = pool.features, pool.examples.labels
        classes = len(self.plan.task.labels)
        return non_private(features[rows], labels[rows], features[pool.test], labels[pool.test], classes).accuracy

    def measured(self, mode: str, rounds: int | None = None) -> list[float]:
        """Accuracy of the plan, by seed."""
        changes: dict[str, dict[str, object]] = {"privacy": {"noise": mode}}
        if rounds is not None:
            changes["training"] = {"rounds": rounds}
        return [self._measured(asked(replace(pool, plan=self.plan), None, changes).plan, pool) for pool in self.pools]

    def _measured(self, plan: RunPlan, pool: Pool) -> float:
        units, _ = self.pooled(pool)
        features, labels = pool.features[pool.test], pool.examples.labels[pool.test]
        draws = range(math.ceil(JUDGED / len(labels)))
        adapters = [train(plan, units, sites=self.sites, seed=1000 * (1 + pool.plan.seed) + draw) for draw in draws]
        return statistics.mean(score_adapter(adapter, features, labels).accuracy for adapter in adapters)


@dataclass(frozen=True, kw_only=True)
class Row:
    """A forecast and its measurement.

    Attributes:
        case: of what.
        told, guessed: forecasts; not every case is guessed.
        truth: measured losses by mode and seed.
        learnable: median accuracy without privacy, beyond the most frequent class.
    """

    case: Case
    told: Forecast
    guessed: Forecast | None
    truth: dict[str, list[float]]
    learnable: float

    @classmethod
    def of(cls, case: Case, seeds: int) -> Row:
        """Forecast, then measure."""
        without = case.without_privacy()
        told = forecast(case.plan, case.sizes(statistics.median(without)), seeds=seeds)
        blind = case.plan.privacy.target_epsilon == EPSILONS[0]
        guessed = forecast(case.plan, case.sizes(None), seeds=seeds) if blind else None
        truth = {mode: [a - b for a, b in zip(without, case.measured(mode), strict=True)] for mode in MODES}
        learnable = statistics.median(without) - told.sizes.majority
        return cls(case=case, told=told, guessed=guessed, truth=truth, learnable=learnable)

    def drowns(self, mode: str) -> bool:
        """Whether the measured noise drowns the signal."""
        return 1 - statistics.median(self.truth[mode]) / self.learnable < DROWNED

    @property
    def mode(self) -> str:
        """The mode that the forecast's rule picks from the measured losses."""
        local, distributed = (statistics.median(self.truth[mode]) for mode in MODES)
        return "distributed" if local - distributed > WORTH else "local"

    def cells(self, mode: str) -> list[str]:
        """Of one mode."""
        told = _of(self.told, mode)
        said, true = self.told.drowns(told), self.drowns(mode)
        sizes = self.told.sizes
        return [
            self.case.name,
            f"{sizes.sites} x {sizes.units}",
            f"{self.case.plan.privacy.target_epsilon:g}",
            mode,
            _points(told.losses),
            "" if self.guessed is None else _points(_of(self.guessed, mode).losses),
            _points(self.truth[mode]),
            f"{DONT if said else 'run'}, {'right' if said == true else 'WRONG'}",
        ]


def _of(found: Forecast, mode: str) -> Outcome:
    return next(one for one in (found.planned, *found.others) if one.noise == mode)


def _points(values: Sequence[float]) -> str:
    return spread([100 * value for value in values])


def cases(datasets: Path, seeds: int) -> Iterator[Case]:
    """Every set at every ε, and a hopeless one."""
    for name in SETS:
        whole = DataSet.load(name, datasets)
        pools = tuple(whole.divided(OWN[name], seed) for seed in range(seeds))
        sites = len(pools[0].shares)
        for epsilon in EPSILONS:
            yield Case(name=name, plan=asked(pools[0], epsilon, {}).plan, pools=pools, sites=sites)
        if name == HOPELESS_SET:
            plan = asked(pools[0], HOPELESS_EPSILON, {}).plan
            yield Case(name=name, plan=plan, pools=pools, sites=sites, units=HOPELESS_UNITS)


def page(rows: list[Row], seeds: int) -> str:
    """FORECAST.md."""
    names = ["set", "sites x units", "ε", "noise", "told", "guessed", "measured", "the verdict when told"]
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    lines += [f"| {' | '.join(row.cells(mode))} |" for row in rows for mode in MODES]
    return _HEAD.format(seeds=seeds, part=SUPPOSED) + "\n".join([*lines, "", *_summary(rows)]) + "\n"


def _summary(rows: list[Row]) -> list[str]:
    usual = [row for row in rows if row.case.units is None]
    pairs = [(row, mode) for row in usual for mode in MODES]
    right = [row.told.drowns(_of(row.told, mode)) == row.drowns(mode) for row in rows for mode in MODES]
    modes = [row.told.advised.noise == row.mode for row in usual]
    other = [_rounds(row) for row in usual if row.told.advised.rounds != row.case.plan.training.rounds]
    held, chosen = ([pair for pair in pairs if (pair[0].case.name in CHOSEN_ON) == one] for one in (False, True))
    return [
        f"Mean absolute error of the median, without the hopeless lines: on the sets that took no part in choosing the "
        f"shape told {_error(held, 'told')}, guessed {_error(held, 'guessed')} points; on the two others told "
        f"{_error(chosen, 'told')}, guessed {_error(chosen, 'guessed')}.",
        f"The verdict was right in {sum(right)} of {len(right)} lines. The advised mode was the one that the same rule "
        f"picks from the measured losses (distributed where it gains more than {100 * WORTH:g} point) in "
        f"{sum(modes)} of {len(modes)} cases" + _wrong_modes(usual) + ".",
        "",
        *(other or ["No other number of rounds than the plan's was advised anywhere."]),
        "",
        "Smallest useful site (half of what can be learnt beyond the most frequent class is learnt), forecast and "
        "measured on fewer units of the same sets, all run as advised:",
        "",
        *(_smallest(row) for row in usual if row.case.plan.privacy.target_epsilon == EPSILONS[0]),
    ]


def _error(pairs: list[tuple[Row, str]], which: str) -> str:
    forecasts = [(getattr(row, which), mode, statistics.median(row.truth[mode])) for row, mode in pairs]
    errors = [abs(_of(found, mode).loss - truth) for found, mode, truth in forecasts if found is not None]
    return f"{100 * statistics.mean(errors):.1f} (largest {100 * max(errors):.1f})"


def _wrong_modes(rows: list[Row]) -> str:
    wrong = [
        f"{row.case.name} at ε = {row.case.plan.privacy.target_epsilon:g}, where it said {row.told.advised.noise}"
        for row in rows
        if row.told.advised.noise != row.mode
    ]
    return f"; not in {', '.join(wrong)}" if wrong else ""


def _rounds(row: Row) -> str:
    best, plan = row.told.advised, row.case.plan
    measured = statistics.median(row.case.measured(best.noise, best.rounds))
    before = statistics.median(row.case.measured(best.noise))
    return (
        f"- {row.case.name} at ε = {plan.privacy.target_epsilon:g}: {best.rounds} rounds advised with {best.noise} "
        f"noise; measured {100 * (measured - before):+.1f} points against {plan.training.rounds} rounds"
    )


def _smallest(row: Row) -> str:
    best, case = row.told.advised, row.case
    enough = row.told.sizes.majority + DROWNED * row.learnable
    found, sizes = "", [one for one in LADDER if one <= row.told.sizes.units]
    for units in sizes:
        if statistics.median(replace(case, units=units).measured(best.noise, best.rounds)) >= enough:
            found = str(units)
            break
    epsilon, more = case.plan.privacy.target_epsilon, f"more than {sizes[-1]}"
    return (
        f"- {case.name} at ε = {epsilon:g}, {best.noise}: forecast {row.told.smallest.useful}, measured {found or more}"
    )


def main() -> None:
    """Forecast, measure and write FORECAST.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--datasets", type=Path, required=True, help="folder with the data sets")
    parser.add_argument("--seeds", type=int, default=3)
    chosen = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    rows = []
    for case in cases(chosen.datasets, chosen.seeds):
        rows.append(Row.of(case, chosen.seeds))
        for mode in MODES:
            print(" | ".join(rows[-1].cells(mode)), flush=True)
    (HERE / "FORECAST.md").write_text(page(rows, chosen.seeds), encoding="utf-8")


if __name__ == "__main__":
    main()
