# SPDX-License-Identifier: Apache-2.0
"""Tests of `veil.server.documents` and its pages: they say what the certificate says, escaped, and load nothing."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from veil.common.keys import NodeKey
from veil.common.plan import RunPlan
from veil.common.privacy import NeighboringRelation, PrivacyUnit, spent
from veil.common.schedule import schedule
from veil.common.statement import (
    Cost,
    LedgerRun,
    Releases,
    SignedStatement,
    StatedLimits,
    Statement,
    summed_up,
)
from veil.common.verdict import Verdict, Word, judge
from veil.server.anomaly import ANOMALY_FILE
from veil.server.documents import write_documents
from veil.server.paper import sheet, table
from veil.server.state import RoundRecord
from veil.server.statement_page import RELEASED, shown
from veil.server.statements import NO_ANSWER, Evidence

HOSTILE = '<script>alert("x")</script>&\'\n}'
KEY, COORDINATOR = NodeKey.generate(), NodeKey.generate()
FIGURE = {"value": 0.75, "standard_error": 0.05, "low": 0.65, "high": 0.85, "reason": None}
DROWNED = {"value": None, "standard_error": None, "low": None, "high": None, "reason": "the noise outweighs it"}
EVALUATION: dict[str, Any] = {
    "on": "units that each site held out",
    "sites": 1,
    "confidence": 0.95,
    "count": {**FIGURE, "value": 41.0, "low": 30.0, "high": 52.0},
    "accuracy": FIGURE,
    "loss": FIGURE,
    "classes": {"a": {"share": FIGURE, "recall": DROWNED}, "b": {"share": FIGURE, "recall": FIGURE}},
    "per_site": [{"name": "Bonn", "accuracy": FIGURE}],
}


class Page(HTMLParser):
    """What a page shows, and the tags that it has."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.shown, self.tags, self.linked = "", set[str](), list[str]()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.linked += [str(value) for name, value in attrs if name in ("src", "href") or name.startswith("on")]

    def handle_data(self, data: str) -> None:
        self.shown += data + " "


@pytest.fixture
def plan(make_plan: Callable[..., RunPlan]) -> RunPlan:
    backbone = {"source": "hub:org/name@1", "sha256": "5" * 64, "licence": "Apache-2.0"}
    return make_plan(task={"kind": "text-classification", "labels": ["a", "b"]}, backbone=backbone)


def signed(
    plan: RunPlan, site: str, noise: str = "os", *, simulation: bool = False, audit: dict[str, Any] | None = None
) -> SignedStatement:
    done, heads = [release.mechanism for release in schedule(plan)], plan.transfer.head_rounds
    cost = Cost.of(spent(done, 1e-5)) if noise == "os" else Cost(epsilon=None, by_accountant={})
    statement = Statement(
        simulation=simulation,
        site=site,
        job="job",
        plan_sha256=plan.sha256,
        unit=PrivacyUnit.RECORD,
        relation=NeighboringRelation.ADD_OR_REMOVE_ONE,
        sampler="full-batch",
        noise=noise,
        releases=(
            Releases(first=0, last=0, kind="centre", mechanism=done[0], count=1),
            *(
                Releases(first=first, last=last, kind="gradient", mechanism=done[first], count=last - first + 1)
                for first, last in ([(1, 3)] if not heads else [(1, heads), (heads + 1, 3)])
            ),
        ),
        ledger=(LedgerRun(this_run=True, noise=noise, mechanisms=summed_up([(one, None) for one in done])),),
        ledger_head="0" * 64,
        ledger_lines=8,
        delta=1e-5,
        this_run=cost,
        lifetime=cost,
        limits=StatedLimits(epsilon_per_run=4.0, epsilon_lifetime=8.5, unit=PrivacyUnit.RECORD),
        backbone_sha256=plan.backbone.sha256 if plan.backbone else None,
        code_sha256="6" * 64,
        versions={},
        audit=audit,
        time="2030",
    )
    return SignedStatement.sign(statement, KEY)


@pytest.fixture
def write(plan: RunPlan, tmp_path: Path) -> Callable[..., tuple[Verdict, Page, Page]]:
    """Write the documents of a run; keywords change what sites said and the report."""

    def write(
        *,
        of: RunPlan = plan,
        statements: dict[str, SignedStatement] | None = None,
        missing: dict[str, str] | None = None,
        simulation: bool = False,
        **report: Any,
    ) -> tuple[Verdict, Page, Page]:
        (tmp_path / "model" / "head").mkdir(parents=True, exist_ok=True)
        (tmp_path / "model" / "head" / "head.safetensors").write_bytes(b"tensor")
        said = {"Bonn": signed(of, "Bonn", simulation=simulation)} if statements is None else statements
        whole = {
            "estimated_units": 812.4,
            "sites": [{"name": name, "units": None} for name in (*said, *(missing or {}))],
            "metrics": {},
            "evaluation": None,
            **report,
        }
        records = [
            RoundRecord(
                round=one.round, kind=one.kind, sites=tuple(said), refusals={}, bytes_down=0, bytes_up=0, seconds=0
            )
            for one in schedule(of)
        ]
        verdict = write_documents(
            tmp_path,
            of,
            "job",
            records=records,
            evidence=Evidence(statements=said, missing=missing or {}),
            report=whole,
            key=COORDINATOR,
            simulation=simulation,
        )
        pages = ((tmp_path / name).read_text(encoding="utf-8") for name in ("statement.html", "model-card.html"))
        return verdict, *(Page(page) for page in pages)  # type: ignore[return-value]

    return write


Write = Callable[..., tuple[Verdict, Page, Page]]


def test_the_certificate_is_valid_and_names_the_model(write: Write, tmp_path: Path) -> None:
    verdict, _, _ = write()
    assert verdict.word is Word.VALID
    assert judge(tmp_path / "certificate.json", {"coordinator": COORDINATOR.public_pem}).word is Word.VALID
    document = json.loads((tmp_path / "certificate.json").read_text(encoding="ascii"))
    assert document["run"]["adapter_sha256"] == hashlib.sha256(b"tensor").hexdigest()
    assert document["run"]["anomaly_sha256"] is None


def test_what_anomaly_scores_are_made_with_is_in_the_certificate_too(write: Write, tmp_path: Path) -> None:
    (tmp_path / "model/head").mkdir(parents=True)
    (tmp_path / "model" / ANOMALY_FILE).write_bytes(b"moments")
    _, page, _ = write()
    digest = hashlib.sha256(b"moments").hexdigest()
    document = json.loads((tmp_path / "certificate.json").read_text(encoding="ascii"))
    assert document["run"]["anomaly_sha256"] == digest
    assert digest in page.shown


def test_the_statement_says_what_left_what_it_cost_and_how_to_check(write: Write, plan: RunPlan) -> None:
    verdict, page, _ = write(missing={"Kiel": NO_ANSWER})
    cost = shown(verdict.sites["Bonn"].this_run.epsilon)
    for said in (
        *(RELEASED[kind] for kind in ("centre", "gradient")),
        "1 to 3",
        "8.500",
        cost,
        "Kiel: no statement (no answer in time)",
        "veil certificate verify certificate.json --keys KEYS",
        plan.sha256,
        "6" * 64,
        "What is not promised",
    ):
        assert said in page.shown, said
    assert "SIMULATION" not in page.shown and "NOT PRIVATE" not in page.shown


def test_the_statement_says_what_trained_below_the_head_and_from_which_round(
    write: Write, make_plan: Callable[..., RunPlan]
) -> None:
    backbone = {"source": "hub:org/name@1", "sha256": "5" * 64, "licence": "Apache-2.0"}
    task = {"kind": "text-classification", "labels": ["a", "b"]}
    training, rank = {"rounds": 3}, "changes of rank 4 in the attention of the top 2 blocks"
    shown_of = {}
    for mode in ({"mode": "lora", "rank": 4, "layers": 2, "head_rounds": 1}, {"mode": "full"}, {}):
        deep = make_plan(task=task, backbone=backbone, transfer=mode, training=training)
        shown_of[mode.get("mode")] = write(of=deep)[1].shown
    lora = shown_of["lora"]
    assert f"Trained: a new output layer and {rank}, of the pretrained model hub:org/name@1. All else in it" in lora
    head, below = (
        lora.index(f"{RELEASED['gradient']}: a new output layer alone"),
        lora.index(f"{RELEASED['gradient']}: a new output layer and {rank}"),
    )
    assert head < below
    assert "every weight" in shown_of["full"] and "stayed as it was" not in shown_of["full"]
    assert "Trained: a new output layer of the pretrained model hub:org/name@1. All else in it stayed" in shown_of[None]


def test_odds_are_those_of_the_largest_epsilon(write: Write) -> None:
    verdict, page, _ = write()
    epsilon = verdict.sites["Bonn"].lifetime.epsilon
    assert f"factor of at most {math.exp(epsilon):.3g}" in page.shown
    assert f"{100 / (1 + math.exp(-epsilon)):.1f} % sure" in page.shown


@pytest.mark.parametrize(
    ("epsilon", "words"), [(None, "unlimited"), (math.inf, "unlimited"), (2.9999001, "3.000"), (3.0, "3.000")]
)
def test_an_epsilon_is_shown_rounded_up(epsilon: float | None, words: str) -> None:
    assert shown(epsilon) == words


@pytest.mark.parametrize(
    ("audit", "words"),
    [
        ({"passed": True, "canary_bound": {"epsilon": 1.875}}, "found: ε is at least 1.88; passed."),
        ({"passed": False, "canary_bound": {"epsilon": "<b>"}}, "found: no lower bound of ε; NOT PASSED."),
        ({}, "found: no lower bound of ε; NOT PASSED."),
    ],
)
def test_an_audit_s_outcome_stands_on_the_page(audit: dict[str, Any], words: str, write: Write, plan: RunPlan) -> None:
    verdict, page, _ = write(statements={"Bonn": signed(plan, "Bonn", audit=audit)})
    assert words in page.shown
    assert (verdict.word is Word.VALID) == (audit.get("passed") is True)


def test_a_simulation_says_so_on_both_pages(write: Write) -> None:
    scores = {"accuracy": 0.9, "macro_f1": 0.8, "loss": 0.3}
    sites = [{"name": "Bonn", "units": 40, "test_records": 100}]
    _, statement, card = write(simulation=True, metrics={"federated": scores}, sites=sites)
    assert all("SIMULATION. The sites were parts of one table" in page.shown for page in (statement, card))
    assert "Exact figures on held-out records of a SIMULATION" in card.shown
    assert f"0.900 ± {1.96 * math.sqrt(0.9 * 0.1 / 100):.3f}" in card.shown


def test_noise_that_is_not_private_stands_above_everything(write: Write, plan: RunPlan) -> None:
    verdict, statement, card = write(statements={"Bonn": signed(plan, "Bonn", "fixed")})
    assert verdict.word is Word.NOT_PRIVATE
    assert all("NOT PRIVATE" in page.shown and "unlimited" in page.shown for page in (statement, card))
    assert "An unlimited ε promises nothing" in statement.shown


def test_a_certificate_that_does_not_hold_says_so_on_its_own_page(write: Write, plan: RunPlan) -> None:
    verdict, statement, _ = write(statements={"Bonn": signed(plan, "Ulm")})
    assert verdict.word is Word.INVALID
    assert "NOT VALID. statement of Bonn: site: Ulm" in statement.shown


def test_released_scores_stand_with_their_intervals(write: Write) -> None:
    _, _, card = write(evaluation=EVALUATION)
    for said in ("accuracy", "0.750", "0.650 to 0.850", "0.050", "recall of a", "unknown", "the noise outweighs it"):
        assert said in card.shown, said


def test_sites_whose_records_look_unlike_the_others_are_among_the_limits(write: Write) -> None:
    _, _, plain = write()
    sites = [
        {"name": HOSTILE, "distance": {**FIGURE, "value": 0.3, "low": 0.2, "high": 0.4}, "verdict": "apart"},
        {"name": "Kiel", "distance": FIGURE, "verdict": "alike"},
        {"name": "Ulm", "distance": DROWNED, "verdict": "unknown"},
    ]
    _, _, card = write(mismatch={"per_site": sites, "reason": None})
    told = card.shown.partition("look unlike")[2].partition("less well")[0]
    assert HOSTILE in told and "(0.30, 0.20 to 0.40)" in told
    assert "Kiel" not in told and "Ulm" not in told
    assert card.tags == plain.tags
    for nothing in (None, {"per_site": None, "reason": "masks"}, {"per_site": sites[1:], "reason": None}):
        assert "look unlike" not in write(mismatch=nothing)[2].shown


def test_what_nobody_stated_is_said_to_be_not_stated(write: Write, plan: RunPlan) -> None:
    _, _, card = write()
    assert card.shown.count("not stated by the coordinator") >= 5
    assert "Apache-2.0" in card.shown and "Not measured" in card.shown
    assert not re.search(r"TODO|TBD|lorem|fill in", card.shown, re.IGNORECASE)
    backbone = plan.backbone.model_copy(update={"licence": ""}) if plan.backbone else None
    _, _, bare = write(of=plan.model_copy(update={"backbone": backbone}))
    assert bare.shown.count("not stated by the coordinator") == card.shown.count("not stated by the coordinator") + 1


def test_what_is_known_of_the_weights_is_on_the_card_and_in_the_certificate(
    write: Write, plan: RunPlan, tmp_path: Path
) -> None:
    assert plan.backbone is not None
    told = {"trained_on": "a billion pairs of sentences", "citation": "Wang et al. 2020, MiniLM"}
    known = plan.model_copy(update={"backbone": plan.backbone.model_copy(update=told)})
    _, _, card = write(of=known)
    certificate = json.loads((tmp_path / "certificate.json").read_text(encoding="utf-8"))
    for key, words in told.items():
        assert words in card.shown
        assert certificate["run"]["plan"]["backbone"][key] == words


def test_hostile_names_are_shown_and_change_nothing(write: Write, plan: RunPlan) -> None:
    labels = plan.task.model_copy(update={"labels": (HOSTILE, "b")})
    hostile = plan.model_copy(update={"task": labels})
    _, *honest = write()
    for page, plain in zip(
        write(of=hostile, statements={HOSTILE: signed(hostile, HOSTILE)}, missing={HOSTILE[::-1]: HOSTILE})[1:],
        honest,
        strict=True,
    ):
        assert HOSTILE in page.shown.replace("&quot;", '"') or "<script>" in page.shown
        assert page.tags == plain.tags and page.linked == []


def test_a_page_loads_nothing_and_is_made_for_paper(write: Write, tmp_path: Path) -> None:
    write()
    for name in ("statement.html", "model-card.html"):
        text = (tmp_path / name).read_text(encoding="utf-8")
        assert Page(text).tags.isdisjoint({"script", "link", "img", "iframe", "form"})
        assert "@page{size:A4" in text and "url(" not in text and "@import" not in text


def test_a_text_without_bytes_in_utf8_does_not_stop_a_page() -> None:
    assert "?" in sheet("a\ud800", table(("x",), [("y\udfff",)]))
