# SPDX-License-Identifier: Apache-2.0
"""Partition: which records of a pooled table each simulated site holds, and which of them it never trains on.

Promises that a unit is never divided, neither between sites nor between training and test, and that the same
table, settings and seed give the same shares.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from veil.client.examples import Examples
from veil.common.errors import InputError
from veil.common.objective import Targets, classes_of, form_of
from veil.common.plan_sections import Simulation

Integers = npt.NDArray[np.int64]

MIN_TRAINING_UNITS = 2
_ATTEMPTS = 1000
_PARTS = 5


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Share:
    """What one site holds.

    Attributes:
        site: the site's name.
        train: [n], ascending row indices of the pooled examples that the site trains on.
        test: [m], ascending row indices that are held out.
    """

    site: str
    train: Integers
    test: Integers


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Units:
    """The things that are never divided.

    Attributes:
        of_record: [n], each record's unit.
        label: [units], each unit's most frequent stratum (see `_strata`), the first one in a tie.
        site: [units], index of the unit's site by the site column, or None without one.
    """

    of_record: Integers
    label: Integers
    site: Integers | None


def partition(
    examples: Examples, simulation: Simulation, *, seed: int, delta: float, labels: Sequence[str]
) -> tuple[Share, ...]:
    """Divide pooled examples among sites, and each site's units into training and test.

    Args:
        examples: the pooled records; with ``partition = "site-column"`` they carry their sites, and a patient
            who was at two sites is two units, one at each.
        simulation: how to divide, into how many sites, and the test fraction.
        seed: for the public random choices.
        delta: the run's target δ, which must be below 1/units of every site.
        labels: the plan's labels.

    Returns:
        One share per site, sorted by site name.

    Raises:
        InputError: for more sites than units; for a site with fewer than two training units, with training
            records of one class only (unless allowed), or too small for δ.
    """
    rng = np.random.default_rng(seed)
    by_column = simulation.partition == "site-column"
    names, record_site = _site_column(examples) if by_column else (_numbered(simulation.sites or 1), None)
    strata, count = _strata(examples.labels, len(labels))
    units = _units(examples, strata, record_site, count)
    if len(units.label) < max(len(names), 1):
        raise InputError(
            f"{len(names)} sites and {len(units.label)} units",
            "at least one unit (record or patient) per site",
            "lower simulation.sites or give more records",
        )
    site = _assigned(units, simulation, len(names), count, rng)
    shares = tuple(
        _share(name, np.flatnonzero(site == index), units, simulation.test_fraction, rng)
        for index, name in enumerate(names)
    )
    for share in shares:
        _check_units(share, units, simulation)
        _check_classes(share, examples, simulation, labels)
    _check_delta(shares, units, delta)
    return shares


def _site_column(examples: Examples) -> tuple[tuple[str, ...], Integers]:
    if examples.sites is None:
        raise InputError(
            'partition = "site-column" and the examples carry no site',
            "examples read with their site column",
            "name the column in simulation.site",
        )
    names, codes = np.unique(examples.sites, return_inverse=True)
    return tuple(str(name) for name in names), codes.astype(np.int64)


def _numbered(sites: int) -> tuple[str, ...]:
    width = len(str(sites))
    return tuple(f"site-{number:0{width}d}" for number in range(1, sites + 1))


def _strata(targets: Targets, labels: int) -> tuple[Integers, int]:
    """What training and test get even parts of, [n] and how many there are: the class; of several labels the rarest one
    that a record has, or that it has none; of a number the fifth of its public range."""
    form = form_of(targets)
    if form == "classification":
        return classes_of(targets), labels
    if form == "regression":
        return np.minimum(targets * _PARTS, _PARTS - 1).astype(np.int64), _PARTS
    rarest = np.where(targets > 0, targets.sum(axis=0), np.inf).argmin(axis=1)
    return np.where(targets.any(axis=1), rarest, labels).astype(np.int64), labels + 1


def _units(examples: Examples, strata: Integers, record_site: Integers | None, classes: int) -> _Units:
    groups = examples.units if examples.patients is None else examples.patients
    names, codes = np.unique(groups, return_inverse=True)
    pair = codes if record_site is None else record_site * len(names) + codes
    kept, of_record = np.unique(pair, return_inverse=True)
    votes = np.zeros((len(kept), classes), dtype=np.int64)
    np.add.at(votes, (of_record, strata), 1)
    return _Units(
        of_record=of_record.astype(np.int64),
        label=votes.argmax(axis=1).astype(np.int64),
        site=None if record_site is None else (kept // len(names)).astype(np.int64),
    )


def _assigned(units: _Units, simulation: Simulation, sites: int, classes: int, rng: np.random.Generator) -> Integers:
    """Each unit's site [units]."""
    if units.site is not None:
        return units.site
    if simulation.partition == "iid":
        return (rng.permutation(len(units.label)) % sites).astype(np.int64)
    return _dirichlet(units.label, simulation, sites, classes, rng)


def _dirichlet(label: Integers, simulation: Simulation, sites: int, classes: int, rng: np.random.Generator) -> Integers:
    """Label shift: every class is spread over the sites in proportions of their own, Dirichlet(alpha).

    A draw that leaves a site too few units to train on is drawn again, a bounded number of times; the last
    resort is the draw whose smallest site is largest, which the checks then judge.
    """
    best, largest = np.zeros(len(label), dtype=np.int64), -1
    for _ in range(_ATTEMPTS):
        site = np.zeros(len(label), dtype=np.int64)
        for one in range(classes):
            members = rng.permutation(np.flatnonzero(label == one))
            cuts = np.cumsum(rng.dirichlet(np.full(sites, simulation.alpha)))[:-1]
            site[members] = np.searchsorted(cuts, (np.arange(len(members)) + 0.5) / max(len(members), 1))
        smallest = int(np.bincount(site, minlength=sites).min())
        if smallest > largest:
            best, largest = site, smallest
        if smallest - _held_out(smallest, simulation.test_fraction) >= MIN_TRAINING_UNITS:
            break
    return best


def _held_out(units: int, fraction: float) -> int:
    """How many of a site's units are held out: the rounded fraction, with at least one on either side."""
    return 0 if units < 2 else min(max(math.floor(fraction * units + 0.5), 1), units - 1)


def _share(name: str, members: Integers, units: _Units, fraction: float, rng: np.random.Generator) -> Share:
    """One site's records, its units `members` divided within each class."""
    by_class = [members[units.label[members] == one] for one in np.unique(units.label[members])]
    quotas = _quotas([len(one) for one in by_class], _held_out(len(members), fraction))
    held = [rng.permutation(one)[:quota] for one, quota in zip(by_class, quotas, strict=True)]
    test = np.concatenate(held) if held else members
    return Share(
        site=name,
        train=np.flatnonzero(np.isin(units.of_record, np.setdiff1d(members, test))),
        test=np.flatnonzero(np.isin(units.of_record, test)),
    )


def _quotas(sizes: Sequence[int], total: int) -> list[int]:
    """`total` test units over classes of `sizes`, by largest remainder; a class gives its last unit last."""
    whole = max(sum(sizes), 1)
    quotas = [total * size // whole for size in sizes]

    def claim(one: int) -> tuple[int, int]:
        return min(sizes[one] - quotas[one], 2), total * sizes[one] - whole * quotas[one]

    for _ in range(total - sum(quotas)):
        quotas[max(range(len(sizes)), key=claim)] += 1
    return quotas


def _training_units(share: Share, units: _Units) -> int:
    return len(np.unique(units.of_record[share.train]))


def _check_units(share: Share, units: _Units, simulation: Simulation) -> None:
    count = _training_units(share, units)
    if count < MIN_TRAINING_UNITS:
        raise InputError(
            f'site "{share.site}" has {count or "no"} training unit{"s" if count == 0 else ""}',
            f"at least {MIN_TRAINING_UNITS} units (records or patients) to train on at every site",
            "leave the site out of the table"
            if simulation.partition == "site-column"
            else "lower simulation.sites or simulation.test_fraction, or raise simulation.alpha",
        )


def _check_classes(share: Share, examples: Examples, simulation: Simulation, labels: Sequence[str]) -> None:
    if form_of(examples.labels) != "classification":
        return
    present = np.unique(examples.labels[share.train])
    if len(present) < 2 and not simulation.allow_single_class_sites:
        raise InputError(
            f'site "{share.site}" has training records of the class "{labels[present[0]]}" only',
            "records of at least two classes at every site",
            "set simulation.allow_single_class_sites = true, raise simulation.alpha, or leave the site out",
        )


def _check_delta(shares: Sequence[Share], units: _Units, delta: float) -> None:
    count, site = min((_training_units(share, units), share.site) for share in shares)
    if delta >= 1 / count:
        digits = 2 - math.floor(math.log10(1 / count))
        limit = math.floor(10**digits / count) / 10**digits
        raise InputError(
            f'delta = {delta:g} with {count} training units at site "{site}"',
            f"delta below 1/{count}, or one unit could be given away whole within the promise",
            f"set privacy.target_delta below {limit:g}, or leave the site out",
        )
