"""The table of every op; that of cells is in celldb.py. The generic tests loop over it; an entry is
all that a new op adds here."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import bounds
import celldb
import recurra
from celldb import CELLS as CELLS
from celldb import Cell as Cell
from recurra import reference
from recurra._check import state_dtype
from support import DTYPES, Arguments, Draw, ErrorInput, packed_errors, shapes, zeros


def alternative(letters: str, x: Tensor) -> str:
    """Of the alternatives, separated by "/", the one for the dimensions of x."""
    return next((one for one in letters.split("/") if len(one) == x.dim()), "?" * x.dim())


@dataclass(frozen=True)
class Op:
    """One op.

    axes: for each tensor argument its dimensions by letter; alternatives by number of dimensions
        are separated by "/". T is time, B batch, D channel, S sequence; other letters are its own.
    outputs: the same for what it returns; the last one is the state. What else it returns only
        reports how the results were found.
    make: ``make(draw, B, T, D, dtype, packed)`` draws one set of arguments (B is 1 if packed).
    model: from bounds.py, the values and error bounds of outputs and gradients.
    second_order: gradgradcheck passes; otherwise it raises by name.
    func: what each transform of torch.func does, "right" or "raises".
    state: the argument that holds the initial state.
    masks: arguments of bool, which have no gradient.
    not_in_steps: arguments of which the step op has no counterpart.
    tested_apart: options that choose how, not what, with tests of their own.
    variant: what is another about an entry that draws other arguments of an op of the table.
    split_gradients: "bits" where gradients through a carried state equal those of the whole call
        to the bit, "bound" where the order of a sum changes.
    step_inputs: arguments of the step op besides the state; those with T are given one step.
    step_options: flags that the step op also takes.
    """

    name: str
    axes: dict[str, str]
    outputs: tuple[str, ...]
    lead: str
    activations: tuple[str, ...]
    differentiable: tuple[str, ...]
    make: Callable[..., Arguments]
    errors: Callable[[], tuple[Arguments, Sequence[ErrorInput]]]
    model: Callable[..., Any]
    second_order: bool
    func: dict[str, str]
    step_inputs: tuple[str, ...]
    step_options: tuple[str, ...] = ()
    split_gradients: str = "bits"
    state: str = "h0"
    masks: tuple[str, ...] = ()
    tested_apart: tuple[str, ...] = ()
    not_in_steps: tuple[str, ...] = ("cu_seqlens",)
    dtypes: tuple[torch.dtype, ...] = DTYPES
    variant: str = ""

    @property
    def label(self) -> str:
        return f"{self.name}-{self.variant}" if self.variant else self.name

    @property
    def function(self) -> Callable:
        return self._results(getattr(recurra, self.name))

    @property
    def reference(self) -> Callable:
        return self._results(getattr(reference, self.name))

    def _results(self, function: Callable) -> Callable:
        if len(self.overload._schema.returns) == len(self.outputs):
            return function
        return lambda *args, **kwargs: function(*args, **kwargs)[: len(self.outputs)]

    @property
    def step(self) -> Callable:
        return getattr(recurra, f"{self.name}_step")

    @property
    def overload(self):
        return getattr(torch.ops.recurra, self.name).default

    @property
    def docs(self) -> str:
        return f"docs/{self.name}.md"

    def layout(self, name: str, x: Tensor) -> str:
        """The letters of the dimensions of an argument; "?" where it has none to name."""
        return alternative(self.axes.get(name, ""), x)

    def samples(self, dtype: torch.dtype, tier: str, packed: bool | None = None) -> Iterator:
        """Arguments for each shape of a tier; a quarter of them packed, unless said."""
        for i, (B, T, D) in enumerate(shapes(tier)):
            draw = Draw(i)
            pack = draw.rng.random() < 0.25 if packed is None else packed
            yield self.make(draw, 1 if pack else B, T, D, dtype, pack)


# ---- linear_scan ------------------------------------------------------------------------------


def _linear_scan(draw: Draw, B: int, T: int, D: int, dtype: torch.dtype, packed: bool) -> Arguments:
    cu_seqlens = draw.cu_seqlens(T) if packed else None
    S = len(cu_seqlens) - 1 if packed else B
    shape = draw.choice(
        [(B, T, D)] * 3 + [(1, 1, D), (B, 1, D), (B, T, 1), (1, T, D), (1, 1, 1), (1, T, 1)]
    )
    a = draw.gate(*shape, steps=T, dtype=dtype)
    log_a = draw.choice((False, False, True))
    return {
        "a": a.abs().log() if log_a else a,
        "b": draw.normal(B, T, D, dtype=dtype),
        "h0": draw.maybe(lambda: draw.normal(S, D, dtype=state_dtype(dtype))),
        "log_a": log_a,
        "reverse": draw.choice((False, True)),
        "cu_seqlens": cu_seqlens,
    }


def _complex_scan(draw: Draw, B: int, T: int, D: int, dtype: torch.dtype, packed: bool):
    """complex128 for float64, complex64 for all others."""
    real = torch.float64 if dtype == torch.float64 else torch.float32
    args = _linear_scan(draw, B, T, D, real, packed)
    args["log_a"] = log_a = draw.choice((False, False, True))
    shape = args["a"].shape
    size, angle = draw.gate(*shape, steps=T, dtype=real), draw.uniform(-9, 9, *shape, dtype=real)
    size = size.abs().clamp(min=1e-30) if log_a else size
    args["a"] = torch.complex(size.log(), angle) if log_a else torch.polar(size, angle)
    kind = args["a"].dtype
    args["b"] = draw.normal(B, T, D, dtype=kind)
    if args["h0"] is not None:
        args["h0"] = draw.normal(*args["h0"].shape, dtype=kind)
    return args


def _linear_scan_errors() -> tuple[Arguments, list[ErrorInput]]:
    name = "linear_scan"
    sizes = "B = 2, T = 3, D = 4"
    return {"a": zeros(2, 3, 4), "b": zeros(2, 3, 4), "h0": None}, [
        ErrorInput(
            {"a": zeros(2, 4, 4)},
            f"{name}: a must have shape (B or 1, T or 1, D or 1) with {sizes}, got (2, 4, 4)",
        ),
        ErrorInput(
            {"a": zeros(3, 4)},
            f"{name}: a must have shape (B or 1, T or 1, D or 1) with {sizes}, got (3, 4)",
        ),
        ErrorInput({"b": zeros(3, 4)}, f"{name}: b must have shape (B, T, D), got (3, 4)"),
        ErrorInput(
            {"a": zeros(2, 3, 4, dtype=torch.float64)},
            f"{name}: a must have dtype float32 where b has float32, got float64",
        ),
        ErrorInput(
            {"b": zeros(2, 3, 4, dtype=torch.int64)},
            f"{name}: b must have dtype float32, float64, bfloat16 or float16, or be "
            "complex, got int64",
        ),
        ErrorInput(
            {"b": zeros(2, 3, 4, dtype=torch.complex32)},
            f"{name}: b must have dtype float32, float64, bfloat16 or float16, or be "
            "complex, got complex32",
        ),
        ErrorInput(
            {"h0": zeros(2, 5)},
            f"{name}: h0 must have shape (S, D) with S = 2, D = 4, got (2, 5)",
        ),
        ErrorInput(
            {"h0": zeros(2, 4, dtype=torch.bfloat16)},
            f"{name}: h0 must have dtype float32 where b has float32, got bfloat16",
        ),
        ErrorInput(
            {"h0": zeros(2, 4, dtype=torch.float16), "half": torch.float16},
            f"{name}: h0 must have dtype float32 where b has float16, got float16",
        ),
        ErrorInput(
            {"cu_seqlens": torch.tensor([0, 1, 3]), "h0": zeros(1, 4), "one row": True},
            f"{name}: h0 must have shape (S, D) with S = 2, D = 4, got (1, 4)",
        ),
        *packed_errors(name, "b"),
    ]


# ---- block_scan -------------------------------------------------------------------------------


def _block_scan(draw: Draw, B: int, T: int, D: int, dtype: torch.dtype, packed: bool) -> Arguments:
    cu_seqlens = draw.cu_seqlens(T) if packed else None
    S = len(cu_seqlens) - 1 if packed else B
    k = draw.choice(
        [k for k in (1, 2, 2, 3, 4, 4, 5, 8, 13, 16) if k * k * B * T * D <= 2e5] or [2]
    )
    shape = draw.choice(
        [(B, T, D)] * 3 + [(1, 1, D), (B, 1, D), (B, T, 1), (1, T, D), (1, 1, 1), (1, T, 1)]
    )
    # Rows of absolute sum 1 or little more, so that no product of many matrices grows.
    if draw.choice((False, True)):
        A = draw.gate(*shape, k, k, steps=T, dtype=dtype) / k
    else:
        moved = draw.uniform(0, 1, *shape, k, dtype=torch.float64).argsort(-1)
        A = torch.eye(k, dtype=dtype)[moved] * draw.gate(*shape, k, 1, steps=T, dtype=dtype)
    return {
        "A": A,
        "b": draw.normal(B, T, D, k, dtype=dtype),
        "h0": draw.maybe(lambda: draw.normal(S, D, k, dtype=state_dtype(dtype))),
        "reverse": draw.choice((False, True)),
        "cu_seqlens": cu_seqlens,
    }


def _block_scan_errors() -> tuple[Arguments, list[ErrorInput]]:
    name = "block_scan"
    sizes = "B = 2, T = 3, N = 4, k = 2"
    shape = f"(B or 1, T or 1, N or 1, k, k) with {sizes}"
    return {"A": zeros(2, 3, 4, 2, 2), "b": zeros(2, 3, 4, 2), "h0": None}, [
        ErrorInput(
            {"b": zeros(2, 3, 4)},
            f"{name}: b must have shape (B, T, N, k=1..16), got (2, 3, 4)",
        ),
        ErrorInput(
            {"b": zeros(2, 3, 4, 17), "A": zeros(2, 3, 4, 17, 17)},
            f"{name}: b must have shape (B, T, N, k=1..16), got (2, 3, 4, 17)",
        ),
        ErrorInput(
            {"b": zeros(2, 3, 4, 0), "A": zeros(2, 3, 4, 0, 0)},
            f"{name}: b must have shape (B, T, N, k=1..16), got (2, 3, 4, 0)",
        ),
        ErrorInput(
            {"b": zeros(2, 3, 4, 2, dtype=torch.int64)},
            f"{name}: b must have dtype float32, float64, bfloat16 or float16, got int64",
        ),
        ErrorInput(
            {"A": zeros(2, 3, 4, 2, 1)}, f"{name}: A must have shape {shape}, got (2, 3, 4, 2, 1)"
        ),
        ErrorInput({"A": zeros(4, 2, 2)}, f"{name}: A must have shape {shape}, got (4, 2, 2)"),
        ErrorInput(
            {"A": zeros(2, 3, 4, 2, 2, dtype=torch.float64)},
            f"{name}: A must have dtype float32 where b has float32, got float64",
        ),
        ErrorInput(
            {"h0": zeros(2, 4, 3)},
            f"{name}: h0 must have shape (S, N, k) with S = 2, N = 4, k = 2, got (2, 4, 3)",
        ),
        ErrorInput(
            {"h0": zeros(2, 4, 2, dtype=torch.float16), "half": torch.float16},
            f"{name}: h0 must have dtype float32 where b has float16, got float16",
        ),
        *packed_errors(name, "b", (2, 3, 4, 2)),
    ]


# ---- causal_conv1d ----------------------------------------------------------------------------


def _causal_conv1d(draw: Draw, B: int, T: int, D: int, dtype: torch.dtype, packed: bool):
    cu_seqlens = draw.cu_seqlens(T) if packed else None
    S = len(cu_seqlens) - 1 if packed else B
    W = draw.choice((2, 3, 4, 4, 5, 8))
    kind = draw.parameter(dtype)
    return {
        "x": draw.normal(B, T, D, dtype=dtype),
        "weight": draw.normal(D, W, dtype=kind),
        "bias": draw.maybe(lambda: draw.normal(D, dtype=kind)),
        "h0": draw.maybe(lambda: draw.normal(S, W - 1, D, dtype=state_dtype(dtype))),
        "activation": draw.choice((None, "silu")),
        "cu_seqlens": cu_seqlens,
    }


def _causal_conv1d_errors() -> tuple[Arguments, list[ErrorInput]]:
    name = "causal_conv1d"
    base = {"x": zeros(2, 3, 4), "weight": zeros(4, 3), "bias": None, "h0": None}
    return base, [
        ErrorInput({"x": zeros(3, 4)}, f"{name}: x must have shape (B, T, D), got (3, 4)"),
        ErrorInput(
            {"x": zeros(2, 3, 4, dtype=torch.int32)},
            f"{name}: x must have dtype float32, float64, bfloat16 or float16, got int32",
        ),
        ErrorInput(
            {"weight": zeros(5, 3)},
            f"{name}: weight must have shape (D, W >= 2) with D = 4, got (5, 3)",
        ),
        ErrorInput(
            {"x": zeros(2, 4, 3)},
            f"{name}: x must have shape (B, T, D) with D = 4 as in weight, got (2, 4, 3), which "
            "looks like (B, D, L): pass x.swapaxes(1, 2)",
        ),
        ErrorInput(
            {"weight": zeros(4, 1)},
            f"{name}: weight must have shape (D, W >= 2) with D = 4, got (4, 1)",
        ),
        ErrorInput(
            {"weight": zeros(4, 3, dtype=torch.float64)},
            f"{name}: weight must have dtype float32 where x has float32, got float64",
        ),
        ErrorInput(
            {"weight": zeros(4, 3, dtype=torch.bfloat16), "half": torch.float16},
            f"{name}: weight must have dtype float16 or float32 where x has float16, got bfloat16",
        ),
        ErrorInput({"bias": zeros(3)}, f"{name}: bias must have shape (D) with D = 4, got (3,)"),
        ErrorInput(
            {"h0": zeros(2, 3, 4)},
            f"{name}: h0 must have shape (S, W-1, D) with S = 2, W = 3, D = 4, got (2, 3, 4)",
        ),
        ErrorInput(
            {"h0": zeros(2, 2, 4, dtype=torch.float16)},
            f"{name}: h0 must have dtype float32 where x has float32, got float16",
        ),
        ErrorInput(
            {"activation": "relu"},
            f'{name}: activation must be None or "silu", got "relu"',
        ),
        *packed_errors(name, "x"),
    ]


# ---- selective_scan ---------------------------------------------------------------------------


def _selective_scan(draw: Draw, B: int, T: int, D: int, dtype: torch.dtype, packed: bool):
    cu_seqlens = draw.cu_seqlens(T) if packed else None
    S = len(cu_seqlens) - 1 if packed else B
    N = draw.choice((1, 2, 3, 5) if B * T * D > 5000 else (1, 3, 16, 17))
    groups = draw.choice([()] * 2 + [(g,) for g in (1, 2, 3, 4) if D and D % g == 0])
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    imaginary = draw.choice((False, False, True))
    complex_of = {torch.float64: torch.complex128}.get(dtype, torch.complex64)
    kind = draw.parameter(dtype)
    A = -draw.uniform(0.05, 2, D, N, dtype=wide)
    if imaginary:
        A = torch.complex(A, draw.uniform(-3, 3, D, N, dtype=wide))
    softplus = draw.choice((False, True))
    if softplus:
        delta = draw.normal(B, T, D, dtype=dtype)
    else:
        delta = draw.uniform(0.001, 0.5, B, T, D, dtype=dtype)
    return {
        "u": draw.normal(B, T, D, dtype=dtype),
        "delta": delta,
        "A": A if imaginary else A.to(kind),
        "B": draw.normal(B, T, *groups, N, dtype=complex_of if imaginary else dtype),
        "C": draw.normal(B, T, *groups, N, dtype=complex_of if imaginary else dtype),
        "D": draw.maybe(lambda: draw.normal(D, dtype=kind)),
        "z": draw.maybe(lambda: draw.normal(B, T, D, dtype=dtype)),
        "delta_bias": draw.maybe(lambda: draw.uniform(0, 0.2, D, dtype=kind)),
        "delta_softplus": softplus,
        "h0": draw.maybe(
            lambda: draw.normal(S, D, N, dtype=complex_of if imaginary else state_dtype(dtype))
        ),
        "cu_seqlens": cu_seqlens,
    }


def _selective_scan_errors() -> tuple[Arguments, list[ErrorInput]]:
    name = "selective_scan"
    base = {
        "u": zeros(2, 3, 4),
        "delta": zeros(2, 3, 4),
        "A": zeros(4, 5),
        "B": zeros(2, 3, 5),
        "C": zeros(2, 3, 5),
    }
    shape = "(B, T, N) or (B, T, G, N)"
    sizes = "B = 2, T = 3, N = 5"
    return base, [
        ErrorInput({"u": zeros(3, 4)}, f"{name}: u must have shape (B, T, D), got (3, 4)"),
        ErrorInput(
            {"u": zeros(2, 4, 3), "delta": zeros(2, 4, 3)},
            f"{name}: u must have shape (B, T, D) with D = 4 as in A, got (2, 4, 3), which looks "
            "like (B, D, L): pass u.swapaxes(1, 2), and likewise delta, z, B and C",
        ),
        ErrorInput(
            {"delta": zeros(2, 3, 5)},
            f"{name}: delta must have shape (B, T, D) with B = 2, T = 3, D = 4, got (2, 3, 5)",
        ),
        ErrorInput({"A": zeros(6, 5)}, f"{name}: A must have shape (D, N) with D = 4, got (6, 5)"),
        ErrorInput(
            {"B": zeros(2, 3, 6)}, f"{name}: B must have shape {shape} with {sizes}, got (2, 3, 6)"
        ),
        ErrorInput(
            {"C": zeros(2, 3, 3, 5)},
            f"{name}: the number of groups G of C must divide D = 4, got 3",
        ),
        ErrorInput(
            {"B": zeros(2, 3, 5, dtype=torch.complex64)},
            f"{name}: B must be real where A is real",
        ),
        ErrorInput({"D": zeros(3)}, f"{name}: D must have shape (D) with D = 4, got (3,)"),
        ErrorInput(
            {"z": zeros(2, 3, 4, dtype=torch.bfloat16)},
            f"{name}: z must have dtype float32 where u has float32, got bfloat16",
        ),
        ErrorInput(
            {"delta_bias": zeros(4, dtype=torch.float64)},
            f"{name}: delta_bias must have dtype float32 where u has float32, got float64",
        ),
        ErrorInput(
            {"h0": zeros(2, 4, 4)},
            f"{name}: h0 must have shape (S, D, N) with S = 2, D = 4, N = 5, got (2, 4, 4)",
        ),
        ErrorInput(
            {"h0": zeros(2, 4, 5, dtype=torch.complex64)},
            f"{name}: h0 must be real where A is real",
        ),
        *packed_errors(name, "u"),
    ]


# ---- softmax_scan -----------------------------------------------------------------------------


def _softmax_scan(draw: Draw, B: int, T: int, D: int, dtype: torch.dtype, packed: bool):
    cu_seqlens = draw.cu_seqlens(T) if packed else None
    S = len(cu_seqlens) - 1 if packed else B
    shape = draw.choice(
        [(B, T, D)] * 4 + [(B, T, 1)] * 2 + [(1, 1, D), (B, 1, D), (1, T, D), (1, 1, 1), (1, T, 1)]
    )
    wide = torch.float64
    scores = draw.choice((1, 4)) * draw.normal(*shape, dtype=wide)
    kind, held = draw.parameter(dtype), state_dtype(dtype)

    def state() -> Tensor:
        m, a = draw.normal(S, D, dtype=held), draw.normal(S, D, dtype=held)
        return torch.stack([m, draw.uniform(0.5, 3, S, D, dtype=held), a], 1)

    return {
        "s": scores.to(dtype),
        "v": draw.normal(B, T, D, dtype=dtype),
        "h0": draw.maybe(state),
        "decay": draw.maybe(
            lambda: draw.uniform(*draw.choice(((0, 0.1), (0, 2), (-0.3, 0.3))), D, dtype=kind)
        ),
        "bonus": draw.maybe(lambda: draw.normal(D, dtype=kind)),
        "cu_seqlens": cu_seqlens,
    }


def _softmax_scan_errors() -> tuple[Arguments, list[ErrorInput]]:
    name = "softmax_scan"
    shape = "(B or 1, T or 1, D or 1) with B = 2, T = 3, D = 4"
    return {"s": zeros(2, 3, 4), "v": zeros(2, 3, 4), "h0": None}, [
        ErrorInput({"v": zeros(3, 4)}, f"{name}: v must have shape (B, T, D), got (3, 4)"),
        ErrorInput(
            {"v": zeros(2, 3, 4, dtype=torch.int64)},
            f"{name}: v must have dtype float32, float64, bfloat16 or float16, got int64",
        ),
        ErrorInput({"s": zeros(2, 3, 5)}, f"{name}: s must have shape {shape}, got (2, 3, 5)"),
        ErrorInput({"s": zeros(2, 3)}, f"{name}: s must have shape {shape}, got (2, 3)"),
        ErrorInput(
            {"s": zeros(2, 3, 4, dtype=torch.bfloat16)},
            f"{name}: s must have dtype float32 where v has float32, got bfloat16",
        ),
        ErrorInput(
            {"h0": zeros(2, 4)},
            f"{name}: h0 must have shape (S, 3, D) with S = 2, D = 4, got (2, 4)",
        ),
        ErrorInput(
            {"h0": zeros(2, 2, 4)},
            f"{name}: h0 must have shape (S, 3, D) with S = 2, D = 4, got (2, 2, 4)",
        ),
        ErrorInput(
            {"h0": zeros(2, 3, 4, dtype=torch.float16), "half": torch.float16},
            f"{name}: h0 must have dtype float32 where v has float16, got float16",
        ),
        ErrorInput({"decay": zeros(3)}, f"{name}: decay must have shape (D) with D = 4, got (3,)"),
        ErrorInput(
            {"bonus": zeros(1, 4)},
            f"{name}: bonus must have shape (D) with D = 4, got (1, 4)",
        ),
        ErrorInput(
            {"bonus": zeros(4, dtype=torch.float64)},
            f"{name}: bonus must have dtype float32 where v has float32, got float64",
        ),
        *packed_errors(name, "v"),
    ]


OPS = [
    Op(
        name="linear_scan",
        axes={"a": "BTD", "b": "BTD", "h0": "SD"},
        outputs=("BTD", "SD"),
        lead="b",
        activations=("a", "b"),
        differentiable=("a", "b", "h0"),
        make=_linear_scan,
        errors=_linear_scan_errors,
        model=bounds.linear_scan,
        second_order=True,
        func={"grad": "raises", "jvp": "raises", "vmap": "right"},
        step_inputs=("a", "b"),
        step_options=("log_a",),
    ),
    Op(
        name="block_scan",
        axes={"A": "BTDKL", "b": "BTDK", "h0": "SDK"},
        outputs=("BTDK", "SDK"),
        lead="b",
        activations=("A", "b"),
        differentiable=("A", "b", "h0"),
        make=_block_scan,
        errors=_block_scan_errors,
        model=bounds.block_scan,
        second_order=True,
        func={"grad": "raises", "jvp": "raises", "vmap": "right"},
        step_inputs=("A", "b"),
    ),
    Op(
        name="causal_conv1d",
        axes={"x": "BTD", "weight": "DW", "bias": "D", "h0": "SWD"},
        outputs=("BTD", "SWD"),
        lead="x",
        activations=("x",),
        differentiable=("x", "weight", "bias", "h0"),
        make=_causal_conv1d,
        errors=_causal_conv1d_errors,
        model=bounds.causal_conv1d,
        second_order=True,
        func={"grad": "raises", "jvp": "raises", "vmap": "right"},
        step_inputs=("x", "weight", "bias"),
        step_options=("activation",),
        split_gradients="bound",
    ),
    Op(
        name="selective_scan",
        axes={
            **dict.fromkeys(("u", "delta", "z"), "BTD"),
            **dict.fromkeys(("B", "C"), "BTN/BTGN"),
            **{"A": "DN", "D": "D", "delta_bias": "D", "h0": "SDN"},
        },
        outputs=("BTD", "SDN"),
        lead="u",
        activations=("u", "delta", "B", "C", "z"),
        differentiable=("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "h0"),
        make=_selective_scan,
        errors=_selective_scan_errors,
        model=bounds.selective_scan,
        second_order=False,
        func={"grad": "raises", "jvp": "raises", "vmap": "right"},
        step_inputs=("u", "delta", "A", "B", "C", "D", "z", "delta_bias"),
        step_options=("delta_softplus",),
        split_gradients="bound",
    ),
    Op(
        name="softmax_scan",
        axes={"s": "BTD", "v": "BTD", "h0": "SKD", "decay": "D", "bonus": "D"},
        outputs=("BTD", "SKD"),
        lead="v",
        activations=("s", "v"),
        differentiable=("s", "v", "h0", "decay", "bonus"),
        make=_softmax_scan,
        errors=_softmax_scan_errors,
        model=bounds.softmax_scan,
        second_order=False,
        func={"grad": "raises", "jvp": "raises", "vmap": "right"},
        step_inputs=("s", "v", "decay", "bonus"),
        split_gradients="bound",
    ),
    Op(
        name="rnn",
        axes={"x": "BTGD", "params": "PD", "h0": "SKD", "reset": "BT"},
        outputs=("BTD/BTKD", "SKD"),
        lead="x",
        activations=("x",),
        differentiable=("x", "params", "h0"),
        make=celldb.sample,
        errors=celldb.errors,
        model=celldb.model,
        second_order=False,
        func={"grad": "raises", "jvp": "raises", "vmap": "right"},
        step_inputs=("x", "params"),
        step_options=("cell",),
        not_in_steps=("cu_seqlens", "return_states", "reset"),
        split_gradients="bound",
        masks=("reset",),
        tested_apart=("algorithm", "chunk", "max_passes", "on_fail"),  # test_rnn.py
    ),
]

# Everything above and what of it is worth the same tests with other arguments.
VARIANTS = [*OPS, replace(OPS[0], make=_complex_scan, variant="complex")]
