# SPDX-License-Identifier: Apache-2.0
"""Exports of models whose answers have a structure: a text that goes on as a stock class, everything else as tensors.

Promises that what no stock class answers alike is refused by name, and that lines of use stand beside what is written.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Final

from veil.common.errors import InputError
from veil.common.head import HEAD_FILE
from veil.common.plan_sections import Task
from veil.server.export_target import Target
from veil.server.merging import write_merged, write_peft
from veil.server.model import TunedModel

_WRITE: Final = '''\
"""How a text goes on, as the model of this folder was taught. Needs torch and transformers{needs}."""

import sys

import torch
{imports}import transformers

folder, text = {folder}, sys.argv[-1]
tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
{tuned}prompt = tokenizer(text)["input_ids"][:{room}]
written = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens={most})
print(tokenizer.decode(written[0][len(prompt) :], skip_special_tokens=True).strip())
'''


def goes_on(tuned: TunedModel, target: Target) -> bool:
    """Whether a form of export is one that a stock class reads: merged, or LoRA's tensors as peft's.

    Raises:
        InputError: for a form that neither it nor a file of bare tensors can be.
    """
    plan = tuned.plan
    merged, peft = target is Target.HF, target is Target.SAFETENSORS and plan.transfer.mode == "lora"
    if plan.task.form == "generation" and plan.transfer.mode not in ("adapter", "prompt") and (merged or peft):
        return True
    if target is not Target.SAFETENSORS:
        raise InputError(
            f'task.kind = "{plan.task.kind}" with transfer.mode = "{plan.transfer.mode}" to {target}',
            "safetensors: no stock class has a head of this kind",
            "use --to safetensors for its tensors, and `veil predict` for its answers",
        )
    return False


def write_going_on(tuned: TunedModel, target: Target, folder: Path) -> str:
    """Write a model that writes, and give the lines that use it.

    Args:
        tuned: of text-generation.
        target: hf, or safetensors of LoRA.
        folder: that is there, and empty.
    """
    if target is Target.SAFETENSORS:
        write_peft(tuned, folder)
        return _lines(tuned.plan.task, peft=True)
    folder.rmdir()  # `save` makes it
    tuned.save(folder)
    write_merged(tuned, folder)
    shutil.rmtree((folder / HEAD_FILE).parent)  # it has no rows
    (folder / "veil.json").unlink()
    return _lines(tuned.plan.task, peft=False)


def _lines(task: Task, *, peft: bool) -> str:
    own = "pathlib.Path(__file__).parent"
    return _WRITE.format(
        needs=", peft, and the pretrained model's folder before the text" if peft else "",
        imports="import peft\n" if peft else "",
        folder="sys.argv[1]" if peft else own,
        tuned=f"model = peft.PeftModel.from_pretrained(model, {own})\n" if peft else "",
        room=task.max_length - task.answer_length,
        most=task.answer_length,
    ).replace("import sys\n", "import pathlib\nimport sys\n")
