"""recurra.numpy against the torch ops: bits, memory order, sentences, and what only arrays have."""

from __future__ import annotations

import inspect
import itertools
import threading
import time

import numpy as np
import pytest
import torch

import recurra
from opdb import OPS, VARIANTS
from support import (
    DTYPES,
    LAYOUTS,
    NIGHTLY,
    array_of,
    assert_same,
    check_forked_children,
    describe,
    error_calls,
    laid_out,
    parameters_of,
    replaced,
    same_bits,
    step_arguments,
    tensor_of,
    tensors,
    threads,
    with_state,
)

pytest.importorskip("recurra._native", reason="recurra._native is not built")
import recurra.numpy as rnp  # noqa: E402

every_op = pytest.mark.parametrize("op", VARIANTS, ids=lambda op: op.label)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
RANDOM = np.random.default_rng(5)


def arrays(args):
    return replaced(args, lambda k, v: array_of(v))


def called(op, args, suffix: str = "") -> list:
    """What recurra.numpy returns, as it is."""
    out = getattr(rnp, op.name + suffix)(**arrays(args))
    return list(out) if isinstance(out, tuple) else [out]


def returned(op, args) -> list:
    """All that the torch op returns."""
    return list(getattr(recurra, op.name)(**args))


def needs_ml_dtypes(dtype):
    if dtype == torch.bfloat16:
        pytest.importorskip("ml_dtypes", reason="bfloat16 arrays need ml_dtypes")


def named(outputs):
    return [(f"output {i}", x) for i, x in enumerate(outputs)]


@every_op
@every_dtype
def test_the_bits_of_the_torch_op(op, dtype):
    needs_ml_dtypes(dtype)
    shapes = op.samples(dtype, "nightly" if NIGHTLY else "quick")
    for args in itertools.chain(op.samples(dtype, "small"), itertools.islice(shapes, 0, None, 3)):
        got = [tensor_of(x) for x in called(op, args)]
        assert_same(named(got), named(returned(op, args)), describe(args))


@every_op
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_in_and_out(op, layout):
    for args in op.samples(torch.float32, "small"):
        strided = replaced(args, lambda k, v: laid_out(v, layout))
        got, want = called(op, strided), returned(op, strided)
        context = f"{layout}: {describe(strided)}"
        assert_same(named([tensor_of(x) for x in got]), named(want), context)
        for x, y in zip(got, want, strict=True):
            strides = [s * x.itemsize for s in y.stride()]
            where = [n for n in range(x.ndim) if x.shape[n] > 1 and x.size]
            assert [x.strides[n] for n in where] == [strides[n] for n in where], context


@every_op
def test_steps(op):
    for dtype in DTYPES:
        needs_ml_dtypes(dtype)
        for args in itertools.islice(op.samples(dtype, "small", packed=False), 4):
            args = with_state(op, args)
            given = step_arguments(op, args, 0)
            rows = args[op.lead].shape[0]
            slots = torch.arange(rows).flip(0)
            slots[:1] = -1
            for extra in ({}, {"slots": slots}):
                h, ours = args[op.state].clone(), args[op.state].clone()
                want = op.step(h, **given, **extra)
                got = called(op, {"h": ours, **given, **extra}, "_step")[0]
                assert same_bits(tensor_of(got), want), describe(args)
                assert same_bits(ours, h), describe(args)


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_bad_input_gets_the_sentence_of_the_torch_op(op):
    for args, error in error_calls(op):
        if any(x.dtype == torch.complex32 for x in tensors(args).values()):
            continue  # which NumPy does not have
        if any(x.dtype == torch.bfloat16 for x in tensors(args).values()):
            needs_ml_dtypes(torch.bfloat16)
        with pytest.raises(ValueError) as raised:
            called(op, args)
        said = str(raised.value)
        assert said.startswith(error.message), describe(args)
        advice = f"int64: pass {op.lead}.astype" in said or f"int32: pass {op.lead}.astype" in said
        assert advice == said.endswith('.astype("float32")')
        assert advice == (error.message.endswith(("got int64", "got int32")))


def gate(*shape):
    return RANDOM.random(shape, dtype=np.float32)


REFUSED = {
    "byte order": (
        lambda a, b: (a, b.astype(">f4")),
        ValueError,
        "linear_scan: b must be in the byte order of this machine, got >f4: pass "
        'b.astype(b.dtype.newbyteorder("="))',
    ),
    "unsigned": (
        lambda a, b: (a, b.astype(np.uint16)),
        ValueError,
        "linear_scan: b must have dtype float32, float64, bfloat16 or float16, or be complex, got "
        'uint16: pass b.astype("float32")',
    ),
    "objects": (
        lambda a, b: (a, b.astype(object)),
        ValueError,
        "linear_scan: b must have dtype float32, float64, bfloat16 or float16, or be complex, got "
        'object: pass b.astype("float32")',
    ),
    "long double": (
        lambda a, b: (a.astype(np.longdouble), b),
        ValueError,
        "linear_scan: a must have dtype float32 where b has float32, got "
        f"{np.dtype(np.longdouble)}",
    ),
    "list": (
        lambda a, b: (a.tolist(), b),
        TypeError,
        "linear_scan: a must be a numpy.ndarray, got list: pass numpy.asarray(a)",
    ),
    "tensor": (
        lambda a, b: (a, torch.zeros(1, 5, 4)),
        TypeError,
        "linear_scan: b must be a numpy.ndarray, got Tensor: pass numpy.asarray(b)",
    ),
    "none": (
        lambda a, b: (a, None),
        TypeError,
        "linear_scan: b must be a numpy.ndarray, got NoneType: pass numpy.asarray(b)",
    ),
    "unaligned": (
        lambda a, b: (a, np.frombuffer(b"0" + b.tobytes(), np.float32, b.size, 1).reshape(b.shape)),
        ValueError,
        "linear_scan: b must be aligned, with strides of whole elements: pass b.copy()",
    ),
    "field": (
        lambda a, b: (a, np.zeros(b.shape, "f4,i2")["f0"]),
        ValueError,
        "linear_scan: b must be aligned, with strides of whole elements: pass b.copy()",
    ),
    "dimensions": (
        lambda a, b: (a, np.zeros([1] * 9, np.float32)),
        ValueError,
        "linear_scan: b must have at most 8 dimensions, got 9",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_arrays_that_no_op_takes(what):
    change, kind, message = REFUSED[what]
    with pytest.raises(kind) as raised:
        rnp.linear_scan(*change(gate(1, 5, 4), gate(1, 5, 4)))
    assert str(raised.value) == message


@pytest.mark.parametrize(
    "options, message",
    [
        ({"reverse": 1}, "linear_scan: reverse must be True or False, got 1"),
        ({"cu_seqlens": [0, 5]}, "linear_scan: cu_seqlens must be a numpy.ndarray or None"),
    ],
)
def test_options_of_another_type(options, message):
    with pytest.raises(TypeError, match=message):
        rnp.linear_scan(gate(1, 5, 4), gate(1, 5, 4), **options)
    with pytest.raises(TypeError, match="rnn: cell must be a string, got 3"):
        rnp.rnn(gate(1, 5, 3, 4), gate(3, 4), cell=3)
    with pytest.raises(TypeError, match="rnn: chunk must be an integer or None, got 'all'"):
        rnp.rnn(gate(1, 5, 3, 4), gate(3, 4), cell="paragru", chunk="all")
    with pytest.raises(TypeError, match="conv1d: activation must be a string or None, got 3"):
        rnp.causal_conv1d(gate(1, 5, 4), gate(4, 3), activation=3)


def test_read_only_arrays_are_inputs_but_not_states():
    a, b, h = gate(2, 5, 4), gate(2, 5, 4), gate(2, 4)
    want = rnp.linear_scan(a, b, h)
    for x in (a, b, h):
        x.setflags(write=False)
    got = rnp.linear_scan(a, b, h, reverse=np.bool_(False))
    assert all(np.array_equal(x, y) for x, y in zip(got, want, strict=True))
    with pytest.raises(ValueError, match="h is written in place and must not be read-only"):
        rnp.linear_scan_step(h, a[:, 0], b[:, 0])
    with pytest.raises(ValueError, match="h is written in place and must not be expanded"):
        expanded = np.lib.stride_tricks.as_strided(gate(1, 4), (2, 4), (0, 4))
        rnp.linear_scan_step(expanded, a[:, 0], b[:, 0])


def test_results_own_their_memory():
    a, b = gate(1, 700, 512), gate(1, 700, 512)
    h, h_last = rnp.linear_scan(a, b)
    kept, copy = h[0, 3:7], h.copy()
    assert h.flags.writeable and h.ctypes.data % 64 == 0
    del h, h_last
    others = [rnp.linear_scan(b, a)[0] for _ in range(4)]
    assert np.array_equal(kept, copy[0, 3:7])
    assert len({x.ctypes.data for x in others}) == len(others)


def test_no_tensor_is_made():
    with torch.profiler.profile() as profile:
        rnp.linear_scan(gate(1, 5, 4), gate(1, 5, 4))
    assert not profile.key_averages()


def test_the_threads_of_torch():
    native = recurra._native
    for count in (1, 2):
        with threads(count):
            assert native.threads() == torch.ops.recurra._threads() == count
            seen = []
            thread = threading.Thread(target=lambda seen=seen: seen.append(native.threads()))
            thread.start()
            thread.join()
            assert seen == [count]


def test_python_runs_during_a_call():
    a, b = gate(4, 2048, 1024), gate(4, 2048, 1024)
    rnp.linear_scan(a, b)
    turns = []

    def work():
        begin = time.perf_counter()
        while time.perf_counter() - begin < 0.2:
            rnp.linear_scan(a, b)

    with threads(1):
        worker = threading.Thread(target=work)
        worker.start()
        last = time.perf_counter()
        while worker.is_alive():
            now = time.perf_counter()
            turns.append(now - last)
            last = now
        worker.join()
    # With the lock held there were one turn a call, of a few milliseconds each.
    assert len(turns) > 1000


def test_in_a_forked_child():
    check_forked_children(
        """
        import numpy as np
        import recurra.numpy as rnp
        from support import tensor_of

        def compute(call):
            return [tensor_of(x) for x in rnp.linear_scan(*call)]

        rng = np.random.default_rng(0)
        calls = [[rng.random((3, 900, 512), dtype=np.float32) for _ in range(2)]]
        """
    )


@pytest.mark.parametrize("name", rnp.__all__)
def test_signatures_and_documentation(name):
    ours, theirs = getattr(rnp, name), getattr(recurra, name)
    assert parameters_of(ours) == parameters_of(theirs)
    text = ours.__doc__
    assert text.splitlines()[0] == inspect.getdoc(theirs).splitlines()[0]
    for word in ("ensor", "RuntimeError", "device", "ifferentia", "radient", "recurra.Cell"):
        assert word not in text, word
    assert name.endswith("_step") or "No derivatives." in text


@pytest.mark.parametrize("shape", [(1, 0, 2**60), (2**29, 0, 2**31), (2**20, 2**20, 2**18)])
def test_sizes_whose_product_no_integer_holds(shape):
    """Broadcasting makes them of one number; what the op returns would not be so."""
    x = np.broadcast_to(np.float32(0), shape)
    packed = np.zeros(1025, np.int32) if shape[0] == 1 else None
    with pytest.raises(MemoryError, match=r"no memory for an array of shape \("):
        rnp.linear_scan(x, x, cu_seqlens=packed)


def test_states_without_elements():
    none = np.zeros((0, 8), np.float32)
    assert rnp.linear_scan_step(none, none, none).shape == (0, 8)


@pytest.mark.parametrize("axis", range(3))
def test_backwards_arrays_lie_as_their_forward_twins(axis):
    b = RANDOM.standard_normal((3, 6, 32), np.float32)
    turned = np.flip(b, axis)
    h, _ = rnp.linear_scan(turned, turned)
    assert h.strides == b.strides
    assert np.array_equal(h, rnp.linear_scan(turned.copy(), turned.copy())[0])


@pytest.mark.parametrize("chunk", [2**63, -(2**80), np.uint64(2**63)])
def test_integers_of_more_than_64_bits(chunk):
    with pytest.raises(
        TypeError, match=f"rnn: chunk must be an integer of 64 bits or None, got {chunk}"
    ):
        rnp.rnn(gate(1, 5, 3, 4), gate(3, 4), cell="paragru", chunk=chunk)
    with pytest.raises(UnicodeEncodeError):
        rnp.rnn(gate(1, 5, 3, 4), gate(3, 4), cell="\ud800")
