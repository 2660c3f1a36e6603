"""Cells in Python, one of each structure, with samples and the loop that they are compared with."""

from __future__ import annotations

import pytest
import torch

import recurra


def gru(x, h, p):
    """Light gated unit: inputs gate, candidate."""
    z = torch.sigmoid(p[0] * h[0] + x[0])
    return ((1 - z) * h[0] + z * torch.tanh(p[1] * h[0] + x[1]))[None]


def oscillator(x, h, p):
    """A damped pendulum, semi-implicit Euler: states angle, speed."""
    angle, speed = h
    stiffness, damping = p
    speed = speed + 0.3 * (x[0] - torch.sin(stiffness * angle) - damping * speed)
    return torch.stack([angle + 0.3 * speed, speed])


def elman(x, h, p):
    """A dense layer: p a dictionary with a matrix and a bias."""
    return torch.tanh(x + h @ p["W"].T + p["b"])


GRU = recurra.Cell(gru, inputs=("gate", "candidate"), params=2)
OSCILLATOR = recurra.Cell(
    oscillator,
    inputs=1,
    states=("angle", "speed"),
    params=("stiffness", "damping"),
    output="angle",
    structure="block",
)
ELMAN = recurra.Cell(elman, inputs=1, structure="dense")
OWN = {"diagonal": GRU, "block": OSCILLATOR, "dense": ELMAN}
every_structure = pytest.mark.parametrize("structure", OWN)


def normal(*shape, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def sample(structure: str, B=2, T=40, N=3, S=None, dtype=torch.float64):
    """x, the tensors of params, how the cell wants them, and h0."""
    cell = OWN[structure]
    x = normal(B, T, len(cell.info.inputs), N, dtype=dtype)
    h0 = normal(S or B, len(cell.info.states), N, dtype=torch.float64, seed=1).to(
        torch.float32 if dtype.itemsize == 2 else dtype
    )
    if structure == "dense":
        leaves = [0.4 * normal(N, N, seed=2), 0.3 * normal(N, seed=3)]
        pack = lambda leaves: dict(zip(("W", "b"), leaves, strict=True))  # noqa: E731
    else:
        leaves = [0.5 * normal(2, N, seed=2)]
        if structure == "block":
            leaves[0].abs_()
        pack = lambda leaves: leaves[0]  # noqa: E731
    return x, [leaf.to(dtype) for leaf in leaves], pack, h0


def loop(cell, x, params, h0, reset=None, cu_seqlens=None):
    """All states and the last ones, by a loop over single steps that autograd records."""
    B, T = x.shape[:2]
    ends = None if cu_seqlens is None else cu_seqlens.tolist()
    spans = [(b, 0, T) for b in range(B)]
    if ends is not None:
        spans = [(0, a, b) for a, b in zip(ends[:-1], ends[1:], strict=True)]
    states, last = [], []
    for s, (b, begin, end) in enumerate(spans):
        h = h0[s]
        for t in range(begin, end):
            if reset is not None and reset[b, t]:
                h = torch.zeros_like(h)
            if cell.structure == "dense":
                h = cell.step(x[b, t], h, params)
            else:
                h = cell.step(x[b, t, :, None], h[:, None], params[:, None])[:, 0]
            states.append(h)
        last.append(h)
    return torch.stack(states).view(B, T, *h0.shape[1:]), torch.stack(last)


def close(got, want, tolerance=1e-12):
    assert (got - want).abs().max() <= tolerance * max(1, want.abs().max())
