"""What a node of the domain ``recurra`` must be, before a function is written for it.

The op itself never sees the node: what its checks would say to Python is said here.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from recurra.onnx._functions import BODIES, DOMAIN, VERSION, Input, node_name
from recurra.ops.rnn import cells

OPSET = 18  # of ai.onnx: ReduceMean has its axes as an input
_FLOATS = {
    ir.DataType.DOUBLE,
    ir.DataType.FLOAT,
    ir.DataType.BFLOAT16,
    ir.DataType.FLOAT16,
}
_KINDS = {
    "bool": (ir.AttributeType.INT, "0 or 1"),
    "int": (ir.AttributeType.INT, "an integer"),
    "float": (ir.AttributeType.FLOAT, "a float"),
    "str": (ir.AttributeType.STRING, "a string"),
}


def fail(sentence: str) -> None:
    """Raises ValueError in the name of the module."""
    raise ValueError(f"recurra.onnx: {sentence}")


def find_op(name: str) -> str:
    """The op among ``torch.ops.recurra`` that a node of the domain is named after."""
    op = name if name in BODIES else f"_{name}"
    if op not in BODIES:
        fail(f"the domain {DOMAIN} has no operator {name}")
    return op


def signature(op: str) -> tuple[list[str], dict[str, Any]]:
    """The inputs of a node of the domain, and its attributes with their defaults."""
    arguments = getattr(torch.ops.recurra, op).default._schema.arguments
    inputs = [a.name for a in arguments if "Tensor" in str(a.type)]
    attributes = {a.name: a.default_value for a in arguments if a.name not in inputs}
    return [name for name in inputs if name != "cu_seqlens"], attributes


def output_count(op: str) -> int:
    """How many outputs a node of the domain has."""
    return len(getattr(torch.ops.recurra, op).default._schema.returns)


def check_versions(model: ir.Model) -> None:
    """Refuses a model whose operators the functions do not go with."""
    if not isinstance(model, ir.Model):
        fail(
            f"a model must be an onnx_ir.Model, got {type(model).__name__}: onnx_ir.load(path) "
            "reads one, onnx_ir.from_proto makes one of a ModelProto"
        )
    opset = model.opset_imports.get("")
    if opset is None or opset < OPSET:
        said = "none" if opset is None else opset
        fail(
            f"the model must be of opset {OPSET} of ai.onnx or a later one, got {said}; export it "
            f"again with opset_version={OPSET}, or convert it"
        )
    version = model.opset_imports.get(DOMAIN, VERSION)
    if version != VERSION:
        fail(f"the domain {DOMAIN} must be of version {VERSION}, got {version}")


def read_node(op: str, node: ir.Node) -> tuple[dict[str, Input], dict[str, Any]]:
    """The inputs that a node is given and all attributes, checked.

    Raises:
        ValueError: an input or attribute is missing, unknown or not of its kind, or has no type; an
            output is unknown.
    """
    outputs = output_count(op)
    if len(node.outputs) > outputs:
        fail(f"{node_name(op)} has at most {outputs} outputs, got {len(node.outputs)}")
    return _inputs(op, node), _attributes(op, node)


def _inputs(op: str, node: ir.Node) -> dict[str, Input]:
    here, (names, _) = node_name(op), signature(op)
    if len(node.inputs) > len(names):
        fail(f"{here} takes at most {len(names)} inputs, got {len(node.inputs)}")
    given = {n: x for n, x in zip(names, node.inputs, strict=False) if x is not None}
    schema = getattr(torch.ops.recurra, op).default._schema
    for argument in schema.arguments:
        name = argument.name
        if name in names and name not in given and not argument.has_default_value():
            fail(f"{here} must have the input {name}")
    for name, value in given.items():
        if value.dtype is None or value.shape is None:
            fail(
                f"the model must say the type and shape of {name} of {here}; export it again, with "
                "recurra.onnx.export"
            )
        known = {ir.DataType.BOOL} if name == "reset" else _FLOATS
        if value.dtype not in known:
            listed = ", ".join(sorted(dtype.name.lower() for dtype in known))
            fail(f"{name} of {here} must be {listed}, got {value.dtype.name.lower()}")
    return {
        name: Input(int(x.dtype), tuple(n if isinstance(n, int) else None for n in x.shape))
        for name, x in given.items()
    }


def _attributes(op: str, node: ir.Node) -> dict[str, Any]:
    here, (_, values) = node_name(op), signature(op)
    for name in node.attributes:
        if name not in values:
            listed = ", ".join(values) or "none"
            fail(f"{here} has no attribute {name}; it has {listed}")
    for argument in getattr(torch.ops.recurra, op).default._schema.arguments:
        name = argument.name
        if name not in values:
            continue
        if name not in node.attributes:
            if not argument.has_default_value():
                fail(f"{here} must have the attribute {name}")
            continue
        kind = str(argument.type).removeprefix("Optional[").removesuffix("]")
        values[name] = _value(here, kind, node.attributes[name])
        _check_choice(here, name, values[name])
    return values


def _value(here: str, kind: str, attribute: ir.Attr) -> Any:
    """The value of an attribute, which ONNX has no bool for and only 32 bits of a float."""
    wanted, words = _KINDS[kind]
    value = attribute.value
    if attribute.type != wanted or value is None or (kind == "bool" and value not in (0, 1)):
        fail(f"the attribute {attribute.name} of {here} must be {words}, got {value!r}")
    if kind == "float":
        return float(str(np.float32(value)))
    return bool(value) if kind == "bool" else value


def _check_choice(here: str, name: str, value: Any) -> None:
    known = {
        "activation": ("silu",),
        "cell": tuple(cells()),
        "algorithm": ("auto", "sequential", "newton", "newton-global"),
        "on_fail": ("sequential", "warn", "raise"),
    }.get(name)
    if known and value not in known:
        or_none = " or be left out" if name == "activation" else ""
        fail(f'{name} of {here} must be one of {", ".join(known)}{or_none}, got "{value}"')
    if name in ("chunk", "max_passes") and value < 1:
        fail(f"{name} of {here} must be at least 1, got {value}")
