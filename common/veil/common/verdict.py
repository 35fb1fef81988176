# SPDX-License-Identifier: Apache-2.0
"""The verdict on a certificate: every signature checked, every ε computed again from the listed mechanisms.

Promises to need the file and the public keys and nothing else: no network, no model library, and no word of the
coordinator's that is not checked against the sites'.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from veil.common.certificate import COORDINATOR, Certificate, Finding, RunFacts, Vouched, entry_of, read_certificate
from veil.common.errors import PlanError
from veil.common.keys import KEY_KINDS, canonical_pem
from veil.common.statement import Statement, key_fingerprint
from veil.common.statement_check import CheckedSite, Place, Planned, check_costs, read_plan, statement_faults


class Word(StrEnum):
    """The verdict in a word; only `valid` means that every ε on the page holds for every site that took part."""

    VALID = "valid"
    INCOMPLETE = "incomplete"
    NOT_PRIVATE = "not private"
    INVALID = "invalid"


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckedKey:
    """A key that signed.

    Attributes:
        name: the site's, or `coordinator`.
        fingerprint: SHA-256 of its PEM file.
        compared: whether a public key was given for it.
    """

    name: str
    fingerprint: str
    compared: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """All that a check found.

    Attributes:
        run: what was run; None where the file is damaged beyond reading.
        findings: what is wrong.
        sites: by name, those whose statement can be read.
        missing: sites without a statement, and why.
        unvouched: those of them whose updates were used.
        keys: that signed.
    """

    run: RunFacts | None
    findings: tuple[Finding, ...]
    sites: Mapping[str, CheckedSite]
    missing: Mapping[str, str]
    unvouched: tuple[str, ...]
    keys: tuple[CheckedKey, ...]

    @property
    def word(self) -> Word:
        """The worst that is true."""
        if self.findings or self.run is None:
            return Word.INVALID
        if not all(math.isfinite(site.lifetime.epsilon) for site in self.sites.values()):
            return Word.NOT_PRIVATE
        return Word.INCOMPLETE if self.unvouched or not self.sites else Word.VALID

    @property
    def keys_compared(self) -> bool:
        """Whether every key that signed is one that was given."""
        return bool(self.keys) and all(key.compared for key in self.keys)

    def document(self) -> dict[str, Any]:
        """As JSON takes it."""
        return {
            "verdict": self.word.value,
            "simulation": self.run.simulation if self.run else None,
            "run": self.run.job if self.run else None,
            "findings": [{"entry": one.entry, "what": one.what} for one in self.findings],
            "sites": {name: _site_document(site) for name, site in self.sites.items()},
            "missing": dict(self.missing),
            "keys_compared": self.keys_compared,
            "keys": {key.name: {"sha256": key.fingerprint, "compared": key.compared} for key in self.keys},
        }


def _site_document(site: CheckedSite) -> dict[str, Any]:
    said = site.statement
    return {
        "unit": said.unit.value,
        "delta": said.delta,
        "noise": said.noise,
        "epsilon": {"claimed": said.this_run.epsilon, "recomputed": site.this_run.finite_epsilon},
        "lifetime": {"claimed": said.lifetime.epsilon, "recomputed": site.lifetime.finite_epsilon},
        "epsilon_alone": None if site.this_run_alone is None else site.this_run_alone.finite_epsilon,
        "lifetime_alone": None if site.lifetime_alone is None else site.lifetime_alone.finite_epsilon,
        "limits": said.limits.model_dump(mode="json"),
        "rounds": site.rounds,
        "code_sha256": said.code_sha256,
        "versions": said.versions,
        "audit": said.audit,
    }


def judge(path: Path, keys: Mapping[str, bytes]) -> Verdict:
    """Check a certificate.

    Args:
        path: the file.
        keys: public keys by name, PEM; without one for a signer, the file's own is used and called not compared.

    Raises:
        InputError: when the file cannot be read, or is nothing like a certificate.
    """
    certificate, findings = read_certificate(path)
    if certificate is None:
        return Verdict(run=None, findings=findings, sites={}, missing={}, unvouched=(), keys=())
    return judge_certificate(certificate, keys, findings)


def judge_certificate(
    certificate: Certificate, keys: Mapping[str, bytes], findings: tuple[Finding, ...] = ()
) -> Verdict:
    """Check a certificate that was read; `findings` are those of reading it."""
    run, found = certificate.run, [*findings, *_coordinator_faults(certificate, keys)]
    planned = _planned(run, found)
    used = _used(run)
    sites = {}
    for name, vouched in sorted(certificate.statements.items()):
        entry, given = entry_of(name), keys.get(name)
        found += [*_key_faults(entry, vouched.public_key, given), *_signature_faults(entry, vouched)]
        try:
            statement = Statement.from_text(vouched.statement)
        except ValueError as error:
            found.append(Finding(entry=entry, what=str(error)))
            continue
        done = used.get(name, [])
        sites[name] = site = check_costs(statement, rounds=len(done))
        found += (Finding(entry=entry, what=what) for what in statement_faults(name, site, run, planned, done))
    unvouched = tuple(sorted(set(used) - set(certificate.statements)))
    found += _missing_faults(certificate, unvouched)
    return Verdict(
        run=run,
        findings=tuple(found),
        sites=sites,
        missing=certificate.missing,
        unvouched=unvouched,
        keys=tuple(_keys(certificate, keys)),
    )


def _used(run: RunFacts) -> dict[str, list[Place]]:
    """The rounds in which each site's update was used."""
    used: dict[str, list[Place]] = {}
    for one in run.rounds:
        for site in one.sites:
            used.setdefault(site, []).append((one.round, one.kind))
    return used


def _signature_faults(entry: str, vouched: Vouched) -> Iterator[Finding]:
    if not vouched.signed.genuine:
        yield Finding(entry=entry, what="signature: it is not this key's of this statement")


def _coordinator_faults(certificate: Certificate, keys: Mapping[str, bytes]) -> Iterator[Finding]:
    yield from _key_faults(COORDINATOR, certificate.public_key, keys.get(COORDINATOR))
    if not certificate.genuine:
        yield Finding(entry=COORDINATOR, what="signature: it is not this key's of this certificate")


def _key_faults(entry: str, written: str, given: bytes | None) -> Iterator[Finding]:
    pem = written.encode("utf-8", "surrogatepass")
    if canonical_pem(pem) != pem:
        yield Finding(entry=entry, what=f"public key: no {KEY_KINDS} key in PEM")
    elif given is not None and canonical_pem(given) != pem:
        yield Finding(entry=entry, what=f"public key: {key_fingerprint(pem)} is not the one given for it")


def _keys(certificate: Certificate, given: Mapping[str, bytes]) -> Iterator[CheckedKey]:
    written = {site: one.public_key for site, one in certificate.statements.items()}
    for name, pem in [(COORDINATOR, certificate.public_key), *sorted(written.items())]:
        fingerprint = key_fingerprint(pem.encode("utf-8", "surrogatepass"))
        yield CheckedKey(name=name, fingerprint=fingerprint, compared=name in given)


def _missing_faults(certificate: Certificate, unvouched: tuple[str, ...]) -> Iterator[Finding]:
    for site in sorted(set(certificate.missing) & set(certificate.statements)):
        yield Finding(entry="missing", what=f"{site} has a statement")
    for site in sorted(set(unvouched) - set(certificate.missing)):
        yield Finding(entry="missing", what=f"{site} took part, and neither makes a statement nor stands here")


def _planned(run: RunFacts, found: list[Finding]) -> Planned:
    """Read the plan; what is wrong with it and with the rounds is added to `found`."""
    try:
        planned, faults = read_plan(run)
    except PlanError as error:
        found.append(Finding(entry="run", what=f"plan: {error.value}"))
        return Planned(plan=None, releases={})
    found += (Finding(entry="run", what=what) for what in faults)
    return planned
