# SPDX-License-Identifier: Apache-2.0
"""A GGUF file of SmolLM2's names becomes what transformers reads, bit for bit; any other is refused.

The files here have the real one's names and tiny tensors; the package gguf is an extra.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from veil.common import smollm2
from veil.common.pickled import SMOLLM2, converted_from

gguf: Any = pytest.importorskip("gguf", reason="the package gguf is an extra")

ROWS = {"attn_q": 36, "attn_k": 12}
TOKENS = ["<end>", "a", "b", "ab", "1", "2"]


def tensors() -> dict[str, NDArray[np.float32]]:
    random = np.random.default_rng(0)
    found = {"token_embd.weight": (6, 4), "output_norm.weight": (4,)}
    for block in range(30):
        for name in ("ffn_down", "ffn_gate", "ffn_up", "attn_q", "attn_k", "attn_v", "attn_output"):
            found[f"blk.{block}.{name}.weight"] = (ROWS.get(name, 4), 4)
        found |= {f"blk.{block}.{name}.weight": (4,) for name in ("attn_norm", "ffn_norm")}
    return {name: random.normal(size=shape).astype(np.float32) for name, shape in found.items()}


def write(file: Path, values: dict[str, NDArray[np.float32]], *, template: bool = True) -> Path:
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 1, 1, 1, 1, 1])
    writer.add_token_merges(["a b"])
    if template:
        writer.add_chat_template("{{ messages }}")
    for name, value in values.items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def test_tensors_are_taken_over_and_rotated_heads_put_in_halves(tmp_path: Path) -> None:
    values = tensors()
    documents, found = smollm2.read(write(tmp_path / "m.gguf", values))
    assert len(found) == len(values) == 272
    assert torch.equal(found["model.embed_tokens.weight"], torch.tensor(values["token_embd.weight"]))
    keys, expected = found["model.layers.7.self_attn.k_proj.weight"], values["blk.7.attn_k.weight"]
    assert np.array_equal(keys[:4], expected[[0, 2, 1, 3]])
    assert documents["config.json"]["model_type"] == "llama"
    assert set(documents) == set(SMOLLM2.files)


def test_the_tokenizer_merges_letters_and_keeps_digits_apart(tmp_path: Path) -> None:
    import json

    from tokenizers import Tokenizer

    documents, _ = smollm2.read(write(tmp_path / "m.gguf", tensors()))
    tokenizer = Tokenizer.from_str(json.dumps(documents["tokenizer.json"]))
    assert tokenizer.encode("ab12<end>").ids == [3, 4, 5, 0]


@pytest.mark.parametrize("missing", ["blk.3.ffn_up.weight", "token_embd.weight"])
def test_another_model_is_refused(missing: str, tmp_path: Path) -> None:
    values = tensors()
    del values[missing]
    with pytest.raises(ValueError, match=missing):
        smollm2.read(write(tmp_path / "m.gguf", values))


def test_a_file_without_a_key_or_damaged_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="chat_template is missing"):
        smollm2.read(write(tmp_path / "m.gguf", tensors(), template=False))
    whole = write(tmp_path / "w.gguf", tensors()).read_bytes()
    for content in (b"", b"GGUF", whole[: len(whole) // 3], b"x" * 100):
        (tmp_path / "d.gguf").write_bytes(content)
        with pytest.raises(ValueError, match="not a whole GGUF file"):
            smollm2.read(tmp_path / "d.gguf")


def test_the_real_file_s_conversion_is_known() -> None:
    (sha256,) = SMOLLM2.safetensors
    assert converted_from(sha256) is SMOLLM2
