# SPDX-License-Identifier: Apache-2.0
"""A site: its name, policy, ledger, noise and records, and how it answers one round.

Promises the order review → spend → train → record → answer, and that an error inside becomes a short code, because
its text may quote a record.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

from veil.client.ledger import Ledger
from veil.client.policy import SitePolicy
from veil.client.release import draw
from veil.client.review import affordable, release_of, review_request
from veil.client.units import Units
from veil.common.errors import RefusalCode, RefusalError, VeilError
from veil.common.exchange import RoundReply, RoundRequest
from veil.common.noise import NoiseSource
from veil.common.plan import RunPlan
from veil.common.update import Update

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Site:
    """One data owner.

    Attributes:
        policy: what the owner allows.
        ledger: what was done already.
        units: the records as a plan needs them: frozen features, labels, units. Called after the spend.
        noise: where a round's randomness comes from; outside simulations always `OSNoise`.
    """

    policy: SitePolicy
    ledger: Ledger
    units: Callable[[RunPlan], Units]
    noise: Callable[[RoundRequest], NoiseSource]

    def answer(self, request: RoundRequest) -> RoundReply:
        """One round: an update, or the code of a refusal. Never raises."""
        try:
            return self._reply(request, update=self._release(request))
        except RefusalError as refusal:
            _log.warning("%s refuses round %d of %s: %s", self.policy.name, request.round, request.job, refusal)
            return self._reply(request, refusal=refusal.code)
        except VeilError as error:
            _log.error("%s cannot do round %d of %s: %s", self.policy.name, request.round, request.job, error)
            return self._reply(request, refusal=RefusalCode.INTERNAL)
        except Exception:
            _log.exception("%s failed in round %d of %s", self.policy.name, request.round, request.job)
            return self._reply(request, refusal=RefusalCode.INTERNAL)

    def _release(self, request: RoundRequest) -> Update:
        review_request(request, self.policy.limits)
        release = release_of(request)
        noise = self.noise(request)
        claim = self.ledger.spend(
            request.job,
            release,
            noise=noise.name,
            plan=request.plan.sha256,
            review=affordable(request, release, self.policy.limits, noise=noise.name),
        )
        if claim.reply is not None:
            return Update.from_bytes(claim.reply)
        update = draw(request, release, self.units(request.plan), noise)
        self.ledger.record_reply(claim, update.to_bytes())
        return update

    def _reply(
        self, request: RoundRequest, *, update: Update | None = None, refusal: RefusalCode | None = None
    ) -> RoundReply:
        return RoundReply(site=self.policy.name, job=request.job, round=request.round, update=update, refusal=refusal)
