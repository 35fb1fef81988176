# SPDX-License-Identifier: Apache-2.0
"""The frozen pretrained model: texts, images or sounds in, a row of features each out; transformers' only room.

Nothing but the pinned file's tensors and the JSON beside it is loaded and no code from there runs; a model
that trains, moves its statistics or would start with random layers is refused.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import torch
from torch import Tensor, nn

from veil.common import ge2e
from veil.common.conversion import converted
from veil.common.errors import RunError, TableError, WeightsError
from veil.common.plan_sections import Backbone, Form, Modality, Task
from veil.common.preprocessing import Features, ModelInput, Reader, read_json, reader_for
from veil.common.text_reading import text_reader
from veil.common.torchvision_mend import mend_torchvision
from veil.common.weights import COMPANIONS, PinnedWeights, locate

PoolingName = Literal["mean", "pooler"]

_ROUNDING = 1e-6
"""How far the same predictions may be apart, as part of the largest; decoders give them bit for bit."""

_WINDOW = 64
"""Records that are in memory at once as model inputs."""


class FrozenBackbone:
    """A pretrained model whose every tensor stays as it is; `load_backbone` makes one.

    Attributes:
        width: features per record.
        modality: what `encode` takes.
        pooling: what becomes the row: the mean of the last hidden states, or the model's own pooler.
        sha256: the pinned hash of the weights the plan names.

    Guarantees:
        - a record's features are computed from that record alone: not a bit of them depends on any other
        - no module is in train mode, and no buffer changes, while features are computed
    """

    def __init__(
        self,
        model: nn.Module,
        reader: Reader,
        pooling: Pooling,
        sha256: str,
        device: Literal["cpu", "cuda"],
    ) -> None:
        self._model, self._reader, self._pooling = model.to(device), reader, pooling
        self._device = device
        self._buffers: ModelInput | None = {name: one.clone() for name, one in model.named_buffers()}
        self.width: int = pooling.width
        self.modality: Modality = reader.modality
        self.pooling: PoolingName = pooling.name
        self.sha256: str = sha256

    def encode(
        self,
        inputs: Sequence[str] | Sequence[Path],
        *,
        advance: Callable[[int], None] | None = None,
        unreadable: Callable[[int, TableError], None] | None = None,
    ) -> Features:
        """Features of `inputs`, as the model gives them (rows are not normalised).

        One record at a time: beside others, a record would be padded to their length, and its features would follow
        theirs, by rounding (BERT) or by much (a model that does not heed its mask). It costs about twice the time,
        once.

        Args:
            inputs: n texts, or n paths of image or sound files.
            advance: called after every record with the number of records done since, 1.
            unreadable: called with the place of a file that cannot be read, whose row is zero then.

        Returns:
            float32 [n, width], row i for input i.

        Raises:
            TableError: a file cannot be read, and there is no `unreadable`.
            RunError: the model is in train mode, or a buffer changed.
        """
        features = np.zeros((len(inputs), self.width), dtype=np.float32)
        with one_thread_a_record() as pool:
            for start in range(0, len(inputs), _WINDOW):
                self._refuse_training()
                window: Sequence[str | Path] = inputs[start : start + _WINDOW]
                read = [self._read(place, record, unreadable) for place, record in enumerate(window, start)]
                for place, row in enumerate(pool.map(self._row, read), start):
                    features[place] = row
                    if advance is not None:
                        advance(1)
        if len(inputs) > 0:
            self._refuse_drift()
        return features

    def parts(self) -> tuple[nn.Module, Reader, Pooling]:
        """Model, reader and pooling, for who tunes it and promises nothing of the above any more."""
        return self._model, self._reader, self._pooling

    def _read(
        self, place: int, record: str | Path, unreadable: Callable[[int, TableError], None] | None
    ) -> ModelInput | None:
        try:
            return self._reader.read(record)
        except TableError as error:
            if unreadable is None:
                raise
            unreadable(place, error)
            return None

    def _row(self, record: ModelInput | None) -> Features:
        if record is None:
            return np.zeros(self.width, dtype=np.float32)
        with torch.inference_mode():
            there = {name: one.to(self._device) for name, one in record.items()}
            row: Features = self._pooling.pool(self._model(**there), there).cpu().numpy()[0]
        return row

    def _refuse_training(self) -> None:
        for name, module in self._model.named_modules():
            if module.training:
                raise _not_frozen(f"module {name or 'at the root'} in train mode")

    def _refuse_drift(self) -> None:
        """Looked at once, after the first records: statistics that move at all move with these."""
        if self._buffers is None:
            return
        for name, buffer in self._model.named_buffers():
            if not torch.equal(buffer, self._buffers[name]):
                raise _not_frozen(f"buffer {name} changed by computing features")
        self._buffers = None


def load_backbone(
    backbone: Backbone, task: Task, *, base: Path, device: Literal["cpu", "cuda"] = "cpu"
) -> FrozenBackbone:
    """Load a plan's pretrained model for its task.

    Args:
        backbone: source and hash.
        task: kind, and `max_length` (tokens), `image_size` (pixels) or `max_seconds`.
        base: folder that a relative `path:` source starts from.
        device: where features are computed; see `veil.common.lazy_backbone.chosen_device`.

    Raises:
        WeightsError: the weights are missing, not the pinned ones, damaged, ask for code of their own, or do
            not fit the task.
    """
    pinned = locate(backbone, base=base)
    files = converted(pinned)
    mend_torchvision()
    with _quiet(), _explained(files.folder):
        _refuse_code(files.folder)
        reads = text_reader(task, files.folder) or reader_for(task, files.folder)
        model, lacking = _model(files, _OWN_HEADS.get(task.form, "AutoModel"))
        if task.form == "generation":
            _check_causal(model, reads.largest())
            pooling = Pooling(width=0, name="mean", pool=_no_row)
        elif task.form == "detection":
            pooling = Pooling(width=_width_of_objects(model, reads.largest()), name="mean", pool=_no_row)
        else:
            pooling = _pooling(model, reads, lacking)
    return FrozenBackbone(model, reads, pooling, backbone.sha256, device)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pooling:
    """How a model's output becomes one row per record, and how wide the row is."""

    width: int
    name: PoolingName
    pool: Callable[[Any, ModelInput], Tensor]


def _no_row(output: Any, batch: ModelInput) -> Tensor:
    raise ValueError("a model with a head of its own has no one row per record")


def _width_of_objects(model: nn.Module, batch: ModelInput) -> int:
    """Features of each box that a detector proposes."""
    with torch.inference_mode():
        output = model(**batch)
    hidden, boxes = output.last_hidden_state, output.pred_boxes
    if hidden.ndim != 3 or hidden.shape[1] < boxes.shape[1] or not boxes.isfinite().all():
        raise ValueError(f"boxes {list(boxes.shape)} that are not each of a feature {list(hidden.shape)}")
    return int(hidden.shape[2])


_OWN_HEADS: Final[Mapping[Form, str]] = {
    "generation": "AutoModelForCausalLM",
    "detection": "AutoModelForObjectDetection",
}
"""Forms of task for which the pretrained model brings its head, and transformers' class of such models."""


def _check_causal(model: nn.Module, batch: ModelInput) -> None:
    """What follows a token must not be seen by its prediction, or the loss would be of words that are given away."""
    if not hasattr(model, "lm_head") and model.get_output_embeddings() is None:  # type: ignore[operator]  # transformers'
        raise ValueError(f"{type(model).__name__} without a head over its vocabulary")
    ids = batch["input_ids"].clone()
    ids[0, -1] = 0 if int(ids[0, -1]) else 1
    with torch.inference_mode():
        before, after = (model(**{**batch, "input_ids": one}).logits[0, :-1] for one in (batch["input_ids"], ids))
    if float((before - after).abs().max()) > _ROUNDING * float(before.abs().max()):
        raise ValueError(f"{type(model).__name__} looks at the tokens that it is to predict; use a decoder")


def _pooling(model: nn.Module, reader: Reader, lacking: set[str]) -> Pooling:
    """Choose by the output for the largest record, which also shows that the model takes such records."""
    batch = reader.largest()
    with torch.inference_mode():
        output = model(**batch)
    if reader.modality in ("text", "audio"):
        pool = _masked_mean
    elif getattr(output, "pooler_output", None) is not None and not lacking:
        pool = _pooler
    else:
        pool = _mean
    row = pool(output, batch)
    if row.ndim != 2 or not row.isfinite().all():
        raise ValueError(f"features of shape {list(row.shape)} that are not one finite row per record")
    return Pooling(width=row.shape[1], name="pooler" if pool is _pooler else "mean", pool=pool)


def _masked_mean(output: Any, batch: ModelInput) -> Tensor:
    """Over the tokens or moments of [n, tokens, d] that are the record's own: all of them where there is no mask.

    A speech encoder has one moment for several places of the mask, and takes the first.
    """
    hidden: Tensor = output.last_hidden_state
    if "attention_mask" not in batch:
        return hidden.mean(1)
    own = batch["attention_mask"]
    mask = own[:, :: -(-own.shape[1] // hidden.shape[1])].unsqueeze(-1)
    return (hidden * mask).sum(1) / mask.sum(1)


def _pooler(output: Any, batch: ModelInput) -> Tensor:
    pooled: Tensor = output.pooler_output
    return pooled.flatten(1)


def _mean(output: Any, batch: ModelInput) -> Tensor:
    """Over the tokens of [n, tokens, d], or the places of [n, d, height, width]."""
    hidden: Tensor = output.last_hidden_state
    return hidden.mean(1) if hidden.ndim == 3 else hidden.flatten(2).mean(2)


def _model(files: PinnedWeights, family: str) -> tuple[nn.Module, set[str]]:
    """The frozen model, and the names of its pooler's tensors that the weights lack (they are random then).

    It is handed tensors instead of the folder: from a folder, transformers would also follow an adapter or
    another weights file that some JSON there names, and neither is pinned.
    """
    import transformers
    from safetensors.torch import load_file
    from transformers import AutoConfig

    if read_json(files.folder / "config.json").get("model_type") == ge2e.MODEL_TYPE:
        return ge2e.loaded(load_file(files.weights_file)).eval().requires_grad_(False), set()
    auto: Any = getattr(transformers, family)
    config = AutoConfig.from_pretrained(
        files.folder, local_files_only=True, trust_remote_code=False, attn_implementation="eager"
    )
    config.use_cache = False  # of past tokens, which nobody asks for but who writes
    with torch.device("meta"):
        kind = type(auto.from_config(config, trust_remote_code=False))
    model, report = kind.from_pretrained(
        None,
        config=config,
        state_dict=load_file(files.weights_file),
        dtype=torch.float32,
        attn_implementation="eager",
        output_loading_info=True,
    )
    lacking = set(report["missing_keys"])
    if random := {name for name in lacking if not name.startswith("pooler.")}:
        raise ValueError(f"{len(random)} tensors are missing from the weights, such as {min(random)}")
    reading = model.get_encoder() if config.is_encoder_decoder else model
    return reading.eval().requires_grad_(False), lacking


def _refuse_code(folder: Path) -> None:
    for name in (one for one in COMPANIONS if one.endswith("config.json") and (folder / one).is_file()):
        if "auto_map" in read_json(folder / name):
            raise WeightsError(
                f"{folder / name} asks for code of its own (auto_map)",
                "a model that the installed transformers knows",
                "choose a backbone without remote code",
            )


@contextmanager
def _explained(folder: Path) -> Iterator[None]:
    """Turn whatever transformers raises over a folder it cannot use into one error for a person."""
    try:
        yield
    except WeightsError:
        raise
    except Exception as error:  # a dozen kinds, and none of them says what to do
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise WeightsError(
            f"{folder}: {reason}",
            "a complete model that fits task.kind and takes its max_length, image_size or max_seconds",
            "check the folder, and set max_length, image_size or max_seconds to what the model was made for",
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars, log lines or warnings meanwhile; transformers' own settings are put back after."""
    from transformers import utils

    control: Any = utils.logging
    bars, level = control.is_progress_bar_enabled(), control.get_verbosity()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        control.disable_progress_bar()
        control.set_verbosity_error()
        try:
            yield
        finally:
            control.set_verbosity(level)
            if bars:
                control.enable_progress_bar()


@contextmanager
def one_thread_a_record() -> Iterator[ThreadPoolExecutor]:
    """As many records at once as there are cores, each computed by one thread: its bits do not follow their number.

    Several threads for one record would spend their time waiting for each other, more so beside other processes.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
            yield pool
    finally:
        torch.set_num_threads(before)


def _not_frozen(found: str) -> RunError:
    return RunError(found, "a frozen backbone in evaluation mode", "load the backbone again and leave it be")
