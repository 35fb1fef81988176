# SPDX-License-Identifier: Apache-2.0
"""Tests of `veil.client.selftest` for several labels and for numbers: a mistake in one form alone is found."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from veil.client import gradient, selftest
from veil.client.head_batch import HeadBatch
from veil.client.selftest import examine_step
from veil.client.units import Units
from veil.common.errors import RunError
from veil.common.objective import form_of
from veil.common.plan_sections import Form

Sum = NDArray[np.float64]
FORMS: list[Form] = ["multilabel", "regression"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("factor", "said"), [(1e6, "one unit's gradient"), (15 / 16, "Opacus")])
def test_a_mistake_in_one_form_is_found(form: Form, factor: float, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(weight: Sum, batch: HeadBatch, bound: float) -> Sum:
        found = gradient.clipped_head_sum(weight, batch, bound)
        return found * factor if form_of(batch.labels) == form else found

    monkeypatch.setattr(selftest, "clipped_head_sum", broken)
    with pytest.raises(RunError, match=said):
        examine_step()


@pytest.mark.parametrize("count", [0, 30])
@pytest.mark.parametrize("form", FORMS)
def test_a_sound_step_passes_on_records_of_every_form(form: Form, count: int, make_units: Callable[..., Units]) -> None:
    """Chance of a false alarm: 2·10⁻⁹ each."""
    units = make_units(count, most=3)
    random, records = np.random.default_rng(0), len(units.unit)
    labels = random.random(records) if form == "regression" else (random.random((records, 3)) < 0.5).astype(np.float64)
    assert any(f"{count} units" in line for line in examine_step(replace(units, labels=labels)))
