# SPDX-License-Identifier: Apache-2.0
"""`veil backbones`: pinned backbones side by side on public records, before a plan settles on one.

Promises that no record is read whose table is not declared public, nor before every candidate is found, has its pinned
hashes and takes the plan's kind of input; and that records which the plan's simulation tests on take no part.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from veil.client.examples import Examples, read_examples
from veil.common.errors import PlanError, RefusalCode, RefusalError, WeightsError
from veil.common.head import head_inputs, unit_rows
from veil.common.lazy_backbone import find_backbone
from veil.common.objective import classes_of
from veil.common.pickled import kind_of
from veil.common.plan import RunPlan, plan_error, read_toml
from veil.common.plan_sections import Backbone, Section, Simulation
from veil.common.transferability import Probe, linear_probe, logme, spread
from veil.common.weights import COMPANIONS, PinnedWeights, locate
from veil.simulations.evaluation import PENALTY
from veil.simulations.folders import table_path
from veil.simulations.partition import partition

_CONFIGURATIONS: Final = {"config.json", "preprocessor_config.json"}

Stage = Callable[[str, int], Callable[[int], None]]


class _CandidateFile(Section):
    """What is read of a candidate's file."""

    backbone: Backbone


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """A backbone that might be chosen.

    Attributes:
        backbone: source, hashes and licence.
        base: folder that a relative `path:` source starts from.
        found: its files, which are the pinned ones.
    """

    backbone: Backbone
    base: Path
    found: PinnedWeights

    @property
    def bytes_on_disk(self) -> int:
        """Of the weights and all that is read beside them."""
        beside = [self.found.folder / name for name in COMPANIONS]
        return sum(file.stat().st_size for file in (self.found.weights_file, *beside) if file.is_file())


@dataclass(frozen=True, kw_only=True, slots=True)
class Figures:
    """What a backbone's features are worth on some labelled records.

    Attributes:
        logme: of what the head would read, nats per record.
        probe: of the unit-length features, which the non-private baseline reads.
        spread: how far the unit-length features lie from their mean, 0 to 1.
    """

    logme: float
    probe: Probe
    spread: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Assessment:
    """What was measured of a candidate.

    Attributes:
        candidate: of which.
        figures: what its features are worth.
        width: features per record.
        seconds_per_record: to compute its features, on this machine, the model loaded.
    """

    candidate: Candidate
    figures: Figures
    width: int
    seconds_per_record: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """Candidates measured on the same records.

    Attributes:
        plan: whose task and table.
        records: how many records.
        assessments: highest LogME first.
    """

    plan: RunPlan
    records: int
    assessments: tuple[Assessment, ...]

    @property
    def most_accurate(self) -> Assessment:
        """The one with the highest accuracy of the probe."""
        return max(self.assessments, key=lambda one: one.figures.probe.accuracy)


def compare(
    plan: RunPlan, candidates: Sequence[Path], *, base: Path, public: bool, records: int, stage: Stage
) -> Comparison:
    """Measure a plan's own backbone and the candidates on records of its [simulation] table.

    Args:
        plan: task, table, seed.
        candidates: TOML files with a [backbone] table: what `veil backbone` prints, or other plans.
        base: the folder that relative paths of the plan start from.
        public: whether the person at the keyboard declares the table public.
        records: how many to draw, at most, by the plan's seed.
        stage: opens a progress bar of a name and a length.

    Raises:
        RefusalError: the table is not declared public.
        PlanError: no table, no backbone, or a file that pins none.
        WeightsError: a candidate is missing, not the pinned one, or takes another kind of input.
        VeilError: the records cannot be read, divided or judged.
    """
    simulation, own = _checked(plan, public)
    pinned = [(own, base), *map(read_candidate, candidates)]
    distinct: dict[tuple[str, str], Candidate] = {}
    for one in (Candidate(backbone=told, base=where, found=locate(told, base=where)) for told, where in pinned):
        _check_input(one, plan.task.kind.removesuffix("-classification"))
        distinct.setdefault((one.found.sha256, one.found.files_sha256), one)
    drawn = _public_records(plan, simulation, base, records)
    measured = [_assess(one, plan, simulation, drawn, stage) for one in distinct.values()]
    ranked = sorted(measured, key=lambda one: -one.figures.logme)
    return Comparison(plan=plan, records=len(drawn), assessments=tuple(ranked))


def read_candidate(file: Path) -> tuple[Backbone, Path]:
    """The [backbone] of a TOML file, and the folder that its relative path starts from.

    Raises:
        PlanError: the file cannot be read or pins no backbone.
    """
    try:
        pinned = _CandidateFile.model_validate({"backbone": read_toml(file).get("backbone", {})})
    except ValidationError as error:
        raise plan_error(str(file), error) from None
    return pinned.backbone, file.resolve().parent


def _checked(plan: RunPlan, public: bool) -> tuple[Simulation, Backbone]:
    if not public:
        raise RefusalError(
            RefusalCode.POLICY,
            f"the table of plan {plan.name} is not declared public, and a score or an accuracy computed from private "
            "records is a release of them that no ledger would account for",
            "a table of public records",
            "add --public if everybody may know these records, or take another table",
        )
    if plan.task.form != "classification":
        raise PlanError(
            f'task.kind = "{plan.task.kind}"', "classes, by which features are judged", "simulate each backbone instead"
        )
    if plan.simulation is None:
        raise PlanError(f"plan {plan.name} has no [simulation]", "a table of public records", "add [simulation]")
    if plan.backbone is None:
        raise PlanError(
            f"plan {plan.name} has numeric features and no [backbone]",
            "text, images or sounds, which a backbone turns into features",
            "there is nothing to choose for this plan",
        )
    return plan.simulation, plan.backbone


def _check_input(candidate: Candidate, wanted: str) -> None:
    """Tell a text model by the tokenizer beside its weights, one of images or sounds by its preprocessor."""
    found = candidate.found
    beside = {name for name in COMPANIONS if (found.folder / name).is_file()}
    fits = bool(beside - _CONFIGURATIONS) if wanted == "text" else "preprocessor_config.json" in beside
    pickled = kind_of(found.weights_file)
    if fits if pickled is None else pickled.modality == wanted:
        return
    lacking = "tokenizer" if wanted == "text" else "preprocessor_config.json"
    raise WeightsError(
        f"{candidate.backbone.source} has no {lacking} beside its weights",
        f"a backbone that takes the plan's {wanted} input",
        "leave this candidate out",
    )


def _public_records(plan: RunPlan, simulation: Simulation, base: Path, records: int) -> Examples:
    """Some of the records that the simulation trains on, drawn by the plan's seed."""
    by_site = simulation.partition == "site-column"
    examples = read_examples(
        table_path(simulation.path, base),
        simulation,
        plan.task,
        unit=plan.privacy.unit,
        site_column=simulation.site if by_site else None,
    )
    shares = partition(examples, simulation, seed=plan.seed, delta=plan.privacy.target_delta, labels=plan.task.labels)
    rows = np.sort(np.concatenate([share.train for share in shares]))
    random = np.random.default_rng(plan.seed)
    return examples.take(np.sort(random.choice(rows, size=min(records, len(rows)), replace=False)))


def _assess(candidate: Candidate, plan: RunPlan, simulation: Simulation, drawn: Examples, stage: Stage) -> Assessment:
    if isinstance(drawn.inputs, np.ndarray):
        raise TypeError("numeric records; expected texts, images or sounds")
    model = find_backbone(candidate.backbone, plan.task, base=candidate.base, device=simulation.device)
    width = model.width
    start = time.perf_counter()
    features = model.encode(drawn.inputs, advance=stage(candidate.backbone.source, len(drawn)))
    seconds = time.perf_counter() - start
    whom = drawn.units if drawn.patients is None else drawn.patients
    figures = judge(features, classes_of(drawn.labels), np.unique(whom, return_inverse=True)[1])
    return Assessment(candidate=candidate, figures=figures, width=width, seconds_per_record=seconds / len(drawn))


def judge(features: NDArray[np.floating], labels: NDArray[np.int64], groups: NDArray[np.int64]) -> Figures:
    """What a backbone's features are worth.

    Args:
        features: pooled outputs of a backbone, [n, d].
        labels: [n].
        groups: index of each record's patient, or of the record, [n].

    Raises:
        InputError: as `logme` and `linear_probe`.
    """
    rows = unit_rows(features)
    return Figures(
        logme=logme(head_inputs(features, rows.mean(axis=0)), labels),
        probe=linear_probe(rows, labels, penalty=PENALTY, groups=groups),
        spread=spread(rows),
    )
