# SPDX-License-Identifier: Apache-2.0
"""Tests of `veil.common.memory`: what is counted is what torch holds, and a site that has less refuses first."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from veil.client import doctor, head_batch
from veil.client.backbone_store import BackboneStore
from veil.client.ledger import Ledger
from veil.client.records import SiteRecords
from veil.client.site import Consent, Site
from veil.client.site_file import SiteFile, parse_site
from veil.common import memory
from veil.common.backbone import FrozenBackbone, Pooling
from veil.common.errors import RefusalCode, RefusalError, RunError
from veil.common.exchange import RoundRequest
from veil.common.frozen_prefix import ROOM_BYTES
from veil.common.keys import NodeKey
from veil.common.lazy_backbone import LazyBackbone
from veil.common.memory import (
    READ_BYTES,
    Footprint,
    coordinator_memory,
    fitted,
    held_now,
    in_flight,
    site_memory,
    size_of,
    weigh,
)
from veil.common.noise import OSNoise
from veil.common.plan import RunPlan
from veil.common.plan_sections import Modality
from veil.common.preprocessing import ModelInput
from veil.common.privacy import PrivacyUnit
from veil.common.schedule import ReleaseKind
from veil.common.tunable import TunableModel, _in_order
from veil.common.update import Adapter

TOKENS, WIDTH, BLOCKS = 5, 6, 3
SHA256 = "a" * 64
FOUND = Footprint(held=500, weights=100, adapter=30, released=20, width=3, kept=50, widest=7, remembered=1000, read=10)


class TinyEncoder(nn.Module):
    """Three linear blocks with a bias, each behind tanh."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Linear(WIDTH, WIDTH)
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(BLOCKS)])

    def forward(self, rows: Tensor) -> SimpleNamespace:
        hidden = self.embed(rows)
        for layer in self.layers:
            hidden = layer(hidden)
        return SimpleNamespace(last_hidden_state=hidden)


class TinyReader:
    """A record is as many tokens as it has letters."""

    modality: Modality = "text"

    def read(self, record: str) -> ModelInput:
        return {"rows": torch.ones(1, len(record), WIDTH)}

    def largest(self) -> ModelInput:
        return {"rows": torch.ones(1, TOKENS, WIDTH)}


class TinyWeights:
    """A backbone that loads a tiny encoder."""

    sha256 = SHA256

    def another(self) -> FrozenBackbone:
        pooling = Pooling(width=WIDTH, name="mean", pool=lambda output, _: output.last_hidden_state.mean(1))
        return FrozenBackbone(TinyEncoder().eval(), TinyReader(), pooling, SHA256, "cpu")


def deep_plan(mode: str = "last-layers", **privacy: Any) -> RunPlan:
    return RunPlan.model_validate(
        {
            "name": "p",
            "backbone": {"source": "path:m", "sha256": SHA256},
            "task": {"kind": "text-classification", "labels": ["a", "b"]},
            "transfer": {"mode": mode},
            "training": {"rounds": 3},
            "privacy": {"target_epsilon": 3.0, **privacy},
            "cohort": {"nominal_units": 50},
        }
    )


def tunable(mode: str) -> TunableModel:
    return TunableModel(TinyWeights().another(), deep_plan(mode))


def test_a_computation_keeps_what_torch_keeps_and_no_weight() -> None:
    """Its input for the first layer's gradient, and tanh's output, once, for tanh's and the second layer's."""
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))
    kept, widest = weigh(model, lambda: model(torch.ones(3, 4)).sum())
    assert kept == 4 * 3 * (4 + 6)
    assert widest == 4 * 3 * (6 + 6)
    model.requires_grad_(False)
    assert weigh(model, lambda: model(torch.ones(3, 4)).sum()) == (0, widest)
    assert not any(module._forward_hooks for module in model.modules())


def test_shared_memory_is_counted_once() -> None:
    one = torch.zeros(3, 4)
    assert size_of([one, one.T, one[0], torch.zeros(2)]) == 48 + 8


@pytest.mark.parametrize(("mode", "trained"), [("last-layers", 1), ("full", BLOCKS + 1), ("gradual", 2)])
def test_sizes_are_those_of_the_model(mode: str, trained: int) -> None:
    """Of the round in which most trains; each linear layer is as wide as any other."""
    model = tunable(mode)
    found, layer, head = model.footprint(), WIDTH * WIDTH + WIDTH, 2 * (WIDTH + 1)
    assert found.weights == 4 * (BLOCKS + 1) * layer
    assert found.adapter == trained * layer + head + WIDTH
    assert found.released == trained * layer + head
    assert found.read == 4 * TOKENS * WIDTH
    assert found.remembered == (0 if mode == "full" else 4 * TOKENS * WIDTH)
    (gradient,) = _gradients(model, mode)
    assert sum(part.numel() for part in gradient) == found.released


def _gradients(model: TunableModel, mode: str) -> list[tuple[Tensor, ...]]:
    names = tuple(sorted(name for name in model.shapes if name.startswith("tuned.")))
    record = model.record("abc", 1)
    with model.at(model.initial(), names):
        return [one for one in model.gradients(iter([[record]]), names) if one is not None]


def test_one_block_more_keeps_one_input_and_one_output_more() -> None:
    """tanh's output is the next block's input: a block adds a matrix of tokens."""
    one, two = tunable("last-layers").footprint(), tunable("gradual").footprint()
    assert two.kept - one.kept == 4 * TOKENS * WIDTH


def test_what_is_remembered_keeps_to_its_room() -> None:
    model = tunable("last-layers")
    of_one = model.footprint().remembered
    model.remember(2 * of_one)  # a half for what is read, a half for what the frozen blocks gave
    assert (model.read_room, model._prefix.room) == (of_one, of_one)
    model.remember(2**40)
    assert (model.read_room, model._prefix.room) == (READ_BYTES, ROOM_BYTES)


@pytest.mark.parametrize("most", [1, 3, 10])
def test_answers_come_in_order_and_no_more_than_so_many_are_begun(most: int) -> None:
    asked, mutex = [0], threading.Lock()

    def questions() -> Iterator[int]:
        for number in range(7):
            with mutex:
                asked[0] += 1
            yield number

    with ThreadPoolExecutor(2) as pool:
        for place, answer in enumerate(_in_order(pool, lambda number: number * number, questions(), most)):
            assert answer == place * place
            assert asked[0] <= place + most
    assert place == 6


def test_many_small_gradients_or_few_large_ones_are_in_memory_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    assert [in_flight(numbers) for numbers in (1, 10**6, 10**7, 10**9)] == [8, 8, 6, 3]


def test_parts_add_up_and_name_what_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    found = site_memory(deep_plan(), FOUND, records=4)
    assert found.parts == {
        "libraries": 400,
        "threads": 2 * memory.THREAD_BYTES,
        "weights": 200,
        "adapter": 3 * 4 * 30,
        "gradients": 9 * 4 * 20,
        "activations": 2 * (50 + 14),
        "remembered of records": 4040,
        "update": 5 * 4 * 20,
    }
    assert found.peak == sum(found.parts.values()) == found.needed + 4040
    once = deep_plan().model_copy(update={"training": deep_plan().training.model_copy(update={"centre": False})})
    assert site_memory(once, FOUND, records=4).parts["weights"] == 100
    assert site_memory(deep_plan(), FOUND).room == ROOM_BYTES + READ_BYTES


def test_patients_keep_more_gradients() -> None:
    """A patient's mean needs the next record's gradient beside the sum so far and the next sum."""
    records, patients = deep_plan(), deep_plan(unit=PrivacyUnit.PATIENT)
    more = site_memory(patients, FOUND).parts["gradients"] - site_memory(records, FOUND).parts["gradients"]
    assert more == 2 * (os.cpu_count() or 1) * 4 * FOUND.released


def test_a_head_s_batch_is_bounded() -> None:
    plan = deep_plan("head")
    assert site_memory(plan, FOUND, records=10).parts["batch"] == 10 * 4 * (3 + 3 + 1 + 5 * 2)
    assert site_memory(plan, FOUND).parts["batch"] == memory.BATCH_BYTES == head_batch.ROOM_BYTES
    assert site_memory(plan, replace(FOUND, held=0)).parts["libraries"] == memory.LIBRARIES_BYTES


def test_the_coordinator_holds_an_update_of_each_site() -> None:
    three, four = (coordinator_memory(FOUND, sites=sites).peak for sites in (3, 4))
    assert four - three == 2 * 4 * FOUND.released


def test_a_process_knows_what_it_holds() -> None:
    """Within the pages of a list that is made and kept."""
    before = held_now()
    filled = bytearray(b"x" * 2**26)
    assert held_now() - before > 2**25
    assert len(filled) == 2**26


def test_a_limit_leaves_room_for_what_is_remembered_or_refuses() -> None:
    needed = site_memory(deep_plan(), FOUND).needed
    assert fitted(deep_plan(), FOUND, needed + 12) == 12
    assert fitted(deep_plan(), FOUND, 2**60) == ROOM_BYTES + READ_BYTES
    with pytest.raises(RefusalError, match="max_memory_gb") as caught:
        fitted(deep_plan(), FOUND, needed - 1)
    assert caught.value.code is RefusalCode.POLICY


@pytest.fixture
def site_with(tmp_path: Path) -> Iterator[Callable[[float | None], Site]]:
    """A deployed site's parts on the tiny encoder, and a table that is not there: nothing could be read of it."""
    ledger = Ledger(tmp_path / "ledger.sqlite", "Ulm", NodeKey.generate())

    def make(limit: float | None) -> Site:
        file = _site_file(tmp_path, limit)
        records = SiteRecords(file, lambda backbone, task: cast(LazyBackbone, TinyWeights()))
        return Site(
            policy=file.policy,
            ledger=ledger,
            units=records,
            model=records.model,
            noise=lambda _: OSNoise(),
            consent=lambda job, plan: Consent.GIVEN,
            backbones=BackboneStore(tmp_path / "backbones", mirror=None, accept=False),
        )

    with closing(ledger):
        yield make


def _site_file(folder: Path, limit: float | None) -> SiteFile:
    document = {
        "name": "Ulm",
        "data": {"table": "missing.csv", "text": "body", "label": "ill", "labels": {"1": "b", "0": "a"}},
        "limits": {"epsilon_per_run": 4.0, "epsilon_lifetime": 8.0},
        "coordinator": {"url": "https://veil.example", "ca": "ca.pem"},
        "agent": {} if limit is None else {"max_memory_gb": limit},
    }
    return parse_site(document, folder / "site.toml")


def _request(plan: RunPlan, adapter: Adapter) -> RoundRequest:
    return RoundRequest(plan=plan, job="job", round=0, kind=ReleaseKind.CENTRE, adapter=adapter, nominal_units=50.0)


def test_a_site_with_too_little_memory_refuses_before_it_spends(site_with: Callable[[float | None], Site]) -> None:
    plan, adapter = deep_plan(), tunable("last-layers").initial()
    site = site_with(0.001)
    assert site.answer(_request(plan, adapter)).refusal is RefusalCode.POLICY
    assert site.ledger.entries() == ()


@pytest.mark.parametrize("limit", [None, 1000.0])
def test_a_site_with_enough_memory_goes_on_to_its_records(
    limit: float | None, site_with: Callable[[float | None], Site]
) -> None:
    """It spends, and then finds that the table is missing."""
    site = site_with(limit)
    assert site.answer(_request(deep_plan(), tunable("last-layers").initial())).refusal is RefusalCode.INTERNAL
    assert len(site.ledger.entries()) == 1


def test_the_doctor_says_what_a_round_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = cast(
        BackboneStore, SimpleNamespace(has=lambda backbone: True, find_backbone=lambda backbone, task: TinyWeights())
    )
    (line,) = doctor._memory_plan(_site_file(tmp_path, None), deep_plan(), store)
    assert "a round takes" in line
    monkeypatch.setattr(doctor, "_available", lambda: 2**20)
    with pytest.raises(RunError, match="1 MiB available"):
        doctor._memory_plan(_site_file(tmp_path, None), deep_plan(), store)
    with pytest.raises(RefusalError, match="max_memory_gb"):
        doctor._memory_plan(_site_file(tmp_path, 0.001), deep_plan(), store)
