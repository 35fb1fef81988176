# SPDX-License-Identifier: Apache-2.0
"""A site: its name, policy, operator, ledger, noise and records, and how it answers an offer and a round.

Promises the order review → consent → spend → train → record → answer, that an answer to an offer is worked out without
the records, and that an error inside becomes a short code, because its text may quote a record.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from veil.client.attest import make_statement
from veil.client.cohort import review_cohort, review_sharing
from veil.client.ledger import Claim, Ledger, Masking
from veil.client.policy import SitePolicy
from veil.client.release import draw
from veil.client.review import affordable, release_of, remaining, review_history, review_plan, review_request
from veil.client.units import Units
from veil.common.delivery import Chunk, Manifest, Progress, Standing
from veil.common.errors import RefusalCode, RefusalError, VeilError
from veil.common.exchange import (
    KeyReply,
    Offer,
    OfferReply,
    RoundReply,
    RoundRequest,
    StatementReply,
    Willingness,
)
from veil.common.masking import MaskingKey
from veil.common.noise import NoiseSource, OSNoise, SharedNoise
from veil.common.plan import RunPlan
from veil.common.plan_sections import Backbone
from veil.common.privacy import NoiseShares
from veil.common.schedule import Release, schedule
from veil.common.statement import SignedStatement
from veil.common.update import MaskedUpdate, Update

if TYPE_CHECKING:
    from veil.client.tuned_units import TunedUnits
    from veil.common.tunable import TunableModel

_log = logging.getLogger(__name__)


class Consent(StrEnum):
    """What the site's operator says to a run."""

    GIVEN = "given"
    PENDING = "pending"
    DENIED = "denied"


class Backbones(Protocol):
    """Pretrained weights at a site: see `backbone_store.BackboneStore`."""

    def has(self, backbone: Backbone) -> bool:
        """Whether the pinned weights are on this machine."""
        ...

    def begin(self, manifest: Manifest, backbone: Backbone) -> Progress:
        """Prepare for a delivery.

        Raises:
            RefusalError: when it is not wanted or does not fit.
        """
        ...

    def write(self, chunk: Chunk) -> Progress:
        """Take one piece.

        Raises:
            RefusalError: when it is not the pinned one, or the disk fails.
        """
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Site:
    """One data owner.

    Attributes:
        policy: what the owner allows.
        ledger: what was done already.
        units: the records as a plan needs them: frozen features, labels, units. Called after the spend.
        model: the model of a plan that tunes more than a head, examined; called before the spend, reads no record.
        noise: where a round's randomness comes from; outside simulations always `OSNoise`.
        consent: the operator's word on a job with a plan.
        backbones: the pretrained weights on this machine.
        audit: where the last empirical audit's record is.
        simulated: whether it is a site of a simulation, which its statements say.
    """

    policy: SitePolicy
    ledger: Ledger
    units: Callable[[RunPlan], Units | TunedUnits]
    noise: Callable[[RoundRequest], NoiseSource]
    consent: Callable[[str, RunPlan], Consent]
    backbones: Backbones
    audit: Path | None = None
    simulated: bool = False
    model: Callable[[RunPlan], TunableModel] | None = None

    def consider(self, offer: Offer) -> OfferReply:
        """Whether this site would take part. Never raises, spends nothing, reads no record."""
        try:
            willingness = self._willingness(offer)
        except RefusalError as refusal:
            _log.warning("%s declines %s: %s", self.policy.name, offer.job, refusal)
            return OfferReply(job=offer.job, willingness=Willingness.REFUSED, refusal=refusal.code)
        except Exception:
            _log.exception("%s cannot consider %s", self.policy.name, offer.job)
            return OfferReply(job=offer.job, willingness=Willingness.REFUSED, refusal=RefusalCode.INTERNAL)
        return OfferReply(job=offer.job, willingness=willingness)

    def _willingness(self, offer: Offer) -> Willingness:
        plan, limits = offer.plan, self.policy.limits
        review_plan(plan, limits)
        review_sharing(plan, self.policy)
        entries = self.ledger.entries()
        done = {entry.round for entry in entries if entry.job == offer.job}
        left = [release for release in schedule(plan) if release.round not in done]
        affordable(plan, offer.job, left, limits, noise=OSNoise.name)(entries)
        consent = self._consent(offer.job, plan)
        if consent is Consent.PENDING:
            return Willingness.PENDING
        if plan.backbone is not None and not self.backbones.has(plan.backbone):
            return Willingness.LACKS_BACKBONE
        return Willingness.READY

    def _consent(self, job: str, plan: RunPlan) -> Consent:
        """The operator's word; a denial is a refusal.

        Raises:
            RefusalError: when it is no.
        """
        consent = self.consent(job, plan)
        if consent is Consent.DENIED:
            raise RefusalError(
                RefusalCode.APPROVAL,
                f"run {job}",
                "a run that this site's operator did not refuse",
                "veil site approve takes the refusal back",
            )
        return consent

    def receive(self, piece: Chunk | tuple[Offer, Manifest]) -> Progress:
        """Take a piece of a backbone, or the list of its files, for a run that this site would take part in.

        Never raises.
        """
        digest = piece.manifest if isinstance(piece, Chunk) else piece[1].digest
        try:
            return self.backbones.write(piece) if isinstance(piece, Chunk) else self._begin(*piece)
        except RefusalError as refusal:
            _log.warning("%s refuses a backbone: %s", self.policy.name, refusal)
            return Progress(manifest=digest, standing=Standing.REFUSED, refusal=refusal.code)
        except Exception:
            _log.exception("%s cannot take a backbone", self.policy.name)
            return Progress(manifest=digest, standing=Standing.REFUSED, refusal=RefusalCode.INTERNAL)

    def _begin(self, offer: Offer, manifest: Manifest) -> Progress:
        """Not a byte is taken for a run that was not reviewed and approved."""
        willingness = self._willingness(offer)
        if offer.plan.backbone is None or willingness is Willingness.PENDING:
            raise RefusalError(
                RefusalCode.APPROVAL,
                f"a backbone for run {offer.job}",
                "a run with a backbone, approved before it is sent",
                "veil site approve shows the plan and asks",
            )
        return self.backbones.begin(manifest, offer.plan.backbone)

    def attest(self, offer: Offer) -> StatementReply:
        """The signed statement of a run that this site took part in. Never raises, spends nothing, reads no record."""
        try:
            return StatementReply(job=offer.job, signed=self._statement(offer))
        except RefusalError as refusal:
            _log.warning("%s makes no statement of %s: %s", self.policy.name, offer.job, refusal)
            return StatementReply(job=offer.job, refusal=refusal.code)
        except Exception:
            _log.exception("%s cannot make a statement of %s", self.policy.name, offer.job)
            return StatementReply(job=offer.job, refusal=RefusalCode.INTERNAL)

    def _statement(self, offer: Offer) -> SignedStatement:
        statement = make_statement(
            self.policy, self.ledger.extract(offer.job), offer, audit=self.audit, simulation=self.simulated
        )
        return SignedStatement.sign(statement, self.ledger.key)

    def answer(self, request: RoundRequest) -> RoundReply:
        """One round: an update, or the code of a refusal. Never raises."""
        try:
            return self._reply(request, released=self._release(request))
        except RefusalError as refusal:
            _log.warning("%s refuses round %d of %s: %s", self.policy.name, request.round, request.job, refusal)
            return self._reply(request, refusal=refusal.code)
        except VeilError as error:
            _log.error("%s cannot do round %d of %s: %s", self.policy.name, request.round, request.job, error)
            return self._reply(request, refusal=RefusalCode.INTERNAL)
        except Exception:
            _log.exception("%s failed in round %d of %s", self.policy.name, request.round, request.job)
            return self._reply(request, refusal=RefusalCode.INTERNAL)

    def share_key(self, offer: Offer) -> KeyReply:
        """This site's part in masked sums, of a given cohort where the offer names one. Never raises, spends nothing,
        reads no record."""
        try:
            review_sharing(offer.plan, self.policy)
            if offer.members:
                review_cohort(offer.plan, offer.members, self.policy, self._masking.member)
            return KeyReply(job=offer.job, member=self._masking.member)
        except RefusalError as refusal:
            _log.warning("%s shares no noise in %s: %s", self.policy.name, offer.job, refusal)
            return KeyReply(job=offer.job, refusal=refusal.code)
        except Exception:
            _log.exception("%s cannot name its masking key for %s", self.policy.name, offer.job)
            return KeyReply(job=offer.job, refusal=RefusalCode.INTERNAL)

    @property
    def _masking(self) -> MaskingKey:
        return MaskingKey.of(self.ledger.key, self.policy.name)

    def _shares(self, request: RoundRequest) -> NoiseShares | None:
        """How the noise of a masked sum is shared; None where this site adds all of it.

        Raises:
            RefusalError: for a cohort that this site does not know, or a plan and a request that do not fit.
        """
        if (request.plan.privacy.noise == "distributed") != bool(request.members):
            raise RefusalError(
                RefusalCode.MALFORMED,
                f'privacy.noise = "{request.plan.privacy.noise}" with a cohort of {len(request.members)}',
                "a cohort with distributed noise, and none with local noise",
                "the coordinator must follow its own plan",
            )
        if not request.members:
            return None
        return review_cohort(request.plan, request.members, self.policy, self._masking.member)

    def _release(self, request: RoundRequest) -> Update | MaskedUpdate:
        review_plan(request.plan, self.policy.limits)
        if self._consent(request.job, request.plan) is Consent.PENDING:
            raise RefusalError(
                RefusalCode.APPROVAL,
                f"run {request.job}, not approved",
                "the operator's approval before any round",
                "veil site approve shows the plan and asks",
            )
        review_request(request, self.policy.limits, self._expected(request.plan))  # may load a model, so not before
        shares = self._shares(request)
        release = release_of(request)
        review_history(request, self.ledger)
        noise = self.noise(request)
        claim = self.ledger.spend(
            request.job,
            release,
            noise=noise.name,
            plan=request.plan.sha256,
            review=affordable(
                request.plan, request.job, remaining(request, release), self.policy.limits, noise=noise.name
            ),
            masking=None if shares is None else Masking(session=request.session.hex(), shares=shares),
        )
        if shares is not None:
            return MaskedUpdate.from_bytes(claim.reply or self._masked(request, release, noise, shares, claim))
        if claim.reply is not None:
            return Update.from_bytes(claim.reply)
        update = self._draw(request, release, noise).narrowed(release.update_bits)
        return Update.from_bytes(self.ledger.record_reply(claim, update.to_bytes()))

    def _expected(self, plan: RunPlan) -> Mapping[str, tuple[int, ...]] | None:
        """Shapes of the tensors of a model that is tuned below its head.

        Raises:
            RefusalError: at a site that has no such models.
        """
        if not plan.transfer.deep:
            return None
        if self.model is None:
            raise RefusalError(
                RefusalCode.DATA, f'transfer.mode = "{plan.transfer.mode}"', "head", "the coordinator can tune a head"
            )
        return self.model(plan).shapes

    def _draw(self, request: RoundRequest, release: Release, noise: NoiseSource) -> Update:
        units = self.units(request.plan)
        if isinstance(units, Units):
            return draw(request, release, units, noise)
        from veil.client.tuned_release import draw_tuned  # late: torch takes seconds to load

        return draw_tuned(request, release, units, noise)

    def _masked(
        self, request: RoundRequest, release: Release, noise: NoiseSource, shares: NoiseShares, claim: Claim
    ) -> bytes:
        update = self._draw(request, release, SharedNoise(noise, shares.share))
        hidden = self._masking.mask(update, request.members, request.session)
        return self.ledger.record_reply(claim, hidden.to_bytes())

    def _reply(
        self,
        request: RoundRequest,
        *,
        released: Update | MaskedUpdate | None = None,
        refusal: RefusalCode | None = None,
    ) -> RoundReply:
        told = released is not None and self.policy.limits.release_counts
        return RoundReply(
            site=self.policy.name,
            job=request.job,
            round=request.round,
            update=released if isinstance(released, Update) else None,
            masked=released if isinstance(released, MaskedUpdate) else None,
            refusal=refusal,
            head="" if released is None else self.ledger.head(),
            units=self.units(request.plan).total if told else None,
        )
