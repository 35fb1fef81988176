# SPDX-License-Identifier: Apache-2.0
"""A deployed site's records, from the table its site.toml names to the units that a plan trains on.

Promises that a plan whose task or labels do not fit the site's columns is refused before anything is computed, and
that a persistent agent reads the table once per plan and loads a backbone at most once.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
from numpy.typing import NDArray

from veil.client.examples import Examples, label_numbers, named_columns, read_examples, read_table
from veil.client.features import Encoder, cached_features
from veil.client.holdout import held_out, identities
from veil.client.site_file import Data, SiteFile
from veil.client.template import MISSING_WORDS, canonical
from veil.client.units import Units, bounded_units
from veil.common.durable import sync_folder, write_new
from veil.common.errors import InputError, RefusalCode, RefusalError, TableError
from veil.common.group_quality import group_numbers
from veil.common.objective import Targets
from veil.common.plan import RunPlan
from veil.common.plan_sections import STRUCTURED, Backbone, Task

if TYPE_CHECKING:
    import pandas as pd

    from veil.client.tuned_units import TunedUnits
    from veil.common.lazy_backbone import LazyBackbone
    from veil.common.tunable import TunableModel

_KEY_BYTES = 32
_PLANS_KEPT = 4
_CELLS_SHOWN = 3
_TOLD_EVERY_S = 10.0

_log = logging.getLogger(__name__)


FindBackbone = Callable[[Backbone, Task], Encoder]
"""Finds the pinned weights for a task, or raises `WeightsError`; see `BackboneStore.find_backbone`."""


class SiteRecords:
    """The records as plans need them; calling it with a plan gives its units. Kept in memory for the last few plans.

    Args:
        site: the operator's file.
        find_backbone: finds the pinned weights.
    """

    def __init__(self, site: SiteFile, find_backbone: FindBackbone) -> None:
        self._site, self._find_backbone = site, find_backbone
        self._loaded: tuple[tuple[object, ...], Encoder] | None = None
        self._lock = threading.Lock()
        self._prepared = lru_cache(maxsize=_PLANS_KEPT)(self._prepare)
        self._tunable = lru_cache(maxsize=1)(self._tune)

    def model(self, plan: RunPlan) -> TunableModel:
        """The model of a plan that tunes more than a head, loaded and examined; no record is read.

        Raises:
            RefusalError: with the code `policy`, when a round would take more memory than `agent.max_memory_gb`.
            WeightsError: when the backbone is not to be had.
            PlanError: when the mode does not fit it.
            RunError: when it cannot be trained soundly on this machine.
        """
        with self._lock:
            return self._tunable(plan.public().to_json())

    def __call__(self, plan: RunPlan) -> Units | TunedUnits:
        """The units of a plan.

        Raises:
            TableError: when the table cannot be read, or its columns or labels are not the plan's.
            WeightsError: when the backbone is not to be had.
        """
        with self._lock:
            return self._prepared(plan.public().to_json())

    def _prepare(self, plan_json: str) -> Units | TunedUnits:
        plan = RunPlan.from_json(plan_json)
        check_columns(self._site.data, plan.task)
        examples = read_examples(self._site.source, self._site.data, plan.task, unit=plan.privacy.unit)
        key, evaluation = _secret_key(self._site.agent.state / "units.key"), plan.evaluation
        bounded = partial(
            bounded_units,
            labels=examples.labels,
            names=examples.units,
            max_records=plan.privacy.max_records_per_patient,
            key=key,
            held=held_out(identities(examples), key, evaluation.holdout) if evaluation else None,
            groups=None if examples.groups is None else group_numbers(examples.groups, plan.groups),
        )
        if not plan.transfer.deep:
            return bounded(np.asarray(self._features(plan, examples)))
        from veil.client.tuned_units import tuned_units

        return tuned_units(bounded, lambda: self._features(plan, examples), examples, self._tunable(plan_json), plan)

    def _tune(self, plan_json: str) -> TunableModel:
        from veil.common.tunable import load_tunable

        plan = RunPlan.from_json(plan_json)
        if plan.backbone is None:
            raise ValueError("a tuned model without a backbone; expected a plan with one")
        model = load_tunable(cast("LazyBackbone", self._encoder(plan.backbone, plan.task)), plan)
        self._fit(model, plan)
        model.examine()
        return model

    def _fit(self, model: TunableModel, plan: RunPlan) -> None:
        """Keep to the operator's limit of memory; how many records there are has no part in it."""
        from veil.common.memory import fitted

        if self._site.agent.max_memory_gb is not None:
            model.remember(fitted(plan, model.footprint(), int(self._site.agent.max_memory_gb * 1e9)))

    def _features(self, plan: RunPlan, examples: Examples) -> NDArray[np.floating]:
        if plan.backbone is None or isinstance(examples.inputs, np.ndarray):
            return np.asarray(examples.inputs, dtype=np.float64)
        agent = self._site.agent
        return cached_features(
            self._encoder(plan.backbone, plan.task),
            examples.inputs,
            agent.cache,
            precision=agent.cache_precision,
            max_bytes=agent.cache_max_gb * 1e9,
            advance=LoggedProgress(len(examples)).advance,
            unreadable=_note_unreadable,
        )

    def _encoder(self, backbone: Backbone, task: Task) -> Encoder:
        """The last one stays in memory; it also depends on how the task reads a record."""
        read = (task.kind, task.max_length, task.image_size, task.max_seconds)
        wanted = (backbone.sha256, backbone.files_sha256, *read)
        if self._loaded is None or self._loaded[0] != wanted:
            self._loaded = None
            self._loaded = wanted, self._find_backbone(backbone, task)
        return self._loaded[1]


class LoggedProgress:
    """How far the features are, in the site's own log and nowhere else.

    Args:
        total: number of records.
        clock: seconds since some moment.
    """

    def __init__(self, total: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._total, self._clock = total, clock
        self._done = 0
        self._told: tuple[float, int] | None = None

    def advance(self, done: int) -> None:
        """Note that more records are done; the first call is of those that were kept.

        Args:
            done: number of records done since the last call.
        """
        self._done += done
        now = self._clock()
        if self._told is None:
            _log.info("features of %d of %d records are kept", self._done, self._total)
            self._told = now, self._done
        elif (seconds := now - self._told[0]) >= _TOLD_EVERY_S:
            rate = (self._done - self._told[1]) / seconds
            _log.info("features of %d of %d records, %.1f a second", self._done, self._total, rate)
            self._told = now, self._done


def _note_unreadable(place: int, error: TableError) -> None:
    """A record that cannot be read counts as zero: an error would tell the coordinator of it."""
    _log.warning("record %d counts as zero: %s", place + 1, error)


def check_columns(data: Data, task: Task) -> None:
    """Refuse a task that the site's columns cannot serve; looks at site.toml only, never at a record.

    Raises:
        RefusalError: with the code `data`.
    """
    if task.kind != f"{data.modality}-{data.form}":
        raise RefusalError(
            RefusalCode.DATA,
            f'task.kind = "{task.kind}" for {data.modality} columns and form = "{data.form}"',
            f"{data.modality}-{data.form}",
            "name the columns that such a plan needs in [data], or refuse the run",
        )
    if data.features is not None and task.width not in (None, len(data.features)):
        raise RefusalError(
            RefusalCode.DATA,
            f"{len(data.features)} data.features for task.width = {task.width}",
            "as many numeric columns as every site of the run has",
            "name the columns that the plan means in [data], or refuse the run",
        )
    if foreign := sorted(set(data.labels.values()) - set(task.labels)):
        raise RefusalError(
            RefusalCode.DATA,
            f"[data.labels] names {', '.join(foreign)}",
            f"of the plan's labels {', '.join(task.labels)}",
            "correct [data.labels], or refuse the run",
        )


def _secret_key(path: Path) -> bytes:
    """The key that chooses which records of a patient take part, and which units train; made once, durable before it
    is used."""
    with suppress(FileNotFoundError):
        return _checked(path, path.read_bytes())
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    write_new(partial, secrets.token_bytes(_KEY_BYTES))
    with suppress(FileExistsError):  # another process was first: its key is the key
        path.hardlink_to(partial)
    partial.unlink()
    sync_folder(path.parent)
    return _checked(path, path.read_bytes())


def _checked(path: Path, key: bytes) -> bytes:
    if len(key) != _KEY_BYTES:
        raise InputError(f"{path} holds {len(key)} bytes", f"{_KEY_BYTES} secret bytes", "restore it from backup")
    return key


@dataclass(frozen=True, kw_only=True, slots=True)
class Overview:
    """What the operator sees of the table before any run; it stays on the screen.

    Attributes:
        records: number of records.
        units: number of units, as limits.unit counts them.
        labels: records of each class, in a plan's words; a record can have several labels, or a number and none.
        numbers: the smallest and the largest one, of a regression.
        missing: cells without a value, by column.
        first: the first cells as text, by column.
    """

    records: int
    units: int
    labels: Mapping[str, int]
    missing: Mapping[str, int]
    first: Mapping[str, tuple[str, ...]]
    numbers: tuple[float, float] | None = None


def look(site: SiteFile) -> Overview:
    """Read the table as a run would, with the classes that the site itself names.

    Raises:
        TableError: for whatever a run would stumble over.
    """
    data = site.data
    frame = read_table(site.source, named_columns(data))
    classes = tuple(dict.fromkeys(data.labels.values()))
    numbers = label_numbers(frame, data.label) if data.form == "regression" else None
    task = Task.model_construct(
        kind=f"{data.modality}-{data.form}", labels=classes, bounds={}, target=None if numbers is None else (0.0, 1.0)
    )
    examples = read_examples(site.source, data, task, unit=site.limits.unit)
    return Overview(
        records=len(examples),
        units=len(np.unique(examples.units)),
        labels={}
        if data.form in STRUCTURED
        else dict(zip(classes, _counts(examples.labels, len(classes)), strict=True)),
        missing={str(name): _missing(frame[name], data) for name in frame.columns},
        first={str(name): tuple(map(str, frame[name].head(_CELLS_SHOWN))) for name in frame.columns},
        numbers=None if numbers is None else (float(numbers.min()), float(numbers.max())),
    )


def _counts(targets: Targets, labels: int) -> list[int]:
    """Records of each label."""
    if targets.ndim == 2:
        return [int(count) for count in targets.sum(axis=0)]
    return [int((targets == index).sum()) for index in range(labels)]


def _missing(cells: pd.Series, data: Data) -> int:
    """Cells that say nothing; a declared label such as "NA" says something."""
    column = str(cells.name)
    words = MISSING_WORDS | {canonical(value) for value in data.missing_values.get(column, ())}
    if column == data.label:
        words -= {canonical(raw) for raw in data.labels}
    return sum(canonical(cell) in words for cell in cells.tolist())
