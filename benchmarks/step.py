# SPDX-License-Identifier: Apache-2.0
"""What one private step of a linear head costs, beside a plain one and beside Opacus: all in one run, taking turns.

`python benchmarks/step.py` writes benchmarks/STEP.md. Every step starts from prepared inputs and ends with moved
weights; private ones clip each record and add noise of σ = 1 to the sum. Medians over the repeats, one thread.
"""

from __future__ import annotations

import argparse
import os

os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")

import platform
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from opacus import GradSampleModule
from opacus.grad_sample import GradSampleModuleFastGradientClipping
from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping
from torch.nn.functional import cross_entropy

from veil.client.head_batch import HeadBatch
from veil.client.optimizer import LatticeOptimizer
from veil.client.release import _step
from veil.client.units import Units
from veil.common.noise import OSNoise
from veil.common.privacy import Mechanism

SIZES = (
    (256, 384, 10),
    (1024, 384, 10),
    (512, 768, 100),
    (4096, 768, 100),
    (256, 1280, 1000),
    (1024, 1280, 1000),
    (2048, 1280, 1000),
)
CLIP, RATE = 0.5, 0.1
IN_A_ROW = 10
HOOK_BYTES = 6 * 2**30
"""Above, Opacus' per-sample tensors do not fit this benchmark's memory."""

Step = Callable[[], object]


class NoNoise(OSNoise):
    """To see what the noise costs."""

    def gaussian(self, count: int) -> np.ndarray:
        """Zeros."""
        return np.zeros(count)


def plain(inputs: torch.Tensor, labels: torch.Tensor, classes: int) -> Step:
    """Not private: one batch, one gradient, one descent."""
    head = torch.nn.Linear(inputs.shape[1], classes, dtype=inputs.dtype)
    optimizer = torch.optim.SGD(head.parameters(), lr=RATE)

    def step() -> None:
        optimizer.zero_grad()
        cross_entropy(head(inputs), labels).backward()
        optimizer.step()

    return step


def veil(inputs: np.ndarray, labels: np.ndarray, classes: int, noise: OSNoise) -> Step:
    """The product's own step."""
    units = Units(features=inputs, labels=labels, unit=np.arange(len(labels)), count=len(labels))
    batch = HeadBatch.of(units, np.zeros(inputs.shape[1]))
    paid = Mechanism(noise_multiplier=1.0, max_grad_norm=CLIP)
    weight = np.zeros((classes, inputs.shape[1] + 1))
    optimizer = LatticeOptimizer(weight, mechanism=paid, noise=noise, learning_rate=RATE, divisor=len(labels))
    return lambda: _step(optimizer, batch, paid)


def hooks(inputs: torch.Tensor, labels: torch.Tensor, classes: int) -> Step:
    """Opacus as its tutorials use it: per-sample gradients by hooks."""
    head = GradSampleModule(torch.nn.Linear(inputs.shape[1], classes))
    optimizer = DPOptimizer(
        torch.optim.SGD(head.parameters(), lr=RATE),
        noise_multiplier=1.0,
        max_grad_norm=CLIP,
        expected_batch_size=len(labels),
    )

    def step() -> None:
        optimizer.zero_grad()
        cross_entropy(head(inputs), labels).backward()
        optimizer.step()

    return step


def ghost(inputs: torch.Tensor, labels: torch.Tensor, classes: int) -> Step:
    """Opacus' ghost clipping: norms first, then a second, weighted pass."""
    head = GradSampleModuleFastGradientClipping(
        torch.nn.Linear(inputs.shape[1], classes), max_grad_norm=CLIP, use_ghost_clipping=True
    )
    optimizer = DPOptimizerFastGradientClipping(
        torch.optim.SGD(head.parameters(), lr=RATE),
        noise_multiplier=1.0,
        max_grad_norm=CLIP,
        expected_batch_size=len(labels),
    )
    loss = DPLossFastGradientClipping(head, optimizer, torch.nn.CrossEntropyLoss())

    def step() -> None:
        optimizer.zero_grad()
        loss(head(inputs), labels).backward()
        optimizer.step()

    return step


def steps(batch: int, width: int, classes: int) -> dict[str, Step]:
    """All variants on the same records."""
    random = np.random.default_rng(0)
    rows = random.normal(size=(batch, width))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    named = random.integers(0, classes, batch)
    single, double, labels = torch.tensor(rows, dtype=torch.float32), torch.tensor(rows), torch.tensor(named)
    found = {
        "plain": plain(single, labels, classes),
        "plain float64": plain(double, labels, classes),
        "veil": veil(rows, named, classes, OSNoise()),
        "veil without noise": veil(rows, named, classes, NoNoise()),
        "opacus ghost": ghost(single, labels, classes),
    }
    if 4 * batch * classes * (width + 1) <= HOOK_BYTES:
        found["opacus hooks"] = hooks(single, labels, classes)
    return found


def measure(variants: dict[str, Step], repeats: int, limit_s: float) -> dict[str, float]:
    """Median milliseconds of each, taking turns of a few steps in a row as training does; slow ones fewer times."""
    taken: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(repeats // IN_A_ROW + 1):
        for name, step in variants.items():
            for _ in range(IN_A_ROW):
                if sum(taken[name]) > limit_s and len(taken[name]) >= 3:
                    break
                began = time.perf_counter()
                step()
                if turn:
                    taken[name].append(time.perf_counter() - began)
    return {name: 1e3 * statistics.median(times) for name, times in taken.items()}


def main() -> None:
    """Measure and write the table."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--repeats", type=int, default=200)
    options.add_argument("--limit", type=float, default=2.0, help="seconds for one variant of one size")
    options.add_argument("--output", type=Path, default=Path(__file__).parent / "STEP.md")
    chosen = options.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    names = ("plain", "plain float64", "veil", "veil without noise", "opacus ghost", "opacus hooks")
    lines = [
        "# One step of a linear head",
        "",
        f"`python benchmarks/step.py`, {platform.machine()}, one thread, torch {torch.__version__}, "
        f"numpy {np.__version__}. Milliseconds a step, medians taken in turns in one run.",
        "",
        "| batch x features x classes | "
        + " | ".join(names)
        + " | veil / plain | veil / plain float64 | hooks / veil |",
        "|---|" + "---|" * (len(names) + 3),
    ]
    for batch, width, classes in SIZES:
        found = measure(steps(batch, width, classes), chosen.repeats, chosen.limit)
        cells = [f"{found[name]:.3g}" if name in found else "no memory" for name in names]
        ratios = [found["veil"] / found["plain"], found["veil"] / found["plain float64"]]
        cells += [f"{ratio:.2f}" for ratio in ratios]
        cells.append(f"{found['opacus hooks'] / found['veil']:.0f}" if "opacus hooks" in found else "–")
        lines.append(f"| {batch} x {width} x {classes} | " + " | ".join(cells) + " |")
        print(lines[-1], flush=True)
    chosen.output.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
