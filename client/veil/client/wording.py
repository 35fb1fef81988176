# SPDX-License-Identifier: Apache-2.0
"""A run and a refusal in plain words, for the operator who decides.

Promises that every figure is computed here, from the plan, the site's file and the ledger, and that words from the
network cannot move the cursor or paint the screen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from veil.client.cohort import smallest_cohort
from veil.client.ledger import Entry, total, total_alone
from veil.client.policy import Limits
from veil.client.site_file import Data, SiteFile
from veil.common.evaluation import EVALUATION
from veil.common.evaluation_forms import vector_size
from veil.common.head import CENTRE, WEIGHT
from veil.common.moments import STATISTICS, moments_size
from veil.common.plan import RunPlan
from veil.common.privacy import NoiseShares, PrivacyUnit
from veil.common.schedule import ReleaseKind, schedule
from veil.common.trained import GRADIENT, trained_words
from veil.common.truths import SAID

_SHOWN = 200


@dataclass(frozen=True, kw_only=True, slots=True)
class Price:
    """What a run costs one unit, at the δ of the site's limits.

    Attributes:
        run: ε of the run, with what it has spent already.
        before: ε of the whole ledger as it stands.
        after: ε of the whole ledger when the run is done.
        limits: the site's.
        alone: ε of the run if this site's masks were taken off, with all its peers in the sum; None without masks.
    """

    run: float
    before: float
    after: float
    limits: Limits
    alone: float | None = None

    @property
    def affordable(self) -> bool:
        """Whether no limit is passed."""
        return self.run <= self.limits.epsilon_per_run and self.after <= self.limits.epsilon_lifetime


def price(plan: RunPlan, job: str, limits: Limits, entries: Sequence[Entry], *, peers: int = 0) -> Price:
    """What a run would cost, from the plan and the ledger's lines.

    Args:
        plan: the run's plan.
        job: its identity.
        limits: the site's.
        entries: the ledger's lines.
        peers: with how many sites this one may share noise.

    Raises:
        PlanError: when no noise keeps the plan's promise.
    """
    done = {entry.round for entry in entries if entry.job == job}
    sharing = plan.privacy.noise == "distributed" and peers > 0
    shares = NoiseShares(sites=peers + 1, colluding=plan.cohort.colluding(peers + 1)) if sharing else None
    left = [
        Entry(job=job, round=one.round, mechanism=one.mechanism, noise="os", plan=plan.sha256, shares=shares)
        for one in schedule(plan)
        if one.round not in done
    ]
    projected = [*entries, *left]
    return Price(
        run=total(projected, limits.delta, job).epsilon,
        before=total(entries, limits.delta).epsilon,
        after=total(projected, limits.delta).epsilon,
        limits=limits,
        alone=total_alone(projected, limits.delta, job).epsilon if sharing else None,
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
    lines = [
        f'Run "{_plain(plan.name)}", job {_plain(job)}: {plan.task.kind} {_asked(plan)}.',
        f"Trained: {trained_words(plan)}{',' * plan.transfer.deep} on {_backbone(plan, site.limits)}.",
        *_columns(plan, site.data),
        *_releases(plan, site, width),
        *_held_out(plan, site.data),
        f"Rounds: {plan.training.rounds}{' and a centring round' if plan.training.centre else ''}, each with at least "
        f"{plan.cohort.min_sites} {'sites' if plan.cohort.min_sites > 1 else 'site'}.",
        _protected(plan),
        *_sharing(plan, site),
        *_costs(price(plan, job, site.limits, entries, peers=len(site.peers))),
    ]
    return tuple(lines)


def _asked(plan: RunPlan) -> str:
    """What a model of the run answers."""
    labels = ", ".join(map(_plain, plan.task.labels))
    if plan.task.target is not None:
        low, high = plan.task.target
        return f"of {labels}, a number, cut to the range from {low:g} to {high:g}"
    if plan.task.form in SAID:
        return f"({SAID[plan.task.form].format(labels)})"
    return f"into any of {labels}" if plan.task.form == "multilabel" else f"into {labels}"


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
    elif data.modality == "audio":
        read = f"sounds from {data.audio}"
    else:
        read = f"numbers from {', '.join(data.features or ())}"
    patient = f", patient from {data.patient}" if data.patient else ""
    mapped = ", ".join(f"{raw} → {label}" for raw, label in data.labels.items())
    lines = [
        f"Read at this site, from {data.shown_table}: {read}; label from {data.label}"
        f"{f' ({mapped})' if mapped else ''}{patient}."
    ]
    if plan.task.kind != f"{data.modality}-{data.form}":
        lines.append(
            f"This cannot be done: the run needs {plan.task.kind}, and [data] names {data.modality} columns and "
            f'form = "{data.form}".'
        )
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
        if kind is ReleaseKind.GRADIENT and plan.transfer.deep:
            times, deep = plan.transfer.head_rounds, times - plan.transfer.head_rounds
            parts.append(f"{deep} × a sum of gradients ({GRADIENT}), a number for each that trains")
        if times:
            size, exact = _size(kind, plan, width)
            numbers += times * exact
            shown = _JUDGED.get(plan.task.form, what) if kind is ReleaseKind.EVALUATION else what
            parts.append(f"{times} × {shown} of {size} numbers")
    sums = "" if width is None or plan.transfer.deep else f", {numbers:,} numbers in all"
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


_JUDGED: Mapping[str, str] = {
    "multilabel": f"how often the model is right, by label, and its loss ({EVALUATION})",
    "regression": f"how far the model is off, in all ({EVALUATION})",
    "answers": f"how often the model is right and how many words are, in all ({EVALUATION})",
    "generation": f"how many tokens the model foresees and its loss, in all ({EVALUATION})",
    "detection": f"how many objects the model finds and how many it only sees, in all ({EVALUATION})",
}
"""An evaluation's words, where they are not those of classes."""


def _size(kind: ReleaseKind, plan: RunPlan, width: int | None) -> tuple[str, int]:
    """How many numbers a release holds: in words, and, where the width is known, as a number."""
    classes = len(plan.task.labels)
    if kind is ReleaseKind.EVALUATION:
        size = vector_size(plan.task.form, classes, len(plan.groups))
        return str(size), size
    if kind is ReleaseKind.STATISTICS:
        words = f"features × (features + 1) / 2 + {classes} × (features + 1)"
        return (words, 0) if width is None else (f"{moments_size(width, classes):,}", moments_size(width, classes))
    rows = 1 if kind is ReleaseKind.CENTRE else classes
    if width is None:
        return f"{rows} × (features + 1)", 0
    return f"{rows * (width + 1):,}", rows * (width + 1)


_RELEASED: Mapping[ReleaseKind, str] = {
    ReleaseKind.CENTRE: f"the mean of the features with a count ({CENTRE})",
    ReleaseKind.GRADIENT: f"a sum of gradients ({WEIGHT})",
    ReleaseKind.DELTA: f"a change of weights ({WEIGHT})",
    ReleaseKind.STATISTICS: f"sums of the features' products and of the features by class with counts ({STATISTICS})",
    ReleaseKind.EVALUATION: f"how often the model is right, by class, and its loss ({EVALUATION})",
}


def _held_out(plan: RunPlan, data: Data) -> list[str]:
    if plan.evaluation is None:
        return []
    return [
        f"Held out at this site: {plan.evaluation.holdout:.0%} of the units never train; the model is judged on them.",
        *_counted_apart(plan.groups, data),
    ]


def _counted_apart(groups: tuple[str, ...], data: Data) -> list[str]:
    """Which groups an evaluation compares, and by what this site knows them."""
    if not groups:
        return []
    foreign = sorted(set(data.groups.values()) - set(groups))
    if data.group is None:
        known = "[data] names no group column, so that your records are in none"
    elif foreign:
        known = f"by your column {data.group}; {', '.join(foreign)} in [data.groups] is none of them"
    else:
        known = f"by your column {data.group}"
    return [f"Right and wrong answers are counted, with noise, for {', '.join(map(_plain, groups))}: {known}."]


def _protected(plan: RunPlan) -> str:
    if plan.privacy.unit is PrivacyUnit.PATIENT:
        most = plan.privacy.max_records_per_patient
        whom = f"each patient as a whole (at most {most} records of one take part)"
    else:
        whom = "each single record; a patient with several records is protected less"
    return f"ε protects {whom}: whether one is in your table hardly changes what anyone outside can see."


def _sharing(plan: RunPlan, site: SiteFile) -> list[str]:
    """With whom the noise is shared."""
    if plan.privacy.noise == "local":
        return []
    least, most = smallest_cohort(plan, site.limits), len(site.peers) + 1
    if most < least:
        return [
            f"This cannot be done: the run shares noise among {least} sites or more, and [peers] in site.toml pins "
            f"{most - 1}."
        ]
    return [
        f"Noise: shared with sites that you pinned ({', '.join(map(_plain, site.peers))}); each adds a part, and masks "
        "hide what single sites send. The ε below holds while few of them work with the coordinator: "
        f"{_tolerated(plan, least)}{'' if most == least else f', {_tolerated(plan, most)}'}.",
        *_no_spare(plan, site, least),
    ]


def _tolerated(plan: RunPlan, sites: int) -> str:
    colluding = plan.cohort.colluding(sites)
    return f"{f'at most {colluding}' if colluding else 'none'} if {sites} take part"


def _no_spare(plan: RunPlan, site: SiteFile, least: int) -> list[str]:
    """What a drop-out means."""
    if len(site.peers) + 1 == least:
        return [f"If one of the {least} drops out, the run ends: you take part in no smaller sum."]
    return [f"If a site drops out, up to {plan.cohort.retries} rounds are drawn anew; that can raise ε to the plan's."]


def _costs(cost: Price) -> list[str]:
    limits = cost.limits
    lines = [
        f"Price at δ = {limits.delta:g}: ε {cost.run:.4g} for this run (your limit {limits.epsilon_per_run:g}).",
        f"Everything so far ε {cost.before:.4g}; after this run ε {cost.after:.4g} (your limit "
        f"{limits.epsilon_lifetime:g} for ever).",
    ]
    if cost.alone is not None:
        lines.append(f"If this site's masks were taken off, this run would cost ε {cost.alone:.4g} instead.")
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
        meaning="the plan's unit, δ, records per patient, licence or sharing of noise is not what [limits] or [peers] "
        "in site.toml says",
        remedy="ask the coordinator for a plan that fits, or pin the sites to share noise with; the agent's log names "
        "what",
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
