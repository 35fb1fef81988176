# SPDX-License-Identifier: Apache-2.0
"""Groups at a site: from its own column to the public list and into a vector, which no unit moves by too much.

Beside them, what a site reads of a backbone's licence before it reads a record.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from numpy.typing import NDArray
from pydantic import ValidationError

from veil.client.backbone_store import BackboneStore
from veil.client.examples import read_examples
from veil.client.policy import Limits
from veil.client.records import SiteRecords
from veil.client.release import draw, evaluation_update
from veil.client.site import Site
from veil.client.site_file import SiteFile, parse_site
from veil.client.units import Units, bounded_units
from veil.client.wording import describe_plan
from veil.common.errors import RefusalCode
from veil.common.evaluation import EVALUATION, evaluation_norm, released_size
from veil.common.exchange import RoundRequest
from veil.common.group_quality import NO_GROUP
from veil.common.noise import NoiseSource
from veil.common.plan import RunPlan
from veil.common.plan_sections import Backbone, Evaluation
from veil.common.privacy import Mechanism, PrivacyUnit
from veil.common.schedule import schedule
from veil.common.update import Adapter
from veil.simulations.unprivate_noise import NoNoise

MakePlan = Callable[..., RunPlan]
MakeUnits = Callable[..., Units]
GROUPS = ("women", "men")
ROWS = [
    (0.1, "1", "p0", "0"),
    (0.2, "0", "p0", "1"),
    (0.3, "1", "p1", ""),
    (0.4, "0", "p2", "9"),
    (0.5, "1", "p3", "1"),
]


def silence() -> NoiseSource:
    return NoNoise(0, "Ulm", 4)


@pytest.fixture
def grouped(make_plan: MakePlan) -> RunPlan:
    return make_plan().model_copy(update={"evaluation": Evaluation(holdout=0.5, groups=GROUPS)})


@pytest.fixture
def make_file(tmp_path: Path) -> Callable[..., SiteFile]:
    lines = ["age,ill,mrn,sex", *(",".join(map(str, row)) for row in ROWS)]
    (tmp_path / "table.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")

    def make(**data: Any) -> SiteFile:
        columns = {"table": "table.csv", "features": ["age"], "label": "ill", "labels": {"1": "yes", "0": "no"}, **data}
        document = {
            "name": "Ulm",
            "data": columns,
            "limits": {"epsilon_per_run": 4.0, "epsilon_lifetime": 8.0},
            "coordinator": {"url": "https://veil.example", "ca": "ca.pem"},
        }
        return parse_site(document, tmp_path / "site.toml")

    return make


def read_groups(site: SiteFile, plan: RunPlan) -> list[str] | None:
    assert isinstance(site.source, Path)
    examples = read_examples(site.source, site.data, plan.task, unit=PrivacyUnit.RECORD)
    return None if examples.groups is None else examples.groups.tolist()


def test_a_record_s_group_is_the_plan_s_word_for_the_raw_value(
    make_file: Callable[..., SiteFile], grouped: RunPlan
) -> None:
    """What is missing, or not named, is in no group; no record is refused for it."""
    mapped = make_file(group="sex", groups={"0": "women", "1.0": "men"})
    assert read_groups(mapped, grouped) == ["women", "men", "", "", "men"]
    assert read_groups(make_file(group="sex"), grouped) == ["0", "1", "", "9", "1"]
    assert read_groups(make_file(), grouped) is None


def test_a_site_s_units_know_their_groups_on_both_sides(make_file: Callable[..., SiteFile], grouped: RunPlan) -> None:
    def never(*_: object) -> Any:
        pytest.fail("numbers need no backbone")

    units = cast(Units, SiteRecords(make_file(group="sex", groups={"0": "women", "1": "men"}), never)(grouped))
    assert units.held is not None and units.groups is not None and units.held.groups is not None
    found = {
        round(float(age), 1): int(group)
        for side in (units, units.held)
        for age, group in zip(side.features[:, 0], cast(Any, side.groups), strict=True)
    }
    assert found == {0.1: 0, 0.2: 1, 0.3: NO_GROUP, 0.4: NO_GROUP, 0.5: 1}
    assert cast(Units, SiteRecords(make_file(), never)(grouped)).groups is None


def test_groups_stay_with_their_records(make_units: MakeUnits) -> None:
    """Whatever is left out, divided or bounded: the group is the record's own, here its label's and place's."""
    random = np.random.default_rng(0)
    features, labels = random.normal(size=(60, 3)), random.integers(0, 3, 60)
    names = np.array([f"p{number // 4}" for number in range(60)])
    whole = bounded_units(
        features, labels, names, max_records=2, key=b"k", groups=(features[:, 0] > 0).astype(np.int64)
    )
    held = bounded_units(
        features,
        labels,
        names,
        max_records=4,
        key=b"k",
        held=np.repeat(random.random(15) < 0.5, 4),
        groups=(features[:, 0] > 0).astype(np.int64),
    )
    assert held.held is not None
    pieces = list(whole.pieces(most=7))
    assert len(whole.labels) == 30 and len(pieces) > 3
    for one in (whole, held, held.held, whole.only(np.arange(15) % 2 == 0), *pieces):
        assert one.groups is not None
        np.testing.assert_array_equal(one.groups, (one.features[:, 0] > 0).astype(np.int64))


def with_groups(units: Units, seed: int = 1) -> Units:
    return replace(units, groups=np.random.default_rng(seed).integers(-1, 2, len(units.unit)))


def numbers(held: Units, adapter: Adapter) -> NDArray[np.float64]:
    paid = Mechanism(noise_multiplier=2.0, max_grad_norm=evaluation_norm(2), unit=PrivacyUnit.RECORD)
    update = evaluation_update(held, adapter, paid, silence(), groups=2)
    assert update.points[EVALUATION].shape == (released_size(3, 2),)
    return np.asarray(update.points[EVALUATION] * update.spacing, dtype=np.float64)


def test_no_unit_moves_the_vector_by_more_than_its_bound(
    make_units: MakeUnits, make_request: Callable[..., RoundRequest], grouped: RunPlan
) -> None:
    """A patient whose records are in several groups counts in each by its part; with a bound that forgets the groups,
    somebody moves it by more."""
    adapter = make_request(grouped, 4).adapter
    units = with_groups(make_units(12, most=5))
    everyone = numbers(units, adapter)
    moved = []
    for gone in range(12):
        rows = units.unit != gone
        assert units.groups is not None
        rest = Units(
            features=units.features[rows],
            labels=units.labels[rows],
            unit=np.unique(units.unit[rows], return_inverse=True)[1],
            count=11,
            groups=units.groups[rows],
        )
        moved.append(float(np.linalg.norm(everyone - numbers(rest, adapter))))
    assert evaluation_norm() < max(moved) <= evaluation_norm(2)


def test_a_site_without_the_column_counts_in_no_group(
    make_units: MakeUnits, make_request: Callable[..., RoundRequest], grouped: RunPlan
) -> None:
    request, release = make_request(grouped, 4), schedule(grouped)[-1]
    assert release.mechanism.max_grad_norm == evaluation_norm(2)
    training, held = make_units(5), make_units(9, seed=1)
    without, with_ = (
        draw(request, release, replace(training, held=one), silence()).points[EVALUATION]
        for one in (held, with_groups(held))
    )
    assert not without[-4:].any() and with_[-4:].sum() > 0
    np.testing.assert_array_equal(without[:-4], with_[:-4])


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"group": "sex", "groups": {"0": "women", "1": "men"}}, "for women, men: by your column sex."),
        ({}, "for women, men: [data] names no group column, so that your records are in none."),
        ({"group": "sex", "groups": {"0": "female"}}, "by your column sex; female in [data.groups] is none of them."),
    ],
)
def test_the_owner_reads_which_groups_are_compared(
    data: dict[str, Any], words: str, make_file: Callable[..., SiteFile], grouped: RunPlan, make_plan: MakePlan
) -> None:
    said = "\n".join(describe_plan(grouped, "job", make_file(**data), []))
    assert words in said and f"of {released_size(3, 2)} numbers" in said
    plain = make_plan().model_copy(update={"evaluation": Evaluation()})
    assert "are counted, with noise, for" not in "\n".join(describe_plan(plain, "job", make_file(**data), []))


@pytest.mark.parametrize("licence", ["", "GPL-3.0"])
def test_a_licence_that_is_not_named_is_refused_before_anything_is_read(
    licence: str, make_plan: MakePlan, make_request: Callable[..., RoundRequest], make_site: Callable[..., Site]
) -> None:
    """Neither records nor ledger nor weights are touched, by an offer's review or a round's."""

    def units(_: RunPlan) -> Units:
        pytest.fail("a refused request must not touch a record")

    class Untouched(BackboneStore):
        def __init__(self) -> None:
            """Nowhere."""

        def has(self, backbone: Backbone) -> bool:
            pytest.fail("a refused plan must not look for weights")

    backbone = Backbone(source="package:model", sha256="0" * 64, licence=licence)
    text = make_plan().task.model_copy(update={"kind": "text-classification"})
    plan = make_plan().model_copy(update={"backbone": backbone, "task": text})
    site = replace(make_site(units=units, licences=("Apache-2.0",)), backbones=Untouched())
    assert site.answer(make_request(plan)).refusal is RefusalCode.POLICY
    assert not site.ledger.entries()


def test_no_list_of_licences_admits_weights_without_one() -> None:
    with pytest.raises(ValidationError, match="at least 1 character"):
        Limits(epsilon_per_run=1.0, epsilon_lifetime=1.0, licences=("",))
