# SPDX-License-Identifier: Apache-2.0
"""Tests of `veil.common.tunable`: the model says what the backbone with a head says, a unit's gradient is its own, and
a model that cannot be trained soundly is refused before any record is read.

All models are tiny random ones of transformers' classes, loaded from a folder as a site loads them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from tests.tiny_models import TEXT
from torch import Tensor, nn

from veil.common.errors import PlanError, RefusalCode, RefusalError, RunError, TableError
from veil.common.head import CENTRE, WEIGHT, predict
from veil.common.task_heads import Record
from veil.common.trained import depth_of, is_tuned, parameter_of, trained_in
from veil.common.tunable import TunableModel
from veil.common.update import Adapter

CELLS = [
    *[("bert", mode) for mode in ("last-layers", "full", "gradual", "bias", "adapter", "lora", "prompt")],
    *[("gpt2", mode) for mode in ("last-layers", "full", "lora", "prompt")],
    *[("vit", mode) for mode in ("last-layers", "bias", "adapter", "lora")],
    *[("resnet", mode) for mode in ("last-layers", "full", "bias", "adapter")],
    *[("efficientnet", mode) for mode in ("gradual", "adapter")],
]
SAYINGS = ["mild cough and fever", "well", "a severe rash since day two", "no pain", "zebra of the day"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder, random = tmp_path_factory.mktemp("pictures"), np.random.default_rng(3)
    paths = [folder / f"{index}.png" for index in range(5)]
    for path in paths:
        Image.fromarray(random.integers(0, 256, (40, 36, 3), dtype=np.uint8)).save(path)
    return paths


@pytest.fixture(scope="module")
def records_of(pictures: list[Path]) -> Callable[[str], Sequence[Any]]:
    return lambda family: SAYINGS if family in TEXT else pictures


def somewhere(model: TunableModel, scale: float = 0.05, seed: int = 4) -> Adapter:
    """An adapter away from the start: a head, a centre, and every tuned tensor moved."""
    random = np.random.default_rng(seed)
    return Adapter(
        tensors={
            name: one + np.float32(scale if is_tuned(name) else 0.3) * random.normal(size=one.shape).astype(np.float32)
            for name, one in model.initial().tensors.items()
        }
    )


def headed(model: TunableModel) -> Adapter:
    """The start, with a head and a centre."""
    return Adapter(tensors={**model.initial().tensors, **{n: somewhere(model).tensors[n] for n in (WEIGHT, CENTRE)}})


def units_of(model: TunableModel, told: Sequence[Any]) -> Iterator[list[Record]]:
    """A unit of each record, with the classes 0, 1, 2, 0, …"""
    return iter([[model.record(one, place % 3)] for place, one in enumerate(told)])


def gradients(model: TunableModel, adapter: Adapter, units: Iterator[Sequence[Record]]) -> list[Any]:
    trained = tuple(sorted(filter(is_tuned, model.shapes)))
    with model.at(adapter, trained):
        return list(model.gradients(units, trained))


def unchanged(network: Any) -> None:
    """A model of the test's own."""


def same(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize(("family", "mode"), CELLS)
def test_a_model_trains_soundly_and_stays_as_it_was(
    family: str, mode: str, tuned: Callable[..., Any], records_of: Callable[[str], Sequence[Any]]
) -> None:
    """At the start it says what the frozen features and the head say; it passes its own examination; gradients move not
    a bit of it, running statistics included; every trained tensor has one."""
    one = tuned(family, mode)
    model, told = one.model, records_of(family)
    model.examine()
    start = headed(model)
    with model.at(start):
        found = model.probabilities(told)
    if mode != "prompt":
        expected: NDArray[np.float64] = predict(start, one.backbone.encode(told))
        assert np.abs(found - expected).max() < 1e-5
    before = {name: tensor.clone() for name, tensor in one.network.state_dict().items()}
    for gradient in gradients(model, start, units_of(model, told)):
        assert [tuple(part.shape) for part in gradient] == [
            model.shapes[name] for name in (WEIGHT, *sorted(filter(is_tuned, model.shapes)))
        ]
        assert all(torch.isfinite(part).all() for part in gradient)
    after = one.network.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    open_ = {name for name, parameter in one.network.named_parameters() if parameter.requires_grad}
    assert open_ == {parameter_of(name) for name in model.shapes if is_tuned(name)}


@pytest.mark.parametrize(("family", "mode"), [("bert", "last-layers"), ("gpt2", "lora"), ("resnet", "full")])
def test_an_adapter_is_where_the_model_stands(
    family: str, mode: str, tuned: Callable[..., Any], records_of: Callable[[str], Sequence[Any]]
) -> None:
    """Its tensors are in the model by their names, whatever stood there before."""
    one = tuned(family, mode)
    model, there, told = one.model, somewhere(one.model), records_of(family)
    with model.at(there):
        found = model.probabilities(told)
        own = dict(one.network.named_parameters())
        for name in filter(is_tuned, there.tensors):
            assert np.array_equal(own[parameter_of(name)].detach().numpy(), there.tensors[name])
    with model.at(headed(model)):
        assert not np.array_equal(model.probabilities(told), found)
    with model.at(there):
        assert np.array_equal(model.probabilities(told), found)
    assert np.allclose(found.sum(axis=1), 1) and len({row.tobytes() for row in found}) == len(told)


@pytest.mark.parametrize("family", ["bert", "vit"])
def test_tensors_that_no_answer_depends_on_do_not_train(family: str, tuned: Callable[..., Any]) -> None:
    """Texts are the mean of the last layer, so that BERT's pooler is idle; ViT's is what features are."""
    pooler = {name for name in tuned(family, "full").model.shapes if "pooler" in name}
    assert len(pooler) == (0 if family == "bert" else 2)


@pytest.mark.parametrize(("family", "mode"), [("bert", "lora"), ("gpt2", "last-layers"), ("resnet", "gradual")])
def test_a_unit_s_gradient_has_the_same_bits_alone_and_beside_others(
    family: str, mode: str, tuned: Callable[..., Any], records_of: Callable[[str], Sequence[Any]]
) -> None:
    """In any order, and again when its frozen part is remembered."""
    model, told = tuned(family, mode).model, records_of(family)
    there = somewhere(model)
    together = gradients(model, there, units_of(model, told))
    reversed_ = gradients(model, there, iter(list(units_of(model, told))[::-1]))
    for place, unit in enumerate(units_of(model, told)):
        (alone,) = gradients(model, there, iter([unit]))
        forgetful = [Record(inputs=record.inputs, target=record.target) for record in unit]
        (recomputed,) = gradients(model, there, iter([forgetful]))
        assert same(alone, together[place])
        assert same(alone, reversed_[-1 - place])
        assert same(alone, recomputed), "what is remembered of frozen blocks is what they gave"


def test_frozen_blocks_are_computed_once(tuned: Callable[..., Any]) -> None:
    calls: list[int] = []

    def counted(network: Any) -> None:
        network.encoder.layer[0].attention.self.query.register_forward_hook(lambda *_: calls.append(1))

    one = tuned("bert", "last-layers", change=counted)
    calls.clear()
    for _ in range(3):
        gradients(one.model, somewhere(one.model), units_of(one.model, SAYINGS))
    assert len(calls) == len(SAYINGS)


def test_a_text_that_says_made_up_is_a_text_like_any_other(tuned: Callable[..., Any]) -> None:
    """The examination's own record must not stand in for it."""
    one, fresh = (tuned("bert", "last-layers", change=unchanged) for _ in range(2))
    one.model.examine()
    there = somewhere(one.model)
    examined, unexamined = (gradients(model, there, units_of(model, ["made up"])) for model in (one.model, fresh.model))
    assert same(examined[0], unexamined[0])


def test_answers_are_the_adapter_s_whichever_blocks_trained_last(tuned: Callable[..., Any]) -> None:
    """Gradually: the lower of two blocks is frozen in the middle of a run, and tuned in an adapter of its end."""
    one = tuned("bert", "gradual", change=unchanged)
    model, start = one.model, headed(one.model)
    middle = trained_in(one.plan, 2, model.shapes)
    assert {depth_of(name) for name in middle} == {1}
    with model.at(start, middle):
        list(model.gradients(units_of(model, SAYINGS), middle))
    with model.at(somewhere(model)):
        found = model.probabilities(SAYINGS)
    fresh = tuned("bert", "gradual", change=unchanged).model
    with fresh.at(somewhere(model)):
        assert np.array_equal(found, fresh.probabilities(SAYINGS))


def test_a_unit_is_the_mean_of_its_records_and_one_that_cannot_be_read_counts_as_zero(
    tuned: Callable[..., Any],
) -> None:
    model = tuned("bert", "last-layers").model
    there = somewhere(model)
    first, second = (model.record(text, label) for text, label in (("mild cough", 0), ("well", 2)))
    lost = Record(inputs=None, target=torch.tensor(0))
    one, other, both, third, none = gradients(
        model, there, iter([[first], [second], [first, second], [first, second, lost], [lost]])
    )
    for a, b, mean, less in zip(one, other, both, third, strict=True):
        assert torch.allclose(mean, (a + b) / 2, rtol=1e-5, atol=1e-7)
        assert torch.allclose(less, (a + b) / 3, rtol=1e-5, atol=1e-7)
    assert none is None


def test_without_units_there_are_no_gradients(tuned: Callable[..., Any]) -> None:
    model = tuned("bert", "lora").model
    assert gradients(model, model.initial(), iter([])) == []
    with model.at(model.initial()):
        assert model.probabilities([]).shape == (0, 3)


def test_a_picture_that_cannot_be_read_is_an_error_but_in_a_site_s_release_a_zero_feature(
    tuned: Callable[..., Any], pictures: list[Path], tmp_path: Path
) -> None:
    model = tuned("resnet", "bias").model
    bad = tmp_path / "bad.png"
    bad.write_text("no picture")
    there = somewhere(model)
    with model.at(there):
        with pytest.raises(TableError, match=r"bad\.png"):
            model.probabilities([bad, pictures[0]])
        found = model.probabilities([bad, pictures[0]], zero_unreadable=True)
    assert np.allclose(found[0], predict(there, np.zeros((1, model.width)))[0], atol=1e-6)
    assert not np.allclose(found[0], found[1])


@pytest.mark.parametrize("spoil", ["another name", "another shape", "one less", "one more"])
def test_an_adapter_of_other_tensors_is_refused(spoil: str, tuned: Callable[..., Any]) -> None:
    model = tuned("bert", "lora").model
    tensors = dict(model.initial().tensors)
    name = next(filter(is_tuned, tensors))
    if spoil == "one more":
        tensors[f"{name}.more"] = tensors[name]
    else:
        taken = tensors.pop(name)
        if spoil != "one less":
            tensors[f"{name}2" if spoil == "another name" else name] = taken if "name" in spoil else taken.T[:1]
    with pytest.raises(RefusalError) as caught, model.at(Adapter(tensors=tensors)):
        pytest.fail("not to be entered")
    assert caught.value.code is RefusalCode.MALFORMED


def test_a_mode_that_does_not_fit_is_refused_when_the_model_is_made(tuned: Callable[..., Any]) -> None:
    with pytest.raises(PlanError, match="ResNetModel"):
        tuned("resnet", "lora")
    with pytest.raises(PlanError, match="3 blocks"):
        tuned("bert", "last-layers", layers=4)


class Twice(torch.autograd.Function):
    """A layer that changes nothing, with a derivative of two."""

    @staticmethod
    def forward(context: Any, hidden: Tensor) -> Tensor:
        return hidden.clone()

    @staticmethod
    def backward(context: Any, slope: Tensor) -> Tensor:
        return 2 * slope


def behind(block: nn.Module, then: Callable[[Tensor], Tensor]) -> None:
    block.register_forward_hook(lambda module, inputs, output: then(output[0] if isinstance(output, tuple) else output))


def wrong_backward(network: Any) -> None:
    behind(network.layers[1], lambda hidden: Twice.apply(hidden))


def hidden_state(network: Any) -> None:
    """Each answer depends on the one before."""
    last = [torch.zeros(())]

    def follow(hidden: Tensor) -> Tensor:
        found = hidden + 0.01 * last[0]
        last[0] = hidden.detach().mean() + last[0]
        return found

    behind(network.layers[1], follow)


def moving_statistics(network: Any) -> None:
    """A buffer that moves as a BatchNorm in train mode moves its own, though no answer depends on it."""
    network.register_buffer("seen", torch.zeros(()))

    def count(hidden: Tensor) -> Tensor:
        network.seen += 1
        return hidden

    behind(network.layers[1], count)


def noisy(network: Any) -> None:
    behind(network.layers[1], lambda hidden: hidden + 0.01 * torch.randn_like(hidden))


@pytest.mark.parametrize(
    ("spoil", "found"),
    [
        (wrong_backward, "a step that should change the loss"),
        (hidden_state, "differs from one look"),
        (noisy, "differs from one look"),
        (moving_statistics, "buffer seen"),
    ],
)
def test_a_model_that_cannot_be_trained_soundly_is_refused(
    spoil: Callable[[Any], None], found: str, tuned: Callable[..., Any]
) -> None:
    with pytest.raises(RunError, match=found):
        tuned("vit", "full", change=spoil).model.examine()


def test_statistics_that_move_while_records_are_read_stop_the_round(
    tuned: Callable[..., Any], pictures: list[Path]
) -> None:
    one = tuned("resnet", "last-layers", change=unchanged)
    norm = next(part for part in one.network.modules() if isinstance(part, nn.BatchNorm2d))

    def drift(*_: object) -> None:
        assert norm.running_mean is not None
        norm.running_mean += 0.01

    norm.register_forward_hook(drift)
    with pytest.raises(RunError, match="running_mean"):
        gradients(one.model, one.model.initial(), units_of(one.model, pictures[:1]))
