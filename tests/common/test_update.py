# SPDX-License-Identifier: Apache-2.0
"""Tests of `veil.common.update`: one exact byte form, and sums that do not depend on who came first."""

from __future__ import annotations

import json
import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from veil.common import update as update_module
from veil.common.update import Adapter, Update, doublings, sum_points

names = st.text("abcdefgh.", min_size=1, max_size=8)
shapes = hnp.array_shapes(min_dims=1, max_dims=3, min_side=0, max_side=4)
points = st.dictionaries(names, hnp.arrays(np.int64, shapes), min_size=1, max_size=3)
tensors = st.dictionaries(names, hnp.arrays(np.float32, shapes, elements=st.floats(width=32)), min_size=1, max_size=3)


def same(first: dict[str, NDArray[Any]], second: dict[str, NDArray[Any]]) -> bool:
    """Equal to the last bit, NaN included."""
    return first.keys() == second.keys() and all(
        a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
        for a, b in ((first[name], second[name]) for name in first)
    )


@given(points=points, spacing=st.floats(min_value=5e-324, allow_infinity=False))
def test_an_update_survives_its_bytes(points: dict[str, NDArray[np.int64]], spacing: float) -> None:
    data = Update(points=points, spacing=spacing).to_bytes()
    back = Update.from_bytes(data)
    assert back.spacing == spacing
    assert same(dict(back.points), points)
    assert back.to_bytes() == data


@given(tensors=tensors)
def test_an_adapter_survives_its_bytes(tensors: dict[str, NDArray[np.float32]]) -> None:
    data = Adapter(tensors=tensors).to_bytes()
    back = Adapter.from_bytes(data)
    assert same(dict(back.tensors), tensors)
    assert back.to_bytes() == data


def test_the_bytes_do_not_depend_on_the_order_or_layout_of_tensors() -> None:
    grid = np.arange(6, dtype=np.int64).reshape(2, 3)
    one = Update(points={"b": grid, "a": grid.T.copy()}, spacing=0.5)
    other = Update(points={"a": np.asfortranarray(grid.T), "b": np.asfortranarray(grid)}, spacing=0.5)
    assert one.to_bytes() == other.to_bytes()
    assert np.array_equal(Update.from_bytes(other.to_bytes()).points["b"], grid)


def test_the_size_of_an_update_is_that_of_its_points() -> None:
    assert Update(points={"a": np.zeros((2, 3), np.int64), "b": np.zeros(4, np.int64)}, spacing=1.0).nbytes == 80


@given(
    numbers=hnp.arrays(np.int64, st.integers(1, 5), elements=st.integers(-(2**63), 2**63 - 1)),
    smaller=st.integers(0, 62),
    bits=st.sampled_from([8, 16, 32]),
)
def test_narrowing_rounds_to_the_nearest_on_the_finest_lattice_that_fits(
    numbers: NDArray[np.int64], smaller: int, bits: int
) -> None:
    """Against exact fractions, whose `round` takes halves to the even; and once is enough."""
    update = Update(points={"a": numbers >> smaller, "b": np.zeros(0, np.int64)}, spacing=0.75)
    sent = update.narrowed(bits)
    k = doublings(sent.spacing, update.spacing)

    def rounded(times: int) -> list[int]:
        return [round(Fraction(int(number), 2**times)) for number in update.points["a"]]

    def fits(times: int) -> bool:
        return all(abs(number) < 2 ** (bits - 1) for number in rounded(times))

    assert sent.points["a"].dtype == f"int{bits}"
    assert sent.points["a"].tolist() == rounded(k)
    assert fits(k) and not (k and fits(k - 1))
    assert Update.from_bytes(sent.to_bytes()).narrowed(bits).to_bytes() == sent.to_bytes()


@pytest.mark.parametrize("spacing", [0.0, -1.0, 0.5, 3.0, 2.0**63, math.inf, math.nan])
def test_a_spacing_that_is_no_doubling_is_named(spacing: float) -> None:
    with pytest.raises(ValueError, match="expected 1, doubled 0 to 62 times"):
        doublings(spacing, 1.0)
    assert [doublings(2.0**k, 1.0) for k in (0, 1, 62)] == [0, 1, 62]


GOOD = Update(points={"a": np.arange(4, dtype=np.int64)}, spacing=0.25).to_bytes()


def framed(header: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header


def with_metadata(value: Any) -> bytes:
    return framed(json.dumps({"__metadata__": value}).encode())


MALFORMED = {
    "nothing": b"",
    "short": b"abc",
    "no header": bytes(8),
    "not JSON": framed(b"hello"),
    "not UTF-8": framed(b'{"a": "\xff"}'),
    "a list": framed(b"[]"),
    "no metadata": framed(b"{}"),
    "metadata that is a list": with_metadata([]),
    "metadata of another program": with_metadata({"format": "pt"}),
    "no spacing": with_metadata({"veil": "{}"}),
    "spacing that is a number": with_metadata({"veil": '{"spacing": 1.0}'}),
    "spacing that is no number": with_metadata({"veil": '{"spacing": "wide"}'}),
    "a length beyond the end": (2**40).to_bytes(8, "little") + GOOD[8:],
    "one byte less": GOOD[:-1],
    "one byte more": GOOD + b"\0",
}


@pytest.mark.parametrize("name", MALFORMED)
def test_bytes_that_are_no_update_are_refused(name: str) -> None:
    with pytest.raises(ValueError):
        Update.from_bytes(MALFORMED[name])


@pytest.mark.parametrize(
    "data",
    [
        framed(b"[" * 100_000),
        with_metadata({"veil": '{"spacing": "0x1p99999"}'}),
        with_metadata({"veil": '{"spacing": "nan"}'}),
        with_metadata({"veil": '{"spacing": "-0x1p-20"}'}),
        GOOD.replace(b"I64", b"F64"),
    ],
    ids=[
        "deep JSON (RecursionError)",
        "huge spacing (OverflowError)",
        "spacing nan",
        "spacing below 0",
        "float points",
    ],
)
def test_odd_bytes_that_are_no_update_are_refused(data: bytes) -> None:
    with pytest.raises(ValueError):
        Update.from_bytes(data)


@pytest.mark.parametrize("name", ["nothing", "short", "not JSON", "one byte less"])
def test_bytes_that_are_no_adapter_are_refused(name: str) -> None:
    with pytest.raises(ValueError):
        Adapter.from_bytes(MALFORMED[name])


@given(data=st.binary(max_size=64))
def test_random_bytes_are_no_update(data: bytes) -> None:
    with pytest.raises(ValueError):
        Update.from_bytes(data)


@given(cut=st.integers(0, len(GOOD) - 1))
def test_a_truncated_update_is_refused(cut: int) -> None:
    with pytest.raises(ValueError):
        Update.from_bytes(GOOD[:cut])


@given(
    stack=hnp.arrays(np.int64, st.tuples(st.integers(1, 6), st.integers(1, 5)), elements=st.integers(-(2**58), 2**58)),
    random=st.randoms(use_true_random=False),
)
def test_sums_do_not_depend_on_the_order(stack: NDArray[np.int64], random: Any) -> None:
    """Equal to the last bit, and to the exact integer sum; float sums of such numbers would differ."""
    updates = [Update(points={"w": row}, spacing=2.0**-20) for row in stack]
    shuffled = list(updates)
    random.shuffle(shuffled)
    total = sum_points(updates)["w"]
    assert total.tobytes() == sum_points(shuffled)["w"].tobytes()
    exact = [math.ldexp(float(sum(int(value) for value in column)), -20) for column in stack.T]
    assert total.tolist() == exact


@given(
    parts=st.lists(
        st.tuples(st.sampled_from([8, 16, 32]), st.integers(0, 45), st.integers(-127, 127)), min_size=1, max_size=6
    ),
    random=st.randoms(use_true_random=False),
)
def test_sums_over_lattices_of_different_width_are_exact(parts: list[tuple[int, int, int]], random: Any) -> None:
    updates = [
        Update(points={"w": np.array([number], f"int{bits}")}, spacing=math.ldexp(0.7, k)) for bits, k, number in parts
    ]
    total = sum_points(updates)["w"]
    random.shuffle(updates)
    assert total.tobytes() == sum_points(updates)["w"].tobytes()
    finest = min(k for _, k, _ in parts)
    assert total.tolist() == [
        float(sum(number * 2 ** (k - finest) for _, k, number in parts)) * math.ldexp(0.7, finest)
    ]


def test_every_tensor_is_summed() -> None:
    one = Update(points={"a": np.array([1, 2], np.int64), "b": np.array([[3]], np.int64)}, spacing=0.5)
    total = sum_points([one, one, one])
    assert {name: value.tolist() for name, value in total.items()} == {"a": [1.5, 3.0], "b": [[4.5]]}


def test_blocks_change_no_narrowed_number(monkeypatch: pytest.MonkeyPatch) -> None:
    points = np.random.default_rng(0).integers(-(2**40), 2**40, size=(5, 7))
    update = Update(points={"w": points}, spacing=0.5)
    whole = update.narrowed(16)
    monkeypatch.setattr(update_module, "_BLOCK", 4)
    assert update.narrowed(16).to_bytes() == whole.to_bytes()
    assert whole.points["w"].dtype == np.int16
