# SPDX-License-Identifier: Apache-2.0
"""model-card.html: what a tuned model is, what it was made from, how good it is, and what is not known about it.

Promises that a figure stands with its error, that one without noise is called exact and simulated, and that what nobody
stated is said to be not stated.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from veil.common.certificate import Certificate
from veil.common.plan import RunPlan
from veil.common.verdict import Verdict
from veil.server.paper import heading, paragraph, points, sheet, table, under
from veil.server.statement_page import cost_row, fingerprints, meaning, notices

NOT_STATED = "not stated by the coordinator"

_LIMITS = (
    "Quality is known for the sites that took part, at the time they took part, and nowhere else.",
    "Whatever the pretrained model learned before, its mistakes and prejudices among it, is still there.",
    "Noise moves the model: the same plan on the same records gives another one.",
    "A probability that it gives was not calibrated.",
    "No figure says how it treats single groups of people, unless one stands above.",
)


def model_card(certificate: Certificate, verdict: Verdict, plan: RunPlan, report: Mapping[str, Any]) -> str:
    """The page.

    Args:
        certificate: the run's.
        verdict: on it.
        plan: what was run.
        report: the run's report.json.
    """
    run = certificate.run
    return sheet(
        f"Model card: {plan.name}",
        under(f"Run {run.job}, {run.created}, Veil {run.veil_version}"),
        *notices(certificate, verdict),
        heading("Model"),
        table(("", ""), _model(plan)),
        heading("Intended use"),
        table(
            ("", ""),
            ((what, NOT_STATED) for what in ("for whom and for what", "what it must not be used for", "contact")),
        ),
        heading("Data"),
        table(("", ""), _data(plan, report)),
        heading("Quality"),
        *_quality(report),
        heading("Privacy"),
        table(
            ("Site", "ε of this run", "its limit", "ε of all runs so far", "its limit", "δ"),
            (cost_row(name, site) for name, site in verdict.sites.items()),
        ),
        paragraph(meaning(verdict, plan)),
        paragraph("statement.html beside this page has the whole statement, and the command that checks it."),
        heading("Limits"),
        points(_LIMITS),
        heading("Fingerprints (SHA-256)"),
        table(("Of", ""), fingerprints(certificate, verdict, plan)),
    )


def _model(plan: RunPlan) -> Iterator[tuple[str, str]]:
    yield "task", plan.task.kind
    yield "answers", ", ".join(plan.task.labels)
    yield "tuned", "the output layer on features that stay as they were (transfer.mode = head)"
    yield "training", f"{plan.training.algorithm}, {plan.training.rounds} rounds"
    if plan.backbone is None:
        yield "pretrained model", "none: numeric columns"
        return
    yield "pretrained model", plan.backbone.source
    yield "its licence", plan.backbone.licence or NOT_STATED
    yield "its SHA-256", plan.backbone.sha256
    yield "what it was trained on", NOT_STATED


def _data(plan: RunPlan, report: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    sites = report["sites"]
    yield "sites", ", ".join(str(site["name"]) for site in sites)
    yield f"{plan.privacy.unit}s, as released with noise", f"about {max(0.0, report['estimated_units']):.0f} in all"
    for site in sites:
        if site["units"] is not None:
            yield f"{plan.privacy.unit}s of {site['name']}, exact", str(site["units"])
    yield "where it comes from, how it was collected and labelled", NOT_STATED


def _quality(report: Mapping[str, Any]) -> Iterator[str]:
    evaluation, metrics = report.get("evaluation"), report.get("metrics") or {}
    if evaluation:
        yield paragraph(
            f"On {evaluation['on']}; {evaluation['sites']} sites. Each interval holds the truth with "
            f"{100 * evaluation['confidence']:.0f} % confidence, by itself; it counts the noise and the chance of "
            "which units were held out."
        )
        yield table(("", "value", "interval", "standard error"), _released(evaluation))
    if metrics:
        yield paragraph(
            "Exact figures on held-out records of a SIMULATION, without noise: nobody in a deployment sees them, "
            "and no ε covers them. Error bars: 95 % of one accuracy over held-out records drawn anew, not over runs."
        )
        yield table(("model", "accuracy", "macro F1", "loss (nats)"), _exact(report, metrics))
    if not evaluation and not metrics:
        yield paragraph("Not measured: the plan has no evaluation, and an exact one would have told of records.")


def _released(evaluation: Mapping[str, Any]) -> Iterator[tuple[str, str, str, str]]:
    yield _figure("held-out units", evaluation["count"], digits=0)
    yield _figure("accuracy", evaluation["accuracy"])
    yield _figure("loss (nats)", evaluation["loss"])
    for label, one in evaluation["classes"].items():
        yield _figure(f"share of {label}", one["share"])
        yield _figure(f"recall of {label}", one["recall"])
    for site in evaluation["per_site"]:
        yield _figure(f"accuracy at {site['name']}", site["accuracy"])


def _figure(name: str, figure: Mapping[str, Any], digits: int = 3) -> tuple[str, str, str, str]:
    if figure["value"] is None:
        return name, "unknown", str(figure["reason"]), ""
    low, high, error = (f"{figure[key]:.{digits}f}" for key in ("low", "high", "standard_error"))
    return name, f"{figure['value']:.{digits}f}", f"{low} to {high}", error


def _exact(report: Mapping[str, Any], metrics: Mapping[str, Any]) -> Iterator[tuple[str, str, str, str]]:
    tested = sum(site.get("test_records") or 0 for site in report["sites"])
    for name, scores in metrics.items():
        accuracy = scores["accuracy"]
        bar = f" ± {1.96 * (accuracy * (1 - accuracy) / tested) ** 0.5:.3f}" if tested else ""
        yield name.replace("_", " "), f"{accuracy:.3f}{bar}", f"{scores['macro_f1']:.3f}", f"{scores['loss']:.3f}"
