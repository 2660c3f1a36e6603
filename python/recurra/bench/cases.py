"""What is timed: shapes, inputs, the floor and the targets of each case."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

import recurra
from recurra.bench import default, linear, memory, peers, rnn, rtrl
from recurra.bench.floors import Floor
from recurra.bench.problems import (
    BACKWARD,
    DROP_IN,
    FORWARD,
    GRIFFIN,
    IMPORT,
    LM,
    MEMORY,
    ONNX,
    RWKV4,
    SERVING,
    STEP,
    Built,
    Case,
    Measured,
    Problem,
    Target,
    assert_close,
    build,
    channels_of,
    laid_out,
    rows_and_channels,
    rows_of,
    some,
)
from recurra.bench.timing import import_seconds, per_call

_STEP_CALLS = 200


# linear_scan --------------------------------------------------------------------------------------


def _linear_inputs(B: int, T: int, D: int) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {"a": torch.rand(B, T, D), "b": torch.randn(B, T, D)}


class _LinearScan(Problem):
    """The reference's autograd is quadratic in T; over 65536 steps the formulas are written out."""

    def verify(self, backward: bool) -> float:
        lead = self.inputs["b"]
        rows, channels = some(lead.shape[0], 2), some(lead.shape[2], 8)
        with torch.no_grad():
            h = self.forward()
        got = {"h": rows_and_channels(h, rows, channels)}
        dh = torch.zeros_like(h)
        small = torch.randn(got["h"].shape).to(h.dtype)
        if backward:
            for i, row in enumerate(rows):
                dh[row, :, channels] = small[i]
            full = self.gradients(dh)
            for k, v in full.items():
                got[k] = rows_and_channels(v, rows, channels)
                if (v != 0).sum() > got[k].numel():
                    raise AssertionError(f"the gradient of {k} leaks into other rows or channels")
        part = {k: rows_and_channels(v, rows, channels) for k, v in self.inputs.items()}
        exact = self._formulas(part, small, torch.float64, backward)
        plain = self._formulas(part, small, torch.float32, backward)
        return max(assert_close(k, got[k], exact[k], plain[k]) for k in got)

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

    def make(transposed: bool = False, dtype: torch.dtype = torch.float32) -> Problem:
        return _LinearScan(
            {k: laid_out(v.to(dtype), transposed) for k, v in base.items()},
            lambda f, x: f(x["a"], x["b"])[0],
            recurra.linear_scan,
            recurra.reference.linear_scan,
            {"a": rows_and_channels, "b": rows_and_channels},
        )

    n = base["b"].numel()
    floor = Floor(bytes=12 * n, footprint=12 * n)
    if kind == BACKWARD:
        floor = Floor(bytes=32 * n, footprint=24 * n)
    built = build(make, kind, floor)
    if with_peers:
        built.peers, built.absent = peers.linear_scan(base, kind == BACKWARD)
    return built


# block_scan ---------------------------------------------------------------------------------------


def _block_inputs(B: int, T: int, N: int, k: int) -> dict[str, Tensor]:
    """Matrices of their own for every step, whose products do not grow."""
    torch.manual_seed(0)
    return {"A": (2 * torch.rand(B, T, N, k, k) - 1) / k, "b": torch.randn(B, T, N, k)}


def _block_scan(shape: tuple[int, ...], kind: str, with_peers: bool) -> Built:
    base = _block_inputs(*shape)

    def make(transposed: bool = False, dtype: torch.dtype = torch.float32) -> Problem:
        return Problem(
            {k: laid_out(v.to(dtype), transposed) for k, v in base.items()},
            lambda f, x: f(**x)[0],
            recurra.block_scan,
            recurra.reference.block_scan,
            {"A": rows_and_channels, "b": rows_and_channels},
        )

    n, entries = base["b"].numel(), base["A"].numel()
    moved = 4 * (entries + 2 * n)
    floor = Floor(bytes=moved, footprint=moved, work={"fma": entries})
    if kind == BACKWARD:
        # The matrices once more, their gradient, the states, their cotangent and that of b.
        moved += 4 * (2 * entries + 3 * n)
        floor = Floor(bytes=moved, footprint=4 * (2 * entries + 4 * n), work={"fma": 3 * entries})
    return build(make, kind, floor)


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

    def make(transposed: bool = False, dtype: torch.dtype = torch.float32) -> Problem:
        return Problem(
            {
                k: v if k in parameters else laid_out(v.to(dtype), transposed)
                for k, v in base.items()
            },
            lambda f, x: f(**x, delta_softplus=True)[0],
            recurra.selective_scan,
            recurra.reference.selective_scan,
            {
                k: channels_of if k in parameters else rows_of if k in "BC" else rows_and_channels
                for k in base
            },
        )

    B, D, T, N = shape
    steps, states = B * D * T, B * D * T * N
    floor = Floor(work={"exp2": states, "fma": 4 * states, "softplus": steps, "silu": steps})
    built = build(make, kind, floor)
    if with_peers:
        built.peers, built.absent = peers.selective_scan(base, kind == BACKWARD)
    return built


# causal_conv1d ------------------------------------------------------------------------------------


def _conv_inputs(B: int, D: int, T: int, W: int = 4) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {"x": torch.randn(B, T, D), "weight": torch.randn(D, W) / 2, "bias": torch.randn(D)}


def _causal_conv1d(shape: tuple[int, ...], kind: str, with_peers: bool) -> Built:
    base = _conv_inputs(*shape)

    def make(transposed: bool = False, dtype: torch.dtype = torch.float32) -> Problem:
        x = laid_out(base["x"].to(dtype), transposed)
        return Problem(
            {**base, "x": x},
            lambda f, x: f(**x, activation="silu")[0],
            recurra.causal_conv1d,
            recurra.reference.causal_conv1d,
            {"x": rows_and_channels, "weight": channels_of, "bias": channels_of},
        )

    n = base["x"].numel()
    floor = Floor(bytes=8 * n, footprint=8 * n, work={"sigmoid": n})
    if kind == BACKWARD:
        floor = Floor(bytes=20 * n, footprint=16 * n, work={"sigmoid": 2 * n})
    built = build(make, kind, floor)
    if with_peers:
        built.peers, built.absent = peers.causal_conv1d(base, kind == BACKWARD)
    return built


# softmax_scan -------------------------------------------------------------------------------------


def _softmax_inputs(B: int, T: int, D: int) -> dict[str, Tensor]:
    """As RWKV-4 calls it, which is more work than Aaren."""
    torch.manual_seed(0)
    return {
        "s": torch.randn(B, T, D),
        "v": torch.randn(B, T, D),
        "decay": torch.rand(D),
        "bonus": torch.randn(D),
    }


def _softmax_scan(shape: tuple[int, ...], kind: str, with_peers: bool) -> Built:
    base = _softmax_inputs(*shape)
    parameters = ("decay", "bonus")

    def make(transposed: bool = False, dtype: torch.dtype = torch.float32) -> Problem:
        return Problem(
            {
                k: v if k in parameters else laid_out(v.to(dtype), transposed)
                for k, v in base.items()
            },
            lambda f, x: f(**x)[0],
            recurra.softmax_scan,
            recurra.reference.softmax_scan,
            {k: channels_of if k in parameters else rows_and_channels for k in base},
        )

    n = base["v"].numel()
    floor = Floor(bytes=12 * n, footprint=12 * n, work={"exp": 2 * n})
    if kind == BACKWARD:
        floor = Floor(bytes=32 * n, footprint=20 * n, work={"exp": 4 * n})
    return build(make, kind, floor)


# Step ops -----------------------------------------------------------------------------------------


def _step(op: str, shape: tuple[int, ...], with_peers: bool) -> Built:
    """One token after another of a short sequence must be what the whole-sequence op returns."""
    B, D = shape
    T = 8
    if op == "linear_scan":
        whole, parameters, options = _linear_inputs(B, T, D), {}, {}
    elif op == "block_scan":
        whole, parameters, options = _block_inputs(B, T, D // 4, 4), {}, {}
    elif op == "selective_scan":
        whole, options = selective_inputs(B, D, T, 16), {"delta_softplus": True}
        parameters = {k: whole.pop(k) for k in ("A", "D", "delta_bias")}
    elif op == "softmax_scan":
        whole, options = _softmax_inputs(B, T, D), {}
        parameters = {k: whole.pop(k) for k in ("decay", "bonus")}
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
            assert_close("the output", y, exact, plain),
            assert_close("the state", h, exact_h, plain_h),
        )

    # As model code calls it.
    call = getattr(torch.ops.recurra, f"{op}_step").default
    token = tokens[0]

    def once():
        return call(state, **token, **options)

    return Built(verify, {"recurra": per_call(once, _STEP_CALLS)}, None, calls=_STEP_CALLS)


# Import ------------------------------------------------------------------------------------------


def _import(with_peers: bool) -> list[Measured]:
    alone, beyond = import_seconds(7)
    return [Measured(1e3 * beyond, "ms beyond torch", 150, f"import torch {alone:.2f} s")]


# The table ----------------------------------------------------------------------------------------

SELECTIVE_SHAPES = ((1, 1536, 1024, 16), (8, 512, 512, 16), (4, 1536, 2048, 16))
LINEAR_SHAPES = ((8, 2048, 1024), (1, 65536, 256), (64, 512, 512))
BLOCK_SHAPES = ((8, 2048, 128, 4),)
SOFTMAX_SHAPES = ((8, 2048, 512), (1, 4096, 768))
CONV_SHAPES = tuple(shape[:3] for shape in SELECTIVE_SHAPES)
STEP_SHAPE = (1, 1536)

_BUILDERS = {
    "selective_scan": _selective_scan,
    "linear_scan": _linear_scan,
    "block_scan": _block_scan,
    "causal_conv1d": _causal_conv1d,
    "softmax_scan": _softmax_scan,
}
# The order of the sizes of a shape on the command line, as papers and peers give them.
AXES = {
    "selective_scan": ("B", "D", "L", "N"),
    "linear_scan": ("B", "T", "D"),
    "block_scan": ("B", "T", "N", "K"),
    "causal_conv1d": ("B", "D", "L"),
    "softmax_scan": ("B", "T", "D"),
    "rnn": ("B", "T", "N"),
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
    if op == "block_scan":
        if kind == FORWARD:
            return (Target("recurra", "floor", 1 / 0.6), Target("transposed", "recurra", 1.4), bf16)
        return (Target("recurra", "floor", 1.6), bf16)
    if op == "softmax_scan":
        if kind == FORWARD:
            return (Target("recurra", "floor", 2.0), Target("transposed", "recurra", 1.4), bf16)
        return (Target("recurra", "floor", 1.6), bf16)
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
    if op == "rnn":
        return rnn.case(shape, kind)
    listed = SELECTIVE_SHAPES + LINEAR_SHAPES + BLOCK_SHAPES + CONV_SHAPES + SOFTMAX_SHAPES
    targets = _targets(op, shape, kind) if shape in listed else ()
    return Case(op, shape, kind, functools.partial(_BUILDERS[op], shape, kind), targets)


def table() -> list[Case]:
    """Every case with targets, and one for each op that has none."""
    shapes = {
        "selective_scan": SELECTIVE_SHAPES,
        "linear_scan": LINEAR_SHAPES,
        "block_scan": BLOCK_SHAPES,
        "causal_conv1d": CONV_SHAPES,
        "softmax_scan": SOFTMAX_SHAPES,
    }
    cases = [
        case(op, shape, kind)
        for op in shapes
        for shape in shapes[op]
        for kind in (FORWARD, BACKWARD)
    ]
    cases += [
        Case(
            "selective_scan",
            shape,
            MEMORY,
            functools.partial(memory.case, "selective_scan", "inputs", 2.0, shape),
        )
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
    cases += rnn.cases() + linear.cases()
    cases += [
        Case(op, (), FORWARD, functools.partial(_default, op))
        for op in default.public_ops()
        if not any(case.op == op for case in cases)
    ]
    cases += [
        Case(
            "rtrl_update",
            shape,
            "chunk",
            functools.partial(rtrl.build, shape),
            rtrl.TARGETS,
            rtrl.AXES,
        )
        for shape in rtrl.SHAPES
    ]
    # Which are made of the cases above.
    from recurra.bench import arrays, deploy, dropin, griffin, models

    whole = {
        LM: models.BUILDERS,
        RWKV4: models.RWKV4_BUILDERS,
        GRIFFIN: griffin.BUILDERS,
        DROP_IN: dropin.BUILDERS,
        SERVING: deploy.SERVING_BUILDERS,
        ONNX: deploy.ONNX_BUILDERS,
    }
    for op, builders in whole.items():
        cases += [Case(op, (), name, build) for name, build in builders.items()]
    return [*cases, *arrays.cases(), Case(IMPORT, (), "", _import)]


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
