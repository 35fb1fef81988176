# SPDX-License-Identifier: Apache-2.0
"""Tests of `veil certificate`: a real run's certificate, checked as anyone checks it, also where no torch is."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from veil.common.keys import NodeKey
from veil.common.verdict import judge
from veil.simulations.certificate_cli import printable
from veil.simulations.cli import run_command

Veil = Callable[..., tuple[int, str, str]]

HEAVY = (
    *("torch", "flwr", "opacus", "transformers", "safetensors", "pandas", "pyarrow", "sqlalchemy"),
    *("sklearn", "matplotlib", "PIL", "grpc", "httpx", "fastapi"),
)
WITHOUT = """
import sys
class Absent:  # not None in sys.modules, which scipy takes for a module
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in HEAVY:
            raise ModuleNotFoundError(name + " is not installed", name=name)
sys.meta_path.insert(0, Absent())
from veil.simulations.cli import main
main()
"""

PLAN = """
name = "small"
[task]
kind = "tabular-classification"
labels = ["well", "ill"]
[training]
rounds = 3
[privacy]
target_epsilon = 2.0
[simulation]
path = "records.csv"
features = ["a", "b"]
label = "label"
partition = "iid"
sites = 2
baselines = []
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a simulation."""
    folder = tmp_path_factory.mktemp("run")
    rows = [f"{index % 7},{index % 5},{'ill' if index % 2 else 'well'}" for index in range(60)]
    (folder / "records.csv").write_text("\n".join(["a,b,label", *rows]), encoding="utf-8")
    (folder / "plan.toml").write_text(PLAN, encoding="utf-8")
    assert run_command(["simulate", str(folder / "plan.toml"), "-o", str(folder / "out"), "--json"]) == 0
    return folder / "out"


def bare(*words: str | Path) -> subprocess.CompletedProcess[str]:
    """A command line in a process where some packages are not installed, in an empty environment."""
    script = f"HEAVY = {HEAVY!r}\n{WITHOUT}"
    return subprocess.run([sys.executable, "-c", script, *map(str, words)], capture_output=True, text=True, env={})


def keys_in(certificate: Path, folder: Path) -> Path:
    """The public keys of a certificate as somebody might have got them."""
    document = json.loads(certificate.read_bytes())
    folder.mkdir()
    (folder / "coordinator.pem").write_text(document["public_key"], encoding="ascii")
    for name, one in document["statements"].items():
        (folder / f"{name}.pem").write_text(one["public_key"], encoding="ascii")
    return folder


def test_it_is_verified_without_torch_flower_or_transformers(finished: Path, tmp_path: Path) -> None:
    keys = keys_in(finished / "certificate.json", tmp_path / "keys")
    shutil.copy(finished / "certificate.json", tmp_path / "alone.json")
    done = bare("certificate", "verify", tmp_path / "alone.json", "--keys", keys)
    assert (done.returncode, done.stderr) == (0, "")
    assert "VALID SIMULATION" in done.stdout and "NOT COMPARED" not in done.stdout
    blocked = bare("simulate", "--json", "-o", tmp_path / "x")
    assert blocked.returncode != 0 and "is not installed" in blocked.stderr


def test_one_document_for_programs(finished: Path, veil: Veil, tmp_path: Path) -> None:
    keys = keys_in(finished / "certificate.json", tmp_path / "keys")
    code, out, _ = veil("certificate", "verify", finished / "certificate.json", "--keys", keys, "--json")
    document = json.loads(out)
    report = json.loads((finished / "report.json").read_text(encoding="utf-8"))
    assert (code, document["verdict"], document["simulation"], document["keys_compared"]) == (0, "valid", True, True)
    assert document["findings"] == [] and document["missing"] == {}
    for site in report["sites"]:
        stated = document["sites"][site["name"]]
        assert stated["epsilon"] == {"claimed": site["epsilon"], "recomputed": site["epsilon"]}
        assert stated["rounds"] == 4


def test_without_keys_it_says_so_and_names_what_to_compare(finished: Path, veil: Veil, tmp_path: Path) -> None:
    code, out, _ = veil("certificate", "verify", finished / "certificate.json")
    assert code == 0 and out.rstrip().endswith("KEYS NOT COMPARED")
    folder = keys_in(finished / "certificate.json", tmp_path / "keys")
    key = NodeKey.generate()
    key.save(tmp_path / "own.key")
    shown, _ = veil("certificate", "key", tmp_path / "own.key")[1:]
    assert shown.encode() == key.public_pem
    fingerprints = set(re.findall(r"\b[0-9a-f]{64}\b", out))
    hashed = subprocess.run(["sha256sum", *folder.iterdir()], capture_output=True, text=True, check=True).stdout
    assert {line.split()[0] for line in hashed.splitlines()} == fingerprints


def test_some_keys_are_compared_and_the_others_named(finished: Path, veil: Veil, tmp_path: Path) -> None:
    folder = keys_in(finished / "certificate.json", tmp_path / "keys")
    name = next(path.stem for path in folder.iterdir() if path.stem != "coordinator")
    certificate = finished / "certificate.json"
    code, out, _ = veil("certificate", "verify", certificate, "--key", f"{name}={folder / name}.pem")
    assert code == 0 and "KEYS NOT COMPARED" in out
    (tmp_path / "other.pem").write_bytes(NodeKey.generate().public_pem)
    code, out, _ = veil("certificate", "verify", certificate, "--key", f"{name}={tmp_path / 'other.pem'}")
    assert code == 3 and f"statement of {name}: public key" in out and "INVALID" in out


@pytest.mark.parametrize(
    "options",
    [
        ["--key", "nobody"],
        ["--key", "=x.pem"],
        ["--key", "coordinator=missing.pem"],
        ["--key", "coordinator={plan}"],
        ["--key", "nobody={key}"],
        ["--keys", "{empty}"],
    ],
)
def test_keys_that_are_none_are_bad_input(options: list[str], finished: Path, veil: Veil, tmp_path: Path) -> None:
    (tmp_path / "key.pem").write_bytes(NodeKey.generate().public_pem)
    (tmp_path / "empty").mkdir()
    places = {"plan": finished.parent / "plan.toml", "key": tmp_path / "key.pem", "empty": tmp_path / "empty"}
    words = [option.format(**places) for option in options]
    code, out, err = veil("certificate", "verify", finished / "certificate.json", *words)
    assert (code, out) == (2, "") and "Remedy" in err


def test_what_cannot_be_read_is_bad_input(finished: Path, veil: Veil) -> None:
    for path in (finished / "nothing.json", finished / "report.json", finished / "picture.png", finished):
        code, out, err = veil("certificate", "verify", path)
        assert (code, out) == (2, "") and str(path) in err


def test_a_changed_byte_is_named_with_its_entry_and_ends_with_3(finished: Path, veil: Veil, tmp_path: Path) -> None:
    """The name of a site, its ε, its signature; then a quote that breaks the document."""
    text = (finished / "certificate.json").read_text(encoding="ascii")
    site = json.loads(text)["statements"].popitem()[0]
    begin = text.index(f'"{site}":{{"public_key"')
    path = tmp_path / "changed.json"
    for mark, old, new in (
        (r"epsilon\":", "1", "0"),
        (r"\"noise\":\"os", "s", "S"),
        ('"signature":"30', "0", "1"),
        (r"\"delta\":", "1", '"'),
    ):
        where = text.index(old, text.index(mark, begin) + len(mark) - 1)
        path.write_text(text[:where] + new + text[where + 1 :], encoding="ascii")
        code, out, _ = veil("certificate", "verify", path)
        assert code == 3 and f"statement of {site}: " in out, mark
        assert out.splitlines()[-1].startswith("INVALID")


def test_any_changed_byte_of_a_real_certificate_is_found(finished: Path, tmp_path: Path) -> None:
    raw, path = (finished / "certificate.json").read_bytes(), tmp_path / "changed.json"
    blocks = [line for line in raw.splitlines(keepends=True) if b'{"public_key"' in line[:80]]
    assert len(blocks) == 2
    for where in range(3, len(raw), 97):
        path.write_bytes(raw[:where] + bytes([raw[where] ^ 1]) + raw[where + 1 :])
        entries = {finding.entry for finding in judge(path, {}).findings}
        assert entries, where
        for block in blocks:
            begin = raw.index(block)
            key = block.index(b":")
            if begin + key < where < begin + len(block) - 2:
                assert f"statement of {json.loads(block[:key])}" in entries, (where, entries)


def test_noise_that_is_not_private_is_called_so_and_ends_with_3(
    veil: Veil, write_plan: Callable[..., Path], tmp_path: Path
) -> None:
    plan = write_plan(simulation={"noise": "fixed", "baselines": []})
    assert veil("simulate", plan, "-o", tmp_path / "out", "--json")[0] == 0
    code, out, _ = veil("certificate", "verify", tmp_path / "out" / "certificate.json")
    assert code == 3 and out.splitlines()[-1].startswith("NOT PRIVATE SIMULATION")
    for page in ("statement.html", "model-card.html"):
        shown = (tmp_path / "out" / page).read_text(encoding="utf-8")
        assert "NOT PRIVATE" in shown and "SIMULATION" in shown


def test_a_name_cannot_move_the_cursor() -> None:
    assert printable("Bonn\x1b[2J\u202e\ud800 ε ☃") == r"Bonn\x1b[2J\u202e\ud800 ε ☃"
