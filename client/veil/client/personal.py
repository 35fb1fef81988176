# SPDX-License-Identifier: Apache-2.0
"""A site's own heads beside the federated one: fitted, compared by cross-validation, and one of them chosen.

Promises that only the site's training units are read, that a unit is never divided between folds, and that the price is
ε = 0: nothing here adds noise, because nothing of it, neither head nor figure, leaves the site.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize

from veil.client.comparison import gain
from veil.client.head_batch import HeadBatch
from veil.client.units import Units
from veil.common.head import CENTRE, WEIGHT, predict, probabilities
from veil.common.objective import classes_of
from veil.common.update import Adapter

EPSILON = 0.0
"""What a selection costs."""

FOLDS = 5
"""Of the cross-validation; fewer where there are fewer units."""

LOCAL_STRENGTHS = (10.0, 3.0, 1.0, 0.3, 0.1, 0.03)
"""Prior precisions λ that are tried for a head of the site alone, the strongest first."""

BLEND_STRENGTHS = (100.0, 30.0, 10.0, 3.0, 1.0, 0.3, 0.1)
"""Prior precisions λ that are tried for a correction of the federated head, the strongest first."""

_SEARCH = {"maxiter": 200, "maxcor": 30, "gtol": 1e-4}
_LEAST = 1e-12
_SEED = 0


class Origin(StrEnum):
    """Where a head comes from."""

    FEDERATED = "federated"
    BLEND = "blend"
    LOCAL = "local"


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Option:
    """One head that a site may keep.

    Attributes:
        origin: where it comes from.
        strength: prior precision λ that it was fitted with; None for the federated head.
        adapter: the head and its centre.
        right: whether a head fitted in the same way without a record's unit knows the record, [n]; the federated head
            is judged as it is, though it has learned from all of them.
        loss: mean over units of those heads' cross-entropy, nats.
    """

    origin: Origin
    strength: float | None
    adapter: Adapter
    right: NDArray[np.bool_]
    loss: float


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Selection:
    """What a site compared, and what it keeps.

    Attributes:
        options: the best head of each origin.
        chosen: the origin of the one that is kept.
    """

    options: Mapping[Origin, Option]
    chosen: Origin

    @property
    def kept(self) -> Option:
        """The chosen head."""
        return self.options[self.chosen]


def select(federated: Adapter, units: Units) -> Selection:
    """Compare the federated head, the federated head with a local correction, and a head of the site alone.

    Args:
        federated: the run's final adapter.
        units: the site's training units; `units.held` are not looked at.
    """
    weight = federated.tensors[WEIGHT].astype(np.float64)
    blends = _Family(
        origin=Origin.BLEND,
        strengths=BLEND_STRENGTHS,
        mean=weight,
        centre=federated.tensors[CENTRE].astype(np.float64),
    )
    alone = _Family(
        origin=Origin.LOCAL,
        strengths=LOCAL_STRENGTHS,
        mean=np.zeros_like(weight),
        centre=units.mean_rows().sum(axis=0) / max(units.count, 1),
    )
    fold = folds(units)
    found = (_unchanged(federated, units), blends.best(units, fold), alone.best(units, fold))
    options = {option.origin: option for option in found}
    return Selection(options=options, chosen=choice(options, units.unit))


def choice(options: Mapping[Origin, Option], unit: NDArray[np.int64]) -> Origin:
    """The site's own head, unless another knows more records by more than the error bar; of those, the best.

    The error bar is there for two reasons: chance, and that a federated head has learned from the very records it is
    judged on here. At small sites and a large ε it looks several points better than it is (benchmarks/SELECTOR.md).

    Args:
        options: a head of each origin.
        unit: the unit of each record, [n]; without a record there is nothing of the site's own to keep.
    """
    own = options[Origin.LOCAL]
    if not len(unit):
        return Origin.FEDERATED
    better = [one for one in options.values() if one is not own and gain(one.right, own.right, unit).low > 0]
    return max(better, key=lambda one: float(one.right.mean()), default=own).origin


def folds(units: Units) -> NDArray[np.int64]:
    """The fold of each unit, 0 to `FOLDS` - 1, [count]; every fold has about as many units of each class."""
    labels = classes_of(units.labels)
    votes = np.zeros((units.count, int(labels.max(initial=0)) + 1))
    np.add.at(votes, (units.unit, labels), 1.0)
    order = np.lexsort((np.random.default_rng(_SEED).permutation(units.count), votes.argmax(axis=1)))
    fold = np.empty(units.count, dtype=np.int64)
    fold[order] = np.arange(units.count) % FOLDS
    return fold


def fitted(
    batch: HeadBatch, mean: NDArray[np.float64], strength: float, start: NDArray[np.float64]
) -> NDArray[np.float64]:
    """The head W that makes Σ over units of the mean cross-entropy of their records + λ/2·‖W - mean‖² least.

    It is the most likely head under a normal prior: with a large λ the mean itself, with the mean 0 plain regression
    with a ridge penalty. The problem is strictly convex, also where a class is missing; found by L-BFGS (Liu & Nocedal
    1989).

    Args:
        batch: the records.
        mean: [classes, d + 1].
        strength: λ.
        start: where the search begins, [classes, d + 1].
    """
    rows, scale = np.arange(len(batch.labels)), max(float(batch.share.sum()), 1.0)
    inputs = batch.inputs.astype(np.float64)

    def objective(flat: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        weight = flat.reshape(mean.shape)
        errors = probabilities(weight, inputs)
        loss = batch.share @ -np.log(np.maximum(errors[rows, batch.labels], _LEAST))
        errors[rows, batch.labels] -= 1.0
        errors *= batch.share[:, None]
        away = weight - mean
        gradient = errors.T @ inputs + strength * away
        return float(loss + strength / 2 * np.vdot(away, away)) / scale, gradient.ravel() / scale

    found = minimize(objective, start.ravel(), jac=True, method="L-BFGS-B", options=dict(_SEARCH))
    return np.asarray(found.x, dtype=np.float64).reshape(mean.shape)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Family:
    """Heads that differ in their prior's precision only.

    Attributes:
        origin: theirs.
        strengths: precisions, the strongest first.
        mean: of the prior, [classes, d + 1].
        centre: of the features, [d]; found without a label, and therefore the same in all folds.
    """

    origin: Origin
    strengths: tuple[float, ...]
    mean: NDArray[np.float64]
    centre: NDArray[np.float64]

    def best(self, units: Units, fold: NDArray[np.int64]) -> Option:
        """The head whose precision has the least cross-validated loss, fitted to all units.

        Once a weaker prior has made the loss rise, none weaker is tried.
        """
        batch = HeadBatch.of(units, self.centre)
        tried: list[tuple[float, NDArray[np.bool_]]] = []
        for judged in self._judged(batch, fold):
            tried.append(judged)
            if judged[0] > tried[-2:][0][0]:
                break
        place = min(range(len(tried)), key=lambda one: tried[one][0])
        *_, weight = self._path(batch, self.strengths[: place + 1])
        tensors = {WEIGHT: weight.astype(np.float32), CENTRE: self.centre.astype(np.float32)}
        return Option(
            origin=self.origin,
            strength=self.strengths[place],
            adapter=Adapter(tensors=tensors),
            right=tried[place][1],
            loss=tried[place][0],
        )

    def _judged(self, batch: HeadBatch, fold: NDArray[np.int64]) -> Iterator[tuple[float, NDArray[np.bool_]]]:
        """Of heads that were fitted to the other folds, for each precision: mean loss, and what they know, [n]."""
        parts, labels = [np.flatnonzero(fold[batch.unit] == one) for one in range(FOLDS)], classes_of(batch.labels)
        paths = [self._path(batch.take(fold != one), self.strengths) for one in range(FOLDS)]
        for weights in zip(*paths, strict=True):
            losses, right = np.zeros(len(labels)), np.zeros(len(labels), dtype=np.bool_)
            for rows, weight in zip(parts, weights, strict=True):
                found = probabilities(weight, batch.inputs[rows].astype(np.float64))
                losses[rows], right[rows] = _judge(found, labels[rows])
            yield float(losses @ batch.share) / max(batch.count, 1), right

    def _path(self, batch: HeadBatch, strengths: tuple[float, ...]) -> Iterator[NDArray[np.float64]]:
        """A head for each precision; the search for one begins where the last one ended."""
        weight = self.mean
        for strength in strengths:
            weight = fitted(batch, self.mean, strength, weight)
            yield weight


def _unchanged(federated: Adapter, units: Units) -> Option:
    losses, right = _judge(predict(federated, units.features), classes_of(units.labels))
    share = 1.0 / units.sizes[units.unit] if len(units.unit) else np.zeros(0)
    return Option(
        origin=Origin.FEDERATED,
        strength=None,
        adapter=federated,
        right=right,
        loss=float(losses @ share) / max(units.count, 1),
    )


def _judge(found: NDArray[np.float64], labels: NDArray[np.int64]) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Cross-entropy of each record, [n], and whether its likeliest class is the right one, [n]."""
    losses = -np.log(np.maximum(found[np.arange(len(labels)), labels], _LEAST))
    return losses, found.argmax(axis=1) == labels
