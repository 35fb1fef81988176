# SPDX-License-Identifier: Apache-2.0
"""The RunPlan: all that is public about a run, parsed once from TOML into a frozen value.

Unknown keys, contradictions and values out of range raise `PlanError` naming key, value, expectation and remedy.
"""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Mapping
from difflib import get_close_matches
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Self, get_args

from pydantic import BaseModel, Field, ValidationError, model_validator

from veil.common.errors import PlanError
from veil.common.plan_defaults import with_defaults
from veil.common.plan_rules import check_plan
from veil.common.plan_sections import (
    Backbone,
    Cohort,
    Evaluation,
    Name,
    Privacy,
    Section,
    Simulation,
    Task,
    Training,
    Transfer,
    Wire,
)


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
    def _filled(cls, document: Any) -> Any:
        return with_defaults(document)

    @model_validator(mode="after")
    def _checked(self) -> Self:
        check_plan(self)
        return self

    @property
    def groups(self) -> tuple[str, ...]:
        """Groups whose answers an evaluation counts apart."""
        return self.evaluation.groups if self.evaluation else ()

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
        raise plan_error("plan", error, RunPlan) from None


def plan_error(where: str, error: ValidationError, root: type[BaseModel] | None = None) -> PlanError:
    """One readable error out of pydantic's list: key, value, expectation.

    Args:
        where: the file, or what it is.
        error: pydantic's.
        root: what was read; with it, an unknown key is answered with the nearest one of its section.
    """
    lines = []
    for one in error.errors(include_url=False):
        key = ".".join(str(part) for part in one["loc"]) or "plan"
        if one["type"] == "extra_forbidden":
            lines.append(f"unknown key {key} = {_short(one['input'])}{_nearest(root, one['loc'])}")
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


def _nearest(root: type[BaseModel] | None, place: tuple[int | str, ...]) -> str:
    """A question where a section has a key that is written much like an unknown one."""
    section = root
    for part in place[:-1]:
        field = section.model_fields.get(str(part)) if section is not None else None
        kinds = (field.annotation, *get_args(field.annotation)) if field is not None else ()
        section = next((one for one in kinds if isinstance(one, type) and issubclass(one, BaseModel)), None)
    near = get_close_matches(str(place[-1]), section.model_fields if section is not None else (), n=1)
    return f" (did you mean {near[0]}?)" if near else ""


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
        raise plan_error(str(path), error, RunPlan) from None
