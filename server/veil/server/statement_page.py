# SPDX-License-Identifier: Apache-2.0
"""statement.html: one page about a run for a data-protection officer, in plain words.

Promises that every figure was computed again from the signed statements, and that what is not promised stands on the
same page as what is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from veil.common.certificate import Certificate
from veil.common.plan import RunPlan
from veil.common.statement import Releases, key_fingerprint
from veil.common.statement_check import CheckedSite
from veil.common.trained import of_head, trained_words
from veil.common.truths import SAID
from veil.common.verdict import Verdict, Word
from veil.server.paper import code, heading, notice, paragraph, points, sheet, table, under

SIMULATED = (
    "SIMULATION. The sites were parts of one table on one machine, and one program signed for all of them: this page "
    "shows what a run would state, and vouches for no real site."
)
NOT_PRIVATE = "NOT PRIVATE. The noise of this run could be known to others: nothing below limits what they can learn."

RELEASED = {
    "centre": "mean of the records' features, and their number, both blurred with noise",
    "gradient": "direction in which the records would move the model, summed over all and blurred with noise",
    "delta": "change of the model after training at the site, blurred with noise",
    "statistics": "how the records' features vary together, and their sums and numbers by answer, blurred with noise",
    "evaluation": "how right or wrong the answers are on records held out, counted or summed and blurred with noise",
}

_INPUTS = {
    "text": "texts",
    "image": "images",
    "audio": "sounds",
    "tabular": "rows of numbers",
}

_NOT_PROMISED = (
    "That nothing can be learned about a person: what is true of people in general can be learned from a model, and "
    "applied to somebody whose record was never used.",
    "Anything about a person whose records are at several sites beyond the sum of these sites' costs.",
    "That a site's records were right, or that a site ran the program it names: the statement is what that program, "
    "with the site's key, signed. Whoever holds the site's machine and key can sign anything.",
    "What can be told from how long a site took to answer.",
    "That the model is correct, fair, or fit for any use.",
    "The known gaps of this version, which PRIVACY.md lists by weight.",
)


def statement_page(certificate: Certificate, verdict: Verdict, plan: RunPlan) -> str:
    """The page.

    Args:
        certificate: the run's.
        verdict: on it.
        plan: what was run.
    """
    run = certificate.run
    return sheet(
        f"Privacy statement: {plan.name}",
        under(f"Run {run.job}, {run.created}, Veil {run.veil_version}"),
        *notices(certificate, verdict),
        heading("What was trained"),
        paragraph(_trained(plan, len(verdict.sites) + len(certificate.missing))),
        heading("What left each site"),
        table(("Site", "What", "Rounds", "Times"), _left(verdict.sites, plan)),
        paragraph(
            "No record, no text or image, no exact count and no exact score left a site; one whose owner declared its "
            "number of units public told that as well, as the run's report shows. Where a site failed while it drew a "
            "round, the coordinator saw that it failed."
        ),
        heading(f"What it cost each {plan.privacy.unit}"),
        table(
            ("Site", "ε of this run", "its limit", "ε of all runs so far", "its limit", "δ"),
            (cost_row(name, site) for name, site in verdict.sites.items()),
        ),
        *(paragraph(words) for words in _shared(verdict.sites)),
        *(paragraph(words) for words in _audits(verdict.sites)),
        *(paragraph(f"{site}: no statement ({why}).") for site, why in sorted(certificate.missing.items())),
        heading("What ε means"),
        paragraph(meaning(verdict, plan)),
        heading("What is not promised"),
        points(_NOT_PROMISED),
        heading("How to check this page"),
        paragraph(
            "On any machine with Veil, without a network, in the folder of this page. KEYS is a folder with the public "
            "keys as you got them from the sites themselves, each as NAME.pem, and the coordinator's as "
            "coordinator.pem. All figures above are computed anew, and all signatures checked."
        ),
        code("veil certificate verify certificate.json --keys KEYS"),
        heading("Fingerprints (SHA-256)"),
        table(("Of", ""), fingerprints(certificate, verdict, plan)),
    )


def notices(certificate: Certificate, verdict: Verdict) -> Iterator[str]:
    """What must be read before anything else."""
    if certificate.run.simulation:
        yield notice(SIMULATED)
    if not all(math.isfinite(site.lifetime.epsilon) for site in verdict.sites.values()):
        yield notice(NOT_PRIVATE)
    if verdict.word is Word.INVALID:
        yield notice("NOT VALID. " + "; ".join(str(finding) for finding in verdict.findings))
    if verdict.unvouched:
        yield notice("INCOMPLETE. No statement of " + ", ".join(verdict.unvouched) + ", whose updates were used.")


def _trained(plan: RunPlan, sites: int) -> str:
    inputs = _INPUTS[plan.task.modality]
    start = (
        "It starts from nothing but the numbers."
        if plan.backbone is None
        else f"Trained: {trained_words(plan)}{',' * plan.transfer.deep} of the pretrained model "
        f"{plan.backbone.source}.{'' if plan.transfer.mode == 'full' else ' All else in it stayed as it was.'}"
    )
    return (
        f"A model that reads {inputs} and answers {asked(plan)}. {sites} sites taught it together from their own "
        f"{inputs}, which stayed where they are. {start} What is protected at each site: every {plan.privacy.unit}."
    )


def asked(plan: RunPlan) -> str:
    """What a model of the plan answers, in words."""
    labels = ", ".join(plan.task.labels)
    if plan.task.target is not None:
        low, high = plan.task.target
        return f"with a number, {labels}, from {low:g} to {high:g}"
    if plan.task.form in SAID:
        return SAID[plan.task.form].format(labels)
    return f"any of: {labels}" if plan.task.form == "multilabel" else f"one of: {labels}"


def _left(sites: Mapping[str, CheckedSite], plan: RunPlan) -> Iterator[tuple[str, str, str, str]]:
    for name, site in sites.items():
        for one in site.statement.releases:
            yield name, released(one, plan), _rounds(one), str(one.count)


def released(one: Releases, plan: RunPlan) -> str:
    """What left, in words; of a gradient where more than a head trains, of how much it is."""
    words = RELEASED.get(one.kind, one.kind)
    if one.kind != "gradient" or not plan.transfer.deep:
        return words
    head_alone = of_head(plan, one.last)
    return f"{words}: {'a new output layer alone' if head_alone else trained_words(plan)}"


def _rounds(one: Releases) -> str:
    return str(one.first) if one.first == one.last else f"{one.first} to {one.last}"


def cost_row(name: str, site: CheckedSite) -> tuple[str, ...]:
    """A site's costs and limits."""
    said = site.statement
    return (
        name,
        shown(site.this_run.epsilon),
        shown(said.limits.epsilon_per_run),
        shown(site.lifetime.epsilon),
        shown(said.limits.epsilon_lifetime),
        f"{said.delta:g}",
    )


def shown(epsilon: float | None) -> str:
    """An ε, rounded up in the third decimal."""
    if epsilon is None or math.isinf(epsilon):
        return "unlimited"
    return f"{math.ceil(epsilon * 1000 - 1e-9) / 1000:.3f}"


def _shared(sites: Mapping[str, CheckedSite]) -> Iterator[str]:
    """What sharing noise leans on, and what is left where it does not hold."""
    sharing = {name: site for name, site in sites.items() if site.this_run_alone is not None}
    if not sharing:
        return
    sums = {one.shared for site in sharing.values() for one in site.statement.releases if one.shared is not None}
    most = max(sums, key=lambda one: one.colluding)
    yield (
        f"The sites shared the noise: each added a part, and what it sent was hidden behind masks that cancel only in "
        f"the sum over all. The costs above hold for everybody who sees that sum, also if {most.colluding} of "
        f"{most.sites} sites work with the coordinator. If the masks of a site were taken off (all its partners "
        "lie, or their keys were stolen), what it sent has its own part of the noise only. Then this run cost, "
        "and all runs so far: "
        + "; ".join(
            f"{name} {shown(site.this_run_alone.epsilon if site.this_run_alone else None)}, "
            f"{shown(site.lifetime_alone.epsilon if site.lifetime_alone else None)}"
            for name, site in sharing.items()
        )
        + "."
    )


def _audits(sites: Mapping[str, CheckedSite]) -> Iterator[str]:
    """What attacks on the sites' own programs found."""
    for name, site in sites.items():
        record = site.statement.audit
        if record is not None:
            bound = record.get("canary_bound")
            least = bound.get("epsilon") if isinstance(bound, dict) else None
            found = f"ε is at least {least:.3g}" if isinstance(least, float) else "no lower bound of ε"
            word = "passed" if record.get("passed") is True else "NOT PASSED"
            yield f"{name} attacked its own program with artificial records for this plan and found: {found}; {word}."


def meaning(verdict: Verdict, plan: RunPlan) -> str:
    """What the largest ε of the page says, in odds."""
    unit = plan.privacy.unit
    worst = max((site.lifetime.epsilon for site in verdict.sites.values()), default=math.inf)
    if math.isinf(worst):
        return f"An unlimited ε promises nothing to any {unit}."
    delta = max(site.statement.delta for site in verdict.sites.values())
    factor, sure = math.exp(min(worst, 700.0)), 1 / (1 + math.exp(-worst))
    return (
        f"Suppose that somebody knows all records of a site but those of one {unit}, sees everything that ever left "
        f"the site, and asks whether that {unit} is among them. The largest ε above, {shown(worst)}, bounds how much "
        f"wiser it makes them: their odds change by a factor of at most {factor:.3g}. Who thought it as likely as not "
        f"can become at most {100 * sure:.1f} % sure. δ = {delta:g} is the weight of outcomes for which this bound is "
        "not promised. It is a bound for the worst case, not a measurement of what an actual reader learns; and it is "
        "a weak promise where ε is large: with ε = 1 even odds become at most 73.1 %, with 3 at most 95.3 %, with 8 "
        "at most 99.97 %."
    )


def fingerprints(certificate: Certificate, verdict: Verdict, plan: RunPlan) -> Iterator[tuple[str, str]]:
    """What the certificate and its signers are known by."""
    yield "coordinator's key", key_fingerprint(certificate.public_key.encode())
    for name, vouched in sorted(certificate.statements.items()):
        yield f"key of {name}", key_fingerprint(vouched.public_key.encode())
    yield "plan", certificate.run.plan_sha256
    yield "tuned part (model/head/head.safetensors)", certificate.run.adapter_sha256
    if certificate.run.anomaly_sha256 is not None:
        yield "anomaly scores (model/head/anomaly.safetensors)", certificate.run.anomaly_sha256
    if plan.backbone is not None:
        yield "pretrained weights", plan.backbone.sha256
    for code_sha256 in sorted({site.statement.code_sha256 for site in verdict.sites.values()}):
        names = [name for name, site in verdict.sites.items() if site.statement.code_sha256 == code_sha256]
        yield f"program at {', '.join(names)}", code_sha256
