# SPDX-License-Identifier: Apache-2.0
"""A plan on its way from the operator's file to a run: everything that can be wrong with it is found here.

Promises that a submitted plan names enrolled sites, has noise that keeps its promise, and pins every byte of a backbone
that lies on the coordinator's own shelf, so that nothing outside the folder can change a run any more.
"""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

from veil.common.errors import InputError, PlanError
from veil.common.plan import RunPlan
from veil.common.plan_sections import Backbone
from veil.common.schedule import schedule
from veil.common.weights import locate
from veil.server.delivery import BackboneShelf
from veil.server.home import Home
from veil.server.jobs import Job
from veil.server.link import open_link_state
from veil.server.roster import Roster


def submit(home: Home, plan: RunPlan, *, base: Path, sites: tuple[str, ...]) -> Job:
    """Put a run where the coordinator finds it.

    Args:
        home: the coordinator's folder.
        plan: what to run.
        base: folder that relative paths of the plan start from.
        sites: whom to ask; all that are enrolled when empty.

    Raises:
        InputError: for a site that is not enrolled, or too few of them.
        PlanError: for a plan that cannot be run over a network.
        WeightsError: when the backbone is not to be had, or not the pinned one.
    """
    asked = _asked(home, sites)
    if len(asked) < plan.cohort.min_sites:
        raise InputError(
            f"{len(asked)} sites to ask ({', '.join(asked) or 'none'})",
            f"at least cohort.min_sites = {plan.cohort.min_sites}",
            "veil coordinator invite enrols more",
        )
    if plan.backbone is None and plan.task.width is None:
        raise PlanError(
            "a plan without backbone and task.width", "the number of numeric columns of every site", "add task.width"
        )
    public = plan.public()
    if public.backbone is not None:
        public = public.model_copy(update={"backbone": _shelve(home, public.backbone, base)})
    schedule(public)
    return Job.submit(home.runs, public, asked)


def _asked(home: Home, sites: tuple[str, ...]) -> tuple[str, ...]:
    with closing(Roster(home.roster, open_link_state(home.database).state())) as roster:
        enrolled = [site.name for site in roster.sites() if site.revoked_at is None]
    strangers = [site for site in sites if site not in enrolled]
    if strangers:
        raise InputError(
            f"{', '.join(strangers)}: not enrolled",
            f"of {', '.join(enrolled) or 'no site'}",
            "veil coordinator invite enrols a site; veil coordinator status lists them",
        )
    return tuple(sorted(set(sites or enrolled)))


def _shelve(home: Home, backbone: Backbone, base: Path) -> Backbone:
    """Pin configuration and tokenizer too, and take a copy of all of it."""
    pinned = backbone
    if backbone.files_sha256 is None:
        files = locate(backbone, base=base).files_sha256
        pinned = backbone.model_copy(update={"files_sha256": files})
    BackboneShelf(home.shelf).manifest(pinned, base=base)
    return pinned
