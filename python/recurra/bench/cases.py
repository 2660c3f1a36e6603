"""What is timed: shapes, inputs, the check against float64, the floor and the targets of each.

A case is verified before it is timed, on the tensors and by the calls that are timed. Forward:
a few batch rows and channels of the result against ``recurra.reference`` in float64. Backward: the
same with a cotangent that is zero outside those rows and channels, so that every gradient, the
sums over channels and batch included, is determined by the slice. The error may be a few times
that of the same reference in float32.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import torch
from torch import Tensor

import recurra
from recurra.bench import default, peers
from recurra.bench.floors import Floor
from recurra.bench.memory import peak_memory
from recurra.bench.timing import import_seconds, per_call

FORWARD, BACKWARD, STEP, MEMORY = "forward", "forward+backward", "step", "memory"
IMPORT, LM = "import", "lm"
_STEP_CALLS = 200


@dataclasses.dataclass(frozen=True)
class Target:
    """A ratio of two times that must not exceed, or must reach, a limit.

    Attributes:
        time: the name of the time in question: ``recurra``, a variant or a peer.
        over: what it is divided by: ``floor``, another time, or ``microseconds`` for the time
            of a call itself.
        limit: the limit of the ratio.
        at_least: the ratio must reach the limit instead of staying below it.
    """

    time: str
    over: str
    limit: float
    at_least: bool = False


@dataclasses.dataclass
class Built:
    """A case with its tensors: the calls to time and what they need at least.

    Attributes:
        verify: raises AssertionError where a result is wrong; returns the largest error as a
            fraction of what is allowed.
        runs: the calls by name; ``recurra`` is the op in its own layout.
        floor: what the op has to do at least.
        peers: calls of other packages, by name.
        absent: for each peer that is not there, why.
        calls: how many calls one run makes.
    """

    verify: Callable[[], float]
    runs: dict[str, Callable[[], object]]
    floor: Floor | None
    peers: dict[str, Callable[[], object]] = dataclasses.field(default_factory=dict)
    absent: dict[str, str] = dataclasses.field(default_factory=dict)
    calls: int = 1


@dataclasses.dataclass
class Measured:
    """A number with a limit; a case may be several of them.

    Attributes:
        value: what came, in ``unit``.
        limit: it must not exceed, or with ``at_least`` must reach; None where nothing is asked.
        text: what it is made of.
    """

    value: float
    unit: str
    limit: float | None
    text: str
    at_least: bool = False


@dataclasses.dataclass(frozen=True)
class Case:
    """One line of the table: an op, a shape, and forward, forward+backward or step."""

    op: str
    shape: tuple[int, ...]
    kind: str
    build: Callable[[bool], Built | list[Measured]]
    targets: tuple[Target, ...] = ()

    @property
    def name(self) -> str:
        """OP/SHAPE/KIND, by which the command line selects."""
        return "/".join(filter(None, (self.op, "x".join(map(str, self.shape)), self.kind)))

    @property
    def missing(self) -> bool:
        """Whether this build of recurra lacks the op."""
        if self.op in (IMPORT, LM):
            return False
        function = f"{self.op}_step" if self.kind == STEP else self.op
        return not hasattr(recurra, function) or not hasattr(recurra.reference, function)


# Verification -------------------------------------------------------------------------------------


def _assert_close(name: str, got: Tensor, exact: Tensor, plain: Tensor) -> float:
    """The error of ``got``, as a fraction of eight times that of ``plain`` and four roundings."""
    eps = torch.finfo(got.dtype).eps
    error = (got.double() - exact).abs().max().item()
    allowed = 8 * (plain.double() - exact).abs().max().item() + 4 * eps * exact.abs().max().item()
    # Not `error > allowed`, which a NaN would pass.
    if not error <= allowed:
        raise AssertionError(f"{name} is off by {error:.3g}, allowed are {allowed:.3g}")
    return error / allowed if allowed else 0.0


def _some(count: int, most: int) -> list[int]:
    """At most ``most`` indices below ``count``, the first and the last among them."""
    if count <= most:
        return list(range(count))
    return sorted({round(i * (count - 1) / (most - 1)) for i in range(most)})


@dataclasses.dataclass
class _Problem:
    """An op with its arguments: what is common to timing and verifying it.

    Attributes:
        inputs: the tensor arguments by name.
        call: runs the op, or its reference, on such arguments and returns the output.
        reference: the function of the reference.
        pick: for each input, the part that belongs to given rows and channels.
    """

    inputs: dict[str, Tensor]
    call: Callable[[Callable, dict[str, Tensor]], Tensor]
    op: Callable
    reference: Callable
    pick: dict[str, Callable[[Tensor, list[int], list[int]], Tensor]]

    def forward(self) -> Tensor:
        return self.call(self.op, self.inputs)

    def gradients(self, dy: Tensor) -> dict[str, Tensor]:
        """Forward and backward, as a training step does."""
        y = self.call(self.op, self.leaves)
        return dict(zip(self.leaves, torch.autograd.grad(y, self.leaves.values(), dy), strict=True))

    @functools.cached_property
    def leaves(self) -> dict[str, Tensor]:
        return {k: v.detach().requires_grad_() for k, v in self.inputs.items()}

    def _slice(self, dtype: torch.dtype, rows: list[int], channels: list[int], grad: bool):
        return {
            k: self.pick[k](v, rows, channels).to(dtype).contiguous().requires_grad_(grad)
            for k, v in self.inputs.items()
        }

    def verify(self, backward: bool) -> float:
        lead = next(iter(self.inputs.values()))
        rows, channels = _some(lead.shape[0], 2), _some(lead.shape[2], 8)
        exact = self._slice(torch.float64, rows, channels, backward)
        plain = self._slice(torch.float32, rows, channels, backward)
        y64, y32 = self.call(self.reference, exact), self.call(self.reference, plain)
        with torch.no_grad():
            y = self.forward()
        worst = _assert_close("the output", y[rows][:, :, channels], y64.detach(), y32.detach())
        if not backward:
            return worst
        dy = torch.zeros_like(y)
        small = torch.randn(y64.shape).to(y.dtype)
        for i, row in enumerate(rows):
            dy[row, :, channels] = small[i]
        got = self.gradients(dy)
        want64 = torch.autograd.grad(y64, exact.values(), small.double())
        want32 = torch.autograd.grad(y32, plain.values(), small.float())
        for (k, full), g64, g32 in zip(got.items(), want64, want32, strict=True):
            part = self.pick[k](full, rows, channels)
            worst = max(worst, _assert_close(f"the gradient of {k}", part, g64, g32))
            if (full != 0).sum() > part.numel():
                raise AssertionError(f"the gradient of {k} leaks into other rows or channels")
        return worst


def _rows_and_channels(x: Tensor, rows: list[int], channels: list[int]) -> Tensor:
    return x[rows][:, :, channels]


def _rows(x: Tensor, rows: list[int], channels: list[int]) -> Tensor:
    return x[rows]


def _channels(x: Tensor, rows: list[int], channels: list[int]) -> Tensor:
    return x[channels]


def _build(make: Callable[..., _Problem], kind: str, floor: Floor) -> Built:
    """The problem in float32, its transposed and its bfloat16 form."""
    problems = {
        "recurra": make(),
        "transposed": make(transposed=True),
        "bfloat16": make(dtype=torch.bfloat16),
    }

    def verify() -> float:
        worst = 0.0
        for name, problem in problems.items():
            try:
                worst = max(worst, problem.verify(kind == BACKWARD))
            except AssertionError as error:
                raise AssertionError(f"{name}: {error}") from None
        return worst

    return Built(
        verify,
        {
            name: problem.forward if kind == FORWARD else _training_step(problem)
            for name, problem in problems.items()
        },
        floor,
    )


def _training_step(problem: _Problem) -> Callable[[], object]:
    with torch.no_grad():
        dy = torch.randn_like(problem.forward())
    return lambda: problem.gradients(dy)


def _layout(x: Tensor, transposed: bool) -> Tensor:
    """``x`` (B, T, D) as it is, or as a view of a (B, D, T) tensor."""
    return x.transpose(1, 2).contiguous().transpose(1, 2) if transposed else x


# linear_scan --------------------------------------------------------------------------------------


def _linear_inputs(B: int, T: int, D: int) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {"a": torch.rand(B, T, D), "b": torch.randn(B, T, D)}


class _LinearScan(_Problem):
    """The reference's autograd is quadratic in T; over 65536 steps the formulas are written out."""

    def verify(self, backward: bool) -> float:
        lead = self.inputs["b"]
        rows, channels = _some(lead.shape[0], 2), _some(lead.shape[2], 8)
        with torch.no_grad():
            h = self.forward()
        got = {"h": _rows_and_channels(h, rows, channels)}
        dh = torch.zeros_like(h)
        small = torch.randn(got["h"].shape).to(h.dtype)
        if backward:
            for i, row in enumerate(rows):
                dh[row, :, channels] = small[i]
            full = self.gradients(dh)
            for k, v in full.items():
                got[k] = _rows_and_channels(v, rows, channels)
                if (v != 0).sum() > got[k].numel():
                    raise AssertionError(f"the gradient of {k} leaks into other rows or channels")
        part = {k: _rows_and_channels(v, rows, channels) for k, v in self.inputs.items()}
        exact = self._formulas(part, small, torch.float64, backward)
        plain = self._formulas(part, small, torch.float32, backward)
        return max(_assert_close(k, got[k], exact[k], plain[k]) for k in got)

    @staticmethod
    def _formulas(part, dh, dtype, backward) -> dict[str, Tensor]:
        a, b, dh = (x.transpose(0, 1).to(dtype).numpy() for x in (part["a"], part["b"], dh))
        h, state = b.copy(), 0 * b[0]
        for t in range(len(b)):
            h[t] = state = a[t] * state + b[t]
        out = {"h": h}
        if backward:
            g, carry = b.copy(), 0 * b[0]
            for t in reversed(range(len(b))):
                g[t] = carry + dh[t]
                carry = a[t] * g[t]
            before = h.copy()
            before[0], before[1:] = 0, h[:-1]
            out |= {"a": g * before, "b": g}
        return {k: torch.from_numpy(v).transpose(0, 1) for k, v in out.items()}


def _linear_scan(shape: tuple[int, ...], kind: str, with_peers: bool) -> Built:
    base = _linear_inputs(*shape)

    def make(transposed: bool = False, dtype: torch.dtype = torch.float32) -> _Problem:
        return _LinearScan(
            {k: _layout(v.to(dtype), transposed) for k, v in base.items()},
            lambda f, x: f(x["a"], x["b"])[0],
            recurra.linear_scan,
            recurra.reference.linear_scan,
            {"a": _rows_and_channels, "b": _rows_and_channels},
        )

    n = base["b"].numel()
    floor = Floor(bytes=12 * n, footprint=12 * n)
    if kind == BACKWARD:
        floor = Floor(bytes=32 * n, footprint=24 * n)
    built = _build(make, kind, floor)
    if with_peers:
        built.peers, built.absent = peers.linear_scan(base, kind == BACKWARD)
    return built


# selective_scan -----------------------------------------------------------------------------------


def selective_inputs(B: int, D: int, T: int, N: int) -> dict[str, Tensor]:
    """Every argument that a Mamba block passes, (B, T, D) and contiguous."""
    torch.manual_seed(0)
    return {
        "u": torch.randn(B, T, D),
        "delta": 0.5 * torch.randn(B, T, D),
        "A": -torch.arange(1, N + 1).float().repeat(D, 1),
        "B": torch.randn(B, T, N),
        "C": torch.randn(B, T, N),
        "D": torch.randn(D),
        "z": torch.randn(B, T, D),
        # softplus of it is around 0.01, as in a trained model
        "delta_bias": torch.rand(D) * 2 - 5,
    }


def _selective_scan(shape: tuple[int, ...], kind: str, with_peers: bool) -> Built:
    base = selective_inputs(*shape)
    parameters = ("A", "D", "delta_bias")

    def make(transposed: bool = False, dtype: torch.dtype = torch.float32) -> _Problem:
        return _Problem(
            {
                k: v if k in parameters else _layout(v.to(dtype), transposed)
                for k, v in base.items()
            },
            lambda f, x: f(**x, delta_softplus=True)[0],
            recurra.selective_scan,
            recurra.reference.selective_scan,
            {
                k: _channels if k in parameters else _rows if k in "BC" else _rows_and_channels
                for k in base
            },
        )

    B, D, T, N = shape
    steps, states = B * D * T, B * D * T * N
    floor = Floor(work={"exp2": states, "fma": 4 * states, "softplus": steps, "silu": steps})
    built = _build(make, kind, floor)
    if with_peers:
        built.peers, built.absent = peers.selective_scan(base, kind == BACKWARD)
    return built


# causal_conv1d ------------------------------------------------------------------------------------


def _conv_inputs(B: int, D: int, T: int, W: int = 4) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {"x": torch.randn(B, T, D), "weight": torch.randn(D, W) / 2, "bias": torch.randn(D)}


def _causal_conv1d(shape: tuple[int, ...], kind: str, with_peers: bool) -> Built:
    base = _conv_inputs(*shape)

    def make(transposed: bool = False, dtype: torch.dtype = torch.float32) -> _Problem:
        x = _layout(base["x"].to(dtype), transposed)
        return _Problem(
            {**base, "x": x},
            lambda f, x: f(**x, activation="silu")[0],
            recurra.causal_conv1d,
            recurra.reference.causal_conv1d,
            {"x": _rows_and_channels, "weight": _channels, "bias": _channels},
        )

    n = base["x"].numel()
    floor = Floor(bytes=8 * n, footprint=8 * n, work={"sigmoid": n})
    if kind == BACKWARD:
        floor = Floor(bytes=20 * n, footprint=16 * n, work={"sigmoid": 2 * n})
    built = _build(make, kind, floor)
    if with_peers:
        built.peers, built.absent = peers.causal_conv1d(base, kind == BACKWARD)
    return built


# Step ops -----------------------------------------------------------------------------------------


def _step(op: str, shape: tuple[int, ...], with_peers: bool) -> Built:
    """One token after another of a short sequence must be what the whole-sequence op returns."""
    B, D = shape
    T = 8
    if op == "linear_scan":
        whole, parameters, options = _linear_inputs(B, T, D), {}, {}
    elif op == "selective_scan":
        whole, options = selective_inputs(B, D, T, 16), {"delta_softplus": True}
        parameters = {k: whole.pop(k) for k in ("A", "D", "delta_bias")}
    else:
        whole, options = _conv_inputs(B, D, T), {"activation": "silu"}
        parameters = {k: whole.pop(k) for k in ("weight", "bias")}
    function, step = getattr(recurra, op), getattr(recurra, f"{op}_step")
    reference = getattr(recurra.reference, op)
    inputs = {**whole, **parameters}
    state = torch.zeros_like(function(**inputs, **options)[1])
    tokens = [{**{k: v[:, t] for k, v in whole.items()}, **parameters} for t in range(T)]

    def verify() -> float:
        h = torch.zeros_like(state)
        y = torch.stack([step(h, **token, **options) for token in tokens], 1)
        exact, exact_h = reference(**{k: v.double() for k, v in inputs.items()}, **options)
        plain, plain_h = reference(**inputs, **options)
        return max(
            _assert_close("the output", y, exact, plain),
            _assert_close("the state", h, exact_h, plain_h),
        )

    # As model code calls it.
    call = getattr(torch.ops.recurra, f"{op}_step").default
    token = tokens[0]

    def once():
        return call(state, **token, **options)

    return Built(verify, {"recurra": per_call(once, _STEP_CALLS)}, None, calls=_STEP_CALLS)


# Memory and import --------------------------------------------------------------------------------


def _memory(shape: tuple[int, ...], with_peers: bool) -> list[Measured]:
    """Peak memory of selective_scan forward and backward, results included, over its inputs."""
    inputs, extra = peak_memory(shape)
    mebi = 1 / 2**20
    text = (
        f"{extra * mebi:.0f} MiB at the peak, results and gradients included, beside "
        f"{inputs * mebi:.0f} MiB of inputs"
    )
    return [Measured(extra / inputs, "x the inputs", 2.0, text)]


def _import(with_peers: bool) -> list[Measured]:
    alone, beyond = import_seconds(7)
    return [Measured(1e3 * beyond, "ms beyond torch", 150, f"import torch {alone:.2f} s")]


# The table ----------------------------------------------------------------------------------------

SELECTIVE_SHAPES = ((1, 1536, 1024, 16), (8, 512, 512, 16), (4, 1536, 2048, 16))
LINEAR_SHAPES = ((8, 2048, 1024), (1, 65536, 256), (64, 512, 512))
CONV_SHAPES = tuple(shape[:3] for shape in SELECTIVE_SHAPES)
STEP_SHAPE = (1, 1536)

_BUILDERS = {
    "selective_scan": _selective_scan,
    "linear_scan": _linear_scan,
    "causal_conv1d": _causal_conv1d,
}
# The order of the sizes of a shape on the command line, as papers and peers give them.
AXES = {
    "selective_scan": ("B", "D", "L", "N"),
    "linear_scan": ("B", "T", "D"),
    "causal_conv1d": ("B", "D", "L"),
}


def _targets(op: str, shape: tuple[int, ...], kind: str) -> tuple[Target, ...]:
    bf16 = Target("bfloat16", "recurra", 1.05)
    if op == "selective_scan":
        if kind == FORWARD:
            return (
                Target("recurra", "floor", 2.0),
                Target("transposed", "recurra", 1.2),
                bf16,
                Target(peers.JAX_LAX, "recurra", 8 if shape == SELECTIVE_SHAPES[2] else 10, True),
                Target(peers.MAMBA, "recurra", 60, True),
            )
        return (
            Target("recurra", "floor", 8.0),
            bf16,
            Target(peers.JAX_LAX, "recurra", 20, True),
        )
    if op == "linear_scan":
        fraction = 0.55 if shape == LINEAR_SHAPES[2] else 0.70
        if kind == FORWARD:
            return (
                Target("recurra", "floor", 1 / fraction),
                Target("transposed", "recurra", 1.4),
                bf16,
                Target(peers.NUMBA, "recurra", 3, True),
            )
        return (Target("recurra", "floor", 2.0), bf16)
    layout = (Target("transposed", "recurra", 1.4),) if kind == FORWARD else ()
    return (
        Target("recurra", "floor", 3.0),
        *layout,
        bf16,
        Target(peers.TORCH_CONV, "recurra", 5, True),
    )


def case(op: str, shape: tuple[int, ...], kind: str) -> Case:
    """A case of any shape; only those of the table have targets."""
    if op not in AXES:
        raise ValueError(f"--shape goes with --op {', '.join(AXES)}, got {op}")
    if len(shape) != len(AXES[op]) or min(shape) < 1:
        raise ValueError(
            f"the shape of {op} is {'x'.join(AXES[op])}, sizes of at least 1, "
            f"got {'x'.join(map(str, shape))}"
        )
    listed = SELECTIVE_SHAPES + LINEAR_SHAPES + CONV_SHAPES
    targets = _targets(op, shape, kind) if shape in listed else ()
    return Case(op, shape, kind, functools.partial(_BUILDERS[op], shape, kind), targets)


def table() -> list[Case]:
    """Every case with targets, and one for each op that has none."""
    shapes = {
        "selective_scan": SELECTIVE_SHAPES,
        "linear_scan": LINEAR_SHAPES,
        "causal_conv1d": CONV_SHAPES,
    }
    cases = [
        case(op, shape, kind)
        for op in shapes
        for shape in shapes[op]
        for kind in (FORWARD, BACKWARD)
    ]
    cases += [
        Case("selective_scan", shape, MEMORY, functools.partial(_memory, shape))
        for shape in SELECTIVE_SHAPES
    ]
    cases += [
        Case(
            op,
            STEP_SHAPE,
            STEP,
            functools.partial(_step, op, STEP_SHAPE),
            (Target("recurra", "microseconds", 40),),
        )
        for op in shapes
    ]
    cases += [
        Case(op, (), FORWARD, functools.partial(_default, op))
        for op in default.public_ops()
        if op not in shapes
    ]
    from recurra.bench import models  # which is made of the cases above

    cases += [Case(LM, (), name, build) for name, build in models.BUILDERS.items()]
    return [*cases, Case(IMPORT, (), "", _import)]


def _default(op: str, with_peers: bool) -> Built:
    """An op without a case of its own, on inputs made from what it requires."""
    arguments = default.inputs(op)
    moved = default.moved_bytes(op)
    return Built(
        lambda: default.verify(op),
        {"recurra": lambda: getattr(recurra, op)(**arguments)},
        Floor(bytes=moved, footprint=moved),
    )


def select(patterns: list[str], ops: list[str]) -> list[Case]:
    """The cases whose name contains one of the patterns, of one of the ops; all where none given.

    Raises:
        ValueError: a pattern or an op fits no case.
    """
    cases = table()
    known = sorted({c.op for c in cases})
    for op in ops:
        if op not in known:
            raise ValueError(f"--op must be one of {', '.join(known)}, got {op}")
    for pattern in patterns:
        if not any(pattern in c.name for c in cases):
            raise ValueError(f"no case is named like {pattern}; recurra bench --list shows them")
    return [
        c
        for c in cases
        if (not ops or c.op in ops) and (not patterns or any(p in c.name for p in patterns))
    ]
