# SPDX-License-Identifier: Apache-2.0
"""The frozen blocks below the lowest one that trains: computed once for each record, then remembered.

Promises that what is remembered is what the blocks gave, bit for bit, and that it takes a bounded amount of memory; a
record for which there is no room is computed again.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

ROOM_BYTES = 2**30
"""What the remembered outputs of a process take together, at most."""


class FrozenPrefix:
    """Outputs of the block below the lowest that trains, by record.

    Args:
        blocks: all blocks, lowest first; their `forward` is replaced by one that may skip them.

    Attributes:
        room: what they take together, at most, bytes.
    """

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        self.room = ROOM_BYTES
        self._first = 0
        self._kept: dict[Hashable, Any] = {}
        self._bytes = 0
        self._mutex = threading.Lock()
        self._now = threading.local()
        for index, block in enumerate(blocks):
            block.forward = self._skipping(index, block.forward)

    def freeze(self, first: int) -> None:
        """From now on the blocks below number `first` are frozen; what was remembered of others is forgotten.

        Args:
            first: 0 where nothing is to be remembered.
        """
        if first != self._first:
            with self._mutex:
                self._first, self._kept, self._bytes = first, {}, 0

    @contextmanager
    def record(self, key: Hashable) -> Iterator[None]:
        """What the model computes inside, it computes of the record `key`; None remembers nothing."""
        self._now.key = key
        self._now.output = None if key is None else self._kept.get(key)
        try:
            yield
        finally:
            self._now.key = self._now.output = None

    def size_of(self, key: Hashable) -> int:
        """What is remembered of a record, bytes."""
        return _size(self._kept.get(key))

    def _skipping(self, index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        def skipping(hidden: Any, *rest: Any, **named: Any) -> Any:
            key, output = getattr(self._now, "key", None), getattr(self._now, "output", None)
            if key is None or index >= self._first:
                return forward(hidden, *rest, **named)
            if output is not None:
                return output if index == self._first - 1 else _like(output, hidden)
            found = forward(hidden, *rest, **named)
            if index == self._first - 1:
                self._keep(key, found)
            return found

        return skipping

    def _keep(self, key: Hashable, output: Any) -> None:
        size = _size(output)
        with self._mutex:
            if key not in self._kept and self._bytes + size <= self.room:
                self._kept[key] = _detached(output)
                self._bytes += size


def _size(output: Any) -> int:
    tensors = [one for one in (output if isinstance(output, tuple) else (output,)) if isinstance(one, Tensor)]
    return sum(one.numel() * one.element_size() for one in tensors)


def _detached(output: Any) -> Any:
    if isinstance(output, Tensor):
        return output.detach()
    return tuple(_detached(one) for one in output) if isinstance(output, tuple) else output


def _like(output: Any, hidden: Tensor) -> Any:
    """What a skipped block hands on: of the form that the blocks' outputs have."""
    return (hidden,) if isinstance(output, tuple) else hidden


def lowest_trained(blocks: Sequence[nn.Module], parameters: Sequence[nn.Parameter], below: bool) -> int:
    """Number of the lowest block that holds any of the parameters, or of blocks where none does.

    Args:
        blocks: lowest first.
        parameters: those that train.
        below: whether anything below the blocks trains; then it is 0.
    """
    if below:
        return 0
    wanted = {id(one) for one in parameters}
    for index, block in enumerate(blocks):
        if any(id(one) in wanted for one in block.parameters()):
            return index
    return len(blocks)
