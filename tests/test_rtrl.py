"""Real-time recurrent learning against backpropagation through the whole past, in float64."""

from __future__ import annotations

import pytest
import torch

import recurra
from celldb import CELLS
from recurra import reference
from recurra.rtrl import Sensitivities
from support import Draw, same_bits

KINDS = tuple(recurra.rtrl.recurrences())
TOLERANCE = 1e-10
every_kind = pytest.mark.parametrize("cell", KINDS)


def random_sizes(draw: Draw, steps: int, most: int) -> list[int]:
    sizes = []
    while sum(sizes) < steps:
        sizes.append(min(draw.rng.randint(1, most), steps - sum(sizes)))
    return sizes


class Problem:
    """A layer with random parameters, a stream, a start that is not zero, and a loss."""

    def __init__(self, cell: str, B=3, T=512, D=5, N=20, resets=True, dtype=torch.float64, seed=0):
        draw = Draw(seed)
        info = recurra.rtrl.recurrences()[cell]
        K, G, P = len(info.states), len(info.inputs), len(info.params)
        self.cell, self.dtype, self.sizes = cell, dtype, (B, T, D, N)
        self.W = 0.4 * draw.normal(G, N, D, dtype=torch.float64)
        self.b = 0.4 * draw.normal(G, N, dtype=torch.float64)
        self.params = 0.5 * draw.normal(P, N, dtype=torch.float64)
        self.h0 = draw.normal(B, K, N, dtype=torch.float64)
        for known in CELLS:
            if known.name == cell:
                for name in set(known.positive) & set(info.params):
                    self.params[info.params.index(name)].abs_()
                for name in set(known.positive) & set(info.states):
                    self.h0[:, info.states.index(name)] = 1.5
        if "dt" in info.params:
            self.params[info.params.index("dt")] = draw.uniform(0.1, 0.5, N, dtype=torch.float64)
        if cell.startswith("linear"):  # memories of up to a hundred steps
            self.params = 0.99 * self.params / self.params.norm(dim=0).clamp_min(1)
            if cell == "linear-gated":
                self.W[0] *= 0.05
                self.b[0] = draw.uniform(0.5, 0.9, N, dtype=torch.float64)
        self.u = draw.normal(B, T, D, dtype=torch.float64)
        self.reset = torch.rand(B, T, generator=draw.generator) < 0.01 if resets else None
        width = N * (2 if cell == "linear-complex" else 1)
        self.readout = draw.normal(width, dtype=torch.float64)
        self.target = draw.normal(B, T, dtype=torch.float64)
        for name in ("W", "b", "params", "h0", "u", "readout", "target"):
            setattr(self, name, getattr(self, name).to(dtype))

    def losses(self, W, b, params, h0, span: slice, reference_run=None):
        """Of every sample over a part of the stream; and the states behind it."""
        x = torch.einsum("gnd,btd->btgn", W, self.u[:, span]) + b[:, None, None].movedim(0, 2)
        reset = None if self.reset is None else self.reset[:, span]
        if reference_run:
            y, last = whole(self.cell, x, params, h0, reset)
        else:
            y, last = recurra.ops.rtrl.run(x, params, h0, self.cell, reset)
        error = torch.tanh(y @ self.readout) - self.target[:, span]
        return error.square().sum(1), last, x

    def bptt(self, per_sample: bool = False) -> list[torch.Tensor]:
        """Gradients of the parameters by torch's autograd over all of a plain loop."""
        leaves = [p.clone().requires_grad_() for p in (self.W, self.b, self.params)]
        loss, _, _ = self.losses(*leaves, self.h0, slice(None), reference_run=True)
        grads = [
            torch.autograd.grad(
                one, leaves, retain_graph=True, allow_unused=True, materialize_grads=True
            )
            for one in (loss if per_sample else [loss.sum()])
        ]
        return [torch.stack(rows) for rows in zip(*grads, strict=True)] if per_sample else grads[0]

    def rtrl(self, chunks: list[int], reduce="sum", update=recurra.rtrl_update):
        """The same, accumulated chunk by chunk; and the sensitivities behind the stream."""
        B, T, D, N = self.sizes
        assert sum(chunks) == T
        S = recurra.rtrl.initial(self.cell, B, D, N, dtype=self.dtype)
        h, total, t = self.h0, None, 0
        for size in chunks:
            span = slice(t, t + size)
            leaves = [p.clone().requires_grad_() for p in (self.W, self.b, self.params, h)]
            loss, last, x = self.losses(*leaves, span)
            if reduce == "sum":
                inside = torch.autograd.grad(
                    loss.sum(), leaves, allow_unused=True, materialize_grads=True
                )
                dh0 = inside[3]
            else:
                each = [
                    torch.autograd.grad(
                        one, leaves, retain_graph=True, allow_unused=True, materialize_grads=True
                    )
                    for one in loss
                ]
                inside = [torch.stack(rows) for rows in zip(*each, strict=True)]
                dh0 = inside[3].sum(0)
            past = recurra.rtrl_gradient(S, dh0, reduce=reduce)
            found = [a + b for a, b in zip(inside, past, strict=False)]
            total = found if total is None else [a + b for a, b in zip(total, found, strict=True)]
            reset = None if self.reset is None else self.reset[:, span]
            S = update(S, self.u[:, span], x.detach(), self.params, h, cell=self.cell, reset=reset)
            h, t = last.detach(), t + size
        return total, S


def whole(cell, x, params, h0, reset):
    """The recurrence as a loop in plain torch, for every kind."""
    step = reference.rtrl.step_of(cell)
    h, states = h0.transpose(0, 1), []
    p = params[:, None].expand(-1, x.shape[0], -1)
    for t in range(x.shape[1]):
        if reset is not None:
            h = torch.where(reset[:, t, None], 0, h)
        h = step(x[:, t].transpose(0, 1), h, p)
        states.append(h)
    info = recurra.rtrl.recurrences()[cell]
    out = torch.stack(states, 2)  # (K, B, T, N)
    y = torch.cat([*out], -1) if cell == "linear-complex" else out[info.states.index(info.output)]
    return y, h.transpose(0, 1)


def assert_close(got, want, context: str, tolerance: float = TOLERANCE) -> None:
    for name, a, b in zip(("weight", "bias", "params"), got, want, strict=True):
        assert a.shape == b.shape, f"{context}: {name} has shape {a.shape}, not {b.shape}"
        if b.numel():
            error = ((a - b).abs().max() / b.abs().max().clamp_min(1e-300)).item()
            assert error <= tolerance, f"{context}: {name} is off by {error:.3g}"


# ---- exactness --------------------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize("resets", [False, True], ids=["whole", "resets"])
def test_the_accumulated_gradient_is_that_of_the_whole_past(cell, resets):
    problem = Problem(cell, resets=resets, seed=len(cell))
    want = problem.bptt()
    got, _ = problem.rtrl(random_sizes(Draw(3), 512, 90))
    assert_close(got, want, cell)


@every_kind
def test_step_by_step_and_per_sample(cell):
    problem = Problem(cell, B=2, T=40, N=9, seed=5)
    each = problem.bptt(per_sample=True)
    got, _ = problem.rtrl([1] * 40)
    assert_close(got, [g.sum(0) for g in each], "step by step")
    got, _ = problem.rtrl([7] * 5 + [5], reduce="none")
    assert_close(got, each, "per sample")


@every_kind
def test_sensitivities_are_those_of_single_steps(cell):
    problem = Problem(cell, B=2, T=70, N=18, D=19, seed=7)
    chunks = [70]
    _, want = problem.rtrl(chunks, update=reference.rtrl_update)
    _, got = problem.rtrl([33, 37])
    assert_close(got, want, cell)


def test_truncation_would_be_seen():
    """Without the sensitivities the gradient is another one: the tests above can fail."""
    problem = Problem("elstm", resets=False)
    want = problem.bptt()
    got, _ = problem.rtrl([16] * 32, update=lambda S, *_, **__: S)
    with pytest.raises(AssertionError, match="is off by"):
        assert_close(got, want, "truncated", 1e-3)


@pytest.mark.parametrize("D", [1, 3, 15, 16, 17, 31, 32, 33, 64, 100])
@pytest.mark.parametrize("cell", ["elstm", "lem", "slstm", "linear-complex"])
def test_shapes_of_the_kernel(cell, D):
    """Whole and partial vectors, blocks of channels, time beyond what is walked at once."""
    for N, T in ((1, 1), (7, 130), (8, 128), (9, 3), (17, 0), (33, 257 if D < 4 else 2)):
        problem = Problem(cell, B=2, T=T, D=D, N=N, seed=D + N)
        B = 2
        draw = Draw(11)
        S = Sensitivities(
            *(
                draw.normal(*s.shape, dtype=torch.float64)
                for s in recurra.rtrl.initial(cell, B, D, N)
            )
        )
        _, _, x = problem.losses(problem.W, problem.b, problem.params, problem.h0, slice(None))
        arguments = (problem.u, x, problem.params, problem.h0)
        want = reference.rtrl_update(S, *arguments, cell=cell, reset=problem.reset)
        dh0 = draw.normal(*problem.h0.shape, dtype=torch.float64)
        for reduce in ("sum", "none"):
            assert_close(
                recurra.rtrl_gradient(S, dh0, reduce=reduce),
                reference.rtrl_gradient(S, dh0, reduce=reduce),
                f"gradient of {cell} {N} {D}",
                1e-13,
            )
        turned = dh0.transpose(1, 2).contiguous().transpose(1, 2)
        for a, b in zip(
            recurra.rtrl_gradient(S, turned), recurra.rtrl_gradient(S, dh0), strict=True
        ):
            assert same_bits(a, b)
        u = problem.u.transpose(1, 2).contiguous().transpose(1, 2)
        got = recurra.rtrl_update(S, u, *arguments[1:], cell=cell, reset=problem.reset)
        assert got is S
        assert_close(got, want, f"{cell} {N} {T}", 1e-12)


@pytest.mark.parametrize("cell", ["elstm", "paralstm", "slstm", "linear-complex"])
def test_float32_is_near(cell):
    exact = Problem(cell, seed=2)
    plain = Problem(cell, seed=2, dtype=torch.float32)
    want = exact.bptt()
    got, _ = plain.rtrl([32] * 16)
    assert got[0].dtype == torch.float32
    assert_close([g.double() for g in got], want, cell, 2e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("cell", ["elstm", "lem", "slstm"])
def test_bits_depend_on_neither_threads_nor_isa_nor_company(cell, dtype):
    problem = Problem(cell, B=3, T=96, D=37, N=70, dtype=dtype, seed=4)
    threads, isa = torch.get_num_threads(), torch.ops.recurra._isa()

    def everything():
        total, S = problem.rtrl([40, 56])
        return [*total, *S]

    want = everything()
    try:
        for name in ("scalar", "avx2"):
            torch.ops.recurra._isa(name)
            assert all(map(same_bits, everything(), want)), name
        torch.ops.recurra._isa(isa)
        for count in (1, 3):
            torch.set_num_threads(count)
            assert all(map(same_bits, everything(), want)), count
    finally:
        torch.ops.recurra._isa(isa)
        torch.set_num_threads(threads)
    _, S = problem.rtrl([40, 56])
    alone = Problem(cell, B=3, T=96, D=37, N=70, dtype=dtype, seed=4)
    for name in ("u", "h0", "reset", "target"):
        setattr(alone, name, getattr(alone, name)[1:2])
    alone.sizes = (1, *alone.sizes[1:])
    _, one = alone.rtrl([40, 56])
    assert all(same_bits(a[:1], b[1:2]) for a, b in zip(one, S, strict=True))


@every_kind
def test_a_reset_forgets_even_what_is_not_finite(cell):
    problem = Problem(cell, B=2, T=6, N=4, D=3, seed=9)
    problem.reset = torch.zeros(2, 6, dtype=torch.bool)
    problem.reset[0, 2] = True
    S = Sensitivities(*(torch.full_like(s, torch.inf) for s in recurra.rtrl.initial(cell, 2, 3, 4)))
    _, _, x = problem.losses(problem.W, problem.b, problem.params, problem.h0, slice(None))
    for s in S:
        s.data = s.double()
    recurra.rtrl_update(S, problem.u, x, problem.params, problem.h0, cell=cell, reset=problem.reset)
    assert all(s[0].isfinite().all() for s in S)
    assert not S.weight[1].isfinite().all()
    dh0 = torch.zeros_like(problem.h0)
    assert all((g == 0).all() for g in recurra.rtrl_gradient(S, dh0))


# ---- what is refused --------------------------------------------------------------------------


def arguments(cell="lem", **changes):
    problem = Problem("elstm" if cell == "lstn" else cell, B=2, T=3, D=5, N=4)
    _, _, x = problem.losses(problem.W, problem.b, problem.params, problem.h0, slice(None))
    S = recurra.rtrl.initial(problem.cell, 2, 5, 4, dtype=torch.float64)
    given = {"S": S, "u": problem.u, "x": x, "params": problem.params, "h0": problem.h0}
    return given | {"cell": cell, "reset": problem.reset} | changes


def zeros(*shape, dtype=torch.float64):
    return torch.zeros(shape, dtype=dtype)


@pytest.mark.parametrize("cell", ["lem", "linear-complex"])
@pytest.mark.parametrize(
    "changes, message",
    [
        ({"u": zeros(2, 4, 5)}, "u must have shape (B, T, D) with B = 2, T = 3, got (2, 4, 5)"),
        (
            {"u": zeros(2, 3, 5, dtype=torch.float32)},
            "u must have dtype float64 where x has float64, got float32",
        ),
        ({"x": zeros(2, 3, 4)}, "x must have shape (B, T, G, N), got (2, 3, 4)"),
        (
            {"x": zeros(2, 3, 1, 4)},
            "x must have G = {G} for the inputs of {cell} ({inputs}), got (2, 3, 1, 4)",
        ),
        (
            {"params": zeros(7, 4)},
            "params must have P = {P} for the parameters of {cell} ({params}), got (7, 4)",
        ),
        (
            {"h0": zeros(2, 1, 4)},
            "h0 must have K = 2 for the states of {cell} ({states}), got (2, 1, 4)",
        ),
        ({"reset": zeros(2, 3)}, "reset must have dtype bool, got float64"),
        ({"S": (1, 2, 3)}, "S must be recurra.rtrl.Sensitivities, got tuple"),
    ],
)
def test_what_is_wrong_is_said(cell, changes, message):
    info = recurra.rtrl.recurrences()[cell]
    words = {
        "cell": cell,
        "G": len(info.inputs),
        "P": len(info.params),
        "inputs": ", ".join(info.inputs),
        "params": ", ".join(info.params),
        "states": ", ".join(info.states),
    }
    with pytest.raises(RuntimeError) as error:
        recurra.rtrl_update(**arguments(cell, **changes))
    assert str(error.value).splitlines()[0] == f"rtrl_update: {message.format(**words)}"


def refused(call, *args, **kwargs) -> str:
    with pytest.raises(RuntimeError) as error:
        call(*args, **kwargs)
    return str(error.value).splitlines()[0]


def test_unknown_cells_and_halves_and_strides_are_refused():
    known = ", ".join(KINDS)
    wanted = f'cell must be one of {known}, got "lstn"'
    assert refused(recurra.rtrl_update, **arguments("lstn")) == f"rtrl_update: {wanted}"
    assert refused(recurra.rtrl.initial, "lstn", 1, 1, 1) == f"initial: {wanted}"
    assert refused(recurra.rtrl.Layer, 3, 4, "lstn") == f"Layer: {wanted}"
    for cell in ("lem", "linear-complex"):
        given = arguments(cell)
        half = {
            k: v.bfloat16() if isinstance(v, torch.Tensor) and v.is_floating_point() else v
            for k, v in given.items()
        }
        half["h0"] = half["h0"].float()
        half["S"] = recurra.rtrl.initial(cell, 2, 5, 4)
        message = "rtrl_update: x must have dtype float32 or float64, got bfloat16"
        assert refused(recurra.rtrl_update, **half) == message
        S = given["S"]
        turned = S.weight.transpose(3, 4).contiguous().transpose(3, 4)
        given["S"] = S._replace(weight=turned)
        message = "rtrl_update: S_weight must be contiguous"
        assert refused(recurra.rtrl_update, **given) == message
        given["S"] = recurra.rtrl.initial("mgu", 2, 5, 4, dtype=torch.float64)
        message = refused(recurra.rtrl_update, **given)
        assert message in (
            "rtrl_update: S_weight must have shape (B, K, G, N, D) with B = 2, G = 4, N = 4, "
            "D = 5, got (2, 1, 2, 4, 5)",
            "rtrl_update: S_weight must have K = 2 for the states of linear-complex (re, im), got "
            "(2, 1, 2, 4, 5)",
        )
        given["S"] = S._replace(weight=S.weight[..., :4].contiguous())
        message = refused(recurra.rtrl_update, **given)
        assert message.startswith("rtrl_update: S_weight must have shape (B, K, G, N, D) with")


def test_refusals_of_the_gradient():
    S = recurra.rtrl.initial("lem", 2, 5, 4)
    for dh0, reduce, message in (
        (torch.zeros(2, 2, 4), "mean", 'reduce must be "sum" or "none", got "mean"'),
        (torch.zeros(2, 1, 4), "sum", "dh0 must have shape (B, K, N) with B = 2, K = 2, N = 4"),
        (zeros(2, 2, 4), "sum", "dh0 must have dtype float32 where S_weight has float32"),
    ):
        got = refused(recurra.rtrl_gradient, S, dh0, reduce=reduce)
        assert got.startswith(f"rtrl_gradient: {message}")


def test_fake_tensors_say_the_same():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        given = arguments("lem")
        given = {
            k: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for k, v in given.items()
        }
        assert recurra.rtrl_update(**given) is given["S"]
        bad = given | {"u": torch.zeros(2, 4, 5, dtype=torch.float64)}
        message = "rtrl_update: u must have shape (B, T, D) with B = 2, T = 3, got (2, 4, 5)"
        assert refused(recurra.rtrl_update, **bad) == message
        found = recurra.rtrl_gradient(given["S"], given["h0"], reduce="none")
        assert [tuple(g.shape) for g in found] == [(2, 4, 4, 5), (2, 4, 4), (2, 5, 4)]


def test_gradients_through_the_ops_are_refused():
    given = arguments("lem")
    S = given["S"]
    x = given["x"].requires_grad_()
    message = refused(
        torch.ops.recurra._rtrl_update, *S, given["u"], x, given["params"], None, cell="lem"
    )
    assert message.startswith(
        "recurra: rtrl_update has no gradient; use recurra.rtrl.OnlineLearner"
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opcheck(dtype):
    """Schema, fakes and what is written in place, of the three ops behind these functions."""
    ops = torch.ops.recurra
    p = Problem("paralstm", B=2, T=7, D=3, N=5, dtype=dtype)
    x = torch.einsum("gnd,btd->btgn", p.W, p.u) + p.b[None, None]
    S = [torch.randn_like(s) for s in recurra.rtrl.initial("paralstm", 2, 3, 5, dtype=dtype)]
    options = {"cell": "paralstm", "reset": p.reset}
    torch.library.opcheck(ops._rtrl_update, (*S, p.u, x, p.params, p.h0), options)
    K, G, P = 2, 3, 5
    sizes = (K, 2, K, 5), (K, 2, 7, G, 5), (K, 2, P, 5)  # of decay, factors and direct
    derivatives = [torch.randn(size, dtype=dtype) for size in sizes]
    torch.library.opcheck(ops._rtrl_advance, (*S, p.u, *derivatives))
    for each in (False, True):
        torch.library.opcheck(ops._rtrl_gradient, (*S, torch.randn_like(p.h0), each))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
@pytest.mark.parametrize("cell", tuple(recurra.cells()))
def test_the_device_has_the_bits_of_the_cpu(cell, dtype):
    # Widths that are read number by number, and sixteen bytes at a time over more than a tile.
    for batch, inputs, channels in ((3, 5, 20), (2, 160, 70)):
        p = Problem(cell, B=batch, T=70, D=inputs, N=channels, dtype=dtype)
        _, _, x = p.losses(p.W, p.b, p.params, p.h0, slice(None))
        start = recurra.rtrl.initial(cell, batch, inputs, channels, dtype=dtype)
        start = Sensitivities(*(Draw(n).normal(*s.shape, dtype=dtype) for n, s in enumerate(start)))
        found = []
        for device in ("cpu", "cuda"):
            there = [t.to(device) for t in (p.u, x, p.params, p.h0)]
            S = Sensitivities(*(s.to(device, copy=True) for s in start))
            given = [recurra.rtrl_gradient(S, there[3], reduce=r) for r in ("sum", "none")]
            recurra.rtrl_update(S, *there, cell=cell, reset=p.reset.to(device))
            found.append([t.cpu() for group in (S, *given) for t in group])
        for on_cpu, on_device in zip(*found, strict=True):
            assert same_bits(on_cpu, on_device)
