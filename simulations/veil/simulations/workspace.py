# SPDX-License-Identifier: Apache-2.0
"""The sites of a simulation: one folder with everybody's features, shares and ledgers.

Promises that a simulated site is the same `Site` that is deployed, and that any process given the folder opens the
same sites: the engine does not matter.
"""

from __future__ import annotations

import json
import math
import os
import threading
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from flwr.app import Context
from numpy.typing import NDArray

from veil.client.examples import Examples
from veil.client.holdout import held_out, identities
from veil.client.ledger import Ledger
from veil.client.lines import LineFile
from veil.client.policy import Limits, SitePolicy
from veil.client.site import Consent, Site
from veil.client.units import Units, bounded_units
from veil.common.delivery import Chunk, Manifest, Progress, Standing
from veil.common.exchange import RoundRequest
from veil.common.group_quality import NO_GROUP, group_numbers
from veil.common.keys import NodeKey
from veil.common.noise import NoiseSource, OSNoise
from veil.common.plan import RunPlan
from veil.common.plan_sections import Backbone, Simulation
from veil.common.statement import key_fingerprint
from veil.simulations.partition import Share
from veil.simulations.unprivate_noise import FixedNoise, NoNoise

if TYPE_CHECKING:
    from veil.client.tuned_units import TunedUnits
    from veil.common.tunable import TunableModel

_PART = "ledger-"
_ARRAYS, _PLAN, _LEDGER, _KEY, _FEATURES = "records.npz", "plan.json", "ledger.sqlite", "sites.key", "features.npy"
_INPUTS = "inputs.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Workspace:
    """A folder of simulated sites; calling it opens the site of a Flower node.

    Attributes:
        folder: where it is.
    """

    folder: Path

    @classmethod
    def create(
        cls,
        folder: Path,
        plan: RunPlan,
        features: NDArray[np.floating],
        examples: Examples,
        shares: tuple[Share, ...],
        backbone: Backbone | None = None,
    ) -> Workspace:
        """Lay the sites down.

        Args:
            folder: a new folder.
            plan: with its simulation section.
            features: pooled backbone features of all records, [n, d]; a memory map is referred to, not copied.
            examples: the pooled records, [n].
            shares: which records each site trains on.
            backbone: where the pretrained model is on this machine, for a plan that tunes more than a head.
        """
        folder.mkdir(parents=True)
        if isinstance(features, np.memmap) and features.filename is not None:
            where = str(features.filename)
        else:
            where = str((folder / _FEATURES).resolve())
            np.save(folder / _FEATURES, features)
        key = bytes(32) if _simulation(plan).noise != "os" else os.urandom(32)
        train = {f"train-{index}": share.train for index, share in enumerate(shares)}
        names = np.array([share.site for share in shares])
        np.savez(
            folder / _ARRAYS,
            labels=examples.labels,
            units=examples.units,
            identities=identities(examples) if plan.evaluation else np.array([], dtype=np.str_),
            groups=_group_numbers(plan, examples),
            sites=names,
            key=np.frombuffer(key, dtype=np.uint8),
            features=np.array(where),
            **train,  # type: ignore[arg-type]  # numpy's stub takes the keyword for allow_pickle
        )
        (folder / _PLAN).write_text(plan.to_json(), encoding="utf-8")
        if plan.transfer.deep and backbone is not None and not isinstance(examples.inputs, np.ndarray):
            paths = isinstance(examples.inputs[0], Path)
            told = {
                "backbone": backbone.model_dump(mode="json", exclude_none=True),
                "paths": paths,
                "truths": examples.truths,
                "inputs": [str(one.absolute()) if isinstance(one, Path) else one for one in examples.inputs],
            }
            (folder / _INPUTS).write_text(json.dumps(told), encoding="utf-8")
        NodeKey.generate().save(folder / _KEY)
        Ledger(folder / _LEDGER, "", _key(folder)).close()
        return cls(folder=folder)

    @property
    def ledger_path(self) -> Path:
        """The SQLite file with all sites' lines."""
        return self.folder / _LEDGER

    def gather(self) -> None:
        """Bring the ledgers that other processes kept into the one file."""
        for part in sorted(self.folder.glob(f"{_PART}*.sqlite")):
            with closing(LineFile(self.ledger_path, durable=False)) as file:
                file.absorb(part)
            part.unlink()

    def copy_ledger_to(self, path: Path) -> None:
        """Write all sites' lines to a new file."""
        with closing(Ledger(self.ledger_path, "", _key(self.folder))) as ledger:
            ledger.copy_to(path)

    def __call__(self, context: Context) -> Site:
        """The site of a Flower node, by its partition number; one thread at a time, so that each is opened once."""
        with _opening:
            return _open(self.folder, int(str(context.node_config["partition-id"])))


def keep_own_ledgers(share: int) -> None:
    """From now on this process writes its sites' lines into a file of its own: none waits for another's lock."""
    _shares[:] = [share]


def close_workspaces() -> None:
    """Forget every opened site of this process, so that its folder can go."""
    for folder in _opened:
        _lines(folder).close()
    _opened.clear()
    for cached in (_open, _peers, _records, _features, _inputs, _plan, _key, _lines):
        cached.cache_clear()


_shares: list[int] = []
_opening = threading.Lock()
_opened: set[Path] = set()


@cache
def _open(folder: Path, index: int) -> Site:
    records, plan = _records(folder), _plan(folder)
    name = str(records["sites"][index])
    rows = records[f"train-{index}"]
    units = _units(folder, plan, rows)
    return Site(
        policy=SitePolicy.model_construct(name=name, limits=_limits(plan), peers=_peers(folder)),
        ledger=Ledger(folder / _LEDGER, name, _key(folder), file=_lines(folder)),
        units=lambda _: units,
        noise=_RoundNoise(kind=_simulation(plan).noise, seed=plan.seed, site=name),
        consent=lambda job, plan: Consent.GIVEN,
        backbones=_NoBackbones(),
        simulated=True,
        model=_model(folder) if plan.transfer.deep else None,
    )


def _units(folder: Path, plan: RunPlan, rows: NDArray[np.int64]) -> Units | TunedUnits:
    records, evaluation = _records(folder), plan.evaluation
    key = records["key"].tobytes()
    bounded = partial(
        bounded_units,
        labels=records["labels"][rows],
        names=records["units"][rows],
        max_records=plan.privacy.max_records_per_patient,
        key=key,
        held=held_out(records["identities"][rows], key, evaluation.holdout) if evaluation else None,
        groups=records["groups"][rows] if plan.groups else None,
    )
    pooled = bounded(_rows_of(_features(folder), rows))
    if not plan.transfer.deep:
        return pooled
    from veil.client.tuned_units import TunedUnits

    places = bounded(rows.astype(np.float64)[:, None])
    inputs, truths = _inputs(folder)
    return TunedUnits(pooled=pooled, rows=places, inputs=inputs, model=_model(folder)(plan), truths=truths)


@lru_cache(maxsize=64)
def _inputs(folder: Path) -> tuple[tuple[Any, ...], tuple[str, ...] | None]:
    """The records, and their truths where these have a structure."""
    told = json.loads((folder / _INPUTS).read_text(encoding="utf-8"))
    truths = told["truths"]
    inputs = tuple(Path(one) if told["paths"] else one for one in told["inputs"])
    return inputs, None if truths is None else tuple(truths)


def _model(folder: Path) -> Callable[[RunPlan], TunableModel]:
    from veil.simulations.tuned_model import model_of

    told = json.loads((folder / _INPUTS).read_text(encoding="utf-8"))
    return model_of(Backbone.model_validate(told["backbone"]), _simulation(_plan(folder)).device)


def _group_numbers(plan: RunPlan, examples: Examples) -> NDArray[np.int64]:
    if examples.groups is None:
        return np.full(len(examples), NO_GROUP)
    return group_numbers(examples.groups, plan.groups)


def _rows_of(features: NDArray[np.floating], rows: NDArray[np.int64]) -> NDArray[np.floating]:
    """Some rows; those that follow one another are not copied."""
    if len(rows) and rows[-1] - rows[0] == len(rows) - 1:
        return features[rows[0] : rows[-1] + 1]
    return features[rows]


@lru_cache(maxsize=64)
def _lines(folder: Path) -> LineFile:
    """The one open file of the ledgers of all sites that this process answers for."""
    _opened.add(folder)
    name = f"{_PART}{_shares[0]}.sqlite" if _shares else _LEDGER
    return LineFile(folder / name, durable=False)


@lru_cache(maxsize=64)
def _features(folder: Path) -> NDArray[np.floating]:
    features: NDArray[np.floating] = np.load(str(_records(folder)["features"]), mmap_mode="r", allow_pickle=False)
    return features


@lru_cache(maxsize=64)
def _records(folder: Path) -> dict[str, NDArray[Any]]:
    with np.load(folder / _ARRAYS, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


@lru_cache(maxsize=64)
def _plan(folder: Path) -> RunPlan:
    return RunPlan.from_json((folder / _PLAN).read_text(encoding="utf-8"))


@lru_cache(maxsize=64)
def _key(folder: Path) -> NodeKey:
    """One key for all simulated sites."""
    return NodeKey.load(folder / _KEY)


def _simulation(plan: RunPlan) -> Simulation:
    if plan.simulation is None:
        raise ValueError("a plan without [simulation]; expected one")
    return plan.simulation


def _limits(plan: RunPlan) -> Limits:
    """What simulated owners allow: exactly the plan; anything where the noise is not private, which costs infinity."""
    epsilon = plan.privacy.target_epsilon if _simulation(plan).noise == "os" else math.inf
    return Limits.model_construct(
        epsilon_per_run=epsilon,
        epsilon_lifetime=epsilon,
        delta=plan.privacy.target_delta,
        unit=plan.privacy.unit,
        max_records_per_patient=plan.privacy.max_records_per_patient,
        min_cohort=2,
        colluding_of_ten=0,
    )


@lru_cache(maxsize=64)
def _peers(folder: Path) -> dict[str, str]:
    """Simulated owners know each other: all by the one key."""
    known = key_fingerprint(_key(folder).public_pem)
    return {str(site): known for site in _records(folder)["sites"]}


class _NoBackbones:
    """The backbones of a simulated site: its features are there already, so it never needs one."""

    def has(self, backbone: Backbone) -> bool:
        return True

    def begin(self, manifest: Manifest, backbone: Backbone) -> Progress:
        return Progress(manifest=manifest.digest, standing=Standing.COMPLETE)

    def write(self, chunk: Chunk) -> Progress:
        return Progress(manifest=chunk.manifest, standing=Standing.COMPLETE)


@dataclass(frozen=True, kw_only=True, slots=True)
class _RoundNoise:
    """A simulated site's noise, as its plan says."""

    kind: str
    seed: int
    site: str

    def __call__(self, request: RoundRequest) -> NoiseSource:
        if self.kind == "os":
            return OSNoise()
        source = FixedNoise if self.kind == "fixed" else NoNoise
        return source(self.seed, self.site, request.round)
