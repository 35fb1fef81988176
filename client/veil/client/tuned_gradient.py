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
    units: TunedUnits,
    adapter: Adapter,
    trained: tuple[str, ...],
    chosen: NDArray[np.bool_],
    bound: float,
    scale: float = 1.0,
) -> NDArray[np.float64]:
    """Sum over the chosen units of the clipped mean gradient of their records' losses.

    Args:
        units: records and model.
        adapter: where the model stands.
        trained: the tuned tensors that train.
        chosen: which units take part, [count].
        bound: L2 bound of one unit's gradient, over all its tensors together.
        scale: by which what is below the head is multiplied before it is clipped: see `trained.gradient_scale`.

    Returns:
        the head's numbers, then those of the tuned tensors in order, [`released_size`].
    """
    total = torch.zeros(released_size(units.model.shapes, trained), dtype=torch.float64)
    with units.model.at(adapter, trained):
        for gradient in units.model.gradients(units.records(chosen), trained):
            if gradient is not None:
                _add_clipped(total, gradient, bound, scale)
    return np.asarray(total.numpy(), dtype=np.float64)


def _add_clipped(total: Tensor, gradient: tuple[Tensor, ...], bound: float, scale: float) -> None:
    """Add a unit's gradient, the head's tensor first; one that is not finite counts as zero."""
    scales = [1.0, *[scale] * (len(gradient) - 1)]
    lengths = (part * _length(one) for part, one in zip(scales, gradient, strict=True))
    norm = math.hypot(*lengths)
    if not math.isfinite(norm):
        return
    factor, start = min(1.0, bound / max(norm, 1e-300)), 0
    for part, one in zip(scales, gradient, strict=True):
        total[start : start + one.numel()].add_(one.flatten(), alpha=factor * part)
        start += one.numel()


def _length(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64))
