# SPDX-License-Identifier: Apache-2.0
"""Enrolment: a site's key, shown once to the coordinator together with an invitation.

Promises that the secret goes to nobody but a coordinator that the invitation's own certificates vouch for, through no
proxy, and that the private key goes to nobody.
"""

from __future__ import annotations

import json
import ssl
import time
from datetime import UTC, datetime
from http import HTTPStatus
from typing import Final

import httpx

from veil.common.errors import InputError, RunError, VeilError
from veil.common.invitation import ENROL_PATH, Application, Invitation
from veil.common.keys import NodeKey

DEADLINE_S: Final = 60.0
"""Seconds after which an answer is no longer read."""

_WAIT_S = 20.0
_MAX_ANSWER_BYTES = 4096
_HEADERS = {"Content-Type": "application/json", "Accept-Encoding": "identity"}


def enrol(invitation: Invitation, key: NodeKey) -> None:
    """Enrol a site. Doing it again with the same invitation and key is harmless.

    Args:
        invitation: as the coordinator's operator gave it.
        key: the site's.

    Raises:
        InputError: when the coordinator refuses, or is not the one of the invitation.
        RunError: when it cannot be reached, or gives no usable answer.
    """
    status, answer = _post(invitation, Application.sign(invitation.secret, key).model_dump_json())
    if status == HTTPStatus.FORBIDDEN:
        raise _refused(invitation)
    if status == HTTPStatus.TOO_MANY_REQUESTS:
        raise RunError(f"{invitation.url} takes no application now", "fewer attempts", "try again in two minutes")
    if status != HTTPStatus.OK or answer != {"site": invitation.site}:
        raise RunError(
            f"{invitation.url} answered with status {status} and no enrolment of {invitation.site}",
            "a coordinator of this version of Veil",
            "compare versions with the coordinator's operator, and look into the coordinator's log",
        )


def _post(invitation: Invitation, content: str) -> tuple[int, object]:
    """Status and JSON of the answer; None for what is no JSON."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(cadata=invitation.ca)
    try:
        with (
            httpx.Client(verify=context, trust_env=False, timeout=_WAIT_S) as client,
            client.stream("POST", invitation.url + ENROL_PATH, content=content, headers=_HEADERS) as response,
        ):
            return response.status_code, _json(_read(response))
    except httpx.HTTPError as error:
        raise _unreachable(invitation, error) from None


def _read(response: httpx.Response) -> bytes:
    """The answer's beginning: no more than an honest one has, and no longer than the deadline."""
    end, body = time.monotonic() + DEADLINE_S, b""
    for part in response.iter_raw():
        body += part
        if len(body) > _MAX_ANSWER_BYTES or time.monotonic() > end:
            break
    return body


def _json(body: bytes) -> object:
    try:
        return json.loads(body)
    except ValueError:
        return None


def _refused(invitation: Invitation) -> InputError:
    ended = f" (it ended on {invitation.expires:%Y-%m-%d %H:%M %Z})" if invitation.expired(datetime.now(UTC)) else ""
    return InputError(
        f"{invitation.url} refuses the invitation for {invitation.site}{ended}",
        "an invitation that is valid, and was not used with another key",
        "ask the coordinator's operator for a new one; the coordinator's log has the reason",
    )


def _unreachable(invitation: Invitation, error: httpx.HTTPError) -> VeilError:
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, ssl.SSLCertVerificationError):
        cause = cause.__cause__ or cause.__context__
    if cause is not None:
        return InputError(
            f"{invitation.url} is not the coordinator of the invitation ({cause.verify_message})",
            "a valid certificate for this address, from the invitation's authority",
            "check both clocks, then ask the coordinator's operator; the secret was not sent",
        )
    return RunError(
        f"{invitation.url} cannot be reached ({type(error).__name__}: {error})",
        "the coordinator's port, open to this machine",
        "check address, network and firewall, then enrol again",
    )
