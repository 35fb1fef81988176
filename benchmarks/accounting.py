# SPDX-License-Identifier: Apache-2.0
"""Every accountant beside every other, over the range where a site could be; writes ACCOUNTING.md.

Promises that each figure in the table was computed in the run that wrote it: Veil's ε, the privacy-loss distribution
and the Rényi bound beneath it, Opacus' PRV and GDP accountants, and the exact Gaussian in sixty digits.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import mpmath
from opacus.accountants import GaussianAccountant, PRVAccountant

from veil.common.privacy import Mechanism, spent, spent_over_runs
from veil.common.privacy.accounting import GUARD, PLD_LIMIT
from veil.common.privacy.floor import least_epsilon

HERE = Path(__file__).parent
DELTA = 1e-5
SIGMAS = (0.3, 0.5, 1.0, 2.0, 5.0, 20.0, 50.0)
RATES = (1e-5, 1e-4, 1e-3, 1e-2, 0.1, 0.5, 0.9, 1.0)
STEPS = (1, 10, 100, 1_000, 10_000, 100_000)
PRV_LIMIT = 30.0
PRV_ERROR = 0.01
BANDS = ((0.05, 0.3), (0.3, 1.0), (1.0, 3.0), (3.0, 10.0), (10.0, PLD_LIMIT))


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """One mechanism's figures; None where an accountant was not asked, or failed."""

    mechanism: Mechanism
    reported: float
    adaptive: float
    rdp: float
    pld: float | None
    rejected: bool
    prv: tuple[float, float] | None
    gdp: float | None
    floor: float
    exact_error: float | None

    @property
    def place(self) -> str:
        """σ, q and steps, as the tables name them."""
        one = self.mechanism
        return f"σ {one.noise_multiplier:g}, q {one.sample_rate:g}, {one.steps} steps"


def main() -> None:
    began = time.process_time()
    points = []
    for sigma, q, steps in itertools.product(SIGMAS, RATES, STEPS):
        points.append(measure(sigma, q, steps))
        print(f"{len(points)}  {points[-1].place}  {points[-1].reported:.6g}", flush=True)
    text = "\n".join(report(points, time.process_time() - began))
    (HERE / "ACCOUNTING.md").write_text(text + "\n", encoding="utf-8")
    print(text)


def measure(sigma: float, q: float, steps: int) -> Point:
    one = Mechanism(noise_multiplier=sigma, max_grad_norm=1.0, sample_rate=q, steps=steps)
    found = spent([one], DELTA)
    figures = found.by_accountant
    beside = Mechanism(noise_multiplier=1e6, max_grad_norm=1.0)
    return Point(
        mechanism=one,
        reported=found.epsilon,
        adaptive=spent_over_runs([[one], [beside]], DELTA).epsilon,
        rdp=figures["rdp"],
        pld=figures.get("pld"),
        rejected="pld_rejected" in figures,
        prv=prv(sigma, q, steps) if figures["rdp"] <= PRV_LIMIT else None,
        gdp=gdp(sigma, q, steps) if q < 1 else None,
        floor=least_epsilon(sigma, q, steps, DELTA),
        exact_error=exact_error(math.sqrt(steps) / sigma, figures["gaussian"]) if q == 1 else None,
    )


def prv(sigma: float, q: float, steps: int) -> tuple[float, float] | None:
    """Opacus' PRV: what ε is at least and at most."""
    accountant = PRVAccountant()
    accountant.history = [(sigma, q, steps)]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = accountant._get_dprv(eps_error=PRV_ERROR, delta_error=DELTA / 1000)
            low, _, high = found.compute_epsilon(DELTA, DELTA / 1000, PRV_ERROR)
    except (ArithmeticError, LookupError, MemoryError, RuntimeError, ValueError):
        return None
    return (float(low), float(high)) if math.isfinite(high) else None


def gdp(sigma: float, q: float, steps: int) -> float | None:
    """Opacus' central-limit figure."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        accountant = GaussianAccountant()
        accountant.history = [(sigma, q, steps)]
        try:
            return float(accountant.get_epsilon(DELTA))
        except (ArithmeticError, ValueError):
            return None


def exact_error(mu: float, figure: float) -> float:
    """How far a figure is from the root of Balle & Wang's equation in sixty digits, relative."""
    with mpmath.workdps(60):
        at = mpmath.mpf(mu)

        def excess(epsilon: mpmath.mpf) -> mpmath.mpf:
            with_unit = mpmath.ncdf(at / 2 - epsilon / at)
            return mpmath.log(with_unit - mpmath.exp(epsilon) * mpmath.ncdf(-at / 2 - epsilon / at)) - mpmath.log(DELTA)

        near = (mpmath.mpf(figure) * (1 - mpmath.mpf("1e-7")), mpmath.mpf(figure) * (1 + mpmath.mpf("1e-7")))
        root = mpmath.findroot(excess, near, tol=1e-20, verify=False)
        return abs(float((figure - root) / root))


def report(points: Sequence[Point], seconds: float) -> Iterator[str]:
    yield from (
        "# Accountants compared",
        "",
        f"{len(points)} mechanisms at δ = {DELTA:g}: σ of {listed(SIGMAS)}; sample rate of {listed(RATES)};"
        f" {listed(STEPS)} steps. Written in {seconds:.0f} s of processor time by",
        "",
        "    python benchmarks/accounting.py",
        "",
        "The largest value of each comparison. A lower bound less what it bounds must not be above 0; PRV has an error"
        f" of {PRV_ERROR:g} of its own on top. Where the PLD is above the Rényi bound, its grid's rounding is more than"
        " the cost, and the Rényi bound is what is reported.",
        "",
        "| comparison | mechanisms | largest | at |",
        "|---|---|---|---|",
    )
    yield from comparisons(points)
    without = Counter(
        "the PLD was rejected" if one.rejected else f"a bound above {PLD_LIMIT:g}" for one in points if one.pld is None
    )
    reasons = "; ".join(f"{count} for {reason}" for reason, count in without.items())
    yield from (
        "",
        f"No PLD stands behind {sum(without.values())} of the {len(points)} figures: {reasons}. Opacus' PRV was asked"
        f" where the Rényi bound is at most {PRV_LIMIT:g} (it takes gigabytes for larger costs), and failed at"
        f" {sum(one.prv is None and one.rdp <= PRV_LIMIT for one in points)} of these.",
        "",
        "## What adaptivity costs",
        "",
        "ε of several runs with sampled steps (a Rényi filter, valid whatever later plans followed from) over ε of the"
        " same steps in one plan fixed beforehand. Full batches cost the same either way. The largest ratios are those"
        " of rare samples with little noise, where the Rényi bound is that loose for a fixed plan, too.",
        "",
        "| ε of the fixed plan | mechanisms | median ratio | largest | median over the Rényi bound of the fixed plan |",
        "|---|---|---|---|---|",
    )
    for low, high in BANDS:
        band = [one for one in sampled(points) if low <= one.reported < high]
        ratios = [one.adaptive / one.reported for one in band]
        beyond = statistics.median(one.adaptive / one.rdp for one in band)
        typical, worst = statistics.median(ratios), max(ratios)
        yield f"| {low:g} to {high:g} | {len(band)} | {typical:.2f} | {worst:.2f} | {beyond:.2f} |"


def comparisons(points: Sequence[Point]) -> Iterator[str]:
    few = [one for one in points if one.mechanism.steps <= 10_000]
    many = [one for one in points if one.mechanism.steps > 10_000]
    worth = [one for one in points if one.reported >= 0.1]
    yield row("exact figure of full batches: relative error", points, lambda one: one.exact_error, "{:.1e}")
    yield row("closed lower bound less reported ε", points, lambda one: one.floor - one.reported, "{:+.1e}")
    yield row("PRV's lower bound less reported ε", points, lambda one: one.prv and one.prv[0] - one.reported)
    yield row("PRV and PLD, distance, up to 10⁴ steps", few, apart)
    yield row("PRV and PLD, distance, 10⁵ steps", many, apart)
    yield row("PLD less RDP, ε of at least 0.1", worth, over_renyi)
    yield row("PLD less RDP, up to 10⁴ steps", few, over_renyi)
    yield row("PLD less RDP, 10⁵ steps", many, over_renyi)
    yield row("PRV's lower bound less RDP", points, lambda one: one.prv and one.prv[0] - one.rdp)
    yield row("reported ε less RDP, beyond the guard", points, lambda one: one.reported / GUARD - one.rdp, "{:+.1e}")
    below = [one for one in points if one.prv and one.gdp is not None and one.gdp < one.prv[0]]
    worst = max(below, key=lambda one: one.prv[0] / max(one.gdp or 0.0, 1e-3) if one.prv else 0.0)
    asked = sum(one.prv is not None and one.gdp is not None for one in points)
    yield (
        f"| Opacus' GDP accountant below the truth | {asked} | {len(below)} times | {worst.place}: {worst.gdp:.3g}"
        f" said, {worst.prv[0] if worst.prv else 0:.3g} at least |"
    )


def row(name: str, points: Sequence[Point], value: Callable[[Point], float | None], form: str = "{:+.4f}") -> str:
    """The largest value over the points that have one."""
    known = [(found, one) for one in points if (found := value(one)) is not None]
    worst, where = max(known, key=lambda pair: pair[0])
    return f"| {name} | {len(known)} | {form.format(worst)} | {where.place} |"


def over_renyi(one: Point) -> float | None:
    """By how much the loss distribution's rounding makes it the larger of two upper bounds."""
    return None if one.pld is None else one.pld - one.rdp


def apart(one: Point) -> float | None:
    """Distance of PRV's reported figure, which has its error of 0.01 on top, from the PLD's."""
    return abs(one.prv[1] - one.pld) if one.prv and one.pld is not None else None


def sampled(points: Sequence[Point]) -> list[Point]:
    return [one for one in points if one.mechanism.sample_rate < 1]


def listed(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)


if __name__ == "__main__":
    main()
