# SPDX-License-Identifier: Apache-2.0
"""Mistakes that let one unit count for more than C: what clipping must hold, and what breaks it.

Sums are looked at without noise, through the release that would carry it.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from tests.privacy.scene import (
    BOUND,
    CENTRE,
    LABELS,
    WEIGHT,
    Floats,
    batch,
    chosen,
    drawn,
    evaluated,
    mechanism,
    numbers,
    plan,
    replaced,
    request,
    silent,
    stage,
    units,
)

from veil.client import release
from veil.client import units as units_module
from veil.client.gradient import clipped_head_sum
from veil.client.head_batch import HeadBatch
from veil.client.release import centre_update, evaluation_update, gradient_update
from veil.client.units import Units
from veil.common import head
from veil.common.evaluation import EVALUATION_NORM
from veil.common.noise import privatize, spacing
from veil.common.schedule import CENTRE_NORM, schedule
from veil.common.update import Adapter
from veil.server.descent import Descent

WIDTH = 6
Variant = Callable[[Floats, HeadBatch, float], Floats]


def _weight(scale: float = 2.0) -> Floats:
    weight: Floats = scale * np.random.default_rng(4).normal(size=(len(LABELS), WIDTH + 1))
    return weight


def _gradient(records: Units, weight: Floats | None = None) -> Floats:
    """The released gradient sum, without its noise."""
    at = _weight() if weight is None else weight
    return numbers(gradient_update(at, batch(records), mechanism(), silent()))


def _centre(records: Units) -> Floats:
    return numbers(centre_update(records, mechanism(max_grad_norm=CENTRE_NORM), silent()))


def _moved(first: Floats, second: Floats) -> float:
    return float(np.linalg.norm(first - second))


def _opposed() -> tuple[Units, Floats]:
    """Two records whose gradients pull in opposite directions, one a hundred times harder, and the head for it."""
    weight = np.zeros((len(LABELS), WIDTH + 1))
    weight[0, 0], weight[0, 1] = 2.0, 20.0
    return units(np.eye(2, WIDTH), [0, 1]), weight


def guard_unit_bound() -> None:
    """Leaving any unit out moves the sum by at most C; some unit reaches almost C."""
    found = []
    for records, weight in ((drawn(8, WIDTH), _weight()), _opposed()):
        whole = _gradient(records, weight)
        for gone in range(records.count):
            rest = chosen(records, [one for one in range(records.count) if one != gone])
            found.append(_moved(whole, _gradient(rest, weight)))
    assert 0.9 * BOUND < max(found) <= BOUND, f"one unit moves the sum by {max(found):.3f}; C is {BOUND}"
    everyone, nobody = _evaluation(drawn(1, WIDTH)), _evaluation(drawn(0, WIDTH))
    assert 0 < _moved(everyone, nobody) <= EVALUATION_NORM


def _clipped_by(variant: Variant) -> AbstractContextManager[None]:
    return replaced((release, "clipped_head_sum", variant))


_ours: Variant = clipped_head_sum


def batch_clipped() -> AbstractContextManager[None]:
    """The sum over the batch is clipped instead of each unit's gradient."""

    def variant(weight: Floats, of: HeadBatch, bound: float) -> Floats:
        total = _ours(weight, of, 1e9)
        return total * min(1.0, bound / max(float(np.linalg.norm(total)), 1e-300))

    return _clipped_by(variant)


def unclipped() -> AbstractContextManager[None]:
    """Gradients are summed as they are, as `.grad` of a tensor that the DP optimizer was never given."""
    return _clipped_by(lambda weight, of, bound: _ours(weight, of, 1e9))


def guard_patients() -> None:
    """A patient of five like records counts as one record does, and moves the sum by at most C."""
    row = np.ones(WIDTH)
    one = _gradient(units([row], [1]))
    five = _gradient(units(np.tile(row, (5, 1)), [1] * 5, [0] * 5))
    assert _moved(five, np.zeros_like(five)) <= BOUND, f"a patient of five counts {_moved(five, 0 * five):.2f}"
    assert _moved(one, five) < 0.03 * BOUND


def records_clipped() -> AbstractContextManager[None]:
    """Each record is clipped by itself, and a patient's are added up."""

    def variant(weight: Floats, of: HeadBatch, bound: float) -> Floats:
        return _ours(weight, batch(_as_records(of)), bound)

    return _clipped_by(variant)


def _as_records(of: HeadBatch) -> Units:
    return units(of.inputs[:, :-1], of.labels)


def guard_choice() -> None:
    """Which records of a patient take part is the same whoever else comes before it in the table."""
    names, features = np.repeat([f"patient {number}" for number in range(8)], 5), np.arange(40.0)[:, None]

    def kept(first: int) -> Floats:
        """What is kept of all patients but the first, when the table begins with record `first`."""
        part = units_module.bounded_units(
            features[first:], np.zeros(40 - first, np.int64), names[first:], max_records=2, key=b"site"
        )
        return np.asarray(part.features[part.features[:, 0] >= 5])

    with_first, without = kept(0), kept(5)
    assert np.array_equal(with_first, without), "one patient more changes which records of the others take part"


def chosen_by_row() -> AbstractContextManager[None]:
    """Records are drawn by their row in the table, which depends on who stands above."""

    def variant(rows: NDArray[np.int64], key: bytes, name: str, most: int) -> list[int]:
        def rank(row: int) -> bytes:
            return hmac.new(key, str(row).encode(), hashlib.sha256).digest()

        return sorted((int(row) for row in rows), key=rank)[:most]

    return replaced((units_module, "_drawn", variant))


def guard_alone() -> None:
    """What a unit adds is the same whoever else is there, in a gradient and in a centre."""
    records = drawn(9, WIDTH)
    for released in (_gradient, _centre, _evaluation):
        alone = sum(released(chosen(records, [one])) for one in range(records.count))
        difference = _moved(released(records), np.asarray(alone))
        assert difference < 1e-4, f"together units add {difference:.3g} other than alone"


def class_weighted() -> AbstractContextManager[None]:
    """A class-weighted mean loss: one record's share depends on how many of each class are in the batch."""

    def variant(weight: Floats, of: HeadBatch, bound: float) -> Floats:
        of_class = np.bincount(of.labels, minlength=len(LABELS))
        balance = 1.0 / of_class[of.labels]
        total = np.zeros_like(weight)
        for row in range(len(of.labels)):
            taken: NDArray[np.bool_] = np.arange(of.count) == of.unit[row]
            total += balance[row] / balance.mean() * _ours(weight, of.take(taken), bound)
        return total

    return _clipped_by(variant)


def divided_by_count() -> AbstractContextManager[None]:
    """The mean over the site's own records is released, with the divisor that nobody may know."""
    return _clipped_by(lambda weight, of, bound: _ours(weight, of, bound) * (8 / max(1, of.count)))


def _evaluation(held: Units) -> Floats:
    weight = {WEIGHT: _weight().astype(np.float32), CENTRE: np.zeros(WIDTH, np.float32)}
    paid = mechanism(max_grad_norm=EVALUATION_NORM)
    return numbers(evaluation_update(held, Adapter(tensors=weight), paid, silent()))


def guard_not_finite() -> None:
    """A record of NaN, infinity or 10³⁰ is answered like any other in every round, and moves a sum by at most C."""
    usual, of = drawn(5, WIDTH), evaluated()
    with stage() as scene:
        for number, value in enumerate((np.nan, np.inf, -np.inf, 1e30, 3e38)):
            odd = units(np.vstack([usual.features, np.full((1, WIDTH), value)]), [*usual.labels, 1])
            site = scene.site(replace(odd, held=odd), name=f"site {number}")
            for step in schedule(of):
                reply = site.answer(request(of, step.round, WIDTH))
                assert reply.update is not None, f"a record of {value} is answered with {reply.refusal}"
            assert _moved(_gradient(odd), _gradient(usual)) <= BOUND
            assert _moved(_centre(odd), _centre(usual)) <= CENTRE_NORM
            assert _moved(_evaluation(odd), _evaluation(usual)) <= EVALUATION_NORM


@contextmanager
def not_finite_kept() -> Iterator[None]:
    """Rows are scaled as they are: a NaN record makes the sum NaN."""

    def variant(features: NDArray[np.floating]) -> Floats:
        rows = np.array(features, dtype=np.float64)
        norms = np.linalg.norm(rows, axis=1, keepdims=True)
        return rows / np.where(norms > 0, norms, 1.0)

    with np.errstate(all="ignore"), replaced((units_module, "unit_rows", variant), (head, "unit_rows", variant)):
        yield


def guard_quantised() -> None:
    """Neighbours a hair below the lattice's boundaries, as far apart as clipping allows, stay within C when rounded."""
    size, bounds = 1000, []

    def looking(weight: Floats, of: HeadBatch, bound: float) -> Floats:
        bounds.append(bound)
        return _ours(weight, of, bound)

    width = size // len(LABELS)
    with replaced((release, "clipped_head_sum", looking)):
        gradient_update(np.zeros((len(LABELS), width + 1)), batch(drawn(2, width)), mechanism(), silent())
    (bound,), gamma = bounds, spacing(BOUND)
    for less in range(100):
        each = bound * (1 - less * 1e-8) / np.sqrt(size)
        start = np.full(size, (0.5 - min(each / gamma % 1, 0.5) / 2) * gamma)
        apart = _moved(_rounded(start), _rounded(start + each))
        assert apart <= BOUND, f"rounded neighbours lie {apart / BOUND:.9f} C apart"


def _rounded(total: Floats) -> Floats:
    points = privatize(total, noise_multiplier=1.0, max_grad_norm=BOUND, noise=silent())
    return np.asarray(points * spacing(BOUND), np.float64)


def clipped_to_c() -> AbstractContextManager[None]:
    """Units are clipped to C itself, as if rounding the sum moved nothing."""
    return replaced((release, "clip_bound", lambda norm, size: norm))


def guard_trains() -> None:
    """After a few rounds of signal every number of every trainable tensor moved, none else exists, and records fit."""
    random = np.random.default_rng(7)
    labels = np.arange(60) % len(LABELS)
    places = 3 * np.eye(len(LABELS), WIDTH)
    features = places[labels] + 1 + 0.3 * random.normal(size=(60, WIDTH))
    records, of = units(features, labels), plan({"rounds": 20})
    start = request(of, 0, WIDTH).adapter
    descent = Descent.start(of, start, 1)
    for step in schedule(of):
        asked = request(of, step.round, WIDTH, adapter=descent.adapter)
        descent.apply(step, [release.draw(asked, step, records, silent())])
    after = descent.adapter.tensors
    assert set(after) == set(start.tensors) == {CENTRE, WEIGHT}, f"{sorted(after)} left the coordinator"
    for name, tensor in after.items():
        still = int(np.sum(tensor == start.tensors[name]))
        assert not still, f"{still} of {tensor.size} numbers of {name} never moved"
    right = float(np.mean(head.predict(descent.adapter, features).argmax(axis=1) == labels))
    assert right > 0.9, f"only {right:.0%} of clean records are told apart after training"


def tensor_left_out() -> AbstractContextManager[None]:
    """The intercept is a parameter that no gradient reaches, as an adapter that was never attached."""

    def variant(weight: Floats, of: HeadBatch, bound: float) -> Floats:
        total = _ours(weight, of, bound)
        total[:, -1] = 0.0
        return total

    return _clipped_by(variant)
