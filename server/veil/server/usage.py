# SPDX-License-Identifier: Apache-2.0
"""`usage.py` of an export: the lines of Python that get a model's answers without Veil.

Promises that they need nothing but public libraries and the files beside them, and give `veil predict`'s numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from veil.common.head import HEAD_FILE, INTERCEPT
from veil.common.plan_sections import Modality, Task
from veil.server.onnx_head import Bounds

if TYPE_CHECKING:
    from veil.common.backbone import PoolingName

ADAPTER_FILE: Final = "adapter.safetensors"
ONNX_FILE: Final = "head.onnx"

_BARE: Final = """\
# The tensors of modules that Veil brings into the pretrained model; `veil predict` asks the whole.
from pathlib import Path

from safetensors.numpy import load_file

for name, tensor in load_file(Path(__file__).parent / "{file}").items():
    print(name, tensor.shape)
"""

_TRANSFORMERS: Final = """\
# python usage.py {words}
{imports}
from safetensors.torch import load_file
from torch.nn.functional import normalize

here = Path(__file__).parent
{folder}
{record}
model = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
model = model.get_encoder() if model.config.is_encoder_decoder else model{tuned}
with torch.inference_mode():
    hidden = model(**record).{output}
{features}
head = {{name: one.double() for name, one in load_file(here / "{head_file}").items()}}
rows = normalize(normalize(features.double()) - head["centre"])
inputs = torch.nn.functional.pad(rows, (0, 1), value={intercept}) / (1 + {intercept}**2) ** 0.5
logits = inputs @ head["head.weight"].T
{answers}
for row in answers:
    print(dict(zip({labels}, row.tolist())))
"""

_WORDS: Final[Mapping[Modality, str]] = {"text": '"A TEXT"', "image": "IMAGE", "audio": "SOUND.wav"}

_IMPORTS: Final[Mapping[Modality, str]] = {
    "text": """\
import sys
from pathlib import Path

import torch
import transformers""",
    "image": """\
import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image""",
    "audio": """\
import math
import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from scipy.io import wavfile
from scipy.signal import resample_poly""",
}

_TEXT: Final = """\
tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
tokens = tokenizer(sys.argv[1], truncation=True, max_length={max_length}, return_tensors="pt")
record = {{name: tokens[name] for name in ("input_ids", "attention_mask")}}"""

_IMAGE: Final = """\
square = Image.open(sys.argv[1]).convert("RGB").resize(({size}, {size}), Image.Resampling.BILINEAR)
pixels = (np.asarray(square, np.float32) * np.float32({factor}) - np.float32({mean})) / np.float32({std})
record = {{"pixel_values": torch.from_numpy(pixels[None]).permute(0, 3, 1, 2)}}"""

_SOUND: Final = """\
own_rate, samples = wavfile.read(sys.argv[1])  # whole numbers of 16 bits
samples = samples[: math.ceil({max_seconds} * own_rate)] / 32768
samples = samples if samples.ndim == 1 else samples.mean(axis=1)
common = math.gcd(own_rate, {rate})
samples = resample_poly(samples, {rate} // common, own_rate // common).astype(np.float32)
samples = np.pad(samples, (0, max(0, {rate} // 10 - len(samples))))
extractor = transformers.AutoFeatureExtractor.from_pretrained(folder)
record = extractor(samples, sampling_rate={rate}, return_attention_mask={padded}, return_tensors="pt")"""

_OWN: Final = "folder = here"
_BASE: Final = "folder = sys.argv.pop(1)  # its weights have SHA-256 {sha256}"

_PEFT: Final = """
model = peft.PeftModel.from_pretrained(model, here)"""

_TENSORS: Final = """
for name, one in load_file(here / "{file}").items():
    if name.startswith("tuned."):  # and a depth, and the parameter's own name
        model.get_parameter(name.split(".", 2)[2]).data.copy_(one)"""

_POOLER: Final = "features = hidden.flatten(1)"
_MEAN: Final = "features = hidden.mean(1) if hidden.ndim == 3 else hidden.flatten(2).mean(2)"
_MEAN_OF_SOUND: Final = """\
own = record["attention_mask"]  # of samples or frames, several for one place of the encoder's
own = own[:, :: -(-own.shape[1] // hidden.shape[1])].unsqueeze(-1)
features = (hidden * own).sum(1) / own.sum(1)"""

_NUMPY: Final = """\
# python usage.py {words}
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

{rows}
rows[~np.isfinite(rows).all(1)] = 0
head = load_file(Path(__file__).parent / "{file}")
for moved in (0, head["centre"]):
    rows = rows - moved
    rows = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-300)
inputs = np.pad(rows, ((0, 0), (0, 1)), constant_values={intercept}) / (1 + {intercept}**2) ** 0.5
logits = inputs @ head["head.weight"].T.astype(np.float64)
{answers}
for row in answers:
    print(dict(zip({labels}, row.tolist())))
"""

_SOFTMAX: Final = "np.exp(logits - logits.max(1, keepdims=True))\nanswers = answers / answers.sum(1, keepdims=True)"

_ONNX: Final = """\
# python usage.py {words}
import sys
from pathlib import Path

import numpy as np
import onnx
from onnx.reference import ReferenceEvaluator  # slow and exact; any other runtime takes the same file

{rows}
model = ReferenceEvaluator(onnx.load(Path(__file__).parent / "{file}"))
for row in model.run(None, {{"features": rows}})[0]:
    print(dict(zip({labels}, row.tolist())))
"""


def for_transformers(task: Task, pooling: PoolingName, told: Mapping[str, Any]) -> str:
    """The lines for a Hugging Face folder: a record in, its answers out.

    Args:
        task: modality, form, labels and sizes.
        pooling: how the backbone's output becomes a row.
        told: by the backbone's preprocessor_config.json; empty for text.
    """
    return _transformers(task, pooling, told, folder=_OWN, tuned="", head_file=HEAD_FILE)


def for_peft(task: Task, pooling: PoolingName, told: Mapping[str, Any], sha256: str) -> str:
    """The lines for LoRA's tensors in peft's form: a folder with the pretrained model and a record in, answers out.

    Args:
        task: as above, like `pooling` and `told`.
        sha256: of the pretrained weights.
    """
    base = _BASE.format(sha256=sha256)
    lines = _transformers(task, pooling, told, folder=base, tuned=_PEFT, head_file=HEAD_FILE)
    return lines.replace("import torch\n", "import peft\nimport torch\n", 1)


def for_tensors(task: Task, pooling: PoolingName, told: Mapping[str, Any], sha256: str) -> str:
    """The lines for tuned tensors that are the pretrained model's own; arguments and words as `for_peft`."""
    base, tuned = _BASE.format(sha256=sha256), _TENSORS.format(file=ADAPTER_FILE)
    return _transformers(task, pooling, told, folder=base, tuned=tuned, head_file=ADAPTER_FILE)


def _transformers(
    task: Task, pooling: PoolingName, told: Mapping[str, Any], *, folder: str, tuned: str, head_file: str
) -> str:
    masked = task.modality == "audio" and "chunk_length" in told
    record = _WORDS[task.modality]
    return _TRANSFORMERS.format(
        words=record if folder == _OWN else f"FOLDER_OF_THE_PRETRAINED_MODEL {record}",
        imports=_IMPORTS[task.modality],
        folder=folder,
        record=_record(task, told),
        tuned=tuned,
        output="pooler_output" if pooling == "pooler" else "last_hidden_state",
        features=_POOLER if pooling == "pooler" else _MEAN_OF_SOUND if masked else _MEAN,
        head_file=head_file,
        intercept=INTERCEPT,
        answers=_answers(task, softmax="torch.softmax(logits, 1)", sigmoid="torch.sigmoid(logits)"),
        labels=list(task.labels),
    )


def for_numpy(task: Task, columns: Mapping[str, Bounds] | None) -> str:
    """The lines for a head alone: features in, answers out.

    Args:
        task: form and labels.
        columns: numeric columns in order, with their public bounds; None for a backbone's features.
    """
    words, rows = _rows(columns, "float64")
    return _NUMPY.format(
        words=words,
        rows=rows + _clamped(columns or {}),
        file=ADAPTER_FILE,
        intercept=INTERCEPT,
        answers=_answers(task, softmax=_SOFTMAX, sigmoid="1 / (1 + np.exp(-logits))"),
        labels=list(task.labels),
    )


def for_onnx(task: Task, columns: Mapping[str, Bounds] | None) -> str:
    """The lines for an ONNX file; arguments as `for_numpy`."""
    words, rows = _rows(columns, "float32")
    return _ONNX.format(words=words, rows=rows, file=ONNX_FILE, labels=list(task.labels))


def _record(task: Task, told: Mapping[str, Any]) -> str:
    """From the command line's word to what the backbone takes, as `veil.common.preprocessing` reads it."""
    if task.modality == "text":
        return _TEXT.format(max_length=task.max_length)
    if task.modality == "audio":
        padded = "chunk_length" in told
        return _SOUND.format(rate=int(told["sampling_rate"]), max_seconds=task.max_seconds, padded=padded)
    normalised = told.get("do_normalize", True)
    return _IMAGE.format(
        size=task.image_size,
        factor=float(told.get("rescale_factor", 1 / 255)) if told.get("do_rescale", True) else 1.0,
        mean=told["image_mean"] if normalised else [0, 0, 0],
        std=told["image_std"] if normalised else [1, 1, 1],
    )


def _answers(task: Task, *, softmax: str, sigmoid: str) -> str:
    if task.form == "classification":
        return f"answers = {softmax}"
    if task.target is None:
        return f"answers = {sigmoid}"
    low, high = task.target
    return f"answers = {low} + ({high} - {low}) * ({sigmoid})  # the range of the plan"


def _rows(columns: Mapping[str, Bounds] | None, features: str) -> tuple[str, str]:
    """The command line's words, and the line that reads them."""
    if columns is None:
        return "FEATURES.npy  (a row a record)", f"rows = np.load(sys.argv[1]).astype(np.{features})"
    names = (f"<{' '.join(name.split())}>" for name in columns)
    return " ".join(names), "rows = np.float64([[float(word) for word in sys.argv[1:]]])"


def _clamped(columns: Mapping[str, Bounds]) -> str:
    bounds = {place: one for place, one in enumerate(columns.values()) if one is not None}
    if not bounds:
        return ""
    return (
        f"\nfor column, (low, high) in {bounds}.items():  # public bounds, to [-1, 1]"
        "\n    rows[:, column] = (np.clip(rows[:, column], low, high) - low) / (high - low) * 2 - 1"
    )


def bare_tensors(file: str) -> str:
    """Lines that read a file of tensors and answer nothing."""
    return _BARE.format(file=file)
