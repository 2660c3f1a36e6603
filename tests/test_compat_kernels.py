"""The stand-ins' scans, convolutions and steps against formulas of this file, in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from recurra.compat import causal_conv1d as conv
from recurra.compat.causal_conv1d import causal_conv1d_interface, causal_conv1d_varlen
from recurra.compat.fla.modules.convolution import causal_conv1d as fla_conv
from recurra.compat.fla.ops.hgrn import chunk_hgrn, fused_recurrent_hgrn
from recurra.compat.mamba_ssm.ops import selective_scan_interface as scan
from recurra.compat.mamba_ssm.ops.triton import selective_state_update as update
from support import laid_out


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def rand(*shape: int, dtype=torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype).requires_grad_()


def same(got, want, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


def same_gradients(ours, oracle, inputs: list[Tensor | None], tolerance: float = 1e-10) -> None:
    """Of all outputs with respect to all inputs that have one."""
    given = [x for x in inputs if x is not None]
    outputs = [f(*inputs) for f in (ours, oracle)]
    outputs = [(o,) if isinstance(o, Tensor) else o for o in outputs]
    weights = [torch.randn_like(o) for o in outputs[0]]
    for got, want in zip(*outputs, strict=True):
        same(got, want, tolerance)
    both = []
    for each in outputs:
        loss = sum((w.conj() * o).real.sum() for w, o in zip(weights, each, strict=True))
        both.append(torch.autograd.grad(loss, given))
    for got, want in zip(*both, strict=True):
        same(got, want, tolerance)


def scan_formula(u, delta, A, B, C, D=None, z=None, bias=None, softplus=True):
    """(B, D, L); B and C as (B, D, N, L), whatever they came as."""
    if A.is_complex():
        B, C = (x if x.dim() == 2 else torch.complex(x[..., 0::2], x[..., 1::2]) for x in (B, C))

    def spread(x: Tensor) -> Tensor:
        if x.dim() == 2:
            return x[None, :, :, None].expand(u.shape[0], -1, -1, u.shape[2])
        if x.dim() == 3:
            return x[:, None].expand(-1, u.shape[1], -1, -1)
        return x.repeat_interleave(u.shape[1] // x.shape[1], 1)

    B, C = spread(B), spread(C)
    dt = delta if bias is None else delta + bias[:, None]
    dt = F.softplus(dt) if softplus else dt
    h = torch.zeros(u.shape[0], *A.shape, dtype=A.dtype)
    ys = []
    for t in range(u.shape[2]):
        step = dt[:, :, t, None]
        h = torch.exp(step * A) * h + step * B[..., t] * u[:, :, t, None]
        y = (h * C[..., t]).sum(-1)
        ys.append(2 * y.real if A.is_complex() else y)
    y = torch.stack(ys, 2)
    y = y if D is None else y + D[:, None] * u
    return (y if z is None else y * F.silu(z)), h


N, L, DIM = 3, 9, 4


def scan_inputs(form: str, is_complex: bool) -> list[Tensor]:
    u, delta, z = rand(2, DIM, L), rand(2, DIM, L), rand(2, DIM, L)
    A = -torch.rand(DIM, N, dtype=torch.float64)
    A = torch.complex(A, torch.randn_like(A)) if is_complex else A

    def make(kind: str) -> Tensor:
        long = 2 * L if is_complex else L
        if kind == "constant":
            return rand(DIM, N, dtype=torch.complex128 if is_complex else torch.float64)
        return rand(2, N, long) if kind == "plain" else rand(2, 2, N, long)

    B, C = (make(kind) for kind in form.split("+"))
    return [u, delta, A.requires_grad_(), B, C, rand(DIM), z, rand(DIM)]


FORMS = ["plain+plain", "groups+groups", "constant+plain", "plain+constant", "constant+constant"]


@pytest.mark.parametrize("form, is_complex", list(itertools.product(FORMS, (False, True))))
def test_selective_scan(form, is_complex):
    def ours(*args):
        return scan.selective_scan_fn(*args, delta_softplus=True, return_last_state=True)

    inputs = scan_inputs(form, is_complex)
    same_gradients(ours, scan_formula, inputs)
    reference = scan.selective_scan_ref(*inputs, delta_softplus=True, return_last_state=True)
    for got, want in zip(reference, scan_formula(*inputs), strict=True):
        same(got, want)


def test_selective_scan_without_options():
    u, delta, A, B, C, *_ = scan_inputs("plain+plain", False)
    delta = delta.detach().abs()
    y = scan.selective_scan_fn(u, delta, A, B, C)
    same(y, scan_formula(u, delta, A, B, C, softplus=False)[0])
    u = u.detach().transpose(1, 2).contiguous().transpose(1, 2)
    moved = scan.selective_scan_fn(u, delta, A, B, C)
    assert torch.equal(moved, y) and moved.stride() == u.stride()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_selective_scan_in_16_bits(dtype):
    """Parameters stay float32, and the rounding is that of the inputs and the output."""
    u, delta, A, B, C, D, z, bias = (x.detach() for x in scan_inputs("plain+plain", False))
    u, delta, B, C, z = (x.to(dtype) for x in (u, delta, B, C, z))
    A, D, bias = (x.float() for x in (A, D, bias))
    y, last = scan.selective_scan_fn(u, delta, A, B, C, D, z, bias, True, True)
    wide = [x.double() for x in (u, delta, A, B, C, D, z, bias)]
    want, h = scan_formula(*wide)
    assert y.dtype == dtype and last.dtype == torch.float32
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(y.double(), want, rtol=eps, atol=1e-4)
    torch.testing.assert_close(last.double(), h, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", ["constant+plain", "constant+constant"])
@pytest.mark.parametrize("is_complex", [False, True])
def test_selective_scan_in_16_bits_beside_constants(dtype, form, is_complex):
    """Constant B and C keep float32 or complex64."""
    inputs = [x.detach() for x in scan_inputs(form, is_complex)]
    varying = [0, 1, 4, 6] if form == "constant+plain" else [0, 1, 6]
    narrow = {torch.float64: torch.float32, torch.complex128: torch.complex64}
    given = [x.to(dtype if i in varying else narrow[x.dtype]) for i, x in enumerate(inputs)]
    y, last = scan.selective_scan_fn(*given, True, True)
    wide = [x.to(torch.complex128 if x.is_complex() else torch.float64) for x in given]
    want, h = scan_formula(*wide)
    assert y.dtype == dtype and last.dtype == (torch.complex64 if is_complex else torch.float32)
    torch.testing.assert_close(y.double(), want, rtol=torch.finfo(dtype).eps, atol=1e-4)
    torch.testing.assert_close(last.to(h.dtype), h, rtol=1e-4, atol=1e-4)


def conv_formula(x, weight, bias=None, before=None, silu=True):
    before = x.new_zeros(*x.shape[:2], weight.shape[1] - 1) if before is None else before
    whole = torch.cat([before, x], 2)
    windows = whole.unfold(2, weight.shape[1], 1)
    y = (windows * weight[:, None]).sum(-1)
    y = y if bias is None else y + bias[:, None]
    return (F.silu(y) if silu else y), whole[..., x.shape[2] :]


@pytest.mark.parametrize("width, silu", list(itertools.product((2, 3, 4, 5, 6), (False, True))))
def test_convolution(width, silu):
    def ours(x, weight, bias, before):
        name = "swish" if silu else None
        return conv.causal_conv1d_fn(x, weight, bias, None, before, True, activation=name)

    def oracle(*args):
        return conv_formula(*args, silu=silu)

    inputs = [rand(2, 5, 7), rand(5, width), rand(5), rand(2, 5, width - 1)]
    same_gradients(ours, oracle, inputs)
    same_gradients(ours, oracle, [inputs[0], inputs[1], None, None])
    y, final = causal_conv1d_interface.causal_conv1d_ref(
        *inputs, True, activation="silu" if silu else None
    )
    for got, want in zip((y, final), oracle(*inputs), strict=True):
        same(got, want)
    out = torch.empty(2, 5, width - 1, dtype=torch.float64)
    x, weight, bias, before = (t.detach() for t in inputs)
    _, final = conv.causal_conv1d_fn(x, weight, bias, None, before, True, out, "silu")
    assert final is out
    same(out, conv_formula(x, weight, bias, before)[1])


@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded"])
def test_layouts_give_the_same_bits(layout):
    x = laid_out(torch.randn(2, 4, 9), layout)
    plain = x.contiguous()
    weight, A = torch.randn(4, 3), -torch.rand(4, 5)
    both = [conv.causal_conv1d_fn(t, weight, activation="silu") for t in (x, plain)]
    assert torch.equal(*both)
    B = laid_out(torch.randn(2, 5, 9), layout)
    one = scan.selective_scan_fn(x, x, A, B, B, None, x, None, True)
    two = scan.selective_scan_fn(plain, plain, A, *[B.contiguous()] * 2, None, plain, None, True)
    assert torch.equal(one, two)


@pytest.mark.parametrize("batch", [1, 2])
def test_convolution_within_sequences(batch):
    x, weight, bias = rand(batch, 3, 10), rand(3, 4), rand(3)
    seq_idx = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2, 2, -1], [5, 5, 5, 5, 5, 5, -1, -1, 7, 7]])
    seq_idx = seq_idx[:batch].int()

    def oracle(x, weight, bias):
        rows = []
        for row, index in zip(x, seq_idx.tolist(), strict=True):
            start, parts = 0, []
            for value, run in itertools.groupby(index):
                end = start + len(list(run))
                part = conv_formula(row[None, :, start:end], weight, bias)[0][0]
                parts.append(part if value >= 0 else torch.zeros_like(part))
                start = end
            rows.append(torch.cat(parts, 1))
        return torch.stack(rows)

    def ours(x, weight, bias):
        return conv.causal_conv1d_fn(x, weight, bias, seq_idx, activation="silu")

    same_gradients(ours, oracle, [x, weight, bias])


@pytest.mark.parametrize(
    "extra, dtype", list(itertools.product((0, 1, 3), (torch.float64, torch.bfloat16)))
)
@pytest.mark.parametrize("mode", ["plain", "two", "ring", "slots", "ring in slots", "gradients"])
def test_convolution_steps(extra, dtype, mode):
    """A sequence by updates is the sequence at once, and states are what they should be."""
    width, steps = 4, 12
    weight, bias = rand(3, width, dtype=dtype), rand(3, dtype=dtype)
    x = torch.randn(2, 3, steps, dtype=dtype)
    if mode != "gradients":
        weight, bias = weight.detach(), bias.detach()
    length = width - 1 + extra
    slots = torch.tensor([4, 1], dtype=torch.int32) if "slots" in mode else None
    state = torch.zeros(5 if "slots" in mode else 2, 3, length, dtype=dtype)
    by = 2 if mode == "two" else 1
    outputs = []
    for t in range(0, steps, by):
        past = torch.full((2,), t, dtype=torch.int32) if "ring" in mode else None
        piece = x[..., t] if by == 1 and mode != "slots" else x[..., t : t + by]
        y = conv.causal_conv1d_update(piece, state, weight, bias, "silu", past, slots)
        assert y.shape == piece.shape and y.dtype == dtype
        outputs.append(y[..., None] if y.dim() == 2 else y)
        if mode == "gradients":
            state = state.detach()
    want = conv_formula(*(t.double() for t in (x, weight, bias)))[0]
    tolerance = 1e-12 if dtype == torch.float64 else 2**-6
    same(torch.cat(outputs, 2).double(), want, tolerance)
    last = x[..., steps - length :]
    if "ring" in mode:
        last = last.roll(steps % length, 2)
    assert torch.equal(state if slots is None else state[slots.long()], last)
    if slots is not None:
        assert not state[[0, 2, 3]].any()
        before = state.clone()
        skip = torch.tensor([-1, 1], dtype=torch.int32)
        past = torch.zeros(2, dtype=torch.int32) if "ring" in mode else None
        y = conv.causal_conv1d_update(x[..., 0], state, weight, bias, None, past, skip)
        assert not y[0].any() and y[1].any()
        others = [0, 2, 3, 4]
        assert torch.equal(state[others], before[others])
        assert not torch.equal(state[1], before[1])


@pytest.mark.parametrize("length", [3, 4, 6])
@pytest.mark.parametrize("count", [2, 5, 9])
@pytest.mark.parametrize("ring", [False, True])
def test_several_inputs_are_one_after_another(length, count, ring):
    """In slots, with gradients, and more of them than the state holds."""
    x, pool, weight = rand(2, 3, count), rand(4, 3, length), rand(3, 4)
    slots = torch.tensor([2, 0])

    def at(t):
        return torch.tensor([5 + t, t], dtype=torch.int32) if ring else None

    def ours(x, pool, weight):
        states = pool.clone()
        y = conv.causal_conv1d_update(x, states, weight, None, "silu", at(0), slots)
        return y, states

    def oracle(x, pool, weight):
        states, rows = pool.clone(), []
        for t in range(count):
            if ring:
                places = (at(t).long()[:, None] + torch.arange(-3, 0)).remainder(length)
                recent = states[slots].gather(2, places[:, None].expand(-1, 3, -1))
            else:
                recent = states[slots][..., length - 3 :]
            rows.append(conv_formula(x[..., t : t + 1], weight, None, recent)[0])
            states = states.clone()
            for row, slot in enumerate(slots.tolist()):
                if ring:
                    states[slot, :, int(at(t)[row]) % length] = x[row, :, t]
                else:
                    states[slot] = torch.cat([states[slot][:, 1:], x[row, :, t : t + 1]], 1)
        return torch.cat(rows, 2), states

    same_gradients(ours, oracle, [x, pool, weight])


def test_convolution_step_gradients_and_reference():
    x, state, weight, bias = rand(2, 3, 2), rand(2, 3, 5), rand(3, 4), rand(3)

    def ours(x, state, weight, bias):
        mutable = state.clone()
        y = conv.causal_conv1d_update(x, mutable, weight, bias, "silu")
        return y, mutable

    def oracle(x, state, weight, bias):
        whole = torch.cat([state, x], 2)
        return conv_formula(x, weight, bias, state[..., 2:])[0], whole[..., 2:]

    same_gradients(ours, oracle, [x, state, weight, bias])
    for past in (None, torch.tensor([3, 7])):
        a, b = state.detach().clone(), state.detach().clone()
        args = (weight.detach(), bias.detach(), "silu", past)
        one = conv.causal_conv1d_update(x.detach(), a, *args)
        two = causal_conv1d_interface.causal_conv1d_update_ref(x.detach(), b, *args)
        same(one, two)
        same(a, b)


@pytest.mark.parametrize("wrong", [{"activation": "gelu"}, {"weight": torch.zeros(2, 4)}])
def test_refused_step_leaves_the_state(wrong):
    state = torch.randn(2, 3, 6)
    before = state.clone()
    arguments = {"x": torch.randn(2, 3), "conv_state": state, "weight": torch.zeros(3, 4)}
    with pytest.raises(RuntimeError):
        conv.causal_conv1d_update(**(arguments | wrong))
    assert torch.equal(state, before)
    if "activation" in wrong:
        with pytest.raises(RuntimeError, match="causal_conv1d_update_ref: activation"):
            causal_conv1d_interface.causal_conv1d_update_ref(**(arguments | wrong))
        assert torch.equal(state, before)


def test_steps_in_slots_record_gradients():
    pool, x, dt, B, C = rand(4, 5, N), rand(2, 5), rand(2, 5), rand(2, N), rand(2, N)
    A = -torch.rand(5, N, dtype=torch.float64).requires_grad_()
    slots = torch.tensor([3, -1])

    def ours(pool, x, dt, A, B, C):
        mutable = pool.clone()
        y = update.selective_state_update(
            mutable, x, dt, A, B, C, dt_softplus=True, state_batch_indices=slots
        )
        return y, mutable

    def oracle(pool, x, dt, A, B, C):
        step = F.softplus(dt[0])[:, None]
        h = torch.exp(step * A) * pool[3] + step * B[0] * x[0, :, None]
        y = (h * C[0]).sum(-1)
        return torch.stack([y, 0 * y]), torch.cat([pool[:3], h[None]])

    same_gradients(ours, oracle, [pool, x, dt, A, B, C])


def test_states_of_packed_sequences():
    x, ends = rand(11, 3), torch.tensor([0, 2, 2, 9, 11])
    states = causal_conv1d_varlen.causal_conv1d_varlen_states(x, ends, 4)
    for i, (start, end) in enumerate(itertools.pairwise(ends.tolist())):
        want = F.pad(x[start:end].T, (4, 0))[:, -4:]
        same(states[i], want)
    same(states, causal_conv1d_varlen.causal_conv1d_varlen_states_ref(x, ends, 4))
    for wrong in ([0, 5], [1, 11], [0, 8, 3, 11]):
        with pytest.raises(RuntimeError, match="cu_seqlens must ascend from 0 to 11"):
            causal_conv1d_varlen.causal_conv1d_varlen_states(x, torch.tensor(wrong), 4)


def test_compiled_states_of_packed_sequences():
    """Ends that are wrong are refused there too."""
    torch._dynamo.reset()
    function = causal_conv1d_varlen.causal_conv1d_varlen_states
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    x = rand(11, 3)
    same(compiled(x, torch.tensor([0, 2, 2, 11]), 4), function(x, torch.tensor([0, 2, 2, 11]), 4))
    for wrong in ([0, 2, 2, 5], [1, 2, 2, 11], [0, 8, 3, 11]):
        with pytest.raises(RuntimeError, match="cu_seqlens must ascend from 0 to the number"):
            compiled(x, torch.tensor(wrong), 4)


def step_formula(state, x, dt, A, B, C, D, z, bias):
    """(B, H, P, N)."""
    heads = state.shape[1]
    B, C = (t.repeat_interleave(heads // t.shape[1], 1)[:, :, None] for t in (B, C))
    dt = F.softplus(dt + bias)[..., None]
    h = torch.exp(dt * A) * state + dt * B * x[..., None]
    return ((h * C).sum(-1) + D * x) * F.silu(z), h


@pytest.mark.parametrize("tied, recording", list(itertools.product((False, True), (False, True))))
def test_step_of_mamba_2(tied, recording):
    H, P, G, batch = 4, 3, 2, 2
    state, x, z = rand(batch, H, P, N), rand(batch, H, P), rand(batch, H, P)
    B, C = rand(batch, G, N), rand(batch, G, N)
    if tied:  # expanded views, as Mamba-2's decoding passes them
        dt, bias, D = rand(batch, H, 1), rand(H, 1), rand(H, 1)
        A = -torch.rand(H, 1, 1, dtype=torch.float64).requires_grad_()
    else:
        dt, bias, D = rand(batch, H, P), rand(H, P), rand(H, P)
        A = -torch.rand(H, P, N, dtype=torch.float64).requires_grad_()

    def ours(state, x, dt, A, B, C, D, z, bias):
        mutable = state.clone()
        dt, A = dt.expand(-1, -1, P), A.expand(-1, P, N)
        D, bias = D.expand(-1, P), bias.expand(-1, P)
        args = (mutable, x, dt, A, B, C, D, z, bias, True)
        return update.selective_state_update(*args), mutable

    inputs = [state, x, dt, A, B, C, D, z, bias]
    if recording:
        same_gradients(ours, step_formula, inputs)
        return
    with torch.no_grad():
        for got, want in zip(ours(*inputs), step_formula(*inputs), strict=True):
            same(got, want)
        mutable = state.clone()
        wide = [dt.expand(-1, -1, P), A.expand(-1, P, N), B, C, D.expand(-1, P), z]
        y = update.selective_state_update_ref(mutable, x, *wide, bias.expand(-1, P), True)
        for got, want in zip((y, mutable), step_formula(*inputs), strict=True):
            same(got, want)
        permuted = state.detach().transpose(1, 2).contiguous().transpose(1, 2)
        update.selective_state_update(permuted, x, *wide, bias.expand(-1, P), True)
        same(permuted, mutable)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_in_slots(dtype):
    batch, dim = 3, 5
    pool = torch.randn(6, dim, N, dtype=dtype)
    x, dt, z = torch.randn(3, batch, dim, dtype=dtype)
    A, D, bias = -torch.rand(dim, N), torch.randn(dim), torch.randn(dim)
    B, C = torch.randn(2, batch, N, dtype=dtype)
    slots = torch.tensor([5, -1, 2], dtype=torch.int32)
    want_pool = pool.clone()
    y = update.selective_state_update(pool, x, dt, A, B, C, D, z, bias, True, slots)
    assert y.dtype == dtype and not y[1].any()
    for row in (0, 2):
        wide = (t.double()[row : row + 1, None] for t in (x, dt, B, C, z))
        u, step, b, c, gate = wide
        args = [want_pool.double()[slots[row]][None, None], u, step, A.double()[None], b, c]
        out, h = step_formula(*args, D.double(), gate, bias.double())
        tolerance = 1e-5 if dtype == torch.float32 else 2**-6
        same(y[row].double(), out[0, 0], tolerance)
        same(pool[slots[row]].double(), h[0, 0], tolerance)
    assert torch.equal(pool[[0, 1, 3, 4]], want_pool[[0, 1, 3, 4]])


def test_step_gradients_and_layouts_of_mamba_1():
    state, x, z = rand(2, 5, N), rand(2, 5), rand(2, 5)
    dt, B, C, D, bias = rand(2, 5), rand(2, N), rand(2, N), rand(5), rand(5)
    A = -torch.rand(5, N, dtype=torch.float64).requires_grad_()

    def ours(state, *rest):
        mutable = state.clone()
        return update.selective_state_update(mutable, *rest, True), mutable

    def oracle(state, x, dt, A, B, C, D, z, bias):
        y, h = step_formula(
            state[:, None], x[:, None], dt[:, None], A, B[:, None], C[:, None], D,
            z[:, None], bias,
        )  # fmt: skip
        return y[:, 0], h[:, 0]

    inputs = [state, x, dt, A, B, C, D, z, bias]
    same_gradients(ours, oracle, inputs)
    with torch.no_grad():
        y, want = oracle(*inputs)
        for layout in ("transposed", "sliced", "offset"):
            moved = laid_out(state, layout)
            same(update.selective_state_update(moved, *inputs[1:], True), y)
            same(moved, want)


@pytest.mark.parametrize("wide", ["dt", "B", "z"])
def test_steps_of_several_dtypes(wide):
    """The package's kernel loads every argument as float32, whatever its dtype."""
    given = {"x": torch.randn(2, 4, 3), "dt": torch.randn(2, 4, 3), "z": torch.randn(2, 4, 3)}
    given |= {"B": torch.randn(2, 2, N), "C": torch.randn(2, 2, N)}
    given = {k: v if k == wide else v.bfloat16() for k, v in given.items()}
    A, D, bias, state = (
        -torch.rand(4, 3, N),
        torch.randn(4, 3),
        torch.randn(4, 3),
        torch.randn(2, 4, 3, N),
    )
    exact = {k: v.double() for k, v in given.items()}
    want, h = step_formula(
        state.double(), exact["x"], exact["dt"], A.double(), exact["B"], exact["C"], D.double(),
        exact["z"], bias.double(),
    )  # fmt: skip
    y = update.selective_state_update(
        state, given["x"], given["dt"], A, given["B"], given["C"], D, given["z"], bias, True
    )
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), want, rtol=2**-8, atol=1e-5)
    same(state.double(), h, 1e-5)


def test_steps_are_the_scan():
    u, delta, A, B, C, D, z, bias = (x.detach() for x in scan_inputs("plain+plain", False))
    y, last = scan.selective_scan_fn(u, delta, A, B, C, D, z, bias, True, True)
    state = torch.zeros_like(last)
    for t in range(L):
        rows = (v[..., t] for v in (u, delta, B, C, z))
        x, dt, b, c, gate = rows
        out = update.selective_state_update(state, x, dt, A, b, c, D, gate, bias, True)
        same(out, y[..., t])
    same(state, last)


@pytest.mark.parametrize("packed", [False, True])
def test_hgrn(packed):
    x, g = rand(1 if packed else 2, 8, 3), rand(1 if packed else 2, 8, 3)
    h0 = rand(2, 3)
    ends = torch.tensor([0, 3, 8]) if packed else None

    def oracle(x, g, h0):
        spans = [(0, 0, 3), (0, 3, 8)] if packed else [(0, 0, 8), (1, 0, 8)]
        outputs, last = [], []
        for n, (row, start, end) in enumerate(spans):
            h = h0[n]
            for t in range(start, end):
                h = g[row, t].exp() * h + x[row, t]
                outputs.append(h)
            last.append(h)
        return torch.stack(outputs).view(x.shape), torch.stack(last)

    def ours(x, g, h0):
        return fused_recurrent_hgrn(x, g, h0, True, ends)

    same_gradients(ours, oracle, [x, g, h0])
    if not packed:
        same(chunk_hgrn(x, g, h0, True), oracle(x, g, h0))
        assert chunk_hgrn(x, g)[1] is None
        # fla computes in float32 whatever the dtypes.
        h, last = fused_recurrent_hgrn(x.bfloat16(), g.float(), h0.float(), True)
        want = oracle(x.bfloat16().double(), g, h0)
        assert h.dtype == torch.bfloat16 and last.dtype == torch.float32
        torch.testing.assert_close(h.double(), want[0], rtol=2**-8, atol=1e-5)
        same(last.double(), want[1], 1e-5)


@pytest.mark.parametrize("packed", [False, True])
def test_convolution_of_fla(packed):
    W = 4
    x, residual = rand(1 if packed else 2, 9, 3), rand(1 if packed else 2, 9, 3)
    weight, bias, before = rand(3, W), rand(3), rand(2, 3, W)
    ends = torch.tensor([0, 2, 9]) if packed else None

    def oracle(x, weight, bias, residual, before):
        spans = [(0, 0, 2), (0, 2, 9)] if packed else [(0, 0, 9), (1, 0, 9)]
        outputs, last = [], []
        for n, (row, start, end) in enumerate(spans):
            part = x[row : row + 1, start:end].transpose(1, 2)
            outputs.append(conv_formula(part, weight, bias, before[n : n + 1, :, 1:])[0][0].T)
            last.append(torch.cat([before[n], part[0]], 1)[:, -W:])
        return torch.cat(outputs).view(x.shape) + residual, torch.stack(last)

    def ours(x, weight, bias, residual, before):
        return fla_conv(x, weight, bias, residual, before, True, "silu", cu_seqlens=ends)

    same_gradients(ours, oracle, [x, weight, bias, residual, before])
    want = oracle(x, weight, bias, residual, 0 * before)
    y, last = fla_conv(x, weight, bias, residual, None, True, "swish", cu_seqlens=ends)
    same((y, last), want)
    y, last = fla_conv(x, weight, bias, residual, activation="silu", cu_seqlens=ends)
    assert last is None
    same(y, want[0])
    heads, added = (t.unflatten(2, (3, 1)) for t in (x, residual))
    y, last = fla_conv(heads, weight, bias, added, before, True, "silu", cu_seqlens=ends)
    same((y.flatten(2), last), oracle(x, weight, bias, residual, before))
    half = x.bfloat16(), weight.bfloat16(), None, residual
    assert fla_conv(*half, cu_seqlens=ends)[0].dtype == torch.bfloat16
