# SPDX-License-Identifier: Apache-2.0
"""How far a run is, and its checkpoint: everything the next round needs, in one file.

Promises that a checkpoint is replaced whole or not at all, that one with a changed bit is refused, and that a run
resumed from it asks for the very round that the lost process asked for, with the same adapter.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from veil.common.durable import sync_folder
from veil.common.errors import RunError
from veil.common.mismatch import Mismatch
from veil.common.plan import RunPlan
from veil.common.privacy import NoiseShares
from veil.common.schedule import ReleaseKind
from veil.common.trained import is_tuned
from veil.common.update import Adapter
from veil.server.anomaly import AnomalyModel
from veil.server.descent import Descent

ALL_SITES = ""
"""Stands for the whole cohort where single sites are not known; no site has this name."""

_VELOCITY = "velocity."
"""Before the name of a tuned tensor in a checkpoint, for its velocity."""

_ANOMALY = "anomaly."
"""Before the name of a tensor of the distribution of unit rows."""


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
        attempts: cohorts that were asked for a masked sum, the last one complete; 1 for every other release.
    """

    round: int
    kind: ReleaseKind
    sites: tuple[str, ...]
    refusals: dict[str, str]
    bytes_down: int
    bytes_up: int
    seconds: float
    attempts: int = 1

    def shares(self, plan: RunPlan) -> NoiseShares | None:
        """How the sites shared this round's noise; None where each added all of it."""
        if plan.privacy.noise == "local":
            return None
        return NoiseShares(sites=len(self.sites), colluding=plan.cohort.colluding(len(self.sites)))


@dataclass(kw_only=True)
class RunState:
    """A run between two rounds.

    Attributes:
        descent: the model and the public sizes.
        records: the rounds so far.
        heads: site to the hash of the last ledger line seen of it.
        units: site to an upper bound on its number of units, from its own noisy count.
        evaluation: site to what it released of the tuned model on its held-out units, lattice points; of a masked sum,
            the sum under `ALL_SITES`.
        declared: site to its exact number of units, of sites whose policy declares it public.
        mismatch: site to how far its mean feature lies from the others', from the centring round; empty without one,
            of a masked sum, and where an earlier version took that round in.
        cohort: names of the sites that take part; a simulation, where all do, leaves it empty.
        declined: sites that do not, and why.
    """

    descent: Descent
    records: list[RoundRecord] = field(default_factory=list)
    heads: dict[str, str] = field(default_factory=dict)
    units: dict[str, float] = field(default_factory=dict)
    evaluation: dict[str, tuple[int, ...]] = field(default_factory=dict)
    declared: dict[str, int] = field(default_factory=dict)
    mismatch: dict[str, Mismatch] = field(default_factory=dict)
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
            "mismatch": {site: found.to_report() for site, found in self.mismatch.items()},
            "cohort": self.cohort,
            "declined": self.declined,
        }
        text = json.dumps(header)
        descent = self.descent
        tensors = {"weight": descent.weight, "centre": descent.centre, "velocity": descent.velocity}
        tensors |= descent.tuned
        tensors |= {f"{_VELOCITY}{name}": one for name, one in descent.tuned_velocity.items()}
        if descent.anomaly is not None:
            tensors |= {f"{_ANOMALY}{name}": one for name, one in descent.anomaly.tensors.items()}
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
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a mapping
            if sha256 != _digest(text, **tensors):
                raise ValueError("another content than its SHA-256 says")
            header = json.loads(text)
            if header["plan"] != plan.sha256:
                raise ValueError("another plan")
            return cls._from(header, tensors, plan)
        except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise RunError(
                f"checkpoint {path} ({type(error).__name__}: {error})",
                "the checkpoint of this plan",
                "restore it from a backup, or start a new run",
            ) from None

    @classmethod
    def _from(cls, header: dict[str, Any], tensors: Mapping[str, NDArray[np.float64]], plan: RunPlan) -> RunState:
        anomaly = {name.removeprefix(_ANOMALY): np.array(t) for name, t in tensors.items() if name.startswith(_ANOMALY)}
        descent = Descent(
            plan=plan,
            sites=int(header["sites"]),
            weight=np.array(tensors["weight"]),
            centre=np.array(tensors["centre"]),
            velocity=np.array(tensors["velocity"]),
            units=float.fromhex(header["estimated-units"]),
            tuned={name: np.array(one) for name, one in tensors.items() if is_tuned(name)},
            tuned_velocity={
                name.removeprefix(_VELOCITY): np.array(one)
                for name, one in tensors.items()
                if name.startswith(_VELOCITY)
            },
            anomaly=AnomalyModel.from_tensors(anomaly) if anomaly else None,
        )
        return cls(
            descent=descent,
            records=[_record(one) for one in header["records"]],
            heads=dict(header["heads"]),
            units={site: float.fromhex(number) for site, number in header["units"].items()},
            evaluation={site: tuple(map(int, points)) for site, points in header["evaluation"].items()},
            declared=dict(header["declared"]),
            mismatch={site: Mismatch.from_report(one) for site, one in header.get("mismatch", {}).items()},
            cohort=tuple(header["cohort"]),
            declined=dict(header["declined"]),
        )


def _digest(text: str, **tensors: NDArray[np.float64]) -> str:
    """SHA-256 over a checkpoint's header and the bytes of its tensors."""
    return hashlib.sha256(text.encode() + b"".join(tensors[name].tobytes() for name in sorted(tensors))).hexdigest()


def _record(fields: dict[str, object]) -> RoundRecord:
    known = {**fields, "kind": ReleaseKind(str(fields["kind"])), "sites": tuple(fields["sites"])}  # type: ignore[arg-type]  # JSON
    return RoundRecord(**known)  # type: ignore[arg-type]  # as `asdict` wrote it
