# SPDX-License-Identifier: Apache-2.0
"""The site's log for its data-protection officer: every ledger line and every decision, in one document.

Promises that it holds neither a record nor an answer that left, and that whoever has the site's public key can check
the chain and the signatures in it without this program.
"""

from __future__ import annotations

import json
from contextlib import closing
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

from veil.client.approvals import Approvals
from veil.client.ledger import entries_of, total
from veil.client.lines import LineFile
from veil.client.site_file import SiteFile
from veil.client.verification import verify
from veil.common.keys import NodeKey


def build_log(file: SiteFile) -> dict[str, Any]:
    """The document.

    Args:
        file: the operator's file.

    Raises:
        InputError: when there is no ledger.
        RefusalError: when it cannot be read.
    """
    path, key = file.agent.ledger, NodeKey.load(file.agent.key)
    found = verify(path, file.name, key.public_pem, anchor=file.agent.anchor)
    with closing(LineFile(path, reading=True)) as book:
        lines = book.lines(file.name)
    entries = entries_of(path, file.name)
    limits = file.limits
    return {
        "site": file.name,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "veil_version": version("veil"),
        "public_key": key.public_pem.decode("ascii"),
        "limits": limits.model_dump(mode="json"),
        "spent": {
            "epsilon": total(entries, limits.delta).finite_epsilon,
            "delta": limits.delta,
            "unit": limits.unit.value,
            "runs": {
                job: total(entries, limits.delta, job).finite_epsilon
                for job in dict.fromkeys(one.job for one in entries)
            },
        },
        "ledger": {
            "head": found.head,
            "findings": [str(one) for one in found.findings],
            "lines": [
                {
                    "prev": line.prev,
                    "body": line.body.decode("utf-8"),
                    "hash": line.hash,
                    "signature": line.signature.hex(),
                }
                for line in lines
            ],
        },
        "decisions": [
            {
                "run": asked.job,
                "plan_sha256": asked.plan_sha256,
                "plan": json.loads(asked.plan_json),
                "asked": asked.first_seen,
                "decision": asked.decision.value,
                "decided": asked.decided,
            }
            for asked in Approvals(file.agent.runs).runs()
        ],
    }
