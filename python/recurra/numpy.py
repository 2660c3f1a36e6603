"""The ops on NumPy arrays: kernels, checks and bits of the functions of `recurra`, but no tensors.

Arrays may have any strides and be read-only, in the byte order of the machine. bfloat16 is that of
ml_dtypes. Results are new arrays in the memory order that the torch ops give. Bad input raises
ValueError, or TypeError for what is no array, in the words of the torch ops.
"""

from __future__ import annotations

from collections.abc import Callable

from numpy import ndarray

from recurra import ops
from recurra._documentation import documentation

try:
    from recurra import _native
except ImportError as error:
    raise ImportError(
        "recurra.numpy needs recurra._native, which is not built: install pybind11, then recurra "
        "again"
    ) from error

__all__ = [
    "block_scan",
    "block_scan_step",
    "causal_conv1d",
    "causal_conv1d_step",
    "linear_scan",
    "linear_scan_step",
    "rnn",
    "rnn_step",
    "selective_scan",
    "selective_scan_step",
    "softmax_scan",
    "softmax_scan_step",
]

_call = _native.call
# So that torch.set_num_threads holds here as well.
_native.follow_torch()


def _of(like: Callable) -> Callable[[Callable], Callable]:
    def describe(function: Callable) -> Callable:
        function.__doc__ = documentation(like)
        return function

    return describe


@_of(ops.linear_scan)
def linear_scan(
    a: ndarray,
    b: ndarray,
    h0: ndarray | None = None,
    *,
    log_a: bool = False,
    reverse: bool = False,
    cu_seqlens: ndarray | None = None,
) -> tuple[ndarray, ndarray]:
    return _call("linear_scan", a, b, h0, log_a, reverse, cu_seqlens)


@_of(ops.linear_scan_step)
def linear_scan_step(
    h: ndarray, a: ndarray, b: ndarray, *, log_a: bool = False, slots: ndarray | None = None
) -> ndarray:
    return _call("linear_scan_step", h, a, b, log_a, slots)


@_of(ops.block_scan)
def block_scan(
    A: ndarray,
    b: ndarray,
    h0: ndarray | None = None,
    *,
    reverse: bool = False,
    cu_seqlens: ndarray | None = None,
) -> tuple[ndarray, ndarray]:
    return _call("block_scan", A, b, h0, reverse, cu_seqlens)


@_of(ops.block_scan_step)
def block_scan_step(h: ndarray, A: ndarray, b: ndarray, *, slots: ndarray | None = None) -> ndarray:
    return _call("block_scan_step", h, A, b, slots)


@_of(ops.causal_conv1d)
def causal_conv1d(
    x: ndarray,
    weight: ndarray,
    bias: ndarray | None = None,
    h0: ndarray | None = None,
    *,
    activation: str | None = None,
    cu_seqlens: ndarray | None = None,
) -> tuple[ndarray, ndarray]:
    return _call("causal_conv1d", x, weight, bias, h0, activation, cu_seqlens)


@_of(ops.causal_conv1d_step)
def causal_conv1d_step(
    h: ndarray,
    x: ndarray,
    weight: ndarray,
    bias: ndarray | None = None,
    *,
    activation: str | None = None,
    slots: ndarray | None = None,
) -> ndarray:
    return _call("causal_conv1d_step", h, x, weight, bias, activation, slots)


@_of(ops.selective_scan)
def selective_scan(
    u: ndarray,
    delta: ndarray,
    A: ndarray,
    B: ndarray,
    C: ndarray,
    D: ndarray | None = None,
    z: ndarray | None = None,
    delta_bias: ndarray | None = None,
    *,
    delta_softplus: bool = False,
    h0: ndarray | None = None,
    cu_seqlens: ndarray | None = None,
) -> tuple[ndarray, ndarray]:
    return _call(
        "selective_scan", u, delta, A, B, C, D, z, delta_bias, delta_softplus, h0, cu_seqlens
    )


@_of(ops.selective_scan_step)
def selective_scan_step(
    h: ndarray,
    u: ndarray,
    delta: ndarray,
    A: ndarray,
    B: ndarray,
    C: ndarray,
    D: ndarray | None = None,
    z: ndarray | None = None,
    delta_bias: ndarray | None = None,
    *,
    delta_softplus: bool = False,
    slots: ndarray | None = None,
) -> ndarray:
    return _call(
        "selective_scan_step", h, u, delta, A, B, C, D, z, delta_bias, delta_softplus, slots
    )


@_of(ops.softmax_scan)
def softmax_scan(
    s: ndarray,
    v: ndarray,
    h0: ndarray | None = None,
    *,
    decay: ndarray | None = None,
    bonus: ndarray | None = None,
    cu_seqlens: ndarray | None = None,
) -> tuple[ndarray, ndarray]:
    return _call("softmax_scan", s, v, h0, decay, bonus, cu_seqlens)


@_of(ops.softmax_scan_step)
def softmax_scan_step(
    h: ndarray,
    s: ndarray,
    v: ndarray,
    *,
    decay: ndarray | None = None,
    bonus: ndarray | None = None,
    slots: ndarray | None = None,
) -> ndarray:
    return _call("softmax_scan_step", h, s, v, decay, bonus, slots)


@_of(ops.rnn)
def rnn(
    x: ndarray,
    params: ndarray,
    h0: ndarray | None = None,
    *,
    cell: str,
    algorithm: str = "auto",
    chunk: int | None = None,
    max_passes: int | None = None,
    on_fail: str = "sequential",
    return_states: bool = False,
    reset: ndarray | None = None,
    cu_seqlens: ndarray | None = None,
) -> tuple[ndarray, ndarray, ndarray, ndarray]:
    return _call(
        "rnn",
        x,
        params,
        h0,
        cell,
        algorithm,
        chunk,
        max_passes,
        on_fail,
        return_states,
        reset,
        cu_seqlens,
    )


@_of(ops.rnn_step)
def rnn_step(
    h: ndarray, x: ndarray, params: ndarray, *, cell: str, slots: ndarray | None = None
) -> ndarray:
    return _call("rnn_step", h, x, params, cell, slots)
