# SPDX-License-Identifier: Apache-2.0
"""What the coordinator's operator may see at a glance: sites, runs, and which site said what.

Promises one document for the command line, the page and the metrics, so that the three never differ; and that looking
changes nothing and loads nothing of Flower: of its state, the nodes' table is read as it stands.
"""

from __future__ import annotations

import sqlite3
import time
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from veil.server.home import Home
from veil.server.jobs import Job
from veil.server.roster import enrolled_sites
from veil.server.tls_certificate import describe

_BUSY_S = 60.0
_TABLE = "SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = 'node'"
_ONLINE = "SELECT node_id FROM node WHERE status = 'online' AND online_until > ?"


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

    def sites(self) -> list[SiteView]:
        """All sites that were ever enrolled, oldest first."""
        online = _online(self._home.database)
        return [
            SiteView(
                name=site.name,
                connected=site.revoked_at is None and site.node_id in online,
                enrolled_at=site.enrolled_at.isoformat(timespec="seconds"),
                revoked_at=None if site.revoked_at is None else site.revoked_at.isoformat(timespec="seconds"),
            )
            for site in enrolled_sites(self._home.roster)
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


def _online(database: Path) -> set[int]:
    """The nodes whose last heartbeat Flower still counts; none while the link was never up."""
    if not database.exists():
        return set()
    with closing(sqlite3.connect(database, timeout=_BUSY_S)) as opened:
        opened.execute("PRAGMA query_only = ON")
        if opened.execute(_TABLE).fetchone() is None:
            return set()
        return {node % 2**64 for (node,) in opened.execute(_ONLINE, (time.time(),))}
