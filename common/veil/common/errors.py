# SPDX-License-Identifier: Apache-2.0
"""Every error a person can meet, each saying value, expectation and remedy.

    VeilError                     exit code
    ├── InputError                2   a plan, a table, an option, a file is not usable as given
    │   ├── PlanError             2   … the plan file
    │   ├── TableError            2   … the records
    │   └── WeightsError          2   … the pretrained weights
    ├── RefusalError              3   a site's policy or budget says no
    └── RunError                  4   the run started and could not be finished

The command line prints the message on stderr and exits with the code; nothing here is ever sent to another
party, because messages may quote local values.
"""

from __future__ import annotations

from enum import StrEnum


class VeilError(Exception):
    """An error with a message for a person and an exit code for a script.

    Args:
        value: what was found, e.g. ``"privacy.target_epsilon = -1"``.
        expectation: what would have been right.
        remedy: what to do about it.
    """

    exit_code = 4

    def __init__(self, value: str, expectation: str, remedy: str) -> None:
        self.value, self.expectation, self.remedy = value, expectation, remedy
        super().__init__(value, expectation, remedy)

    def __str__(self) -> str:
        return f"{self.value}. Expected: {self.expectation}. Remedy: {self.remedy}."


class InputError(VeilError):
    """Something given is not usable as it is."""

    exit_code = 2


class PlanError(InputError):
    """The plan file cannot be parsed, or asks for something contradictory."""


class TableError(InputError):
    """The records cannot be read as the plan or the site file describes them."""


class WeightsError(InputError):
    """The pretrained weights are missing, damaged, unpinned, or not the pinned ones."""


class RefusalCode(StrEnum):
    """Why a site said no: the only words about a refusal that ever leave the site."""

    BUDGET = "budget"
    POLICY = "policy"
    PLAN_CHANGED = "plan-changed"
    REPLAY = "replay"
    MALFORMED = "malformed"
    LEDGER = "ledger"
    APPROVAL = "approval"
    BACKBONE = "backbone"
    DATA = "data"
    BUNDLE = "bundle"
    INTERNAL = "internal"


class RefusalError(VeilError):
    """A site's policy or ledger does not allow what was asked.

    Args:
        code: the short public reason; everything else stays on the site's own screen.
    """

    exit_code = 3

    def __init__(self, code: RefusalCode, value: str, expectation: str, remedy: str) -> None:
        super().__init__(value, expectation, remedy)
        self.code = code
        self.args = (code, value, expectation, remedy)


class RunError(VeilError):
    """A run that had started could not be finished."""

    exit_code = 4
