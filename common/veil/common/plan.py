# SPDX-License-Identifier: Apache-2.0
"""The RunPlan: all that is public about a run, parsed once from TOML into a frozen value.

Unknown keys, contradictions and values out of range raise `PlanError` naming key, value, expectation and remedy.
"""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Mapping
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from veil.common.errors import PlanError
from veil.common.privacy import PrivacyBudget, PrivacyUnit

Algorithm = Literal["dp-fedsgd", "dp-fedavg"]
Baseline = Literal["local_only", "centralized_dp", "non_private"]
CachePrecision = Literal["float32", "float16"]
Device = Literal["auto", "cpu", "cuda"]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9 ._-]{0,79}$")]


class Section(BaseModel):
    """A part of a TOML file: frozen, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Backbone(Section):
    """The pretrained model whose general layers stay frozen."""

    source: str = Field(
        pattern=r"^(package|path|hub):.+",
        description="where the weights are: package:NAME[/FOLDER], path:FOLDER or hub:ORG/NAME@REVISION",
    )
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$", description="SHA-256 of the weights file; any other file is refused")
    files_sha256: str | None = Field(
        default=None,
        pattern=r"^[0-9a-f]{64}$",
        description="SHA-256 over names and digests of the configuration and tokenizer files; other files are refused",
    )
    licence: str = Field(default="", description="SPDX name of the weights' licence, carried into the report")


class Task(Section):
    """What the tuned model is to answer."""

    kind: Literal["text-classification", "image-classification", "tabular-classification"] = Field(
        description="text-classification, image-classification or tabular-classification"
    )
    labels: tuple[str, ...] = Field(
        min_length=2, description="the classes, a public list; their order is the output layer's"
    )
    max_length: int = Field(default=128, ge=4, le=8192, description="text: tokens kept of each record")
    image_size: int = Field(default=224, ge=32, le=1024, description="image: side of the square in pixels")
    width: int | None = Field(
        default=None, ge=1, le=1_000_000, description="features, deployed: how many numeric columns every site has"
    )
    bounds: dict[str, tuple[float, float]] = Field(
        default_factory=dict,
        description="features: public [low, high] of a column, clamped and mapped to [-1, 1]",
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if len(set(self.labels)) != len(self.labels):
            raise ValueError(f"labels = {list(self.labels)} repeats a class; name every class once")
        for column, (low, high) in self.bounds.items():
            if not low < high:
                raise ValueError(f"bounds.{column} = [{low}, {high}]; low must be below high")
        return self


class Transfer(Section):
    """Which part of the model is tuned."""

    mode: Literal["head"] = Field(
        default="head", description="head: a new output layer on the frozen features (the one mode so far)"
    )


class Training(Section):
    """How the trainable part is tuned."""

    algorithm: Algorithm = Field(
        default="dp-fedsgd", description="dp-fedsgd (full-batch clipped sums) or dp-fedavg (local epochs)"
    )
    rounds: int = Field(default=30, ge=1, le=10_000, description="training rounds, the centring round not counted")
    learning_rate: float | None = Field(
        default=None, gt=0, description="fixed rate; without it, the public rule of ARCHITECTURE.md"
    )
    centre: bool = Field(
        default=True, description="one DP-mean round first, so that features are centred before the head"
    )
    local_epochs: int = Field(default=1, ge=1, le=1000, description="dp-fedavg: passes over the records a round")
    sample_rate: float = Field(
        default=0.1, gt=0, le=1, description="dp-fedavg: chance of each unit to be in a local step"
    )


class Privacy(Section):
    """The promise asked of every site, for the whole run."""

    unit: PrivacyUnit = Field(
        default=PrivacyUnit.RECORD,
        description="whom the promise protects: record or patient; patient where simulation.patient is named",
    )
    target_epsilon: float = Field(gt=0, le=1000, description="ε of the whole run, per site and unit")
    target_delta: float = Field(default=1e-5, gt=0, lt=1, description="δ of the whole run; below 1/units of a site")
    noise: Literal["local"] = Field(
        default="local", description="local: every site adds the full noise itself and trusts nobody"
    )
    max_grad_norm: float = Field(
        default=0.5, ge=1e-3, le=1e3, description="L2 bound of one unit's gradient (clipping bound)"
    )
    max_records_per_patient: int = Field(
        default=8, ge=1, le=10_000, description="patient unit: records of one patient that take part"
    )

    @property
    def budget(self) -> PrivacyBudget:
        """The promise as a value."""
        return PrivacyBudget(target_epsilon=self.target_epsilon, target_delta=self.target_delta)


class Cohort(Section):
    """Who takes part in a round."""

    min_sites: int = Field(default=2, ge=1, le=100_000, description="a round with fewer usable replies ends the run")
    sites_per_round: int | None = Field(
        default=None,
        ge=1,
        description="training rounds: how many sites are asked, drawn anew each round by the public seed; "
        "without it, all",
    )
    round_timeout_s: float = Field(default=600.0, gt=0, description="seconds a site has to reply")
    nominal_units: int | None = Field(
        default=None,
        ge=1,
        description="public number of units per site; without it, estimated from the centring round's noisy count",
    )
    max_units: int = Field(
        default=1_000_000,
        ge=1,
        le=1_000_000_000,
        description="largest public number of units a site may have; a longer update is refused as malformed",
    )
    approval_timeout_s: float = Field(
        default=3600.0, gt=0, description="deployed: seconds that the sites' operators have to approve the run"
    )
    aggregation: Literal["sum", "median", "trimmed-mean", "krum"] = Field(
        default="sum", description="sum, or a rule that withstands lying sites: median, trimmed-mean, krum"
    )
    malicious_sites: int = Field(
        default=0, ge=0, description="trimmed-mean, krum: lying sites that the rule is to withstand"
    )

    @model_validator(mode="after")
    def _enough(self) -> Self:
        if self.sites_per_round is not None and self.sites_per_round < self.min_sites:
            raise ValueError(
                f"sites_per_round = {self.sites_per_round} with min_sites = {self.min_sites}; ask at least as many "
                "sites as a round needs"
            )
        return self

    @model_validator(mode="after")
    def _robust(self) -> Self:
        needed = {"median": 3, "trimmed-mean": 2 * self.malicious_sites + 1, "krum": 2 * self.malicious_sites + 3}
        if self.min_sites < needed.get(self.aggregation, 1):
            raise ValueError(
                f'min_sites = {self.min_sites} with aggregation = "{self.aggregation}" and malicious_sites = '
                f"{self.malicious_sites}; the rule needs at least {needed[self.aggregation]} sites"
            )
        return self


class Evaluation(Section):
    """How good the tuned model is, as one more release at the end of the run; without the section, nobody is told."""

    holdout: float = Field(
        default=0.2, gt=0, le=0.5, description="part of each site's units that never train; the site draws them"
    )
    share: float = Field(default=0.05, gt=0, le=0.5, description="part of the run's μ² that the evaluation may use")


class Wire(Section):
    """How wide the numbers are that travel in training rounds; what is sent once a run travels at 32 bits."""

    update_bits: Literal[8, 16, 32] = Field(
        default=32, description="integers of an update: 32, 16 or 8; noised numbers are rounded, at no cost in ε"
    )
    adapter_bits: Literal[16, 32] = Field(
        default=32, description="floating point of the adapter: 32 or 16; the coordinator keeps its own exact one"
    )


class Columns(Section):
    """Which columns of a table hold what: shared by a simulation and a site's own file."""

    text: str | None = Field(default=None, description="column with the text")
    text_template: str | None = Field(
        default=None,
        description="a sentence with {column} places; a comma-separated clause with a missing value is left out",
    )
    values: dict[str, dict[str, str]] = Field(
        default_factory=dict, description="text_template: words for a column's raw values"
    )
    missing_values: dict[str, tuple[str | float | int | bool, ...]] = Field(
        default_factory=dict, description="text_template: raw values of a column that mean 'not known'"
    )
    image: str | None = Field(default=None, description="column with image paths, relative to the table")
    features: tuple[str, ...] | None = Field(default=None, description="numeric columns")
    label: str = Field(description="column with the label")
    labels: dict[str, str] = Field(default_factory=dict, description="raw label → the plan's label")
    patient: str | None = Field(default=None, description="column with the patient id")

    @model_validator(mode="after")
    def _one_input(self) -> Self:
        given = [n for n in ("text", "text_template", "image", "features") if getattr(self, n) is not None]
        if len(given) != 1:
            raise ValueError(
                f"{given or 'no input column'} given; name exactly one of text, text_template, image, features"
            )
        return self

    @property
    def modality(self) -> Literal["text", "image", "tabular"]:
        """What kind of input the columns give."""
        if self.image is not None:
            return "image"
        return "tabular" if self.features is not None else "text"


class Simulation(Columns):
    """A whole federation on one machine: the pooled table and how it is divided."""

    path: str = Field(description="CSV or Parquet table: a path relative to the plan, or package:NAME/FILE")
    site: str | None = Field(default=None, description="column with the site's name")
    partition: Literal["site-column", "iid", "dirichlet"] = Field(
        default="iid", description="how records come to sites: site-column, iid or dirichlet (label shift)"
    )
    sites: int | None = Field(default=None, ge=1, le=100_000, description="number of sites (iid, dirichlet)")
    alpha: float = Field(default=0.5, gt=0, description="dirichlet: small means very different sites")
    test_fraction: float = Field(
        default=0.2, gt=0, lt=1, description="share of each site's units held out, never trained on"
    )
    baselines: tuple[Baseline, ...] = Field(
        default=("local_only", "centralized_dp", "non_private"), description="what the run is compared with"
    )
    noise: Literal["os", "fixed", "none"] = Field(
        default="os",
        description="os: the operating system's generator; fixed (repeatable) and none are not private, and say so",
    )
    allow_single_class_sites: bool = Field(
        default=False, description="run although a site holds records of one class only"
    )
    cache_precision: CachePrecision = Field(
        default="float32", description="how features are kept on disk: float32, or float16 scaled by row, half as large"
    )
    device: Device = Field(
        default="auto", description="where features are computed: auto (cuda where torch has one), cpu or cuda"
    )

    @model_validator(mode="after")
    def _divisible(self) -> Self:
        if self.partition == "site-column" and self.site is None:
            raise ValueError('partition = "site-column" without site; name the column that holds the site')
        if self.partition != "site-column" and self.sites is None:
            raise ValueError(f'partition = "{self.partition}" without sites; say how many sites')
        return self


class RunPlan(Section):
    """All that is public about a run."""

    name: Name = Field(description="name of the run")
    seed: int = Field(default=0, ge=0, lt=2**63, description="for what is public (partitions); never for noise")
    backbone: Backbone | None = None
    task: Task
    transfer: Transfer = Transfer()
    training: Training = Training()
    privacy: Privacy
    cohort: Cohort = Cohort()
    evaluation: Evaluation | None = None
    wire: Wire = Wire()
    simulation: Simulation | None = None

    @model_validator(mode="before")
    @classmethod
    def _patients_by_default(cls, document: Any) -> Any:
        """Where a patient column is named and no unit is, the patient is the unit."""
        if not isinstance(document, dict):
            return document
        privacy, simulation = document.get("privacy"), document.get("simulation")
        if isinstance(privacy, dict) and isinstance(simulation, dict) and simulation.get("patient"):
            return {**document, "privacy": {"unit": PrivacyUnit.PATIENT.value, **privacy}}
        return document

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not self.training.centre and self.cohort.nominal_units is None:
            raise ValueError(
                "training.centre = false without cohort.nominal_units; without the centring round's noisy count, "
                "say how many units a site has, as a public figure"
            )
        modality = self.task.kind.removesuffix("-classification")
        if (self.backbone is None) != (modality == "tabular"):
            raise ValueError(
                f'task.kind = "{self.task.kind}" {"with" if self.backbone else "without"} [backbone]; '
                "text and images need one, numeric features have none"
            )
        if self.simulation is not None and self.simulation.modality != modality:
            raise ValueError(
                f'task.kind = "{self.task.kind}" with {self.simulation.modality} input in [simulation]; they must agree'
            )
        if self.simulation is not None:
            for raw, label in self.simulation.labels.items():
                if label not in self.task.labels:
                    raise ValueError(
                        f'simulation.labels."{raw}" = "{label}" is not in task.labels = {list(self.task.labels)}'
                    )
            if self.privacy.unit is PrivacyUnit.PATIENT and self.simulation.patient is None:
                raise ValueError('privacy.unit = "patient" without simulation.patient; name the patient column')
        return self

    def public(self) -> RunPlan:
        """The plan as sites receive it: without the simulation's table."""
        return self if self.simulation is None else self.model_copy(update={"simulation": None})

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """A plan with other values in some places; what was worked out of this one stays behind."""
        copy = super().model_copy(update=update, deep=deep)
        for name in ("canonical", "sha256"):
            copy.__dict__.pop(name, None)
        return copy

    def to_json(self) -> str:
        """Canonical JSON, the form that travels and is hashed."""
        return self.canonical

    @cached_property
    def canonical(self) -> str:
        """What `to_json` gives; asked for several times in every round of every site."""
        return json.dumps(self.model_dump(mode="json", exclude_none=True), sort_keys=True, separators=(",", ":"))

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of the public part's canonical JSON, as hex."""
        return hashlib.sha256(self.public().to_json().encode()).hexdigest()

    @classmethod
    def from_json(cls, text: str) -> RunPlan:
        """Parse what `to_json` gave.

        Raises:
            PlanError: when it is not a plan.
        """
        return _parsed(text)


@lru_cache(maxsize=16)
def _parsed(text: str) -> RunPlan:
    try:
        return RunPlan.model_validate_json(text)
    except ValidationError as error:
        raise plan_error("plan", error) from None


def plan_error(where: str, error: ValidationError) -> PlanError:
    """One readable error out of pydantic's list: key, value, expectation."""
    lines = []
    for one in error.errors(include_url=False):
        key = ".".join(str(part) for part in one["loc"]) or "plan"
        if one["type"] == "extra_forbidden":
            lines.append(f"unknown key {key} = {_short(one['input'])}")
        elif one["type"] == "missing":
            lines.append(f"missing key {key}")
        elif one["type"] == "value_error":
            lines.append(f"{key}: {one['ctx']['error']}" if key != "plan" else str(one["ctx"]["error"]))
        else:
            lines.append(f"{key} = {_short(one['input'])} ({one['msg'].lower()})")
    return PlanError(
        f"{where}: " + "; ".join(lines),
        "the keys and ranges of the plan reference in common/README.md",
        "correct the named keys",
    )


def _short(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 80 else text[:77] + "..."


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file.

    Raises:
        PlanError: when the file is not there or not TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "not UTF-8 text"
        raise PlanError(f"{path}: {reason}", "a readable TOML file", "check the path") from None
    except tomllib.TOMLDecodeError as error:
        raise PlanError(f"{path}: {error}", "valid TOML", "correct the named line") from None


def parse_plan(path: Path) -> RunPlan:
    """Read and check a plan file.

    Raises:
        PlanError: naming every wrong key.
    """
    document = read_toml(path)
    try:
        return RunPlan.model_validate_json(json.dumps(document, default=str))
    except ValidationError as error:
        raise plan_error(str(path), error) from None
