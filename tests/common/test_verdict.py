# SPDX-License-Identifier: Apache-2.0
"""Tests of `veil.common.verdict` and `veil.common.certificate`: every lie has its finding, an honest run has none."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from veil.common.certificate import Certificate, RoundSites, Vouched, assemble, read_certificate
from veil.common.errors import InputError
from veil.common.keys import NodeKey
from veil.common.plan import RunPlan
from veil.common.privacy import Mechanism, NeighboringRelation, PrivacyUnit, spent, spent_over_runs
from veil.common.schedule import schedule
from veil.common.statement import (
    Cost,
    LedgerRun,
    Releases,
    Repeated,
    SignedStatement,
    StatedLimits,
    Statement,
    sampler_of,
    summed_up,
)
from veil.common.verdict import Verdict, Word, judge, judge_certificate

PLAN = RunPlan.model_validate(
    {
        "name": "p",
        "task": {"kind": "tabular-classification", "labels": ["a", "b"]},
        "training": {"rounds": 3},
        "privacy": {"target_epsilon": 3.0, "unit": "patient"},
        "cohort": {"nominal_units": 40},
    }
)
RELEASES = schedule(PLAN)
COORDINATOR, BONN, ULM = NodeKey.generate(), NodeKey.generate(), NodeKey.generate()
EARLIER = Mechanism(noise_multiplier=9.0, max_grad_norm=0.5, steps=3, unit=PrivacyUnit.PATIENT)


def stated(site: str = "Bonn", *, earlier: Mechanism = EARLIER, repeats: int = 0, **change: Any) -> Statement:
    """An honest statement of a site with an earlier run, whose last round was drawn again `repeats` times."""
    centre, *gradients = RELEASES
    done = [centre.mechanism, *(one.mechanism for one in gradients), *[gradients[-1].mechanism] * repeats]
    fields: dict[str, Any] = {
        "simulation": False,
        "site": site,
        "job": "job",
        "plan_sha256": PLAN.sha256,
        "unit": PrivacyUnit.PATIENT,
        "relation": NeighboringRelation.ADD_OR_REMOVE_ONE,
        "sampler": sampler_of(done),
        "noise": "os",
        "releases": (
            Releases(first=0, last=0, kind="centre", mechanism=centre.mechanism, count=1),
            Releases(first=1, last=3, kind="gradient", mechanism=gradients[0].mechanism, count=3 + repeats),
        ),
        "ledger": (
            LedgerRun(this_run=False, noise="os", mechanisms=(Repeated(mechanism=earlier, count=1),)),
            LedgerRun(this_run=True, noise="os", mechanisms=summed_up([(one, None) for one in done])),
        ),
        "ledger_head": "1" * 64,
        "ledger_lines": 12,
        "delta": 1e-5,
        "this_run": Cost.of(spent(done, 1e-5)),
        "lifetime": Cost.of(spent_over_runs([[earlier], done], 1e-5)),
        "limits": StatedLimits(epsilon_per_run=5.0, epsilon_lifetime=9.0, unit=PrivacyUnit.PATIENT),
        "backbone_sha256": None,
        "code_sha256": "2" * 64,
        "versions": {"veil": "1"},
        "audit": None,
        "time": "2030-01-01T00:00:00+00:00",
        **change,
    }
    return Statement(**fields)


def certificate(bonn: Statement | SignedStatement | None = None, **change: Any) -> Certificate:
    """A certificate of Bonn and Ulm; keywords belong to `assemble`."""
    said = bonn or stated()
    signed = said if isinstance(said, SignedStatement) else SignedStatement.sign(said, BONN)
    rounds = [RoundSites(round=one.round, kind=one.kind.value, sites=("Bonn", "Ulm")) for one in RELEASES]
    given: dict[str, Any] = {
        "rounds": rounds,
        "statements": {"Bonn": signed, "Ulm": SignedStatement.sign(stated("Ulm"), ULM)},
        "missing": {},
        "adapter_sha256": "3" * 64,
        "created": "2030-01-01T00:00:00+00:00",
        "veil_version": "1",
        "simulation": False,
        "key": COORDINATOR,
        **change,
    }
    return assemble(given.pop("plan", PLAN), given.pop("job", "job"), **given)


def findings(of: Certificate) -> list[str]:
    return [str(finding) for finding in judge_certificate(of, {}).findings]


def written(of: Certificate, folder: Path) -> Path:
    path = folder / "certificate.json"
    path.write_bytes(of.encode())
    return path


# ---------------------------------------------------------------------------------------------------------------------
# What is true


def test_an_honest_certificate_is_valid_and_its_epsilons_are_computed_anew(tmp_path: Path) -> None:
    keys = {"Bonn": BONN.public_pem, "Ulm": ULM.public_pem, "coordinator": COORDINATOR.public_pem}
    verdict = judge(written(certificate(), tmp_path), keys)
    assert (verdict.word, verdict.findings, verdict.keys_compared) == (Word.VALID, (), True)
    bonn = verdict.sites["Bonn"]
    assert bonn.this_run.epsilon == spent([one.mechanism for one in RELEASES], 1e-5).epsilon <= 3.0
    assert bonn.lifetime.epsilon > bonn.this_run.epsilon and bonn.rounds == 4


def test_a_round_drawn_again_is_counted_and_honest() -> None:
    assert findings(certificate(stated(repeats=2))) == []


def test_a_sampled_plan_is_checked_by_the_same_rules() -> None:
    training = {"algorithm": "dp-fedavg", "rounds": 2, "sample_rate": 0.5}
    plan = PLAN.model_copy(update={"training": PLAN.training.model_copy(update=training)})
    centre, *deltas = schedule(plan)
    done = [centre.mechanism, *(one.mechanism for one in deltas)]
    said = stated(
        plan_sha256=plan.sha256,
        sampler=sampler_of(done),
        releases=(
            Releases(first=0, last=0, kind="centre", mechanism=centre.mechanism, count=1),
            Releases(first=1, last=2, kind="delta", mechanism=deltas[0].mechanism, count=2),
        ),
        ledger=(LedgerRun(this_run=True, noise="os", mechanisms=summed_up([(one, None) for one in done])),),
        this_run=Cost.of(spent(done, 1e-5)),
        lifetime=Cost.of(spent(done, 1e-5)),
    )
    one = {"Bonn": SignedStatement.sign(said, BONN)}
    rounds = [RoundSites(round=at.round, kind=at.kind.value, sites=("Bonn",)) for at in schedule(plan)]
    assert findings(certificate(plan=plan, statements=one, rounds=rounds)) == []


def test_without_given_keys_the_verdict_says_that_none_was_compared() -> None:
    verdict = judge_certificate(certificate(), {"Bonn": BONN.public_pem})
    assert verdict.word is Word.VALID and not verdict.keys_compared
    assert [(key.name, key.compared) for key in verdict.keys] == [
        ("coordinator", False),
        ("Bonn", True),
        ("Ulm", False),
    ]


# ---------------------------------------------------------------------------------------------------------------------
# What is not


def cost(epsilon: float | None, **figures: float | None) -> Cost:
    return Cost(epsilon=epsilon, by_accountant=figures)


HONEST = stated()
TRUE, EVER = float(HONEST.this_run.epsilon or 0), float(HONEST.lifetime.epsilon or 0)
WEAK = Mechanism(noise_multiplier=2.0, max_grad_norm=0.5, unit=PrivacyUnit.PATIENT)
CENTRE, GRADIENTS = HONEST.releases
OTHER_UNIT = Mechanism(noise_multiplier=9.0, max_grad_norm=0.5, steps=3)
OTHERS = LedgerRun(this_run=False, noise="os", mechanisms=summed_up([(OTHER_UNIT, None)]))

LIES: dict[str, tuple[dict[str, Any], str]] = {
    "an epsilon that is too low": ({"this_run": cost(TRUE * (1 - 2e-6))}, "this_run: epsilon"),
    "an epsilon that is too high": ({"this_run": cost(TRUE * 1.002)}, "this_run: epsilon"),
    "no epsilon": ({"this_run": cost(None)}, "this_run: epsilon inf"),
    "a lifetime that is too low": ({"lifetime": cost(TRUE)}, "lifetime: epsilon"),
    "an accountant's figure": ({"this_run": cost(TRUE, rdp=0.1)}, "this_run: rdp: epsilon"),
    "an accountant nobody knows": ({"this_run": cost(TRUE, tarot=TRUE)}, "tarot is no accountant"),
    "another job": ({"job": "job-2"}, "job: job-2"),
    "another site": ({"site": "Ulm"}, "site: Ulm"),
    "another plan": ({"plan_sha256": "9" * 64}, "plan_sha256: 9"),
    "another unit": ({"unit": PrivacyUnit.RECORD}, "unit: record"),
    "another sampler": ({"sampler": "poisson 0.1"}, "sampler: poisson"),
    "other weights": ({"backbone_sha256": "4" * 64}, "backbone_sha256: 4"),
    "a simulation": ({"simulation": True}, "simulation: True"),
    "too few lines": ({"ledger_lines": 3}, "ledger_lines: 3"),
    "a limit that is passed": (
        {"limits": StatedLimits(epsilon_per_run=1.0, epsilon_lifetime=9.0, unit=PrivacyUnit.PATIENT)},
        "passes epsilon_per_run",
    ),
    "a lifetime limit that is passed": (
        {"limits": StatedLimits(epsilon_per_run=9.0, epsilon_lifetime=EVER - 0.1, unit=PrivacyUnit.PATIENT)},
        "passes epsilon_lifetime",
    ),
    "a round left out": (
        {"releases": (CENTRE, GRADIENTS.model_copy(update={"last": 2, "count": 2}))},
        "releases: none of round 3",
    ),
    "a mechanism that is not the plan's": (
        {"releases": (CENTRE, GRADIENTS.model_copy(update={"mechanism": WEAK}))},
        "rounds 1 to 3 (gradient) are not the plan's",
    ),
    "a release of another kind": (
        {"releases": (CENTRE, GRADIENTS.model_copy(update={"kind": "delta"}))},
        "rounds 1 to 3 (delta) are not the plan's",
    ),
    "rounds beyond the plan": (
        {"releases": (CENTRE, GRADIENTS.model_copy(update={"last": 900_000, "count": 900_000}))},
        "round 900000, which the plan does not have",
    ),
    "a ledger without this run": ({"ledger": HONEST.ledger[:1]}, "ledger: its lines of this run"),
    "a ledger with less of this run": (
        {"ledger": (LedgerRun(this_run=True, noise="os", mechanisms=summed_up([(WEAK, None)])),)},
        "ledger: its lines of this run",
    ),
    "a ledger of mixed units": (
        {"ledger": (OTHERS, HONEST.ledger[1])},
        "mechanisms of another unit",
    ),
    "an audit that failed": ({"audit": {"passed": False}}, "audit: it did not pass"),
    "an audit without a word": ({"audit": {}}, "audit: it did not pass"),
    "noise of another name": ({"noise": "fixed"}, "noise: fixed"),
}


@pytest.mark.parametrize(("change", "said"), LIES.values(), ids=LIES)
def test_a_site_that_lies_is_named_with_its_lie(change: dict[str, Any], said: str) -> None:
    found = findings(certificate(stated(**change)))
    assert found and all(one.startswith("statement of Bonn: ") for one in found)
    assert any(said in one for one in found), found


def test_noise_that_is_not_private_costs_infinity_and_gives_the_verdict_its_name() -> None:
    ledger = (HONEST.ledger[0], HONEST.ledger[1].model_copy(update={"noise": "fixed"}))
    said = stated(noise="fixed", ledger=ledger, this_run=cost(None), lifetime=cost(None))
    verdict = judge_certificate(certificate(said), {})
    assert (verdict.word, verdict.findings) == (Word.NOT_PRIVATE, ())
    assert math.isinf(verdict.sites["Bonn"].this_run.epsilon)
    claimed = stated(noise="fixed", ledger=ledger)
    assert judge_certificate(certificate(claimed), {}).word is Word.INVALID


def test_a_site_without_a_statement_makes_the_certificate_incomplete() -> None:
    one = {"Bonn": SignedStatement.sign(stated(), BONN)}
    verdict = judge_certificate(certificate(statements=one, missing={"Ulm": "no answer in time"}), {})
    assert (verdict.word, verdict.findings, verdict.unvouched) == (Word.INCOMPLETE, (), ("Ulm",))
    assert any("missing: Ulm took part" in found for found in findings(certificate(statements=one)))
    assert findings(certificate(missing={"Ulm": "no answer in time"})) == ["missing: Ulm has a statement"]


def test_a_site_that_was_never_used_may_be_missing() -> None:
    assert judge_certificate(certificate(missing={"Kiel": "budget"}), {}).word is Word.VALID


def test_a_signature_by_another_key_is_found_only_when_keys_are_given() -> None:
    forged = certificate(SignedStatement.sign(stated(), ULM))
    assert findings(forged) == []
    verdict = judge_certificate(forged, {"Bonn": BONN.public_pem})
    assert [one.entry for one in verdict.findings] == ["statement of Bonn"]
    assert "public key" in verdict.findings[0].what
    assert judge_certificate(certificate(), {"coordinator": ULM.public_pem}).findings[0].entry == "coordinator"


def test_a_site_cannot_speak_for_another() -> None:
    swapped = {"Bonn": SignedStatement.sign(stated("Ulm"), ULM), "Ulm": SignedStatement.sign(stated("Ulm"), ULM)}
    assert findings(certificate(statements=swapped)) == ["statement of Bonn: site: Ulm, where the certificate has Bonn"]


RUN_LIES: dict[str, tuple[Callable[[Certificate], dict[str, Any]], str]] = {
    "another budget": (
        lambda of: {"plan": {**of.run.plan, "privacy": {**of.run.plan["privacy"], "target_epsilon": 9.0}}},
        "run: plan_sha256",
    ),
    "a plan that is none": (lambda of: {"plan": {"name": 7}}, "run: plan:"),
    "a plan in other words": (lambda of: {"plan": {**of.run.plan, "seed": "0"}}, "run: plan: not in canonical form"),
    "a round twice": (lambda of: {"rounds": (*of.run.rounds, of.run.rounds[0])}, "run: rounds"),
    "a round that is not planned": (
        lambda of: {"rounds": (RoundSites(round=77, kind="gradient", sites=()),)},
        "run: rounds",
    ),
    "a simulation": (lambda of: {"simulation": True}, "simulation: False"),
    "another job": (lambda of: {"job": "x"}, "job: job"),
}


@pytest.mark.parametrize(("change", "said"), RUN_LIES.values(), ids=RUN_LIES)
def test_a_coordinator_that_lies_about_the_run_contradicts_itself_or_the_sites(
    change: Callable[[Certificate], dict[str, Any]], said: str
) -> None:
    honest = certificate()
    lying = honest.model_copy(update={"run": honest.run.model_copy(update=change(honest))}).sealed(COORDINATOR)
    assert any(said in one for one in findings(lying)), findings(lying)


def test_what_the_coordinator_did_not_sign_is_found() -> None:
    honest = certificate()
    later = honest.model_copy(update={"run": honest.run.model_copy(update={"created": "2031"})})
    assert findings(later) == ["coordinator: signature: it is not this key's of this certificate"]


# ---------------------------------------------------------------------------------------------------------------------
# The file


def change_at(raw: bytes, where: int, byte: int) -> bytes:
    return raw[:where] + bytes([byte]) + raw[where + 1 :]


def judged(raw: bytes, folder: Path) -> Verdict:
    path = folder / "changed.json"
    path.write_bytes(raw)
    return judge(path, {})


def test_any_changed_byte_is_found_and_one_of_a_statement_under_its_site(tmp_path: Path) -> None:
    """One bit, another case, a quote, a new line: bytes that leave JSON, and bytes that break it."""
    raw = certificate().encode()
    assert not judged(raw, tmp_path).findings
    places = [(name, raw.index(f'"{name}":{{"public_key"'.encode())) for name in ("Bonn", "Ulm")]
    blocks = {name: (begin + len(name) + 3, raw.index(b"\n", begin)) for name, begin in places}
    for where in range(0, len(raw), 41):
        for byte in {raw[where] ^ 1, raw[where] ^ 32, ord('"'), ord("\n")} - {raw[where]}:
            found = {finding.entry for finding in judged(change_at(raw, where, byte), tmp_path).findings}
            assert found, (where, byte)
            for name, (begin, end) in blocks.items():
                if begin <= where < end:
                    assert f"statement of {name}" in found, (where, byte, found)


@pytest.mark.parametrize("cut", [0, 1, 7, 900])
def test_a_file_that_is_cut_or_longer_is_found(cut: int, tmp_path: Path) -> None:
    raw = certificate().encode()
    changed = raw + b"\n" if cut == 0 else raw[:-cut]
    assert judged(changed, tmp_path).word is Word.INVALID


def test_every_entry_stands_on_a_line_of_its_own() -> None:
    lines = certificate().encode().decode("ascii").splitlines()
    begun = ["{", '"missi', '"publi', '"run":', '"signa', '"state', '"Bonn"', '"Ulm":', "},", '"veil_', "}"]
    assert [line[:6] for line in lines] == begun


@pytest.mark.parametrize("content", [b"", b"{}", b"\x00\xff" * 100, b'{"name": "report"}', b"[" * 100_000])
def test_what_is_no_certificate_is_an_error(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match="no certificate"):
        judge(path, {})
    with pytest.raises(InputError, match="No such file"):
        judge(tmp_path / "nothing.json", {})


def test_a_document_of_another_shape_is_named_by_entry(tmp_path: Path) -> None:
    honest = certificate()
    text = honest.encode().decode()
    assert [one.entry for one in read_certificate(written(honest, tmp_path))[1]] == []
    path = tmp_path / "certificate.json"
    path.write_text(text.replace('"job":"job",', "", 1))
    assert [str(one) for one in read_certificate(path)[1]] == ["run: job: field required"]
    path.write_text(text.replace('"signature":"', '"signature":7,"x":"', 1))
    assert {one.entry for one in read_certificate(path)[1]} == {"coordinator", "file"}
    path.write_text(text.replace('"plan":{', '"plan":{"x":NaN,', 1))
    assert [one.entry for one in read_certificate(path)[1]] == ["run"]


@pytest.mark.parametrize("signature", ["", "zz", "AB" * 50, " 00"])
def test_a_signature_has_one_written_form(signature: str) -> None:
    honest = certificate()
    bonn = honest.statements["Bonn"].model_copy(update={"signature": signature})
    changed = honest.model_copy(update={"statements": {**honest.statements, "Bonn": bonn}}).sealed(COORDINATOR)
    assert findings(changed) == ["statement of Bonn: signature: it is not this key's of this statement"]


def test_hostile_names_are_carried_and_change_no_entry(tmp_path: Path) -> None:
    name = 'a"},\n"Ulm":{"x\x1b[2J'
    key = NodeKey.generate()
    both = {name: SignedStatement.sign(stated(name), key), "Ulm": SignedStatement.sign(stated("Ulm"), ULM)}
    rounds = [RoundSites(round=one.round, kind=one.kind.value, sites=(name, "Ulm")) for one in RELEASES]
    verdict = judge(written(certificate(statements=both, rounds=rounds), tmp_path), {name: key.public_pem})
    assert (verdict.word, set(verdict.sites)) == (Word.VALID, {name, "Ulm"})


def test_a_signed_statement_is_kept_as_it_came() -> None:
    signed = SignedStatement.sign(stated(), BONN)
    assert Vouched.of(signed).signed == signed
