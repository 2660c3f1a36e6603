"""Real-time recurrent learning as it was written down, one step at a time, in plain torch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from recurra.ops.rtrl import Gradients, Sensitivities
from recurra.reference import cells


def _linear(x: Tensor, h: Tensor, p: Tensor) -> Tensor:
    return p * h + x


def _linear_gated(x: Tensor, h: Tensor, p: Tensor) -> Tensor:
    return x[:1] * h + x[1:]


def _linear_complex(x: Tensor, h: Tensor, p: Tensor) -> Tensor:
    (re, im), (a, b) = h, p
    return torch.stack([a * re - b * im, a * im + b * re]) + x


_STEPS = {
    "linear": _linear,
    "linear-gated": _linear_gated,
    "linear-complex": _linear_complex,
}


def step_of(cell: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """``step(x, h, p) -> h``, one row a name, pointwise in the other dimensions."""
    return _STEPS.get(cell) or getattr(cells, cell)


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
    """The steps that :func:`recurra.rtrl_update` takes at once; returns new tensors."""
    step, (weight, bias, of_params) = step_of(cell), S
    batch, _, _, channels = x.shape
    if h0 is None:
        h0 = x.new_zeros(batch, weight.shape[1], channels)
    h = h0.transpose(0, 1)
    p = params.to(x.dtype)[:, None].expand(-1, batch, -1)
    for t in range(x.shape[1]):
        if reset is not None:
            h = torch.where(reset[:, t, None], 0, h)
        leaves = [v.detach().requires_grad_() for v in (h, x[:, t].transpose(0, 1), p)]
        with torch.enable_grad():
            after = step(leaves[1], leaves[0], leaves[2])
            rows = [
                torch.autograd.grad(
                    row.sum(), leaves, retain_graph=True, allow_unused=True, materialize_grads=True
                )
                for row in after
            ]
        # (B, K, rows, N): of the states to the states before, to the inputs and to the parameters.
        of_state, of_x, direct = (
            torch.stack(each).permute(2, 0, 1, 3) for each in zip(*rows, strict=True)
        )
        if reset is not None:
            of_state = torch.where(reset[:, t, None, None, None], 0, of_state)
        weight = torch.einsum("bkjn,bjgnd->bkgnd", of_state, weight) + torch.einsum(
            "bkgn,bd->bkgnd", of_x, u[:, t]
        )
        bias = torch.einsum("bkjn,bjgn->bkgn", of_state, bias) + of_x
        of_params = torch.einsum("bkjn,bjpn->bkpn", of_state, of_params) + direct
        h = after.detach()
    return Sensitivities(weight, bias, of_params)


def rtrl_gradient(S: Sensitivities, dh0: Tensor, *, reduce: str = "sum") -> Gradients:
    """:func:`recurra.rtrl_gradient` as three sums."""
    out = "" if reduce == "sum" else "b"
    return Gradients(
        torch.einsum(f"bkn,bkgnd->{out}gnd", dh0, S.weight),
        torch.einsum(f"bkn,bkgn->{out}gn", dh0, S.bias),
        torch.einsum(f"bkn,bkpn->{out}pn", dh0, S.params),
    )
