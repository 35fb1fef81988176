# SPDX-License-Identifier: Apache-2.0
"""An installed torchvision that does not import beside a torch without CUDA, made to.

Promises to do nothing where there is none or where it imports by itself: transformers imports every torchvision it
finds, and with one that does not import it loads no model at all.
"""

from __future__ import annotations

import sys
import threading
from importlib.util import find_spec
from typing import Any, Final

_KERNELS: Final = ("nms", "qnms")
"""What a torchvision built for CUDA registers there; nothing that Veil loads uses them."""

_mutex = threading.Lock()
_kept: list[object] = []


def mend_torchvision() -> None:
    """Import torchvision if there is one, declaring the kernels it lacks; to be called before transformers is.

    Raises:
        ImportError: it does not import for another reason.
    """
    with _mutex:
        if "torchvision" in sys.modules or find_spec("torchvision") is None:
            return
        try:
            __import__("torchvision")
        except RuntimeError:  # "operator torchvision::nms does not exist"
            _declare()
            __import__("torchvision")


def _declare() -> None:
    import torch

    library: Any = torch.library.Library("torchvision", "DEF")  # type: ignore[no-untyped-call]
    for name in _KERNELS:
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _kept.append(library)  # the kernels are declared for as long as it lives
