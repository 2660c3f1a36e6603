"""What the generic tests share: drawing samples, running ops, comparing bits, memory layouts."""

from __future__ import annotations

import inspect
import math
import os
import random
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
NIGHTLY = os.environ.get("RECURRA_TEST_TIER", "quick") == "nightly"
REPEATS = 200 if NIGHTLY else 20  # random splits, packings and step loops

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
TIMES = (0, 1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 63, 65, 127, 129, 255, 257, 1000, 4099)
WIDTHS = (0, 1, 3, 7, 8, 9, 15, 16, 17, 31, 33, 64, 100)
BATCHES = (0, 1, 3)
SMALL = ((2, 5, 3), (1, 4, 2), (3, 3, 1), (2, 1, 4), (1, 6, 3), (2, 4, 2), (1, 2, 3), (2, 3, 2))
ISAS = ("scalar", "avx2", "avx512")

Arguments = dict[str, Any]


# ---- samples ----------------------------------------------------------------------------------


class Draw:
    """Random numbers for a sample; the same seed gives the same sample."""

    def __init__(self, seed: int):
        self.rng = random.Random(seed)
        self.generator = torch.Generator().manual_seed(self.rng.getrandbits(40))
        self.choice = self.rng.choice

    def maybe(self, x: Callable[[], Any]) -> Any:
        return x() if self.rng.random() < 0.6 else None

    def normal(self, *shape: int, dtype: torch.dtype) -> Tensor:
        exact = torch.complex128 if dtype.is_complex else torch.float64
        return torch.randn(shape, dtype=exact, generator=self.generator).to(dtype)

    def uniform(self, low: float, high: float, *shape: int, dtype: torch.dtype) -> Tensor:
        x = torch.rand(shape, dtype=torch.float64, generator=self.generator)
        return (low + (high - low) * x).to(dtype)

    def gate(self, *shape: int, steps: int, dtype: torch.dtype) -> Tensor:
        """One of the families of gates that recurrences meet, up to slightly above 1."""
        above = 1 + 1 / (steps + 1) if torch.finfo(dtype).bits >= 32 else 1.0
        family = self.choice(("uniform", "near one", "signed", "switch", "above one"))
        if family == "uniform":
            return self.uniform(0, 1, *shape, dtype=dtype)
        if family == "near one":
            return self.uniform(0.999, 1, *shape, dtype=dtype)
        if family == "signed":
            return self.uniform(-1, 1, *shape, dtype=dtype)
        if family == "above one":
            return self.uniform(0.99, above, *shape, dtype=dtype)
        x = self.uniform(0, 1, *shape, dtype=dtype)
        return torch.where(x < 0.2, 0.0, torch.where(x > 0.8, 1.0, x)).to(dtype)

    def cu_seqlens(self, steps: int) -> Tensor:
        """Ends of one to five sequences, some of them empty, as int32 or int64."""
        cuts = sorted(self.rng.randint(0, steps) for _ in range(self.rng.randint(0, 4)))
        if cuts and self.rng.random() < 0.5:
            cuts = sorted([*cuts, self.choice([0, cuts[0], steps])])
        return torch.tensor([0, *cuts, steps], dtype=self.choice((torch.int32, torch.int64)))

    def parameter(self, dtype: torch.dtype) -> torch.dtype:
        """A parameter has the dtype of the activations or float32."""
        return self.choice((dtype, torch.float32))


def shapes(tier: str) -> list[tuple[int, int, int]]:
    """(B, T, D): `small` for what is slow to check; `quick` meets every length with three widths,
    every width and batch size; `nightly` is the full product."""
    if tier == "small":
        return list(SMALL)
    if tier == "nightly":
        every = [(B, T, D) for T in TIMES for D in WIDTHS for B in BATCHES]
        return [s for s in every if math.prod(s) <= 400_000]
    found = []
    for turn in range(3):
        for i, T in enumerate(TIMES):
            n = turn * len(TIMES) + i
            B = 0 if n % 19 == 7 else (1, 3)[(n + turn) % 2]
            D = WIDTHS[(5 * i + 4 * turn + 1) % len(WIDTHS)]
            limit = 100_000 if turn else 20_000
            D = max(w for w in WIDTHS if w <= D and B * T * w <= limit)
            found.append((B, T, D))
    return found


# ---- errors -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class ErrorInput:
    """Changes to a valid call and the sentence that they must bring.

    The change "half" puts all activations in that dtype, "one row" cuts them to B = 1, as packed
    sequences want. What depends on values, not on shapes and dtypes, is `of_values` and only
    checked where values can be read.
    """

    changes: Arguments
    message: str
    of_values: bool = False


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


def packed_errors(op: str, lead: str, shape: tuple[int, ...] = (2, 3, 4)) -> list[ErrorInput]:
    """What every op says of cu_seqlens; `lead`, of that shape, may be cut to B = 1."""

    def one(message: str, offsets: list[int], dtype=torch.int64, of_values=True) -> ErrorInput:
        cu_seqlens = torch.tensor(offsets, dtype=dtype)
        return ErrorInput(
            {"cu_seqlens": cu_seqlens, "one row": True}, f"{op}: {message}", of_values
        )

    return [
        one("cu_seqlens must ascend, got 1 after 2 at index 2", [0, 2, 1, 3]),
        one("cu_seqlens must end at T = 3, got 2", [0, 2], torch.int32),
        one("cu_seqlens must start at 0, got 1", [1, 3]),
        one(
            "cu_seqlens must have dtype int32 or int64, got float32",
            [0, 3],
            torch.float32,
            of_values=False,
        ),
        one("cu_seqlens must have shape (S + 1,), got (0,)", [], of_values=False),
        one(
            "cu_seqlens must have shape (S + 1,) with S >= 1 where T = 3, got (1,)",
            [0],
            of_values=False,
        ),
        ErrorInput(
            {"cu_seqlens": torch.tensor([0, 3])},
            f"{op}: {lead} must have batch size B = 1 with cu_seqlens, got {shape}",
        ),
    ]


def error_calls(op) -> Iterator[tuple[Arguments, ErrorInput]]:
    """Every wrong call of an op and what it must bring."""
    base, errors = op.errors()
    assert len(errors) >= 8
    for error in errors:
        changes = dict(error.changes)
        half, one_row = changes.pop("half", None), changes.pop("one row", False)
        args = {**base, **changes}
        if half:
            args = {k: v.to(half) if k in op.activations else v for k, v in args.items()}
        if one_row:
            args = {
                k: v[:1] if k in op.activations and k not in changes and v is not None else v
                for k, v in args.items()
            }
        yield args, error


# ---- running ----------------------------------------------------------------------------------


def tensors(args: Arguments) -> dict[str, Tensor]:
    return {k: v for k, v in args.items() if isinstance(v, Tensor)}


def is_index(x: Tensor) -> bool:
    return not (x.is_floating_point() or x.is_complex())


def describe(args: Arguments) -> str:
    def one(v):
        if isinstance(v, Tensor) and is_index(v):
            return str(v.tolist())
        return f"{v.dtype}{tuple(v.shape)}" if isinstance(v, Tensor) else repr(v)

    return ", ".join(f"{k}={one(v)}" for k, v in args.items() if v is not None)


def replaced(args: Arguments, function: Callable[[str, Tensor], Tensor]) -> Arguments:
    """The arguments with every tensor passed through a function of its name and itself."""
    return {k: function(k, v) if isinstance(v, Tensor) else v for k, v in args.items()}


def cotangents(outputs, seed: int = 1) -> list[Tensor]:
    draw = Draw(seed)
    return [draw.normal(*y.shape, dtype=y.dtype) for y in outputs]


def evaluate(
    op, args: Arguments, cots=None, fn=None
) -> tuple[list[Tensor], dict[str, Tensor], list[Tensor]]:
    """Outputs, the gradient of every differentiable input, and the cotangents used."""
    fn = fn or op.function
    leaves = replaced(
        args, lambda k, v: v.detach().requires_grad_(k in op.differentiable) if k in op.axes else v
    )
    outputs = list(fn(**leaves))
    cots = cotangents(outputs) if cots is None else cots
    names = [k for k in op.differentiable if leaves.get(k) is not None]
    used = [(y, c.to(y.dtype)) for y, c in zip(outputs, cots, strict=True) if y.requires_grad]
    grads = torch.autograd.grad(
        [y for y, _ in used],
        [leaves[k] for k in names],
        [c for _, c in used],
        allow_unused=True,
        materialize_grads=True,
    )
    return [y.detach() for y in outputs], dict(zip(names, grads, strict=True)), cots


def everything(op, args: Arguments, cots=None) -> list[tuple[str, Tensor]]:
    """Outputs and gradients, by name."""
    outputs, grads, _ = evaluate(op, args, cots)
    return [(f"output {i}", y) for i, y in enumerate(outputs)] + [
        (f"gradient of {k}", g) for k, g in grads.items()
    ]


def far_apart(x: Tensor, axis: int, stride: int, reserve: Callable) -> Tensor:
    """The tensor with neighbours along an axis so many elements apart, and the others as they lie
    in a contiguous one; ``reserve(count, dtype)`` gives the memory from its first to its last."""
    if x.dim() <= axis or x.shape[axis] < 2:
        return x
    strides, step = [0] * x.dim(), 1
    for n in reversed(range(x.dim())):
        strides[n], step = (stride, step) if n == axis else (step, step * x.shape[n])
    last = sum(s * (n - 1) for s, n in zip(strides, x.shape, strict=True))
    return reserve(last + 1, x.dtype).as_strided(x.shape, strides).copy_(x)


def far_inputs(op, axis: str, far: Callable[[Tensor, int], Tensor]) -> Callable:
    """``far(x, n)`` of a named argument, with n its axis B, T or D; itself where it has none. That
    of the batch is also the one of states."""

    def one(k: str, x: Tensor) -> Tensor:
        where = op.layout(k, x).find(axis)
        where = op.layout(k, x).find("S") if where < 0 and axis == "B" else where
        return x if where < 0 else far(x, where)

    return one


# ---- comparing --------------------------------------------------------------------------------

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(x: Tensor) -> Tensor:
    """The bytes as integers, every NaN as the same one."""
    x = x.detach()
    if x.is_complex():
        x = torch.view_as_real(x.resolve_conj())
    if x.is_floating_point():
        x = torch.where(x.isnan(), torch.full_like(x, float("nan")), x)
    return x.contiguous().view(_INTEGERS[x.element_size()])


def same_bits(x: Tensor, y: Tensor) -> bool:
    return x.dtype == y.dtype and x.shape == y.shape and torch.equal(bits(x), bits(y))


def assert_same(got, want, context: str) -> None:
    """Two lists of (name, tensor) are equal to the bit."""
    assert [k for k, _ in got] == [k for k, _ in want], context
    for (name, x), (_, y) in zip(got, want, strict=True):
        if not same_bits(x, y):
            where = (bits(x) != bits(y)).nonzero() if x.shape == y.shape else None
            at = "" if where is None else f" at {where[0].tolist()} and {len(where) - 1} more"
            raise AssertionError(f"{context}: {name} differs{at}: {x.dtype}{tuple(x.shape)}")


def assert_within(got: Tensor, want: Tensor, bound, context: str) -> None:
    """|got - want| <= 2 E + u |want| elementwise, where `want` is exact and E the model's bound."""
    info = torch.finfo(got.dtype)
    u, tiny = info.eps / 2, info.tiny * info.eps
    assert got.shape == want.shape, f"{context}: {got.shape} is not {want.shape}"
    exact = torch.promote_types(want.dtype, torch.float64)
    y = got.detach().to(exact)
    allowed = 2 * bound.error + u * want.abs() + tiny
    good = ((y - want).abs() <= allowed) | (y == want) | (y.isnan() & want.isnan())
    if not y.is_complex():
        # Past the largest number of the dtype, infinity is the right answer.
        overflow = (want.abs() + allowed >= info.max) & (y == want.sign() * float("inf"))
        good |= overflow
    if not good.all():
        i = tuple((~good).nonzero()[0].tolist())
        raise AssertionError(
            f"{context} at {i} and {int((~good).sum()) - 1} more: got {y[i]}, exact {want[i]}, "
            f"allowed error {allowed[i]}"
        )


def oracle(op, args: Arguments, cots) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Outputs and gradients of the reference by torch's autograd, in float64 on these numbers."""
    from bounds import double

    wide = replaced(args, lambda k, v: double(v))
    outputs, grads, _ = evaluate(op, wide, [double(c) for c in cots], op.reference)
    return outputs, grads


def assert_right(op, args: Arguments, context: str = "") -> None:
    """Every output and gradient within the bound of the exact ones."""
    outputs, grads, cots = evaluate(op, args)
    want, want_grads = oracle(op, args, cots)
    errors, error_grads = op.model(args[op.lead].dtype, cots, **args)
    context = f"{op.name}({describe(args)}) {context}"
    for i, (y, w, e) in enumerate(zip(outputs, want, errors, strict=True)):
        assert_within(y, w, e, f"{context}: output {i}")
    for k, g in grads.items():
        assert g.dtype == args[k].dtype, f"{context}: gradient of {k} has dtype {g.dtype}"
        assert_within(g, want_grads[k], error_grads[k], f"{context}: gradient of {k}")


# ---- arrays -----------------------------------------------------------------------------------


def array_of(x: Tensor):
    """A tensor as a NumPy array over the same memory, with the same strides."""
    if x.dtype == torch.bfloat16:
        import ml_dtypes

        return x.detach().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return x.detach().numpy()


def tensor_of(x) -> Tensor:
    """The other way round; also of what NumPy takes for an array."""
    import numpy as np

    x = np.asarray(x)
    x = x if x.flags.writeable else x.copy("K")
    if x.dtype.name == "bfloat16":
        return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(x)


# ---- layouts ----------------------------------------------------------------------------------


def _contiguous(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format)


def _transposed(x: Tensor) -> Tensor:
    return x.transpose(-1, -2).contiguous().transpose(-1, -2) if x.dim() > 1 else x


def _expanded(x: Tensor) -> Tensor:
    # Shared along time, or along the first dimension of what has no time.
    if x.dim() < 2 or x.numel() == 0:
        return x
    return x[:, :1].expand_as(x) if x.dim() > 2 else x[:1].expand_as(x)


def _offset(x: Tensor) -> Tensor:
    return x.new_empty(x.numel() + 1)[1:].view(x.shape).copy_(x)


def _sliced(x: Tensor) -> Tensor:
    base = x.new_empty([*x.shape[:-1], 2 * x.shape[-1]]) if x.dim() else x
    return base[..., ::2].copy_(x)


def _overlapping(x: Tensor) -> Tensor:
    return _contiguous(x).as_strided(x.shape, (1,) * x.dim()) if x.numel() else x


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": _contiguous,
    "transposed": _transposed,
    "expanded": _expanded,
    "offset": _offset,
    "sliced": _sliced,
    "overlapping": _overlapping,
}


def laid_out(x: Tensor, layout: str) -> Tensor:
    """A tensor of the shape of x in that layout; the expanded and overlapping ones have other
    values, so compare with a contiguous copy of the result."""
    if is_index(x) and layout in ("expanded", "overlapping"):
        layout = "sliced"
    return LAYOUTS[layout](x.detach())


# ---- pieces -----------------------------------------------------------------------------------


def narrowed(op, args: Arguments, begin: int, end: int) -> Arguments:
    """Every tensor cut to the steps [begin, end), unless all steps share it."""
    T = args[op.lead].shape[1]

    def cut(name: str, x: Tensor) -> Tensor:
        where = op.layout(name, x).find("T")
        return x if where < 0 or x.shape[where] != T else x.narrow(where, begin, end - begin)

    return replaced(args, cut)


def gradients_in_pieces(op, args: Arguments) -> list[str]:
    """Arguments whose gradient is cut where time is cut; what steps share has one sum instead."""
    T = args[op.lead].shape[1]
    given = [k for k in op.differentiable if args.get(k) is not None and T > 1]
    return [k for k in given if "T" in op.layout(k, args[k]) and args[k].shape[1] == T]


def with_state(op, args: Arguments) -> Arguments:
    """The arguments with zeros where no state was given."""
    if args[op.state] is not None:
        return args
    return {**args, op.state: torch.zeros_like(op.function(**args)[-1])}


def step_arguments(op, args: Arguments, t: int) -> Arguments:
    """The arguments of the step op for step t."""

    def at(name, x):
        where = op.layout(name, x).find("T") if isinstance(x, Tensor) else -1
        return x if where < 0 else x.select(where, 0 if x.shape[where] == 1 else t)

    given = {k: at(k, args[k]) for k in op.step_inputs if args.get(k) is not None}
    return {**given, **{k: args[k] for k in op.step_options}}


# ---- process ----------------------------------------------------------------------------------


@contextmanager
def isa(name: str) -> Iterator[str]:
    """Caps the instruction set; yields the one in effect."""
    before = torch.ops.recurra._isa()
    try:
        yield torch.ops.recurra._isa(name)
    finally:
        torch.ops.recurra._isa("avx512")
        torch.ops.recurra._isa(before)


def isas() -> list[str]:
    """The instruction sets that this machine has."""
    found = []
    for name in ISAS:
        with isa(name) as got:
            if got == name:
                found.append(name)
    return found


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def run_python(code: str, timeout: float = 120, **environment: str) -> str:
    """Runs a program beside these tests in a process of its own; returns what it printed."""
    # The package under test may be on the path of this process alone.
    path = os.pathsep.join([str(TESTS), *(p for p in sys.path if p)])
    child = subprocess.Popen(
        [sys.executable, "-X", "faulthandler", "-c", textwrap.dedent(code)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path, **environment},
        start_new_session=True,  # so that its own children can be ended with it
    )
    try:
        printed, errors = child.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        printed, errors = child.communicate()
        errors += f"\nstill running after {timeout} s"
    status = child.returncode
    assert status == 0, f"exit status {status}\n{printed[-2000:]}\n{errors[-4000:]}"
    return printed


def check_forked_children(setup: str) -> None:
    """A forked child computes the same bits as its parent, whose threads it does not have.

    Args:
        setup: a program that defines ``calls``, a list, and ``compute``, which makes a list of
            tensors of each.
    """
    run_python(
        textwrap.dedent(setup)
        + textwrap.dedent(
            """
            import os
            import torch
            from support import same_bits

            torch.set_num_threads(2)
            wanted = [compute(call) for call in calls]
            torch.zeros(1 << 20).add_(1)
            pid = os.fork()
            if pid == 0:
                got = [compute(call) for call in calls]
                torch.set_num_threads(1)
                same = (same_bits(a, b) for x, y in zip(got, wanted) for a, b in zip(x, y))
                os._exit(0 if all(same) else 1)
            assert os.waitpid(pid, 0)[1] == 0
            """
        )
    )


def parameters_of(function) -> list[tuple]:
    """The signature of a function but for its annotations."""
    return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]


# ---- a cell of recurra.jit -----------------------------------------------------------------------

# Two states, a parameter that is affine and one that is not.
LEAKY_CELL = """
struct Leaky {
  static constexpr const char* name = "leaky";
  static constexpr auto inputs = names("x", "gate");
  static constexpr auto states = names("h", "mean");
  static constexpr auto params = names("a", "rate");
  static constexpr auto affine_params = affine(Affine{0, 0, 0});
  static constexpr int output = 0;

  template <class X, class H, class P>
  RECURRA_FN static auto step(X inputs, H states, P params) {
    auto [x, gate] = inputs;
    auto [h, mean] = states;
    auto [a, rate] = params;
    auto f = sigmoid(rate * gate);
    auto candidate = tanh(fma(a, h, x));
    return pack(fma(f, h, (1 - f) * candidate), fma(f, mean, (1 - f) * h));
  }
};
"""
