# SPDX-License-Identifier: Apache-2.0
"""The names of the forms a tuned model can be exported to, for the command line too, which loads none of them."""

from __future__ import annotations

from enum import StrEnum


class Target(StrEnum):
    """The forms of an export."""

    HF = "hf"
    SAFETENSORS = "safetensors"
    ONNX = "onnx"
