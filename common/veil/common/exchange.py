# SPDX-License-Identifier: Apache-2.0
"""One round's question and answer as values, free of any transport.

Promises that an answer holds noised lattice points or a short refusal code, and nothing else about the records.
"""

from __future__ import annotations

from dataclasses import dataclass

from veil.common.errors import RefusalCode
from veil.common.plan import RunPlan
from veil.common.schedule import ReleaseKind
from veil.common.update import Adapter, Update


@dataclass(frozen=True, kw_only=True, slots=True)
class RoundRequest:
    """What the coordinator asks of a site in one round.

    Attributes:
        plan: the whole public plan; the site computes its own mechanism from it.
        job: identity of the run, chosen once when it is created; a re-submitted run keeps it.
        round: 0 for the centring round, then 1, 2, …
        kind: what is to be released.
        adapter: the trainable tensors as they stand.
        nominal_units: public number of units per site, for the divisor of local steps (dp-fedavg).
    """

    plan: RunPlan
    job: str
    round: int
    kind: ReleaseKind
    adapter: Adapter
    nominal_units: float


@dataclass(frozen=True, kw_only=True, slots=True)
class RoundReply:
    """What leaves a site: an update or a refusal, never both.

    Attributes:
        site: the site's name, as its operator chose it.
        job: the request's job.
        round: the request's round.
        update: the noised release.
        refusal: why there is none.
    """

    site: str
    job: str
    round: int
    update: Update | None = None
    refusal: RefusalCode | None = None

    def __post_init__(self) -> None:
        if (self.update is None) == (self.refusal is None):
            raise ValueError("a reply holds an update or a refusal; expected exactly one of them")
