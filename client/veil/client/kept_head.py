# SPDX-License-Identifier: Apache-2.0
"""`veil site compare`: a run's final head beside the site's own, on the site's records, and the one that it keeps.

Promises that figures and heads stay in the site's state folder, readable by its owner alone, and that nothing is spent:
ε = 0, because nothing is released.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from veil.client.approvals import Asked
from veil.client.comparison import Estimate, accuracy, gain
from veil.client.deployed import backbone_store
from veil.client.personal import EPSILON, Origin, Selection, select
from veil.client.records import SiteRecords
from veil.client.site_file import SiteFile
from veil.client.units import Units
from veil.common.durable import sync_folder, write_new
from veil.common.errors import InputError
from veil.common.head import CENTRE, HEAD_FILE, WEIGHT, predict
from veil.common.plan import RunPlan
from veil.common.privacy import PrivacyUnit
from veil.common.update import Adapter

_NAMES = {
    Origin.FEDERATED: "the run's model",
    Origin.BLEND: "the run's model, corrected here",
    Origin.LOCAL: "a model of this site alone",
}


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Compared:
    """What `veil site compare` found.

    Attributes:
        job: the run.
        plan_sha256: of its plan.
        selection: the heads, and the one that is kept.
        units: of the site's training records (patients where it names them).
        cross_validated: accuracies on those, by which it was chosen.
        held_out: accuracies on units that never trained; None where the plan holds none out.
        gain: by how much the chosen head is better than one of the site alone, cross-validated.
    """

    job: str
    plan_sha256: str
    selection: Selection
    units: int
    cross_validated: Mapping[Origin, Estimate]
    held_out: Mapping[Origin, Estimate] | None
    gain: Estimate

    def document(self) -> dict[str, Any]:
        """As JSON takes it."""
        return {
            "job": self.job,
            "plan_sha256": self.plan_sha256,
            "chosen": self.selection.chosen.value,
            "strength": self.selection.kept.strength,
            "epsilon": EPSILON,
            "units": self.units,
            "cross_validated": _plain(self.cross_validated),
            "held_out": None if self.held_out is None else _plain(self.held_out),
            "gain": {**asdict(self.gain), "low": self.gain.low, "high": self.gain.high},
        }

    def lines(self) -> Iterator[str]:
        """As a person reads it."""
        yield f"{self.job}, cross-validated on {self.units} units of this site (± 1.96 standard errors):"
        for origin, found in self.cross_validated.items():
            beside = "" if self.held_out is None else f"; on held-out units {_percent(self.held_out[origin])}"
            yield f"  {_NAMES[origin]:<34} accuracy {_percent(found)}{beside}"
        chosen = self.selection.chosen
        strength = self.selection.kept.strength
        precision = "" if strength is None else f" (λ = {strength:g})"
        if chosen is Origin.LOCAL:
            yield f"kept here: {_NAMES[chosen]}{precision}; no other is better by more than its error"
        else:
            yield f"kept here: {_NAMES[chosen]}{precision}; against this site alone {_points(self.gain)}"
        yield "nothing of this left the site: ε = 0"


def compare_heads(file: SiteFile, asked: Asked, model: Path) -> Compared:
    """Compare a run's final head with the site's own.

    Args:
        file: the operator's file.
        asked: the run, as it came before the operator.
        model: the folder `model` of the run's result, or the file of its head.

    Raises:
        VeilError: when records, weights or model do not fit the run's plan.
    """
    plan = asked.plan
    if plan.task.form != "classification" or plan.transfer.deep:
        raise InputError(
            f'task.kind = "{plan.task.kind}", transfer.mode = "{plan.transfer.mode}"',
            "a run with classes and nothing but a head, of which two can be compared",
            "keep the run's model",
        )
    units = SiteRecords(file, backbone_store(file).find_backbone)(_by_patient(plan, file))
    if not isinstance(units, Units):
        raise TypeError("units of a model that is tuned below its head; expected those of a head")
    selection = select(read_head(model, plan, units.features.shape[1]), units)
    options = selection.options
    return Compared(
        job=asked.job,
        plan_sha256=asked.plan_sha256,
        selection=selection,
        units=units.count,
        cross_validated={origin: accuracy(option.right, units.unit) for origin, option in options.items()},
        held_out=None if units.held is None or not units.held.count else _judged(selection, units.held),
        gain=gain(selection.kept.right, options[Origin.LOCAL].right, units.unit),
    )


def read_head(model: Path, plan: RunPlan, width: int) -> Adapter:
    """The head of a model's folder, or of its own file.

    Args:
        model: the folder, or the file.
        plan: what it was trained by.
        width: number of the site's features.

    Raises:
        InputError: when it is none, or not one for this plan and these features.
    """
    path = model / HEAD_FILE if model.is_dir() else model
    try:
        adapter = Adapter.from_bytes(path.read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path} ({type(error).__name__})",
            f"a model's folder with {HEAD_FILE}, or that file",
            "ask the coordinator for the folder `model` of the run's result",
        ) from None
    expected = {WEIGHT: (len(plan.task.labels), width + 1), CENTRE: (width,)}
    found = {name: tensor.shape for name, tensor in adapter.tensors.items()}
    if found != expected or not all(np.isfinite(tensor).all() for tensor in adapter.tensors.values()):
        raise InputError(
            f"{path} with {found}", f"finite numbers in {expected}", "give the model of this run, or name its run"
        )
    return adapter


def keep_head(file: SiteFile, compared: Compared) -> Path:
    """Store the chosen head, and what was compared beside it, in the place of an earlier choice for the same run.

    Returns:
        the head's file; it can stand in a model's folder in the place of the run's own.
    """
    folder = file.agent.state / "heads"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    head = folder / f"{hashlib.sha256(compared.job.encode()).hexdigest()}.safetensors"
    document = json.dumps(compared.document(), indent=2) + "\n"
    _replace(head.with_suffix(".json"), document.encode())
    _replace(head, compared.selection.kept.adapter.to_bytes())
    return head


def _replace(path: Path, content: bytes) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.unlink(missing_ok=True)
    write_new(partial, content)
    partial.replace(path)
    sync_folder(path.parent)


def _by_patient(plan: RunPlan, file: SiteFile) -> RunPlan:
    """Patients stay whole in the comparison wherever the site names them, whatever unit the run protects."""
    if file.data.patient is None:
        return plan
    return plan.model_copy(update={"privacy": plan.privacy.model_copy(update={"unit": PrivacyUnit.PATIENT})})


def _judged(selection: Selection, held: Units) -> dict[Origin, Estimate]:
    return {
        origin: accuracy(predict(option.adapter, held.features).argmax(axis=1) == held.labels, held.unit)
        for origin, option in selection.options.items()
    }


def _plain(found: Mapping[Origin, Estimate]) -> dict[str, dict[str, float]]:
    return {origin.value: asdict(one) for origin, one in found.items()}


def _percent(found: Estimate) -> str:
    return f"{100 * found.value:.1f} ± {100 * (found.high - found.value):.1f} %"


def _points(found: Estimate) -> str:
    return f"{100 * found.value:+.1f} ± {100 * (found.high - found.value):.1f} points"
