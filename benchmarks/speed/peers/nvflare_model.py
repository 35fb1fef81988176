# SPDX-License-Identifier: Apache-2.0
"""The head that NVFlare's server and clients build.

Promises zero weights to begin with.
"""

from __future__ import annotations

from torch import nn


class Head(nn.Linear):
    """A linear head, [classes, width] and [classes]."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__(width, classes)
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)
