# SPDX-License-Identifier: Apache-2.0
"""How alike a simulation's model serves groups of records: exact rates by group and their gaps, by fairlearn.

Promises that a rate stands with the interval that the number of its records allows, and a gap with one that counts
that it is the largest of several; nothing here exists in a deployed run, whose groups `evaluation.groups` compares.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from veil.common.errors import TableError
from veil.common.evaluation import CONFIDENCE, Figure, NoisyCounts
from veil.common.group_quality import largest_gap, pair_quantile

MOST_GROUPS: Final = 50
"""Groups that a simulation compares, at most: a column with more is an identifier, or a number."""

ON: Final = "all sites' held-out records, exact, which only a simulation can see; taken as independent"

_NOBODY: Final = "no such records"


def check_groups(groups: NDArray[np.str_] | None) -> None:
    """Refuse a column that does not divide records into groups.

    Args:
        groups: each record's, empty where it is not known, [n]; None where no column is named.

    Raises:
        TableError: for fewer than two groups, or more than `MOST_GROUPS`.
    """
    if groups is None:
        return
    count = len(set(groups.tolist()) - {""})
    if not 2 <= count <= MOST_GROUPS:
        raise TableError(
            f"simulation.group names a column with {count} groups",
            f"2 to {MOST_GROUPS}",
            "name another column, or map its values to groups in simulation.groups",
        )


def fairness(
    answers: NDArray[np.floating], labels: NDArray[np.int64], groups: NDArray[np.str_], names: Sequence[str]
) -> dict[str, Any] | None:
    """Rates by group, and the largest differences between two groups.

    Args:
        answers: class probabilities of held-out records, [n, c].
        labels: their classes, [n].
        groups: their groups, empty where it is not known, [n].
        names: of the classes.

    Returns:
        plain values; None where fewer than two groups are among the records.
    """
    known = groups != ""
    present = sorted(set(groups[known].tolist()))
    if len(present) < 2:
        return None
    guesses, truth, of = answers.argmax(axis=1)[known], labels[known], groups[known]
    rates = rates_of(guesses, truth, names)
    points = _by_group(guesses, truth, of, names)
    by_group = {
        group: {
            "count": int((of == group).sum()),
            **{rate: _told(part[of == group], points[rate][group]) for rate, part in rates.items()},
        }
        for group in present
    }
    return {
        "on": ON,
        "confidence": CONFIDENCE,
        "not_known": int((~known).sum()),
        "by_group": by_group,
        "gaps": gaps(rates, of),
    }


def gaps(rates: Mapping[str, NDArray[np.float64]], groups: NDArray[np.str_]) -> dict[str, dict[str, Any]]:
    """The largest differences between two groups: in accuracy, in how often a class is answered (demographic parity),
    and in recall or false alarms of a class (equalised odds, Hardt et al. 2016).

    Args:
        rates: from `rates_of`.
        groups: of the records, [n].
    """
    answered = [one for one in rates if one.startswith("answered ")]
    odds = [one for one in rates if one.startswith(("recall of ", "false alarms of "))]
    asked = {"accuracy": ["accuracy"], "demographic_parity": answered, "equalized_odds": odds}
    return {name: _gap(rates, groups, some) for name, some in asked.items()}


def rates_of(
    guesses: NDArray[np.int64], truth: NDArray[np.int64], names: Sequence[str]
) -> Mapping[str, NDArray[np.float64]]:
    """By rate: 1 for a record that it counts, 0 for one that it does not, NaN for one that it is not about, [n]."""
    rates = {"accuracy": (guesses == truth).astype(np.float64)}
    for place, name in enumerate(names):
        said = (guesses == place).astype(np.float64)
        rates[f"answered {name}"] = said
        rates[f"recall of {name}"] = np.where(truth == place, said, np.nan)
        rates[f"false alarms of {name}"] = np.where(truth != place, said, np.nan)
    return rates


def _by_group(
    guesses: NDArray[np.int64], truth: NDArray[np.int64], of: NDArray[np.str_], names: Sequence[str]
) -> Mapping[str, Mapping[str, float]]:
    """fairlearn's value of each rate in each group; of no meaning where nobody is."""
    from fairlearn.metrics import MetricFrame, false_positive_rate, selection_rate, true_positive_rate
    from sklearn.metrics import accuracy_score

    rates = {"answered": selection_rate, "recall of": true_positive_rate, "false alarms of": false_positive_rate}
    whole = MetricFrame(metrics={"accuracy": accuracy_score}, y_true=truth, y_pred=guesses, sensitive_features=of)
    told = {"accuracy": whole.by_group["accuracy"].to_dict()}
    for place, name in enumerate(names):
        there, said = (truth == place).astype(np.int64), (guesses == place).astype(np.int64)
        frame = MetricFrame(metrics=rates, y_true=there, y_pred=said, sensitive_features=of)
        told.update({f"{rate} {name}": frame.by_group[rate].to_dict() for rate in rates})
    return told


def _told(counted: NDArray[np.float64], value: float) -> dict[str, Any]:
    share = asdict(_share(counted))
    return share if share["value"] is None else {**share, "value": value}


def _share(counted: NDArray[np.float64], quantile: float = pair_quantile(2)) -> Figure:
    """A rate with Wilson's interval."""
    about = counted[~np.isnan(counted)]
    if not len(about):
        return Figure(reason=_NOBODY)
    exact = NoisyCounts(counted=np.array([about.sum(), len(about)]), covariance=np.zeros((2, 2)))
    return exact.share(np.array([1.0, 0.0]), np.array([0.0, 1.0]), quantile)


def _gap(rates: Mapping[str, NDArray[np.float64]], of: NDArray[np.str_], asked: Sequence[str]) -> dict[str, Any]:
    """The largest difference between two groups in any of the rates asked for."""
    present = sorted(set(of.tolist()))
    quantile = pair_quantile(len(present), len(asked))
    gaps = [largest_gap([_share(rates[one][of == group], quantile) for group in present], present) for one in asked]
    unknown = [f"{gap.reason}: {one}" for one, gap in zip(asked, gaps, strict=True) if gap.value is None]
    if unknown:
        return asdict(Figure(reason=unknown[0]))
    value, low, high = (max(float(getattr(gap, end)) for gap in gaps) for end in ("value", "low", "high"))
    error = (high - low) / (2 * pair_quantile(2))
    return asdict(Figure(value=value, standard_error=error, low=low, high=high))
