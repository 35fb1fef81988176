# SPDX-License-Identifier: Apache-2.0
"""How often `veil audit` passes a correct product, and how often it rejects broken ones; writes AUDIT.md.

Promises that the variants are those of the tests, that each audit draws its own canaries and noise from the operating
system, and that every figure is counted over all repetitions. Run from the repository's root:

    PYTHONPATH=. python benchmarks/audit.py --correct 200 --broken 20
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

from tests.privacy.audit_variants import BROKEN, CORRECT, Variant, rejected_by

from veil.client.audit import CONFIDENCE, REPEATS, REPORT_CONFIDENCE, AuditResult
from veil.client.audit_power import SeenBy
from veil.client.canaries import CANARIES
from veil.simulations.audit_command import default_plan
from veil.simulations.membership import HEADS, RECORDS, attack_membership

HERE = Path(__file__).parent
ROUNDS = default_plan().training.rounds
ENOUGH = 4.8
FEWER = 20
"""One in so many repetitions for the other correct plans."""


TEMPLATE = """\
# What the empirical audit sees

Lower bounds of ε from attacks on Veil's own release code: {repeats} plays of {canaries} made-up canaries an audit,
{rounds} full-batch rounds after the centring one (dp-fedavg: 4 rounds of 4 local steps at a sample rate of 0.25).
Medians, with the smallest and the largest of all repetitions. A variant is rejected when the bound from the canaries
passes the claimed ε, or when two releases share their noise. Written by

    {command}

on {machine}, in {seconds:.0f} s of CPU time.
There is no seed: another run gives other figures of the same kind.

## The product as it is

ε = 8, unit record: above {enough} in {above} of {times}, below the claim in {below} of {times}.

{correct}

## Broken on purpose

{broken}

Not seen by the audit, and held by a direct test of the code: {direct}.
A canary's trace drowns in the rest of the batch there; the self-check's bound without noise falls to 0, and the audit
says that it proves nothing. The same noise in every round hides the canaries, so that a bound near 0 is no praise; the
correlation of two rounds sees it.

## Membership of the tuned head

LiRA on {records} made-up records, half of them members of each head. A report: it bounds nothing.

| claimed ε | AUC | found at 1 % false alarms | AUC without noise | found at 1 % without noise |
|---|---|---|---|---|
{attack}
"""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One variant's audits."""

    variant: Variant
    results: list[AuditResult]
    seconds: float

    def cells(self) -> list[str]:
        results = self.results
        rejected = sum(rejected_by(one) is not None for one in results)
        return [
            self.variant.name,
            f"{results[0].claimed.epsilon:.2f}",
            f"{rejected} of {len(results)}",
            " or ".join(sorted({by.value for one in results if (by := rejected_by(one))})) or "-",
            spread([one.epsilon for one in results]),
            spread([one.one_run.epsilon for one in results]),
            f"{self.seconds / len(results):.2f}",
        ]


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def measure(variant: Variant, times: int) -> Row:
    """Full batches run as long as the demo does; sampled ones as in the tests, where accounting takes the time."""
    if "algorithm" not in variant.training:
        variant = replace(variant, training={**variant.training, "rounds": ROUNDS})
    began = time.process_time()
    results = [variant.audit() for _ in range(times)]
    row = Row(variant=variant, results=results, seconds=time.process_time() - began)
    print(*row.cells(), sep=" | ", file=sys.stderr, flush=True)
    return row


def membership(heads: int) -> list[str]:
    lines = []
    for epsilon in (1.0, 3.0, 8.0):
        plan = default_plan()
        private = plan.privacy.model_copy(update={"target_epsilon": epsilon})
        report = attack_membership(plan.model_copy(update={"privacy": private}), heads=heads)
        cells = [
            f"{one.auc:.3f} | {100 * one.found_at_one_percent:.1f} %" for one in (report.private, report.without_noise)
        ]
        lines.append(f"| {epsilon:g} | {' | '.join(cells)} |")
    return lines


def table(rows: list[Row]) -> list[str]:
    head = [
        "variant",
        "claimed ε",
        "rejected",
        "by",
        f"canaries, {100 * CONFIDENCE:g} %",
        f"no assumptions, {100 * REPORT_CONFIDENCE:g} %",
        "CPU s",
    ]
    body = [row.cells() for row in rows]
    return ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *body)]


def document(correct: list[Row], broken: list[Row], attack: list[str], command: str, seconds: float) -> str:
    as_it_is = correct[0].results
    enough = sum(one.epsilon > ENOUGH for one in as_it_is)
    below = sum(one.epsilon < one.claimed.epsilon for one in as_it_is)
    direct = [row.variant.name for row in broken if row.variant.seen_by is SeenBy.DIRECT_TEST]
    return TEMPLATE.format(
        repeats=REPEATS,
        canaries=CANARIES,
        rounds=ROUNDS,
        command=command,
        machine=f"{os.cpu_count()} CPU cores ({platform.machine()}), Python {platform.python_version()}",
        seconds=seconds,
        enough=ENOUGH,
        above=enough,
        below=below,
        times=len(as_it_is),
        correct="\n".join(table(correct)),
        broken="\n".join(table(broken)),
        direct=", ".join(direct),
        records=RECORDS,
        attack="\n".join(attack),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--correct", type=int, default=200)
    parser.add_argument("--broken", type=int, default=20)
    parser.add_argument("--heads", type=int, default=HEADS)
    parser.add_argument("--output", type=Path, default=HERE / "AUDIT.md")
    options = parser.parse_args()
    began = time.process_time()
    fewer = max(1, options.correct // FEWER)
    correct = [measure(one, options.correct if number == 0 else fewer) for number, one in enumerate(CORRECT)]
    broken = [measure(one, options.broken) for one in BROKEN]
    attack = membership(options.heads)
    words = f"--correct {options.correct} --broken {options.broken} --heads {options.heads}"
    command = f"PYTHONPATH=. python benchmarks/audit.py {words}"
    text = document(correct, broken, attack, command, time.process_time() - began)
    options.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
