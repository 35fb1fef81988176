# SPDX-License-Identifier: Apache-2.0
"""The one endpoint through which a site with an invitation becomes an enrolled site.

Promises that whoever has no valid invitation learns nothing but "refused"; the reason stands in the coordinator's log,
and the secret stands nowhere.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable
from http import HTTPStatus
from typing import Final

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect

from veil.common.errors import InputError, RunError
from veil.common.invitation import ENROL_PATH, Application
from veil.server.roster import Roster

_log = logging.getLogger(__name__)

MAX_BODY_BYTES: Final = 64 * 1024
"""Largest application that is read."""

FAILURES_PER_MINUTE: Final = 10
"""Applications of one address, not granted, after which its next ones are not looked at."""

_READ_S = 10.0
_MINUTE_S = 60.0
_ADDRESSES = 4096


class _Attempts:
    """Who tried how often in the last minute.

    Args:
        clock: seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._seen: dict[str, deque[float]] = {}

    def allow(self, address: str) -> bool:
        """Count an attempt; False when there were too many."""
        now = self._clock()
        seen = self._seen.pop(address, deque(maxlen=FAILURES_PER_MINUTE))
        self._seen[address] = seen
        if len(self._seen) > _ADDRESSES:
            del self._seen[next(iter(self._seen))]
        if len(seen) == FAILURES_PER_MINUTE and now - seen[0] < _MINUTE_S:
            return False
        seen.append(now)
        return True

    def forget(self, address: str) -> None:
        """Count an address's attempts no more: it had an invitation."""
        self._seen.pop(address, None)


def enrolment_router(roster: Roster, clock: Callable[[], float] = time.monotonic) -> APIRouter:
    """The route of enrolment: JSON of an `Application` in, `{"site": name}` out.

    Every other answer is `{"code": …}`: 403 refused, 408 slow, 413 large, 429 busy, 503 unavailable.

    Args:
        roster: who may enrol.
        clock: seconds, for counting failures.
    """
    router, attempts = APIRouter(), _Attempts(clock)

    @router.post(ENROL_PATH)
    async def enrol(request: Request) -> JSONResponse:
        address = request.client.host if request.client else ""
        if not attempts.allow(address):
            return _no(HTTPStatus.TOO_MANY_REQUESTS, "busy")
        try:
            async with asyncio.timeout(_READ_S):
                body = await _read(request)
        except (TimeoutError, ClientDisconnect):
            return _no(HTTPStatus.REQUEST_TIMEOUT, "slow")
        if body is None:
            return _no(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "large")
        answer = await run_in_threadpool(_answer, roster, body, address)
        if answer.status_code == HTTPStatus.OK:
            attempts.forget(address)
        return answer

    return router


async def _read(request: Request) -> bytes | None:
    """The body, or None as soon as it is too large."""
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > MAX_BODY_BYTES:
            return None
    return bytes(body)


def _answer(roster: Roster, body: bytes, address: str) -> JSONResponse:
    try:
        name = roster.admit(*_proven(body))
    except InputError as error:
        _log.warning("enrolment from %s refused: %s", address, error)
        return _no(HTTPStatus.FORBIDDEN, "refused")
    except RunError as error:
        _log.error("enrolment from %s failed: %s", address, error)
        return _no(HTTPStatus.SERVICE_UNAVAILABLE, "unavailable")
    return JSONResponse({"site": name})


def _proven(body: bytes) -> tuple[str, bytes]:
    """Secret and public key of an application that proves possession of the private key."""
    try:
        application = Application.model_validate_json(body)
    except ValidationError:
        raise InputError("the application cannot be read", "its three fields", "use Veil of one version") from None
    if not application.is_proven():
        raise InputError("the signature does not fit the key", "a proof of possession", "apply with the site's own key")
    return application.secret, application.public_key.encode()


def _no(status: HTTPStatus, code: str) -> JSONResponse:
    return JSONResponse({"code": code}, status_code=status)
