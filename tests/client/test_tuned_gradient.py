# SPDX-License-Identifier: Apache-2.0
"""Tests of `veil.client.tuned_gradient`: what every unit adds is its own gradient, and never longer than the bound.

A gradient is compared with what Opacus' per-sample hooks give inside a batch, and where these do not reach (position
embeddings that all records share, GPT-2's own layers, BatchNorm, a GRU, a prompt) with a plain loop over records.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from tests.tiny_models import SIDE, TEXT
from torch import Tensor, nn
from torch.nn import functional

from veil.client.tuned_gradient import clipped_tuned_sum
from veil.client.tuned_units import TunedUnits
from veil.client.units import Units
from veil.common.backbone import FrozenBackbone, Pooling
from veil.common.head import CENTRE, INTERCEPT, WEIGHT
from veil.common.lazy_backbone import LazyBackbone
from veil.common.preprocessing import ImageReader
from veil.common.trained import is_tuned, parameter_of, released_size
from veil.common.tunable import TunableModel, load_tunable
from veil.common.unfreezing import unfreeze
from veil.common.update import Adapter

SAYINGS = ["mild cough and fever", "a severe rash since", "no pain the day", "well of two cough"]
LOOSE = 1e6
BOUND = 0.01


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder, random = tmp_path_factory.mktemp("pictures"), np.random.default_rng(3)
    paths = [folder / f"{index}.png" for index in range(4)]
    for path in paths:
        Image.fromarray(random.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)).save(path)
    return paths


@pytest.fixture(scope="module")
def records_of(pictures: list[Path]) -> Callable[[str], Sequence[Any]]:
    return lambda family: SAYINGS if family in TEXT else pictures


def trained_of(model: TunableModel) -> tuple[str, ...]:
    return tuple(sorted(filter(is_tuned, model.shapes)))


def units_of(model: TunableModel, inputs: Sequence[Any], unit: Sequence[int] | None = None) -> TunedUnits:
    """Records of the classes 0, 1, 2, 0, …; each a unit, unless `unit` says of which unit it is."""
    numbers = np.arange(len(inputs)) if unit is None else np.asarray(unit, dtype=np.int64)
    rows = Units(
        features=np.arange(len(inputs), dtype=np.float64)[:, None],
        labels=np.arange(len(inputs)) % 3,
        unit=numbers,
        count=int(numbers.max()) + 1 if len(numbers) else 0,
    )
    return TunedUnits(pooled=rows, rows=rows, inputs=inputs, model=model)


def summed(
    units: TunedUnits, adapter: Adapter, chosen: Sequence[bool] | None = None, bound: float = LOOSE
) -> NDArray[np.float64]:
    taken = np.ones(units.count, bool) if chosen is None else np.asarray(chosen)
    return clipped_tuned_sum(units, adapter, trained_of(units.model), taken, bound)


def each(units: TunedUnits, adapter: Adapter, bound: float = LOOSE) -> NDArray[np.float64]:
    """What every unit adds, one at a time, [count, size]."""
    return np.array([summed(units, adapter, one.tolist(), bound) for one in np.eye(units.count, dtype=bool)])


def somewhere(model: TunableModel) -> Adapter:
    random = np.random.default_rng(4)
    return Adapter(
        tensors={
            name: one + np.float32(0.05 if is_tuned(name) else 0.3) * random.normal(size=one.shape).astype(np.float32)
            for name, one in model.initial().tensors.items()
        }
    )


class Reference(nn.Module):
    """The same model with a head, written once more: for batches, without anything of `veil.common.tunable`."""

    def __init__(self, network: Any, adapter: Adapter, pooled: Callable[[Any], Tensor]) -> None:
        super().__init__()
        weight = torch.tensor(adapter.tensors[WEIGHT])
        self.network, self.pooled = network, pooled
        self.head = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        self.head.weight = nn.Parameter(weight)
        self.centre = torch.tensor(adapter.tensors[CENTRE])

    def forward(self, **inputs: Tensor) -> Tensor:
        rows = functional.normalize(self.pooled(self._output(inputs)), dim=1) - self.centre
        intercept = torch.full((len(rows), 1), INTERCEPT)
        return cast(
            Tensor,
            self.head(torch.cat([functional.normalize(rows, dim=1), intercept], 1)) / math.sqrt(1 + INTERCEPT**2),
        )

    def _output(self, inputs: dict[str, Tensor]) -> Any:
        if not hasattr(self.network, "veil_prompt"):
            return self.network(**inputs)
        prompt = self.network.veil_prompt
        words = self.network.get_input_embeddings()(inputs["input_ids"])
        hidden = self.network(inputs_embeds=torch.cat([prompt.expand(len(words), -1, -1), words], 1)).last_hidden_state
        return SimpleNamespace(last_hidden_state=hidden[:, len(prompt) :])


def reference(one: Any, adapter: Adapter, family: str) -> Reference:
    """Loaded anew, with the adapter's tensors; only these have gradients."""
    network = one.backbone.another().parts()[0]
    unfreeze(network, one.plan.transfer, seed=one.plan.seed)
    network.requires_grad_(False)
    own = dict(network.named_parameters())
    for name in trained_of(one.model):
        own[parameter_of(name)].data = torch.tensor(adapter.tensors[name])
        own[parameter_of(name)].requires_grad_(True)
    pool = (lambda out: out.last_hidden_state.mean(1)) if family in TEXT else (lambda out: out.pooler_output.flatten(1))
    return Reference(network, adapter, pool)


def batch_of(model: TunableModel, told: Sequence[Any]) -> dict[str, Tensor]:
    read = [model.record(one, 0).inputs or {} for one in told]
    return {name: torch.cat([inputs[name] for inputs in read]) for name in read[0]}


def parameters_of(model: TunableModel, net: Reference) -> list[nn.Parameter]:
    own = dict(net.network.named_parameters())
    return [net.head.weight, *(own[parameter_of(name)] for name in trained_of(model))]


def assert_near(found: NDArray[np.float64], expected: NDArray[np.float64]) -> None:
    """Each unit's to 1e-5 of its own length."""
    lengths = np.linalg.norm(expected, axis=1)
    assert (lengths > 1e-3).all()
    assert (np.linalg.norm(found - expected, axis=1) <= 1e-5 * lengths).all()


@pytest.mark.parametrize(
    ("family", "mode"),
    [*[("bert", mode) for mode in ("last-layers", "bias", "lora", "adapter")], ("vit", "last-layers"), ("vit", "lora")],
)
def test_a_unit_s_gradient_is_what_opacus_gives_for_it_inside_a_batch(
    family: str, mode: str, tuned: Callable[..., Any], records_of: Callable[[str], Sequence[Any]]
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from opacus import GradSampleModule
    one, told = tuned(family, mode), records_of(family)
    adapter = somewhere(one.model)
    net = reference(one, adapter, family)
    hooked = GradSampleModule(net, loss_reduction="sum")
    for module in net.modules():  # hooks look at modules in train mode only, and dropout must not wake up
        module.train(next(module.parameters(recurse=False), None) is not None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch, of Opacus' backward hooks
        scores = hooked(**batch_of(one.model, told))
        functional.cross_entropy(scores, torch.arange(len(told)) % 3, reduction="sum").backward()
    samples = [cast(Any, parameter).grad_sample.flatten(1) for parameter in parameters_of(one.model, net)]
    assert_near(each(units_of(one.model, told), adapter), torch.cat(samples, 1).double().numpy())


@pytest.mark.parametrize(
    ("family", "mode"),
    [("bert", "full"), ("bert", "prompt"), ("gpt2", "last-layers"), ("gpt2", "lora"), ("resnet", "full")],
)
def test_where_hooks_do_not_reach_it_is_what_a_loop_over_records_gives(
    family: str, mode: str, tuned: Callable[..., Any], records_of: Callable[[str], Sequence[Any]]
) -> None:
    one, told = tuned(family, mode), records_of(family)
    adapter = somewhere(one.model)
    net = reference(one, adapter, family)
    rows = []
    for place, record in enumerate(told):
        loss = functional.cross_entropy(net(**batch_of(one.model, [record])), torch.tensor([place % 3]))
        found = torch.autograd.grad(loss, parameters_of(one.model, net))
        rows.append(torch.cat([part.flatten() for part in found]).double().numpy())
    assert_near(each(units_of(one.model, told), adapter), np.array(rows))


class Recurrent(nn.Module):
    """A GRU over numbers; not transformers', as none of its encoders has one."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.gru = nn.Embedding(9, 6), nn.GRU(6, 8, batch_first=True)

    def forward(self, input_ids: Tensor) -> Any:
        return SimpleNamespace(last_hidden_state=self.gru(self.words(input_ids))[0])


class Digits:
    """A text of digits → its digits."""

    modality = "text"

    def read(self, record: str) -> dict[str, Tensor]:
        return {"input_ids": torch.tensor([[int(one) for one in record]])}

    def largest(self) -> dict[str, Tensor]:
        return self.read("12345678")


def test_a_gru_is_within_reach(tuned: Callable[..., Any]) -> None:
    """And a record's length is its own: none is padded to another's."""
    with torch.random.fork_rng():
        torch.manual_seed(2)
        network = Recurrent().eval()
    twin = copy.deepcopy(network)
    pooling = Pooling(width=8, name="mean", pool=lambda output, inputs: output.last_hidden_state.mean(1))
    backbone = FrozenBackbone(network, cast(Any, Digits()), pooling, "0" * 64, "cpu")
    plan = tuned("bert", "full").plan
    model = load_tunable(cast(LazyBackbone, SimpleNamespace(another=lambda: backbone)), plan)
    model.examine()
    told, adapter = ["123", "4", "87654321", "55"], somewhere(model)
    assert {parameter_of(name) for name in trained_of(model)} == {name for name, _ in twin.named_parameters()}
    own = dict(twin.named_parameters())
    for name in trained_of(model):
        own[parameter_of(name)].data = torch.tensor(adapter.tensors[name])
    net = Reference(twin, adapter, lambda output: output.last_hidden_state.mean(1))
    rows = []
    for place, record in enumerate(told):
        loss = functional.cross_entropy(net(**Digits().read(record)), torch.tensor([place % 3]))
        found = torch.autograd.grad(loss, parameters_of(model, net))
        rows.append(torch.cat([part.flatten() for part in found]).double().numpy())
    assert_near(each(units_of(model, told), adapter), np.array(rows))


def test_a_unit_is_averaged_before_it_is_clipped(tuned: Callable[..., Any]) -> None:
    model = tuned("bert", "last-layers").model
    adapter = somewhere(model)
    alone = each(units_of(model, SAYINGS), adapter)
    patients = units_of(model, SAYINGS, unit=[0, 1, 1, 0])
    means = np.array([(alone[0] + alone[3]) / 2, (alone[1] + alone[2]) / 2])
    assert np.allclose(each(patients, adapter), means, atol=1e-5)
    bound = float(np.linalg.norm(means, axis=1).min()) / 2
    clipped = means / np.linalg.norm(means, axis=1, keepdims=True) * bound
    assert np.allclose(each(patients, adapter, bound), clipped, atol=1e-6)
    one_by_one = each(units_of(model, SAYINGS), adapter, bound)
    assert np.abs((one_by_one[0] + one_by_one[3]) / 2 - clipped[0]).max() > 1e-4, "clipping first is something else"


@pytest.fixture
def hostile(monkeypatch: pytest.MonkeyPatch, pictures: list[Path], tmp_path: Path) -> dict[str, Path]:
    """Files whose pixels are as bad as can be; one that is no picture."""
    values = {"huge": 1e30, "large": 1e4, "nan": math.nan, "inf": math.inf, "minus": -math.inf, "zero": 0.0}
    read = ImageReader.read

    def reading(reader: ImageReader, record: Path) -> dict[str, Tensor]:
        found = read(reader, pictures[0] if record.stem in values else record)
        return {name: one * 0 + values[record.stem] if record.stem in values else one for name, one in found.items()}

    monkeypatch.setattr(ImageReader, "read", reading)
    (tmp_path / "lost.png").write_text("no picture")
    return {name: tmp_path / f"{name}.png" for name in (*values, "lost")}


@pytest.mark.parametrize(("family", "mode", "bound"), [("resnet", "full", BOUND), ("vit", "adapter", 0.7)])
def test_no_unit_moves_the_sum_by_more_than_the_bound(
    family: str, mode: str, bound: float, tuned: Callable[..., Any], pictures: list[Path], hostile: dict[str, Path]
) -> None:
    """Whoever comes: huge pixels, none that are numbers, a duplicate, somebody with many records. And the others' part
    is the same as without."""
    model = tuned(family, mode).model
    adapter = somewhere(model)
    before = summed(units_of(model, pictures), adapter, bound=bound)
    assert np.isfinite(before).all() and np.linalg.norm(before) <= 4 * bound * (1 + 1e-12)
    comers = [*([path] for path in hostile.values()), [pictures[0]], [*pictures, *hostile.values()], pictures[:3]]
    moved = []
    for comer in comers:
        unit = [*range(4), *[4] * len(comer)]
        units = units_of(model, [*pictures, *comer], unit)
        after = summed(units, adapter, bound=bound)
        assert np.isfinite(after).all()
        assert np.array_equal(summed(units, adapter, [True] * 4 + [False], bound), before)
        moved.append(float(np.linalg.norm(after - before)))
    assert max(moved) <= bound * (1 + 1e-9)
    assert moved[list(hostile).index("lost")] == moved[list(hostile).index("nan")] == 0.0
    if bound == BOUND:
        assert moved[-1] > 0.99 * bound, "a unit whose gradient is longer is shortened to the bound, not left out"


def test_an_empty_sample_adds_nothing(tuned: Callable[..., Any]) -> None:
    model = tuned("bert", "lora").model
    adapter = somewhere(model)
    size = released_size(model.shapes, trained_of(model))
    for units in (units_of(model, SAYINGS), units_of(model, [])):
        found = summed(units, adapter, [False] * units.count)
        assert found.shape == (size,) and not found.any() and found.dtype == np.float64
    assert summed(units_of(model, SAYINGS), adapter).any()


def test_a_sum_is_that_of_its_units(tuned: Callable[..., Any]) -> None:
    model = tuned("bert", "adapter").model
    adapter, units = somewhere(model), units_of(model, SAYINGS)
    parts = each(units, adapter, BOUND)
    assert np.allclose(summed(units, adapter, bound=BOUND), parts.sum(axis=0), rtol=1e-12, atol=1e-15)
    assert np.allclose(np.linalg.norm(parts, axis=1), BOUND, rtol=1e-9)


def test_what_is_below_the_head_is_scaled_before_it_is_clipped(tuned: Callable[..., Any]) -> None:
    """Unclipped, the head's part stays and the rest is a tenth; clipped, the whole is as long as the bound."""
    model = tuned("bert", "lora").model
    adapter, units, names = somewhere(model), units_of(model, SAYINGS), trained_of(model)
    head, everyone = int(np.prod(model.shapes[WEIGHT])), np.ones(4, bool)
    whole = clipped_tuned_sum(units, adapter, names, everyone, LOOSE)
    scaled = clipped_tuned_sum(units, adapter, names, everyone, LOOSE, 0.1)
    assert np.allclose(scaled[:head], whole[:head], rtol=1e-12)
    assert np.allclose(scaled[head:], 0.1 * whole[head:], rtol=1e-12) and whole[head:].any()
    tight, loose = (
        clipped_tuned_sum(units, adapter, names, everyone & (np.arange(4) == 2), bound, 0.1) for bound in (BOUND, LOOSE)
    )
    assert np.allclose(tight, loose * BOUND / np.linalg.norm(loose), rtol=1e-9)


def test_only_what_trains_in_the_round_leaves(tuned: Callable[..., Any]) -> None:
    """Gradually: first the head alone, as long as its own gradient."""
    model = tuned("bert", "gradual").model
    adapter, units = somewhere(model), units_of(model, SAYINGS)
    everything, head = trained_of(model), int(np.prod(model.shapes[WEIGHT]))
    alone = clipped_tuned_sum(units, adapter, (), np.ones(4, bool), LOOSE)
    assert alone.shape == (head,)
    assert np.array_equal(alone, clipped_tuned_sum(units, adapter, everything, np.ones(4, bool), LOOSE)[:head])
