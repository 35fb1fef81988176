# SPDX-License-Identifier: Apache-2.0
"""The three workloads: their data, made once, and the file that tells a system about them.

Promises the same records for every system: random features around one centre per class for (a) and (b), the demo's
notes with the demo's division for (c).
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from pathlib import Path

import numpy as np

from veil.client.examples import Examples, read_examples
from veil.common.plan import RunPlan
from veil.simulations.demo import demo_plan
from veil.simulations.folders import table_path
from veil.simulations.partition import partition

NAMES = ("a", "b", "c")
THREADS = 2
SEED = 7
_PRIVATE = {"sigma": 1.0, "max_grad_norm": 0.5, "learning_rate": 4.0, "private": True}


def prepare(name: str, work: Path) -> dict[str, object]:
    """Make a workload's data, unless this program made them before, and describe it.

    Args:
        name: a, b or c.
        work: folder for the data.

    Returns:
        the document of contract.Workload, but for its `folder`.
    """
    folder = work / "data" / hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:8] / name
    if not (folder / "workload.json").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        document = {"a": _head, "b": _many_clients, "c": _notes}[name](folder)
        common = {"workload": name, "threads": THREADS, "seed": SEED}
        (folder / "workload.json").write_text(json.dumps(document | common), encoding="utf-8")
    described: dict[str, object] = json.loads((folder / "workload.json").read_text(encoding="utf-8"))
    return described


def _head(folder: Path) -> dict[str, object]:
    shape = _random_features(folder, sites=100, records=500, width=384, classes=10)
    return shape | _PRIVATE | {"rounds": 20, "cohort": 100, "batch": 50, "local_steps": 10, "sample_rate": 0.1}


def _many_clients(folder: Path) -> dict[str, object]:
    shape = _random_features(folder, sites=1000, records=60, width=784, classes=10)
    plain = {"sigma": 0.0, "max_grad_norm": 1.0, "learning_rate": 5.0, "private": False}
    return shape | plain | {"rounds": 100, "cohort": 10, "batch": 10, "local_steps": 6, "sample_rate": 1 / 6}


def _random_features(folder: Path, *, sites: int, records: int, width: int, classes: int) -> dict[str, object]:
    """Rows of length 1 around one random centre per class."""
    rng = np.random.default_rng(SEED)
    labels = rng.integers(0, classes, sites * records)
    centres = rng.standard_normal((classes, width), dtype=np.float32)
    signal = 4.0 / np.sqrt(width, dtype=np.float32) * centres[labels]
    features = signal + rng.standard_normal(signal.shape, dtype=np.float32)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    np.save(folder / "features.npy", features)
    return _described(folder, labels, [records] * sites) | {
        "features": str(folder / "features.npy"),
        "notes": None,
        "test_notes": None,
        "test_offsets": [],
        "backbone": None,
        "max_length": 0,
        "width": width,
        "classes": classes,
    }


def _notes(folder: Path) -> dict[str, object]:
    """The demo's notes, site after site, and those that are held out."""
    plan = demo_plan()
    examples = demo_examples(plan)
    simulation = plan.simulation
    if simulation is None or plan.backbone is None:
        raise ValueError("the demo's plan has no [simulation] or no [backbone]; expected both")
    shares = partition(examples, simulation, seed=plan.seed, delta=plan.privacy.target_delta, labels=plan.task.labels)
    train, test = (np.concatenate([getattr(share, part) for share in shares]) for part in ("train", "test"))
    _write(folder / "notes.json", [str(examples.inputs[row]) for row in train])
    held_out = {"texts": [str(examples.inputs[row]) for row in test], "labels": examples.labels[test].tolist()}
    _write(folder / "test.json", held_out)
    described = _described(folder, examples.labels[train], [len(share.train) for share in shares])
    described["test_offsets"] = [0, *np.cumsum([len(share.test) for share in shares]).tolist()]
    work = {"rounds": plan.training.rounds, "cohort": len(shares), "batch": 32, "local_steps": 1, "sample_rate": 1.0}
    task = {"max_length": plan.task.max_length, "width": 384, "classes": len(plan.task.labels)}
    files = {"features": None, "notes": str(folder / "notes.json"), "test_notes": str(folder / "test.json")}
    return described | _PRIVATE | work | task | files | {"backbone": str(package_folder(plan.backbone.source))}


def demo_examples(plan: RunPlan) -> Examples:
    """The demo's records, read as `veil simulate` reads them."""
    simulation = plan.simulation
    if simulation is None:
        raise ValueError("the demo's plan has no [simulation]; expected one")
    return read_examples(
        table_path(simulation.path, Path.cwd()),
        simulation,
        plan.task,
        unit=plan.privacy.unit,
        site_column=simulation.site,
    )


def package_folder(source: str) -> Path:
    """The folder that `package:name/folder` names."""
    package, _, inside = source.removeprefix("package:").partition("/")
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        raise ValueError(f"{source} is not installed; expected the package {package}")
    return Path(found.origin).parent / inside


def _described(folder: Path, labels: np.ndarray, sizes: list[int]) -> dict[str, object]:
    np.save(folder / "labels.npy", labels.astype(np.int64))
    offsets = [0, *np.cumsum(sizes).tolist()]
    return {"labels": str(folder / "labels.npy"), "offsets": offsets, "sites": len(sizes)}


def _write(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")
