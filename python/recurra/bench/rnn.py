"""The cases of ``rnn``: the sequential kernel against its floor and what users write themselves,
Newton's method against the sequential kernel, and whether ``auto`` picks the better of the two."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

import recurra
from recurra.bench import memory, peers
from recurra.bench.floors import Floor, module
from recurra.bench.problems import (
    BACKWARD,
    FORWARD,
    MEMORY,
    STEP,
    Built,
    Case,
    Measured,
    Problem,
    Target,
    assert_close,
    build,
)
from recurra.bench.timing import interleave, per_call

SHAPES = ((8, 512, 512), (64, 256, 256), (8, 2048, 1024))  # (B, T, N)

# Elementary functions of one step, by the loops whose rates are measured, and the most that
# forward, or both passes, may take beside the floor.
_WORK = {
    "paragru": ({"sigmoid": 2, "tanh": 1}, 2.0),
    "paralstm": ({"sigmoid": 2, "tanh": 2}, 2.5),
    "slstm": ({"sigmoid": 1, "tanh": 1, "softplus": 1, "exp": 2}, 2.5),
}


def inputs(cell: str, B: int, T: int, N: int, scale: float = 0.5) -> dict[str, Tensor]:
    """Preactivations as a normalised input gives them, and recurrent weights up to ``scale``."""
    torch.manual_seed(0)
    info = recurra.cells()[cell]
    return {
        "x": torch.randn(B, T, len(info.inputs), N),
        "params": scale * (2 * torch.rand(len(info.params), N) - 1),
    }


def _transposed(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)


def _scan(cell: str, shape: tuple[int, ...], kind: str, with_peers: bool) -> Built:
    base = inputs(cell, *shape)

    def make(transposed: bool = False, dtype: torch.dtype = torch.float32) -> Problem:
        x = base["x"].to(dtype)
        return Problem(
            {"x": _transposed(x) if transposed else x, "params": base["params"]},
            lambda f, x: f(**x, cell=cell, algorithm="sequential")[0],
            recurra.rnn,
            recurra.reference.rnn,
            {
                "x": lambda x, rows, channels: x[rows][..., channels],
                "params": lambda p, rows, channels: p[:, channels],
            },
        )

    B, T, N = shape
    n, passes = B * T * N, 1 if kind == FORWARD else 2
    G = base["x"].shape[2]
    # Forward reads x and writes y; backward reads x and dy and writes dx.
    moved = 4 * n * (G + 1) + (4 * n * (2 * G + 1) if kind == BACKWARD else 0)
    work = {loop: passes * count * n for loop, count in _WORK[cell][0].items()}
    built = build(make, kind, Floor(bytes=moved, footprint=4 * n * (G + 1) * passes, work=work))
    if with_peers and cell == "paragru":
        built.peers, built.absent = peers.rnn(base, shape, kind == BACKWARD)
    return built


def _targets(cell: str, shape: tuple[int, ...], kind: str) -> tuple[Target, ...]:
    targets = [Target("recurra", "floor", _WORK[cell][1])]
    if cell == "paragru":
        targets += [
            Target(peers.TORCH_LOOP, "recurra", 100, True),
            Target(peers.TORCH_COMPILE, "recurra", 20, True),
            Target(peers.NUMBA, "recurra", 2.5, True),
        ]
    return tuple(targets)


# Newton's method ----------------------------------------------------------------------------------

_STEPS = 65536
# B N, and how many times faster than the sequential kernel.
_CHAINS = {1: 8.0, 4: 4.0, 16: 1.4}


def _algorithms(x: Tensor, params: Tensor) -> dict[str, Callable[[], tuple]]:
    return {
        name: functools.partial(recurra.rnn, x, params, cell="paragru", algorithm=name)
        for name in ("sequential", "newton")
    }


def _ratio(x: Tensor, params: Tensor, repeat: int = 9) -> tuple[dict[str, float], int]:
    """Seconds of each algorithm, and the passes of Newton's; its result is verified first."""
    runs = _algorithms(x, params)
    want, got = runs["sequential"](), runs["newton"]()
    torch.testing.assert_close(got[0], want[0], rtol=1e-5, atol=1e-5)
    times, _ = interleave(runs, {}, repeat)
    return {name: t.median for name, t in times.items()}, int(got[2])


def _chain_latency() -> float:
    """Seconds of a step of ParaGRU that waits for the one before, on registers alone."""
    native, every = module(), torch.ops.recurra._threads()
    try:
        native.threads(1)
        return min(16e-9 / native.rate("paragru_chain", 20.0) for _ in range(5))
    finally:
        native.threads(every)


def _newton(with_peers: bool) -> list[Measured]:
    latency, out = _chain_latency(), []
    for chains, limit in _CHAINS.items():
        seconds, passes = _ratio(*inputs("paragru", 1, _STEPS, chains, 0.9).values())
        step = seconds["sequential"] / _STEPS
        what = f"B N = {chains}, T = {_STEPS}, |a| <= 0.9"
        text = f"{what}: {1e3 * seconds['newton']:.3g} ms, {passes} passes"
        ratio = seconds["sequential"] / seconds["newton"]
        out.append(Measured(ratio, "x as fast as sequential", limit, text, at_least=True))
        text = f"{what}: {1e9 * step:.1f} ns a step, a chain of steps {1e9 * latency:.1f} ns"
        out.append(Measured(step / latency, "x the latency of the cell", 1.3, text))
    for chains in _CHAINS:
        for scale in (0.5, 0.9, 2.0, 4.0, 8.0):
            for bias in (0.0, -3.0):
                x, params = inputs("paragru", 1, _STEPS, chains, scale).values()
                x[:, :, 0] += bias
                seconds, passes = _ratio(x, params, 3)
                text = f"B N = {chains}, |a| <= {scale:g}, gate bias {bias:g}: {passes} passes"
                ratio = seconds["sequential"] / seconds["newton"]
                out.append(Measured(ratio, "x as fast as sequential", None, text))
    return out


# auto ---------------------------------------------------------------------------------------------

_GRID_CHAINS = (1, 2, 4, 8, 16, 32, 64, 256)
_GRID_STEPS = (256, 1024, 4096, 16384, 65536)
_GRID_PICTURE = "rnn-auto.png"


def _auto(with_peers: bool) -> list[Measured]:
    """Both algorithms over a grid of shapes, on one thread and on two, beside what `auto` takes."""
    every, worst, tables, taken = torch.get_num_threads(), [], {}, []
    print(f"  {'':28}sequential ÷ newton; * where auto takes newton; B N down, T across")
    for threads in (1, 2):
        try:
            torch.set_num_threads(threads)
            rows = [[_point(chains, steps) for steps in _GRID_STEPS] for chains in _GRID_CHAINS]
        finally:
            torch.set_num_threads(every)
        tables[threads] = [[ratio for ratio, _ in row] for row in rows]
        taken = [[newton for _, newton in row] for row in rows]
        print(f"  {threads} threads  " + "".join(f"{steps:>9}" for steps in _GRID_STEPS))
        for chains, row in zip(_GRID_CHAINS, rows, strict=True):
            cells = (f"{ratio:.2f}{'*' if newton else ' '}" for ratio, newton in row)
            print(f"  {chains:9}  " + "".join(f"{cell:>9}" for cell in cells))
        lost = [(1 / ratio if newton else ratio) for row in rows for ratio, newton in row]
        within = sum(loss <= 1.15 for loss in lost)
        text = f"{threads} threads, {within} of {len(lost)} points within 15 %"
        worst.append(Measured(max(1.0, *lost), "x the best, at worst", 1.15, text))
    print("  the steps from which Newton's method is the faster, by both together, and auto's")
    for i, chains in enumerate(_GRID_CHAINS):
        both = [
            math.prod(at) >= 1 for at in zip(*(rows[i] for rows in tables.values()), strict=True)
        ]
        print(f"  {chains:9}  {_first(both):>9}{_first(taken[i]):>9}")
    print(f"  {_draw(tables)}")
    return worst


def _first(wins: list[bool]) -> str:
    """The number of steps from which on all are won."""
    lost = max((i for i, won in enumerate(wins) if not won), default=-1)
    return "never" if lost + 1 == len(wins) else str(_GRID_STEPS[lost + 1])


def _point(chains: int, steps: int) -> tuple[float, bool]:
    x, params = inputs("paragru", 1, steps, chains, 0.9).values()
    runs = _algorithms(x, params)
    calls = max(1, (1 << 16) // (chains * steps))

    def several(run):
        return lambda: [run() for _ in range(calls)]

    times, _ = interleave({name: several(run) for name, run in runs.items()}, {}, 7)
    newton = int(recurra.rnn(x, params, cell="paragru")[2]) > 0
    return times["sequential"].median / times["newton"].median, newton


def _draw(tables: dict[int, list[list[float]]]) -> str:
    from recurra.diag import _picture

    def fill(axes: list) -> None:
        for each, (threads, rows) in zip(axes, tables.items(), strict=True):
            for chains, row in zip(_GRID_CHAINS, rows, strict=True):
                each.plot(_GRID_STEPS, row, "o-", label=f"B N = {chains}")
            each.axhline(1, color="black", linewidth=0.8)
            each.set_xscale("log", base=2)
            each.set_yscale("log")
            each.set_xlabel("T")
            each.set_ylabel("sequential ÷ newton")
            each.set_title(f"{threads} thread" + "s" * (threads > 1))
            each.legend(fontsize=7)

    return _picture.draw(_GRID_PICTURE, len(tables), fill)


# One step -----------------------------------------------------------------------------------------

_STEP_SHAPE, _STEP_CALLS = (1, 1536), 200


def _step(shape: tuple[int, ...], with_peers: bool) -> Built:
    """One step after another must be what the whole sequence gives."""
    B, N = shape
    whole = inputs("paragru", B, 8, N)
    params, tokens = whole["params"], whole["x"].unbind(1)
    state = torch.zeros(B, 1, N)

    def verify() -> float:
        h = torch.zeros(B, 1, N)
        y = torch.stack([recurra.rnn_step(h, x, params, cell="paragru") for x in tokens], 1)
        exact, plain = (
            recurra.reference.rnn(whole["x"].to(dtype), params.to(dtype), cell="paragru")[0]
            for dtype in (torch.float64, torch.float32)
        )
        return assert_close("the output", y, exact, plain)

    # As model code calls it.
    call = torch.ops.recurra.rnn_step.default

    def once():
        return call(state, tokens[0], params, cell="paragru")

    return Built(verify, {"recurra": per_call(once, _STEP_CALLS)}, None, calls=_STEP_CALLS)


# The table ----------------------------------------------------------------------------------------


def case(shape: tuple[int, ...], kind: str, cell: str = "paragru") -> Case:
    """Forward, or forward and backward, of a cell."""
    name = kind if cell == "paragru" else f"{cell} {kind}"
    targets = _targets(cell, shape, kind) if shape in SHAPES else ()
    return Case("rnn", shape, name, functools.partial(_scan, cell, shape, kind), targets)


def cases() -> list[Case]:
    return [
        *(
            case(shape, kind, cell)
            for cell in _WORK
            for shape in SHAPES
            for kind in (FORWARD, BACKWARD)
        ),
        Case(
            "rnn",
            SHAPES[2],
            MEMORY,
            functools.partial(memory.case, "rnn", "inputs and states", 1.5, SHAPES[2]),
        ),
        Case(
            "rnn",
            _STEP_SHAPE,
            STEP,
            functools.partial(_step, _STEP_SHAPE),
            (Target("recurra", "microseconds", 40),),
        ),
        Case("rnn", (), "newton", _newton),
        Case("rnn", (), "auto", _auto),
    ]
