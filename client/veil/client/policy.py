# SPDX-License-Identifier: Apache-2.0
"""What a site's owner allows.

Promises that a limit is a positive, finite number: there is no word for "unlimited" in a site's file.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field

from veil.common.masking import MOST_MEMBERS
from veil.common.plan_sections import COLLUDING_OF_TEN, Section
from veil.common.privacy import PrivacyUnit


class Limits(Section):
    """The most that anything outside may cost one unit of this site, and what else needs the owner's word."""

    epsilon_per_run: float = Field(gt=0, description="ε of one run")
    epsilon_lifetime: float = Field(gt=0, description="ε of everything, over all runs")
    delta: float = Field(default=1e-5, gt=0, lt=1, description="the δ of the site's ledger")
    unit: PrivacyUnit = Field(
        default=PrivacyUnit.RECORD,
        description="whom the promise protects: record or patient; patient where data.patient is named",
    )
    max_records_per_patient: int = Field(default=8, ge=1, description="patient unit: records that take part")
    release_counts: bool = Field(default=False, description="the number of units may be told to coordinators")
    approval: Literal["ask", "auto-within-limits"] = Field(
        default="ask", description="ask: each run waits for the operator; auto-within-limits: the limits decide"
    )
    licences: tuple[Annotated[str, Field(min_length=1)], ...] = Field(
        default=(),
        description="SPDX names of the licences that weights may have, those without one refused; empty: any",
    )
    min_cohort: int = Field(
        default=3,
        ge=2,
        le=MOST_MEMBERS,
        description="distributed noise: the fewest sites of a masked sum, this one too",
    )
    colluding_of_ten: int = Field(
        default=COLLUDING_OF_TEN,
        ge=0,
        le=9,
        description="distributed noise: of ten sites, how many may work with the coordinator; a plan that counts on "
        "more honest ones is refused",
    )
    accept_backbone: bool = Field(default=True, description="pinned weights may be received from the coordinator")


class SitePolicy(Section):
    """The owner's file, as far as rounds are concerned."""

    name: str = Field(min_length=1, max_length=80, description="the site's name, as others see it")
    limits: Limits
    peers: Mapping[str, str] = Field(
        default_factory=dict, description="sites that may share noise with this one, and the SHA-256 of their keys"
    )
