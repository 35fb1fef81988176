# SPDX-License-Identifier: Apache-2.0
"""A deployed site: everything its site.toml names, put together; run as a module, it is the agent's executor.

Promises that its noise is the operating system's: nothing in a file, a message, an option or an environment names
another.
"""

from __future__ import annotations

from pathlib import Path

from flwr.clientapp import ClientApp

from veil.client.app import client_app
from veil.client.approvals import Approvals, Decision
from veil.client.attest import AUDIT_FILE
from veil.client.backbone_store import BackboneStore
from veil.client.executor import main
from veil.client.ledger import Ledger
from veil.client.records import SiteRecords, check_columns, look
from veil.client.site import Consent, Site
from veil.client.site_file import SiteFile, read_site_file
from veil.common.keys import NodeKey
from veil.common.noise import OSNoise
from veil.common.plan import RunPlan


def assemble(file: SiteFile) -> Site:
    """The site of a site file, with its ledger open and locked.

    Raises:
        VeilError: when the key, the ledger or the anchor is not as it must be.
    """
    agent = file.agent
    agent.state.mkdir(parents=True, exist_ok=True, mode=0o700)
    store = backbone_store(file)
    records = SiteRecords(file, store.find_backbone)
    return Site(
        policy=file.policy,
        ledger=Ledger(agent.ledger, file.name, NodeKey.load(agent.key), anchor=agent.anchor),
        units=records,
        model=records.model,
        noise=lambda request: OSNoise(),
        consent=Operator(Approvals(agent.runs), file).consent,
        backbones=store,
        audit=agent.state / AUDIT_FILE,
    )


class Operator:
    """What the site's operator says to a run, in person or through the site file.

    Args:
        approvals: what was said in person.
        file: which columns there are, and whether the limits speak for the operator.
    """

    def __init__(self, approvals: Approvals, file: SiteFile) -> None:
        self._approvals, self._file = approvals, file

    def consent(self, job: str, plan: RunPlan) -> Consent:
        """The word on a job with a plan; a job that was never seen is written down for the operator to decide.

        Raises:
            RefusalError: with the code `data`, for a plan that the site's columns cannot serve.
        """
        check_columns(self._file.data, plan.task)
        decision = self._approvals.note(job, plan).decision
        if decision is Decision.REFUSED:
            return Consent.DENIED
        automatic = self._file.limits.approval == "auto-within-limits"
        return Consent.GIVEN if automatic or decision is Decision.APPROVED else Consent.PENDING


def backbone_store(file: SiteFile) -> BackboneStore:
    """Where the site's backbones are."""
    agent = file.agent
    accept = file.limits.accept_backbone
    return BackboneStore(agent.backbones, mirror=agent.mirror, accept=accept, device=agent.device)


def open_app(path: Path) -> ClientApp:
    """The ClientApp of a site file, once all its records were read.

    A table that cannot be read ends it here, before any coordinator could learn of it by asking for rounds.

    Raises:
        VeilError: as `assemble` and `look`.
    """
    file = read_site_file(path)
    look(file)
    site = assemble(file)
    return client_app(lambda context: site)


if __name__ == "__main__":
    main(open_app)
