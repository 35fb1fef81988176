# SPDX-License-Identifier: Apache-2.0
"""What is tuned below the head: names of tensors, which of them train in which round, and how fast; no torch here.

Promises that all of it follows from plan and names alone, so that coordinator and site agree on the order of the one
vector that leaves a site in a round.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

import numpy as np
from numpy.typing import NDArray

from veil.common.head import WEIGHT
from veil.common.plan import RunPlan
from veil.common.plan_sections import STRUCTURED, Transfer

GRADIENT: Final = "gradient"
"""Name of the released vector: the head's numbers, then those of the tuned tensors by name."""

_PREFIX: Final = "tuned."

_PRETRAINED_RATE: Final[Mapping[str, float]] = {
    "last-layers": 0.01,
    "full": 0.003,
    "gradual": 0.01,
    "bias": 0.1,
    "adapter": 0.08,
    "lora": 0.08,
    "prompt": 0.08,
}
"""Rate below the head at first, as part of the head's, where a plan names none: such that the noise that the weights
have at the end, as much smaller than the head's as the rate, moves what a block gives by a fraction of its size."""

_GRADIENT_SCALE: Final[Mapping[str, float]] = {
    "last-layers": 1 / 32,
    "full": 1 / 64,
    "gradual": 1 / 32,
    "bias": 1 / 16,
    "adapter": 1 / 8,
    "lora": 1 / 8,
    "prompt": 1 / 8,
}
"""What brings a gradient below the head to about the length of the head's: `benchmarks/TRANSFER.md` has the lengths."""


def tuned_name(depth: int, parameter: str) -> str:
    """A tensor's name in the adapter.

    Args:
        depth: 0 above all blocks, 1 for the top block and so on; below the lowest block, one more than its.
        parameter: its name in the model.
    """
    return f"{_PREFIX}{depth:03d}.{parameter}"


def is_tuned(name: str) -> bool:
    """Whether an adapter's tensor is one that is tuned below the head."""
    return name.startswith(_PREFIX)


def parameter_of(name: str) -> str:
    """A tuned tensor's name in the model."""
    return name.removeprefix(_PREFIX).partition(".")[2]


def depth_of(name: str) -> int:
    """How far below the head a tuned tensor is; see `tuned_name`."""
    return int(name.removeprefix(_PREFIX).partition(".")[0])


def unfrozen_blocks(plan: RunPlan, round_: int) -> int:
    """Gradual unfreezing (Howard and Ruder 2018): blocks from the top that train in a round, 0 at first.

    The rounds are divided evenly among 0, 1, … `transfer.layers` blocks.
    """
    stages = (plan.transfer.top or 0) + 1
    return min(stages - 1, (round_ - 1) * stages // plan.training.rounds)


def of_head(plan: RunPlan, round_: int) -> bool:
    """Whether a round of a deep mode is one of the first, in which the head alone trains on pretrained features.

    What is below the head then starts beside a head that fits it, and is not bent to one that does not (Kumar et al.
    2022, "Fine-tuning can distort pretrained features").
    """
    return round_ <= plan.transfer.head_rounds


def trained_in(plan: RunPlan, round_: int, names: Iterable[str]) -> tuple[str, ...]:
    """The tuned tensors that train in a round, in the order in which they leave.

    Args:
        plan: the run's.
        round_: a training round, 1, 2, …
        names: of an adapter's tensors.
    """
    tuned = sorted(name for name in names if is_tuned(name))
    if of_head(plan, round_):
        return ()
    if plan.transfer.mode != "gradual":
        return tuple(tuned)
    blocks = unfrozen_blocks(plan, round_)
    return tuple(name for name in tuned if max(1, depth_of(name)) <= blocks)


def rate_of(transfer: Transfer, name: str) -> float:
    """A tuned tensor's rate, as part of the head's."""
    rate = transfer.pretrained_rate or _PRETRAINED_RATE[transfer.mode]
    return float(rate * transfer.layer_decay ** (max(1, depth_of(name)) - 1))


def rate_left(plan: RunPlan, round_: int) -> float:
    """What is left of the rate below the head: it falls evenly from 1 towards 0 over the rounds that train there.

    So the last steps' noise, and the sample's, stays small in the weights; a head of few numbers needs none of it.
    """
    first = plan.transfer.head_rounds
    return (plan.training.rounds + 1 - round_) / (plan.training.rounds - first)


def gradient_scale(plan: RunPlan) -> float:
    """By which gradients below the head are multiplied before they are clipped together with the head's.

    They are ten to a hundred times as long as the head's. As they come, every unit would be cut to one length, those
    that the model knows already like those that it does not: the head would learn next to nothing, and where one class
    is frequent the rest would learn to answer it always. A constant of the mode, so it says nothing of anybody; 1 where
    an answer has a structure, as there is no one head then, or none.
    """
    return 1.0 if plan.task.form in STRUCTURED else _GRADIENT_SCALE[plan.transfer.mode]


def trained_words(plan: RunPlan) -> str:
    """What trains, in words that "of" and the model's name may follow; what goes on with a text keeps its output."""
    transfer = plan.transfer
    blocks = f"the top {transfer.top} blocks" if transfer.top else "all blocks"
    below = {
        "last-layers": blocks,
        "full": "every weight",
        "gradual": f"one after the other, {blocks}",
        "bias": f"the biases of {blocks}" if transfer.layers else "every bias",
        "adapter": f"small modules of width {transfer.bottleneck} behind {blocks}",
        "lora": f"changes of rank {transfer.rank} in the attention of {blocks}",
        "prompt": f"{transfer.prompt_length} vectors before each text",
    }
    if not transfer.deep:
        return "a new output layer"
    return below[transfer.mode] if plan.task.form == "generation" else f"a new output layer and {below[transfer.mode]}"


def released_size(shapes: Mapping[str, tuple[int, ...]], trained: Iterable[str]) -> int:
    """How many numbers a round's vector holds.

    Args:
        shapes: of the adapter's tensors.
        trained: the tuned tensors that train in the round.
    """
    return int(sum(np.prod(shapes[name], dtype=np.int64) for name in (WEIGHT, *trained)))


def parted(
    vector: NDArray[np.float64], shapes: Mapping[str, tuple[int, ...]], trained: Iterable[str]
) -> dict[str, NDArray[np.float64]]:
    """A round's vector as tensors by name, the head's among them.

    Args:
        vector: [`released_size`].
        shapes: of the adapter's tensors.
        trained: the tuned tensors that train in the round, in order.

    Raises:
        ValueError: for a vector of another size.
    """
    names = (WEIGHT, *trained)
    ends = np.cumsum([np.prod(shapes[name], dtype=np.int64) for name in names])
    if vector.shape != (ends[-1],):
        raise ValueError(f"a vector of {vector.shape}; expected [{ends[-1]}]")
    parts = np.split(vector, ends[:-1])
    return {name: part.reshape(shapes[name]) for name, part in zip(names, parts, strict=True)}
