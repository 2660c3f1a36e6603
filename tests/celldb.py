"""The table of every cell, and what the table of ops has of rnn, which runs them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import cell_bounds
import recurra
from recurra import reference
from recurra._check import state_dtype
from support import Arguments, Draw, ErrorInput, packed_errors, zeros


@dataclass(frozen=True)
class Cell:
    """One cell of csrc/cells: its oracle is recurra.reference.cells.NAME.

    Attributes:
        ulps: roundings of float64, in units of the largest number in play, by which a step may
            differ from the oracle: about three for each elementary function on the way.
        scale: standard deviation of the samples of inputs, states and parameters.
        positive: states and parameters whose samples are at least 0.5.
    """

    name: str
    ulps: int
    scale: float = 2.0
    positive: tuple[str, ...] = ()

    @property
    def oracle(self) -> Callable:
        return getattr(reference.cells, self.name)

    @property
    def docs(self) -> str:
        return f"docs/cells/{self.name}.md"


CELLS = [
    Cell(name="elstm", ulps=12),
    Cell(name="indrnn", ulps=4),
    Cell(name="janet", ulps=16),
    Cell(name="lem", ulps=24),
    Cell(name="mgu", ulps=16),
    Cell(name="mingru", ulps=16),
    Cell(name="minlstm", ulps=24),
    Cell(name="paragru", ulps=16),
    Cell(name="paralstm", ulps=24),
    Cell(name="peephole_lstm", ulps=24),
    Cell(name="slstm", ulps=48, positive=("n",)),
    Cell(name="sru", ulps=16),
    Cell(name="tanh", ulps=8),
    Cell(name="unicornn", ulps=24, positive=("alpha",)),  # dt alpha y has three factors
]


def sample(draw: Draw, B: int, T: int, D: int, dtype: torch.dtype, packed: bool):
    cu_seqlens = draw.cu_seqlens(T) if packed else None
    S = len(cu_seqlens) - 1 if packed else B
    cell = draw.choice(CELLS)
    info = recurra.cells()[cell.name]
    kind, held = draw.parameter(dtype), state_dtype(dtype)
    params = 0.5 * draw.normal(len(info.params), D, dtype=torch.float64)
    if "dt" in info.params:
        params[info.params.index("dt")] = draw.uniform(0.05, 0.5, D, dtype=torch.float64)

    for name in set(cell.positive) & set(info.params):
        params[info.params.index(name)].abs_()

    def state() -> Tensor:
        h = draw.normal(S, len(info.states), D, dtype=held)
        for name in set(cell.positive) & set(info.states):
            h[:, info.states.index(name)] = draw.uniform(0.5, 2, S, D, dtype=held)
        return h

    return {
        "x": draw.normal(B, T, len(info.inputs), D, dtype=dtype),
        "params": params.to(kind),
        "h0": draw.maybe(state),
        "cell": cell.name,
        "return_states": draw.choice((False, False, True)),
        "reset": draw.choice((None, draw.uniform(0, 1, B, T, dtype=torch.float64) < 0.05)),
        "cu_seqlens": cu_seqlens,
    }


def model(dtype, cotangents, **args):
    (ulps,) = (cell.ulps for cell in CELLS if cell.name == args["cell"])
    return cell_bounds.rnn(dtype, cotangents, ulps=ulps, **args)


def errors() -> tuple[Arguments, list[ErrorInput]]:
    name = "rnn"
    base = {"x": zeros(2, 3, 3, 4), "params": zeros(3, 4), "h0": None, "cell": "paragru"}
    sizes = "B = 2, T = 3"
    return base, [
        ErrorInput({"x": zeros(2, 3, 4)}, f"{name}: x must have shape (B, T, G, N), got (2, 3, 4)"),
        ErrorInput(
            {"x": zeros(2, 3, 3, 4, dtype=torch.int64)},
            f"{name}: x must have dtype float32, float64, bfloat16 or float16, got int64",
        ),
        ErrorInput(
            {"cell": "lstn"},
            f'{name}: cell must be one of {", ".join(recurra.cells())}, got "lstn"',
        ),
        ErrorInput(
            {"x": zeros(2, 3, 2, 4)},
            f"{name}: x must have G = 3 for the inputs of paragru (update, reset, candidate), got "
            "(2, 3, 2, 4)",
        ),
        ErrorInput(
            {"params": zeros(2, 4)},
            f"{name}: params must have P = 3 for the parameters of paragru (a_update, a_reset, "
            "a_candidate), got (2, 4)",
        ),
        ErrorInput(
            {"params": zeros(3, 5)},
            f"{name}: params must have shape (P, N) with N = 4, got (3, 5)",
        ),
        ErrorInput(
            {"params": zeros(3, 4, dtype=torch.float64)},
            f"{name}: params must have dtype float32 where x has float32, got float64",
        ),
        ErrorInput(
            {"h0": zeros(2, 2, 4)},
            f"{name}: h0 must have K = 1 for the states of paragru (h), got (2, 2, 4)",
        ),
        ErrorInput(
            {"h0": zeros(3, 1, 4)},
            f"{name}: h0 must have shape (S, K, N) with S = 2, N = 4, got (3, 1, 4)",
        ),
        ErrorInput(
            {"h0": zeros(2, 1, 4, dtype=torch.float16)},
            f"{name}: h0 must have dtype float32 where x has float32, got float16",
        ),
        ErrorInput({"reset": zeros(2, 3)}, f"{name}: reset must have dtype bool, got float32"),
        ErrorInput(
            {"reset": zeros(2, 4, dtype=torch.bool)},
            f"{name}: reset must have shape (B, T) with {sizes}, got (2, 4)",
        ),
        ErrorInput(
            {"algorithm": "deer"},
            f'{name}: algorithm must be one of "auto", "sequential", "newton", "newton-global", '
            'got "deer"',
        ),
        ErrorInput(
            {"on_fail": "ignore"},
            f'{name}: on_fail must be one of "sequential", "raise", "warn", got "ignore"',
        ),
        ErrorInput({"max_passes": 0}, f"{name}: max_passes must be at least 1, got 0"),
        ErrorInput({"chunk": 0}, f"{name}: chunk must be at least 1, got 0"),
        *packed_errors(name, "x", (2, 3, 3, 4)),
    ]
