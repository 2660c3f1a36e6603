"""The ops on a GPU: right, the same from run to run, at home in streams and CUDA graphs. Loops over
opdb.py; everything is skipped where there is no GPU, where tests/cpp runs the kernels' logic."""

from __future__ import annotations

import contextlib
import gc

import pytest
import torch

import recurra
from opdb import OPS, VARIANTS
from recurra.jit import compile as compiling
from support import (
    DTYPES,
    LAYOUTS,
    LEAKY_CELL,
    Draw,
    assert_right,
    assert_same,
    cotangents,
    evaluate,
    everything,
    far_apart,
    far_inputs,
    is_index,
    laid_out,
    replaced,
    same_bits,
    step_arguments,
    tensors,
    with_state,
)

DEVICE = "cuda"
FAR = 2**31
ROW = 1021, 2048  # steps and channels of what has more than FAR elements
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
every_op = pytest.mark.parametrize("op", VARIANTS, ids=lambda op: op.label)
every_table_op = pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def _moved(args):
    return replaced(args, lambda k, v: v.detach().to(DEVICE))


class OnDevice:
    """An op of the table whose function computes on the device, on arguments from the CPU."""

    def __init__(self, op, layout="contiguous"):
        self._op, self._layout = op, layout

    def __getattr__(self, name):
        return getattr(self._op, name)

    def function(self, **args):
        def there(name, x):
            moved = x.to(DEVICE)
            # Where values must stay what they are, gradients too, only the order of memory changes.
            return (
                moved
                if self._layout == "contiguous"
                else moved.transpose(0, -1)
                .clone(memory_format=torch.contiguous_format)
                .transpose(0, -1)
            )

        return [y.cpu() for y in self._op.function(**replaced(args, there))]


@every_op
@every_dtype
def test_within_the_derived_bound(op, dtype):
    for args in op.samples(dtype, "quick"):
        assert_right(OnDevice(op), args, "on the device")


@every_op
@every_dtype
def test_within_the_bound_where_memory_is_transposed(op, dtype):
    for args in op.samples(dtype, "small"):
        assert_right(OnDevice(op, "transposed"), args, "transposed on the device")


@every_op
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_have_the_same_bits(op, layout):
    for dtype in op.dtypes:
        args = _moved(op.make(Draw(5), 2, 17, 33, dtype, False))
        strided = replaced(args, lambda k, v, layout=layout: laid_out(v, layout))
        plain = replaced(strided, lambda k, v: v.clone(memory_format=torch.contiguous_format))
        for got, want in zip(op.function(**strided), op.function(**plain), strict=True):
            assert same_bits(got, want)


@every_op
def test_gradcheck(op):
    for packed in (False, True):
        args = _moved(op.make(Draw(7), 1 if packed else 2, 5, 3, torch.float64, packed))
        names = [k for k in op.differentiable if args.get(k) is not None]
        given = {k: v for k, v in args.items() if k not in names}

        def function(*inputs, given=given, names=names):
            return op.function(**given, **dict(zip(names, inputs, strict=True)))

        assert torch.autograd.gradcheck(function, [args[k].requires_grad_() for k in names])


# Many sequences, and few of them that are long: kernels split time there.
SHAPES = [(3, 300, 130), (1, 5000, 3), (1, 9000, 1), (70, 40, 64)]


@every_op
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_large_shapes_repeat_bit_for_bit(op, shape):
    args = op.make(Draw(11), *shape, torch.float32, False)
    assert_right(OnDevice(op), args, f"{shape} on the device")
    on_device = _moved(args)
    cots = [c.to(DEVICE) for c in cotangents(op.function(**args))]
    assert_same(everything(op, on_device, cots), everything(op, on_device, cots), str(shape))


@every_op
@every_dtype
def test_steps_equal_the_whole(op, dtype):
    args = with_state(op, op.make(Draw(13), 3, 9, 40, dtype, False))
    args = _moved({k: v for k, v in args.items() if k not in op.not_in_steps})
    y, last = op.function(**args)
    h = args[op.state].clone()
    order = list(range(9))[:: -1 if args.get("reverse") else 1]
    seen = {t: op.step(h, **step_arguments(op, args, t)) for t in order}
    got = torch.stack([seen[t] for t in range(9)], 1)
    assert same_bits(got, y) and same_bits(h, last)


@every_op
@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
def test_slots(op, index):
    """A slot below zero skips its row, and so does one past the end, which nobody checks."""
    for dtype in op.dtypes:
        args = _moved(with_state(op, op.make(Draw(17), 4, 1, 20, dtype, False)))
        like, given = args[op.state], step_arguments(op, args, 0)
        states = Draw(3).normal(6, *like.shape[1:], dtype=like.dtype).to(DEVICE)
        alone = states[[4, 0, 2, 0]].clone()
        before = states.clone()
        want = op.step(alone, **given)
        slots = torch.tensor([4, -1, 2, 6], dtype=index, device=DEVICE)
        got = op.step(states, **given, slots=slots)
        assert same_bits(got[[0, 2]], want[[0, 2]])
        assert not got[1].any() and not got[3].any(), "a skipped row must return zeros"
        before[4], before[2] = alone[0], alone[2]
        assert same_bits(states, before), "states that no row names must stay"


@every_op
def test_hostile_cu_seqlens_leave_the_device_usable(op):
    args = op.make(Draw(19), 1, 40, 20, torch.float32, True)
    if args.get("cu_seqlens") is None:
        pytest.skip("no cu_seqlens")
    good = _moved(args)
    want = op.function(**good)
    bad = dict(good)
    bad["cu_seqlens"] = torch.full_like(good["cu_seqlens"], 2**31 - 1)
    bad["cu_seqlens"][::2] = -5
    op.function(**bad)
    torch.cuda.synchronize()
    for got, each in zip(op.function(**good), want, strict=True):
        assert same_bits(got, each)


@every_op
def test_clamped_values_are_told(op):
    with contextlib.suppress(RuntimeError):  # what other tests have left
        recurra.check_status()
    args = _moved(op.make(Draw(19), 1, 40, 20, torch.float32, True))
    if args.get("cu_seqlens") is not None:
        op.function(**args)
        recurra.check_status()
        for bad in ([0, 50], [0, 30, 20, 40], [1, 40], [0, 39]):
            op.function(**args | {"cu_seqlens": torch.tensor(bad, device=DEVICE), op.state: None})
            with pytest.raises(RuntimeError, match=f"cu_seqlens of {op.name} must ascend from 0"):
                recurra.check_status()
    args = _moved(with_state(op, op.make(Draw(17), 4, 1, 20, torch.float32, False)))
    given, h = step_arguments(op, args, 0), args[op.state].clone()
    for slots, good in (([3, -1, 2, 0], True), ([3, -1, 2, 4], False)):
        op.step(h, **given, slots=torch.tensor(slots, device=DEVICE))
        if good:
            recurra.check_status()
    with pytest.raises(RuntimeError, match=f"slots of {op.name}_step must be below the number"):
        recurra.check_status()
    recurra.check_status()


# ---- streams and graphs -------------------------------------------------------------------------


@every_op
def test_a_graph_replays_forward_and_backward(op):
    args = _moved(op.make(Draw(23), 2, 33, 20, torch.float32, False))
    names = [k for k in op.differentiable if args.get(k) is not None]
    cots = [c.to(DEVICE) for c in cotangents(op.function(**args))]

    def run():
        leaves = replaced(args, lambda k, v: v.detach().requires_grad_(k in names))
        outputs = op.function(**leaves)
        grads = torch.autograd.grad(
            outputs, [leaves[k] for k in names], cots, allow_unused=True, materialize_grads=True
        )
        return [y.detach() for y in outputs] + list(grads)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = run()
    other = _moved(op.make(Draw(23), 2, 33, 20, torch.float32, False))
    for name, x in tensors(args).items():
        if not is_index(x) and name in op.activations:
            x.copy_(other[name].roll(1, 0))
    graph.replay()
    for got, want in zip(recorded, run(), strict=True):
        assert same_bits(got, want)


@every_op
def test_a_graph_replays_steps(op):
    args = _moved(with_state(op, op.make(Draw(29), 2, 1, 20, torch.float32, False)))
    given, h = step_arguments(op, args, 0), args[op.state].clone()
    state = h.clone()
    op.step(state, **given)  # loads the library's code
    state.copy_(h)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = op.step(state, **given)
    for _ in range(3):
        graph.replay()
        assert same_bits(out, op.step(h, **given))
        assert same_bits(state, h)


@every_op
def test_runs_on_the_current_stream(op):
    """What is queued on the stream before the op has happened when its kernels read."""
    args = _moved(op.make(Draw(31), 2, 33, 20, torch.float32, False))
    want = op.function(**args)
    late = replaced(args, lambda k, v: v.clone() if is_index(v) else torch.zeros_like(v))
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        for name, x in tensors(late).items():
            x.copy_(args[name])
        got = op.function(**late)
    stream.synchronize()
    for x, y in zip(got, want, strict=True):
        assert same_bits(x, y)


# ---- Newton's method ----------------------------------------------------------------------------


def _newton(cell, dtype, T=300, N=20, scale=0.5, **options):
    draw, info = Draw(41), recurra.cells()[cell]
    x = draw.normal(2, T, len(info.inputs), N, dtype=dtype)
    params = scale * draw.normal(len(info.params), N, dtype=dtype)
    options = {"cell": cell, "algorithm": "newton", "chunk": 64, "return_states": True} | options
    want = recurra.rnn(x, params, **options)
    x, params = x.to(DEVICE), params.to(DEVICE)  # which capture would refuse
    return want, lambda: recurra.rnn(x, params, **options)


@pytest.mark.parametrize("cell", sorted(recurra.cells()))
@every_dtype
def test_newton_has_the_bits_of_the_cpu(cell, dtype):
    want, call = _newton(cell, dtype)
    for got, each in zip(call(), want, strict=True):
        assert same_bits(got.cpu(), each)


@pytest.mark.parametrize("cell", ["paragru", "paralstm"])
def test_newton_that_fails_is_sequential(cell):
    want, call = _newton(cell, torch.float32, scale=30, max_passes=1, chunk=32)
    for got, each in zip(call(), want, strict=True):
        assert same_bits(got.cpu(), each)
    _, call = _newton(cell, torch.float32, scale=30, max_passes=1, chunk=32, on_fail="sequential")
    sequential = _newton(cell, torch.float32, scale=30, algorithm="sequential")[1]()
    assert torch.allclose(call()[0], sequential[0], rtol=1e-4, atol=1e-4)


def test_newton_is_captured_and_waits_for_nothing():
    _, call = _newton("paragru", torch.float32)
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = call()
    graph.replay()
    for one, other in zip(got, call(), strict=True):
        assert same_bits(one, other)
    _, call = _newton("paragru", torch.float32, on_fail="raise")
    with (
        pytest.raises(RuntimeError, match='on_fail must be "sequential" while a CUDA graph is'),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        call()


def test_newton_global_is_refused():
    with pytest.raises(RuntimeError, match='"sequential" or "newton" on a CUDA device'):
        _newton("paragru", torch.float32, algorithm="newton-global")[1]()


# ---- cells of recurra.jit -----------------------------------------------------------------------

COMPILER = compiling.compiler()


@pytest.fixture(scope="module")
def cells(tmp_path_factory):
    """Makes cells that only a GPU runs, each with kernels of its own by a number in its text."""
    pytest.importorskip("cuda.core", reason="needs the extra cuda")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RECURRA_JIT_CACHE", str(tmp_path_factory.mktemp("cells")))
        patch.setattr(compiling, "compiler", lambda: None)
        yield lambda number: recurra.jit.cell(f"{LEAKY_CELL}// {number}")


def _for_leaky(dtype, device=DEVICE):
    draw, held = Draw(43), torch.float64 if dtype == torch.float64 else torch.float32
    given = (
        draw.normal(3, 70, 2, 33, dtype=dtype),
        draw.normal(2, 33, dtype=dtype),
        draw.normal(3, 2, 33, dtype=held),
    )
    return [t.to(device).requires_grad_() for t in given]


def _trained(cell, given):
    given = [t.detach().requires_grad_() for t in given]  # on the stream of now
    y, h_last, *_ = cell(*given)
    return [y, h_last, *torch.autograd.grad(y.float().square().sum() + h_last.sum(), given)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_a_jit_cell_has_the_bits_of_the_cpu(cells, dtype, monkeypatch):
    if COMPILER is None:
        pytest.skip("no C++ compiler")
    monkeypatch.setattr(compiling, "compiler", lambda: COMPILER)
    cell = cells(0)
    y, h_last, *_ = cell(*_for_leaky(dtype))
    cots = [c.detach().cpu() for c in (2 * y, h_last)]
    results = []
    for device in ("cpu", DEVICE):
        given = _for_leaky(dtype, device)
        y, h_last, *_ = cell(*given)
        grads = torch.autograd.grad((y, h_last), given, [c.to(device) for c in cots])
        results.append((y, h_last, *grads))
    for want, got in zip(*results, strict=True):
        assert same_bits(got.detach().cpu(), want.detach())


def test_the_first_backward_of_a_jit_cell(cells):
    """Autograd's own thread starts kernels there, on a cotangent that is expanded."""
    given = _for_leaky(torch.float32)
    cells(0)(*given)[0].sum().backward()
    assert all(t.grad.isfinite().all() and t.grad.any() for t in given)


def test_a_jit_cell_on_a_side_stream(cells):
    cell, given = cells(0), _for_leaky(torch.float32)
    want = _trained(cell, given)
    late = [torch.zeros_like(t).requires_grad_() for t in given]
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        with torch.no_grad():
            for t, value in zip(late, given, strict=True):
                t.copy_(value)
        got = _trained(cell, late)
    stream.synchronize()
    for one, other in zip(got, want, strict=True):
        assert same_bits(one.detach(), other.detach())


def test_a_graph_outlives_its_jit_cell(cells):
    cell, given = cells(1), _for_leaky(torch.float32)
    want = [t.detach().clone() for t in _trained(cell, given)]
    other = cells(2)
    with (
        pytest.raises(RuntimeError, match="must have run once before a CUDA graph is captured"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        other(*given)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = [t.detach() for t in _trained(cell, given)]
    del cell, other
    gc.collect()
    graph.replay()
    for one, each in zip(got, want, strict=True):
        assert same_bits(one, each)


# ---- limits -------------------------------------------------------------------------------------


def test_more_than_two_billion_elements():
    B, T, D = 1, 2**20 + 3, 2**11
    if torch.cuda.get_device_properties(0).total_memory < 24 << 30:
        pytest.skip("needs 24 GiB of device memory")
    b = torch.zeros(B, T, D, dtype=torch.bfloat16, device=DEVICE)
    b[:, -1] = 1
    b[:, 0] = 2
    a = torch.ones(1, 1, 1, dtype=torch.bfloat16, device=DEVICE)
    h, h_last = recurra.linear_scan(a, b)
    assert (h_last == 3).all() and (h[:, -1] == 3).all() and (h[:, -2] == 2).all()


@pytest.fixture(scope="module")
def far_memory():
    """Memory for :func:`far_apart` of small tensors, all beside one another."""
    size = (FAR + (1 << 24)) * 8  # complex states are the widest
    needed = size + (2 << 30)
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {needed / 2**30:.1f} GiB of free device memory")
    memory = torch.empty(size, dtype=torch.uint8, device=DEVICE)

    def place(slot: int):
        begin = slot << 20
        return lambda count, dtype: memory[begin : begin + count * dtype.itemsize].view(
            dtype
        )  # fails past the end

    return place


@every_table_op
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("axis", "BTD")
def test_strides_beyond_2_to_the_31(op, dtype, axis, far_memory):
    """Inputs and cotangents whose last element is more than 2^31 from the first have the bits of
    compact ones."""
    for seed in range(2):
        args = _moved(op.make(Draw(seed), 2, 3, 3, dtype, False))
        cots = [c.to(DEVICE) for c in cotangents(op.function(**args))]
        slots = iter(range(40))

        def far(x, n, slots=slots):
            return far_apart(x, n, FAR // max(x.shape[n] - 1, 1) + 64, far_memory(next(slots)))

        spread = replaced(args, far_inputs(op, axis, far))
        got = everything(op, spread, [far(cots[0], "BTD".index(axis)), *cots[1:]])
        assert_same(got, everything(op, args, cots), f"{axis} of {op.name}, seed {seed}")


@every_table_op
def test_step_states_beyond_2_to_the_31(op, far_memory):
    args = _moved(with_state(op, op.make(Draw(5), 3, 1, 5, torch.float32, False)))
    given = step_arguments(op, args, 0)
    state = args[op.state]
    far = far_apart(state, 0, FAR // 2 + 64, far_memory(0))
    slots = torch.tensor([2, -1, 1], device=DEVICE)
    got, want = op.step(far, **given, slots=slots), op.step(state, **given, slots=slots)
    assert same_bits(got, want) and same_bits(far, state)


@every_table_op
def test_more_than_two_billion_elements_of_every_result(op):
    """Rows that are all alike, in inputs that lie once in memory, have outputs and gradients that
    are all alike, and those of few rows within rounding: sums may be cut otherwise there."""
    time, channels = ROW
    one = _moved(op.make(Draw(41), 1, time, channels, torch.bfloat16, False))

    def repeated(args, rows):
        def expanded(x, n):
            return x.expand(*x.shape[:n], rows, *x.shape[n + 1 :])

        return replaced(args, far_inputs(op, "B", expanded))

    cots = [c[:1].to(DEVICE) for c in cotangents(op.function(**repeated(one, 2)))]
    few = everything(op, repeated(one, 2), [c.expand(2, *c.shape[1:]) for c in cots])
    rows = FAR // few[0][1][0].numel() + 2
    needed = sum(x.nbytes // 2 * rows for _, x in few if x.shape[:1] == (2,))
    gc.collect()
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < 2 * needed:  # saved states and partial sums as well
        pytest.skip(f"needs {2 * needed / 2**30:.0f} GiB of free device memory")
    torch.use_deterministic_algorithms(True, warn_only=True)  # new memory is NaN
    try:
        many = everything(op, repeated(one, rows), [c.expand(rows, *c.shape[1:]) for c in cots])
    finally:
        torch.use_deterministic_algorithms(False)
    for (name, x), (_, y) in zip(many, few, strict=True):
        if (x.shape[:1], y.shape[:1]) != ((rows,), (2,)):
            continue
        for row in (rows // 2, rows - 1):
            assert same_bits(x[row], x[0]), f"{name}, row {row}"
        size = y[0].float().abs().max().item()
        torch.testing.assert_close(x[0].float(), y[0].float(), rtol=0.05, atol=0.05 * size)


def test_out_of_memory_leaves_everything_usable():
    b = torch.randn(2, 64, 512, device=DEVICE)
    a = torch.rand_like(b)
    want = recurra.linear_scan(a, b)[0]
    free, _ = torch.cuda.mem_get_info()
    time = free // (4 * 512) * 2 // 3  # one input fits, a result beside it does not
    wide = torch.empty(1, time, 512, device=DEVICE)
    with pytest.raises(torch.OutOfMemoryError):
        recurra.linear_scan(a[:1, :1, :1], wide)
    del wide
    torch.cuda.empty_cache()
    assert same_bits(recurra.linear_scan(a, b)[0], want)


@every_table_op
def test_a_call_of_both_devices_names_them(op):
    args = _moved(op.make(Draw(3), 2, 3, 4, torch.float32, False))
    others = [k for k in op.activations if k != op.lead and args.get(k) is not None]
    other = others[0] if others else op.differentiable[1]
    args[other] = args[other].cpu()
    with pytest.raises(RuntimeError, match=f"{other} must be on the device of {op.lead}, cuda:0"):
        op.function(**args)


@pytest.mark.parametrize("shape", [(2, 32, 128), (1, 37, 45)], ids=["aligned", "ragged"])
@every_op
def test_two_shapes(op, shape):
    """What compute-sanitizer runs: every kernel of an op once or twice."""
    for packed in (False, True):
        args = _moved(op.make(Draw(37), 1 if packed else shape[0], *shape[1:], DTYPES[0], packed))
        cots = [c.to(DEVICE) for c in cotangents(op.function(**args))]
        evaluate(op, args, cots)
    stepped = _moved(with_state(op, op.make(Draw(37), 3, 1, shape[2], DTYPES[0], False)))
    op.step(stepped[op.state].clone(), **step_arguments(op, stepped, 0))
    torch.cuda.synchronize()
