# SPDX-License-Identifier: Apache-2.0
"""The floor of a workload: its matrix products and nothing else.

Promises two products of the right sizes for every local step of every client-round, batch for batch in the order of
the records, in numpy on as many threads as the systems may use; for notes, one pass of the frozen backbone before.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parent / "peers"))

from contract import Workload, answer, read_workload
from encoder import Encoder, load_encoder, tokenize


def main() -> None:
    """Run the products and answer."""
    work = read_workload()
    torch.set_num_threads(work.threads)
    encoder = load_encoder(str(work.backbone)) if work.notes is not None else None
    rows = np.array(work.read_features()) if encoder is None else None
    started = time.monotonic()
    if rows is None:
        rows = features(work, encoder)
    products(work, rows)
    answer(
        seconds=round(time.monotonic() - started, 4),
        setup_s=None,
        client_rounds=work.client_rounds,
        wire_bytes=2 * 4 * work.classes * (work.width + 1),
        accuracy=None,
        version=f"numpy {np.__version__}, torch {torch.__version__}",
    )


def features(work: Workload, encoder: Encoder | None) -> NDArray[np.float32]:
    """Every note once through the backbone, notes of like length together."""
    if encoder is None:
        raise ValueError("notes and no encoder; expected both")
    ids, mask = tokenize(work.read_notes(), str(work.backbone), work.max_length)
    lengths = mask.sum(1)
    order = torch.argsort(lengths)
    rows = np.empty((len(order), work.width), dtype=np.float32)
    for batch in order.split(32):
        longest = int(lengths[batch].max())
        rows[batch.numpy()] = encoder(ids[batch, :longest], mask[batch, :longest]).numpy()
    return rows


def products(work: Workload, rows: NDArray[np.float32]) -> None:
    """Scores and gradient of every step: [batch, width] @ [width, classes], [classes, batch] @ [batch, width]."""
    weight = np.zeros((work.classes, work.width), dtype=np.float32)
    gradient = np.empty_like(weight)
    sites = [rows[work.rows(site)] for site in range(work.sites)]
    for client_round in range(work.client_rounds):
        site = sites[client_round % work.sites]
        size = min(work.batch, len(site)) if work.sample_rate < 1.0 else len(site)
        scores = np.empty((size, work.classes), dtype=np.float32)
        for step in range(work.local_steps):
            start = step * size % max(len(site) - size + 1, 1)
            batch = site[start : start + size]
            np.matmul(batch, weight.T, out=scores)
            np.matmul(scores.T, batch, out=gradient)


if __name__ == "__main__":
    main()
