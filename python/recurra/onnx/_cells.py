"""Cells as ONNX nodes: the functions of :mod:`recurra.reference.cells` run on names of values."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from recurra.onnx._graph import Graph
from recurra.reference import cells


class _Arithmetic:
    """Operators and functions of torch, which write a node each."""

    def __add__(self, other: Any) -> Any:
        return _apply("Add", self, other)

    def __radd__(self, other: Any) -> Any:
        return _apply("Add", other, self)

    def __sub__(self, other: Any) -> Any:
        return _apply("Sub", self, other)

    def __rsub__(self, other: Any) -> Any:
        return _apply("Sub", other, self)

    def __mul__(self, other: Any) -> Any:
        return _apply("Mul", self, other)

    def __rmul__(self, other: Any) -> Any:
        return _apply("Mul", other, self)

    def __truediv__(self, other: Any) -> Any:
        return _apply("Div", self, other)

    def __rtruediv__(self, other: Any) -> Any:
        return _apply("Div", other, self)

    def __neg__(self) -> Any:
        return _apply("Neg", self)

    def __lt__(self, other: Any) -> Any:
        return _apply("Less", self, other)

    def __le__(self, other: Any) -> Any:
        return _apply("LessOrEqual", self, other)

    def clamp(self, *, max: float) -> Any:
        return _apply("Min", self, max)

    @classmethod
    def __torch_function__(
        cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        return _FUNCTIONS[func.__name__](*args, **kwargs or {})


class _Value(_Arithmetic):
    """One row: a value of the graph."""

    def __init__(self, graph: Graph, name: str):
        self.graph, self.name = graph, name

    def __getitem__(self, index: None) -> _Rows:
        return _Rows([self])


class _Rows(_Arithmetic):
    """Several rows, as the first dimension of a tensor."""

    def __init__(self, rows: Sequence[_Value]):
        self.rows = list(rows)

    def __getitem__(self, index: int) -> _Value:
        return self.rows[index]

    def __iter__(self) -> Iterator[_Value]:
        return iter(self.rows)


def _apply(operator: str, *args: Any) -> Any:
    """The operator on each row."""
    stacks = [x.rows for x in args if isinstance(x, _Rows)]
    if stacks:
        each = ([x[n] if isinstance(x, _Rows) else x for x in args] for n in range(len(stacks[0])))
        return _Rows([_apply(operator, *row) for row in each])
    graph = next(x.graph for x in args if isinstance(x, _Value))
    names = (x.name if isinstance(x, _Value) else graph.number(x) for x in args)
    return _Value(graph, getattr(graph, operator)(*names))


def _function(operator: str) -> Callable:
    return lambda *args: _apply(operator, *args)


_FUNCTIONS: dict[str, Callable] = {
    "sigmoid": _function("Sigmoid"),
    "tanh": _function("Tanh"),
    "relu": _function("Relu"),
    "exp": _function("Exp"),
    "maximum": _function("Max"),
    "where": _function("Where"),
    "softplus": _function("softplus"),
    "log_sigmoid": lambda x: -_apply("softplus", -x),
    "stack": _Rows,
}


def cell_step(
    graph: Graph, cell: str, x: Sequence[str], h: Sequence[str], p: Sequence[str]
) -> list[str]:
    """The states after a step of a cell, for the names of its inputs, states and parameters."""
    x, h, p = (_Rows([_Value(graph, name) for name in names]) for names in (x, h, p))
    return [row.name for row in getattr(cells, cell)(x, h, p)]
