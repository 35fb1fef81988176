# SPDX-License-Identifier: Apache-2.0
"""The ONNX graph gives the head's own numbers, in the reference evaluator, for every form of answer and odd rows."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator

from veil.common.errors import InputError
from veil.common.head import CENTRE, WEIGHT, predict, scaled
from veil.common.objective import from_range
from veil.common.plan_sections import Task
from veil.common.update import Adapter
from veil.server.onnx_head import OPSET, OUTPUT, Bounds, onnx_head

LABELS = ("no", "perhaps", "yes")
BOUNDS: tuple[Bounds, ...] = ((-1.0, 1.0), None, (0.0, 5e9), (1e9, 1e9 + 1), (-3.0, 0.0))


def task(form: str = "classification", **more: Any) -> Task:
    return Task(kind=f"tabular-{form}", labels=more.pop("labels", LABELS), **more)  # type: ignore[arg-type]


def adapter(labels: int = 3, width: int = 5) -> Adapter:
    random = np.random.default_rng(4)
    weight, centre = 20 * random.normal(size=(labels, width + 1)), random.normal(size=width) / 5
    return Adapter(tensors={WEIGHT: weight.astype(np.float32), CENTRE: centre.astype(np.float32)})


def rows() -> NDArray[np.float64]:
    """Usual ones, one without length, three that are not finite, one that is huge."""
    found = np.random.default_rng(5).normal(size=(20, 5))
    found[0] = 0
    found[1, 2], found[2, 0], found[3, 1] = np.nan, np.inf, -np.inf
    found[4] *= 1e12
    return found


def run(made: bytes, given: NDArray[Any]) -> NDArray[np.float64]:
    model = onnx.load_from_string(made)
    onnx.checker.check_model(model, full_check=True)
    evaluator: Any = ReferenceEvaluator(model)
    found = np.asarray(evaluator.run([OUTPUT], {"features": given})[0])
    assert found.dtype == np.float64
    return found


def test_features_of_a_backbone() -> None:
    given = rows().astype(np.float32)
    made = onnx_head(adapter(), task(), bounds=None, metadata={})
    assert np.abs(run(made, given) - predict(adapter(), given)).max() < 1e-12


def test_numeric_columns_with_their_bounds() -> None:
    """An infinite value of a bounded column is its bound, and one of another makes the row none."""
    given = rows()
    columns = np.stack([scaled(given[:, place], one) for place, one in enumerate(BOUNDS)], axis=1)
    made = onnx_head(adapter(), task(), bounds=BOUNDS, metadata={})
    assert np.abs(run(made, given) - predict(adapter(), columns)).max() < 1e-12
    assert np.abs(run(made, given) - predict(adapter(), given)).max() > 0.1, "the bounds change something"


def test_several_labels_each_for_itself() -> None:
    made = onnx_head(adapter(), task("multilabel"), bounds=[None] * 5, metadata={})
    found = run(made, rows())
    assert np.abs(found - predict(adapter(), rows(), "multilabel")).max() < 1e-12
    assert np.abs(found.sum(axis=1) - 1).max() > 0.1


def test_a_number_comes_in_its_own_range() -> None:
    asked = task("regression", labels=("age",), target=(18.0, 90.0))
    found = run(onnx_head(adapter(1), asked, bounds=[None] * 5, metadata={}), rows())
    expected = from_range(predict(adapter(1), rows(), "regression"), (18.0, 90.0))
    assert np.abs(found - expected).max() < 1e-11
    assert found.min() >= 18 and found.max() <= 90 and np.ptp(found) > 10


def test_the_file_tells_where_it_comes_from_and_asks_for_no_newer_runtime_than_it_needs() -> None:
    model = onnx.load_from_string(onnx_head(adapter(), task(), bounds=None, metadata={"plan_sha256": "ab"}))
    assert {one.key: one.value for one in model.metadata_props} == {"plan_sha256": "ab"}
    assert [one.version for one in model.opset_import] == [OPSET]
    assert model.ir_version <= 8


def test_without_onnx_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(InputError, match="pip install onnx"):
        onnx_head(adapter(), task(), bounds=None, metadata={})
