# SPDX-License-Identifier: Apache-2.0
"""With whom a site shares the noise of a masked sum: the coordinator's word against the keys that the operator pinned.

Promises that no key that the operator did not pin, under the name it was pinned for, is ever masked against, and that
the answer depends on plan, request and site file alone, never on the records.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

from veil.client.policy import Limits, SitePolicy
from veil.common.errors import RefusalCode, RefusalError
from veil.common.masking import Member
from veil.common.plan import RunPlan
from veil.common.privacy import NoiseShares

_PINNING = "veil site peers says which keys there are; pin each under [peers] once its owner has read it out to you"


def review_sharing(plan: RunPlan, policy: SitePolicy) -> None:
    """Refuse a plan whose masked sums this site would not take part in, whoever else does.

    Raises:
        RefusalError: naming the plan's value and what the site expects.
    """
    if plan.privacy.noise == "local":
        return
    smallest = smallest_cohort(plan, policy.limits)
    if len(policy.peers) + 1 < smallest:
        raise RefusalError(
            RefusalCode.POLICY,
            f'privacy.noise = "distributed" with {len(policy.peers)} sites pinned under [peers]',
            f"{smallest - 1} or more, as a masked sum has at least {smallest} sites with this one",
            _PINNING,
        )
    _check_colluding(plan, policy, smallest)


def smallest_cohort(plan: RunPlan, limits: Limits) -> int:
    """The fewest sites of a masked sum of this plan that this site would be one of."""
    return max(plan.cohort.min_sites, limits.min_cohort)


def _check_colluding(plan: RunPlan, policy: SitePolicy, sites: int) -> None:
    wanted = policy.limits.colluding_of_ten * sites // 10
    if plan.cohort.colluding(sites) < wanted:
        raise RefusalError(
            RefusalCode.POLICY,
            f"a masked sum of {sites} sites of which cohort.colluding_sites = {plan.cohort.colluding(sites)}",
            f"{wanted} or more, as limits.colluding_of_ten = {policy.limits.colluding_of_ten} says",
            "the coordinator can admit more colluding sites",
        )


def review_cohort(plan: RunPlan, members: tuple[Member, ...], policy: SitePolicy, own: Member) -> NoiseShares:
    """Check whom a masked sum is said to be over.

    Args:
        plan: the run's plan.
        members: the cohort, by name.
        policy: the site's, with the keys that its operator pinned.
        own: this site's part.

    Returns:
        how the noise is shared.

    Raises:
        RefusalError: with the code `malformed` for what is no cohort with this site in it, `policy` for one that is
            too small, or has a member or a key in it that is not pinned.
    """
    names = [one.site for one in members]
    if names != sorted(set(names)) or len({one.masking_key for one in members}) != len(members):
        raise _malformed("a cohort with a name or key twice, or out of order", "each site once, by name")
    if (own.site, own.masking_key) not in {(one.site, one.masking_key) for one in members}:
        raise _malformed("a cohort without this site, or with another key for it", "this site with its own key")
    smallest = smallest_cohort(plan, policy.limits)
    if len(members) < smallest:
        raise RefusalError(
            RefusalCode.POLICY,
            f"a masked sum of {len(members)} sites",
            f"at least {smallest}, by the plan's cohort.min_sites and limits.min_cohort",
            "the coordinator can wait for more sites",
        )
    for fault in _strangers(members, tuple(sorted(policy.peers.items())), own.site):
        raise RefusalError(RefusalCode.POLICY, fault, "sites and keys that are pinned under [peers]", _PINNING)
    _check_colluding(plan, policy, len(members))
    return NoiseShares(sites=len(members), colluding=plan.cohort.colluding(len(members)))


@lru_cache(maxsize=256)
def _strangers(members: tuple[Member, ...], peers: tuple[tuple[str, str], ...], own: str) -> tuple[str, ...]:
    """What is wrong with the others; the same cohort comes every round."""
    return tuple(_faults(members, dict(peers), own))


def _faults(members: tuple[Member, ...], peers: dict[str, str], own: str) -> Iterator[str]:
    for one in members:
        if one.site == own:
            continue
        if one.site not in peers:
            yield f"site {one.site!r} in the cohort, which is not pinned"
        elif one.fingerprint != peers[one.site]:
            yield f"site {one.site!r} with key {one.fingerprint}, where {peers[one.site]} is pinned"
        elif not one.genuine:
            yield f"site {one.site!r} with a masking key that its own key did not sign"


def _malformed(found: str, expected: str) -> RefusalError:
    return RefusalError(RefusalCode.MALFORMED, found, expected, "the coordinator must name the cohort as it is")
