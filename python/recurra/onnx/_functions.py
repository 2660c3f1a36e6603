"""The ops of the library in operators of ai.onnx: a function of the model for each way of a call.

A function takes what the op takes, in the order of its schema, and returns what it returns. What an
op does with 16-bit numbers, shared dimensions or arguments that are not given is decided when the
function is written, and is said by its overload, so that one model may hold several.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from onnx import FunctionProto, TensorProto, helper

from recurra.onnx._cells import cell_step
from recurra.onnx._graph import Graph, compute_type
from recurra.ops.rnn import cells

DOMAIN = "recurra"
VERSION = 1

# What the state of softmax_scan has for a maximum when it has seen nothing.
_EMPTY = -1e38
_END = 2**63 - 1  # of a slice: to the last


@dataclass(frozen=True)
class Input:
    """What is known of an input when the function is written.

    Attributes:
        dtype: as ONNX counts them.
        shape: the sizes, None where they are not known.
    """

    dtype: int
    shape: tuple[int | None, ...]

    @property
    def rank(self) -> int:
        return len(self.shape)


class Call:
    """One way of calling an op, and the graph that its function is written in.

    Args:
        op: its name among ``torch.ops.recurra``.
        inputs: what is given, by name.
        attributes: what else is given, by name.
    """

    def __init__(self, op: str, inputs: Mapping[str, Input], attributes: Mapping[str, Any]):
        self.op, self.inputs, self.attributes = op, inputs, attributes
        lead = next(i for n, i in inputs.items() if n == _LEADING.get(op, n))
        self.dtype, self.compute = lead.dtype, compute_type(lead.dtype)
        self.graph = Graph(self.compute)
        self.words = [_type_name(lead.dtype)]
        for name, given in inputs.items():
            other = "" if given.dtype == lead.dtype else _type_name(given.dtype)
            if other or name in _optional(op):
                self.words.append(name + other)
        for name, value in attributes.items():
            if value is True:
                self.words.append(name)
            elif isinstance(value, str) and name in ("activation", "cell"):
                self.words.append(value)

    def __contains__(self, name: str) -> bool:
        return name in self.inputs

    def get(self, name: str) -> str | None:
        """The input in the type of the arithmetic, if it is given."""
        return self[name] if name in self.inputs else None

    def __getitem__(self, name: str) -> str:
        """The input in the type of the arithmetic."""
        return (
            name if self.inputs[name].dtype == self.compute else self.graph.cast(name, self.compute)
        )

    def out(self, x: str) -> str:
        """An output in the type of the activations."""
        return x if self.dtype == self.compute else self.graph.cast(x, self.dtype)

    def size(self, name: str, axis: int) -> int:
        """A size of an input, which the function depends on."""
        size = self.inputs[name].shape[axis]
        if size is None:
            raise ValueError(
                f"recurra.onnx: dimension {axis} of {name} of {self.op} must be fixed, got a "
                "dynamic one; leave it out of dynamic_shapes"
            )
        self.words.append(f"{name}{size}")
        return size

    def shared(self, name: str, axis: int) -> bool:
        """Whether an input is shared along an axis, of size 1."""
        if self.inputs[name].shape[axis] != 1:
            return False
        self.words.append(f"{name}_shared")
        return True


def _type_name(dtype: int) -> str:
    return TensorProto.DataType.Name(dtype).lower()


def _optional(op: str) -> set[str]:
    arguments = getattr(torch.ops.recurra, op).default._schema.arguments
    return {a.name for a in arguments if str(a.type).startswith("Optional")}


def _over_time(call: Call, name: str) -> tuple[str, bool]:
    """An input (B, T, ...) with time in front, and whether there are steps; without, the one that
    all steps share."""
    g, x, rank = call.graph, call[name], call.inputs[name].rank
    if call.shared(name, 1):
        return g.drop_axis(x, 1), False
    return g.time_major(x, rank), True


def _scan_with(
    call: Call, name: str, step: Callable, states: Sequence[str], inputs: Sequence[str], **options
) -> tuple[list[str], list[str]]:
    """A scan whose step is also given the input ``name``, of each step or shared."""
    g = call.graph
    x, each = _over_time(call, name)

    def body(inner: Graph, before: list[str], rows: list[str]):
        return step(inner, before, rows[0] if each else x, rows[each:])

    return g.scan(body, states, [x, *inputs] if each else inputs, **options)


def _linear_scan(call: Call) -> list[str]:
    g = call.graph
    h0 = call["h0"] if "h0" in call else g.zeros(g.size("b", 0, 1), g.size("b", 2))

    def step(inner: Graph, before: list[str], a: str, rows: list[str]):
        gate = inner.Exp(a) if call.attributes["log_a"] else a
        h = inner.Add(inner.Mul(gate, before[0]), rows[0])
        return [h], [h]

    b = g.time_major(call["b"], 3)
    (last,), (h,) = _scan_with(call, "a", step, [h0], [b], reverse=call.attributes["reverse"])
    return [call.out(g.time_major(h, 3)), last]


def _block_scan(call: Call) -> list[str]:
    g = call.graph
    h0 = call["h0"] if "h0" in call else g.zeros(g.size("b", 0, 1), g.size("b", 2))

    def step(inner: Graph, before: list[str], A: str, rows: list[str]):
        turned = inner.drop_axis(inner.MatMul(A, inner.add_axis(before[0], -1)), -1)
        h = inner.Add(turned, rows[0])
        return [h], [h]

    b = g.time_major(call["b"], 4)
    (last,), (h,) = _scan_with(call, "A", step, [h0], [b], reverse=call.attributes["reverse"])
    return [call.out(g.time_major(h, 4)), last]


def _causal_conv1d(call: Call) -> list[str]:
    g, W = call.graph, call.size("weight", 1)
    x = call["x"]
    h0 = call["h0"] if "h0" in call else g.zeros(g.size("x", 0, 1), g.ints(W - 1), g.size("x", 2))
    inputs = g.Concat(h0, x, axis=1)
    total = call.get("bias")
    for j, weight in enumerate(g.rows(call["weight"], W, axis=1)):
        end = j - W + 1 or _END
        term = g.Mul(g.Slice(inputs, g.ints(j), g.ints(end), g.ints(1)), weight)
        total = term if total is None else g.Add(total, term)
    if call.attributes["activation"] == "silu":
        total = g.Mul(total, g.Sigmoid(total))
    return [call.out(total), g.Slice(inputs, g.ints(1 - W), g.ints(_END), g.ints(1))]


def _selective_scan(call: Call) -> list[str]:
    # With G groups the channels are (G, D / G), and B and C are shared along the second.
    g, grouped = call.graph, call.inputs["B"].rank == 4
    split = [call.size("B", 2), -1] if grouped else [-1]
    u, A = call["u"], call["A"]
    rank = 2 + len(split)
    dt = g.Add(call["delta"], call["delta_bias"]) if "delta_bias" in call else call["delta"]
    if call.attributes["delta_softplus"]:
        dt = g.softplus(dt)
    h0 = call["h0"] if "h0" in call else g.zeros(g.size("u", 0, 1), g.size("A", 0))
    if grouped:
        dt, x = (g.Reshape(v, g.ints(0, 0, *split)) for v in (dt, u))
        A = g.Reshape(A, g.Concat(g.ints(*split), g.size("A", 1), axis=0))
        h0 = g.Reshape(h0, g.Concat(g.ints(0, *split), g.size("A", 1), axis=0))
    else:
        x = u

    def step(inner: Graph, before: list[str], rows: list[str]):
        dt, x, B, C = rows
        decay = inner.Exp(inner.Mul(inner.add_axis(dt, -1), A))
        B, C = (inner.add_axis(v, -2) for v in (B, C))
        h = inner.Add(
            inner.Mul(decay, before[0]), inner.Mul(inner.add_axis(inner.Mul(dt, x), -1), B)
        )
        y = inner.ReduceSum(inner.Mul(h, C), inner.ints(-1), keepdims=0)
        return [h], [y]

    rows = [g.time_major(v, rank) for v in (dt, x)]
    rows += [g.time_major(call[name], rank) for name in ("B", "C")]
    (last,), (y,) = g.scan(step, [h0], rows)
    y = g.time_major(y, rank)
    if grouped:
        y = g.Reshape(y, g.ints(0, 0, -1))
        last = g.Reshape(last, g.Concat(g.ints(0, -1), g.size("A", 1), axis=0))
    if "D" in call:
        y = g.Add(y, g.Mul(call["D"], u))
    if "z" in call:
        z = call["z"]
        y = g.Mul(y, g.Mul(z, g.Sigmoid(z)))
    return [call.out(y), last]


def _weights(g: Graph, x: str, y: str) -> tuple[str, str, str]:
    """The larger of two logarithms, and the exponentials of both relative to it."""
    top = g.Max(x, y)
    return top, g.Exp(g.Sub(x, top)), g.Exp(g.Sub(y, top))


def _mean(g: Graph, total: str, weight: str) -> str:
    empty = g.Equal(weight, g.number(0))
    divided = g.Div(total, g.Where(empty, g.number(1), weight))
    return g.Where(empty, g.number(0), divided)


def _softmax_scan(call: Call) -> list[str]:
    g = call.graph
    if "h0" in call:
        m, *rest = g.rows(call["h0"], 3, axis=1)
        states = [g.Max(m, g.number(_EMPTY)), *rest]
    else:
        zero = g.zeros(g.size("v", 0, 1), g.size("v", 2))
        states = [g.Add(zero, g.number(_EMPTY)), zero, zero]
    decay, bonus = (call.get("decay"), call.get("bonus"))

    def step(inner: Graph, before: list[str], score: str, rows: list[str]):
        (m, c, a), (x,) = before, rows
        if bonus is not None:
            _, past, now = _weights(inner, m, inner.Add(score, bonus))
            total = inner.Add(inner.Mul(past, a), inner.Mul(now, x))
            o = _mean(inner, total, inner.Add(inner.Mul(past, c), now))
        m, past, now = _weights(inner, m if decay is None else inner.Sub(m, decay), score)
        c = inner.Add(inner.Mul(past, c), now)
        a = inner.Add(inner.Mul(past, a), inner.Mul(now, x))
        return [m, c, a], [_mean(inner, a, c) if bonus is None else o]

    v = g.time_major(call["v"], 3)
    last, (o,) = _scan_with(call, "s", step, states, [v])
    return [call.out(g.time_major(o, 3)), g.stack(last, 1)]


def _rnn(call: Call) -> list[str]:
    g, info = call.graph, cells()[call.attributes["cell"]]
    x = g.rows(g.Transpose(call["x"], perm=[1, 0, 2, 3]), len(info.inputs), axis=2)
    params = g.rows(call["params"], len(info.params), axis=0)
    if "h0" in call:
        states = g.rows(call["h0"], len(info.states), axis=1)
    else:
        states = [g.zeros(g.size("x", 0, 1), g.size("x", 3))] * len(info.states)
    empty = [g.add_axis(g.Transpose("reset", perm=[1, 0]), -1)] if "reset" in call else []
    shown = info.states if call.attributes["return_states"] else [info.output]

    def step(inner: Graph, before: list[str], rows: list[str]):
        reset, rows = rows[: len(empty)], rows[len(empty) :]
        for mask in reset:
            before = [inner.Where(mask, inner.number(0), h) for h in before]
        after = cell_step(inner, info.name, rows, before, params)
        return after, [after[info.states.index(name)] for name in shown]

    last, outputs = g.scan(step, states, [*empty, *x])
    outputs = [g.time_major(y, 3) for y in outputs]
    y = g.stack(outputs, 2) if call.attributes["return_states"] else outputs[0]
    passes = g.Constant(value=helper.make_tensor("", TensorProto.INT32, [], [0]))
    return [call.out(y), g.stack(last, 1), passes, g.number(0)]


def _rms_norm(call: Call) -> list[str]:
    g, x = call.graph, call["x"]
    call.words.append(repr(call.attributes["eps"]))
    square = g.ReduceMean(g.Mul(x, x), g.ints(-1), keepdims=1)
    rstd = g.Reciprocal(g.Sqrt(g.Add(square, g.number(call.attributes["eps"]))))
    return [call.out(g.Mul(g.Mul(x, rstd), call["weight"])), g.drop_axis(rstd, -1)]


def _linear_step(call: Call) -> list[str]:
    g = call.graph
    y = g.MatMul(call["x"], g.Transpose(call["weight"], perm=[1, 0]))
    return [call.out(g.Add(y, call["bias"]) if "bias" in call else y)]


BODIES: dict[str, Callable[[Call], list[str]]] = {
    "linear_scan": _linear_scan,
    "block_scan": _block_scan,
    "causal_conv1d": _causal_conv1d,
    "selective_scan": _selective_scan,
    "softmax_scan": _softmax_scan,
    "rnn": _rnn,
    "_rms_norm": _rms_norm,
    "_linear_step": _linear_step,
}
# The inputs whose type is that of the activations, where they are not the first.
_LEADING = {"linear_scan": "b", "block_scan": "b", "softmax_scan": "v"}


def node_name(op: str) -> str:
    """What the op is called in the domain."""
    return op.removeprefix("_")


def make_function(
    op: str, inputs: Mapping[str, Input], attributes: Mapping[str, Any], opset: int
) -> FunctionProto:
    """The function that computes this way of calling an op.

    Args:
        op: its name among ``torch.ops.recurra``.
        inputs: what is given, by name.
        attributes: all of them, by name.
        opset: version of ai.onnx, at least 18.

    Raises:
        ValueError: a dimension that the function depends on is dynamic.
    """
    schema = getattr(torch.ops.recurra, op).default._schema
    call = Call(op, inputs, attributes)
    outputs = BODIES[op](call)
    return helper.make_function(
        DOMAIN,
        node_name(op),
        [a.name for a in schema.arguments if "Tensor" in str(a.type) and a.name != "cu_seqlens"],
        outputs,
        call.graph.nodes,
        [helper.make_opsetid("", opset)],
        list(attributes),
        overload="_".join(dict.fromkeys(call.words)),
    )
