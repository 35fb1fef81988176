# SPDX-License-Identifier: Apache-2.0
"""The runbook's first part, word for word: one shell, real processes on loopback, from nothing to an upgrade."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Protocol

import pytest

pytestmark = pytest.mark.long
DEPLOY = Path(__file__).parents[2] / "deploy"
LIMIT_S = 900.0
NOT_RUN = ("Install", "With systemd", "With containers", "With Kubernetes")
"""Sections whose commands install Veil, or need systemd, a container engine or a cluster."""

PORT = re.compile(r"(?<=127\.0\.0\.1:)\d+|(?<=--port )\d+")


class ShellBlock(Protocol):
    """A block of the runbook."""

    @property
    def section(self) -> str: ...
    @property
    def lines(self) -> tuple[str, ...]: ...


def free_ports(count: int) -> list[int]:
    with ExitStack() as held:
        sockets = [held.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [one.getsockname()[1] for one in sockets]


def on_free_ports(script: str) -> str:
    """The script with each port that it names replaced by a free one: other programs may run on this machine."""
    named = sorted(set(PORT.findall(script)))
    chosen = dict(zip(named, map(str, free_ports(len(named))), strict=True))
    return PORT.sub(lambda match: chosen[match[0]], script)


def run_script(script: str, folder: Path) -> str:
    """What a shell printed; every process it left is ended."""
    output = folder / "output.txt"
    kept = {name: value for name, value in os.environ.items() if not name.startswith("VEIL_")}
    path = f"{Path(sys.executable).parent}{os.pathsep}{kept['PATH']}"
    with output.open("w", encoding="utf-8") as file:
        shell = subprocess.Popen(
            ["bash", "-euo", "pipefail", "-c", script],
            cwd=folder,
            env={**kept, "PATH": path},
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = shell.wait(LIMIT_S)
        except subprocess.TimeoutExpired:
            code = -1
        left = still_there(shell.pid)
        with suppress(ProcessLookupError):
            os.killpg(shell.pid, signal.SIGKILL)
    logs = "\n".join(f"--- {log.name}\n{log.read_text('utf-8')[-3000:]}" for log in sorted(folder.glob("*.log")))
    printed = output.read_text(encoding="utf-8")
    assert code == 0, f"the runbook ended with {code}:\n{printed[-6000:]}\n{logs}"
    assert not left, "the runbook left processes behind"
    return printed


def still_there(group: int) -> bool:
    """Whether a process of the group is left when children had the time to follow their parents."""
    for _ in range(50):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return False
        time.sleep(0.1)
    return True


@pytest.fixture(scope="module")
def printed(blocks: Sequence[ShellBlock], tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, str]:
    """Section → what its commands printed."""
    folder = tmp_path_factory.mktemp("runbook")
    shutil.copytree(DEPLOY / "example", folder / "deploy" / "example")
    run = [block for block in blocks if block.section not in NOT_RUN]
    script = "\n".join(f"echo '=== {block.section}'\n" + "\n".join(block.lines) for block in run)
    parts = re.split(r"^=== (.+)$", run_script(on_free_ports(script), folder), flags=re.M)
    found: dict[str, str] = {}
    for section, text in zip(parts[1::2], parts[2::2], strict=True):
        found[section] = found.get(section, "") + text
    return found


def test_every_section_has_been_run_or_is_named_as_not_run(
    blocks: Sequence[ShellBlock], printed: Mapping[str, str]
) -> None:
    assert set(printed) | set(NOT_RUN) == {block.section for block in blocks}


def test_the_doctor_finds_all_well_and_tells_the_price(printed: Mapping[str, str]) -> None:
    assert printed["Add a site"].count("is enrolled at https://127.0.0.1:") == 3
    assert "BAD" not in printed["Add a site"]
    assert re.search(r"ε [12]\.?\d* for this run \(your limit 2\)", printed["Add a site"])


def test_a_run_of_three_sites_finishes_with_its_epsilon_stated(printed: Mapping[str, str]) -> None:
    text = printed["Run a plan"]
    report, _ = json.JSONDecoder().raw_decode(text, text.index("{\n"))
    assert [site["name"] for site in report["sites"]] == ["east", "north", "south"]
    for site in report["sites"]:
        assert 1.98 <= site["epsilon"] <= 2.0 and site["delta"] == 1e-5 and not site["refusals"]
    assert re.search(r"^6 lines; ε (1\.9\d+|2) at δ = 1e-05$", text, re.M)
    assert len(re.findall(r"^(?:well|ill)\t[01]\.\d+\t", text, re.M)) == 80
    assert "approved runbook-" in text and "wrote north-log.json" in text
    assert re.search(r"^VALID: every signature fits", text, re.M) and "NOT COMPARED" not in text


def test_a_rotated_certificate_is_served_and_trusted(printed: Mapping[str, str]) -> None:
    assert "the link's certificate lasts until" in printed["Rotate a certificate"]
    assert re.search(r"ok +coordinator: .* its certificate lasts 39\d days", printed["Rotate a certificate"])


def test_a_refusal_is_a_code_at_the_coordinator_and_a_sentence_at_the_site(printed: Mapping[str, str]) -> None:
    text = printed["Read a refusal"]
    assert re.search(r"finished  6/6  east: budget, north: replied, south: replied", text)
    assert re.search(r"east declines runbook-\w+: .*limits\.epsilon_lifetime", text)


def test_an_old_copy_of_a_ledger_is_found_out_and_counted(printed: Mapping[str, str]) -> None:
    found_out, after = printed["Restore"].split("was written off", 1)
    assert found_out.count("its anchor remembers line") == 2
    assert found_out.count("exit code ") == 2
    assert "anchor" not in after and "agent connected" in after
    spent = re.search(r"everything so far: ε ([\d.]+) of 4", after)
    assert spent is not None and float(spent[1]) > 4.0


def test_a_revoked_site_is_out(printed: Mapping[str, str]) -> None:
    assert "site east  revoked" in printed["Turn a site out"]
    assert "site north  connected" in printed["Turn a site out"]
