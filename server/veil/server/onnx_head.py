# SPDX-License-Identifier: Apache-2.0
"""The tuned head as an ONNX graph: numbers or features in, answers out, in double precision from end to end.

Promises the numbers of `veil.common.head`, a row that is not finite and one without length included, in operators that
every runtime of opset 18 has.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from veil.common.errors import InputError
from veil.common.head import CENTRE, INTERCEPT, WEIGHT
from veil.common.plan_sections import Task
from veil.common.update import Adapter

INPUT: Final = "features"
OUTPUT: Final = "answers"
OPSET: Final = 18

Bounds = tuple[float, float] | None


@dataclass(slots=True)
class _Graph:
    """Nodes and constants, in the order they were added."""

    onnx: Any
    nodes: list[Any] = field(default_factory=list)
    constants: list[Any] = field(default_factory=list)

    def add(self, operator: str, *inputs: str, **attributes: Any) -> str:
        """One more node; gives its output's name."""
        name = f"{operator.lower()}_{len(self.nodes)}"
        self.nodes.append(self.onnx.helper.make_node(operator, list(inputs), [name], **attributes))
        return name

    def constant(self, value: Any, dtype: type = np.float64) -> str:
        """One more constant; gives its name."""
        name = f"constant_{len(self.constants)}"
        self.constants.append(self.onnx.numpy_helper.from_array(np.asarray(value, dtype), name))
        return name


def onnx_head(adapter: Adapter, task: Task, *, bounds: Sequence[Bounds] | None, metadata: Mapping[str, str]) -> bytes:
    """The graph, checked by onnx itself.

    Args:
        adapter: of a model whose head alone was tuned.
        task: the form of its answers; of a number, its public range.
        bounds: public [low, high] of each numeric column, None for one without; None altogether where the input is a
            backbone's features.
        metadata: carried along.

    Returns:
        the file. Its input `features` is float64 [n, columns], or float32 [n, width] for a backbone's features; its
        output `answers` is float64 [n, labels]: probabilities, or a number in its own range.

    Raises:
        InputError: onnx is not installed.
    """
    graph = _Graph(_library())
    weight, centre = adapter.tensors[WEIGHT].astype(np.float64), adapter.tensors[CENTRE].astype(np.float64)
    rows = _unit(graph, _read(graph, bounds))
    rows = _unit(graph, graph.add("Sub", rows, graph.constant(centre)))
    # The appended constant is the same in every row, and so is what it adds to the scores.
    weight /= np.sqrt(1 + INTERCEPT**2)
    scores = graph.add("MatMul", rows, graph.constant(weight[:, :-1].T))
    scores = graph.add("Add", scores, graph.constant(weight[:, -1] * INTERCEPT))
    graph.add("Identity", _answers(graph, task, scores))
    graph.nodes[-1].output[0] = OUTPUT
    return _model(graph, weight.shape, np.float32 if bounds is None else np.float64, metadata)


def _answers(graph: _Graph, task: Task, scores: str) -> str:
    if task.form == "classification":
        return graph.add("Softmax", scores, axis=1)
    parts = graph.add("Sigmoid", scores)
    if task.target is None:
        return parts
    low, high = task.target
    return graph.add("Add", graph.add("Mul", parts, graph.constant(high - low)), graph.constant(low))


def _library() -> Any:
    try:
        import onnx
        import onnx.checker
        import onnx.helper
        import onnx.numpy_helper
    except ImportError:
        raise InputError(
            "--to onnx", "the package onnx to be installed", "python -m pip install onnx==1.23.2"
        ) from None
    return onnx


def _read(graph: _Graph, bounds: Sequence[Bounds] | None) -> str:
    """The input, mapped by its bounds; a row that is not finite becomes zero."""
    if bounds is None:
        rows, broken = graph.add("Cast", INPUT, to=graph.onnx.TensorProto.DOUBLE), INPUT
    else:
        low, high, from_, times, plus = _maps(bounds)
        clamped = graph.add("Min", graph.add("Max", INPUT, graph.constant(low)), graph.constant(high))
        moved = graph.add("Mul", graph.add("Sub", clamped, graph.constant(from_)), graph.constant(times))
        rows = broken = graph.add("Add", moved, graph.constant(plus))
    odd = graph.add("Or", graph.add("IsNaN", INPUT), graph.add("IsInf", broken))
    number = graph.add("Cast", odd, to=graph.onnx.TensorProto.FLOAT)
    worst = graph.add("ReduceMax", number, graph.constant([1], np.int64), keepdims=1)
    return graph.add("Where", graph.add("Cast", worst, to=graph.onnx.TensorProto.BOOL), graph.constant(0.0), rows)


def _maps(bounds: Sequence[Bounds]) -> tuple[NDArray[np.float64], ...]:
    """Per column: low, high, what is taken away, what it is multiplied by, what is added."""
    each = [
        (-np.inf, np.inf, 0.0, 1.0, 0.0) if one is None else (*one, one[0], 2 / (one[1] - one[0]), -1.0)
        for one in bounds
    ]
    return tuple(np.array(each, np.float64).T)


def _unit(graph: _Graph, rows: str) -> str:
    """Rows of length 1; a zero row stays zero."""
    length = graph.add("ReduceL2", rows, graph.constant([1], np.int64), keepdims=1)
    some = graph.add("Greater", length, graph.constant(0.0))
    return graph.add("Div", rows, graph.add("Where", some, length, graph.constant(1.0)))


def _model(graph: _Graph, shape: tuple[int, ...], dtype: type, metadata: Mapping[str, str]) -> bytes:
    onnx = graph.onnx
    labels, width = shape[0], shape[1] - 1
    element = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    made = onnx.helper.make_graph(
        graph.nodes,
        "veil",
        [onnx.helper.make_tensor_value_info(INPUT, element, ["n", width])],
        [onnx.helper.make_tensor_value_info(OUTPUT, onnx.TensorProto.DOUBLE, ["n", labels])],
        graph.constants,
    )
    operators = [onnx.helper.make_opsetid("", OPSET)]
    model = onnx.helper.make_model(made, producer_name="veil", opset_imports=operators)
    model.ir_version = onnx.helper.find_min_ir_version_for(operators)
    onnx.helper.set_model_props(model, dict(metadata))
    onnx.checker.check_model(model, full_check=True)
    return bytes(model.SerializeToString())
