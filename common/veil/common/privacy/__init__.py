# SPDX-License-Identifier: Apache-2.0
"""Privacy arithmetic: what was done (Mechanism), what it cost (spent), how much noise a promise needs (calibrate).

Promises that every figure errs to the private side and that nothing here reads a record.
"""

from veil.common.privacy.accounting import gaussian_mu_squared, spent, spent_over_runs
from veil.common.privacy.calibration import calibrate, gaussian_sigma
from veil.common.privacy.mechanism import (
    Mechanism,
    NeighboringRelation,
    PrivacyBudget,
    PrivacySpent,
    PrivacyUnit,
)
from veil.common.privacy.shares import NoiseShares

__all__ = [
    "Mechanism",
    "NeighboringRelation",
    "NoiseShares",
    "PrivacyBudget",
    "PrivacySpent",
    "PrivacyUnit",
    "calibrate",
    "gaussian_mu_squared",
    "gaussian_sigma",
    "spent",
    "spent_over_runs",
]
