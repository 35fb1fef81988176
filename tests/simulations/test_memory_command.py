# SPDX-License-Identifier: Apache-2.0
"""Tests of `veil plan` where it says what a run holds in memory instead of what it reaches."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from veil.common.plan_sections import Backbone

Veil = Callable[..., tuple[int, str, str]]


@pytest.fixture
def write(tiny: Callable[[str], Backbone], tmp_path: Path) -> Callable[..., Path]:
    """A plan's file: the mode, and further lines of [cohort]."""

    def make(mode: str, cohort: str = "") -> Path:
        backbone, path = tiny("bert"), tmp_path / "plan.toml"
        path.write_text(
            f'name = "deep"\n[backbone]\nsource = "{backbone.source}"\nsha256 = "{backbone.sha256}"\n'
            '[task]\nkind = "text-classification"\nlabels = ["a", "b"]\nmax_length = 8\n'
            f'[transfer]\nmode = "{mode}"\n[privacy]\ntarget_epsilon = 8.0\n[cohort]\nmin_sites = 3\n{cohort}',
            encoding="utf-8",
        )
        return path

    return make


def test_a_plan_that_tunes_more_than_a_head_gets_a_memory_plan(veil: Veil, write: Callable[..., Path]) -> None:
    code, out, _ = veil("plan", write("last-layers"), "--units", "20", "--sites", "5", "--json")
    assert code == 0
    told = json.loads(out)
    assert (told["mode"], told["sites"], told["records_per_site"]) == ("last-layers", 5, 20)
    assert told["numbers_down"] > told["numbers_up"] > 0
    for one in told["memory"].values():
        assert one["peak"] == sum(one["parts"].values()) > one["parts"]["libraries"] > 0
    assert "simulate" in told["forecast"]


def test_more_units_are_remembered_and_more_sites_send(veil: Veil, write: Callable[..., Path]) -> None:
    def parts(*options: str) -> tuple[dict[str, int], dict[str, int]]:
        memory = json.loads(veil("plan", write("last-layers"), *options, "--json")[1])["memory"]
        return memory["site"]["parts"], memory["coordinator"]["parts"]

    (few, three), (many, six) = parts("--units", "10"), parts("--units", "20", "--sites", "6")
    assert many["remembered of records"] == 2 * few["remembered of records"] > 0
    assert six["updates"] == 2 * three["updates"] > 0


def test_a_head_s_memory_is_said_where_it_is_asked_for(veil: Veil, write: Callable[..., Path]) -> None:
    code, out, _ = veil("plan", write("head", "nominal_units = 40\n"), "--memory")
    assert code == 0
    assert "a site's executor, 40 records" in out
    assert "forecast" not in out


def test_what_a_memory_plan_does_not_read_is_an_error(veil: Veil, write: Callable[..., Path]) -> None:
    code, _, err = veil("plan", write("bias"), "--expected", "0.8")
    assert code == 2 and "--expected" in err
