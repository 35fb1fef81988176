# SPDX-License-Identifier: Apache-2.0
"""What stands beside a tuned model: the report of its run, and the certificate.

Promises that neither is believed of a model that it is not about: the plan's hash must be the model's, and where there
is a certificate, the tuned part's as well.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from veil.common.errors import InputError
from veil.common.head import HEAD_FILE
from veil.common.plan import RunPlan
from veil.common.verdict import Verdict, judge
from veil.server.documents import CERTIFICATE

REPORT = "report.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Lineage:
    """Where a tuned model comes from.

    Attributes:
        report: its run's; None where none of this model was there.
        verdict: on its certificate, all ε computed anew; None where none of this model was there.
    """

    report: Mapping[str, Any] | None = None
    verdict: Verdict | None = None

    @classmethod
    def of(cls, model: Path, plan: RunPlan) -> Lineage:
        """Look beside a model.

        Args:
            model: the folder `model` of a finished run.
            plan: the model's.
        """
        beside = model.resolve().parent
        report, verdict = _report(beside / REPORT), _verdict(beside / CERTIFICATE)
        if report is not None and report.get("plan_sha256") != plan.sha256:
            report = None
        if verdict is not None and not _certifies(verdict, model, plan):
            return cls()
        return cls(report=report, verdict=verdict)

    @property
    def features(self) -> tuple[str, ...]:
        """The numeric columns in the order they were trained in, where the report tells."""
        simulation = self.report["plan"].get("simulation") if self.report else None
        return tuple((simulation or {}).get("features") or ())


def _report(path: Path) -> Mapping[str, Any] | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and isinstance(found.get("plan"), dict) else None


def _verdict(path: Path) -> Verdict | None:
    try:
        return judge(path, {})
    except InputError:
        return None


def _certifies(verdict: Verdict, model: Path, plan: RunPlan) -> bool:
    if verdict.run is None:
        return False
    digest = hashlib.sha256((model / HEAD_FILE).read_bytes()).hexdigest()
    return (verdict.run.plan_sha256, verdict.run.adapter_sha256) == (plan.sha256, digest)
