# SPDX-License-Identifier: Apache-2.0
"""Tests of `veil.common.torchvision_mend`: a torchvision built for CUDA imports beside a torch that is not.

The torchvision is made up here, and fails as the real one does: it describes a kernel that nothing registered.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

BUILT_FOR_CUDA = """
import torch

@torch.library.register_fake("torchvision::nms")
def nms(dets, scores, iou_threshold):
    return scores
"""
ALONE = """
try:
    import torchvision
except RuntimeError as error:
    print(error)
"""
MENDED = "from veil.common.torchvision_mend import mend_torchvision; mend_torchvision()"


def run(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """In a process of its own: a module that failed to import leaves traces."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), *sys.path])}
    return subprocess.run([sys.executable, "-W", "error", "-c", code], env=environment, capture_output=True, text=True)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "torchvision").mkdir()
    return tmp_path


def test_one_that_lacks_its_kernels_imports(folder: Path) -> None:
    (folder / "torchvision" / "__init__.py").write_text(BUILT_FOR_CUDA)
    found = run(f"{ALONE}\n{MENDED}; mend_torchvision(); import torchvision; print(torchvision.nms.__name__)", folder)
    assert found.stderr == ""
    assert found.stdout == "operator torchvision::nms does not exist\nnms\n"


def test_one_that_imports_is_left_alone(folder: Path) -> None:
    (folder / "torchvision" / "__init__.py").write_text("")
    found = run(f"{MENDED}; import sys; print('torch' in sys.modules, 'torchvision' in sys.modules)", folder)
    assert (found.stdout, found.stderr) == ("False True\n", "")


def test_one_that_fails_otherwise_says_so(folder: Path) -> None:
    (folder / "torchvision" / "__init__.py").write_text("import a_module_that_nobody_has")
    assert "No module named 'a_module_that_nobody_has'" in run(MENDED, folder).stderr


def test_none_is_no_error(tmp_path: Path) -> None:
    found = run(f"{MENDED}; import sys; print('torch' in sys.modules)", tmp_path)
    assert (found.stdout, found.stderr) == ("False\n", "")
