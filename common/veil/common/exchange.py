# SPDX-License-Identifier: Apache-2.0
"""What coordinator and site say to each other, as values, free of any transport.

Promises that a reply holds noised lattice points or a short refusal code, that an answer to an offer holds one word,
that a statement follows from plan, ledger and limits, and that none of them tells anything else about the records.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from veil.common.errors import RefusalCode
from veil.common.masking import Member, session_of
from veil.common.plan import RunPlan
from veil.common.schedule import ReleaseKind
from veil.common.statement import SignedStatement
from veil.common.update import Adapter, MaskedUpdate, Update


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
        members: the cohort of a masked sum, by name; empty where every site adds the full noise.
        attempt: how often this release was asked of another cohort before.
    """

    plan: RunPlan
    job: str
    round: int
    kind: ReleaseKind
    adapter: Adapter
    nominal_units: float
    witness: str = ""
    members: tuple[Member, ...] = ()
    attempt: int = 0

    @property
    def session(self) -> bytes:
        """What this request's masks are derived for, 32 bytes."""
        return session_of(
            job=self.job,
            plan=self.plan.sha256,
            round_=self.round,
            kind=self.kind.value,
            attempt=self.attempt,
            members=self.members,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class RoundReply:
    """What leaves a site: an update, a masked one, or a refusal; exactly one of them.

    Attributes:
        site: the site's name, as its operator chose it.
        job: the request's job.
        round: the request's round.
        update: the noised release.
        masked: the noised release behind its masks, where the request names a cohort.
        refusal: why there is none.
        head: hash of the site's last ledger line, for the next request's witness; an opaque number to anyone else.
        units: number of units, only from a site whose policy declares it public (`limits.release_counts`).
    """

    site: str
    job: str
    round: int
    update: Update | None = None
    masked: MaskedUpdate | None = None
    refusal: RefusalCode | None = None
    head: str = ""
    units: int | None = None

    def __post_init__(self) -> None:
        if sum(one is not None for one in (self.update, self.masked, self.refusal)) != 1:
            raise ValueError("a reply holds an update, a masked one or a refusal; expected exactly one of them")


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
        members: with whom noise would be shared, where that is asked; empty otherwise.
    """

    plan: RunPlan
    job: str
    members: tuple[Member, ...] = ()


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


@dataclass(frozen=True, kw_only=True, slots=True)
class KeyReply:
    """A site's part in masked sums: its public masking key, signed; nothing else and nothing secret.

    Attributes:
        job: the run.
        member: the key.
        refusal: why there is none.
    """

    job: str
    member: Member | None = None
    refusal: RefusalCode | None = None

    def __post_init__(self) -> None:
        if (self.member is None) == (self.refusal is None):
            raise ValueError("a reply holds a key or a refusal; expected exactly one of them")
