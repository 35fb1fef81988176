# SPDX-License-Identifier: Apache-2.0
"""The names of the places where a simulation's apps can run, for the command line too, which loads none of them."""

from __future__ import annotations

from enum import StrEnum


class Engine(StrEnum):
    """The engines of a simulation."""

    INPROCESS = "inprocess"
    PROCESSES = "processes"
    RAY = "ray"
