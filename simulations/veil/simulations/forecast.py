# SPDX-License-Identifier: Apache-2.0
"""What a plan will cost in accuracy: its very recipe played on made-up features of the expected sizes.

Promises that no record is read: plan, sizes and seed decide, the same at every call; and that no curve is fitted: the
sites' and the coordinator's own code run the rounds. A unit is one record here, and all sites are of one size.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from pydantic import ValidationError

from veil.common.errors import PlanError, RefusalCode, RefusalError
from veil.common.plan import RunPlan
from veil.simulations.made_up import MadeUpTask, Sizes
from veil.simulations.trial import Trial, made

DROWNED = 0.5
"""Part of what can be learnt beyond the most frequent class; with less of it left, the noise drowns the rest."""

WORTH = 0.01
"""Accuracy that another mode or number of rounds must gain before it is advised."""

LITTLE = 0.05
"""Loss of accuracy that a site of the size `Smallest.little_loss` has."""

ROUNDS = (10, 30, 100)
"""Numbers of training rounds that are tried beside the plan's."""

LADDER = (10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000)
"""Units per site among which the smallest useful site is looked for."""

_SEARCHED = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What one way to run the plan reaches, by seed.

    Attributes:
        noise: local or distributed.
        rounds: training rounds.
        accuracies: 0 to 1.
        losses: accuracy without privacy on the same records, minus that.
    """

    noise: str
    rounds: int
    accuracies: tuple[float, ...]
    losses: tuple[float, ...]

    @property
    def loss(self) -> float:
        """The median."""
        return statistics.median(self.losses)

    def beats(self, other: Outcome) -> bool:
        """Whether it is better by `WORTH`, and by two standard errors of the difference."""
        gains = np.array(other.losses) - np.array(self.losses)
        error = gains.std(ddof=1) / np.sqrt(len(gains)) if len(gains) > 1 else 0.0
        return bool(np.median(gains) > max(WORTH, 2 * error))


@dataclass(frozen=True, kw_only=True, slots=True)
class Smallest:
    """Units per site, all sites of one size; None where the largest of `LADDER` is too small.

    Attributes:
        useful: from where the noise does not drown the signal.
        little_loss: from where the accuracy is within `LITTLE` of the expected one.
    """

    useful: int | None
    little_loss: int | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Forecast:
    """What is to be expected of a plan.

    Attributes:
        plan: which.
        sizes: of what.
        not_private: accuracy of a head trained on all units in one place, without privacy, by seed.
        planned: the plan as it is.
        others: other ways to run it.
        advised: the best of them all, the plan's own where none is better.
        smallest: sites for which it works, run as advised.
    """

    plan: RunPlan
    sizes: Sizes
    not_private: tuple[float, ...]
    planned: Outcome
    others: tuple[Outcome, ...]
    advised: Outcome
    smallest: Smallest

    @property
    def made_up_records(self) -> int:
        """How many stood for all training units of all sites."""
        return made(self.sizes.sites * training_units(self.plan, self.sizes.units), self.sizes.width)

    def kept(self, outcome: Outcome) -> float:
        """Part of what can be learnt beyond the most frequent class that is learnt."""
        learnable = statistics.median(self.not_private) - self.sizes.majority
        return 1 - outcome.loss / max(learnable, 1e-9)

    def drowns(self, outcome: Outcome) -> bool:
        """Whether the noise drowns the signal."""
        return self.kept(outcome) < DROWNED

    def check(self) -> None:
        """Nothing, or don't.

        Raises:
            RefusalError: when the plan's noise drowns the signal.
        """
        if not self.drowns(self.planned):
            return
        privacy, sizes, better = self.plan.privacy, self.sizes, self.advised
        needed = self.smallest.useful
        remedy = f'privacy.noise = "{better.noise}" and training.rounds = {better.rounds}'
        if self.drowns(better):
            larger = f"sites of {needed:,} units or more, with {remedy}; or " if needed else ""
            remedy = f"{larger}more sites, or a larger target_epsilon"
        raise RefusalError(
            RefusalCode.BUDGET,
            f"don't: of what {sizes.sites} sites of {sizes.units} units could learn, the noise of "
            f"ε = {privacy.target_epsilon:g} would leave {max(0.0, self.kept(self.planned)):.0%}",
            f"at least {DROWNED:.0%}",
            remedy,
        )


def forecast(plan: RunPlan, sizes: Sizes, *, seeds: int = 5) -> Forecast:
    """Play a plan, and other ways to run it, on made-up records.

    Args:
        plan: with dp-fedsgd and plain sums.
        sizes: of what is expected.
        seeds: draws of records and noise.

    Raises:
        PlanError: for an algorithm or an aggregation that is not played here, or a budget that no noise keeps.
        InputError: for an accuracy that such sizes cannot reach.
    """
    check_played(plan)
    training = sizes.sites * training_units(plan, sizes.units)
    task = MadeUpTask.draw(sizes.width, sizes.shares, np.random.default_rng(plan.seed))
    task = task.reaching(sizes.expected, made(training, sizes.width), plan.seed)
    trials = [Trial.draw(task, sizes, training, seed) for seed in _seeds(plan, seeds)]
    planned = _outcome(plan, trials)
    modes = [_outcome(other, trials) for other in _with_other_noise(plan, sizes.sites)]
    best = _best(planned, modes)
    rounds = [_outcome(_run_as(plan, best.noise, one), trials) for one in ROUNDS if one != plan.training.rounds]
    advised = _best(best, rounds)
    return Forecast(
        plan=plan,
        sizes=sizes,
        not_private=tuple(trial.not_private for trial in trials),
        planned=planned,
        others=(*modes, *rounds),
        advised=advised,
        smallest=_smallest(
            _run_as(plan, advised.noise, advised.rounds),
            sizes,
            task,
            statistics.median(trial.not_private for trial in trials),
        ),
    )


def training_units(plan: RunPlan, units: int) -> int:
    """How many of a site's units train."""
    return max(1, units - round(units * (plan.evaluation.holdout if plan.evaluation else 0.0)))


def _seeds(plan: RunPlan, count: int) -> Iterator[int]:
    """Seeds of the plan's own, none that `MadeUpTask.reaching` has tried."""
    return (int(seed) for seed in np.random.SeedSequence(plan.seed).generate_state(count))


def check_played(plan: RunPlan) -> None:
    """Refuse what is not played here.

    Raises:
        PlanError: for answers other than classes, for an algorithm or an aggregation.
    """
    if plan.task.form != "classification":
        raise PlanError(
            f'task.kind = "{plan.task.kind}"', "classes, whose accuracy is forecast", "simulate on records like yours"
        )
    if plan.training.algorithm != "dp-fedsgd" or plan.cohort.aggregation != "sum":
        raise PlanError(
            f'training.algorithm = "{plan.training.algorithm}", cohort.aggregation = "{plan.cohort.aggregation}"',
            "dp-fedsgd and sum, the one recipe that is forecast",
            "forecast the plan with these; simulate it as it is on records like yours",
        )


def _outcome(plan: RunPlan, trials: list[Trial]) -> Outcome:
    accuracies = tuple(trial.run(plan) for trial in trials)
    return Outcome(
        noise=plan.privacy.noise,
        rounds=plan.training.rounds,
        accuracies=accuracies,
        losses=tuple(trial.not_private - reached for trial, reached in zip(trials, accuracies, strict=True)),
    )


def _best(first: Outcome, others: list[Outcome]) -> Outcome:
    """The first, or the one of those that beat it that loses least."""
    return min((one for one in others if one.beats(first)), key=lambda one: one.loss, default=first)


def _run_as(plan: RunPlan, noise: str, rounds: int) -> RunPlan:
    document = plan.model_dump(exclude_none=True)
    document["privacy"]["noise"], document["training"]["rounds"] = noise, rounds
    return RunPlan.model_validate(document)


def _with_other_noise(plan: RunPlan, sites: int) -> list[RunPlan]:
    """The plan with the other mode of noise, where it has one."""
    other = "local" if plan.privacy.noise == "distributed" else "distributed"
    try:
        return [_run_as(plan, other, plan.training.rounds)] if sites > 1 else []
    except ValidationError:
        return []


def _smallest(plan: RunPlan, sizes: Sizes, task: MadeUpTask, expected: float) -> Smallest:
    """Look for both sizes by halving the ladder."""

    @lru_cache
    def reached(units: int) -> float:
        at = replace(sizes, units=units)
        training = sizes.sites * training_units(plan, units)
        return statistics.median(Trial.draw(task, at, training, seed).run(plan) for seed in _seeds(plan, _SEARCHED))

    def first(accuracy: float) -> int | None:
        low, high = 0, len(LADDER)
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if reached(LADDER[middle]) >= accuracy else (middle + 1, high)
        return LADDER[low] if low < len(LADDER) else None

    learnable = expected - sizes.majority
    return Smallest(useful=first(sizes.majority + DROWNED * learnable), little_loss=first(expected - LITTLE))
