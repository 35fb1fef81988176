# SPDX-License-Identifier: Apache-2.0
"""`veil site init`: an invitation and an operator's answers become a site's folder, and the site is enrolled.

Promises that nothing there already is overwritten, and that doing it again after a failure goes on where it stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from veil.client.enrol import enrol
from veil.client.site_file import SITE_FILE, SiteFile, parse_site, read_site_file
from veil.client.site_form import write_site_file
from veil.common.durable import PUBLIC, write_new
from veil.common.errors import InputError
from veil.common.invitation import Invitation
from veil.common.keys import NodeKey

_CA = "keys/coordinator.pem"


def join(invitation: Invitation, home: Path, answers: Callable[[], Mapping[str, Any]]) -> SiteFile:
    """Make a site's folder and enrol the site.

    Args:
        invitation: as the coordinator's operator gave it.
        home: the folder; made when missing.
        answers: what the operator says about data, limits and agent, in the shape of site.toml; asked only when there
            is no site.toml yet.

    Raises:
        InputError: when an answer is not usable, the folder is another site's, or the coordinator refuses.
        RunError: when the coordinator cannot be reached; then do it again.
    """
    path = home / SITE_FILE
    coordinator = {"url": invitation.url, "ca": _CA}
    if path.exists():
        file = read_site_file(path)
        _check_same(file, invitation, path)
    else:
        document = {**answers(), "name": invitation.site, "coordinator": coordinator}
        parse_site(document, path)
        home.mkdir(parents=True, exist_ok=True, mode=0o700)
        file = write_site_file(path, document)
    file.agent.key.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    if not file.agent.key.exists():
        NodeKey.generate().save(file.agent.key)
    _write_ca(file.coordinator.ca, invitation.ca)
    enrol(invitation, NodeKey.load(file.agent.key))
    return file


def _check_same(file: SiteFile, invitation: Invitation, path: Path) -> None:
    if (file.name, file.coordinator.url) != (invitation.site, invitation.url):
        raise InputError(
            f"{path} is of {file.name} at {file.coordinator.url}",
            f"{invitation.site} at {invitation.url}, as the invitation says",
            "give another folder with --home",
        )


def _write_ca(path: Path, pem: str) -> None:
    try:
        write_new(path, pem.encode("ascii"), PUBLIC)
    except FileExistsError:
        if path.read_text(encoding="ascii") != pem:
            raise InputError(
                f"{path} holds another authority than the invitation", "the same", "move it away if it was exchanged"
            ) from None
