# SPDX-License-Identifier: Apache-2.0
"""Every published mistake that Veil is held against: a guard that fails when it is made, and a variant that makes it.

The table of PRIVACY.md is made of these; `python -m tests.privacy.mistakes` writes it anew.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from tests.privacy import accounting, clipping, frozen, ledger, randomness, sampling, wire

DOCUMENT = Path(__file__).parents[2] / "PRIVACY.md"
COLUMNS = ("severity", "mistake", "here", "test", "broken variant")


@dataclass(frozen=True, kw_only=True, slots=True)
class Mistake:
    """One mistake.

    Attributes:
        name: id of its test.
        what: the mistake.
        here: what Veil does instead.
        guard: exercises the product; raises AssertionError when the mistake is made.
        broken: the product with the mistake, until the block ends.
        seen: pattern of what the guard says of the broken variant.
    """

    name: str
    what: str
    here: str
    guard: Callable[[], None]
    broken: Callable[[], AbstractContextManager[None]]
    seen: str

    @property
    def variant(self) -> str:
        """The broken variant's name."""
        module = self.broken.__module__.rpartition(".")[2]
        return f"{module}.{self.broken.__name__}"


CRITICAL = (
    Mistake(
        name="noise-missing",
        what="noise missing",
        here="added to the sum in the optimizer that counts the step",
        guard=randomness.guard_scale,
        broken=randomness.without_noise,
        seen=r"noise of 0\.000 times",
    ),
    Mistake(
        name="batch-clipped",
        what="clipping the batch's gradient instead of each unit's",
        here="each unit is clipped in `gradient.py`, equal to Opacus' hooks",
        guard=clipping.guard_unit_bound,
        broken=clipping.batch_clipped,
        seen="one unit moves the sum",
    ),
    Mistake(
        name="not-clipped",
        what="sending a gradient that nothing clipped",
        here="what is sent is made of clipped sums only",
        guard=clipping.guard_unit_bound,
        broken=clipping.unclipped,
        seen="one unit moves the sum",
    ),
    Mistake(
        name="records-of-a-patient",
        what="record-level clipping and accounting where patients have many records (3 becomes 56)",
        here='`unit = "patient"` averages and clips per patient; the default where a patient column is named',
        guard=clipping.guard_patients,
        broken=clipping.records_clipped,
        seen="a patient of five counts",
    ),
    Mistake(
        name="not-finite",
        what="one NaN or infinite record makes the model NaN, which gives the record away",
        here="zeroed before clipping",
        guard=clipping.guard_not_finite,
        broken=clipping.not_finite_kept,
        seen="a record of nan",
    ),
    Mistake(
        name="float32-noise",
        what="float32 noise of torch's CPU generator (membership in 40 of 40 trials)",
        here="float64, operating system, integer lattice; the attack is played against both",
        guard=randomness.guard_attack,
        broken=randomness.torch_float32,
        seen=r"(19\d|200) of 200",
    ),
    Mistake(
        name="seeded-noise",
        what="noise from a generator that has a seed",
        here="no seed, no state; a simulation's fixed noise is called not private",
        guard=randomness.guard_seedless,
        broken=randomness.global_generator,
        seen=r"correlated by 1\.0",
    ),
    Mistake(
        name="noise-of-other-sites",
        what="the same noise at every site: each fresh `torch.Generator()` starts alike",
        here="the operating system's generator at each site",
        guard=randomness.guard_sites,
        broken=randomness.fresh_generators,
        seen=r"correlated by 1\.0",
    ),
    Mistake(
        name="noise-of-other-rounds",
        what="the same noise in every round, run or after a restart; an audit of ε does not see it",
        here="no generator that could be rebuilt",
        guard=randomness.guard_rounds,
        broken=randomness.generator_rebuilt,
        seen=r"correlated by 1\.0",
    ),
    Mistake(
        name="noise-after-fork",
        what="the same noise in processes that were forked from one",
        here="no state that a fork could copy",
        guard=randomness.guard_processes,
        broken=randomness.one_state,
        seen=r"correlated by 1\.0",
    ),
    Mistake(
        name="drawn-again",
        what="a result computed again after a crash or a re-delivery, with fresh noise and no charge",
        here="spend first, recorded bytes on repetition, a new charge per attempt",
        guard=ledger.guard_crash_is_charged,
        broken=ledger.drawn_again,
        seen="two draws on the records, 1 charged",
    ),
    Mistake(
        name="noise-reused",
        what="the same noise on other records after a crash: the difference has none",
        here="an attempt that was not recorded is drawn anew",
        guard=ledger.guard_crash_draws_anew,
        broken=ledger.noise_by_round,
        seen=r"correlated by 1\.0",
    ),
    Mistake(
        name="exact-metrics",
        what="exact accuracies and losses sent beside a noised update",
        here="an evaluation is a release of the schedule, with its own noise and charge",
        guard=wire.guard_evaluation,
        broken=wire.exact_metrics,
        seen=r"noise of 0\.000 times",
    ),
)

HIGH = (
    Mistake(
        name="class-weighted",
        what="a class-weighted mean loss, in which one record's share depends on the others",
        here="a sum in which each unit adds what it would add alone",
        guard=clipping.guard_alone,
        broken=clipping.class_weighted,
        seen="other than alone",
    ),
    Mistake(
        name="mean-of-own",
        what="a mean over the private number of records",
        here="sums leave; the divisor is public",
        guard=clipping.guard_alone,
        broken=clipping.divided_by_count,
        seen="other than alone",
    ),
    Mistake(
        name="noise-from-count",
        what="noise or divisor from the private number of records (Opacus issue 571; extra ε of 4 to 12)",
        here="σ·C from the plan, divisor declared or released",
        guard=randomness.guard_public_scale,
        broken=randomness.divided_by_own_size,
        seen="times what was charged",
    ),
    Mistake(
        name="noise-from-batch",
        what="noise scaled by the realised batch",
        here="noise of the step's σ·C whatever the sample holds",
        guard=randomness.guard_public_scale,
        broken=randomness.scaled_by_batch,
        seen="times what was charged",
    ),
    Mistake(
        name="bound-left-out",
        what="noise of σ where σ·C is due",
        here="`privatize` takes both and draws on C's own lattice",
        guard=randomness.guard_scale,
        broken=randomness.bound_left_out,
        seen=r"noise of (1\.9|2\.0)\d+ times",
    ),
    Mistake(
        name="wrong-rate",
        what="a sample rate taken from the loader, other than the one that is charged",
        here="each unit is drawn at the ledger's own rate",
        guard=sampling.guard_rate,
        broken=sampling.rate_of_a_loader,
        seen="of 160000; expected 16000",
    ),
    Mistake(
        name="shuffled",
        what="Poisson accounting over shuffled or sequential batches",
        here="independent draw of each unit, or full batch",
        guard=sampling.guard_independence,
        broken=sampling.shuffled,
        seen=r"dispersion 0\.00",
    ),
    Mistake(
        name="records-sampled",
        what="sampling records where patients have many",
        here="patients are drawn, whole",
        guard=sampling.guard_patients,
        broken=sampling.records_sampled,
        seen="of 10000; expected 1000",
    ),
    Mistake(
        name="empty-skipped",
        what="skipping an empty sample",
        here="an empty step adds its noise and counts",
        guard=sampling.guard_empty_counts,
        broken=sampling.empty_skipped,
        seen=r"noise of 0\.000 times",
    ),
    Mistake(
        name="empty-filled",
        what="filling an empty sample with an invented record",
        here="an empty sample's sum is zero",
        guard=sampling.guard_empty_is_empty,
        broken=sampling.empty_filled,
        seen="an empty sample moved the head",
    ),
    Mistake(
        name="steps-not-counted",
        what="steps taken but not counted",
        here="each step of the one optimizer is counted, and compared with the charge",
        guard=sampling.guard_steps,
        broken=sampling.step_twice,
        seen="10 steps taken, 5 charged",
    ),
    Mistake(
        name="steps-not-compared",
        what="counted steps that nobody compares with those that were paid for",
        here="they must agree, or nothing leaves",
        guard=sampling.guard_overrun,
        broken=sampling.steps_unchecked,
        seen="left the site",
    ),
    Mistake(
        name="round-for-run",
        what="an accountant rebuilt each round: ε of one round shown as the run's (1.55, spent 3.72 in 10 rounds)",
        here="ε only from the whole ledger",
        guard=accounting.guard_rounds_add_up,
        broken=accounting.engine_rebuilt,
        seen="shown after",
    ),
    Mistake(
        name="runs-forgotten",
        what="no composition over runs",
        here="limits per run and lifetime, projected over the rest of the plan",
        guard=accounting.guard_runs_add_up,
        broken=accounting.runs_forgotten,
        seen="shown for two runs",
    ),
    Mistake(
        name="central-limit",
        what="the central-limit accountant, which under-reports up to 7 times with few steps",
        here="exact Gaussian, privacy-loss distribution and Rényi bounds, never below an optimistic figure",
        guard=accounting.guard_few_steps,
        broken=accounting.central_limit,
        seen="shown, at least",
    ),
    Mistake(
        name="calibrated-too-low",
        what="noise found for an accountant that under-reports (asked 8, spent 9.7)",
        here="calibrated against the reported ε, checked with `<=`",
        guard=accounting.guard_calibration,
        broken=accounting.calibrated_by_limit,
        seen=r"asked .*, spent",
    ),
    Mistake(
        name="coordinator-decides",
        what="noise or sampling chosen by the coordinator",
        here="the site recomputes its mechanism from the plan; noise comes from the site",
        guard=ledger.guard_own_mechanism,
        broken=ledger.coordinator_decides,
        seen=r"σ = 0\.3 was charged",
    ),
)

MEDIUM = (
    Mistake(
        name="weighted-by-count",
        what="exact counts as averaging weights",
        here="constant 1",
        guard=wire.guard_weight_is_constant,
        broken=wire.weighted_by_count,
        seen="sites of 3 and 300 units differ",
    ),
    Mistake(
        name="error-sent",
        what="exception text sent to the coordinator, which may quote a record",
        here="one word of `RefusalCode`",
        guard=wire.guard_error_is_a_code,
        broken=wire.error_sent,
        seen="left the site",
    ),
    Mistake(
        name="refusal-tells",
        what="a refusal that depends on records",
        here="review sees plan, policy and ledger only; for failures after review see the gaps below",
        guard=ledger.guard_refusal_is_blind,
        broken=ledger.too_few_refused,
        seen="units → answers",
    ),
    Mistake(
        name="hostile-plan",
        what="a hostile plan exhausts memory in an accountant",
        here="a cheap bound first, the privacy-loss distribution only where that is small",
        guard=accounting.guard_hostile_plan,
        broken=accounting.no_limit,
        seen="was begun",
    ),
    Mistake(
        name="chosen-by-row",
        what="a choice of a patient's records that other patients can change",
        here="a keyed hash of a record's place among the patient's own",
        guard=clipping.guard_choice,
        broken=clipping.chosen_by_row,
        seen="one patient more changes",
    ),
    Mistake(
        name="quantised",
        what="quantisation left out of the sensitivity",
        here="`clip_bound`",
        guard=clipping.guard_quantised,
        broken=clipping.clipped_to_c,
        seen=r"lie 1\.0\d+ C apart",
    ),
    Mistake(
        name="statistics-move",
        what="a frozen BatchNorm in train mode (gradients 71 % wrong, statistics leak)",
        here="features once, in eval mode, buffers checked",
        guard=frozen.guard_statistics,
        broken=frozen.train_mode,
        seen="of the frozen model moved",
    ),
    Mistake(
        name="padded-together",
        what="features that depend on the records in the same padded batch",
        here="each record is encoded by itself",
        guard=frozen.guard_alone,
        broken=frozen.padded_batches,
        seen="with the texts beside them",
    ),
    Mistake(
        name="tensor-left-out",
        what="adapter parameters that silently do not train",
        here="every number of every trainable tensor moves on clean records, and there is no other tensor",
        guard=clipping.guard_trains,
        broken=clipping.tensor_left_out,
        seen="never moved",
    ),
    Mistake(
        name="trials-free",
        what="hyper-parameters tuned on private records without a charge",
        here="a fixed recipe; trying several plans is several runs in the ledger",
        guard=accounting.guard_trials_count,
        broken=accounting.trials_free,
        seen="shown for three trials",
    ),
)

LOW = (
    Mistake(
        name="relation",
        what="replace-one and add-or-remove figures compared with each other",
        here="the relation stands in every mechanism and report",
        guard=accounting.guard_relation,
        broken=accounting.replacement_claimed,
        seen="replace-one neighbours",
    ),
    Mistake(
        name="weights-run",
        what="pickled weights run code",
        here="safetensors, or a weights-only load of one known file",
        guard=wire.guard_weights_do_not_run,
        broken=wire.full_load,
        seen="code in a weights file ran",
    ),
    Mistake(
        name="arrays-run",
        what="pickled arrays in a message run code",
        here="numpy's own format, without pickles",
        guard=wire.guard_arrays_do_not_run,
        broken=wire.pickled_arrays,
        seen="code in a message ran",
    ),
)

_SEVERITIES = {"critical": CRITICAL, "high": HIGH, "medium": MEDIUM, "low": LOW}
MISTAKES: tuple[Mistake, ...] = tuple(mistake for group in _SEVERITIES.values() for mistake in group)


_HEADER = f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|\n"


def table() -> str:
    """The rows of PRIVACY.md, worst first."""
    rows = (
        f"| {severity} | {one.what} | {one.here} | `{one.name}` | `{one.variant}` |\n"
        for severity, group in _SEVERITIES.items()
        for one in group
    )
    return _HEADER + "".join(rows)


def found(document: str) -> str:
    """The table as it stands in a document, "" when there is none."""
    _, header, rest = document.partition(_HEADER)
    rows = takewhile(lambda line: line.startswith("|"), rest.splitlines(keepends=True))
    return header + "".join(rows)


if __name__ == "__main__":
    before = DOCUMENT.read_text(encoding="utf-8")
    DOCUMENT.write_text(before.replace(found(before) or _HEADER, table()), encoding="utf-8")
