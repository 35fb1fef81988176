# SPDX-License-Identifier: Apache-2.0
"""Tests of `veil.common.frozen_prefix`: frozen blocks are computed once a record, to the bit, in bounded memory."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from veil.common.frozen_prefix import ROOM_BYTES, FrozenPrefix, lowest_trained

RECORDS = {name: torch.linspace(-1, 1, 15).reshape(3, 5) * scale for name, scale in (("a", 1.0), ("b", 2.0))}


class Block(nn.Module):
    """A layer that counts its calls; a tuple also carries something beside the hidden states."""

    def __init__(self, seed: int, form: type) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 5, generator=torch.Generator().manual_seed(seed)) / 2)
        self.form, self.calls = form, 0

    def forward(self, hidden: Tensor, scale: float, *, shift: float = 0.0) -> Any:
        self.calls += 1
        output = torch.tanh(hidden @ self.weight * scale) + shift
        return (output, None) if self.form is tuple else output


class Stack:
    """Four blocks, run as transformers runs them."""

    def __init__(self, form: type = Tensor) -> None:
        self.blocks = [Block(seed, form) for seed in range(4)]
        self.prefix = FrozenPrefix(self.blocks)

    def __call__(self, key: Hashable, record: Tensor) -> Tensor:
        with self.prefix.record(key):
            return self.run(record)

    def run(self, hidden: Tensor) -> Tensor:
        for block in self.blocks:
            output = block(hidden, 1.5, shift=0.1)
            hidden = output[0] if isinstance(output, tuple) else output
        return hidden

    def gradient(self, key: Hashable, record: Tensor, index: int) -> Tensor:
        (found,) = torch.autograd.grad(self(key, record).square().sum(), self.blocks[index].weight)
        return found

    @property
    def calls(self) -> list[int]:
        return [block.calls for block in self.blocks]


@pytest.fixture(params=[Tensor, tuple], ids=["tensor", "tuple"])
def stack(request: pytest.FixtureRequest) -> Stack:
    return Stack(request.param)


@pytest.mark.parametrize("first", [1, 2, 3, 4])
def test_what_is_remembered_is_what_the_blocks_gave(stack: Stack, first: int) -> None:
    expected = {name: stack(None, record) for name, record in RECORDS.items()}
    stack.prefix.freeze(first)
    for _ in range(2):
        for name, record in RECORDS.items():
            assert torch.equal(stack(name, record), expected[name])
    assert stack.calls == [4] * first + [6] * (4 - first), "frozen blocks are computed once a record"


def test_gradients_are_the_same_to_the_bit(stack: Stack) -> None:
    expected = stack.gradient(None, RECORDS["a"], 2)
    stack.prefix.freeze(2)
    for _ in range(2):
        assert torch.equal(stack.gradient("a", RECORDS["a"], 2), expected)


def test_another_lowest_block_forgets_and_the_same_does_not(stack: Stack) -> None:
    stack.prefix.freeze(3)
    stack("a", RECORDS["a"])
    stack.prefix.freeze(3)
    stack("a", RECORDS["a"])
    assert stack.calls == [1, 1, 1, 2]
    with torch.no_grad():
        stack.blocks[1].weight.mul_(2)
    stack.prefix.freeze(1)
    moved = stack("a", RECORDS["a"])
    assert torch.equal(moved, stack(None, RECORDS["a"])), "as block 1 trains, what followed from it is stale"
    stack.prefix.freeze(3)
    assert torch.equal(stack("a", RECORDS["a"]), moved)
    assert stack.calls[0] == 4


def test_nothing_is_remembered_without_a_key_or_while_the_lowest_block_trains(stack: Stack) -> None:
    stack.prefix.freeze(2)
    for _ in range(2):
        stack(None, RECORDS["a"])
    stack.prefix.freeze(0)
    for _ in range(2):
        stack("a", RECORDS["a"])
    assert stack.calls == [4] * 4


@pytest.mark.parametrize("size", [59, 60, 119, 120])
def test_no_more_is_remembered_than_there_is_room(stack: Stack, size: int) -> None:
    """An output of 3 x 5 float32 takes 60 bytes."""
    assert stack.prefix.room == ROOM_BYTES
    stack.prefix.room = size
    stack.prefix.freeze(2)
    expected = {name: stack(None, record) for name, record in RECORDS.items()}
    for _ in range(2):
        for name, record in RECORDS.items():
            assert torch.equal(stack(name, record), expected[name])
    kept = size // 60
    assert stack.calls[0] == 2 + 4 - kept


def test_threads_do_not_take_each_other_s_records(stack: Stack) -> None:
    """Both are inside at once: each has its own record's outputs."""
    expected = {name: stack(None, record) for name, record in RECORDS.items()}
    stack.prefix.freeze(3)
    together = Barrier(2)

    def run(name: str) -> Tensor:
        with stack.prefix.record(name):
            together.wait(timeout=30)
            return stack.run(RECORDS[name])

    for _ in range(3):
        with ThreadPoolExecutor(2) as pool:
            for name, found in zip(RECORDS, pool.map(run, RECORDS), strict=True):
                assert torch.equal(found, expected[name])


def test_an_error_inside_leaves_no_record_behind(stack: Stack) -> None:
    stack.prefix.freeze(2)
    with pytest.raises(RuntimeError), stack.prefix.record("a"):
        stack.blocks[0](torch.zeros(3, 4), 1.0)
    assert torch.equal(stack.run(RECORDS["b"]), stack(None, RECORDS["b"]))
    assert torch.equal(stack("a", RECORDS["a"]), stack(None, RECORDS["a"]))


@pytest.mark.parametrize(
    ("trained", "below", "expected"),
    [([3], False, 3), ([3, 1], False, 1), ([0], False, 0), ([], False, 4), ([3], True, 0), ([], True, 0)],
)
def test_the_lowest_block_that_trains(trained: Sequence[int], below: bool, expected: int) -> None:
    blocks = [Block(seed, Tensor) for seed in range(4)]
    assert lowest_trained(blocks, [blocks[index].weight for index in trained], below) == expected
