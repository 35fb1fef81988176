# SPDX-License-Identifier: Apache-2.0
"""README.md of an export: a model card with Hugging Face's front matter, in Markdown.

Promises that what nobody stated is said to be not stated, that a licence is claimed only for weights it was stated of,
and that no name from a plan or a report breaks out of its place.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.metadata import version
from typing import Any, Final

from veil.common.plan import RunPlan
from veil.common.verdict import Verdict, Word
from veil.server.export_target import Target
from veil.server.lineage import Lineage
from veil.server.model_card import NOT_STATED
from veil.server.statement_page import NOT_PRIVATE, SIMULATED, cost_row, meaning, shown

_LICENCES: Final = ("apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "cc-by-4.0", "cc-by-sa-4.0", "cc0-1.0", "isc")
"""Names that Hugging Face has for what SPDX calls the same in capitals."""

_LIBRARY: Final = {Target.HF: "transformers", Target.SAFETENSORS: "safetensors", Target.ONNX: "onnx"}
_PIPELINE: Final = {"text": "feature-extraction", "image": "image-feature-extraction", "audio": "feature-extraction"}

_LIMITS: Final = (
    "Quality is known for the sites that took part, at the time they took part, and nowhere else.",
    "Whatever the pretrained model learned before, its mistakes and prejudices among it, is still there.",
    "A probability that it gives was not calibrated.",
    "Intended use, users and contact: not stated by the coordinator.",
)

_NO_STOCK_CLASS: Final = (
    "`AutoModel` loads the pretrained part alone. No stock class of transformers has an output layer on a row that is "
    "brought to length 1, centred and brought to length 1 again, so `AutoModelFor…Classification` would start with a "
    "RANDOM output layer under these labels: use `usage.py`, which reads the tuned one from `head/`."
)


_FEATURES: Final = (
    "It reads features, a row a record: those of the pretrained model named above, with what was tuned of it, in the "
    "way that `usage.py` of an export `--to hf` computes them."
)


def export_card(plan: RunPlan, target: Target, lineage: Lineage, usage: str) -> str:
    """The text.

    Args:
        plan: the model's.
        target: what was exported.
        lineage: what stood beside the model.
        usage: the lines of `usage.py`.
    """
    parts = [
        *_front_matter(plan, target),
        f"# {_safe(plan.name)}",
        *(f"**{_safe(words)}**" for words in _notices(lineage)),
        "## Model",
        _table(("", ""), _model(plan)),
        "## Use",
        *_hints(plan, target),
        f"`usage.py` beside this file, whole:\n\n```python\n{usage}```",
        "## Data",
        _table(("", ""), _data(plan, lineage.report)),
        "## Quality",
        *_quality(lineage.report),
        "## Privacy",
        *_privacy(plan, lineage),
        "## Limits",
        "\n".join(f"- {one}" for one in _LIMITS),
    ]
    return "\n\n".join(parts) + "\n"


def _hints(plan: RunPlan, target: Target) -> Iterator[str]:
    if target is Target.HF:
        yield _NO_STOCK_CLASS
    elif plan.backbone is not None and (target is Target.ONNX or not plan.transfer.deep):
        yield _FEATURES


def _front_matter(plan: RunPlan, target: Target) -> Iterator[str]:
    """JSON values are YAML; keys that Hugging Face does not know stand under `veil`."""
    peft = plan.transfer.mode == "lora" and target is Target.SAFETENSORS
    known: dict[str, Any] = {"library_name": "peft" if peft else _LIBRARY[target], **_licence(plan, target)}
    origin = plan.backbone.source if plan.backbone else ""
    if origin.startswith("hub:"):
        known["base_model"] = origin.removeprefix("hub:").partition("@")[0]
    if target is Target.HF:
        known["pipeline_tag"] = _PIPELINE[plan.task.modality]
    known["tags"] = [
        "veil",
        "federated-learning",
        "differential-privacy",
        "transfer-learning",
        f"veil:{plan.task.kind}",
    ]
    known["veil"] = {
        "task": plan.task.kind,
        "labels": list(plan.task.labels),
        "base_model": origin or "none",
        "base_model_licence": (plan.backbone.licence or NOT_STATED) if plan.backbone else "none",
        "datasets": NOT_STATED,
        "plan_sha256": plan.sha256,
    }
    lines = (f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in known.items())
    yield "\n".join(("---", *lines, "---"))


def _licence(plan: RunPlan, target: Target) -> dict[str, str]:
    """Of the files that are there: the pretrained weights have one, the tuned part has none that anybody stated."""
    stated = plan.backbone.licence if plan.backbone and target is Target.HF else ""
    if not stated:
        return {"license": "unknown"}
    if stated.lower() in _LICENCES:
        return {"license": stated.lower()}
    return {"license": "other", "license_name": stated}


def _notices(lineage: Lineage) -> Iterator[str]:
    """What must be read before anything else."""
    verdict, report = lineage.verdict, lineage.report
    simulated = verdict is not None and verdict.run is not None and verdict.run.simulation
    if simulated or (report is not None and "simulation" in report):
        yield SIMULATED
    unprivate = verdict is not None and verdict.word is Word.NOT_PRIVATE
    if unprivate or (report is not None and report.get("private") is False):
        yield NOT_PRIVATE
    if verdict and verdict.word is Word.INVALID:
        yield "CERTIFICATE NOT VALID. " + "; ".join(str(finding) for finding in verdict.findings)
    if verdict and verdict.unvouched:
        yield "INCOMPLETE. No statement of " + ", ".join(verdict.unvouched) + ", whose updates were used."


def _model(plan: RunPlan) -> Iterator[tuple[str, str]]:
    backbone = plan.backbone
    yield "task", plan.task.kind
    yield "answers", ", ".join(plan.task.labels)
    yield "tuned", f"transfer.mode = {plan.transfer.mode}, {plan.training.algorithm}, {plan.training.rounds} rounds"
    yield "exported by", f"Veil {version('veil')}"
    yield "plan, SHA-256", plan.sha256
    yield "licence of the tuned part", NOT_STATED
    if backbone is None:
        yield "pretrained model", "none: numeric columns"
        return
    yield "pretrained model", backbone.source
    yield "its licence", backbone.licence or NOT_STATED
    yield "its SHA-256", backbone.sha256
    yield "what it was trained on", backbone.trained_on or NOT_STATED
    yield "to be cited as", backbone.citation or NOT_STATED


def _data(plan: RunPlan, report: Mapping[str, Any] | None) -> Iterator[tuple[str, str]]:
    if report is not None:
        yield "sites", ", ".join(str(site["name"]) for site in report["sites"])
        yield f"{plan.privacy.unit}s, as released with noise", f"about {max(0.0, report['estimated_units']):.0f} in all"
    yield "where it comes from, how it was collected and labelled", NOT_STATED


def _quality(report: Mapping[str, Any] | None) -> Iterator[str]:
    if report is None:
        yield "Not known here: no report.json of this model stood beside it when it was exported."
        return
    evaluation, metrics = report.get("evaluation"), report.get("metrics")
    if evaluation:
        yield f"On {_safe(str(evaluation['on']))}; {evaluation['sites']} sites."
        yield _table(("", "value", "interval", "standard error"), _released(evaluation))
    if metrics:
        names = list(dict.fromkeys(name for scores in metrics.values() for name in scores))
        yield "Exact figures on held-out records of a SIMULATION, which no ε covers and nobody in a deployment sees."
        yield _table(("model", *names), ((who, *_scores(scores, names)) for who, scores in metrics.items()))
    if not evaluation and not metrics:
        yield "Not measured: the plan has no evaluation, and an exact one would have told of records."


def _scores(scores: Mapping[str, Any], names: Sequence[str]) -> Iterator[str]:
    return (f"{scores[name]:.3f}" if isinstance(scores.get(name), float) else "" for name in names)


def _released(evaluation: Mapping[str, Any], of: str = "") -> Iterator[tuple[str, ...]]:
    """Every figure of the released evaluation, wherever it stands in it."""
    for key, found in evaluation.items():
        name = f"{of} {key}".strip().replace("_", " ")
        if isinstance(found, dict) and "standard_error" in found:
            yield name, *_figure(found)
        elif isinstance(found, dict):
            yield from _released(found, name)
        elif isinstance(found, list):
            for one in found:
                yield from _released(one, f"{name} {one['name']}")


def _figure(found: Mapping[str, Any]) -> tuple[str, str, str]:
    if found["value"] is None:
        return "unknown", str(found.get("reason", "")), ""
    return f"{found['value']:.3f}", f"{found['low']:.3f} to {found['high']:.3f}", f"{found['standard_error']:.3f}"


def _privacy(plan: RunPlan, lineage: Lineage) -> Iterator[str]:
    verdict, report = lineage.verdict, lineage.report
    if verdict is not None:
        yield f"From the run's certificate, which is not in this folder, computed anew: {_verdict(verdict)}."
        head = ("site", "ε of this run", "its limit", "ε of all runs so far", "its limit", "δ")
        yield _table(head, (cost_row(name, site) for name, site in verdict.sites.items()))
        yield meaning(verdict, plan)
    elif report is not None:
        yield "From the run's report, which nobody signed."
        rows = ((str(site["name"]), shown(site["epsilon"]), f"{site['delta']:g}") for site in report["sites"])
        yield _table(("site", "ε of this run", "δ"), rows)
    else:
        promised = f"({plan.privacy.target_epsilon:g}, {plan.privacy.target_delta:g})"
        yield (
            f"The plan asked for at most {promised} for each {plan.privacy.unit} of a site. What was spent is not "
            "known here: neither a report nor a certificate of this model stood beside it when it was exported."
        )


def _verdict(verdict: Verdict) -> str:
    return f"{verdict.word.value}; keys {'compared' if verdict.keys_compared else 'not compared with any given ones'}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(_safe(cell) for cell in line)} |" for line in lines)


def _safe(text: str) -> str:
    """One line that no Markdown or HTML reader takes for anything but text; figures and dashes stay readable."""
    words = " ".join(text.encode("utf-8", "replace").decode("utf-8").split())
    return "".join(f"\\{letter}" if letter in "\\`*_[]<>|#!&~" else letter for letter in words)
