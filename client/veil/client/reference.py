# SPDX-License-Identifier: Apache-2.0
"""Opacus' per-sample gradients of a linear head, the reference that the closed form is held against.

Promises that nothing of the closed form enters but the inputs on their grid: the module, its hooks and its clipping are
torch's and Opacus', in float64.
"""

from __future__ import annotations

import warnings

import numpy as np
import torch
from numpy.typing import NDArray
from opacus import GradSampleModule
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from veil.client.exact_products import input_step, on_grid
from veil.client.units import Units
from veil.common.head import head_inputs
from veil.common.objective import Targets, form_of


def opacus_clipped_sum(
    weight: NDArray[np.float64], units: Units, centre: NDArray[np.floating], bound: float
) -> NDArray[np.float64]:
    """Sum over units of the clipped mean of their records' gradients, each materialised by Opacus' hooks.

    Args:
        weight: [labels, d + 1].
        units: the records; takes labels · (d + 1) numbers of memory for each.
        centre: [d].
        bound: L2 bound of one unit's gradient.

    Returns:
        [labels, d + 1], float64.
    """
    head = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False).double()
    with torch.no_grad():
        head.weight.copy_(torch.from_numpy(weight))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Opacus' own, about torch's hooks
        hooked = GradSampleModule(head, loss_reduction="sum")
        inputs = on_grid(head_inputs(units.features, centre), input_step(weight.shape[1]))
        outputs = hooked(torch.from_numpy(inputs.astype(np.float64)))
        _loss(outputs, units.labels).backward()
    records = hooked._module.weight.grad_sample.detach()
    means = torch.zeros(units.count, *weight.shape, dtype=torch.float64)
    means.index_add_(0, torch.from_numpy(units.unit), records)
    means /= torch.from_numpy(np.maximum(units.sizes, 1))[:, None, None]
    factors = (bound / means.flatten(1).norm(dim=1).clamp(min=1e-300)).clamp(max=1.0)
    total: NDArray[np.float64] = (factors[:, None, None] * means).sum(0).numpy()
    return total


def _loss(outputs: torch.Tensor, targets: Targets) -> torch.Tensor:
    """Summed over records and labels."""
    truth = torch.from_numpy(targets)
    if form_of(targets) == "classification":
        return cross_entropy(outputs, truth, reduction="sum")
    return binary_cross_entropy_with_logits(outputs, truth.reshape(outputs.shape), reduction="sum")
