"""What takes the place of the functions that transformers lets kernel packages replace.

Each is made of the torch function, which goes on taking what recurra's does not, such as other
activations, and of the implementation that was in its place, which keeps the tensors that recurra
does not serve.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from recurra._library import served
from recurra.compat.causal_conv1d import causal_conv1d_fn, causal_conv1d_update
from recurra.compat.fla.modules.convolution import causal_conv1d
from recurra.compat.mamba_ssm import selective_scan_fn
from recurra.compat.mamba_ssm.ops.triton.selective_state_update import selective_state_update

_ACTIVATIONS = (None, "silu", "swish")


def takes(func_name: str, layer: nn.Module) -> bool:
    """Whether the replacement of a hook serves this layer."""
    return not func_name.startswith("causal_conv1d") or (
        getattr(layer, "activation", None) in _ACTIVATIONS
    )


def _convolution(torch_function: Callable, former: Callable) -> Callable:
    def convolution(
        hidden_states: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        activation: str | None = None,
        seq_idx: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        packed = cu_seqlens is not None or seq_idx is not None
        if packed and _scans(torch_function):
            raise ValueError("the scans of this model can't keep packed sequences apart")
        if not packed and not served(hidden_states):
            return former(hidden_states, weight, bias, activation=activation)
        if cu_seqlens is not None and seq_idx is None:
            rows, ends = hidden_states.transpose(1, 2), _ends(cu_seqlens, hidden_states.shape[2])
            y, _ = causal_conv1d(rows, weight, bias, activation=activation, cu_seqlens=ends)
            return y.transpose(1, 2)
        fits = activation in _ACTIVATIONS and weight.shape[1] > 1
        if not fits and not packed:
            return torch_function(hidden_states, weight, bias, activation)
        return causal_conv1d_fn(hidden_states, weight, bias, seq_idx, activation=activation)

    return convolution


def _ends(cu_seqlens: Tensor, length: int) -> Tensor:
    """The ends of sequences, from 0 to ``length`` whatever is missing."""
    first, last = cu_seqlens.new_zeros(1), cu_seqlens.new_full((1,), length)
    return torch.cat([first, cu_seqlens[1:].clamp(max=length), last])


def _convolution_update(torch_function: Callable, former: Callable) -> Callable:
    def convolution_update(
        hidden_states: Tensor,
        conv_state: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        activation: str | None = None,
    ) -> Tensor:
        if not served(hidden_states):
            return former(hidden_states, conv_state, weight, bias, activation)
        if activation in _ACTIVATIONS and weight.shape[1] > 1:
            return causal_conv1d_update(hidden_states, conv_state, weight, bias, activation)
        return torch_function(hidden_states, conv_state, weight, bias, activation)

    return convolution_update


def _scans(torch_function: Callable) -> bool:
    """Whether the file of a convolution has Mamba's scan, which gets no ``seq_idx``."""
    return "mamba_selective_scan" in torch_function.__globals__


def _inner(torch_function: Callable, former: Callable) -> Callable:
    # transformers' models go on by convolution and scan where this returns None, with the same
    # kernels. mamba_inner_fn itself knows no padding mask.
    def inner(*args) -> None:
        return None

    return inner


def _scan(torch_function: Callable, former: Callable) -> Callable:
    def scan(
        hidden_states: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None = None,
        z: Tensor | None = None,
        delta_bias: Tensor | None = None,
        delta_softplus: bool = False,
        return_last_state: bool = False,
    ):
        args = (hidden_states, dt, A, B, C, D, z, delta_bias, delta_softplus, return_last_state)
        if not served(hidden_states):
            return former(*args)
        rows = hidden_states, dt, B, C, z
        wide = functools.reduce(torch.promote_types, (t.dtype for t in rows if t is not None))
        u, dt, B, C, z = (None if t is None else t.to(wide) for t in rows)
        return selective_scan_fn(
            u, dt, A, B, C, D, z, delta_bias, delta_softplus, return_last_state
        )

    return scan


def _update(torch_function: Callable, former: Callable) -> Callable:
    def update(
        state: Tensor,
        hidden_states: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None = None,
        z: Tensor | None = None,
        dt_bias: Tensor | None = None,
        dt_softplus: bool = False,
    ) -> Tensor:
        if not served(hidden_states):
            return former(
                state, hidden_states, dt, A, B, C, D, z=z, dt_bias=dt_bias, dt_softplus=dt_softplus
            )
        return selective_state_update(state, hidden_states, dt, A, B, C, D, z, dt_bias, dt_softplus)

    return update


BY_NAME: dict[str, Callable[[Callable, Callable], Callable]] = {
    "causal_conv1d_fn": _convolution,
    "causal_conv1d_update": _convolution_update,
    "mamba_inner_fn": _inner,
    "selective_scan_fn": _scan,
    "selective_state_update": _update,
}
