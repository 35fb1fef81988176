# SPDX-License-Identifier: Apache-2.0
"""A private step that is thrown away, to see on this very machine that noise is added, that clipping holds, and that
gradients of every form of task are those of Opacus.

Promises that what is drawn here goes nowhere.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.stats import chi2

from veil.client.gradient import clipped_head_sum, clipped_mean_sum
from veil.client.moment_sums import clipped_moment_sum
from veil.client.release import centre_update, gradient_update
from veil.client.units import Units
from veil.common.errors import RunError
from veil.common.head import CENTRE, WEIGHT
from veil.common.moments import moments_size
from veil.common.noise import OSNoise, clip_bound, spacing
from veil.common.objective import OBJECTIVES, Targets, form_of
from veil.common.plan_sections import Form
from veil.common.privacy import Mechanism
from veil.common.schedule import COUNT_WEIGHT

_CLASSES, _WIDTH, _COUNT = 2, 384, 64
_FALSE_ALARM = 1e-9
_ENOUGH = 500
"""Numbers by which noise of half its size is told from noise of its size."""

_BOUND = 0.1
_EQUAL = 0.02
"""By which the grids of errors and weight may move the gradient of one unit of four records, in bounds."""

_RECORDS = 4
_FORMS: tuple[Form, ...] = tuple(OBJECTIVES)
"""Of which gradients are looked at."""

_MECHANISM = Mechanism(noise_multiplier=2.0, max_grad_norm=1.0)


def examine_step(units: Units | None = None) -> Sequence[str]:
    """Draw, look and forget.

    Args:
        units: the records to draw on; made-up ones when None.

    Returns:
        what was seen, for the operator.

    Raises:
        RunError: when the noise is not what it should be, or one unit counts for more than the bound.
    """
    units = units or _made_up(_WIDTH, np.arange(_COUNT))
    width = units.features.shape[1]
    weight, centre = np.zeros((_labels(units.labels), width + 1)), np.zeros(width)

    def gradient() -> NDArray[np.int64]:
        return gradient_update(weight, units.batch(centre), _MECHANISM, OSNoise()).points[WEIGHT]

    def mean() -> NDArray[np.int64]:
        return centre_update(units, _MECHANISM, OSNoise()).points[CENTRE]

    began = time.monotonic()
    gradient()
    took = time.monotonic() - began
    for draw in (gradient, mean):
        _check_noise(draw)
    _check_clipping(width)
    for form in _FORMS:
        _check_pull(width, form)
        _check_reference(width, form)
    return [
        f"one step on {units.count} units took {took:.3f} s",
        "draws differ by noise of the promised size; one unit's part stays within the bound",
        "clipped gradients are those of Opacus' hooks, and add up to the last bit",
    ]


def _check_noise(draw: Callable[[], NDArray[np.int64]]) -> None:
    """Two draws on the same records differ by a Gaussian of √2 σC: a χ² test that errs once in 10⁹."""
    differences = [draw() - draw()]
    while sum(one.size for one in differences) < _ENOUGH:
        differences.append(draw() - draw())
    scale = math.sqrt(2.0) * _MECHANISM.noise_multiplier * _MECHANISM.max_grad_norm
    found = np.concatenate([one.ravel() for one in differences]) * spacing(_MECHANISM.max_grad_norm) / scale
    statistic = float(np.sum(found**2))
    low, high = chi2.ppf([_FALSE_ALARM / 2, 1 - _FALSE_ALARM / 2], found.size)
    if not low <= statistic <= high:
        size = math.sqrt(statistic / found.size)
        raise RunError(f"noise of {size:.3f} times its size", "noise of its size", "do not start; report this defect")


def _check_clipping(width: int) -> None:
    """One more unit must not move a sum by more than the bound: alone, or pulling against one that was there."""
    row = np.full(width, 1e6)
    weight = np.zeros((_CLASSES, width + 1))
    weight[0, -1] = 2.0  # class 0 is likely: a unit of it pulls weakly, one of class 1 strongly the other way
    weak, strong = [0], [1] * _RECORDS

    def gradient(*units: list[int]) -> NDArray[np.float64]:
        return clipped_head_sum(weight, _labelled(row, units).batch(np.zeros(width)), clip_bound(_BOUND, weight.size))

    _check_part("gradient", gradient(strong) - gradient())
    _check_part("gradient", gradient(weak, strong) - gradient(weak))
    room = clip_bound(_BOUND, moments_size(width, _CLASSES))
    nobody, one, two = (
        clipped_moment_sum(_labelled(row, units), _CLASSES, room) for units in ([], [strong], [weak, strong])
    )
    _check_part("moments", one - nobody)
    _check_part("moments", two - clipped_moment_sum(_labelled(row, [weak]), _CLASSES, room))
    rows = np.outer([0.5, -1.0], row / np.linalg.norm(row))
    for constant in (0.0, COUNT_WEIGHT):
        first, second, both = (
            clipped_mean_sum(some, constant, clip_bound(_BOUND, width + 1)) for some in (rows[:1], rows[1:], rows)
        )
        _check_part("mean", second)
        _check_part("mean", both - first)


def _check_pull(width: int, form: Form) -> None:
    """As above for one form: a unit that pulls weakly, and one that pulls the other way as hard as can be."""
    weak, strong = _opposed(form)
    weight, centre = np.zeros((_labels(weak), width + 1)), np.zeros(width)
    weight[0, -1] = 2.0
    row, room = np.full(width, 1e6), clip_bound(_BOUND, weight.size)

    def gradient(*truths: Targets) -> NDArray[np.float64]:
        units = Units(
            features=np.tile(row, (len(truths), 1)),
            labels=np.concatenate([weak[:0], *truths]),
            unit=np.arange(len(truths)),
            count=len(truths),
        )
        return clipped_head_sum(weight, units.batch(centre), room)

    _check_part("gradient", gradient(strong) - gradient())
    _check_part("gradient", gradient(weak, strong) - gradient(weak))


def _opposed(form: Form) -> tuple[Targets, Targets]:
    """A record that agrees with a head that says the first label or a high number, and one that does not."""
    if form == "classification":
        return np.array([0]), np.array([1])
    if form == "regression":
        return np.array([1.0]), np.array([0.0])
    return np.eye(_CLASSES)[:1], 1.0 - np.eye(_CLASSES)[:1]


def _labels(targets: Targets) -> int:
    """How many rows a head for such a truth has."""
    form = form_of(targets)
    if form == "classification":
        return max(_CLASSES, int(targets.max(initial=0)) + 1)
    return targets.shape[1] if form == "multilabel" else 1


def _check_reference(width: int, form: Form) -> None:
    """On made-up records of this width, patients of several, some of them clipped: each adds what it adds alone, and
    what Opacus says of it."""
    from veil.client.reference import opacus_clipped_sum  # late: torch and Opacus take seconds to load

    random = np.random.default_rng()
    units = _made_up(width, np.arange(_COUNT) // _RECORDS, form)
    weight, centre = random.normal(size=(_labels(units.labels), width + 1)), 0.1 * random.normal(size=width)

    def gradient(some: Units) -> NDArray[np.float64]:
        return clipped_head_sum(weight, some.batch(centre), _BOUND)

    everyone = [units.only(one) for one in np.eye(units.count, dtype=np.bool_)]
    parts = [gradient(one) for one in everyone]
    if not np.array_equal(np.sum(parts, axis=0), gradient(units)):
        raise RunError(
            "a sum of clipped gradients other than that of the same gradients, each found alone",
            "the same to the last bit",
            "do not start; report this defect",
        )
    theirs = [opacus_clipped_sum(weight, one, centre, _BOUND) for one in everyone]
    apart = max(float(np.linalg.norm(our - their)) for our, their in zip(parts, theirs, strict=True))
    if not apart <= _EQUAL * _BOUND:
        raise RunError(
            f"a clipped gradient {apart:g} away from that of Opacus' hooks",
            f"at most {_EQUAL * _BOUND:g}",
            "do not start; report this defect",
        )


def _check_part(name: str, part: NDArray[np.float64]) -> None:
    norm = float(np.linalg.norm(part))
    if norm > _BOUND:
        raise RunError(f"one unit's {name} of {norm:g}", f"at most {_BOUND:g}", "do not start; report this defect")


def _labelled(row: NDArray[np.float64], units: Sequence[Sequence[int]]) -> Units:
    """Units whose records are all the same but for their labels."""
    labels = [label for unit in units for label in unit]
    return Units(
        features=np.tile(row, (len(labels), 1)),
        labels=np.array(labels, dtype=np.int64),
        unit=np.repeat(np.arange(len(units)), [len(unit) for unit in units]),
        count=len(units),
    )


def _made_up(width: int, unit: NDArray[np.int64], form: Form = "classification") -> Units:
    random = np.random.default_rng()
    _, numbered = np.unique(unit, return_inverse=True)
    classes = np.tile(np.arange(_CLASSES), len(unit))[: len(unit)]
    truths: dict[Form, Targets] = {
        "classification": random.permutation(classes),
        "multilabel": random.integers(0, 2, size=(len(unit), _CLASSES)).astype(np.float64),
        "regression": random.random(len(unit)),
    }
    return Units(
        features=random.normal(size=(len(unit), width)),
        labels=truths[form],
        unit=numbered.astype(np.int64),
        count=int(numbered.max()) + 1,
    )
