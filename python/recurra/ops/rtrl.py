"""``rtrl_update`` and ``rtrl_gradient``: exact sensitivities of channel-wise recurrences, carried
from chunk to chunk."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from recurra._check import check, dtype_name, fail
from recurra.ops import _register
from recurra.ops.block_scan import block_scan
from recurra.ops.linear_scan import linear_scan
from recurra.ops.rnn import CellInfo, _check_cell, cells, rnn

_update_op = torch.ops.recurra._rtrl_update.default
_advance_op = torch.ops.recurra._rtrl_advance.default
_gradient_op = torch.ops.recurra._rtrl_gradient.default


class Sensitivities(NamedTuple):
    """Derivatives of the states of every sample to the parameters of a layer.

    The layer is x = W u + b for (B, T, D) inputs u, then a recurrence of x. A state depends on the
    parameters of its own channel alone.

    Attributes:
        weight: (B, K, G, N, D), d h[b, k, n] / d W[g, n, d].
        bias: (B, K, G, N), d h[b, k, n] / d b[g, n].
        params: (B, K, P, N), d h[b, k, n] / d params[p, n].
    """

    weight: Tensor
    bias: Tensor
    params: Tensor


class Gradients(NamedTuple):
    """Gradients of the parameters of a layer; per sample with a dimension B in front.

    Attributes:
        weight: (G, N, D).
        bias: (G, N).
        params: (P, N).
    """

    weight: Tensor
    bias: Tensor
    params: Tensor


_LINEAR = {
    "linear": CellInfo("linear", ("b",), ("h",), ("a",), "h", {}),
    "linear-gated": CellInfo("linear-gated", ("a", "b"), ("h",), (), "h", {}),
    "linear-complex": CellInfo(
        "linear-complex", ("re", "im"), ("re", "im"), ("re", "im"), "re", {}
    ),
}


def recurrences() -> dict[str, CellInfo]:
    """What :func:`rtrl_update` takes for ``cell``: :func:`recurra.cells` and the linear ones.

    ``linear`` is h_t = a h_{t-1} + b_t with a parameter a; ``linear-gated`` the same with an input
    a_t; ``linear-complex`` has complex a, b and h, each as its real and imaginary part.
    """
    return cells() | _LINEAR


def recurrence(cell: str, op: str = "rtrl_update") -> CellInfo:
    """One of :func:`recurrences`.

    Raises:
        RuntimeError: there is none of that name; lists those that there are.
    """
    known = recurrences()
    if cell not in known:
        fail(op, f'cell must be one of {", ".join(known)}, got "{cell}"')
    return known[cell]


def initial(
    cell: str,
    batch: int,
    inputs: int,
    channels: int,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Sensitivities:
    """Sensitivities of states that do not depend on the parameters: zeros.

    Args:
        cell: one of :func:`recurrences`.
        batch: samples, B.
        inputs: of the layer, D.
        channels: of the recurrence, N.
        dtype: float32 or float64; torch's default when None.
        device: where.

    Raises:
        RuntimeError: ``cell`` is unknown, or a size is negative.
    """
    info = recurrence(cell, "initial")
    for name, size in (("batch", batch), ("inputs", inputs), ("channels", channels)):
        if size < 0:
            fail("initial", f"{name} must be at least 0, got {size}")
    K, G, P = len(info.states), len(info.inputs), len(info.params)
    shapes = (
        (batch, K, G, channels, inputs),
        (batch, K, G, channels),
        (batch, K, P, channels),
    )
    return Sensitivities(*(torch.zeros(shape, dtype=dtype, device=device) for shape in shapes))


def rtrl_update(
    S: Sensitivities,
    u: Tensor,
    x: Tensor,
    params: Tensor,
    h0: Tensor | None = None,
    *,
    cell: str,
    reset: Tensor | None = None,
) -> Sensitivities:
    r"""Carries sensitivities over a chunk of T steps, exactly and in place.

    .. math::
        S^{(k)} \leftarrow \sum_j \frac{\partial h_T^{(k)}}{\partial h_0^{(j)}} S^{(j)}
        + \sum_t \frac{\partial h_T^{(k)}}{\partial x_t} u_t

    Real-time recurrent learning (Williams and Zipser 1989) is T = 1; because channels do not mix
    (Irie et al., arXiv 2305.19044; Zucchet et al., arXiv 2305.15947) a chunk of any length needs
    no more than a product of Jacobians and one matrix product, and the result is that of T single
    steps but for rounding. Not differentiable. The bits do not depend on the number of threads, on
    the instruction set, or on the other samples.

    Args:
        S: of the states ``h0``; contiguous tensors, which are overwritten. Zeros where ``h0`` does
            not depend on the parameters: :func:`recurra.rtrl.initial`.
        u: (B, T, D), the inputs of the layer.
        x: (B, T, G, N) = W u + b, the inputs of the recurrence; float32 or float64.
        params: (P, N), the parameters of the recurrence.
        h0: (B, K, N), the states before the chunk; zero when None.
        cell: one of :func:`recurra.rtrl.recurrences`.
        reset: (B, T) of bool; where True the state before that step is zero, and with it what it
            owed to the past.

    Returns:
        S, of the states after the chunk: the same tensors.

    Raises:
        RuntimeError: ``cell`` is unknown; a shape, dtype or device is wrong; S is not contiguous.
    """
    info = recurrence(cell)
    _check_type(S)
    with torch.no_grad():
        u = u.contiguous()
        if cell not in _LINEAR:
            _update_op(*S, u, x, params, h0, cell=cell, reset=reset)
            return S
        _check_update(info, *S, u, x, params, h0, reset)
        if x.shape[0] and x.shape[3]:
            _advance_op(*S, u, *_derivatives(cell, x, params, h0, reset))
    return S


def rtrl_gradient(S: Sensitivities, dh0: Tensor, *, reduce: str = "sum") -> Gradients:
    r"""What the parameters' past owes to a loss: :math:`\sum_k \mathrm{d}h_0^{(k)} S^{(k)}`.

    Added to the gradient that backpropagation gives within a chunk it is the gradient of the loss
    of the chunk without truncation. ``S`` is read once, and not at all where ``dh0`` is zero. Not
    differentiable.

    Args:
        S: of the states before the chunk.
        dh0: (B, K, N), the gradient of the loss of the chunk to these states.
        reduce: "sum" over samples, or "none".

    Returns:
        Gradients, each with a dimension B in front for "none".

    Raises:
        RuntimeError: a shape, dtype or device is wrong, or ``reduce`` is.
    """
    _check_type(S, "rtrl_gradient")
    if reduce not in ("sum", "none"):
        fail("rtrl_gradient", f'reduce must be "sum" or "none", got "{reduce}"')
    with torch.no_grad():
        found = Gradients(*_gradient_op(*S, dh0.contiguous(), reduce == "none"))
        return found if reduce == "none" else Gradients(*(g[0] for g in found))


def run(
    x: Tensor, params: Tensor, h0: Tensor | None, cell: str, reset: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The recurrence itself, differentiable: y (B, T, N), or (B, T, 2 N) with the real and then the
    imaginary parts for ``linear-complex``, and h_last (B, K, N)."""
    if cell not in _LINEAR:
        y, h_last, *_ = rnn(x, params, h0, cell=cell, reset=reset)
        return y, h_last
    batch, _, _, channels = x.shape
    if h0 is None:
        h0 = x.new_zeros(batch, 1 + (cell == "linear-complex"), channels)
    return _run_linear(cell, x, params, h0, reset)


def _run_linear(
    cell: str, x: Tensor, params: Tensor, h0: Tensor, reset: Tensor | None
) -> tuple[Tensor, Tensor]:
    """``params`` is (P, N) or, to tell samples apart, (B, P, N)."""
    params = params.expand(x.shape[0], *params.shape[-2:])
    if cell == "linear-complex":
        re, im = params.unbind(1)
        # Complex a as the matrix of its product with a number's real and imaginary part.
        A = torch.stack([re, -im, im, re], -1).unflatten(-1, (2, 2))[:, None]
        if reset is not None:
            A = torch.where(reset[..., None, None, None], 0, A)
        y, last = block_scan(A, x.transpose(2, 3), h0.transpose(1, 2))
        return y.transpose(2, 3).flatten(2), last.transpose(1, 2)
    a, b = x.unbind(2) if cell == "linear-gated" else (params, x[:, :, 0])
    if reset is not None:
        a = torch.where(reset[..., None], 0, a)
    y, last = linear_scan(a, b, h0[:, 0])
    return y, last[:, None]


def _derivatives(
    cell: str, x: Tensor, params: Tensor, h0: Tensor | None, reset: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Of the last states to the first ones, (K, B, K, N), to x, (K, B, T, G, N), and to the
    parameters of every sample, (K, B, P, N)."""
    batch, _, _, channels = x.shape
    params = params.to(x.dtype).expand(batch, *params.shape)
    if h0 is None:
        h0 = x.new_zeros(batch, 1 + (cell == "linear-complex"), channels)
    leaves = [t.detach().requires_grad_() for t in (h0, x, params)]
    with torch.enable_grad():
        h0, x, params = leaves
        _, last = _run_linear(cell, x, params, h0, reset)
        of_states = [
            torch.autograd.grad(
                last[:, k].sum(),
                leaves,
                retain_graph=True,
                allow_unused=True,
                materialize_grads=True,
            )
            for k in range(last.shape[1])
        ]
    return tuple(torch.stack(rows) for rows in zip(*of_states, strict=True))


def _check_type(S: Sensitivities, op: str = "rtrl_update") -> None:
    if not isinstance(S, Sensitivities):
        fail(op, f"S must be recurra.rtrl.Sensitivities, got {type(S).__name__}")


def _check_exact(op: str, name: str, x: Tensor) -> None:
    if x.dtype in (torch.bfloat16, torch.float16):
        fail(op, f"{name} must have dtype float32 or float64, got {dtype_name(x.dtype)}")


def _check_contiguous(op: str, **given: Tensor) -> None:
    for name, x in given.items():
        if not x.is_contiguous():
            fail(op, f"{name} must be contiguous")


def _check_update(info, S_weight, S_bias, S_params, u, x, params, h0, reset) -> None:
    op = "_rtrl_update"
    held = {"S_weight": S_weight, "S_bias": S_bias, "S_params": S_params}
    # What the cell wants comes first: S follows from it.
    check(op, x=x, params=params, h0=h0, reset=reset)
    _check_exact(op, "x", x)
    _check_cell(op, info, x, params, "h0", h0)
    check(op, x=x, params=params, u=u, **held)
    if S_weight.shape[1] != len(info.states):
        fail(
            op,
            f"S_weight must have K = {len(info.states)} for the states of {info.name} "
            f"({', '.join(info.states)}), got {tuple(S_weight.shape)}",
        )
    _check_contiguous(op, **held, u=u)


@_register.fake("_rtrl_update")
def _(S_weight, S_bias, S_params, u, x, params, h0=None, *, cell, reset=None):
    _check_update(recurrence(cell), S_weight, S_bias, S_params, u, x, params, h0, reset)


@_register.fake("_rtrl_advance")
def _(S_weight, S_bias, S_params, u, decay, factors, direct):
    op = "_rtrl_advance"
    given = {
        "S_weight": S_weight,
        "S_bias": S_bias,
        "S_params": S_params,
        "u": u,
        "decay": decay,
        "factors": factors,
        "direct": direct,
    }
    check(op, **given)
    _check_exact(op, "S_weight", S_weight)
    _check_contiguous(op, **given)


@_register.fake("_rtrl_gradient")
def _(S_weight, S_bias, S_params, dh0, each):
    op = "_rtrl_gradient"
    held = {"S_weight": S_weight, "S_bias": S_bias, "S_params": S_params}
    check(op, dh0=dh0, **held)
    _check_exact(op, "S_weight", S_weight)
    _check_contiguous(op, **held, dh0=dh0)
    rows = S_weight.shape[0] if each else 1
    return tuple(x.new_empty(rows, *x.shape[2:]) for x in held.values())


_INSTEAD = "recurra.rtrl.OnlineLearner, which is what learns with it"
_register.no_grad("_rtrl_update", _INSTEAD, state="S_weight")
_register.no_grad("_rtrl_advance", _INSTEAD, state="S_weight")
_register.no_grad("_rtrl_gradient", _INSTEAD)
