# SPDX-License-Identifier: Apache-2.0
"""How far a run is, and its checkpoint: everything the next round needs, in one file.

Promises that a checkpoint is replaced whole or not at all, that one with a changed bit is refused, and that a run
resumed from it asks for the very round that the lost process asked for, with the same adapter.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from veil.common.durable import sync_folder
from veil.common.errors import RunError
from veil.common.plan import RunPlan
from veil.common.schedule import ReleaseKind
from veil.common.update import Adapter
from veil.server.descent import Descent


@dataclass(frozen=True, kw_only=True, slots=True)
class RoundRecord:
    """What happened in one round, for the report.

    Attributes:
        round: 0 for the centring round, then 1, 2, …
        kind: what was released.
        sites: names of the sites whose updates were used.
        refusals: site to reason.
        bytes_down: payload of one request.
        bytes_up: payload of the largest reply.
        seconds: from asking to having aggregated.
    """

    round: int
    kind: ReleaseKind
    sites: tuple[str, ...]
    refusals: dict[str, str]
    bytes_down: int
    bytes_up: int
    seconds: float


@dataclass(kw_only=True)
class RunState:
    """A run between two rounds.

    Attributes:
        descent: the model and the public sizes.
        records: the rounds so far.
        heads: site to the hash of the last ledger line seen of it.
        units: site to an upper bound on its number of units, from its own noisy count.
        evaluation: site to what it released of the tuned model on its held-out units, lattice points.
        declared: site to its exact number of units, of sites whose policy declares it public.
        cohort: names of the sites that take part; a simulation, where all do, leaves it empty.
        declined: sites that do not, and why.
    """

    descent: Descent
    records: list[RoundRecord] = field(default_factory=list)
    heads: dict[str, str] = field(default_factory=dict)
    units: dict[str, float] = field(default_factory=dict)
    evaluation: dict[str, tuple[int, ...]] = field(default_factory=dict)
    declared: dict[str, int] = field(default_factory=dict)
    cohort: tuple[str, ...] = ()
    declined: dict[str, str] = field(default_factory=dict)

    @classmethod
    def start(cls, plan: RunPlan, adapter: Adapter, sites: int) -> RunState:
        """The state before the first round."""
        return cls(descent=Descent.start(plan, adapter, sites))

    def save(self, path: Path) -> None:
        """Write the checkpoint, durably."""
        header = {
            "plan": self.descent.plan.sha256,
            "sites": self.descent.sites,
            "estimated-units": self.descent.units.hex(),
            "records": [asdict(record) for record in self.records],
            "heads": self.heads,
            "units": {site: units.hex() for site, units in self.units.items()},
            "evaluation": self.evaluation,
            "declared": self.declared,
            "cohort": self.cohort,
            "declined": self.declined,
        }
        text = json.dumps(header)
        tensors = {"weight": self.descent.weight, "centre": self.descent.centre}
        metadata = {"veil": text, "sha256": _digest(text, **tensors)}
        partial = path.with_name(f".{path.name}.partial")
        with partial.open("wb") as file:
            file.write(save(tensors, metadata=metadata))
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        sync_folder(path.parent)

    @classmethod
    def load(cls, path: Path, plan: RunPlan) -> RunState:
        """Read a checkpoint.

        Raises:
            RunError: when it is damaged or belongs to another plan.
        """
        try:
            with safe_open(path, framework="numpy") as file:
                text, sha256 = file.metadata()["veil"], file.metadata()["sha256"]
                weight, centre = file.get_tensor("weight"), file.get_tensor("centre")
            if sha256 != _digest(text, weight, centre):
                raise ValueError("another content than its SHA-256 says")
            header = json.loads(text)
            if header["plan"] != plan.sha256:
                raise ValueError("another plan")
            return cls._from(header, weight, centre, plan)
        except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise RunError(
                f"checkpoint {path} ({type(error).__name__}: {error})",
                "the checkpoint of this plan",
                "restore it from a backup, or start a new run",
            ) from None

    @classmethod
    def _from(
        cls, header: dict[str, Any], weight: NDArray[np.float64], centre: NDArray[np.float64], plan: RunPlan
    ) -> RunState:
        descent = Descent(
            plan=plan,
            sites=int(header["sites"]),
            weight=np.array(weight),
            centre=np.array(centre),
            units=float.fromhex(header["estimated-units"]),
        )
        return cls(
            descent=descent,
            records=[_record(one) for one in header["records"]],
            heads=dict(header["heads"]),
            units={site: float.fromhex(number) for site, number in header["units"].items()},
            evaluation={site: tuple(map(int, points)) for site, points in header["evaluation"].items()},
            declared=dict(header["declared"]),
            cohort=tuple(header["cohort"]),
            declined=dict(header["declined"]),
        )


def _digest(text: str, weight: NDArray[np.float64], centre: NDArray[np.float64]) -> str:
    """SHA-256 over a checkpoint's header and the bytes of its tensors."""
    return hashlib.sha256(text.encode() + weight.tobytes() + centre.tobytes()).hexdigest()


def _record(fields: dict[str, object]) -> RoundRecord:
    known = {**fields, "kind": ReleaseKind(str(fields["kind"])), "sites": tuple(fields["sites"])}  # type: ignore[arg-type]  # JSON
    return RoundRecord(**known)  # type: ignore[arg-type]  # as `asdict` wrote it
