# SPDX-License-Identifier: Apache-2.0
"""What the coordinator's operator may see at a glance: sites, runs, and which site said what.

Promises one document for the command line, the page and the metrics, so that the three never differ.
"""

from __future__ import annotations

from contextlib import closing
from dataclasses import asdict, dataclass
from typing import Any

from flwr.supercore.constant import NodeStatus

from veil.server.home import Home
from veil.server.jobs import Job
from veil.server.link import open_link_state
from veil.server.roster import Roster
from veil.server.tls_certificate import describe


@dataclass(frozen=True, kw_only=True, slots=True)
class SiteView:
    """One enrolled site.

    Attributes:
        name: the site's.
        connected: whether its agent sent a heartbeat lately.
        enrolled_at: ISO 8601.
        revoked_at: ISO 8601, None while it is welcome.
    """

    name: str
    connected: bool
    enrolled_at: str
    revoked_at: str | None


class Overview:
    """Reads a coordinator's folder.

    Args:
        home: the folder.
    """

    def __init__(self, home: Home) -> None:
        self._home = home
        self._state = open_link_state(home.database).state()

    def sites(self) -> list[SiteView]:
        """All sites that were ever enrolled, oldest first."""
        with closing(Roster(self._home.roster, self._state)) as roster:
            sites = roster.sites()
        infos = self._state.get_node_info(node_ids=[site.node_id for site in sites if site.node_id])
        online = {info.node_id for info in infos if info.status == NodeStatus.ONLINE}
        return [
            SiteView(
                name=site.name,
                connected=site.revoked_at is None and site.node_id in online,
                enrolled_at=site.enrolled_at.isoformat(timespec="seconds"),
                revoked_at=None if site.revoked_at is None else site.revoked_at.isoformat(timespec="seconds"),
            )
            for site in sites
        ]

    def document(self) -> dict[str, Any]:
        """Everything, as JSON takes it."""
        return {
            "url": self._home.url,
            "certificate": self._certificate(),
            "sites": [asdict(site) for site in self.sites()],
            "runs": [{"name": job.name, **asdict(job.status)} for job in Job.all(self._home.runs)],
        }

    def _certificate(self) -> dict[str, Any]:
        pem = self._home.path(self._home.settings.certificate).read_bytes()
        found = describe(pem)
        return {"not_after": found.not_after.isoformat(timespec="seconds"), "days_left": found.days_left}
