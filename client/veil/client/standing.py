# SPDX-License-Identifier: Apache-2.0
"""How a site stands: its agent, the runs that wait, the last refusals in plain words, and what everything cost.

Promises to read only, and to work whether the agent runs or not.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from veil.client.approvals import Approvals, Decision
from veil.client.ledger import entries_of, total, without_masks
from veil.client.site_file import SiteFile
from veil.client.wording import REFUSALS
from veil.common.privacy import PrivacySpent


@dataclass(frozen=True, kw_only=True, slots=True)
class Standing:
    """What `veil site status` shows.

    Attributes:
        site: its name.
        coordinator: whom it answers to.
        agent: running, not connected, or stopped.
        answered: rounds answered since the agent's start.
        refused: offers and rounds refused since then, by code.
        waiting: runs that wait for the operator.
        spent: of everything so far.
        unmasked: the same if this site's masks were taken off; None where it never shared noise.
        lifetime: the limit on its ε.
        runs: what each run cost.
    """

    site: str
    coordinator: str
    agent: str
    answered: int
    refused: Mapping[str, int]
    waiting: tuple[str, ...]
    spent: PrivacySpent
    unmasked: PrivacySpent | None
    lifetime: float
    runs: Mapping[str, PrivacySpent]

    def document(self) -> dict[str, Any]:
        """As JSON takes it; an ε that is not finite, of noise that was not private, is null."""
        return {
            "site": self.site,
            "coordinator": self.coordinator,
            "agent": self.agent,
            "answered": self.answered,
            "refused": dict(self.refused),
            "waiting": list(self.waiting),
            "epsilon": self.spent.finite_epsilon,
            "epsilon_alone": self.unmasked.finite_epsilon if self.unmasked else None,
            "lifetime": self.lifetime,
            "delta": self.spent.delta,
            "runs": {job: spent.finite_epsilon for job, spent in self.runs.items()},
        }

    def lines(self) -> Iterator[str]:
        """As a person reads it."""
        yield f"{self.site} at {self.coordinator}: agent {self.agent}"
        yield f"answered {self.answered} rounds since its start"
        for code, count in self.refused.items():
            words = REFUSALS[code]
            yield f"refused {count} ({code}): {words.meaning}; {words.remedy}"
        for run in self.waiting:
            yield f"waits for your word: {run}"
        for run, spent in self.runs.items():
            yield f"run {run}: ε {spent.epsilon:.4g}"
        yield f"everything so far: ε {self.spent.epsilon:.4g} of {self.lifetime:g} at δ = {self.spent.delta:g}"
        if self.unmasked is not None:
            yield f"if this site's masks were taken off: ε {self.unmasked.epsilon:.4g}"


def standing(file: SiteFile) -> Standing:
    """Look at a site.

    Raises:
        RefusalError: when the ledger cannot be read.
    """
    path, delta = file.agent.ledger, file.limits.delta
    entries = entries_of(path, file.name) if path.exists() else ()
    said = _said(file)
    asks = file.limits.approval == "ask"
    runs = Approvals(file.agent.runs).runs() if asks else ()
    return Standing(
        site=file.name,
        coordinator=file.coordinator.url,
        agent=_agent(said),
        answered=int(said.get("released", 0)),
        refused=said.get("refused", {}),
        waiting=tuple(one.job for one in runs if one.decision is Decision.PENDING),
        spent=total(entries, delta),
        unmasked=without_masks(entries, delta),
        lifetime=file.limits.epsilon_lifetime,
        runs={job: total(entries, delta, job) for job in dict.fromkeys(one.job for one in entries)},
    )


def _said(file: SiteFile) -> dict[str, Any]:
    try:
        said = json.loads(file.agent.status.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return said if isinstance(said, dict) else {}


def _agent(said: Mapping[str, Any]) -> str:
    try:
        os.kill(int(said["pid"]), 0)
    except (KeyError, OSError, ValueError):
        return "stopped"
    ago = max(0.0, time.time() - float(said.get("since", 0)))
    return "connected" if said.get("connected") else f"not connected for {ago:.0f} s"
