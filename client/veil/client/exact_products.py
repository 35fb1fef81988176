# SPDX-License-Identifier: Apache-2.0
"""Matrix products in float32 that round nothing: operands on grids so coarse that 24 bits hold every partial sum.

Promises that a product's bits follow from the numbers that are multiplied and from nothing else: not from the order in
which a library adds them up, nor from its threads, nor from the rows that stand beside a row. It is the first slice of
the error-free transformation of matrix products (Ozaki, Ogita, Oishi & Rump 2012); what the rounding onto a grid leaves
out is not computed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

_FINENESS, _FINEST = 6, 10
"""Bits of a typical number of a row of length 1, whose rounding moves the row by half a hundredth of its length, and
bits of the longest there can be, at the least."""

_CLOSENESS = 8
"""Bits of a clipped error below its bound, were it spread evenly over its numbers: rounding lengthens a gradient by
half a hundredth of the bound at most."""

_SPARE = 1.5
"""Pieces that a sum is divided in, above what would do if all were alike."""

_ROUNDED_UP = 1.001
"""No length in float32 is further off."""

_WHOLE = 2.0**24
"""Float32 holds every whole number up to here."""


def on_grid(numbers: NDArray[np.floating], step: float) -> NDArray[np.float32]:
    """Numbers rounded to multiples of `step`, a power of two."""
    found: NDArray[np.float32] = np.multiply(numbers, 1.0 / step, dtype=np.float32, casting="same_kind")
    np.rint(found, out=found)
    found *= np.float32(step)
    return found


def input_step(width: int) -> float:
    """The grid of head inputs of so many numbers, whose rows have length 1 at most."""
    return math.ldexp(1.0, -max(_FINENESS + _root_bits(width), _FINEST))


def error_steps(bound: float, classes: int, share: NDArray[np.float64]) -> NDArray[np.float64]:
    """The grids of records' errors that are clipped to a bound, powers of two, [n].

    No coarser for bounds above 1, as no error is longer than a few; and finer by 1 / share for the records of a unit of
    several, so that rounding lengthens its gradient no more than that of a unit of one.

    Args:
        bound: of one unit's gradient, > 0.
        classes: numbers of an error.
        share: of a record in its unit, [n].
    """
    step = math.ldexp(1.0, math.ceil(math.log2(min(bound, 1.0))) - _CLOSENESS - _root_bits(classes))
    return np.asarray(np.ldexp(step, np.frexp(share)[1] - 1), dtype=np.float64)


def _root_bits(numbers: int) -> int:
    """The logarithm of √numbers to the base of 2, rounded."""
    return math.floor(math.log2(numbers) / 2 + 0.5)


def exact_scores(weight: NDArray[np.floating], inputs: NDArray[np.float32]) -> NDArray[np.float32]:
    """Logits [n, c] of inputs [n, d], rows of length 1 at most on the grid of `input_step`, under a weight [c, d].

    The weight is public, and so is the grid that it is rounded to: fine enough that a logit is off by 10⁻⁴ of the
    longest row of the weight, coarse enough that |x|·|w| stays below 2²⁴ steps whatever x is (Cauchy & Schwarz).
    """
    by_class: NDArray[np.float32] = _weight_on_grid(weight) @ inputs.T
    return by_class.T


def _weight_on_grid(weight: NDArray[np.floating]) -> NDArray[np.float32]:
    width = weight.shape[1]
    with np.errstate(over="ignore"):
        single = weight.astype(np.float32)
    longest = math.sqrt(np.einsum("cd,cd->c", single, single).max(initial=0.0)) * _ROUNDED_UP
    if longest == 0.0:
        return np.zeros_like(single)
    if not math.isfinite(longest):
        return np.full_like(single, np.nan)  # the descent diverged: no record counts
    strayed = math.sqrt(width) / 2  # by which rounding may lengthen a row, in steps
    most = _WHOLE / (1.0 / input_step(width) + strayed) - strayed
    return on_grid(single, math.ldexp(1.0, math.ceil(math.log2(longest / most))))


def exact_products(
    errors: NDArray[np.float32], inputs: NDArray[np.float32], steps: NDArray[np.float64], largest: float
) -> Iterator[NDArray[np.floating]]:
    """Parts of Σ over rows of the outer products of errors and inputs, each [c, d] and exact.

    Rows are divided until every partial sum of a product fits; the sum of all parts is the same however they are.

    Args:
        errors: [n, c], each row on the grid of its step.
        inputs: [n, d], on the grid of `input_step`.
        steps: of the errors, [n].
        largest: no number of the inputs is larger.
    """
    needed = float(np.abs(errors).sum(axis=0).max(initial=0.0)) * largest
    room = _WHOLE * float(steps.min(initial=1.0)) * input_step(inputs.shape[1])
    if needed < room:
        yield errors.T @ inputs
    elif len(errors) == 1:
        yield errors.T.astype(np.float64) @ inputs
    else:
        pieces = min(len(errors), math.ceil(_SPARE * needed / room))
        for rows in np.array_split(np.arange(len(errors)), pieces):
            piece = slice(rows[0], rows[-1] + 1)
            yield from exact_products(errors[piece], inputs[piece], steps[piece], largest)


def total_of(products: Iterable[NDArray[np.floating]], shape: tuple[int, ...]) -> NDArray[np.float64]:
    """The sum of arrays of a shape, in float64, which holds it whole; zero of none."""
    total: NDArray[np.float64] | None = None
    for product in products:
        if total is None:
            total = product.astype(np.float64)
        else:
            total += product
    return np.zeros(shape) if total is None else total
