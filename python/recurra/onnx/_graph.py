"""A writer of ONNX nodes: what the bodies of the ops are written with."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

from onnx import NodeProto, TensorProto, helper

# Of one step of a Scan: (graph, states before, rows of the inputs) -> (states after, outputs).
Step = Callable[["Graph", list[str], list[str]], tuple[list[str], list[str]]]


class Graph:
    """Nodes of the ai.onnx domain, written by calling their operators: ``g.Add(x, y)`` returns the
    name of the sum.

    Args:
        compute: ``TensorProto.FLOAT`` or ``DOUBLE``, in which the arithmetic is.
        names: numbers of the values; a graph inside another one goes on with its.
    """

    def __init__(self, compute: int, names: itertools.count | None = None):
        self.compute = compute
        self.nodes: list[NodeProto] = []
        self._names = names or itertools.count()

    def name(self) -> str:
        """A name that nothing else has."""
        return f"v{next(self._names)}"

    def __getattr__(self, operator: str) -> Callable[..., str]:
        if operator.startswith("_"):
            raise AttributeError(operator)
        return lambda *inputs, **attributes: self.many(operator, 1, *inputs, **attributes)[0]

    def many(self, operator: str, count: int, *inputs: str, **attributes: Any) -> list[str]:
        """A node of several outputs."""
        outputs = [self.name() for _ in range(count)]
        self.nodes.append(helper.make_node(operator, inputs, outputs, **attributes))
        return outputs

    def number(self, value: float) -> str:
        """A number in the type of the arithmetic."""
        return self.Constant(value=helper.make_tensor("", self.compute, [], [value]))

    def ints(self, *values: int) -> str:
        """A list of integers, as axes and shapes are given."""
        return self.Constant(value_ints=list(values))

    def cast(self, x: str, dtype: int) -> str:
        """``x`` in another type."""
        return self.Cast(x, to=dtype)

    def add_axis(self, x: str, axis: int) -> str:
        """``x`` with one more axis, of size 1."""
        return self.Unsqueeze(x, self.ints(axis))

    def drop_axis(self, x: str, axis: int) -> str:
        """``x`` without an axis, of size 1."""
        return self.Squeeze(x, self.ints(axis))

    def rows(self, x: str, count: int, axis: int) -> list[str]:
        """The ``count`` slices of ``x`` along an axis."""
        return [self.Gather(x, self.Constant(value_int=n), axis=axis) for n in range(count)]

    def stack(self, rows: Sequence[str], axis: int) -> str:
        """The inverse of :meth:`rows`."""
        return self.Concat(*(self.add_axis(row, axis) for row in rows), axis=axis)

    def zeros(self, *sizes: str) -> str:
        """Zeros; sizes are lists of integers that make up the shape."""
        shape = self.Concat(*sizes, axis=0)
        value = helper.make_tensor("", self.compute, [1], [0])
        return self.ConstantOfShape(shape, value=value)

    def size(self, x: str, begin: int, end: int | None = None) -> str:
        """The sizes of some of the dimensions of ``x``."""
        return self.Shape(x, start=begin, **({} if end is None else {"end": end}))

    def softplus(self, x: str) -> str:
        """log(1 + exp(x)), with the digits of small results."""
        if self.compute == TensorProto.FLOAT:
            return self.Softplus(x)
        # onnxruntime has it in float32 alone, and ONNX has no log1p: log(u) y / (u - 1), with
        # u = 1 + y rounded, has the digits that 1 + y lost.
        one = self.number(1)
        y = self.Exp(self.Neg(self.Abs(x)))
        u = self.Add(y, one)
        lost = self.Equal(u, one)
        ratio = self.Div(y, self.Where(lost, one, self.Sub(u, one)))
        log1p = self.Where(lost, y, self.Mul(self.Log(u), ratio))
        return self.Add(self.Relu(x), log1p)

    def time_major(self, x: str, rank: int) -> str:
        """(B, T, ...) as (T, B, ...), or back."""
        return self.Transpose(x, perm=[1, 0, *range(2, rank)])

    def scan(
        self, step: Step, states: Sequence[str], inputs: Sequence[str], reverse: bool = False
    ) -> tuple[list[str], list[str]]:
        """``step`` along the first axis of the inputs; it may use any value of this graph.

        Returns:
            The states after the last step, and the outputs of all steps along a first axis.
        """
        body = Graph(self.compute, self._names)
        before, rows = ([body.name() for _ in given] for given in (states, inputs))
        after, outputs = step(body, before, rows)
        # What is an output twice needs two names.
        outputs = [body.Identity(x) for x in outputs]
        info = helper.make_empty_tensor_value_info
        graph = helper.make_graph(
            body.nodes,
            "step",
            [info(x) for x in (*before, *rows)],
            [info(x) for x in (*after, *outputs)],
        )
        results = self.many(
            "Scan",
            len(after) + len(outputs),
            *states,
            *inputs,
            body=graph,
            num_scan_inputs=len(inputs),
            scan_input_directions=[int(reverse)] * len(inputs),
            scan_output_directions=[int(reverse)] * len(outputs),
        )
        return results[: len(after)], results[len(after) :]


def compute_type(dtype: int) -> int:
    """In which the arithmetic on numbers of this type is: float32 for 16-bit ones."""
    return TensorProto.DOUBLE if dtype == TensorProto.DOUBLE else TensorProto.FLOAT
