# SPDX-License-Identifier: Apache-2.0
"""A frozen MiniLM sentence encoder for the peers' environments.

Promises the masked mean of the last layer, length 1, and no gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Encoder(nn.Module):
    """Tokens in, one feature row per text out."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        states = self.model(input_ids=ids, attention_mask=mask).last_hidden_state
        kept = mask[:, :, None].to(states.dtype)
        return nn.functional.normalize((states * kept).sum(1) / kept.sum(1), dim=1)


def load_encoder(folder: str) -> Encoder:
    """The encoder from a folder of files; nothing is fetched."""
    from transformers import AutoModel

    return Encoder(AutoModel.from_pretrained(folder, local_files_only=True))


def tokenize(notes: list[str], folder: str, max_length: int) -> tuple[Tensor, Tensor]:
    """Token numbers and mask, both [notes, tokens of the longest]."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    read = tokenizer(notes, padding="longest", truncation=True, max_length=max_length, return_tensors="pt")
    return read["input_ids"], read["attention_mask"]


def encode(notes: list[str], folder: str, max_length: int, batch: int = 32) -> Tensor:
    """One feature row per note, [notes, width]."""
    encoder = load_encoder(folder)
    ids, mask = tokenize(notes, folder, max_length)
    parts = zip(ids.split(batch), mask.split(batch), strict=True)
    return torch.cat([encoder(*part) for part in parts])
