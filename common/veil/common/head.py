# SPDX-License-Identifier: Apache-2.0
"""The linear head on frozen features: its input, its adapter and what it predicts.

Promises that training, evaluation and `veil predict` see a feature in the same form.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from veil.common.objective import OBJECTIVES
from veil.common.plan import RunPlan
from veil.common.plan_sections import Form
from veil.common.update import Adapter

WEIGHT = "head.weight"
CENTRE = "centre"
HEAD_FILE = "head/head.safetensors"
"""Where the adapter is in a tuned model's folder."""

INTERCEPT = 0.25
"""Constant feature appended after centring; appended before, centring would remove it."""


def initial_adapter(plan: RunPlan, width: int) -> Adapter:
    """A zero head [classes, width + 1] around a zero centre [width]: nothing to seed, nothing to leak."""
    shape = (len(plan.task.labels), width + 1)
    return Adapter(tensors={WEIGHT: np.zeros(shape, np.float32), CENTRE: np.zeros(width, np.float32)})


def scaled(numbers: NDArray[np.float64], bounds: tuple[float, float] | None) -> NDArray[np.float64]:
    """A numeric column [n], clamped to its public bounds and mapped to [-1, 1]; as it is where it has none."""
    if bounds is None:
        return numbers
    low, high = bounds
    clamped: NDArray[np.float64] = np.clip(numbers, low, high)
    return (clamped - low) / (high - low) * 2 - 1


def unit_rows(features: NDArray[np.floating]) -> NDArray[np.float64]:
    """Rows scaled to length 1; a zero row stays zero, a row that is not finite becomes zero. [n, d]"""
    rows = np.array(features, dtype=np.float64)
    rows[~np.isfinite(rows).all(axis=1)] = 0.0
    norms = np.sqrt(np.einsum("nd,nd->n", rows, rows))
    rows /= np.where(norms > 0, norms, 1.0)[:, None]
    return rows


def head_inputs(features: NDArray[np.floating], centre: NDArray[np.floating]) -> NDArray[np.float64]:
    """What the head reads: unit row, minus the centre, unit row again, constant appended, unit row again.

    Args:
        features: pooled outputs of the frozen backbone, [n, d].
        centre: released mean of the unit rows, [d].

    Returns:
        [n, d + 1], each row of length at most 1.
    """
    rows = unit_rows(unit_rows(features) - centre.astype(np.float64))
    constant = np.full((len(rows), 1), INTERCEPT)
    inputs: NDArray[np.float64] = np.hstack([rows, constant]) / np.sqrt(1 + INTERCEPT**2)
    return inputs


def scores(weight: NDArray[np.floating], inputs: NDArray[np.float64]) -> NDArray[np.float64]:
    """The head's logits, [n, c], in an array of their own."""
    found: NDArray[np.float64] = inputs @ weight.astype(np.float64, copy=False).T
    return found


def probabilities(weight: NDArray[np.floating], inputs: NDArray[np.float64]) -> NDArray[np.float64]:
    """Softmax of the head's logits, [n, classes]."""
    return OBJECTIVES["classification"].answers(scores(weight, inputs))


def predict(adapter: Adapter, features: NDArray[np.floating], form: Form = "classification") -> NDArray[np.float64]:
    """Answers from pooled features, each from 0 to 1, [n, c]: class probabilities; of several labels, each one's own
    probability; of a number, where it lies in its public range."""
    inputs = head_inputs(features, adapter.tensors[CENTRE])
    return OBJECTIVES[form].answers(scores(adapter.tensors[WEIGHT], inputs))
