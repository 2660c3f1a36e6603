"""The ops on arrays of other libraries: in JAX beside what JAX has, and from NumPy."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

import recurra
from recurra.bench import peers
from recurra.bench.cases import LINEAR_SHAPES, SELECTIVE_SHAPES, selective_inputs
from recurra.bench.problems import BACKWARD, FORWARD, JAX, NUMPY, Built, Case, Measured, Target
from recurra.bench.timing import per_call

_TORCH = "torch op"
_CALLS = 500


def _inputs(op: str, shape: tuple[int, ...]) -> dict[str, Tensor]:
    torch.manual_seed(0)
    if op == "selective_scan":
        return selective_inputs(*shape)
    return {"a": torch.rand(shape), "b": torch.randn(shape)}


def _jax(op: str, shape: tuple[int, ...], kind: str, with_peers: bool) -> Built | list[Measured]:
    """Ours under jit beside the torch op, whose bits it must have, and beside JAX's scans."""
    try:
        import recurra.jax as rj
    except ImportError as error:
        return [Measured(math.nan, "x the time of the torch op", None, str(error))]
    inputs, backward = _inputs(op, shape), kind == BACKWARD
    options = {"delta_softplus": True} if op == "selective_scan" else {}
    leaves = {k: v.detach().requires_grad_(backward) for k, v in inputs.items()}

    def ours(x):
        return getattr(rj, op)(**x, **options)[0]

    def theirs():
        y = getattr(recurra, op)(**leaves, **options)[0]
        if not backward:
            return y
        return y, torch.autograd.grad(y, leaves.values(), dy)

    dy = getattr(recurra, op)(**inputs, **options)[0]  # as peers._jax_call has it
    run = peers.in_jax(ours, inputs, backward)

    def verify() -> float:
        got, want = run(), theirs()
        pairs = [(got, want)]
        if backward:
            pairs = [(got[0], want[0])]
            pairs += [(got[1][0][k], g) for k, g in zip(leaves, want[1], strict=True)]
        for x, y in pairs:
            if not torch.equal(torch.tensor(x.__array__()), y.detach()):
                raise AssertionError("JAX and torch differ")
        return 0.0

    built = Built(verify, {"recurra": run, _TORCH: theirs}, None)
    if with_peers:
        states = math.prod(shape)
        built.peers, built.absent = peers.jax_scans(op, inputs, states, backward)
    return built


def _numpy(with_peers: bool) -> Built:
    """What a call costs beyond its work, of which (1, 16, 16) has next to none."""
    import recurra.numpy as rnp

    tensors = _inputs("linear_scan", (1, 16, 16))
    a, b = (x.numpy() for x in tensors.values())

    def verify() -> float:
        got = torch.from_numpy(rnp.linear_scan(a, b)[0])
        if not torch.equal(got, recurra.linear_scan(**tensors)[0]):
            raise AssertionError("NumPy and torch differ")
        return 0.0

    ours = per_call(lambda: rnp.linear_scan(a, b), _CALLS)
    theirs = per_call(lambda: recurra.linear_scan(**tensors), _CALLS)
    return Built(verify, {"recurra": ours, _TORCH: theirs}, None, calls=_CALLS)


def cases() -> list[Case]:
    """The shapes of the ops' own cases."""
    found = []
    for op, shapes in (("linear_scan", LINEAR_SHAPES), ("selective_scan", SELECTIVE_SHAPES)):
        for shape in shapes:
            for kind in (FORWARD, BACKWARD):
                least = 8 if kind == FORWARD else 12
                targets = (
                    Target(_TORCH, "recurra", 1 / 1.1, True),
                    Target(peers.JAX_LAX, "recurra", least, True),
                    Target(peers.JAX_LAX_BATCH_FIRST, "recurra", least, True),
                    Target(peers.JAX_ASSOCIATIVE, "recurra", least, True),
                )
                name = f"{op}/{'x'.join(map(str, shape))}/{kind}"
                build = functools.partial(_jax, op, shape, kind)
                found.append(Case(JAX, (), name, build, targets))
    target = Target("recurra", "microseconds", 20)
    return [*found, Case(NUMPY, (), "linear_scan/1x16x16", _numpy, (target,))]
