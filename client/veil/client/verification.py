# SPDX-License-Identifier: Apache-2.0
"""The check of a ledger by anyone with the site's public key: nothing changed, removed or re-ordered.

Promises to read only: also beside a running agent, also a copy, and without the site's private key.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from veil.client.anchor import disagreement, read_anchor
from veil.client.chain import Fault, Finding, Line, examine, genesis
from veil.client.lines import LineFile
from veil.common.errors import InputError


@dataclass(frozen=True, kw_only=True, slots=True)
class Examination:
    """What `verify` found.

    Attributes:
        lines: how many lines there are.
        head: hash of the last one.
        findings: all that is wrong; empty when nothing is.
    """

    lines: int
    head: str
    findings: tuple[Finding, ...]


def verify(path: Path, site: str, public_pem: bytes, *, anchor: Path | None = None) -> Examination:
    """Examine a ledger, every line, every signature, every stored reply, and the file that holds them.

    Args:
        path: the file.
        site: whose lines.
        public_pem: the site's public key.
        anchor: its anchor, to find lines cut off at the end.

    Raises:
        InputError: when there is no such file.
        RefusalError: when it cannot be read at all, or the anchor is not this site's.
    """
    if not path.exists():
        raise InputError(f"{path} is missing", "a ledger", "name the file, or restore its newest copy")
    start = genesis(site)
    anchored = None if anchor is None else read_anchor(anchor, public_pem)
    with closing(LineFile(path, reading=True)) as file, file.snapshot():
        lines, stored, broken = file.lines(site), file.reply_digests(site), file.faults()
    findings = [Finding(seq=0, fault=Fault.FILE, detail=what) for what in broken]
    findings += examine(lines, after=start, public_pem=public_pem)
    findings += _reply_findings(lines, stored, faulty={finding.seq for finding in findings})
    heads = [start, *(line.head for line in lines)]
    remembered = anchor is None or anchored in heads
    if not remembered and (fault := disagreement(anchored, [place.hash for place in heads])) is not None:
        findings.append(Finding(seq=heads[-1].seq, fault=Fault.ANCHOR, detail=fault))
    return Examination(lines=len(lines), head=heads[-1].hash, findings=tuple(findings))


def _reply_findings(lines: Sequence[Line], stored: Mapping[int, str], *, faulty: set[int]) -> Iterator[Finding]:
    """Replies that are not what their lines say; what a faulty line says does not matter."""
    named = {}
    for line in lines:
        if line.seq not in faulty and (fields := line.fields)["kind"] == "reply":
            spend = named[line.seq] = int(fields["spend"])
            if stored.get(spend) != fields["sha256"]:
                what = "changed" if spend in stored else "missing"
                yield Finding(seq=line.seq, fault=Fault.REPLY, detail=f"the reply to line {spend} is {what}")
    for spend in sorted(set(stored) - set(named.values())) if not faulty else ():
        yield Finding(seq=spend, fault=Fault.REPLY, detail="a reply is stored that no line names")
