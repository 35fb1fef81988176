# SPDX-License-Identifier: Apache-2.0
"""What a site last said in a run, in words for the coordinator's operator; the code stays what it is in documents.

Promises to say no more than the code does: why a site refused is the site's own business, and its log's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from veil.common.errors import RefusalCode

_REFUSED: Final[Mapping[str, str]] = {
    RefusalCode.BUDGET: "the run would pass its budget",
    RefusalCode.POLICY: "the plan goes beyond its limits",
    RefusalCode.PLAN_CHANGED: "another plan than in earlier rounds",
    RefusalCode.REPLAY: "answered twice in one round",
    RefusalCode.MALFORMED: "a message that could not be read: compare versions",
    RefusalCode.LEDGER: "its ledger is not in order",
    RefusalCode.APPROVAL: "not approved there",
    RefusalCode.BACKBONE: "it has no pretrained weights for it",
    RefusalCode.DATA: "its table does not fit the task",
    RefusalCode.BUNDLE: "it runs no code that is sent",
    RefusalCode.INTERNAL: "something failed there: its log says what",
}

_WAITING: Final[Mapping[str, str]] = {
    "pending": "waits for its operator",
    "lacks-backbone": "waits for the pretrained weights",
}


def in_words(said: str) -> str:
    """ready, pending, replied, or a refusal's code, as it is to be read."""
    if said in _REFUSED:
        return f"refused ({said}: {_REFUSED[said]})"
    return _WAITING.get(said, said)
