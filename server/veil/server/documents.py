# SPDX-License-Identifier: Apache-2.0
"""What stands beside a run's report: the certificate, the statement in plain words, and the model card.

Promises that all three say the same: the pages are made from the certificate, after it was checked as anyone checks it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from veil.common.certificate import RoundSites, assemble
from veil.common.head import HEAD_FILE
from veil.common.keys import NodeKey
from veil.common.plan import RunPlan
from veil.common.verdict import Verdict, judge_certificate
from veil.server.anomaly import ANOMALY_FILE
from veil.server.model_card import model_card
from veil.server.state import RoundRecord
from veil.server.statement_page import statement_page
from veil.server.statements import Evidence

CERTIFICATE, STATEMENT, MODEL_CARD = "certificate.json", "statement.html", "model-card.html"


def write_documents(
    folder: Path,
    plan: RunPlan,
    job: str,
    *,
    records: Sequence[RoundRecord],
    evidence: Evidence,
    report: Mapping[str, Any],
    key: NodeKey,
    simulation: bool,
) -> Verdict:
    """Write the three files.

    Args:
        folder: the run's result, with the folder `model` in it.
        plan: what was run.
        job: the run's name.
        records: its rounds.
        evidence: what the sites said.
        report: the run's report.json.
        key: the coordinator's.
        simulation: whether the sites are simulated.

    Returns:
        the verdict on the certificate that was written.
    """
    head, anomaly = folder / "model" / HEAD_FILE, folder / "model" / ANOMALY_FILE
    certificate = assemble(
        plan,
        job,
        rounds=[RoundSites(round=one.round, kind=one.kind.value, sites=one.sites) for one in records],
        statements=evidence.statements,
        missing=evidence.missing,
        adapter_sha256=_sha256(head),
        anomaly_sha256=_sha256(anomaly) if anomaly.exists() else None,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        veil_version=version("veil"),
        simulation=simulation,
        key=key,
    )
    verdict = judge_certificate(certificate, {})
    (folder / CERTIFICATE).write_bytes(certificate.encode())
    (folder / STATEMENT).write_text(statement_page(certificate, verdict, plan), encoding="utf-8")
    (folder / MODEL_CARD).write_text(model_card(certificate, verdict, plan, report), encoding="utf-8")
    return verdict


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
