# SPDX-License-Identifier: Apache-2.0
"""The sections of a plan: what each key is, its range, and what contradicts itself within one section.

What one section means for another stands in `veil.common.plan_defaults` and `veil.common.plan_rules`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self, cast, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator

from veil.common.privacy import PrivacyBudget, PrivacyUnit

Algorithm = Literal["dp-fedsgd", "dp-fedavg", "one-shot"]
Baseline = Literal["local_only", "centralized_dp", "non_private", "head_only"]
CachePrecision = Literal["float32", "float16"]
Device = Literal["auto", "cpu", "cuda"]
Form = Literal["classification", "multilabel", "regression", "tokens", "answers", "generation", "detection"]
Modality = Literal["text", "image", "audio", "tabular"]
Kind = Literal[
    "text-classification",
    "image-classification",
    "audio-classification",
    "tabular-classification",
    "text-multilabel",
    "image-multilabel",
    "audio-multilabel",
    "tabular-multilabel",
    "text-regression",
    "image-regression",
    "audio-regression",
    "tabular-regression",
    "text-tokens",
    "text-answers",
    "text-generation",
    "image-detection",
]
STRUCTURED: frozenset[Form] = frozenset({"tokens", "answers", "generation", "detection"})
"""Forms whose answer is more than a row of numbers; they are learnt by a model that is tuned below its head."""

TransferMode = Literal["head", "last-layers", "full", "gradual", "bias", "adapter", "lora", "prompt"]
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
    trained_on: str = Field(
        default="", max_length=2000, description="what the weights were pretrained on, in words or as a URL"
    )
    citation: str = Field(default="", max_length=2000, description="how the weights' makers ask to be cited")


class Task(Section):
    """What the tuned model is to answer."""

    kind: Kind = Field(
        description="MODALITY-FORM: text, image, audio or tabular; classification (one of the labels), multilabel (any "
        "of them, each for itself) or regression (a number). text-tokens: a label for each word; text-answers: where "
        "in the text a question's answer stands; text-generation: how a text goes on; image-detection: labelled boxes"
    )
    labels: tuple[str, ...] = Field(
        default=(),
        description="the classes, a public list; their order is the output layer's; regression: the number's name; "
        "answers and generation: none",
    )
    target: tuple[float, float] | None = Field(
        default=None, description="regression: public [low, high] of the number; what lies outside is cut to it"
    )
    max_length: int = Field(default=128, ge=4, le=8192, description="text: tokens kept of each record")
    answer_length: int = Field(
        default=32,
        ge=1,
        le=4096,
        description="generation: tokens kept of a continuation, out of max_length, and written at most",
    )
    image_size: int = Field(default=224, ge=32, le=1024, description="image: side of the square in pixels")
    max_seconds: float = Field(default=10.0, ge=0.1, le=120, description="audio: seconds kept of each record")
    width: int | None = Field(
        default=None, ge=1, le=1_000_000, description="features, deployed: how many numeric columns every site has"
    )
    bounds: dict[str, tuple[float, float]] = Field(
        default_factory=dict,
        description="features: public [low, high] of a column, clamped and mapped to [-1, 1]",
    )

    @property
    def modality(self) -> Modality:
        """What a record is."""
        return cast(Modality, self.kind.partition("-")[0])

    @property
    def form(self) -> Form:
        """What is asked about a record."""
        return cast(Form, self.kind.partition("-")[2])

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if len(set(self.labels)) != len(self.labels):
            raise ValueError(f"labels = {list(self.labels)} repeats a class; name every class once")
        if self.form == "classification" and len(self.labels) < 2:
            raise ValueError(f'labels = {list(self.labels)} with kind = "{self.kind}"; name at least two classes')
        if self.form == "regression":
            self._check_number()
        elif self.target is not None:
            raise ValueError(f'target = {list(self.target)} with kind = "{self.kind}"; it is for regression')
        self._check_structure()
        for column, (low, high) in self.bounds.items():
            if not low < high:
                raise ValueError(f"bounds.{column} = [{low}, {high}]; low must be below high")
        return self

    def _check_structure(self) -> None:
        wordless = self.form in ("answers", "generation")
        if wordless and self.labels:
            raise ValueError(f'labels = {list(self.labels)} with kind = "{self.kind}", which has none; leave them out')
        if not wordless and not self.labels:
            raise ValueError(f'kind = "{self.kind}" without labels; name them')
        if self.form == "tokens" and len(self.labels) < 2:
            raise ValueError(f'labels = {list(self.labels)} with kind = "{self.kind}"; name at least two')
        if self.form == "generation" and self.answer_length >= self.max_length:
            raise ValueError(
                f"answer_length = {self.answer_length} of max_length = {self.max_length}; leave room for the text"
            )

    def _check_number(self) -> None:
        if len(self.labels) != 1:
            raise ValueError(f'labels = {list(self.labels)} with kind = "{self.kind}"; name the one number')
        if self.target is None:
            raise ValueError(f'kind = "{self.kind}" without target; name the public [low, high] of the number')
        if not self.target[0] < self.target[1]:
            raise ValueError(f"target = {list(self.target)}; low must be below high")


class Transfer(Section):
    """Which part of the model is tuned."""

    mode: TransferMode = Field(
        default="head",
        description="head: a new output layer on the frozen features; last-layers: also the top blocks; full: all "
        "weights; gradual: block by block from the top; bias: all biases (BitFit); adapter: small modules behind the "
        "blocks; lora: low-rank changes of attention; prompt: tokens before the record's own",
    )
    layers: int | None = Field(
        default=None,
        ge=1,
        le=1000,
        description="how many blocks from the top take part: last-layers (1 without it), gradual (2), bias, adapter "
        "and lora (all)",
    )
    rank: int = Field(default=8, ge=1, le=1024, description="lora: rank of each change")
    alpha: float = Field(default=16.0, gt=0, le=1e4, description="lora: each change counts alpha/rank times")
    bottleneck: int = Field(default=16, ge=1, le=4096, description="adapter: width of the small modules")
    prompt_length: int = Field(default=10, ge=1, le=1000, description="prompt: number of tokens")
    pretrained_rate: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="rate at first of what is tuned below the head, as part of the head's; without it, the rule of "
        "ARCHITECTURE.md",
    )
    layer_decay: float = Field(
        default=1.0, gt=0, le=1, description="by which the rate falls from each block to the one below it"
    )
    head_rounds: int = Field(
        default=0,
        ge=0,
        le=10_000,
        description="rounds of the run, the first ones, in which the head alone trains, on pretrained features of all "
        "units, for a quarter of the run's μ²",
    )

    @property
    def deep(self) -> bool:
        """Whether anything below the head is tuned."""
        return self.mode != "head"

    @property
    def top(self) -> int | None:
        """How many blocks from the top take part; None for all."""
        return self.layers or {"last-layers": 1, "gradual": 2}.get(self.mode)

    @model_validator(mode="after")
    def _used(self) -> Self:
        """A key that the mode does not read is a mistake somebody made."""
        readers = {
            "layers": ("last-layers", "gradual", "bias", "adapter", "lora"),
            "rank": ("lora",),
            "alpha": ("lora",),
            "bottleneck": ("adapter",),
            "prompt_length": ("prompt",),
            "head_rounds": ("last-layers", "full", "bias", "adapter", "lora", "prompt"),
        }
        deep = get_args(TransferMode)[1:]
        for key, field in type(self).model_fields.items():
            modes, value = readers.get(key, deep), getattr(self, key)
            if key != "mode" and value != field.default and self.mode not in modes:
                raise ValueError(f'{key} = {value} with mode = "{self.mode}"; it is read by {", ".join(modes)}')
        return self


class Training(Section):
    """How the trainable part is tuned."""

    algorithm: Algorithm = Field(
        default="dp-fedsgd",
        description="dp-fedsgd (full-batch clipped sums), dp-fedavg (local epochs) or one-shot (one message: sums from "
        "which the coordinator solves a ridge regression)",
    )
    rounds: int = Field(default=30, ge=1, le=10_000, description="training rounds, the centring round not counted")
    learning_rate: float | None = Field(
        default=None, gt=0, description="fixed rate; without it, the public rule of ARCHITECTURE.md"
    )
    centre: bool = Field(
        default=True, description="one DP-mean round first, so that features are centred before the head"
    )
    local_epochs: int = Field(default=1, ge=1, le=1000, description="dp-fedavg: passes over the records a round")
    sample_rate: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="chance of each unit to be in a step: of dp-fedavg 0.1 without it, of dp-fedsgd 1, all units",
    )

    @property
    def sampling(self) -> float:
        """Chance of each unit to be in a step."""
        return self.sample_rate or (0.1 if self.algorithm == "dp-fedavg" else 1.0)

    @model_validator(mode="before")
    @classmethod
    def _one_message(cls, section: Any) -> Any:
        """One-shot is one round, and centres what it was sent."""
        if isinstance(section, dict) and section.get("algorithm") == "one-shot":
            return {"rounds": 1, "centre": False, **section}
        return section

    @model_validator(mode="after")
    def _nothing_but_it(self) -> Self:
        if self.algorithm != "one-shot":
            return self
        for name, value, only in (
            ("rounds", self.rounds, 1),
            ("centre", self.centre, False),
            ("learning_rate", self.learning_rate, None),
            ("sample_rate", self.sample_rate, None),
        ):
            if value != only:
                raise ValueError(
                    f'{name} = {json.dumps(value)} with algorithm = "one-shot", which is one message and no descent; '
                    "leave it out"
                )
        return self


FIRST_GRADIENT_SHARE = 0.5
"""Bound of dp-fedsgd where the plan names none, in lengths of the zero head's gradient (benchmarks/RULE.md)."""


def clipping_bound(classes: int, form: Form = "classification") -> float:
    """L2 bound of one unit's gradient of a head with so many classes.

    The zero head's gradient of a record is (answer - truth) xᵀ, with x of length 1. One class of c: √(1 - 1/c) long,
    whatever the record. Each of c labels for itself: √c / 2, as each answer is 1/2. A number between 0 and 1: at most
    1/2, and 1/4 on average of numbers that are spread evenly. Words of a text: no longer than one of them. An answer:
    half the cross-entropies of its start and its end, √2 / 2 at most. What has no new head, or more than one: 1.
    """
    first: Mapping[Form, float] = {
        "classification": math.sqrt(1 - 1 / classes),
        "multilabel": math.sqrt(classes) / 2,
        "regression": 1 / 4,
        "tokens": math.sqrt(1 - 1 / classes),
        "answers": math.sqrt(1 / 2),
        "generation": 1.0,
        "detection": 1.0,
    }
    return FIRST_GRADIENT_SHARE * first[form]


class Privacy(Section):
    """The promise asked of every site, for the whole run."""

    unit: PrivacyUnit = Field(
        default=PrivacyUnit.RECORD,
        description="whom the promise protects: record or patient; patient where simulation.patient is named",
    )
    target_epsilon: float = Field(gt=0, le=1000, description="ε of the whole run, per site and unit")
    target_delta: float = Field(default=1e-5, gt=0, lt=1, description="δ of the whole run; below 1/units of a site")
    noise: Literal["local", "distributed"] = Field(
        default="local",
        description="local: every site adds the full noise itself and trusts nobody; distributed: the sites share the "
        "noise of a masked sum, which is all that the coordinator sees",
    )
    max_grad_norm: float = Field(
        default=0.5,
        ge=1e-3,
        le=1e3,
        description="L2 bound of one unit's gradient (clipping bound); of dp-fedsgd without it, half the length that "
        "the gradient of a record has at the zero head, √(1 - 1/classes)",
    )
    max_records_per_patient: int = Field(
        default=8, ge=1, le=10_000, description="patient unit: records of one patient that take part"
    )

    @property
    def budget(self) -> PrivacyBudget:
        """The promise as a value."""
        return PrivacyBudget(target_epsilon=self.target_epsilon, target_delta=self.target_delta)


COLLUDING_OF_TEN = 3
"""Sites out of ten that may work with the coordinator, where a plan says nothing."""


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
    colluding_sites: int | None = Field(
        default=None,
        ge=0,
        description="distributed noise: sites of a masked sum that may work with the coordinator; the others' shares "
        "of the noise suffice; without it, three of ten",
    )
    retries: int = Field(
        default=2,
        ge=0,
        le=1000,
        description="distributed noise: training rounds of the run that may be asked anew when a site drops out; the "
        "noise is sized for them",
    )

    def colluding(self, sites: int) -> int:
        """How many of a masked sum's sites are not counted on."""
        wanted = COLLUDING_OF_TEN * sites // 10 if self.colluding_sites is None else self.colluding_sites
        return min(wanted, sites - 1)

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
    groups: tuple[Name, ...] = Field(
        default=(),
        max_length=100,
        description="groups of records, a public list, whose right and wrong answers are counted apart; the noise of "
        "all figures grows by 29 %",
    )

    @model_validator(mode="after")
    def _groups_to_compare(self) -> Self:
        if len(self.groups) == 1 or len(set(self.groups)) != len(self.groups):
            raise ValueError(f"groups = {list(self.groups)}; name at least two groups, each once, or none")
        return self


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
    question: str | None = Field(default=None, description="answers: column with the question")
    image: str | None = Field(default=None, description="column with image paths, relative to the table")
    audio: str | None = Field(default=None, description="column with sound files, relative to the table")
    features: tuple[str, ...] | None = Field(default=None, description="numeric columns")
    label: str = Field(description="column with the label")
    form: Form = Field(
        default="classification",
        description="what the label column holds: classification: one label; multilabel: labels with | between them, "
        "none in an empty cell; regression: a number; tokens: a label for each word of the text, with blanks between; "
        "answers: the answer, as it stands in the text; generation: how the text goes on; detection: JSON, a list of "
        "[label, left, top, right, bottom], each side from 0 to 1. A simulation takes it from task.kind",
    )
    labels: dict[str, str] = Field(default_factory=dict, description="raw label → the plan's label")
    patient: str | None = Field(default=None, description="column with the patient id")
    group: str | None = Field(default=None, description="column with the group whose answers are counted apart")
    groups: dict[str, str] = Field(
        default_factory=dict, description="raw group → the plan's group; without it, as it is; others are in no group"
    )

    @model_validator(mode="after")
    def _one_input(self) -> Self:
        given = [n for n in ("text", "text_template", "image", "audio", "features") if getattr(self, n) is not None]
        if len(given) != 1:
            raise ValueError(
                f"{given or 'no input column'} given; name exactly one of text, text_template, image, audio, features"
            )
        return self

    @model_validator(mode="after")
    def _asked(self) -> Self:
        if (self.question is None) == (self.form == "answers"):
            have = f'question = "{self.question}"' if self.question else "no question"
            raise ValueError(f'{have} with form = "{self.form}"; answers have a question column, and nothing else has')
        if self.question is not None and self.text is None:
            raise ValueError("question without text; name the column with the text that holds the answer")
        return self

    @property
    def modality(self) -> Modality:
        """What kind of input the columns give."""
        if self.image is not None:
            return "image"
        if self.audio is not None:
            return "audio"
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
    selector: bool = Field(default=True, description="let each site compare the model with its own and keep the better")
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
