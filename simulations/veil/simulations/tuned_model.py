# SPDX-License-Identifier: Apache-2.0
"""The one model that is tuned below its head in this process: all simulated sites and the judge use it in turn.

Promises that it was examined before any record is read, and that plans that differ in nothing the model reads share it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

from veil.common.lazy_backbone import LazyBackbone, find_backbone
from veil.common.plan import RunPlan
from veil.common.plan_sections import Backbone, Device
from veil.common.tunable import TunableModel, load_tunable

_mutex = threading.Lock()
_loaded: dict[tuple[object, ...], TunableModel] = {}


def tuned_model(backbone: LazyBackbone, plan: RunPlan) -> TunableModel:
    """A plan's model; the one before is forgotten.

    Raises:
        WeightsError: when the weights are not to be had.
        PlanError: when the mode does not fit them.
        RunError: when the model cannot be trained soundly.
    """
    key = (backbone.pinned, repr(plan.task), plan.transfer, plan.seed, plan.training.rounds)
    with _mutex:
        if key not in _loaded:
            _loaded.clear()
            model = load_tunable(backbone, plan)
            model.examine()
            _loaded[key] = model
        return _loaded[key]


def forget() -> None:
    """Give the memory back."""
    with _mutex:
        _loaded.clear()


def model_of(pinned: Backbone, device: Device) -> Callable[[RunPlan], TunableModel]:
    """What gives a simulated site its model.

    Args:
        pinned: where the backbone is on this machine.
        device: where it computes.
    """

    def model(plan: RunPlan) -> TunableModel:
        return tuned_model(find_backbone(pinned, plan.task, base=Path(), device=device), plan)

    return model
