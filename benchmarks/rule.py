# SPDX-License-Identifier: Apache-2.0
"""One public rule for dp-fedsgd's clipping bound, rate and momentum: the present and the proposed one on many sets.

Promises the product's arithmetic (centring round, shrinkage, clipped sums, noise on the sum) for many runs at once, and
that the proposed constants were chosen on `rule_sets.CHOOSE` alone. A sum does not see how units lie at sites, so all
records are taken together; noise is numpy's, in float64, drawn for a study and for nothing else.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rule_sets import CHOOSE, JUDGE, Split

from veil.common.head import INTERCEPT
from veil.common.privacy import PrivacyBudget, gaussian_sigma
from veil.common.schedule import CENTRE_NORM, CENTRE_SHARE, COUNT_WEIGHT
from veil.server.descent import shrink

HERE = Path(__file__).parent
EPSILONS = (1.0, 3.0, 8.0)
DELTA = 1e-5
MODES = ("local", "distributed", "central")
ROUNDS = 30
MORE_ROUNDS = 60

MANY = 10.0
"""How many times the way that plain descent can go must be worth going, for `MORE_ROUNDS`."""

_START, _END = "<!-- tables -->", "<!-- /tables -->"
_CONSTANT = INTERCEPT / math.sqrt(1 + INTERCEPT**2)
_ELEMENTS = 6_000_000
"""Softmax outputs that are worked on together."""

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Public:
    """What a rule may read.

    Attributes:
        sigma: σ₁, of the one release that would spend the whole budget.
        factor: variance of the noise on the sum, in whole shares: K local, K / (K - m) distributed, 1 central.
        classes, width: c, and d of the features.
        units: estimated number of units of all sites.
        rounds: T.
    """

    sigma: float
    factor: float
    classes: int
    width: int
    units: float
    rounds: int


@dataclass(frozen=True, kw_only=True)
class Steps:
    """Rate and momentum of a run."""

    rate: float
    momentum: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Rule:
    """A way to run dp-fedsgd; the defaults are the proposed one.

    Attributes:
        name: as in the tables.
        logit_noise: ν, the standard deviation of the noise that each weight carries at the end.
        rate_per_class: largest rate, per class.
        most_momentum: largest momentum.
        bound_share: clipping bound, in lengths of the first gradient.
        centre_share: part of μ² for the centring round.
        fewest_rounds: T.
        more_rounds: whether many nominal units get `MORE_ROUNDS`.
    """

    name: str
    logit_noise: float = 1.0
    rate_per_class: float = 16.0
    most_momentum: float = 0.9
    bound_share: float = 0.5
    centre_share: float = CENTRE_SHARE
    fewest_rounds: int = ROUNDS
    more_rounds: bool = False

    def bound(self, classes: int) -> float:
        """Clipping bound: a share of the length of every gradient of the zero head, √(1 - 1/c)."""
        return self.bound_share * math.sqrt(1 - 1 / classes)

    def way(self, public: Public) -> float:
        """Sum of rates at which the noise of each weight reaches ν; it does not depend on the rounds."""
        return self.logit_noise * public.units / (self.bound(public.classes) * public.sigma * math.sqrt(public.factor))

    def steps(self, public: Public) -> Steps:
        """Go that way; where plain descent at its cap is too slow for it, with just as much momentum as that takes."""
        cap, way = self.rate_per_class * public.classes, self.way(public)
        momentum = min(self.most_momentum, max(0.0, 1 - cap * public.rounds / way))
        gains = momentum_gains(public.rounds, momentum)
        return Steps(rate=min(cap, way / math.sqrt(public.rounds * float(gains @ gains))), momentum=momentum)

    def rounds(self, public: Public) -> int:
        """T, from what is known before the run."""
        reach = self.fewest_rounds * self.rate_per_class * public.classes
        return MORE_ROUNDS if self.more_rounds and self.way(public) > MANY * reach else self.fewest_rounds


class Present(Rule):
    """The rule of Veil 0.1: length of the weights' noise at most 30, rate at most 32, bound 0.5."""

    def bound(self, classes: int) -> float:
        """The same for any number of classes."""
        return 0.5

    def steps(self, public: Public) -> Steps:
        """No momentum."""
        noise = 0.5 * public.sigma * math.sqrt(public.factor * public.classes * (public.width + 1))
        return Steps(rate=min(32.0, 30.0 * public.units / (noise * public.rounds)))


def momentum_gains(rounds: int, momentum: float) -> Floats:
    """How often each round's sum is in the last weights, in rates: Nesterov's update v ← βv + g, w ← w - η(g + βv)."""
    left = np.arange(rounds, 0, -1)
    return (1 - momentum ** (left + 1)) / (1 - momentum)


RULES = (
    Present(name="present"),
    Rule(name="proposed"),
    Rule(name="proposed, T named", more_rounds=True),
)


@dataclass(frozen=True, kw_only=True)
class Run:
    """One simulated run."""

    rule: Rule
    epsilon: float
    mode: str
    draw: int

    def rounds(self, split: Split) -> int:
        """T, known before the run: from the plan's own figures alone."""
        return self.rule.rounds(self.public(split, units=split.count, rounds=ROUNDS))

    def public(self, split: Split, *, units: float, rounds: int) -> Public:
        """What the rule may read."""
        return Public(
            sigma=sigma(self.epsilon),
            factor=noise_factor(self.mode, split.sites),
            classes=split.classes,
            width=split.rows.shape[1],
            units=units,
            rounds=rounds,
        )


@lru_cache
def sigma(epsilon: float) -> float:
    """σ₁ of the study's δ."""
    return gaussian_sigma(PrivacyBudget(target_epsilon=epsilon, target_delta=DELTA))


def noise_factor(mode: str, sites: int) -> float:
    """Variance of the noise on the sum, in units of one whole share; three of ten sites may collude or be missing."""
    return {"local": float(sites), "distributed": sites / (sites - math.floor(0.3 * sites)), "central": 1.0}[mode]


@dataclass(kw_only=True)
class Batch:
    """Runs with one number of rounds on one split, side by side.

    Attributes:
        split: the records.
        runs: [r].
        rounds: T.
        generators: noise of each run, [r].
        centres: [r, d].
        rates: by which a sum is multiplied, [r].
        momenta: [r].
        noise: standard deviation on the sum in each coordinate, [r].
        bounds: [r].
    """

    split: Split
    runs: list[Run]
    rounds: int
    generators: list[np.random.Generator]
    centres: NDArray[np.float32]
    rates: NDArray[np.float32]
    momenta: NDArray[np.float32]
    noise: Floats
    bounds: NDArray[np.float32]

    @classmethod
    def start(cls, split: Split, runs: list[Run], rounds: int) -> Batch:
        """The centring round, and the rule's answer to it."""
        generators = [np.random.default_rng([run.draw, round(10 * run.epsilon), MODES.index(run.mode)]) for run in runs]
        centred = [_centre(split, run, rng) for run, rng in zip(runs, generators, strict=True)]
        publics = [run.public(split, units=n, rounds=rounds) for run, (_, n) in zip(runs, centred, strict=True)]
        steps = [run.rule.steps(public) for run, public in zip(runs, publics, strict=True)]
        bounds = np.array([run.rule.bound(split.classes) for run in runs])
        left = [1 - run.rule.centre_share for run in runs]
        return cls(
            split=split,
            runs=runs,
            rounds=rounds,
            generators=generators,
            centres=np.array([centre for centre, _ in centred], np.float32),
            rates=np.array([s.rate / p.units for s, p in zip(steps, publics, strict=True)], np.float32),
            momenta=np.array([s.momentum for s in steps], np.float32),
            noise=bounds
            * [p.sigma * math.sqrt(p.factor * rounds / part) for p, part in zip(publics, left, strict=True)],
            bounds=bounds.astype(np.float32),
        )

    def accuracies(self) -> list[float]:
        """Run all rounds and judge the last weights on the held-out records."""
        lengths = _inverse_lengths(self.split.rows, self.centres)
        dots = self._pair_dots(lengths)
        weight = np.zeros((len(self.runs), self.split.classes, self.split.rows.shape[1] + 1), np.float32)
        velocity = np.zeros_like(weight)
        momenta, rates = self.momenta[:, None, None], self.rates[:, None, None]
        for _ in range(self.rounds):
            noised = self._noised(self._clipped_sum(weight, lengths, dots))
            velocity = momenta * velocity + noised
            weight = weight - rates * (noised + momenta * velocity)
        logits = self._logits(weight, self.split.test_rows, _inverse_lengths(self.split.test_rows, self.centres))
        return [float((one.argmax(axis=0) == self.split.test_labels).mean()) for one in logits]

    def _logits(
        self, weight: NDArray[np.float32], rows: NDArray[np.floating], lengths: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        """Of rows [n, d] as the head reads them, without making them anew for each centre; [r, c, n]."""
        runs, classes, width = weight[:, :, :-1].shape
        logits = (weight[:, :, :-1].reshape(-1, width) @ rows.T).reshape(runs, classes, len(rows))
        logits -= np.einsum("rcd,rd->rc", weight[:, :, :-1], self.centres)[:, :, None]
        logits *= lengths[:, None, :]
        logits += _CONSTANT * weight[:, :, -1:]
        return logits

    def _clipped_sum(
        self, weight: NDArray[np.float32], lengths: NDArray[np.float32], dots: NDArray[np.float32] | None
    ) -> NDArray[np.float32]:
        """Sum over units of the clipped mean gradient, [r, c, d + 1]; see `veil.client.gradient`."""
        rows, runs, classes = self.split.rows, *weight.shape[:2]
        errors = self._logits(weight, rows, lengths)
        errors -= errors.max(axis=1, keepdims=True)
        np.exp(errors, out=errors)
        errors /= errors.sum(axis=1, keepdims=True)
        errors[:, self.split.labels, np.arange(len(rows))] -= 1.0
        errors *= self._factors(errors, dots)[:, None, :]
        constants = _CONSTANT * errors.sum(axis=2, keepdims=True)
        errors *= lengths[:, None, :]
        sums = (errors.reshape(runs * classes, -1) @ rows).reshape(runs, classes, -1)
        sums -= errors.sum(axis=2)[:, :, None] * self.centres[:, None, :]
        return np.concatenate([sums, constants], axis=2)

    def _factors(self, errors: NDArray[np.float32], dots: NDArray[np.float32] | None) -> NDArray[np.float32]:
        """By which each record's error is multiplied: clipping, and its share of its unit; [r, n]."""
        split, bounds = self.split, self.bounds[:, None]
        own = np.einsum("rcn,rcn->rn", errors, errors)
        if split.pairs is None or dots is None:
            return np.minimum(1, bounds / np.sqrt(np.maximum(own, 1e-30)))
        pairs = split.pairs
        squared = np.add.reduceat(own * split.share**2, split.starts, axis=1)
        cross = 2 * np.einsum("rcm,rcm->rm", errors[:, :, pairs.first], errors[:, :, pairs.second]) * dots
        squared[:, pairs.unit] += (
            np.add.reduceat(cross, pairs.starts, axis=1) * split.share[pairs.first[pairs.starts]] ** 2
        )
        clipped = np.minimum(1, bounds / np.sqrt(np.maximum(squared, 1e-30)))
        return clipped[:, split.unit] * split.share

    def _pair_dots(self, lengths: NDArray[np.float32]) -> NDArray[np.float32] | None:
        """Inner products of the head's inputs of pairs, [r, m]."""
        pairs = self.split.pairs
        if pairs is None:
            return None
        along = self.centres @ self.split.rows.T
        centred = pairs.dots - along[:, pairs.first] - along[:, pairs.second]
        centred += np.einsum("rd,rd->r", self.centres, self.centres)[:, None]
        return centred * lengths[:, pairs.first] * lengths[:, pairs.second] + np.float32(_CONSTANT**2)

    def _noised(self, sums: NDArray[np.float32]) -> NDArray[np.float32]:
        for one, rng, deviation in zip(sums, self.generators, self.noise, strict=True):
            one += rng.normal(size=one.shape) * deviation
        return sums


def _centre(split: Split, run: Run, rng: np.random.Generator) -> tuple[Floats, float]:
    """The released centre and the estimated number of units."""
    width, factor = split.rows.shape[1], noise_factor(run.mode, split.sites)
    deviation = sigma(run.epsilon) / math.sqrt(run.rule.centre_share) * CENTRE_NORM * math.sqrt(factor)
    sums = split.mean_sum + rng.normal(size=width) * deviation
    units = max(float(split.sites), split.count + rng.normal() * deviation / COUNT_WEIGHT)
    return shrink(sums / units, deviation / units), units


def _inverse_lengths(rows: NDArray[np.floating], centres: NDArray[np.float32]) -> NDArray[np.float32]:
    """By which a centred row is multiplied to be the head's input, [r, n]."""
    squared = 1 - 2 * (centres @ rows.T) + np.einsum("rd,rd->r", centres, centres)[:, None]
    scaled: NDArray[np.float32] = 1 / np.sqrt(np.maximum(squared, 1e-12) * np.float32(1 + INTERCEPT**2))
    return scaled


def simulate(split: Split, runs: list[Run]) -> list[float]:
    """Accuracies of runs, in their order."""
    found: dict[int, float] = {}
    together = max(1, _ELEMENTS // (len(split.rows) * split.classes))
    for rounds in sorted({run.rounds(split) for run in runs}):
        places = [place for place, run in enumerate(runs) if run.rounds(split) == rounds]
        for first in range(0, len(places), together):
            some = places[first : first + together]
            batch = Batch.start(split, [runs[place] for place in some], rounds)
            found.update(zip(some, batch.accuracies(), strict=True))
    return [found[place] for place in range(len(runs))]


@dataclass(frozen=True, kw_only=True)
class Figure:
    """Accuracy of one rule on one set, by seed, in percent; a seed is a split, and the mean of its draws of noise.

    Attributes:
        set: its name.
        role: choose or judge.
        facts: what is public about it.
        rule, mode, epsilon: what was run; "non-private" has the reference of the same splits.
        accuracies: by seed.
    """

    set: str
    role: str
    facts: str
    rule: str
    mode: str
    epsilon: float
    accuracies: list[float]


def study(name: str, datasets: Path, seeds: int) -> Iterator[Figure]:
    """All figures of one set."""
    records = {**CHOOSE, **JUDGE}[name](datasets)
    splits = [records.split(seed) for seed in range(seeds)]
    first = splits[0]
    counts = np.bincount(records.labels)
    facts = (
        f"{first.sites} sites of {first.count // first.sites}, c = {first.classes}, d = {first.rows.shape[1]}, "
        f"rarest class {100 * counts.min() / counts.sum():.0f} %"
    )
    figure = Figure(
        set=name, role="choose" if name in CHOOSE else "judge", facts=facts, rule="", mode="", epsilon=0, accuracies=[]
    )
    yield replace(figure, rule="non-private", accuracies=[round(100 * split.reference, 2) for split in splits])
    draws = min(4, max(1, 60_000 // (len(first.rows) * first.classes)))
    kinds = [(rule, mode, epsilon) for rule in RULES for mode in MODES for epsilon in EPSILONS]
    kinds = [kind for kind in kinds if not kind[0].more_rounds or _longer(first, *kind)]
    by_kind: list[list[float]] = [[] for _ in kinds]
    for seed, split in enumerate(splits):
        runs = [
            Run(rule=rule, epsilon=epsilon, mode=mode, draw=10 * seed + draw)
            for rule, mode, epsilon in kinds
            for draw in range(draws)
        ]
        means = np.array(simulate(split, runs)).reshape(len(kinds), draws).mean(axis=1)
        for found, mean in zip(by_kind, means, strict=True):
            found.append(round(100 * float(mean), 2))
    for (rule, mode, epsilon), found in zip(kinds, by_kind, strict=True):
        yield replace(figure, rule=rule.name, mode=mode, epsilon=epsilon, accuracies=found)


def _longer(split: Split, rule: Rule, mode: str, epsilon: float) -> bool:
    """Whether the number of rounds differs from the other rules'."""
    return Run(rule=rule, epsilon=epsilon, mode=mode, draw=0).rounds(split) != ROUNDS


def spread(values: list[float]) -> str:
    """Mean and standard deviation."""
    return f"{statistics.fmean(values):.1f} ± {statistics.stdev(values):.1f}" if len(values) > 1 else f"{values[0]:.1f}"


def table(figures: list[Figure]) -> str:
    """One row per set and ε: both rules in all modes, and the reference."""
    found = {(f.set, f.rule, f.mode, f.epsilon): f.accuracies for f in figures}
    heads = [f"{mode}: {rule.name}" for mode in MODES for rule in RULES[:2]]
    lines = [f"| set | ε | {' | '.join(heads)} | not private |", f"|---|---|{'---|' * (len(heads) + 1)}"]
    for name in (name for name in (*CHOOSE, *JUDGE) if (name, "non-private", "", 0) in found):
        for epsilon in EPSILONS:
            cells = [spread(found[name, rule.name, mode, epsilon]) for mode in MODES for rule in RULES[:2]]
            lines.append(
                f"| {name} | {epsilon:g} | {' | '.join(cells)} | {spread(found[name, 'non-private', '', 0])} |"
            )
    return "\n".join(lines)


def gaps(figures: list[Figure]) -> str:
    """One row per set and ε: differences on the same splits, in points."""
    found = {(f.set, f.rule, f.mode, f.epsilon): np.array(f.accuracies) for f in figures}
    lines = [
        "| set | ε | proposed - present: local | distributed | proposed: distributed - central | "
        "proposed distributed - not private |",
        "|---|---|---|---|---|---|",
    ]
    for name in (name for name in (*CHOOSE, *JUDGE) if (name, "non-private", "", 0) in found):
        for epsilon in EPSILONS:
            new, old = (
                {mode: found[name, rule.name, mode, epsilon] for mode in MODES} for rule in (RULES[1], RULES[0])
            )
            differences = (
                new["local"] - old["local"],
                new["distributed"] - old["distributed"],
                new["distributed"] - new["central"],
                new["distributed"] - found[name, "non-private", "", 0],
            )
            lines.append(f"| {name} | {epsilon:g} | {' | '.join(spread(one.tolist()) for one in differences)} |")
    return "\n".join(lines)


def longer(figures: list[Figure]) -> str:
    """What more rounds give where nominal units are many."""
    found = {(f.set, f.rule, f.mode, f.epsilon): np.array(f.accuracies) for f in figures}
    lines = [f"| set | mode | ε | T = {MORE_ROUNDS} - T = {ROUNDS} |", "|---|---|---|---|"]
    for (name, rule, mode, epsilon), accuracies in found.items():
        if rule == RULES[2].name:
            gained = accuracies - found[name, RULES[1].name, mode, epsilon]
            lines.append(f"| {name} | {mode} | {epsilon:g} | {spread(gained.tolist())} |")
    return "\n".join(lines)


OTHERS = (
    Rule(name="as proposed"),
    *(Rule(name=f"ν = {value:g}", logit_noise=value) for value in (0.35, 0.5, 0.7, 1.4, 2.0)),
    *(Rule(name=f"bound {value:g} of the first gradient", bound_share=value) for value in (0.25, 0.35, 0.7, 1.4)),
    *(Rule(name=f"rate {value:g} c", rate_per_class=value) for value in (4.0, 8.0, 32.0, 64.0)),
    *(Rule(name=f"momentum at most {value:g}", most_momentum=value) for value in (0.0, 0.8, 0.95)),
    *(Rule(name=f"centring share {value:g}", centre_share=value) for value in (0.03, 0.06, 0.25)),
    *(Rule(name=f"T = {value}", fewest_rounds=value) for value in (10, 20, 60)),
)
"""The proposed rule with one constant changed."""


def choice(datasets: Path, seeds: int, names: list[str]) -> str:
    """Mean accuracy of `OTHERS` on each set to choose on, over ε, local and distributed noise."""
    columns = []
    for name in names:
        kinds = [(rule, mode, epsilon) for rule in OTHERS for mode in MODES[:2] for epsilon in EPSILONS]
        records = CHOOSE[name](datasets)
        found = [
            simulate(records.split(seed), [Run(rule=r, mode=m, epsilon=e, draw=10 * seed) for r, m, e in kinds])
            for seed in range(seeds)
        ]
        columns.append(100 * np.mean(found, axis=0).reshape(len(OTHERS), -1).mean(axis=1))
    lines = [f"| rule | {' | '.join(names)} | mean |", f"|---|{'---|' * (len(names) + 1)}"]
    for rule, means in zip(OTHERS, np.array(columns).T, strict=True):
        lines.append(f"| {rule.name} | {' | '.join(f'{mean:.1f}' for mean in means)} | {means.mean():.1f} |")
    return "\n".join(lines)


def facts(figures: list[Figure]) -> str:
    """What the sets are like."""
    rows = [f"| {f.set} | {f.role} | {f.facts} |" for f in figures if f.rule == "non-private"]
    return "\n".join(["| set | used to | training units per site, classes, width, imbalance |", "|---|---|---|", *rows])


def main() -> None:
    """Run the study, and write rule.json and the tables of RULE.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--datasets", type=Path, required=True, help="folder with the data sets")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--only", nargs="*", default=[*CHOOSE, *JUDGE], help="sets; the others stay as they are")
    parser.add_argument("--choose", action="store_true", help="print how the constants were chosen instead")
    chosen = parser.parse_args()
    if chosen.choose:
        print(choice(chosen.datasets, chosen.seeds, [name for name in chosen.only if name in CHOOSE]))
        return
    store = HERE / "rule.json"
    kept = [Figure(**one) for one in json.loads(store.read_text(encoding="utf-8"))] if store.exists() else []
    for name in chosen.only:
        kept = [f for f in kept if f.set != name] + list(study(name, chosen.datasets, chosen.seeds))
        kept.sort(key=lambda f: [*CHOOSE, *JUDGE].index(f.set))
        store.write_text(json.dumps([asdict(f) for f in kept], indent=1) + "\n", encoding="utf-8")
        print(table([f for f in kept if f.set == name]), flush=True)
    save(kept)


def save(figures: list[Figure]) -> None:
    """Put the tables between the markers of RULE.md."""
    page = HERE / "RULE.md"
    before, _, rest = page.read_text(encoding="utf-8").partition(_START)
    tables = "\n\n".join([facts(figures), table(figures), gaps(figures), longer(figures)])
    page.write_text(f"{before}{_START}\n\n{tables}\n\n{_END}{rest.partition(_END)[2]}", encoding="utf-8")


if __name__ == "__main__":
    main()
