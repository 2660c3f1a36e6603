"""Cases of linear recurrences beside the real scan: complex numbers, gates that are constant over
time, and minGRU against its formulation in logarithms."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import recurra
from recurra.bench.floors import Floor
from recurra.bench.problems import (
    BACKWARD,
    FORWARD,
    Built,
    Case,
    Target,
    assert_close,
)

_SHAPE = (8, 2048, 512)
_MINGRU_SHAPE = (8, 2048, 1024)
LOG_SPACE = "logcumsumexp"


def _inputs(constant: bool) -> tuple[Tensor, Tensor]:
    """Gates inside the unit circle, (B, T, D) or (1, 1, D), and inputs."""
    torch.manual_seed(0)
    B, T, D = _SHAPE
    shape = (1, 1, D) if constant else (B, T, D)
    return (
        torch.polar(torch.rand(shape), 6 * torch.rand(shape)),
        torch.randn(B, T, D, dtype=torch.complex64),
    )


def _gradients(function: Callable, dy: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    return torch.autograd.grad(function(*leaves), leaves, dy)


def _scan(a: Tensor, b: Tensor) -> Tensor:
    return recurra.linear_scan(a, b)[0]


def _reference(a: Tensor, b: Tensor) -> Tensor:
    return recurra.reference.linear_scan(a, b)[0]


def _complex(constant: bool, backward: bool, with_peers: bool) -> Built:
    a, b = _inputs(constant)
    dy = torch.randn_like(b)

    def results(function: Callable, *x: Tensor) -> tuple[Tensor, ...]:
        *inputs, cotangent = x
        return _gradients(function, cotangent, *inputs) if backward else (function(*inputs),)

    def verify() -> float:
        part = [x[:2, :256, :8] for x in (a, b, dy)]
        wide = [x.to(torch.complex128) for x in part]
        found = zip(
            results(_scan, *part),
            results(_reference, *wide),
            results(_reference, *part),
            strict=True,
        )
        return max(
            assert_close(f"result {i}", *(torch.view_as_real(x) for x in each))
            for i, each in enumerate(found)
        )

    n = b.numel()
    forward = (16 if constant else 24) * n
    moved = forward + ((24 if constant else 40) * n if backward else 0)
    return Built(
        verify,
        {"recurra": lambda: results(_scan, a, b, dy)},
        Floor(bytes=moved, footprint=forward),
    )


def _log_space(u: Tensor, v: Tensor) -> Tensor:
    """minGRU as its paper's appendix solves it: logarithms, a cumulative sum, logcumsumexp."""
    log_gate, log_update = -F.softplus(u), -F.softplus(-u)
    log_candidate = torch.where(v >= 0, (F.relu(v) + 0.5).log(), -F.softplus(-v))
    kept = log_gate.cumsum(1)
    return (kept + torch.logcumsumexp(log_update + log_candidate - kept, 1)).exp()


def _mingru(with_peers: bool) -> Built:
    torch.manual_seed(0)
    B, T, N = _MINGRU_SHAPE
    x, scale = torch.randn(B, T, 2, N), torch.ones(1, N)

    def ours(x: Tensor) -> Tensor:
        return recurra.rnn(x, scale[:, : x.shape[-1]], cell="mingru", algorithm="sequential")[0]

    def theirs(x: Tensor) -> Tensor:
        return _log_space(x[:, :, 0], x[:, :, 1])

    def verify() -> float:
        part = x[:1, :256, :, :8]
        return assert_close("the output", ours(part), theirs(part.double()), theirs(part))

    n, dy = B * T * N, torch.randn(B, T, N)
    built = Built(
        verify,
        {"recurra": lambda: _gradients(ours, dy, x)},
        Floor(bytes=4 * n * (3 + 5), footprint=24 * n, work={"sigmoid": 4 * n}),
    )
    if with_peers:
        built.peers = {LOG_SPACE: lambda: _gradients(theirs, dy, x)}
    return built


def cases() -> list[Case]:
    """All of them."""
    out = []
    for constant in (False, True):
        for backward in (False, True):
            kind = "complex" + "-constant" * constant
            out.append(
                Case(
                    "linear_scan",
                    _SHAPE,
                    f"{kind}/{BACKWARD if backward else FORWARD}",
                    functools.partial(_complex, constant, backward),
                    (Target("recurra", "floor", 1.6 if backward else 1 / 0.7),),
                )
            )
    targets = (Target("recurra", "floor", 1.6), Target(LOG_SPACE, "recurra", 30, True))
    out.append(Case("rnn", _MINGRU_SHAPE, f"mingru/{BACKWARD}", _mingru, targets))
    return out
