# SPDX-License-Identifier: Apache-2.0
"""The memory plan: what a site's executor and the coordinator of a run hold at most in a round.

Promises that sizes are counted on the model itself and a made-up record, none guessed from its name; that no record is
read for it; and that nothing of a site's records is in it, so that a refusal over memory tells nothing of them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from veil.common.errors import RefusalCode, RefusalError
from veil.common.frozen_prefix import ROOM_BYTES
from veil.common.plan import RunPlan
from veil.common.privacy import PrivacyUnit

READ_BYTES: Final = 2**28
"""What read records of a site take in memory, at most."""

BATCH_BYTES: Final = 2**30
"""What all batches of a head in a process take together, at most."""

LIBRARIES_BYTES: Final = 600_000_000
"""What an executor held after a round without the model's weights, where the system does not say it: measured on
2026-11-22 with torch 2.13 for the CPU and transformers 5.23 on Linux (benchmarks/MEMORY.md)."""

THREAD_BYTES: Final = 2**24
"""What a thread that computes holds of its own: its allocator's and the mathematical libraries' buffers. Measured on
2026-11-22, torch 2.13 for the CPU: 10 to 15 MB."""

_FLOAT32, _INT64 = 4, 8
_FEW_BYTES = 2**28
"""Gradients in memory at once that are no matter."""

_COPIES_IN = 3
"""Of what comes: the message as it came, its arrays, and the adapter."""

_COPIES_OUT = 5
"""Of what leaves: the narrow update, its bytes, the ledger's, the answer's arrays, and the message."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Footprint:
    """Sizes that were counted on a model, for the round of a plan in which most trains.

    Attributes:
        held: what the process held once the pretrained model was loaded, bytes; 0 where the system does not say it.
        weights: parameters and buffers, bytes.
        adapter: numbers that travel to a site.
        released: numbers that leave it.
        width: features of a record.
        kept: what one record's forward pass keeps for the backward pass, weights left out, bytes.
        widest: what the module with most takes and gives, bytes.
        remembered: what is remembered of a record's frozen blocks, bytes.
        read: a record as the model takes it, bytes.
    """

    held: int
    weights: int
    adapter: int
    released: int
    width: int
    kept: int
    widest: int
    remembered: int
    read: int

    @property
    def libraries(self) -> int:
        """What the process holds besides the pretrained model, bytes."""
        return self.held - self.weights if self.held else LIBRARIES_BYTES


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryPlan:
    """What a process holds when it holds most.

    Attributes:
        moment: when that is, "while …".
        parts: bytes by what they are for.
        room: what of them is remembered where there is room, and computed again where there is none, bytes.
    """

    moment: str
    parts: Mapping[str, int]
    room: int = 0

    @property
    def peak(self) -> int:
        """All parts together, bytes."""
        return sum(self.parts.values())

    @property
    def needed(self) -> int:
        """What it cannot do without, bytes."""
        return self.peak - self.room


def in_flight(released: int) -> int:
    """How many units' gradients are in memory at once, made or being made: enough that no core waits.

    Args:
        released: numbers of one.
    """
    cores = os.cpu_count() or 1
    return min(4 * cores, max(cores + 1, _FEW_BYTES // (_FLOAT32 * max(1, released))))


def held_now() -> int:
    """What this process holds in memory, bytes; 0 where the system does not say it."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("VmRSS:")), 0)


def size_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors, memory that several share counted once."""
    return sum({one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in tensors}.values())


def weigh(model: nn.Module, compute: Callable[[], Tensor]) -> tuple[int, int]:
    """What a computation keeps for its backward pass, the model's own tensors left out, and what the module with most
    takes and gives; bytes.

    Args:
        model: whose modules are looked at.
        compute: a forward pass, within this thread.
    """
    own = {one.untyped_storage().data_ptr() for one in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}
    widest = 0

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()

    def look(module: nn.Module, inputs: Any, output: Any) -> None:
        nonlocal widest
        several = output if isinstance(output, tuple) else (output,)
        widest = max(widest, size_of(one for one in (*inputs, *several) if isinstance(one, Tensor)))

    hooks = [module.register_forward_hook(look) for module in model.modules()]
    try:
        with torch.enable_grad(), saved_tensors_hooks(keep, lambda tensor: tensor):
            compute()
    finally:
        for hook in hooks:
            hook.remove()
    return sum(kept.values()), widest


def site_memory(plan: RunPlan, found: Footprint, *, records: int | None = None) -> MemoryPlan:
    """What a site's executor holds at most in a round.

    What gradients took stays with the process when they are gone: their threads' allocator keeps it.

    Args:
        plan: the run's.
        found: sizes of its model.
        records: public number of them; without it, what is remembered of records is as much as may be.
    """
    if not plan.transfer.deep:
        return _head_memory(plan, found, records)
    cores, vector = os.cpu_count() or 1, _FLOAT32 * found.released
    models = 2 if plan.training.centre else 1
    room = _room(found, records)
    several = plan.privacy.unit is PrivacyUnit.PATIENT
    always = {
        "libraries": found.libraries,
        "threads": cores * THREAD_BYTES,
        "weights": models * found.weights,
        "adapter": _COPIES_IN * _FLOAT32 * found.adapter,
        "gradients": (in_flight(found.released) + 1 + (2 * cores if several else 0)) * vector,
        "activations": cores * (found.kept + 2 * found.widest),
        "remembered of records": room,
    }
    moments = {
        "noise is added": {"sum": _INT64 * found.released, "update": _INT64 * found.released},
        "the answer is sent": {"update": _COPIES_OUT * vector},
    }
    moment = max(moments, key=lambda name: sum(moments[name].values()))
    return MemoryPlan(moment=moment, parts={**always, **moments[moment]}, room=room)


def fitted(plan: RunPlan, found: Footprint, limit: int) -> int:
    """What may be remembered of records within a limit, bytes.

    Args:
        plan: with a mode that tunes more than the head.
        found: sizes of its model.
        limit: what the process may hold, bytes.

    Raises:
        RefusalError: with the code `policy`, when a round needs more even if nothing is remembered.
    """
    asked = site_memory(plan, found)
    if asked.needed > limit:
        raise RefusalError(
            RefusalCode.POLICY,
            f'transfer.mode = "{plan.transfer.mode}" needs {asked.needed / 1e9:.2f} GB while {asked.moment}',
            f"at most agent.max_memory_gb = {limit / 1e9:g}",
            "raise it in site.toml if the machine has more, or ask the coordinator for a mode that trains less",
        )
    return min(asked.room, limit - asked.needed)


def coordinator_memory(found: Footprint, *, sites: int) -> MemoryPlan:
    """What the coordinator's process of a run holds at most, counted only: no run was measured for it.

    Args:
        found: sizes of the plan's model.
        sites: whose replies are in memory together.
    """
    adapter, released = _FLOAT32 * found.adapter, _FLOAT32 * found.released
    return MemoryPlan(
        moment="updates are summed",
        parts={
            "libraries": found.libraries,
            "weights": found.weights,
            "adapter, exact, and velocity": 2 * _INT64 * found.adapter,
            "adapter": _COPIES_IN * adapter,
            "updates": 2 * sites * released,
            "sum": 3 * _INT64 * found.released,
        },
    )


def _head_memory(plan: RunPlan, found: Footprint, records: int | None) -> MemoryPlan:
    """Of a plan that tunes a head only: features of 32 bits, and a batch that is ready for a step."""
    row = _FLOAT32 * (2 * found.width + 1 + 5 * len(plan.task.labels))
    return MemoryPlan(
        moment="features are computed and a step is made",
        parts={
            "libraries": found.libraries,
            "threads": (os.cpu_count() or 1) * THREAD_BYTES,
            "weights": found.weights,
            "activations": 2 * (os.cpu_count() or 1) * found.widest,
            "batch": BATCH_BYTES if records is None else min(BATCH_BYTES, records * row),
        },
    )


def _room(found: Footprint, records: int | None) -> int:
    if records is None:
        return (ROOM_BYTES if found.remembered else 0) + READ_BYTES
    return min(ROOM_BYTES, records * found.remembered) + min(READ_BYTES, records * found.read)
