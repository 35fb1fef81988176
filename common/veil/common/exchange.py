# SPDX-License-Identifier: Apache-2.0
"""What coordinator and site say to each other, as values, free of any transport.

Promises that a reply holds noised lattice points or a short refusal code, that an answer to an offer holds one word,
that a statement follows from plan, ledger and limits, and that none of them tells anything else about the records.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from veil.common.errors import RefusalCode
from veil.common.plan import RunPlan
from veil.common.schedule import ReleaseKind
from veil.common.statement import SignedStatement
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
        witness: hash of the site's last ledger line that this coordinator saw, "" when it saw none; a ledger that does
            not hold it is an old copy.
    """

    plan: RunPlan
    job: str
    round: int
    kind: ReleaseKind
    adapter: Adapter
    nominal_units: float
    witness: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class RoundReply:
    """What leaves a site: an update or a refusal, never both.

    Attributes:
        site: the site's name, as its operator chose it.
        job: the request's job.
        round: the request's round.
        update: the noised release.
        refusal: why there is none.
        head: hash of the site's last ledger line, for the next request's witness; an opaque number to anyone else.
        units: number of units, only from a site whose policy declares it public (`limits.release_counts`).
    """

    site: str
    job: str
    round: int
    update: Update | None = None
    refusal: RefusalCode | None = None
    head: str = ""
    units: int | None = None

    def __post_init__(self) -> None:
        if (self.update is None) == (self.refusal is None):
            raise ValueError("a reply holds an update or a refusal; expected exactly one of them")


class Willingness(StrEnum):
    """A site's answer to an offer."""

    READY = "ready"
    PENDING = "pending"
    LACKS_BACKBONE = "lacks-backbone"
    REFUSED = "refused"


@dataclass(frozen=True, kw_only=True, slots=True)
class Offer:
    """A run put before a site, before any round of it.

    Attributes:
        plan: the whole public plan.
        job: identity of the run.
    """

    plan: RunPlan
    job: str


@dataclass(frozen=True, kw_only=True, slots=True)
class OfferReply:
    """What a site says to an offer; it depends on its policy, ledger and operator, never on its records.

    Attributes:
        job: the offer's job.
        willingness: ready, waiting for its operator, in need of the backbone, or refused.
        refusal: why, when refused.
    """

    job: str
    willingness: Willingness
    refusal: RefusalCode | None = None

    def __post_init__(self) -> None:
        if (self.willingness is Willingness.REFUSED) != (self.refusal is not None):
            raise ValueError("a refusal code with and only with a refusal; expected both or neither")


@dataclass(frozen=True, kw_only=True, slots=True)
class StatementReply:
    """What a site says when it is asked for its statement of a run; it follows from plan, ledger and limits.

    Attributes:
        job: the run.
        signed: the statement.
        refusal: why there is none.
    """

    job: str
    signed: SignedStatement | None = None
    refusal: RefusalCode | None = None

    def __post_init__(self) -> None:
        if (self.signed is None) == (self.refusal is None):
            raise ValueError("a reply holds a statement or a refusal; expected exactly one of them")
