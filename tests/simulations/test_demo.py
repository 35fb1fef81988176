# SPDX-License-Identifier: Apache-2.0
"""The embedded demo on its real weights and records; and the README's ten lines on the model it leaves."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors import safe_open

from veil.simulations.cli import run_command
from veil.simulations.demo import demo_plan
from veil.simulations.screen import Screen
from veil.simulations.simulate import simulate

README = Path(__file__).parents[2] / "README.md"
NOTES = (
    "63 year old man, typical angina, resting blood pressure 145, ST depression 2.3, fixed thallium defect",
    "41 year old woman, atypical angina, no exercise angina, normal thallium scan",
    "",
    "67 year old man, no chest pain, exercise angina, 3 vessels narrowed on fluoroscopy",
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("demo") / "run"
    assert run_command(["simulate", "--output", str(output)]) == 0
    return output


def test_four_hospitals_at_epsilon_three(run: Path) -> None:
    report = json.loads((run / "report.json").read_text(encoding="utf-8"))
    assert [site["name"] for site in report["sites"]] == ["Cleveland", "Hungary", "Switzerland", "VA Long Beach"]
    assert report["private"] is True
    for site in report["sites"]:
        assert 2.98 <= site["epsilon"] <= 3.0 and site["delta"] == 1e-5 and not site["refusals"]


def test_together_is_better_than_alone(run: Path) -> None:
    """80 % against 62 % on this split; noise of either is under 4 points, so this fails by chance about never."""
    metrics = json.loads((run / "report.json").read_text(encoding="utf-8"))["metrics"]
    assert metrics["federated"]["accuracy"] > metrics["local_only"]["accuracy"] + 0.03
    assert metrics["federated"]["accuracy"] > 0.68


def test_a_second_run_touches_no_backbone(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every row is there; the model folder is the pinned files, which need no loading either."""

    def load(*_: object, **__: object) -> None:
        raise AssertionError("the backbone was loaded")

    monkeypatch.setattr("veil.common.backbone.load_backbone", load)
    plan = demo_plan()
    assert plan.simulation is not None
    short = {
        "simulation": plan.simulation.model_copy(update={"baselines": ()}),
        "training": plan.training.model_copy(update={"rounds": 1}),
    }
    with Screen(quiet=True) as screen:
        simulate(plan.model_copy(update=short), base=Path(), output=tmp_path / "run", progress=screen)
    weights = Path("model") / "model.safetensors"
    assert (tmp_path / "run" / weights).read_bytes() == (run / weights).read_bytes()


def test_the_model_folder_is_hugging_faces_without_pickles(run: Path) -> None:
    names = {path.name for path in (run / "model").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "head", "veil.json"} <= names
    assert not any(name.endswith((".bin", ".pt", ".pth", ".pkl", ".py")) for name in names)
    with safe_open(run / "model" / "head" / "head.safetensors", framework="numpy") as head:
        assert set(head.keys()) == {"head.weight", "centre"}
    config = json.loads((run / "model" / "config.json").read_text(encoding="utf-8"))
    assert config["id2label"] == {"0": "no_heart_disease", "1": "heart_disease"}


def test_the_readmes_ten_lines_predict_what_veil_predicts_without_veil(
    run: Path, tmp_path: Path, veil: Callable[..., tuple[int, str, str]]
) -> None:
    block = re.search(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert block is not None
    lines = block.group(1)
    assert len([line for line in lines.splitlines() if line.strip()]) <= 12
    script = (
        "import sys; sys.modules['veil'] = None\n"
        + lines.replace('"runs/demo/model"', repr(str(run / "model")))
        + f"\nimport json\nprint(json.dumps([predict(text) for text in {NOTES!r}]))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)
    theirs = json.loads(done.stdout)
    for text, answer in zip(NOTES, theirs, strict=True):
        code, out, _ = veil("predict", run / "model", text, "--json")
        assert code == 0
        ours = json.loads(out)[0]["probabilities"]
        assert set(ours) == set(answer)
        for label, value in ours.items():
            assert abs(value - answer[label]) < 1e-5


def test_the_demo_names_only_what_packages_carry() -> None:
    plan = demo_plan()
    assert plan.backbone is not None and plan.backbone.source.startswith("package:")
    assert plan.simulation is not None and plan.simulation.path.startswith("package:")
