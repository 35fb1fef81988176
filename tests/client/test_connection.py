# SPDX-License-Identifier: Apache-2.0
"""Tests of `veil.client.connection`: a question whose sender died in the midst of it does not hold up the next."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from flwr.proto.message_pb2 import ObjectTree, PullObjectResponse

from veil.client import connection
from veil.client.connection import Connection, DeclinedError
from veil.common.keys import NodeKey

HALF = ObjectTree(object_id="0" * 64, children=[ObjectTree(object_id="1" * 64)])


@pytest.fixture
def line(tmp_path: Path, authority: Path) -> Connection:
    """A line whose other end announced a message and died before all its parts were there."""
    opened: Any = Connection("127.0.0.1:1", (authority / "ca.pem").read_bytes(), NodeKey.generate(), tmp_path / "node")
    opened._client.close()
    missing = PullObjectResponse(object_found=True, object_available=False)
    opened._client = SimpleNamespace(PullObject=lambda request: missing)
    return opened  # type: ignore[no-any-return]


def test_a_message_that_is_never_whole_is_given_up(line: Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flower alone would wait for it for hours, and the site would miss every later round."""
    monkeypatch.setattr(connection, "MISSING_S", 0.0)
    with pytest.raises(DeclinedError):
        line._fetch(1, HALF)
