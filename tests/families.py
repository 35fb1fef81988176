# SPDX-License-Identifier: Apache-2.0
"""Makers of tiny random models of transformers' own classes, family by family, saved as checkpoints are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

kinds: Any = transformers

THIN = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
TEXT_SIZE = {"vocab_size": 256, "max_position_embeddings": 40}
IMAGE = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
WAVE = {
    "conv_dim": (8, 8),
    "conv_kernel": (10, 8),
    "conv_stride": (5, 8),
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
}

TEXT_MODELS = {
    "BERT": lambda: kinds.BertModel(kinds.BertConfig(**THIN, **TEXT_SIZE)),
    "RoBERTa": lambda: kinds.RobertaModel(kinds.RobertaConfig(**THIN, **TEXT_SIZE)),
    "DistilBERT": lambda: kinds.DistilBertModel(
        kinds.DistilBertConfig(dim=8, n_layers=2, n_heads=2, hidden_dim=16, **TEXT_SIZE)
    ),
    "GPT-2": lambda: kinds.GPT2LMHeadModel(
        kinds.GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=256, n_positions=40)
    ),
    "Llama": lambda: kinds.LlamaForCausalLM(kinds.LlamaConfig(**THIN, num_key_value_heads=1, **TEXT_SIZE)),
    "T5": lambda: kinds.T5ForConditionalGeneration(
        kinds.T5Config(d_model=8, d_kv=4, d_ff=16, num_layers=2, num_heads=2, vocab_size=256)
    ),
}
IMAGE_MODELS = {
    "ResNet": lambda: kinds.ResNetModel(kinds.ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1])),
    "EfficientNet": lambda: kinds.EfficientNetModel(
        kinds.EfficientNetConfig(width_coefficient=0.25, depth_coefficient=0.1, hidden_dim=320)
    ),
    "ViT": lambda: kinds.ViTModel(kinds.ViTConfig(**THIN, image_size=64)),
    "ConvNeXt": lambda: kinds.ConvNextModel(kinds.ConvNextConfig(hidden_sizes=[4, 4, 8, 8], depths=[1, 1, 1, 1])),
    "MobileNetV2": lambda: kinds.MobileNetV2Model(kinds.MobileNetV2Config(depth_multiplier=0.25)),
    "YOLOS": lambda: kinds.YolosForObjectDetection(
        kinds.YolosConfig(**THIN, image_size=[64, 64], num_detection_tokens=4)
    ),
}
SOUND_MODELS = {
    "wav2vec2": lambda: kinds.Wav2Vec2ForCTC(kinds.Wav2Vec2Config(**THIN, **WAVE, vocab_size=8)),
    "HuBERT": lambda: kinds.HubertModel(kinds.HubertConfig(**THIN, **WAVE)),
    "Whisper": lambda: kinds.WhisperForConditionalGeneration(
        kinds.WhisperConfig(
            d_model=8,
            encoder_layers=2,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=16,
            decoder_ffn_dim=16,
            num_mel_bins=8,
            max_source_positions=100,
            vocab_size=16,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=1,
        )
    ),
}
WAVE_EXTRACTOR = {"feature_extractor_type": "Wav2Vec2FeatureExtractor", "sampling_rate": 16_000, "do_normalize": True}
WHISPER_EXTRACTOR = {
    "feature_extractor_type": "WhisperFeatureExtractor",
    "sampling_rate": 16_000,
    "feature_size": 8,
    "chunk_length": 2,
}


def saved(model: torch.nn.Module, folder: Path) -> Path:
    """A model whose weights let a signal pass, so that its features differ by record."""
    torch.manual_seed(5)
    with torch.no_grad():
        for name, one in model.named_parameters():
            if one.ndim > 1:
                one.normal_(0, (2 * len(one) / one.numel()) ** 0.5)
            elif name.endswith("weight"):
                one.fill_(1.0)
    kept: Any = model
    kept.save_pretrained(folder)
    return folder


def write_tokenizer(folder: Path) -> None:
    """One token a byte, as GPT-2's begins, and none for padding."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: place for place, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')


def extractor(family: str) -> dict[str, Any]:
    return WHISPER_EXTRACTOR if family == "Whisper" else WAVE_EXTRACTOR
