"""A chunk of real-time recurrent learning: the sensitivities of an eLSTM carried over it.

The floor is the bytes of the sensitivities, read and written, over the bandwidth, plus the matrix
product with the inputs of the chunk at the rate that torch's own has here.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

import torch
from torch import Tensor

import recurra
from recurra.bench import floors
from recurra.bench.floors import Floor
from recurra.bench.problems import Built, Target, assert_close, some
from recurra.rtrl import Sensitivities, initial

CELL = "elstm"
AXES = ("B", "T", "N", "D")
SHAPES = ((8, 32, 512, 512),)
LOOP = "torch loop over steps"
GRADIENT = "rtrl_gradient"
TARGETS = (Target("recurra", "floor", 2.0), Target(LOOP, "recurra", 10.0, at_least=True))


@dataclasses.dataclass(frozen=True)
class ChunkFloor(Floor):
    """Memory and a matrix product, one after the other.

    Attributes:
        shape: B, T, N and D.
    """

    shape: tuple[int, ...] = ()

    def seconds(self, measured: dict[str, float]) -> float:
        B, T, N, D = self.shape
        product = 2 * B * T * N * D / measured["torch matmul"] * 1e-9
        return self.bytes / floors.bandwidth(measured) + product

    def probes(self) -> dict[str, Callable[[], float]]:
        B, T, N, D = self.shape
        factors, u = torch.randn(B, 2 * N, T), torch.randn(B, T, D)
        out = torch.empty(B, 2 * N, D)

        def matmul() -> float:
            """Multiply-adds per nanosecond."""
            start = time.perf_counter()
            torch.bmm(factors, u, out=out)
            return 1e-9 * factors.numel() * D / (time.perf_counter() - start)

        return floors.stream_probes(self.footprint) | {"torch matmul": matmul}


def step_loop(weight: Tensor, bias: Tensor, params: Tensor, u: Tensor, x: Tensor, p: Tensor, c):
    """The steps of Irie et al. (arXiv 2305.19044) in place, in plain torch; S without K."""
    for u_t, x_t in zip(u.unbind(1), x.unbind(1), strict=True):
        f = torch.sigmoid(torch.addcmul(x_t[:, 0], p[0], c))
        z = torch.tanh(torch.addcmul(x_t[:, 1], p[1], c))
        of_x = torch.stack([(c - z) * f * (1 - f), (1 - f) * (1 - z * z)], 1)
        decay = (f + (of_x * p).sum(1))[:, None]
        weight.mul_(decay[..., None]).addcmul_(of_x[..., None], u_t[:, None, None])
        bias.mul_(decay).add_(of_x)
        params.mul_(decay).addcmul_(of_x, c[:, None])
        c = torch.lerp(z, c, f)


def build(shape: tuple[int, ...], with_peers: bool) -> Built:
    """The case of a shape."""
    B, T, N, D = shape
    S = initial(CELL, B, D, N, dtype=torch.float32)
    u, x = torch.randn(B, T, D) / D**0.5, torch.randn(B, T, 2, N)
    params, h0 = 0.5 * torch.randn(2, N), torch.randn(B, 1, N)
    dh0 = torch.randn(B, 1, N)

    def chunk() -> Sensitivities:
        return recurra.rtrl_update(S, u, x, params, h0, cell=CELL)

    def loop() -> None:
        step_loop(*(s[:, 0] for s in S), u, x, params, h0[:, 0])

    def verify() -> float:
        rows, channels = some(B, 2), some(N, 8)

        def part(y: Tensor, dtype: torch.dtype, dim: int = -1) -> Tensor:
            return y[rows].to(dtype).index_select(dim, torch.tensor(channels))

        worst = 0.0
        for run in (chunk, loop):
            for s in S:
                s.normal_()
            before = [part(s, torch.float64, d) for s, d in zip(S, (3, -1, -1), strict=True)]
            run()
            after = [part(s, s.dtype, d) for s, d in zip(S, (3, -1, -1), strict=True)]
            exact, plain = (
                recurra.reference.rtrl_update(
                    Sensitivities(*(s.to(dtype) for s in before)),
                    u[rows].to(dtype),
                    part(x, dtype),
                    params[:, channels].to(dtype),
                    part(h0, dtype),
                    cell=CELL,
                )
                for dtype in (torch.float64, torch.float32)
            )
            for name, got, e, p in zip(S._fields, after, exact, plain, strict=True):
                worst = max(worst, assert_close(f"S.{name}", got, e, p))
        return worst

    moved = S.weight.nbytes
    return Built(
        verify,
        {"recurra": chunk, GRADIENT: lambda: recurra.rtrl_gradient(S, dh0)},
        ChunkFloor(bytes=2 * moved, footprint=moved, shape=shape),
        # Always: it is what the target is a multiple of.
        {LOOP: loop},
    )
