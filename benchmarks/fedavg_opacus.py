# SPDX-License-Identifier: Apache-2.0
"""FedAvg with Opacus, as its users run it: what Veil's accuracy is compared with.

Each round each site wraps a linear head with `make_private`, passes over Poisson batches of its frozen, length-1
features, adds noise in every step, and the server averages the weights by number of units. The step is Opacus' own,
written out for a linear head (`private_step`), as through Opacus it takes many times as long; a test holds them equal.

Promises the stated ε and δ to every unit: σ is calibrated for all steps of the run, with Opacus' own sample rate, by
Veil's accountant (PLD, checked against the Rényi bound), not per round. Units are those of the plan: where a patient
has several records, the mean of their gradients is clipped, and batches are drawn among patients. Numbers of units are
taken to be public, which Opacus (its batch size) and FedAvg (its weights) need.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product

import numpy as np
from numpy.typing import NDArray

from veil.client.units import Units, bounded_units
from veil.common.head import probabilities, unit_rows
from veil.common.privacy import PrivacyBudget, calibrate
from veil.simulations.baselines import Pool
from veil.simulations.evaluation import Scores, score


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a user of FedAvg and Opacus sets; the defaults are usual ones.

    Attributes:
        rounds: of the server.
        local_epochs: passes of a site in a round.
        batch: units of an expected batch.
        learning_rate: of the local steps.
        max_grad_norm: clipping bound.
    """

    rounds: int = 10
    local_epochs: int = 2
    batch: int = 32
    learning_rate: float = 1.0
    max_grad_norm: float = 1.0

    def __str__(self) -> str:
        return f"R{self.rounds} E{self.local_epochs} bs{self.batch} lr{self.learning_rate:g} C{self.max_grad_norm:g}"


GRID = tuple(
    Settings(rounds=rounds, local_epochs=epochs, batch=batch, learning_rate=rate, max_grad_norm=bound)
    for (rounds, epochs), batch, rate, bound in product(((5, 1), (10, 2), (20, 1)), (32, 128), (1.0, 4.0), (0.5, 1.0))
)
"""What the tuned rows choose from, by accuracy on other splits; what that choice costs in ε is not charged."""


@dataclass(frozen=True, kw_only=True)
class LocalSite:
    """A site's units and the steps that Opacus would take over them.

    Attributes:
        inputs: unit rows with a 1 appended, for the bias, sorted by unit, [n, d + 1].
        labels: [n].
        starts: first row of each unit and, last, n; [units + 1].
        sigma: noise over the clipping bound.
        sample_rate: chance of a unit to be in a step, 1/len(loader).
        steps: of one pass.
    """

    inputs: NDArray[np.float32]
    labels: NDArray[np.int64]
    starts: NDArray[np.int64]
    sigma: float
    sample_rate: float
    steps: int

    @property
    def units(self) -> int:
        """How many there are."""
        return len(self.starts) - 1

    @property
    def batch(self) -> int:
        """Opacus' expected batch size, by which it divides."""
        return int(self.units * self.sample_rate)

    def drawn(self, chosen: NDArray[np.int64]) -> tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.int64]]:
        """Inputs, labels and first rows of some units, and of each row its unit's place among them."""
        sizes = np.diff(self.starts)[chosen]
        first = np.cumsum(sizes) - sizes
        rows = np.repeat(self.starts[chosen] - first, sizes) + np.arange(sizes.sum())
        return self.inputs[rows], self.labels[rows], first


def fedavg(pool: Pool, settings: Settings, *, by_record: bool = False) -> Scores:
    """Train by FedAvg and judge on everybody's held-out records.

    Args:
        pool: the records, divided; its plan says ε, δ, the unit and the seed of batches and noise.
        settings: of this run.
        by_record: protect records, whatever the plan's unit.
    """
    sites = [local_site(units, pool.plan.privacy.budget, settings) for units in _units(pool, by_record)]
    rng = np.random.default_rng([pool.plan.seed, round(1000 * pool.plan.privacy.target_epsilon)])
    weight = np.zeros((len(pool.plan.task.labels), pool.features.shape[1] + 1))
    shares = np.array([site.units for site in sites]) / sum(site.units for site in sites)
    for _ in range(settings.rounds):
        weight = np.einsum("k,kcd->cd", shares, [trained(weight, site, settings, rng) for site in sites])
    return score(
        probabilities(weight, with_bias(pool.features[pool.test]).astype(np.float64)), pool.examples.labels[pool.test]
    )


def _units(pool: Pool, by_record: bool) -> Sequence[Units]:
    names = np.arange(len(pool.examples)).astype(np.str_) if by_record else pool.examples.units
    return [
        bounded_units(
            pool.features[share.train],
            pool.examples.labels[share.train],
            names[share.train],
            max_records=pool.plan.privacy.max_records_per_patient,
            key=bytes(32),
        )
        for share in pool.shares
    ]


def local_site(units: Units, budget: PrivacyBudget, settings: Settings) -> LocalSite:
    """A site with Opacus' sample rate and steps, and the σ that the whole run needs."""
    order = np.argsort(units.unit, kind="stable")
    sample_rate = 1 / -(-units.count // settings.batch)  # the loader's length
    steps = int(1 / sample_rate)
    return LocalSite(
        inputs=with_bias(units.features[order]),
        labels=units.labels[order],
        starts=np.concatenate([[0], np.cumsum(units.sizes)]),
        sigma=calibrated(budget, settings.rounds * settings.local_epochs * steps, sample_rate),
        sample_rate=sample_rate,
        steps=steps,
    )


def with_bias(features: NDArray[np.floating]) -> NDArray[np.float32]:
    """Unit rows with a 1 appended, [n, d + 1]."""
    return np.hstack([unit_rows(features), np.ones((len(features), 1))]).astype(np.float32)


@lru_cache(maxsize=4096)
def calibrated(budget: PrivacyBudget, steps: int, sample_rate: float) -> float:
    """σ with which so many steps keep the budget; it is in units of the clipping bound."""
    return calibrate(budget, steps=steps, sample_rate=sample_rate, max_grad_norm=1.0).noise_multiplier


def trained(
    weight: NDArray[np.floating], site: LocalSite, settings: Settings, rng: np.random.Generator
) -> NDArray[np.float32]:
    """A site's weights after its passes."""
    weight = weight.astype(np.float32)
    for _ in range(settings.local_epochs * site.steps):
        chosen = np.flatnonzero(rng.random(site.units) < site.sample_rate)
        noise = rng.standard_normal(weight.shape, dtype=np.float32)
        weight = private_step(weight, *site.drawn(chosen), noise=noise, site=site, settings=settings)
    return weight


def private_step(
    weight: NDArray[np.float32],
    inputs: NDArray[np.float32],
    labels: NDArray[np.int64],
    first: NDArray[np.int64],
    *,
    noise: NDArray[np.float32],
    site: LocalSite,
    settings: Settings,
) -> NDArray[np.float32]:
    """One step of Opacus' DPOptimizer on a batch.

    Args:
        weight: [classes, d + 1], the bias last.
        inputs: [n, d + 1].
        labels: [n].
        first: each unit's first row, [units of the batch].
        noise: standard normal, [classes, d + 1].
        site: its σ and batch size.
        settings: rate and clipping bound.
    """
    errors = inputs @ weight.T
    errors = np.exp(errors - errors.max(axis=1, keepdims=True, initial=-np.inf))
    errors /= errors.sum(axis=1, keepdims=True)
    errors[np.arange(len(labels)), labels] -= 1
    sizes = np.diff(np.append(first, len(labels)))
    norms = _norms(errors, inputs, first, sizes)
    factors = np.minimum(1.0, settings.max_grad_norm / (norms + 1e-6)) / sizes
    total = (errors * np.repeat(factors, sizes)[:, None]).T @ inputs
    gradient = (total + site.sigma * settings.max_grad_norm * noise) / site.batch
    return (weight - settings.learning_rate * gradient).astype(np.float32)


def _norms(
    errors: NDArray[np.float32], inputs: NDArray[np.float32], first: NDArray[np.int64], sizes: NDArray[np.int64]
) -> NDArray[np.float32]:
    """Length of each unit's mean gradient, [units]; units of the same size are taken together."""
    norms = np.zeros(len(first), np.float32)
    for size in np.unique(sizes):
        rows = first[sizes == size][:, None] + np.arange(size)
        if size == 1:
            one, other = errors[rows[:, 0]], inputs[rows[:, 0]]
            squared = np.einsum("uc,uc->u", one, one) * np.einsum("ud,ud->u", other, other)
        else:
            sums = errors[rows].transpose(0, 2, 1) @ inputs[rows]
            squared = np.einsum("ucd,ucd->u", sums, sums) / size**2
        norms[sizes == size] = np.sqrt(squared)
    return norms
