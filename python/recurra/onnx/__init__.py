"""Models in ONNX: every op one node of the domain ``recurra``, or standard operators with Scan.

The nodes come with functions of the model that say in standard operators what they compute, so any
runtime runs them, and one that has kernels for the domain may use those. docs/onnx.md describes the
domain. Needs the packages onnx and onnxscript: ``pip install 'recurra[onnx]'``.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

try:
    import onnx_ir as ir
    import onnxscript
    from onnx_ir.passes.common import InlinePass, NameFixPass, ShapeInferencePass
    from onnxscript import optimizer
except ImportError as error:
    raise ImportError(
        f"recurra.onnx needs the packages onnx and onnxscript, of which {error.name} is missing: "
        "pip install 'recurra[onnx]'"
    ) from error

from recurra.lm import LM
from recurra.onnx._check import check_versions, fail, find_op, output_count, read_node, signature
from recurra.onnx._functions import BODIES, DOMAIN, VERSION, make_function, node_name

__all__ = ["DOMAIN", "VERSION", "define", "expand", "export", "export_lm", "translation_table"]


def _translate(op: str) -> Callable:
    """What torch's exporter calls for ``op``: adds the node to the model."""
    schema = getattr(torch.ops.recurra, op).default._schema
    inputs, attributes = signature(op)

    def translate(*args, **kwargs):
        given = {a.name: x for a, x in zip(schema.arguments, args, strict=False)} | kwargs
        if given.get("cu_seqlens") is not None:
            raise ValueError(
                f"recurra.onnx: cu_seqlens of {node_name(op)} has no form in ONNX; export a model "
                "without it, with a row of the batch for each sequence"
            )
        values = [given.get(name) for name in inputs]
        while values[-1] is None:
            values.pop()
        chosen = {name: given.get(name, default) for name, default in attributes.items()}
        node = ir.Node(
            DOMAIN,
            node_name(op),
            values,
            ir.convenience.convert_attributes({n: x for n, x in chosen.items() if x is not None}),
            num_outputs=output_count(op),
            version=VERSION,
        )
        onnxscript.evaluator.default().nodes.append(node)
        return node.outputs if len(node.outputs) > 1 else node.outputs[0]

    translate.__name__ = translate.__qualname__ = node_name(op)
    return translate


def translation_table() -> dict[Any, Callable]:
    """For ``torch.onnx.export(dynamo=True, custom_translation_table=...)``: each op becomes one
    node of the domain ``recurra``, to which :func:`define` then adds what it computes."""
    return {getattr(torch.ops.recurra, op).default: _translate(op) for op in BODIES}


def define(model: ir.Model) -> None:
    """Adds to a model what its nodes of the domain ``recurra`` compute, as functions.

    Args:
        model: ``program.model`` of what ``torch.onnx.export`` returned, or from ``onnx_ir.load``;
            changed in place. Its own functions that hold such nodes are inlined.

    Raises:
        ValueError: an operator is unknown, or a type or shape that its function depends on is; an
            input or attribute is missing, unknown or not of its kind; there are more outputs than
            the operator has; ai.onnx is older than opset 18.
    """
    check_versions(model)
    _inline_callers(model)
    for node in model.graph.all_nodes():
        if node.domain != DOMAIN:
            continue
        op = find_op(node.op_type)
        if any(x is not None and (x.dtype is None or x.shape is None) for x in node.inputs):
            ShapeInferencePass()(model)  # which goes through the functions that are there by now
        inputs, attributes = read_node(op, node)
        _return_all(model, op, node)
        function = make_function(op, inputs, attributes, model.opset_imports[""])
        node.overload = function.overload
        model.functions[node.op_identifier()] = ir.serde.deserialize_function(function)


def _return_all(model: ir.Model, op: str, node: ir.Node) -> None:
    """Adds the outputs that a node leaves out: runtimes and inlining pair them with those of the
    function by position, and some stop at one that is missing."""
    count = output_count(op)
    if len(node.outputs) == count and all(x.name for x in node.outputs):
        return
    node.resize_outputs(count)
    for x in node.outputs:
        x.name = x.name or None
    NameFixPass()(model)


def _inline_callers(model: ir.Model) -> None:
    """Puts the bodies of functions with nodes of the domain where they are called: the types that
    those nodes compute in are known only there."""
    callers: set[ir.OperatorIdentifier] = set()
    found = True
    while found:  # those that call one are callers too
        found = {
            key
            for key, function in model.functions.items()
            if key not in callers
            and key[0] != DOMAIN
            and any(
                n.domain == DOMAIN or n.op_identifier() in callers for n in function.all_nodes()
            )
        }
        callers |= found
    if not callers:
        return
    InlinePass(lambda function: function.identifier() in callers)(model)
    for key in callers:
        model.functions.pop(key, None)  # that nothing calls


def expand(model: ir.Model) -> None:
    """Puts standard operators, :func:`define` says which, in the place of the nodes of the domain
    ``recurra``.

    Args:
        model: as for :func:`define`; changed in place.

    Raises:
        ValueError: as for :func:`define`.
    """
    define(model)
    InlinePass(lambda function: function.domain == DOMAIN)(model)
    model.opset_imports.pop(DOMAIN, None)


class _Flat(nn.Module):
    """A language model whose state is a list of tensors."""

    def __init__(self, model: LM):
        super().__init__()
        self.model = model
        self.kinds = [type(part) for part in model.initial_state(1)]

    def forward(self, tokens: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        """Logits and the state after ``tokens`` (B, T)."""
        given = iter(state)
        before = [kind(*(next(given) for _ in kind._fields)) for kind in self.kinds]
        logits, after = self.model(tokens, before)
        return logits, *(x for part in after for x in part)


@contextlib.contextmanager
def _own_words() -> Iterator[None]:
    """Raises what this module has to say of a model instead of what torch makes of it."""
    try:
        yield
    except torch.onnx.OnnxExporterError as error:
        cause: BaseException | None = error
        while cause is not None:
            text = str(cause)
            if isinstance(cause, ValueError) and text.startswith("recurra.onnx: "):
                raise ValueError(text) from None
            if step := re.search(r"auto_functionalized.*\(recurra\.(\w+)_step\.default", text):
                raise ValueError(
                    f"recurra.onnx: {step[1]}_step writes its state in place, which has no form in "
                    f"ONNX; call {step[1]} with T = 1, which takes the state as h0 and returns it "
                    "as h_last"
                ) from None
            if "complex-valued input" in text:
                raise ValueError(
                    "recurra.onnx: torch's exporter has no complex numbers, with which this model "
                    "computes; export one whose states are real, such as mamba, hgrn or mingru"
                ) from error
            cause = cause.__cause__
        raise


_expand = expand  # which is the name of an argument below


def export(
    model: nn.Module,
    args: tuple,
    path: str | os.PathLike | None = None,
    *,
    kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
    expand: bool = False,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    **options: Any,
) -> torch.onnx.ONNXProgram:
    """Exports a module that calls ops of the library, as ``torch.onnx.export`` exports others.

    Args:
        model: the module, in evaluation mode.
        args: example inputs.
        path: of the file to write; None writes none.
        kwargs: more example inputs, by name.
        dynamic_shapes: as for ``torch.export.export``; batch and time of every op may be dynamic.
        expand: whether to leave no node of the domain, only standard operators.
        input_names: what the inputs are called.
        output_names: what the outputs are called.
        options: others of ``torch.onnx.export``; not ``dynamo``, which is needed.

    Returns:
        The program, whose ``model_proto`` is the model and whose ``save`` writes it.

    Raises:
        ValueError: an op is called in a way that ONNX has no form for: with ``cu_seqlens``, with
            complex numbers, as a step in place, or with a dynamic dimension that must be fixed.
        torch.onnx.OnnxExporterError: torch cannot export the rest of the model.
    """
    optimize = options.pop("optimize", True)
    with torch.no_grad(), _own_words():
        program = torch.onnx.export(
            model,
            args,
            kwargs=dict(kwargs or {}),
            dynamo=True,
            dynamic_shapes=dynamic_shapes,
            input_names=input_names,
            output_names=output_names,
            custom_translation_table=translation_table()
            | options.pop("custom_translation_table", {}),
            optimize=False,
            **options,
        )
    (_expand if expand else define)(program.model)
    if optimize:
        optimizer.optimize_ir(program.model, inline=False)
    if path is not None:
        program.save(path)
    return program


def export_lm(
    model: LM,
    path: str | os.PathLike | None = None,
    *,
    shape: tuple[int, int] | None = None,
    expand: bool = False,
    **options: Any,
) -> torch.onnx.ONNXProgram:
    """Exports a language model with its state as inputs and outputs.

    The inputs are ``tokens`` (B, T), int64, and for each tensor of :meth:`recurra.LM.initial_state`
    one called ``state_N_FIELD``; the outputs ``logits`` (B, T, vocab_size) and as many called
    ``next_N_FIELD``. A call with T = 1 is a step of decoding.

    Args:
        model: the model.
        path: of the file to write; None writes none.
        shape: (B, T) of all calls; any where None.
        expand: whether to leave no node of the domain, only standard operators.
        options: others of :func:`export`.

    Returns:
        The program.

    Raises:
        ValueError: it is another model or another shape, it has complex states, or torch cannot
            trace it for any B and T.
    """
    if not isinstance(model, LM):
        fail(f"export_lm takes a recurra.LM, got {type(model).__name__}; export takes any module")
    sizes = (2, 3) if shape is None else tuple(shape)
    if len(sizes) != 2 or not all(isinstance(n, int) and n >= 1 for n in sizes):
        fail(f"shape must be two sizes of at least 1, B and T, got {shape}")
    first = model.initial_state(sizes[0])
    names = [f"{n}_{field}" for n, part in enumerate(first) for field in part._fields]
    state = [x.detach() for part in first for x in part]
    training = model.training
    try:
        program = export(
            _Flat(model).eval(),
            (torch.zeros(sizes, dtype=torch.int64), *state),
            dynamic_shapes=None if shape else _any_sizes(len(state)),
            expand=expand,
            input_names=["tokens", *(f"state_{name}" for name in names)],
            output_names=["logits", *(f"next_{name}" for name in names)],
            **options,
        )
    finally:
        model.train(training)
    fixed = [size for size in program.model.graph.inputs[0].shape if isinstance(size, int)]
    if shape is None and fixed:
        raise ValueError(
            "recurra.onnx: torch cannot trace this model for any B and T; give the sizes of its "
            "calls, such as shape=(1, 1) for steps"
        )
    if path is not None:
        program.save(path)
    return program


def _any_sizes(states: int) -> dict[str, Any]:
    batch, time = torch.export.Dim("B"), torch.export.Dim("T")
    return {"tokens": {0: batch, 1: time}, "state": ({0: batch},) * states}
