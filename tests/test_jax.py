"""recurra.jax against the torch ops: bits of outputs and gradients, transforms, sentences."""

from __future__ import annotations

import inspect
import itertools
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

import recurra
from opdb import VARIANTS
from support import (
    DTYPES,
    NIGHTLY,
    Draw,
    array_of,
    assert_same,
    cotangents,
    describe,
    error_calls,
    evaluate,
    laid_out,
    parameters_of,
    replaced,
    run_python,
    tensor_of,
    tensors,
)

jax = pytest.importorskip("jax", reason="jax is not installed")
pytest.importorskip("recurra._native", reason="recurra._native is not built")
import jax.numpy as jnp  # noqa: E402

import recurra.jax as rj  # noqa: E402

# Where JAX has a GPU too, one test is for it.
jax.config.update("jax_default_device", jax.devices("cpu")[0])
OPS = [op for op in VARIANTS if op.name in rj.__all__]
every_op = pytest.mark.parametrize("op", OPS, ids=lambda op: op.label)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def arrays(args):
    return replaced(args, lambda k, v: jnp.asarray(array_of(v)))


def conjugate(x):
    return x.conj() if jnp.iscomplexobj(x) else x


def learned(op, args) -> list[str]:
    return [k for k in op.differentiable if args.get(k) is not None]


def differentiated(op, args):
    """A function of the differentiable arguments, by name, that returns what has a gradient."""
    function = getattr(rj, op.name)
    rest = {k: v for k, v in args.items() if k not in learned(op, args)}
    return lambda leaves: function(**rest, **leaves)[: len(op.outputs)]


def outputs_and_gradients(op, args, cots) -> list:
    """In one compiled function, as torch has them: the conjugates of what JAX calls gradients."""
    args = arrays(args)
    function = differentiated(op, args)

    @jax.jit
    def run(leaves, cots):
        outputs, pull = jax.vjp(function, leaves)
        return outputs, pull(tuple(conjugate(c) for c in cots))[0]

    leaves = {k: args[k] for k in learned(op, args)}
    outputs, grads = run(leaves, [jnp.asarray(array_of(c)) for c in cots])
    named = [(f"output {i}", tensor_of(y)) for i, y in enumerate(outputs)]
    return named + [(f"gradient of {k}", tensor_of(conjugate(grads[k]))) for k in leaves]


def wanted(op, args, cots) -> list:
    outputs, grads, _ = evaluate(op, args, cots)
    named = [(f"output {i}", y.contiguous()) for i, y in enumerate(outputs)]
    return named + [(f"gradient of {k}", grads[k].contiguous()) for k in learned(op, args)]


@every_op
@every_dtype
def test_the_bits_of_the_torch_op(op, dtype):
    # Every call is compiled, which takes half a second.
    small, large = op.samples(dtype, "small"), op.samples(dtype, "quick")
    chosen = [*itertools.islice(small, 8 if NIGHTLY else 1)]
    chosen += itertools.islice(large, 2, None, 5 if NIGHTLY else 60)
    with jax.enable_x64(True):
        for args in chosen:
            cots = cotangents(op.function(**args))
            got = outputs_and_gradients(op, args, cots)
            assert_same(got, wanted(op, args, cots), describe(args))


@every_op
def test_strided_arrays_come_in_through_numpy(op):
    for layout in ("transposed", "expanded"):
        for args in itertools.islice(op.samples(torch.float32, "small"), 1):
            args = replaced(args, lambda k, v, layout=layout: laid_out(v, layout))
            got = getattr(rj, op.name)(**replaced(args, lambda k, v: v.numpy()))
            want = getattr(recurra, op.name)(**args)
            same = [(i, tensor_of(x)) for i, x in enumerate(got)]
            assert_same(same, [(i, y.contiguous()) for i, y in enumerate(want)], describe(args))


# ---- transforms -------------------------------------------------------------------------------


def each(op, args, share: set[str], count: int = 3):
    """Three sets of arguments with other numbers, but for what they share, and in_axes."""
    draw = Draw(71)

    def other(name, x):
        if not x.is_floating_point() and not x.is_complex():
            return x
        return draw.normal(*x.shape, dtype=x.dtype).abs() * 0.3 if not x.is_complex() else x

    sets = [replaced(args, lambda k, v: v if k in share else other(k, v)) for _ in range(count)]
    return sets


@every_op
def test_vmap_is_a_call_for_each(op):
    """Whether it folds into the rows of one call or runs one after another."""
    for args in itertools.islice(op.samples(torch.float32, "small"), 6 if NIGHTLY else 1):
        parameters = {k for k in op.axes if "B" not in op.axes[k] and "S" not in op.axes[k]}
        indices = {k for k, v in tensors(args).items() if k in ("cu_seqlens", *op.masks)}
        for share in (parameters | indices, {op.lead} | indices):
            sets = each(op, args, share)
            names = [k for k in learned(op, args) if k not in share]
            fixed = arrays({k: v for k, v in args.items() if k not in names})
            function = getattr(rj, op.name)

            def value(leaves, cots, fixed=fixed, function=function):
                outputs, pull = jax.vjp(lambda x: function(**fixed, **x)[: len(op.outputs)], leaves)
                return outputs, pull(cots)[0]

            cots = cotangents(op.function(**args))
            stacked = {k: jnp.stack([arrays(s)[k] for s in sets], 1) for k in names}
            outputs, grads = jax.jit(jax.vmap(value, in_axes=(1, None)))(
                stacked, tuple(conjugate(jnp.asarray(array_of(c))) for c in cots)
            )
            for i, one in enumerate(sets):
                want, want_grads, _ = evaluate(op, one, cots)
                got = [(j, tensor_of(y[i])) for j, y in enumerate(outputs)]
                context = f"example {i}, shared {share}: {describe(one)}"
                assert_same(got, [(j, y.contiguous()) for j, y in enumerate(want)], context)
                for k in names:
                    got = tensor_of(conjugate(grads[k][i]))
                    assert_same([(k, got)], [(k, want_grads[k].contiguous())], context)


def test_vmap_folds_rows_into_one_call():
    x = jnp.ones((5, 2, 7, 4))

    def calls(function, *args) -> int:
        text = str(jax.make_jaxpr(function)(*args))
        return text.count("recurra[") if "scan[" not in text else -1

    assert calls(jax.vmap(rj.linear_scan), x, x) == 1
    grad = jax.vmap(jax.grad(lambda a, b: rj.linear_scan(a, b)[0].sum(), argnums=(0, 1)))
    assert calls(grad, x, x) == 2
    assert calls(jax.vmap(lambda b: rj.linear_scan(x[0, :1, :1], b)), x) == 1
    assert calls(jax.vmap(jax.vmap(lambda a, b: rj.linear_scan(a[None], b[None]))), x, x) == 1
    ends = jnp.array([0, 3, 7])
    packed = jax.vmap(lambda b: rj.linear_scan(b, b, cu_seqlens=ends))
    assert calls(packed, x[:, :1]) == -1


def test_vmap_of_no_examples():
    x, shared = jnp.ones((0, 2, 5, 4)), jnp.ones((1, 5, 4))

    def with_gradients(a, b):
        out, pull = jax.vjp(rj.linear_scan, a, b)
        return out, pull(out)

    for function in (with_gradients, lambda a, b: with_gradients(shared, b)):
        out, grads = jax.vmap(function)(x, x)
        assert [y.shape for y in out] == [(0, 2, 5, 4), (0, 2, 4)]
        assert grads[1].shape == x.shape


def test_uncompiled_and_exported():
    x = jnp.asarray(np.random.default_rng(4).random((2, 9, 4), dtype=np.float32))

    def grad(x):
        return jax.grad(lambda x: rj.linear_scan(x, x)[0].sum())(x)

    want = grad(x)
    with jax.disable_jit():
        assert np.array_equal(grad(x), want)
    free = jax.export.DisabledSafetyCheck.custom_call("recurra")
    text = jax.export.export(jax.jit(grad), disabled_checks=[free])(x).serialize()
    assert np.array_equal(jax.export.deserialize(text).call(x), want)


def test_inside_other_transforms():
    x = jnp.asarray(np.random.default_rng(3).random((2, 9, 4), dtype=np.float32))

    def layer(c, _):
        return jax.checkpoint(lambda c: rj.linear_scan(0.5 * c, c)[0])(c), None

    def loss(x):
        return jax.lax.scan(layer, x, None, length=3)[0].sum()

    leaf = torch.tensor(np.asarray(x), requires_grad=True)
    c = leaf
    for _ in range(3):
        c = recurra.linear_scan(0.5 * c, c)[0]
    c.sum().backward()
    got = tensor_of(jax.jit(jax.grad(loss))(x))
    torch.testing.assert_close(
        got, leaf.grad
    )  # XLA sums the two terms of a product in another order


def test_custom_calls_that_others_make():
    """What XLA holds is not written to, and no array is left aside."""
    h = jnp.ones((2, 4))
    call = jax.ffi.ffi_call("recurra", jax.ShapeDtypeStruct((2, 4), jnp.float32))
    for op, given, count, message in (
        ("linear_scan_step", "1110", 3, "what XLA holds is not written in place"),
        ("linear_scan", "1100", 3, "a custom call has too many arrays"),
    ):
        options = {"op": op, "given": given, "log_a": np.bool_(False), "reverse": np.bool_(False)}
        with pytest.raises(Exception, match=message):
            jax.block_until_ready(call(*[h] * count, **options))
    assert np.array_equal(h, np.ones((2, 4)))


def test_what_is_not_differentiable_says_so():
    x = jnp.ones((1, 5, 4))

    def loss(a):
        return rj.linear_scan(a, x)[0].sum()

    with pytest.raises(NotImplementedError, match="linear_scan: the second derivative is not"):
        jax.grad(lambda a: jax.grad(loss)(a).sum())(x)
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(loss, (x,), (x,))
    # An output that nothing depends on, and one that has no gradient.
    inputs, params = jnp.ones((1, 5, 3, 4)), jnp.ones((3, 4))
    grad = jax.grad(lambda p: rj.rnn(inputs, p, cell="paragru")[1].sum())(params)
    assert grad.shape == params.shape
    passes = jax.grad(lambda p: rj.rnn(inputs, p, cell="paragru")[3])(params)
    assert not passes.any()


# ---- bad input --------------------------------------------------------------------------------


@pytest.mark.parametrize("op", OPS[:-1], ids=lambda op: op.name)
def test_bad_input_gets_the_sentence_of_the_torch_op(op):
    for args, error in error_calls(op):
        given = tensors(args).values()
        if any(x.dtype == torch.complex32 for x in given):
            continue  # which JAX does not have
        # What is found when it runs is of one kind at JAX's first call of a function, then another.
        kind = (jax.errors.JaxRuntimeError, ValueError) if error.of_values else ValueError
        with jax.enable_x64(True), pytest.raises(kind) as raised:
            jax.block_until_ready(getattr(rj, op.name)(**arrays(args)))
        said = str(raised.value)
        assert error.message in said, describe(args)
        if not error.of_values:
            assert said.startswith(error.message)
            assert said.endswith('.astype("float32")') == error.message.endswith(
                ("got int64", "got int32")
            )


X = np.ones((1, 5, 4), np.float32)


def lowered(platform: str) -> str:
    scan = jax.jit(lambda x: rj.linear_scan(x, x)[0])
    return scan.trace(X).lower(lowering_platforms=(platform,)).as_text()


REFUSED = [
    (lambda: rj.linear_scan(X.tolist(), X), TypeError, "a must be a jax.Array, got list: pass"),
    (lambda: rj.linear_scan(X, torch.ones(3)), TypeError, "b must be a jax.Array, got Tensor"),
    (lambda: rj.linear_scan(X, X.astype(">f4")), ValueError, "byte order of this machine, got >f4"),
    (
        lambda: rj.linear_scan(X[:1], X[:1], cu_seqlens=np.array([0, 2**32 + 4, 5])),
        ValueError,
        "cu_seqlens must be from -2147483648 to 2147483647, got 0 to 4294967300: jax.config",
    ),
    (lambda: rj.linear_scan(X, X, reverse=1), TypeError, "reverse must be True or False, got 1"),
    (
        lambda: jax.jit(lambda r: rj.linear_scan(X, X, reverse=r))(True),
        TypeError,
        "reverse must be True or False, got a traced value",
    ),
    (
        lambda: rj.linear_scan(X, jnp.ones((1, 5, 4), jnp.int8)),
        ValueError,
        'or be complex, got int8: pass b.astype\\("float32"\\)',
    ),
    (
        lambda: rj.causal_conv1d(jnp.ones((1, 5, 4), jnp.float8_e4m3fn), X[0].T),
        ValueError,
        'got float8_e4m3fn: pass x.astype\\("float32"\\)',
    ),
    (
        lambda: rj.linear_scan(jnp.ones((1, 5, 4), jnp.uint32), X),
        ValueError,
        "a must have dtype float32 where b has float32, got uint32",
    ),
    (
        lambda: rj.linear_scan(jax.random.key(0), X),
        ValueError,
        "a must have dtype float32 where b has float32, got key<fry>",
    ),
    (lambda: rj.linear_scan(None, X), TypeError, "a must be a jax.Array, got NoneType: pass"),
    (lambda: rj.linear_scan(X, X, 1.0), TypeError, "h0 must be a jax.Array or None, got float"),
    (
        lambda: rj.linear_scan(X, X, log_a=None),
        TypeError,
        "linear_scan: log_a must be True or False, got None",
    ),
    (
        lambda: rj.rnn(X[None], X[0], cell="tanh", algorithm=None),
        TypeError,
        "rnn: algorithm must be a string, got None",
    ),
    (
        lambda: rj.rnn(X[None], X[0], cell="tanh", chunk=2**63),
        TypeError,
        "rnn: chunk must be an integer of 64 bits or None, got 9223372036854775808",
    ),
    (
        lambda: jax.vmap(rj.linear_scan)(jnp.ones((3, 2, 5, 7)), jnp.ones((3, 2, 5, 8))),
        ValueError,
        "with B = 2, T = 5, D = 8, got \\(2, 5, 7\\)",
    ),
    (
        lambda: jax.vmap(rj.linear_scan)(jnp.ones((3, 2, 5, 7)), jnp.ones(3)),
        ValueError,
        "b must have shape \\(B, T, D\\), got \\(\\)",
    ),
    (
        lambda: jax.export.export(jax.jit(rj.linear_scan))(
            *[jax.ShapeDtypeStruct(jax.export.symbolic_shape("rows, 5, 4"), jnp.float32)] * 2
        ),
        ValueError,
        "linear_scan: the shape of a must be known when the call is compiled, got \\(rows, 5, 4\\)",
    ),
    (lambda: rj.rnn(X[None], X[0], cell=recurra), TypeError, "cell must be a string, got <module"),
    (
        lambda: rj.rnn(X[None], X[0], cell="tanh", chunk=1.5),
        TypeError,
        "chunk must be an integer or None, got 1.5",
    ),
    (
        lambda: rj.causal_conv1d(X, X[0], activation=3),
        TypeError,
        "causal_conv1d: activation must be a string or None, got 3",
    ),
    (
        lambda: lowered("tpu"),
        ValueError,
        "linear_scan: this computation is placed on tpu, and recurra.jax has kernels for the CPU "
        "and for CUDA only: place it with jax.default_device",
    ),
]


@pytest.mark.parametrize("i", range(len(REFUSED)))
def test_refusals(i):
    call, kind, message = REFUSED[i]
    with pytest.raises(kind, match=message):
        call()


def test_a_failed_newton_raises_where_that_is_asked_for():
    x, params = Draw(1).normal(1, 2048, 1, 2, dtype=torch.float32), torch.full((1, 2), -8.0)
    options = {"cell": "tanh", "algorithm": "newton", "chunk": 32, "max_passes": 1}
    options["on_fail"] = "raise"
    with pytest.raises(RuntimeError, match="did not converge"):
        recurra.rnn(x, params, **options)
    with pytest.raises(jax.errors.JaxRuntimeError, match="rnn: newton did not converge for"):
        jax.block_until_ready(rj.rnn(x.numpy(), params.numpy(), **options))


# ---- threads and devices ----------------------------------------------------------------------


CUDA = Path(recurra.__file__).parent / "_xla_cuda.so"


@pytest.mark.skipif(not CUDA.exists(), reason="built without nvcc")
def test_cuda_calls_are_compiled_where_there_is_no_gpu():
    assert "custom_call @recurra(" in lowered("cuda")
    assert lowered("cuda") == lowered("cpu")
    rj.check_status(jax.devices("cpu")[0])
    rj.check_status("cpu")
    with jax.set_mesh(jax.make_mesh((1,), ("rows",), devices=jax.devices("cpu")[:1])):
        rj.check_status()
    with jax.default_device("cpu"):
        rj.check_status()


def test_without_its_library_cuda_is_told_why():
    run_python(
        """
        import pathlib, jax, numpy as np, recurra
        from recurra import _library

        found = _library.find
        for place, reason in (
            (None, "recurra was built without nvcc"),
            (pathlib.Path("/nowhere/_xla_cuda.so"), "its library cannot be loaded (/nowhere/"),
        ):
            _library.find = lambda name: place if name == "_xla_cuda.so" else found(name)
            library, why = _library.xla_cuda()
            assert library is None and why.startswith(reason), why
        import recurra.jax as rj

        x = np.ones((1, 5, 4), np.float32)
        scan = jax.jit(lambda x: rj.linear_scan(x, x)[0])
        try:
            scan.trace(x).lower(lowering_platforms=("cuda",))
        except ValueError as error:
            want = (
                "linear_scan: this computation is placed on cuda, and recurra.jax has no CUDA "
                "kernels here, since its library cannot be loaded (/nowhere/"
            )
            assert want in str(error), error
            assert "build it where nvcc is on the PATH, or place it with" in str(error), error
        else:
            raise AssertionError("not refused")
        assert scan(x).shape == x.shape
        """
    )


def test_the_switch_leaves_cuda_out():
    run_python(
        """
        import jax, numpy as np, recurra
        from recurra import _library

        _library.find = lambda name: "libc.so.6"  # as if there were one that loads
        assert _library.xla_cuda()[0] is None
        import recurra.jax as rj

        x = np.ones((1, 5, 4), np.float32)
        scan = jax.jit(lambda x: rj.linear_scan(x, x)[0])
        try:
            scan.trace(x).lower(lowering_platforms=("cuda",))
        except ValueError as error:
            assert "here, since RECURRA_CUDA is 0: unset it, or place it with" in str(error), error
        else:
            raise AssertionError("not refused")
        assert scan(x).shape == x.shape
        """,
        RECURRA_CUDA="0",
    )


def gpus() -> list:
    try:
        return jax.devices("cuda") if torch.cuda.is_available() else []
    except RuntimeError:
        return []


@pytest.mark.gpu
@pytest.mark.skipif(not gpus(), reason="needs a GPU, a JAX and a torch that both have CUDA")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@every_op
def test_on_a_gpu_the_bits_of_the_torch_op_there(op, dtype):
    small, large = op.samples(dtype, "small"), op.samples(dtype, "quick")
    for args in [*itertools.islice(small, 1), *itertools.islice(large, 2, None, 60)]:
        there = replaced(args, lambda k, v: v.detach().cuda())
        try:
            cots = cotangents(op.function(**there))
        except RuntimeError as error:
            assert "on a CUDA device, got" in str(error), describe(args)  # which JAX says as well
            continue
        with jax.enable_x64(True), jax.default_device(gpus()[0]):
            got = outputs_and_gradients(op, args, [c.cpu() for c in cots])
        want = [(k, x.cpu()) for k, x in wanted(op, there, cots)]
        assert_same(got, want, describe(args))


@pytest.mark.gpu
@pytest.mark.skipif(not gpus(), reason="needs a GPU, a JAX and a torch that both have CUDA")
def test_on_a_gpu_clamped_values_leave_a_mark():
    with jax.default_device(gpus()[0]):
        rj.check_status()
        x, ends = jnp.ones((1, 40, 8)), jnp.array([0, 9, 7, 40])
        jax.block_until_ready(rj.linear_scan(x, x, cu_seqlens=ends))
        with pytest.raises(RuntimeError, match="cu_seqlens of linear_scan must ascend"):
            rj.check_status()
        rj.check_status()


def test_from_several_threads_at_once():
    draw = Draw(7)
    a, b = (draw.uniform(0, 1, 4, 512, 256, dtype=torch.float32) for _ in range(2))
    want = recurra.linear_scan(a, b)[0].numpy()
    function = jax.jit(lambda a, b: rj.linear_scan(a, b)[0])
    wrong = []

    def work():
        for _ in range(10):
            if not np.array_equal(function(a.numpy(), b.numpy()), want):
                wrong.append(1)

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def test_on_several_devices():
    run_python(
        """
        import jax, numpy as np, torch
        import recurra, recurra.jax as rj
        from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

        mesh = jax.make_mesh((4,), ("rows",), axis_types=(AxisType.Auto,))
        rng = np.random.default_rng(0)
        a, b = rng.random((1, 1, 64), np.float32), rng.random((8, 300, 64), np.float32)
        scan = lambda a, b: rj.linear_scan(a, b)[0]
        want = recurra.linear_scan(torch.tensor(a), torch.tensor(b))[0].numpy()
        spread = NamedSharding(mesh, P("rows"))
        whole = jax.jit(scan, in_shardings=(NamedSharding(mesh, P()), spread), out_shardings=spread)
        assert np.array_equal(whole(a, b), want)
        cut = dict(mesh=mesh, in_specs=(P(), P("rows")), out_specs=P("rows"))
        leaves = [torch.tensor(x, requires_grad=True) for x in (a, b)]
        recurra.linear_scan(*leaves)[0].sum().backward()
        for check in (True, False):
            mapped = jax.shard_map(scan, check_vma=check, **cut)
            assert np.array_equal(jax.jit(mapped)(a, b), want)
            assert np.array_equal(mapped(a, b), want)
            da, db = jax.jit(jax.grad(lambda a, b: mapped(a, b).sum(), argnums=(0, 1)))(a, b)
            assert np.array_equal(db, leaves[1].grad.numpy())
            assert np.allclose(da, leaves[0].grad.numpy(), rtol=1e-5)

        # Parameters that all devices share, differentiated inside, and examples that do not fold.
        ends = np.array([0, 5, 5, 300])
        packed = lambda a, b: jax.vmap(lambda b: rj.linear_scan(a, b[None], cu_seqlens=ends)[0])(b)
        whole = jax.jit(packed)(a, b)
        assert np.array_equal(jax.jit(jax.shard_map(packed, **cut))(a, b), whole)
        x, params = rng.random((8, 20, 3, 16), np.float32), rng.random((3, 16), np.float32)
        loss = lambda x, p: rj.rnn(x, p, cell="paragru", algorithm="sequential")[0].sum()
        grad = jax.grad(loss, argnums=(0, 1))
        cut = dict(mesh=mesh, in_specs=(P("rows"), P()), out_specs=(P("rows"), P()))
        dx, dp = jax.jit(jax.shard_map(grad, **cut))(x, params)
        want = jax.jit(grad)(x, params)
        assert np.array_equal(dx, want[0])
        assert np.allclose(dp, want[1], rtol=1e-5)
        """,
        XLA_FLAGS="--xla_force_host_platform_device_count=4",
    )


@pytest.mark.parametrize("name", [op.name for op in OPS if op.label == op.name])
def test_signatures_and_documentation(name):
    ours, theirs = getattr(rj, name), getattr(recurra, name)
    assert parameters_of(ours) == parameters_of(theirs)
    text = ours.__doc__
    assert text.splitlines()[0] == inspect.getdoc(theirs).splitlines()[0]
    assert "Differentiable once" in text
    for word in ("ValueError", "TypeError", "NotImplementedError", "jax.errors.JaxRuntimeError"):
        assert f"    {word}: " in text.partition("Raises:")[2]
    words = ("ensor", " RuntimeError", "device", "recurra.Cell", "strides", "transpose(", "no cost")
    for word in (*words, "also when"):
        assert word not in text, word
