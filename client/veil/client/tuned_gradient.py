# SPDX-License-Identifier: Apache-2.0
"""Clipping for a model that is tuned below its head: the sum over units of each unit's gradient, none too long.

Promises that adding or removing one unit moves the sum by at most the bound: each unit's float32 gradient follows from
its own records alone, and its length and the sum are float64. Equal to Opacus' per-sample hooks (tested).
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from veil.client.tuned_units import TunedUnits
from veil.common.trained import released_size
from veil.common.update import Adapter


def clipped_tuned_sum(
    units: TunedUnits, adapter: Adapter, trained: tuple[str, ...], chosen: NDArray[np.bool_], bound: float
) -> NDArray[np.float64]:
    """Sum over the chosen units of the clipped mean gradient of their records' losses.

    Args:
        units: records and model.
        adapter: where the model stands.
        trained: the tuned tensors that train.
        chosen: which units take part, [count].
        bound: L2 bound of one unit's gradient, over all its tensors together.

    Returns:
        the head's numbers, then those of the tuned tensors in order, [`released_size`].
    """
    total = torch.zeros(released_size(units.model.shapes, trained), dtype=torch.float64)
    with units.model.at(adapter, trained):
        for gradient in units.model.gradients(units.records(chosen), trained):
            if gradient is not None:
                _add_clipped(total, gradient, bound)
    return np.asarray(total.numpy(), dtype=np.float64)


def _add_clipped(total: Tensor, gradient: tuple[Tensor, ...], bound: float) -> None:
    """Add a unit's gradient; one that is not finite counts as zero."""
    norm = math.sqrt(sum(float(torch.linalg.vector_norm(one, dtype=torch.float64)) ** 2 for one in gradient))
    if not math.isfinite(norm):
        return
    factor, start = min(1.0, bound / max(norm, 1e-300)), 0
    for one in gradient:
        total[start : start + one.numel()].add_(one.flatten(), alpha=factor)
        start += one.numel()
