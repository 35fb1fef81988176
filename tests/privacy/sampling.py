# SPDX-License-Identifier: Apache-2.0
"""Mistakes in local training on samples: who is drawn, how often, and what an empty sample does.

Each variant is a training loop as it is often written, around the product's own step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import numpy as np
from numpy.typing import NDArray
from tests.privacy.scene import (
    LABELS,
    NOMINAL,
    WEIGHT,
    Floats,
    batch,
    blank,
    drawn,
    fedavg,
    mechanism,
    noise_of,
    numbers,
    replaced,
    request,
    silent,
    stage,
    units,
    update_of,
)
from tests.statistical.checks import check_count, check_dispersion, check_scale

from veil.client import release
from veil.client.head_batch import HeadBatch
from veil.client.optimizer import LatticeOptimizer
from veil.common.noise import NoiseSource, OSNoise
from veil.common.privacy import Mechanism
from veil.common.schedule import DELTA_SPACING
from veil.common.update import Update

Samples = Callable[[HeadBatch, Mechanism, NoiseSource], Iterator[HeadBatch]]
RATE = 0.1
UNITS = STEPS = 400


def _trained_on(samples: Samples) -> AbstractContextManager[None]:
    """Local training whose steps read what `samples` gives."""

    def variant(
        weight: Floats,
        of: HeadBatch,
        paid: Mechanism,
        noise: NoiseSource,
        *,
        learning_rate: float,
        nominal_units: float,
    ) -> Update:
        divisor = paid.sample_rate * nominal_units
        descent = LatticeOptimizer(weight, mechanism=paid, noise=noise, learning_rate=learning_rate, divisor=divisor)
        for sample in samples(of, paid, noise):
            release._step(descent, sample, paid)
        change = descent.weight - weight
        return Update(points={WEIGHT: np.rint(change / DELTA_SPACING).astype(np.int64)}, spacing=DELTA_SPACING)

    return replaced((release, "delta_update", variant))


def _taken() -> NDArray[np.bool_]:
    """Which units each of many local steps reads, [steps, units]; one number of each feature names its unit."""
    read: list[NDArray[np.bool_]] = []
    ours = release._step
    names = np.linspace(1, 2, UNITS)
    records = units(np.stack([np.cos(names), np.sin(names)], axis=1), np.zeros(UNITS))
    known = batch(records).inputs[:, 0]

    def looking(opt: LatticeOptimizer, of: HeadBatch, paid: Mechanism) -> None:
        read.append(np.isin(known, of.inputs[:, 0]))
        ours(opt, of, paid)

    paid = mechanism(50.0, sample_rate=RATE, steps=STEPS)
    start = np.zeros((len(LABELS), 3))
    with replaced((release, "_step", looking)):
        release.delta_update(start, batch(records), paid, OSNoise(), learning_rate=0.1, nominal_units=NOMINAL)
    return np.array(read)


def guard_rate() -> None:
    """Units are read as often as the ledger's rate says."""
    taken = _taken()
    check_count(int(taken.sum()), taken.size, RATE)


def rate_of_a_loader() -> AbstractContextManager[None]:
    """Samples at 1 / (number of full batches), as a loader that drops its last batch has it, not at the rate paid."""

    def samples(of: HeadBatch, paid: Mechanism, noise: NoiseSource) -> Iterator[HeadBatch]:
        rate = 1 / max(1, int(of.count / (of.count * paid.sample_rate + 5)))
        for _ in range(paid.steps):
            yield of.take(noise.uniform(of.count) < rate)

    return _trained_on(samples)


def guard_independence() -> None:
    """Whether a unit is drawn depends on nothing: not on the others of its step, not on the steps before."""
    taken = _taken()
    check_dispersion(taken.sum(axis=1), UNITS, RATE)
    check_dispersion(taken.sum(axis=0), STEPS, RATE)
    check_count(int(np.sum(taken[1:] & taken[:-1])), taken[1:].size, RATE**2)


def shuffled() -> AbstractContextManager[None]:
    """Batches of equal size, shuffled once an epoch: the loader that most training has."""

    def samples(of: HeadBatch, paid: Mechanism, noise: NoiseSource) -> Iterator[HeadBatch]:
        parts = round(1 / paid.sample_rate)
        for step in range(paid.steps):
            if step % parts == 0:
                order = np.argsort(noise.uniform(of.count))
            mask = np.zeros(of.count, np.bool_)
            mask[order[step % parts :: parts]] = True
            yield of.take(mask)

    return _trained_on(samples)


def guard_patients() -> None:
    """A sample holds all records of a patient or none, and holds it as often as the rate says."""
    count, most, steps = 100, 4, 100
    records = units(np.ones((most * count, 2)), np.zeros(most * count), np.repeat(np.arange(count), most))
    held: list[NDArray[np.int64]] = []
    ours = release._step

    def looking(opt: LatticeOptimizer, of: HeadBatch, paid: Mechanism) -> None:
        held.append(np.bincount(of.unit, minlength=count))
        ours(opt, of, paid)

    paid = mechanism(50.0, sample_rate=RATE, steps=steps)
    with replaced((release, "_step", looking)):
        release.delta_update(
            np.zeros((len(LABELS), 3)), batch(records), paid, OSNoise(), learning_rate=0.1, nominal_units=NOMINAL
        )
    taken = np.array(held)
    check_count(int(np.sum(taken > 0)), taken.size, RATE)
    assert set(np.unique(taken)) <= {0, most}, "a part of a patient was drawn"


def records_sampled() -> AbstractContextManager[None]:
    """Records are drawn, so that a patient of four takes part in a third of the steps instead of a tenth."""

    def samples(of: HeadBatch, paid: Mechanism, noise: NoiseSource) -> Iterator[HeadBatch]:
        for _ in range(paid.steps):
            rows = noise.uniform(len(of.labels)) < paid.sample_rate
            yield dataclasses.replace(
                of,
                inputs=of.inputs[rows],
                labels=of.labels[rows],
                unit=of.unit[rows],
                share=of.share[rows],
                pairs=of.pairs[:, :0],
                dots=of.dots[:0],
                squares=of.squares[rows],
                largest=of.largest,
            )

    return _trained_on(samples)


def guard_empty_counts() -> None:
    """A site without records sends the noise of every step it is charged for."""
    with stage() as scene:
        site = scene.site(blank(0, 2000))
        check_scale(np.concatenate(noise_of(site, fedavg(), 2000)))


def empty_skipped() -> AbstractContextManager[None]:
    """A step without records is left out, as a loop over a loader does by itself."""

    def samples(of: HeadBatch, paid: Mechanism, noise: NoiseSource) -> Iterator[HeadBatch]:
        for _ in range(paid.steps):
            mask = noise.uniform(of.count) < paid.sample_rate
            if mask.any():
                yield of.take(mask)

    return _trained_on(samples)


def guard_empty_is_empty() -> None:
    """An empty sample adds nothing but noise: without noise, a site without records changes nothing."""
    paid = mechanism(sample_rate=0.5, steps=8)
    for records in (blank(0, 6), drawn(3, 6)):
        rare = paid if not records.count else mechanism(sample_rate=1e-9, steps=8)
        change = release.delta_update(
            np.zeros((len(LABELS), 7)), batch(records), rare, silent(), learning_rate=1.0, nominal_units=NOMINAL
        )
        assert not numbers(change).any(), "an empty sample moved the head"


def empty_filled() -> AbstractContextManager[None]:
    """An empty sample is filled with an invented record (Opacus' `rand_on_empty`)."""

    def samples(of: HeadBatch, paid: Mechanism, noise: NoiseSource) -> Iterator[HeadBatch]:
        for _ in range(paid.steps):
            sample = of.take(noise.uniform(of.count) < paid.sample_rate)
            yield sample if len(sample.labels) else batch(drawn(1, of.inputs.shape[1] - 1))

    return _trained_on(samples)


def guard_steps() -> None:
    """A round takes as many noised steps as its ledger line says."""
    taken: list[int] = []
    ours = LatticeOptimizer.add_noise

    def counting(self: LatticeOptimizer, clipped_sum: Floats) -> None:
        taken.append(1)
        ours(self, clipped_sum)

    with stage() as scene, replaced((LatticeOptimizer, "add_noise", counting)):
        site = scene.site(drawn(5))
        update_of(site.answer(request(fedavg(), 1, 6)))
        (entry,) = site.ledger.entries()
    assert len(taken) == entry.mechanism.steps, f"{len(taken)} steps taken, {entry.mechanism.steps} charged"


def step_twice() -> AbstractContextManager[None]:
    """Every batch is stepped on in two halves, and counted as one step."""
    ours = release._step

    def variant(opt: LatticeOptimizer, of: HeadBatch, paid: Mechanism) -> None:
        ours(opt, of, paid)
        ours(opt, of, paid)

    return replaced((release, "_step", variant), (release, "_check_steps", lambda *_: None))


def guard_overrun() -> None:
    """A loop that takes a step more than was paid for releases nothing."""
    ours = release._step

    def twice(opt: LatticeOptimizer, of: HeadBatch, paid: Mechanism) -> None:
        ours(opt, of, paid)
        ours(opt, of, paid)

    with stage() as scene, replaced((release, "_step", twice)):
        reply = scene.site(drawn(5)).answer(request(fedavg(), 1, 6))
    assert reply.update is None, "twice the steps that were paid for left the site"


def steps_unchecked() -> AbstractContextManager[None]:
    """Nobody compares the steps that were taken with those that were paid for."""
    return replaced((release, "_check_steps", lambda *_: None))
