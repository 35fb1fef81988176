# SPDX-License-Identifier: Apache-2.0
"""The runbook's shell blocks, in order, with the section that each stands in."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import pytest

RUNBOOK = Path(__file__).parents[2] / "deploy" / "README.md"


@dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """One fenced ```sh block.

    Attributes:
        section: the heading above it.
        lines: its lines.
    """

    section: str
    lines: tuple[str, ...]


@pytest.fixture(scope="session")
def blocks() -> tuple[Block, ...]:
    found, section = list[Block](), ""
    for heading, body in re.findall(r"^## ([^\n]+)$|^```sh\n(.*?)^```$", RUNBOOK.read_text("utf-8"), re.M | re.S):
        section = heading or section
        if body:
            found.append(Block(section=section, lines=tuple(body.splitlines())))
    return tuple(found)
