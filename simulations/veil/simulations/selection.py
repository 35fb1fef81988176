# SPDX-License-Identifier: Apache-2.0
"""What joining gave each site: its own heads beside the federated one, judged on records that none of them has seen.

Promises that a site's choice reads its training records alone, that it is judged on its held-out records alone, and
that what goes wrong has a name in the report. A simulation sees every site's figures; in a deployed run none of them
leaves its site.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray
from scipy.stats import chi2_contingency

from veil.client.comparison import Estimate, accuracy, gain
from veil.client.personal import Origin, select
from veil.client.units import Units, bounded_units
from veil.common.head import predict
from veil.common.update import Adapter
from veil.simulations.baselines import Pool
from veil.simulations.partition import Share

LABEL_SHIFT_LEVEL = 0.001
"""How rarely a site whose classes are the pool's by chance alone is said to be different."""


class Finding(StrEnum):
    """What can go wrong at a site.

    Attributes:
        NEGATIVE_TRANSFER: the federated head is worse than the site's own, by more than the error bar.
        LABEL_SHIFT: the classes have other shares at the site than elsewhere, by more than chance.
    """

    NEGATIVE_TRANSFER = "negative_transfer"
    LABEL_SHIFT = "label_shift"


@dataclass(frozen=True, kw_only=True, slots=True)
class SiteSelection:
    """One site's comparison.

    Attributes:
        chosen: the origin of the head that the site keeps.
        strength: prior precision λ of that head; None for the federated one.
        cross_validated: accuracies on training records, by which it chose.
        right: whether a head of each origin knows each held-out record, [m].
        unit: the unit of each held-out record, [m].
        label_shift: chance of class shares as different as these if there were no label shift.
    """

    chosen: Origin
    strength: float | None
    cross_validated: Mapping[Origin, Estimate]
    right: Mapping[Origin, NDArray[np.bool_]]
    unit: NDArray[np.str_]
    label_shift: float

    @property
    def kept(self) -> NDArray[np.bool_]:
        """Whether the chosen head knows each held-out record, [m]."""
        return self.right[self.chosen]

    @property
    def gain(self) -> Estimate:
        """By how much the chosen head is better than the own one, on held-out records; exactly 0 where it is that."""
        if self.chosen is Origin.LOCAL:
            return Estimate(value=0.0, standard_error=0.0)
        return gain(self.kept, self.right[Origin.LOCAL], self.unit)

    @property
    def federated_gain(self) -> Estimate:
        """By how much the federated head is better than the site's own, on held-out records."""
        return gain(self.right[Origin.FEDERATED], self.right[Origin.LOCAL], self.unit)

    @property
    def findings(self) -> tuple[Finding, ...]:
        """What went wrong here."""
        found = {
            Finding.NEGATIVE_TRANSFER: self.federated_gain.high < 0,
            Finding.LABEL_SHIFT: self.label_shift < LABEL_SHIFT_LEVEL,
        }
        return tuple(name for name, is_so in found.items() if is_so)

    def accuracy(self, origin: Origin) -> Estimate:
        """Of one head on the held-out records."""
        return accuracy(self.right[origin], self.unit)


@dataclass(frozen=True, kw_only=True, slots=True)
class Overall:
    """All sites' held-out records, each judged by the heads of its own site.

    Attributes:
        accuracies: by origin, and of what each site keeps under "chosen".
        gain: by how much what is kept is better than the sites' own heads.
    """

    accuracies: Mapping[str, Estimate]
    gain: Estimate

    @classmethod
    def of(cls, selections: Sequence[SiteSelection]) -> Overall:
        """Put sites together; at least one."""
        unit = np.concatenate([one.unit for one in selections])
        right = {origin.value: np.concatenate([one.right[origin] for one in selections]) for origin in Origin}
        right["chosen"] = np.concatenate([one.kept for one in selections])
        return cls(
            accuracies={name: accuracy(known, unit) for name, known in right.items()},
            gain=gain(right["chosen"], right[Origin.LOCAL.value], unit),
        )


def run_selector(pool: Pool, federated: Adapter, advance: Callable[[int], None]) -> dict[str, SiteSelection]:
    """Let each site choose, where the plan asks for it; by site.

    Args:
        pool: the records.
        federated: the run's final adapter.
        advance: called after each site.
    """
    if pool.plan.simulation is None or not pool.plan.simulation.selector:
        return {}
    found, counts = dict[str, SiteSelection](), _class_counts(pool)
    for share, own in zip(pool.shares, counts, strict=True):
        found[share.site] = _selection(pool, federated, share, _label_shift(own, counts.sum(axis=0) - own))
        advance(1)
    return found


def _selection(pool: Pool, federated: Adapter, share: Share, label_shift: float) -> SiteSelection:
    groups, units = _groups(pool), _own_units(pool, share)
    selection = select(federated, units)
    features, labels = pool.features[share.test], pool.examples.labels[share.test]
    return SiteSelection(
        chosen=selection.chosen,
        strength=selection.kept.strength,
        cross_validated={name: accuracy(option.right, units.unit) for name, option in selection.options.items()},
        right={
            name: predict(option.adapter, features).argmax(axis=1) == labels
            for name, option in selection.options.items()
        },
        unit=groups[share.test],
        label_shift=label_shift,
    )


def _own_units(pool: Pool, share: Share) -> Units:
    """A site's training records by patient, whatever the promise is about; all of them, as nothing of this leaves."""
    return bounded_units(
        pool.features[share.train],
        pool.examples.labels[share.train],
        _groups(pool)[share.train],
        max_records=len(share.train),
        key=b"",
    )


def _groups(pool: Pool) -> NDArray[np.str_]:
    """What is never divided: the patient where one is known."""
    return pool.examples.units if pool.examples.patients is None else pool.examples.patients


def _class_counts(pool: Pool) -> NDArray[np.int64]:
    """Units of each class at each site, [sites, classes]: each counts with one of its records, so that records of one
    patient, which are alike, do not count for several."""
    counts = []
    for share in pool.shares:
        rows = np.concatenate([share.train, share.test])
        _, first = np.unique(_groups(pool)[rows], return_index=True)
        counts.append(np.bincount(pool.examples.labels[rows[first]], minlength=len(pool.plan.task.labels)))
    return np.array(counts)


def _label_shift(own: NDArray[np.int64], others: NDArray[np.int64]) -> float:
    """Pearson's χ² test of a site's units against all others', each [classes]."""
    counts = np.array([own, others])
    counts = counts[:, counts.sum(axis=0) > 0]
    if counts.shape[1] < 2 or not counts.sum(axis=1).all():
        return 1.0
    return float(chi2_contingency(counts, correction=False).pvalue)
