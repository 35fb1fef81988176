# SPDX-License-Identifier: Apache-2.0
"""Tests of `veil.client.personal`: what is fitted, what is chosen, and what the choice may read."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression

from veil.client.head_batch import HeadBatch
from veil.client.personal import BLEND_STRENGTHS, FOLDS, Option, Origin, Selection, fitted, folds, select
from veil.client.units import Units
from veil.common.head import CENTRE, WEIGHT, predict
from veil.common.update import Adapter

WIDTH, CLASSES = 12, 3

Records = Callable[..., Units]


def records(count: int, *, seed: int = 0, each: int = 1, turn: int = 0, sharpness: float = 25.0) -> Units:
    """Units of `each` records that one common rule labels; `turn` renames the classes."""
    random = np.random.default_rng(seed)
    rule = np.random.default_rng(99).normal(size=(WIDTH, CLASSES))
    features = np.repeat(random.normal(size=(count, WIDTH)), each, axis=0) + 0.1 * random.normal(
        size=(count * each, WIDTH)
    )
    logits = sharpness * features @ rule / np.sqrt(WIDTH)
    labels = (logits + random.gumbel(size=logits.shape)).argmax(axis=1)
    return Units(
        features=features, labels=(labels + turn) % CLASSES, unit=np.repeat(np.arange(count), each), count=count
    )


def common_head(units: Units | None = None) -> Adapter:
    """What many other sites would have learned together."""
    batch = HeadBatch.of(units or records(3000, seed=7), np.zeros(WIDTH))
    weight = fitted(batch, np.zeros((CLASSES, WIDTH + 1)), 1.0, np.zeros((CLASSES, WIDTH + 1)))
    return Adapter(tensors={WEIGHT: weight.astype(np.float32), CENTRE: np.zeros(WIDTH, np.float32)})


@pytest.fixture(scope="module")
def federated() -> Adapter:
    return common_head()


def known(option: Option, units: Units) -> float:
    """Accuracy on records."""
    return float((predict(option.adapter, units.features).argmax(axis=1) == units.labels).mean())


def same(one: Selection, other: Selection) -> bool:
    """Whether two selections agree to the last bit."""
    return one.chosen is other.chosen and all(
        np.array_equal(one.options[o].right, other.options[o].right)
        and one.options[o].strength == other.options[o].strength
        and one.options[o].adapter.to_bytes() == other.options[o].adapter.to_bytes()
        for o in Origin
    )


def test_without_a_prior_s_mean_a_head_is_that_of_scikit_learn() -> None:
    units = records(200, sharpness=3.0)
    batch = HeadBatch.of(units, np.zeros(WIDTH))
    zero = np.zeros((CLASSES, WIDTH + 1))
    reference = LogisticRegression(C=1 / 0.3, fit_intercept=False, tol=1e-8, max_iter=5000).fit(
        batch.inputs, units.labels
    )
    assert np.abs(fitted(batch, zero, 0.3, zero) - reference.coef_).max() < 0.02 * np.abs(reference.coef_).max()


def test_a_strong_prior_leaves_the_federated_head_and_a_weak_one_forgets_it(federated: Adapter) -> None:
    batch = HeadBatch.of(records(150, turn=1, sharpness=3.0), np.zeros(WIDTH))
    mean, zero = federated.tensors[WEIGHT].astype(np.float64), np.zeros((CLASSES, WIDTH + 1))
    length = np.linalg.norm(mean)
    assert np.linalg.norm(fitted(batch, mean, 1e7, mean) - mean) < 1e-3 * length
    forgotten, alone = (fitted(batch, start, 1e-2, start) for start in (mean, zero))
    assert np.linalg.norm(forgotten - alone) < 0.1 * np.linalg.norm(forgotten - mean)


def test_records_of_a_unit_count_as_one() -> None:
    once, zero = records(60), np.zeros((CLASSES, WIDTH + 1))
    rows = np.concatenate([np.zeros(9, np.int64), np.arange(60)])
    often = Units(features=once.features[rows], labels=once.labels[rows], unit=once.unit[rows], count=60)
    heads = [fitted(HeadBatch.of(units, np.zeros(WIDTH)), zero, 1.0, zero) for units in (once, often)]
    assert np.abs(heads[0] - heads[1]).max() < 1e-3 * np.abs(heads[0]).max()


def test_a_site_whose_labels_mean_something_else_keeps_its_own(federated: Adapter) -> None:
    selection, fresh = select(federated, records(150, turn=1)), records(400, seed=5, turn=1)
    assert selection.chosen is Origin.LOCAL
    assert known(selection.kept, fresh) > known(selection.options[Origin.FEDERATED], fresh) + 0.3


@pytest.mark.parametrize("count", [20, 80])
def test_a_small_site_like_the_others_keeps_what_all_learned(federated: Adapter, count: int) -> None:
    selection, fresh = select(federated, records(count, seed=3)), records(400, seed=5)
    assert selection.chosen in (Origin.FEDERATED, Origin.BLEND)
    assert known(selection.kept, fresh) > known(selection.options[Origin.LOCAL], fresh)


def test_units_held_out_are_never_looked_at(federated: Adapter) -> None:
    units, held, poison = records(60), records(20, seed=8), records(20, seed=8, turn=1)
    plain, with_held, with_poison = (
        select(
            federated, Units(features=units.features, labels=units.labels, unit=units.unit, count=units.count, held=one)
        )
        for one in (None, held, poison)
    )
    assert same(plain, with_held) and same(plain, with_poison)


@pytest.mark.parametrize(("count", "each"), [(3, 4), (40, 3), (41, 1)])
def test_a_unit_is_in_one_fold_and_every_fold_has_its_part_of_each_class(count: int, each: int) -> None:
    units = records(count, each=each)
    fold = folds(units)
    assert fold.shape == (count,) and set(fold.tolist()) <= set(range(FOLDS))
    sizes = np.bincount(fold, minlength=FOLDS)
    assert sizes.max() - sizes.min() <= 1
    first: NDArray[np.int64] = np.array([units.labels[units.unit == one][0] for one in range(count)])
    if each == 1:
        for label in range(CLASSES):
            of_class = np.bincount(fold[first == label], minlength=FOLDS)
            assert of_class.max() - of_class.min() <= 1


def test_a_record_is_judged_by_heads_that_never_saw_its_unit() -> None:
    """Labels by coin, one for all of a unit's records: only a head that saw some of them knows the others."""
    random = np.random.default_rng(4)
    unit = np.repeat(np.arange(50), 6)
    features = random.normal(size=(50, 60))[unit] + 0.1 * random.normal(size=(300, 60))
    units = Units(features=features, labels=random.integers(0, 2, size=50)[unit], unit=unit, count=50)
    empty = Adapter(tensors={WEIGHT: np.zeros((2, 61), np.float32), CENTRE: np.zeros(60, np.float32)})
    local = select(empty, units).options[Origin.LOCAL]
    batch, zero = HeadBatch.of(units, np.zeros(60)), np.zeros((2, 61))
    seen = (batch.inputs @ fitted(batch, zero, 0.03, zero).T).argmax(axis=1) == units.labels
    assert seen.mean() > 0.95 and local.right.mean() < 0.7


def test_a_site_with_one_class_predicts_it_alone(federated: Adapter) -> None:
    units = records(30)
    units = Units(features=units.features, labels=np.full(30, 2), unit=units.unit, count=30)
    selection = select(federated, units)
    assert selection.options[Origin.LOCAL].right.all()
    assert known(selection.kept, units) == 1.0


@pytest.mark.parametrize("count", [0, 1, 2])
def test_hardly_any_units_are_no_error(federated: Adapter, count: int) -> None:
    selection = select(federated, records(count))
    assert all(np.isfinite(option.adapter.tensors[WEIGHT]).all() for option in selection.options.values())
    if count == 0:
        assert selection.chosen is Origin.FEDERATED


def test_rows_that_are_not_finite_and_a_head_of_zeros_are_no_error() -> None:
    units = records(50)
    units.features[3] = np.nan
    empty = Adapter(tensors={WEIGHT: np.zeros((CLASSES, WIDTH + 1), np.float32), CENTRE: np.zeros(WIDTH, np.float32)})
    selection = select(empty, units)
    assert np.isfinite([option.loss for option in selection.options.values()]).all()
    assert selection.chosen is not Origin.FEDERATED
    assert selection.options[Origin.BLEND].strength in BLEND_STRENGTHS


def test_the_same_units_give_the_same_choice(federated: Adapter) -> None:
    assert same(select(federated, records(40)), select(federated, records(40)))
