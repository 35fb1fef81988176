# SPDX-License-Identifier: Apache-2.0
"""model-card.html: what a tuned model is, what it was made from, how good it is, and what is not known about it.

Promises that a figure stands with its error, that one without noise is called exact and simulated, and that what nobody
stated is said to be not stated.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from veil.common.certificate import Certificate
from veil.common.mismatch import Likeness
from veil.common.plan import RunPlan
from veil.common.trained import trained_words
from veil.common.verdict import Verdict
from veil.server.paper import heading, paragraph, points, sheet, table, under
from veil.server.statement_page import asked, cost_row, fingerprints, meaning, notices

NOT_STATED = "not stated by the coordinator"

_LIMITS = (
    "Quality is known for the sites that took part, at the time they took part, and nowhere else.",
    "Whatever the pretrained model learned before, its mistakes and prejudices among it, is still there.",
    "Noise moves the model: the same plan on the same records gives another one.",
    "A probability that it gives was not calibrated.",
    "No figure says how it treats single groups of people, unless one stands above.",
)


_OVERALL: Mapping[str, str] = {
    "accuracy": "accuracy",
    "micro_f1": "F1 over all decisions",
    "macro_f1": "F1, mean over labels",
    "token_f1": "F1 of an answer's words",
    "token_loss": "loss of a token (nats), a record's mean cut to 10",
    "precision": "objects seen that are there",
    "loss": "loss (nats)",
    "mae": "mean absolute error",
    "rmse": "root of the mean squared error",
}
"""An evaluation's figures over everything, by key; what is missing is of another form of task."""

_NAMES = {"f1": "F1"}


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
        points((*_LIMITS, *_unlike(report))),
        heading("Fingerprints (SHA-256)"),
        table(("Of", ""), fingerprints(certificate, verdict, plan)),
    )


def _model(plan: RunPlan) -> Iterator[tuple[str, str]]:
    yield "task", plan.task.kind
    yield "answers", asked(plan)
    kept = "; the rest stays as it was" if plan.transfer.mode != "full" else ""
    yield "tuned", f"{trained_words(plan)} (transfer.mode = {plan.transfer.mode}){kept}"
    yield "training", f"{plan.training.algorithm}, {plan.training.rounds} rounds"
    if plan.backbone is None:
        yield "pretrained model", "none: numeric columns"
        return
    yield "pretrained model", plan.backbone.source
    yield "its licence", plan.backbone.licence or NOT_STATED
    yield "its SHA-256", plan.backbone.sha256
    yield "what it was trained on", plan.backbone.trained_on or NOT_STATED
    yield "to be cited as", plan.backbone.citation or NOT_STATED


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
        numbers = any("mae" in scores for scores in metrics.values())
        yield table(*_exact_numbers(metrics)) if numbers else table(*_exact(report, metrics))
    if groups := report.get("groups"):
        yield paragraph(
            f"By group, exact, of the same SIMULATION; {groups['not_known']} records of no known group are left out. "
            "The interval of a gap counts that it is the largest of several."
        )
        yield table(("", "value", "interval", "standard error"), _by_group(groups))
    if not evaluation and not metrics:
        yield paragraph("Not measured: the plan has no evaluation, and an exact one would have told of records.")


def _released(evaluation: Mapping[str, Any]) -> Iterator[tuple[str, str, str, str]]:
    yield _figure("held-out units", evaluation["count"], digits=0)
    for key, name in _OVERALL.items():
        if key in evaluation:
            yield _figure(name, evaluation[key])
    for label, one in (evaluation.get("classes") or evaluation.get("labels") or {}).items():
        for key in ("share", "recall", "precision", "f1"):
            if key in one:
                yield _figure(f"{_NAMES.get(key, key)} of {label}", one[key])
    for name, one in evaluation.get("groups", {}).items():
        yield _figure(f"held-out units of group {name}", one["count"], digits=0)
        yield _figure(f"accuracy for group {name}", one["accuracy"])
    if "accuracy_gap" in evaluation:
        yield _figure("largest gap in accuracy between groups", evaluation["accuracy_gap"])
    for site in evaluation["per_site"]:
        key = "accuracy" if "accuracy" in site else "mae"
        yield _figure(f"{_OVERALL[key]} at {site['name']}", site[key])


def _by_group(groups: Mapping[str, Any]) -> Iterator[tuple[str, str, str, str]]:
    for name, one in groups["by_group"].items():
        yield _figure(f"accuracy for group {name}, {one['count']} records", one["accuracy"])
    for name, gap in groups["gaps"].items():
        yield _figure(f"largest gap between groups: {name.replace('_', ' ')}", gap)


def _figure(name: str, figure: Mapping[str, Any], digits: int = 3) -> tuple[str, str, str, str]:
    if figure["value"] is None:
        return name, "unknown", str(figure["reason"]), ""
    low, high, error = (f"{figure[key]:.{digits}f}" for key in ("low", "high", "standard_error"))
    return name, f"{figure['value']:.{digits}f}", f"{low} to {high}", error


def _unlike(report: Mapping[str, Any]) -> Iterator[str]:
    """Which sites' records look unlike the others', if any."""
    sites = (report.get("mismatch") or {}).get("per_site") or ()
    told = [(one["name"], one["distance"]) for one in sites if one["verdict"] == Likeness.APART]
    if told:
        named = ", ".join(f"{name} ({at['value']:.2f}, {at['low']:.2f} to {at['high']:.2f})" for name, at in told)
        yield (
            f"Sites whose records look unlike the other sites', by the distance of their mean features (0: the same; "
            f"1.41: orthogonal): {named}. The model may serve them less well."
        )


def _exact(report: Mapping[str, Any], metrics: Mapping[str, Any]) -> tuple[tuple[str, ...], Iterator[tuple[str, ...]]]:
    tested = sum(site.get("test_records") or 0 for site in report["sites"])

    def shown(scores: Mapping[str, Any]) -> tuple[str, ...]:
        accuracy = scores["accuracy"]
        bar = f" ± {1.96 * (accuracy * (1 - accuracy) / tested) ** 0.5:.3f}" if tested else ""
        f1 = scores["macro_f1"]
        return f"{accuracy:.3f}{bar}", "-" if f1 is None else f"{f1:.3f}", f"{scores['loss']:.3f}"

    rows = ((name.replace("_", " "), *shown(scores)) for name, scores in metrics.items())
    return ("model", "accuracy", "macro F1", "loss (nats)"), rows


def _exact_numbers(metrics: Mapping[str, Any]) -> tuple[tuple[str, ...], Iterator[tuple[str, ...]]]:
    rows = (
        (name.replace("_", " "), f"{scores['mae']:.4g}", f"{scores['rmse']:.4g}", f"{scores['r2']:.3f}")
        for name, scores in metrics.items()
    )
    return ("model", _OVERALL["mae"], _OVERALL["rmse"], "variance explained"), rows
