# SPDX-License-Identifier: Apache-2.0
"""Tests of `veil.common.plan` for what is tuned, and of sampled rounds of dp-fedsgd: what goes together, what is
refused before anybody reads a record, and that a sampled run keeps its promise."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import dp_accounting
import pytest
from dp_accounting import pld

from veil.client.ledger import Entry, total
from veil.common.errors import PlanError
from veil.common.plan import RunPlan, parse_plan
from veil.common.plan_sections import Training, Transfer, TransferMode
from veil.common.schedule import ReleaseKind, schedule

DEEP = [mode for mode in get_args(TransferMode) if mode != "head"]
TABLE = {"path": "t.csv", "text": "body", "label": "ill", "sites": 3}


def document(transfer: Mapping[str, Any], **sections: Any) -> dict[str, Any]:
    plan: dict[str, Any] = {
        "name": "p",
        "backbone": {"source": "path:m", "sha256": "a" * 64},
        "task": {"kind": "text-classification", "labels": ["no", "yes"]},
        "transfer": dict(transfer),
        "privacy": {"target_epsilon": 3.0},
    }
    for name, change in sections.items():
        plan[name] = {**plan.get(name, {}), **change} if change is not None else None
    return {name: section for name, section in plan.items() if section is not None}


def parsed(transfer: Mapping[str, Any], **sections: Any) -> RunPlan:
    """By the road that a plan takes to a site."""
    return RunPlan.from_json(json.dumps(document(transfer, **sections)))


def test_without_a_section_the_head_alone_is_tuned() -> None:
    assert parsed({}).transfer == Transfer()
    assert not parsed({}).transfer.deep


@pytest.mark.parametrize("mode", DEEP)
def test_every_other_mode_tunes_more(mode: TransferMode) -> None:
    plan = parsed({"mode": mode})
    assert plan.transfer.deep
    assert RunPlan.from_json(plan.to_json()) == plan
    assert plan.sha256 != parsed({}).sha256


@pytest.mark.parametrize(
    ("mode", "top"),
    [("last-layers", 1), ("gradual", 2), ("bias", None), ("adapter", None), ("lora", None), ("full", None)],
)
def test_blocks_from_the_top_by_mode(mode: TransferMode, top: int | None) -> None:
    assert Transfer(mode=mode).top == top
    if mode != "full":
        assert Transfer(mode=mode, layers=5).top == 5


READERS: dict[str, tuple[Any, list[str]]] = {
    "layers": (2, ["last-layers", "gradual", "bias", "adapter", "lora"]),
    "rank": (4, ["lora"]),
    "alpha": (4.0, ["lora"]),
    "bottleneck": (4, ["adapter"]),
    "prompt_length": (4, ["prompt"]),
    "pretrained_rate": (0.5, DEEP),
    "layer_decay": (0.5, DEEP),
    "head_rounds": (3, [mode for mode in DEEP if mode != "gradual"]),
}


@pytest.mark.parametrize("key", READERS)
@pytest.mark.parametrize("mode", get_args(TransferMode))
def test_a_key_that_the_mode_does_not_read_is_an_error(mode: TransferMode, key: str) -> None:
    value, readers = READERS[key]
    if mode in readers:
        assert getattr(parsed({"mode": mode, key: value}).transfer, key) == value
    else:
        with pytest.raises(PlanError, match=rf'{key} = {value} with mode = "{mode}"'):
            parsed({"mode": mode, key: value})


def test_every_key_of_the_section_is_looked_at() -> None:
    assert set(READERS) == set(Transfer.model_fields) - {"mode"}


@pytest.mark.parametrize(
    "transfer",
    [
        {"mode": "everything"},
        {"mode": "lora", "rank": 0},
        {"mode": "lora", "alpha": 0},
        {"mode": "last-layers", "layers": 0},
        {"mode": "adapter", "bottleneck": 0},
        {"mode": "prompt", "prompt_length": 0},
        {"mode": "full", "pretrained_rate": 0},
        {"mode": "full", "pretrained_rate": 1.1},
        {"mode": "full", "layer_decay": 0},
        {"mode": "full", "layer_decay": 1.1},
        {"mode": "full", "dropout": 0.1},
    ],
)
def test_values_out_of_range_are_refused(transfer: dict[str, Any]) -> None:
    with pytest.raises(PlanError, match="transfer"):
        parsed(transfer)


TABULAR = {"backbone": None, "task": {"kind": "tabular-classification"}}
IMAGE = {"task": {"kind": "image-classification"}}


@pytest.mark.parametrize("mode", DEEP)
@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        (TABULAR, "no pretrained layers"),
        ({"training": {"algorithm": "dp-fedavg"}}, "use dp-fedsgd"),
        ({"training": {"algorithm": "one-shot"}}, "use dp-fedsgd"),
        ({"simulation": {**TABLE, "selector": True}}, "compares heads only"),
    ],
)
def test_what_more_than_a_head_cannot_be_tuned_with_is_refused(
    mode: TransferMode, sections: dict[str, Any], expected: str
) -> None:
    """And a head can be."""
    with pytest.raises(PlanError, match=expected):
        parsed({"mode": mode}, **sections)
    parsed({}, **sections)


def test_a_prompt_is_for_text() -> None:
    with pytest.raises(PlanError, match="tokens before the record are for text"):
        parsed({"mode": "prompt"}, **IMAGE)
    assert parsed({"mode": "lora"}, **IMAGE).task.modality == "image"


def test_a_deep_simulation_chooses_no_heads_and_is_compared_with_one() -> None:
    deep = parsed({"mode": "lora"}, simulation=TABLE).simulation
    assert deep is not None
    assert (deep.selector, deep.baselines) == (False, ("local_only", "head_only"))
    head = parsed({}, simulation=TABLE).simulation
    assert head is not None
    assert (head.selector, head.baselines) == (True, ("local_only", "centralized_dp", "non_private"))
    own = parsed({"mode": "lora"}, simulation={**TABLE, "baselines": ["non_private"]}).simulation
    assert own is not None and own.baselines == ("non_private",)


def test_a_head_is_not_compared_with_itself() -> None:
    with pytest.raises(PlanError, match="head_only"):
        parsed({}, simulation={**TABLE, "baselines": ["head_only"]})


def test_sites_see_what_is_tuned_and_no_table() -> None:
    plan = parsed({"mode": "lora", "rank": 4}, simulation=TABLE)
    assert plan.public().transfer == plan.transfer
    assert plan.public().simulation is None


def test_a_plan_file_holds_the_section(tmp_path: Path) -> None:
    (tmp_path / "plan.toml").write_text(
        "name = 'p'\n[backbone]\nsource = 'path:m'\nsha256 = '" + "a" * 64 + "'\n"
        "[task]\nkind = 'text-classification'\nlabels = ['no', 'yes']\n"
        "[transfer]\nmode = 'gradual'\nlayers = 3\nlayer_decay = 0.5\n[privacy]\ntarget_epsilon = 3\n",
        encoding="utf-8",
    )
    assert parse_plan(tmp_path / "plan.toml").transfer == Transfer(mode="gradual", layers=3, layer_decay=0.5)


@pytest.mark.parametrize(
    ("training", "rate"),
    [
        ({}, 1.0),
        ({"sample_rate": 0.2}, 0.2),
        ({"algorithm": "dp-fedavg"}, 0.1),
        ({"algorithm": "dp-fedavg", "sample_rate": 0.3}, 0.3),
        ({"algorithm": "one-shot"}, 1.0),
    ],
)
def test_the_chance_of_a_unit_to_be_in_a_step(training: dict[str, Any], rate: float) -> None:
    assert Training.model_validate(training).sampling == rate


def sampled(target: float, rate: float, **training: Any) -> RunPlan:
    return parsed(
        {"mode": "lora"},
        training={"rounds": 4, "sample_rate": rate, **training},
        privacy={"target_epsilon": target},
        cohort={"nominal_units": 50},
    )


def test_sampled_rounds_are_charged_as_poisson_samples_and_keep_the_promise() -> None:
    """By Veil's accountant, by the ledger's total, and by dp-accounting, which is told nothing but the mechanisms."""
    plan = sampled(1.0, 0.2, centre=True)
    first, *rounds = schedule(plan)
    assert (first.kind, first.mechanism.sample_rate) == (ReleaseKind.CENTRE, 1.0)
    assert [(one.kind, one.mechanism.sample_rate, one.mechanism.steps) for one in rounds] == [
        (ReleaseKind.GRADIENT, 0.2, 1)
    ] * 4
    entries = [
        Entry(job="job", round=one.round, mechanism=one.mechanism, noise="os", plan=plan.sha256)
        for one in (first, *rounds)
    ]
    charged = total(entries, plan.privacy.target_delta).epsilon
    assert 0.999 <= charged <= 1.0
    gaussian, each = (dp_accounting.GaussianDpEvent(one.mechanism.noise_multiplier) for one in (first, rounds[0]))
    accountant = pld.PLDAccountant()
    accountant.compose(gaussian).compose(dp_accounting.PoissonSampledDpEvent(0.2, each), 4)
    assert 0.98 <= accountant.get_epsilon(plan.privacy.target_delta) <= charged + 1e-9


def test_sampling_needs_less_noise_in_a_round_and_full_batches_are_as_they_were() -> None:
    whole, fifth = (sampled(1.0, rate, centre=True) for rate in (1.0, 0.2))
    without = parsed(
        {"mode": "lora"}, training={"rounds": 4}, privacy={"target_epsilon": 1.0}, cohort={"nominal_units": 50}
    )
    assert schedule(whole) == schedule(without)
    assert schedule(fifth)[1].mechanism.noise_multiplier < 0.5 * schedule(whole)[1].mechanism.noise_multiplier


def test_rounds_of_the_head_alone_leave_some_for_the_rest() -> None:
    with pytest.raises(PlanError, match=r"head_rounds = 5 of training\.rounds = 5"):
        parsed({"mode": "lora", "head_rounds": 5}, training={"rounds": 5})
    assert parsed({"mode": "lora", "head_rounds": 4}, training={"rounds": 5}).transfer.head_rounds == 4


def test_answers_with_a_structure_have_no_head_of_their_own() -> None:
    with pytest.raises(PlanError, match="no one feature for a head"):
        parsed({"mode": "lora", "head_rounds": 1}, task={"kind": "text-tokens", "labels": ["a", "b"]})
