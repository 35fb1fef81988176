# SPDX-License-Identifier: Apache-2.0
"""The house stands: four roots of one namespace, imports that point one way, exactly the packages that are pinned."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from importlib.metadata import distributions, packages_distributions, version
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
SOURCE_ROOTS = ("common", "client", "server", "simulations")
LOCKS = ("requirements.lock", "requirements-dev.lock")
UNWANTED = re.compile(r"nvidia-.*|triton|torchvision|torchaudio|timm")
INCLUDED = "-r requirements.lock"


def run_python(code: str, folder: Path) -> str:
    """What a fresh interpreter prints, started outside of the repository."""
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def locked(lock: str) -> list[str]:
    """The lines of a lock file that name a distribution."""
    lines = (line.strip() for line in (ROOT / lock).read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line and not line.startswith("#") and line != INCLUDED]


def all_locked() -> dict[str, str]:
    """Canonical name → version, over both lock files."""
    found: dict[str, str] = {}
    for line in (line for lock in LOCKS for line in locked(lock)):
        name, _, pinned = line.partition("==")
        assert canonicalize_name(name) not in found, f"{name} is locked twice"
        found[canonicalize_name(name)] = pinned
    return found


def unwanted(names: list[str]) -> list[str]:
    return sorted(name for name in names if UNWANTED.fullmatch(canonicalize_name(name)))


@pytest.mark.parametrize("root", SOURCE_ROOTS)
def test_a_root_holds_one_part_of_the_namespace_and_does_not_own_it(root: str) -> None:
    namespace = ROOT / root / "veil"
    assert not (namespace / "__init__.py").exists(), "this file would hide the other three roots"
    assert [one.name for one in namespace.iterdir() if one.is_dir() and one.name != "__pycache__"] == [root]
    assert not [one.name for one in namespace.iterdir() if one.is_file()]


def test_all_roots_are_importable_from_one_installation(tmp_path: Path) -> None:
    names = ("veil.common.plan", "veil.client.policy", "veil.server.descent", "veil.simulations.cli")
    printed = run_python(
        f"import {', '.join(names)}, veil\nprint(veil.__file__)\nprint(*veil.__path__, sep='\\n')", tmp_path
    )
    file, *folders = printed.splitlines()
    assert file == "None"
    assert {Path(one).resolve() for one in folders} >= {(ROOT / root / "veil").resolve() for root in SOURCE_ROOTS}


def test_every_root_is_in_every_setting_that_lists_them() -> None:
    settings = project()["tool"]
    assert tuple(settings["hatch"]["build"]["dev-mode-dirs"]) == SOURCE_ROOTS
    assert settings["hatch"]["build"]["targets"]["wheel"]["packages"] == [f"{root}/veil" for root in SOURCE_ROOTS]
    assert tuple(settings["mypy"]["mypy_path"]) == SOURCE_ROOTS
    assert set(SOURCE_ROOTS) <= set(settings["mypy"]["files"])
    assert settings["importlinter"]["root_packages"] == [f"veil.{root}" for root in SOURCE_ROOTS]


def test_tests_are_no_package() -> None:
    assert not list((ROOT / "tests").rglob("__init__.py"))


def test_imports_point_one_way() -> None:
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache", "--no-logo"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    kept = re.search(r"Contracts: (\d+) kept, 0 broken", done.stdout)
    assert kept is not None
    assert int(kept[1]) == len(project()["tool"]["importlinter"]["contracts"]) >= 2


def test_the_command_line_loads_no_framework(tmp_path: Path) -> None:
    code = "import sys, veil.simulations.cli\nprint(*sorted({name.partition('.')[0] for name in sys.modules}))"
    loaded = set(run_python(code, tmp_path).split())
    assert "typer" in loaded
    installed = set(packages_distributions()) - {"veil", "typer", "click", "shellingham", "_distutils_hack"}
    assert {"torch", "flwr", "pandas", "numpy", "pydantic", "rich"} <= installed
    assert not loaded & installed


def test_no_unwanted_distribution_is_installed() -> None:
    names = [one.metadata["Name"] for one in distributions()]
    assert "torch" in names
    assert not unwanted(names)


@pytest.mark.parametrize("lock", LOCKS)
def test_every_locked_line_is_one_exact_version_of_a_wanted_distribution(lock: str) -> None:
    lines = locked(lock)
    assert len(lines) > 10
    loose = [line for line in lines if not re.fullmatch(r"[A-Za-z0-9][\w.-]*==[0-9][\w.]*", line)]
    assert not loose
    assert not unwanted([line.partition("==")[0] for line in lines])


def test_unwanted_names_are_recognised() -> None:
    names = ["nvidia-cublas-cu12", "nvidia_nccl_cu12", "triton", "TorchVision", "timm", "torchaudio", "torch", "pytest"]
    assert len(unwanted(names)) == 6


@pytest.mark.parametrize("wanted", [Requirement(line) for line in project()["project"]["dependencies"]], ids=str)
def test_a_declared_dependency_is_locked_and_installed_within_its_range(wanted: Requirement) -> None:
    pinned = all_locked()[canonicalize_name(wanted.name)]
    assert wanted.specifier.contains(pinned), f"the lock's {wanted.name}=={pinned} is outside of {wanted.specifier}"
    assert wanted.specifier.contains(version(wanted.name))


@pytest.mark.parametrize("name", ["torch", "flwr", "opacus"])
def test_the_installed_framework_is_the_locked_one(name: str) -> None:
    assert Requirement(f"{name}=={all_locked()[name]}").specifier.contains(version(name))


def test_flower_can_read_the_version() -> None:
    assert "dynamic" not in project()["project"]
    assert version("veil") == project()["project"]["version"]
