"""``rnn``: every cell of the library along time, sequentially or by Newton's method."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from recurra._check import check, check_slots, empty_ordered, fail, memory_order, state_dtype
from recurra.ops import _register

if TYPE_CHECKING:
    from recurra.cell import Cell

_op = torch.ops.recurra.rnn.default
_backward_op = torch.ops.recurra._rnn_backward.default
_step_op = torch.ops.recurra.rnn_step.default

# Of csrc/rnn/rnn.h and of a vector: they set the size of what the forward saves.
_CHUNK, _LANES = 32, 16


class CellInfo(NamedTuple):
    """What a cell calls its numbers.

    Attributes:
        name: of the cell.
        inputs: the rows of ``x``.
        states: the rows of ``h0`` and ``h_last``.
        params: the rows of ``params``.
        output: the state that ``y`` holds.
        affine: for each parameter that enters only as ``input + parameter * state`` or, where the
            state is None, ``input + parameter``: that input and that state.
    """

    name: str
    inputs: tuple[str, ...]
    states: tuple[str, ...]
    params: tuple[str, ...]
    output: str
    affine: dict[str, tuple[str, str | None]]


@functools.cache
def cells() -> dict[str, CellInfo]:
    """Every cell of the library by name."""
    found = {}
    for line in torch.ops.recurra._cells().splitlines():
        name, inputs, states, params, output, *affine = line.split(" ")
        inputs, states, params = (tuple(w.split(",")) for w in (inputs, states, params))
        entries = {}
        for entry in affine:
            p, i, s = map(int, entry.split(":"))
            entries[params[p]] = (inputs[i], None if s < 0 else states[s])
        found[name] = CellInfo(name, inputs, states, params, output, entries)
    return found


def rnn(
    x: Tensor,
    params: Tensor,
    h0: Tensor | None = None,
    *,
    cell: str | Cell,
    algorithm: str = "auto",
    chunk: int | None = None,
    max_passes: int | None = None,
    on_fail: str = "sequential",
    return_states: bool = False,
    reset: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    r"""A nonlinear recurrence with channel-wise state, :math:`h_t = f(x_t, h_{t-1}, p)`.

    The cells are those of :func:`recurra.cells`; what mixes channels, the projection of the input,
    is outside. ``newton`` solves for the states at the starts of stretches of time, which then run
    side by side (multiple shooting), and certifies the result by the mismatch at their boundaries;
    where that is not down to the rounding of the sequential result, the sequential result is what
    is returned. It pays where there are too few sequences and channels to fill the machine.
    ``newton-global`` is the form of the papers, with every state an unknown (Lim et al.,
    arXiv 2309.12252; Danieli et al., arXiv 2510.21450), on the CPU alone. Differentiable once, in
    ``x``, ``params`` and ``h0``, from ``y`` and ``h_last``.

    Args:
        x: (B, T, G, N), the G inputs of the cell for N channels; float32, float64, bfloat16 or
            float16, any strides.
        params: (P, N), the parameters of the cell. The dtype of ``x`` or float32.
        h0: initial states, (B, K, N), or (S, K, N) with ``cu_seqlens``; zero when None. float32
            for 16-bit ``x``, otherwise the dtype of ``x``.
        cell: name of the cell, or one of your own: a :class:`recurra.Cell` (docs/python_cells.md)
            or what :func:`recurra.jit.cell` returns (docs/jit.md).
        algorithm: "sequential", "newton", "newton-global", or "auto", which chooses by shape.
        chunk: steps of a stretch for "newton"; chosen by shape when None.
        max_passes: passes of Newton's method after which it has failed; 16 when None.
        on_fail: "sequential", "warn", which computes sequentially as well and says so on stderr, as
            torch's own kernels do, or "raise". On CUDA the latter two wait for the device and are
            refused while a graph is captured.
        return_states: return all states instead of the output.
        reset: (B, T) of bool; where True the state before that step is zero.
        cu_seqlens: (S + 1,) int32 or int64, the ends of S sequences packed along T, from 0 to T;
            B must be 1. Each has a state of its own.

    Returns:
        y: (B, T, N), or (B, T, K, N) with ``return_states``; dtype and memory order of ``x``.
        h_last: the states after the last step, shape and dtype of ``h0``.
        passes: int32 scalar, the largest number of passes that a channel took; 0 sequentially.
        mismatch: scalar, the largest mismatch that the last pass of a channel left; 0
            sequentially. NaN where a state is not finite.

    Raises:
        RuntimeError: an argument has the wrong shape, dtype or device, ``cell`` is unknown, a
            choice or a number is out of range, ``cu_seqlens`` does not ascend from 0 to T, or
            Newton's method failed with ``on_fail="raise"``.
    """
    function = functools.partial(_op, cell=cell)
    if not isinstance(cell, str):
        function = getattr(cell, "rnn", None)
        if function is None:
            fail("rnn", f"cell must be a name or a recurra.Cell, got {type(cell).__name__}")
    return function(
        x,
        params,
        h0,
        algorithm=algorithm,
        chunk=chunk,
        max_passes=max_passes,
        on_fail=on_fail,
        return_states=return_states,
        reset=reset,
        cu_seqlens=cu_seqlens,
    )


def rnn_step(
    h: Tensor, x: Tensor, params: Tensor, *, cell: str, slots: Tensor | None = None
) -> Tensor:
    """One step of :func:`rnn`, updating the state in place.

    Args:
        h: states, (B, K, N), or (slots, K, N) with ``slots``; updated in place. float32 for 16-bit
            ``x``, otherwise the dtype of ``x``. No element may lie twice in memory or in an input,
            but for an ``x`` that is part of ``h`` where there are no slots.
        x: (B, G, N).
        params: (P, N).
        cell: name of the cell.
        slots: (B,) int32 or int64, which state each row uses, none twice; a row whose index is
            negative changes nothing and returns zeros.

    Returns:
        y, (B, N), in the dtype of ``x``.

    Raises:
        RuntimeError: wrong shape, dtype or device, an unknown cell, a slot out of range or
            repeated, or gradients are enabled and an input requires one.
    """
    if not isinstance(cell, str):
        fail("rnn_step", "cell must be the name of one; a recurra.Cell steps in rnn with T = 1")
    return _step_op(h, x, params, cell=cell, slots=slots)


def check_sizes(
    op: str, info: CellInfo, x: Tensor, params: Tensor | None, state_name: str, h: Tensor | None
) -> None:
    """Refuses tensors that have not the rows of the cell; those that are None are not looked at."""
    sizes = [
        ("x", x, x.dim() - 2, "G", "inputs", info.inputs),
        ("params", params, 0, "P", "parameters", info.params),
        (state_name, h, 1, "K", "states", info.states),
    ]
    for argument, tensor, dim, letter, what, names in sizes:
        if tensor is not None and tensor.shape[dim] != len(names):
            fail(
                op,
                f"{argument} must have {letter} = {len(names)} for the {what} of {info.name} "
                f"({', '.join(names)}), got {tuple(tensor.shape)}",
            )


def _check_cell(
    op: str, name: str | CellInfo, x: Tensor, params: Tensor, state_name: str, h: Tensor | None
) -> CellInfo:
    info = name if isinstance(name, CellInfo) else cells().get(name)
    if info is None:
        fail(op, f'cell must be one of {", ".join(cells())}, got "{name}"')
    check_sizes(op, info, x, params, state_name, h)
    return info


def _one_of(op: str, name: str, got: str, known: tuple[str, ...]) -> None:
    if got not in known:
        listed = ", ".join(f'"{k}"' for k in known)
        fail(op, f'{name} must be one of {listed}, got "{got}"')


def check_options(
    op: str, algorithm: str, on_fail: str, chunk: int | None, max_passes: int | None
) -> None:
    """Refuses choices that there are not and numbers that are out of range."""
    _one_of(op, "algorithm", algorithm, ("auto", "sequential", "newton", "newton-global"))
    _one_of(op, "on_fail", on_fail, ("sequential", "raise", "warn"))
    for name, number in (("chunk", chunk), ("max_passes", max_passes)):
        if number is not None and number < 1:
            fail(op, f"{name} must be at least 1, got {number}")


def _fake_forward(
    op,
    x,
    params,
    h0=None,
    *,
    cell,
    algorithm="auto",
    chunk=None,
    max_passes=None,
    on_fail="sequential",
    return_states=False,
    reset=None,
    cu_seqlens=None,
):
    sizes = check(op, x=x, params=params, h0=h0, reset=reset, cu_seqlens=cu_seqlens)
    info = _check_cell(op, cell, x, params, "h0", h0)
    check_options(op, algorithm, on_fail, chunk, max_passes)
    states, order = len(info.states), memory_order(x)
    batch, time, _, channels = x.shape
    if return_states:
        y = empty_ordered(x, (batch, time, states, channels), order)
    else:
        order = [min(n, 2) for n in order if n != 2]
        y = empty_ordered(x, (batch, time, channels), order)
    held = state_dtype(x.dtype)
    return (
        y,
        x.new_empty(sizes["S"], states, channels, dtype=held),
        x.new_empty((), dtype=torch.int32),
        x.new_empty((), dtype=held),
    )


@_register.fake("rnn")
def _(*args, **options):
    return _fake_forward("rnn", *args, **options)


@_register.fake("_rnn_save")
def _(x, *args, cu_seqlens=None, **options):
    out = _fake_forward("_rnn_save", x, *args, cu_seqlens=cu_seqlens, **options)
    h_last = out[1]
    batch, time, _, channels = x.shape
    if cu_seqlens is None:
        chunks = batch * ((time + _CHUNK - 1) // _CHUNK)
    else:
        chunks = time // _CHUNK + h_last.shape[0]
    padded = (channels + _LANES - 1) // _LANES * _LANES
    return *out, h_last.new_empty(chunks, h_last.shape[1], padded)


@_register.fake("_rnn_backward")
def _(
    dy,
    dh_last,
    saved,
    x,
    params,
    h0=None,
    *,
    cell,
    return_states=False,
    reset=None,
    cu_seqlens=None,
):
    op = "_rnn_backward"
    given = {"dy": dy, "dh_last": dh_last, "x": x, "params": params, "h0": h0}
    sizes = check(op, **given, reset=reset, cu_seqlens=cu_seqlens)
    info = _check_cell(op, cell, x, params, "h0", h0)
    if h0 is None:
        shape = (sizes["S"], len(info.states), x.shape[3])
        dh0 = x.new_empty(shape, dtype=state_dtype(x.dtype))
    else:
        dh0 = torch.empty_like(h0)
    return torch.empty_like(x), torch.empty_like(params), dh0


@_register.fake("rnn_step")
def _(h, x, params, *, cell, slots=None):
    op = "rnn_step"
    check(op, h=h, x=x, params=params, slots=slots)
    _check_cell(op, cell, x, params, "h", h)
    check_slots(op, x.shape[0], h, slots)
    order = [min(n, 1) for n in memory_order(x) if n != 1]
    return empty_ordered(x, (x.shape[0], x.shape[2]), order)


_SAVED = ("x", "params", "h0", "reset", "cu_seqlens")


def _setup(ctx, inputs, output):
    ctx.cell, ctx.return_states = inputs["cell"], inputs["return_states"]
    _, _, passes, mismatch, saved = output
    ctx.mark_non_differentiable(passes, mismatch)
    ctx.save_for_backward(*(inputs[k] for k in _SAVED), saved)


def _backward(ctx, dy, dh_last, *_):
    x, params, h0, reset, cu_seqlens, saved = ctx.saved_tensors
    options = {"cell": ctx.cell, "return_states": ctx.return_states}
    dx, dparams, dh0 = _backward_op(
        dy, dh_last, saved, x, params, h0, reset=reset, cu_seqlens=cu_seqlens, **options
    )
    gradients = {"x": dx, "params": dparams}
    return gradients if h0 is None else gradients | {"h0": dh0}


_register.autograd("_rnn_save", _setup, _backward)
_register.autograd_through("rnn", "_rnn_save", outputs=4)
_register.no_second_derivative("_rnn_backward", "rnn")
_register.autocast("rnn", activations=(0,))
_register.autocast("rnn_step", activations=(1,))
_register.no_grad_step("rnn_step", "rnn")
