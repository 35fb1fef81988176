# SPDX-License-Identifier: Apache-2.0
"""A run and a refusal in plain words, for the operator who decides.

Promises that every figure is computed here, from the plan, the site's file and the ledger, and that words from the
network cannot move the cursor or paint the screen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from veil.client.ledger import Entry, total
from veil.client.policy import Limits
from veil.client.site_file import Data, SiteFile
from veil.common.evaluation import EVALUATION, released_size
from veil.common.head import CENTRE, WEIGHT
from veil.common.plan import RunPlan
from veil.common.privacy import PrivacyUnit
from veil.common.schedule import ReleaseKind, schedule

_SHOWN = 200


@dataclass(frozen=True, kw_only=True, slots=True)
class Price:
    """What a run costs one unit, at the δ of the site's limits.

    Attributes:
        run: ε of the run, with what it has spent already.
        before: ε of the whole ledger as it stands.
        after: ε of the whole ledger when the run is done.
        limits: the site's.
    """

    run: float
    before: float
    after: float
    limits: Limits

    @property
    def affordable(self) -> bool:
        """Whether no limit is passed."""
        return self.run <= self.limits.epsilon_per_run and self.after <= self.limits.epsilon_lifetime


def price(plan: RunPlan, job: str, limits: Limits, entries: Sequence[Entry]) -> Price:
    """What a run would cost, from the plan and the ledger's lines.

    Raises:
        PlanError: when no noise keeps the plan's promise.
    """
    done = {entry.round for entry in entries if entry.job == job}
    left = [
        Entry(job=job, round=one.round, mechanism=one.mechanism, noise="os", plan=plan.sha256)
        for one in schedule(plan)
        if one.round not in done
    ]
    projected = [*entries, *left]
    return Price(
        run=total(projected, limits.delta, job).epsilon,
        before=total(entries, limits.delta).epsilon,
        after=total(projected, limits.delta).epsilon,
        limits=limits,
    )


def describe_plan(
    plan: RunPlan, job: str, site: SiteFile, entries: Sequence[Entry], *, width: int | None = None
) -> tuple[str, ...]:
    """A run in plain words, a line each: what is trained, on what, what leaves, whom ε protects, and its price.

    Args:
        plan: the run's plan.
        job: its identity.
        site: the operator's file.
        entries: the ledger's lines.
        width: features per record, where known; numeric columns give it themselves.

    Raises:
        PlanError: when no noise keeps the plan's promise.
    """
    if site.data.features is not None:
        width = len(site.data.features)
    classes = ", ".join(map(_plain, plan.task.labels))
    lines = [
        f'Run "{_plain(plan.name)}", job {_plain(job)}: {plan.task.kind} into {classes}.',
        f"Trained: a new output layer on {_backbone(plan, site.limits)}.",
        *_columns(plan, site.data),
        *_releases(plan, site, width),
        *_held_out(plan),
        f"Rounds: {plan.training.rounds}{' and a centring round' if plan.training.centre else ''}, each with at least "
        f"{plan.cohort.min_sites} {'sites' if plan.cohort.min_sites > 1 else 'site'}.",
        _protected(plan),
        *_costs(price(plan, job, site.limits, entries)),
    ]
    return tuple(lines)


def _backbone(plan: RunPlan, limits: Limits) -> str:
    if plan.backbone is None:
        return "the numeric columns themselves; no pretrained model"
    licence = plan.backbone.licence
    listed = "" if not limits.licences else ", on your list" if licence in limits.licences else ", NOT on your list"
    return (
        f"the frozen features of {_plain(plan.backbone.source)} (SHA-256 {plan.backbone.sha256[:12]}…, "
        f"licence {_plain(licence) or 'not named'}{listed})"
    )


def _columns(plan: RunPlan, data: Data) -> list[str]:
    if data.modality == "text":
        read = f"text from {data.text or data.text_template}"
    elif data.modality == "image":
        read = f"images from {data.image}"
    else:
        read = f"numbers from {', '.join(data.features or ())}"
    patient = f", patient from {data.patient}" if data.patient else ""
    mapped = ", ".join(f"{raw} → {label}" for raw, label in data.labels.items())
    lines = [
        f"Read at this site, from {data.shown_table}: {read}; label from {data.label}"
        f"{f' ({mapped})' if mapped else ''}{patient}."
    ]
    if plan.task.kind != f"{data.modality}-classification":
        lines.append(f"This cannot be done: the run needs {plan.task.kind}, and [data] names {data.modality} columns.")
    elif data.features is not None and plan.task.width not in (None, len(data.features)):
        lines.append(
            f"This cannot be done: the run needs {plan.task.width} numeric columns, and [data] names "
            f"{len(data.features)}."
        )
    if foreign := sorted(set(data.labels.values()) - set(plan.task.labels)):
        lines.append(f"This cannot be done: [data.labels] names {', '.join(foreign)}, which the run does not know.")
    return lines


def _releases(plan: RunPlan, site: SiteFile, width: int | None) -> list[str]:
    """What leaves: tensors, how often, how many numbers in all."""
    releases = schedule(plan)
    parts, numbers = [], 0
    for kind, what in _RELEASED.items():
        times = sum(one.kind is kind for one in releases)
        if times:
            size, exact = _size(kind, len(plan.task.labels), width)
            numbers += times * exact
            parts.append(f"{times} × {what} of {size} numbers")
    sums = "" if width is None else f", {numbers:,} numbers in all"
    withheld = "No record, count, loss or error text"
    if plan.evaluation is not None:
        withheld = "No record, exact count, exact loss or error text"
    counts = "your number of units (release_counts = true), " if site.limits.release_counts else ""
    return [
        f"Leaves this site: {len(releases)} releases: {'; '.join(parts)}{sums}. Each is clipped, noised and "
        "rounded here before it leaves.",
        f"Beside them: {counts}this site's name, a hash of the ledger's last line, or the short code of a refusal. "
        f"{withheld}.",
    ]


def _size(kind: ReleaseKind, classes: int, width: int | None) -> tuple[str, int]:
    """How many numbers a release holds: in words, and, where the width is known, as a number."""
    if kind is ReleaseKind.EVALUATION:
        return str(released_size(classes)), released_size(classes)
    rows = 1 if kind is ReleaseKind.CENTRE else classes
    if width is None:
        return f"{rows} × (features + 1)", 0
    return f"{rows * (width + 1):,}", rows * (width + 1)


_RELEASED: Mapping[ReleaseKind, str] = {
    ReleaseKind.CENTRE: f"the mean of the features with a count ({CENTRE})",
    ReleaseKind.GRADIENT: f"a sum of gradients ({WEIGHT})",
    ReleaseKind.DELTA: f"a change of weights ({WEIGHT})",
    ReleaseKind.EVALUATION: f"how often the model is right, by class, and its loss ({EVALUATION})",
}


def _held_out(plan: RunPlan) -> list[str]:
    if plan.evaluation is None:
        return []
    return [
        f"Held out at this site: {plan.evaluation.holdout:.0%} of the units never train; the model is judged on them."
    ]


def _protected(plan: RunPlan) -> str:
    if plan.privacy.unit is PrivacyUnit.PATIENT:
        most = plan.privacy.max_records_per_patient
        whom = f"each patient as a whole (at most {most} records of one take part)"
    else:
        whom = "each single record; a patient with several records is protected less"
    return f"ε protects {whom}: whether one is in your table hardly changes what anyone outside can see."


def _costs(cost: Price) -> list[str]:
    limits = cost.limits
    lines = [
        f"Price at δ = {limits.delta:g}: ε {cost.run:.4g} for this run (your limit {limits.epsilon_per_run:g}).",
        f"Everything so far ε {cost.before:.4g}; after this run ε {cost.after:.4g} (your limit "
        f"{limits.epsilon_lifetime:g} for ever).",
    ]
    if not cost.affordable:
        lines.append("This passes a limit: the agent refuses it, whatever you decide here.")
    return lines


def _plain(text: str) -> str:
    """Words from the network, safe to print: no control characters, no end of them."""
    shown = "".join(one if one.isprintable() else "�" for one in text)
    return shown if len(shown) <= _SHOWN else shown[: _SHOWN - 1] + "…"


@dataclass(frozen=True, kw_only=True, slots=True)
class RefusalWords:
    """A refusal code for the operator.

    Attributes:
        meaning: what happened.
        remedy: what the operator can do.
    """

    meaning: str
    remedy: str


REFUSALS: Mapping[str, RefusalWords] = {
    "budget": RefusalWords(
        meaning="the rest of the run would pass epsilon_per_run or epsilon_lifetime",
        remedy="nothing needs to be done; a higher limit in site.toml is your decision, and the coordinator can plan "
        "fewer rounds or a smaller target_epsilon",
    ),
    "policy": RefusalWords(
        meaning="the plan's unit, δ, records per patient or licence is not what [limits] in site.toml says",
        remedy="ask the coordinator for a plan that fits; the agent's log names the value",
    ),
    "plan-changed": RefusalWords(
        meaning="the job came with another plan than in its earlier rounds",
        remedy="ask the coordinator why; a changed plan needs a new job",
    ),
    "replay": RefusalWords(
        meaning="the coordinator had a second answer of this site in one round and used the first; no site sends this",
        remedy="nothing at this site; the coordinator can start a new job",
    ),
    "malformed": RefusalWords(
        meaning="the request was not one that this version of Veil understands or could have sent",
        remedy="compare the versions of Veil at both ends; if they agree, tell the coordinator's operator",
    ),
    "internal": RefusalWords(
        meaning="something failed at this site: the table, the disk, the memory or a defect",
        remedy="read the agent's log, which says what; veil site doctor checks the table",
    ),
    "approval": RefusalWords(
        meaning="you refused the run, did not decide in time, or too many runs wait for you",
        remedy="veil site approve shows the runs and takes your decision",
    ),
    "backbone": RefusalWords(
        meaning="the pretrained weights are not here, are not the pinned ones, may not be received, or find no room",
        remedy="put the weights into agent.mirror, set limits.accept_backbone = true, or make room on the disk",
    ),
    "data": RefusalWords(
        meaning="the plan needs other columns or labels than [data] in site.toml names",
        remedy="name the columns that such a plan needs, or leave it refused",
    ),
    "bundle": RefusalWords(
        meaning="the coordinator sent code to run; this site runs only what you installed",
        remedy="tell the coordinator's operator; a Veil coordinator never sends code",
    ),
    "ledger": RefusalWords(
        meaning="the ledger is damaged, cannot be written, or is older than the anchor or the coordinator remembers",
        remedy="veil site ledger verify says what is wrong; restore the newest copy before anything else runs",
    ),
}
"""By `RefusalCode`."""
