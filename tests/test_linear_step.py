"""linear_step: right to its bound, the same bits whatever the batch, layout, threads and set."""

from __future__ import annotations

import itertools

import numpy
import pytest
import torch

from recurra.ops.linear_step import linear_step
from support import (
    DTYPES,
    LAYOUTS,
    Draw,
    bits,
    check_forked_children,
    describe,
    isa,
    isas,
    laid_out,
    replaced,
    run_python,
    same_bits,
    threads,
)

SIZES = (0, 1, 15, 16, 17, 33, 48, 1000)  # of N and of K
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def parameter_dtypes(dtype):
    return (dtype,) if dtype == torch.float32 else (dtype, torch.float32)


def make(draw, B, N, K, dtype, parameters=None, bias=True):
    parameters = parameters or dtype
    return {
        "x": draw.normal(B, K, dtype=dtype),
        "weight": draw.normal(N, K, dtype=parameters),
        "bias": draw.normal(N, dtype=parameters) if bias else None,
    }


def samples(dtype):
    """Every N with every K, every batch size many times over."""
    draw = Draw(3)
    for i, (N, K) in enumerate(itertools.product(SIZES, SIZES)):
        for B in range(i % 3, 10, 3):
            parameters = parameter_dtypes(dtype)[(i + B) % 3 == 1 and dtype != torch.float32]
            yield make(draw, B, N, K, dtype, parameters, bias=(i + B) % 2 == 0)


def wide(x):
    return x.double().numpy().astype(numpy.longdouble)


@every_dtype
def test_right_to_the_bound(dtype):
    """Each of K products passes ceil(K / 16) roundings of its lane, 4 of the tree and that of the
    bias, in float32 or float64; then y is rounded once to its storage."""
    u = numpy.longdouble(2.0 ** (-53 if dtype == torch.float64 else -24))
    info = torch.finfo(dtype)
    for args in samples(dtype):
        got = linear_step(**args)
        x, weight, bias = (args[k] for k in ("x", "weight", "bias"))
        K = x.shape[1]
        assert got.dtype == dtype and got.shape == (x.shape[0], weight.shape[0])
        assert got.is_contiguous()
        exact, size = wide(x) @ wide(weight).T, abs(wide(x)) @ abs(wide(weight)).T
        if bias is not None:
            exact, size = exact + wide(bias), size + abs(wide(bias))
        n = (K + 15) // 16 + 5
        error = n * u / (1 - n * u) * size
        if dtype.itemsize == 2:
            error = error + info.eps / 2 * (abs(exact) + error) + info.tiny * info.eps
        if dtype == torch.float64:
            error = error + K * numpy.finfo(numpy.longdouble).eps * size  # that of `exact`
        assert (abs(wide(got) - exact) <= error).all(), describe(args)


@every_dtype
def test_a_row_does_not_depend_on_the_others(dtype):
    for args in samples(dtype):
        whole = linear_step(**args)
        for b in range(whole.shape[0]):
            alone = linear_step(**{**args, "x": args["x"][b : b + 1]})
            assert same_bits(alone, whole[b : b + 1]), f"row {b} of {describe(args)}"


@every_dtype
def test_instruction_sets_and_threads_give_the_same_bits(dtype):
    draw = Draw(5)
    large = [make(draw, B, 300, 515, dtype) for B in (1, 2, 3, 8, 19)]
    for args in itertools.chain(samples(dtype), large):
        with isa("scalar"), threads(1):
            want = linear_step(**args)
        for name in isas():
            with isa(name):
                assert same_bits(linear_step(**args), want), f"{name}, {describe(args)}"
        for count in (2, 3):
            with threads(count):
                assert same_bits(linear_step(**args), want), f"{count} threads, {describe(args)}"


@every_dtype
def test_layouts_equal_contiguous(dtype):
    draw = Draw(7)
    names = list(LAYOUTS)
    for B, N, K in ((1, 33, 48), (3, 16, 17), (9, 40, 515), (8, 1, 1), (2, 5, 600)):
        for parameters, (turn, name) in itertools.product(
            parameter_dtypes(dtype), enumerate(names)
        ):
            args = make(draw, B, N, K, dtype, parameters)
            mixed = {"x": name, "weight": names[turn - 1], "bias": names[turn - 2]}
            for layout in (dict.fromkeys(mixed, name), mixed):
                given = replaced(args, lambda k, v, layout=layout: laid_out(v, layout[k]))
                plain = replaced(given, lambda k, v: v.clone(memory_format=torch.contiguous_format))
                got, want = linear_step(**given), linear_step(**plain)
                assert same_bits(got, want), f"{layout}, {describe(args)}"


@every_dtype
def test_rows_that_are_not_dense(dtype):
    """Columns cut out of wider rows, and rows in reverse order by their stride."""
    draw = Draw(9)
    for B, N, K in ((1, 40, 48), (5, 17, 33)):
        args = make(draw, B, N, K, dtype)
        x, weight = (draw.normal(2 * n, K + 5, dtype=dtype) for n in (B, N))
        cut = {"x": x[::2, 2 : K + 2].copy_(args["x"]), "bias": args["bias"]}
        cut["weight"] = weight[1::2, 5:].copy_(args["weight"])
        assert same_bits(linear_step(**cut), linear_step(**args)), describe(args)


@every_dtype
def test_special_values_stay_where_they_belong(dtype):
    draw = Draw(11)
    for B, N, K in ((1, 33, 17), (9, 20, 48), (4, 17, 300)):
        args = make(draw, B, N, K, dtype)
        before = bits(linear_step(**args))
        for value, k in itertools.product((float("nan"), float("inf")), (0, K // 2, K - 1)):
            for name, row in (("x", B - 1), ("x", 0), ("weight", 0), ("weight", N - 1)):
                given = {**args, name: args[name].clone()}
                given[name][row, k] = value
                y = linear_step(**given)
                reached = torch.zeros(B, N, dtype=torch.bool)
                (reached if name == "x" else reached.T)[row] = True
                context = f"{value} in {name}[{row}, {k}], {describe(args)}"
                assert not y[reached].isfinite().any(), context
                assert torch.equal(bits(y)[~reached], before[~reached]), context
        given = {**args, "bias": args["bias"].clone()}
        given["bias"][N - 1] = float("nan")
        y = linear_step(**given)
        assert y[:, N - 1].isnan().all()
        assert torch.equal(bits(y)[:, : N - 1], before[:, : N - 1])


def test_guard_pages():
    printed = run_python(
        """
        import itertools
        import torch
        from guard import guarded
        from recurra.ops.linear_step import linear_step
        from support import DTYPES, ISAS, Draw, describe, isa, replaced, same_bits
        from test_linear_step import make, parameter_dtypes

        count = 0
        sizes = ((1, 16, 16), (1, 17, 33), (3, 8, 48), (8, 33, 15), (9, 1, 1), (2, 300, 257))
        for dtype, (B, N, K), flip in itertools.product(DTYPES, sizes, (False, True)):
            for parameters in parameter_dtypes(dtype):
                args = make(Draw(1), B, N, K, dtype, parameters)
                want = linear_step(**args)
                if flip:
                    args["weight"] = args["weight"].T.contiguous().T
                for name, end in itertools.product(ISAS, (False, True)):
                    print(name, end, flip, describe(args), flush=True)
                    with isa(name):
                        got = linear_step(**replaced(args, lambda k, v: guarded(v, end)))
                    assert same_bits(got, want), describe(args)
                    count += 1
        print("cases", count)
        """
    )
    assert int(printed.split()[-1]) >= 300


def test_forked_children_compute_the_same():
    check_forked_children(
        """
        import torch
        from recurra.ops.linear_step import linear_step
        from support import Draw
        from test_linear_step import make

        calls = [make(Draw(B), B, 700, 515, torch.bfloat16) for B in (1, 8)]

        def compute(call):
            return [linear_step(**call)]
        """
    )


def errors():
    x, weight, bias = torch.zeros(3, 4), torch.zeros(5, 4), torch.zeros(5)
    good = {"x": x, "weight": weight, "bias": bias}
    half = x.bfloat16()
    known = "float32, float64, bfloat16 or float16"
    for changes, message in (
        ({"x": x[0]}, "x must have shape (B, K), got (4,)"),
        ({"x": x[None]}, "x must have shape (B, K), got (1, 3, 4)"),
        ({"x": x.int()}, f"x must have dtype {known}, got int32"),
        ({"x": x.cfloat()}, f"x must have dtype {known}, got complex64"),
        ({"weight": weight.T}, "weight must have shape (N, K) with K = 4, got (4, 5)"),
        ({"weight": bias}, "weight must have shape (N, K) with K = 4, got (5,)"),
        (
            {"weight": weight.double()},
            "weight must have dtype float32 where x has float32, got float64",
        ),
        (
            {"x": half, "weight": weight.half()},
            "weight must have dtype bfloat16 or float32 where x has bfloat16, got float16",
        ),
        ({"bias": bias[:4]}, "bias must have shape (N) with N = 5, got (4,)"),
        ({"bias": weight}, "bias must have shape (N) with N = 5, got (5, 4)"),
        (
            {"x": half, "bias": bias.int()},
            "bias must have dtype bfloat16 or float32 where x has bfloat16, got int32",
        ),
    ):
        yield {**good, **changes}, f"linear_step: {message}"


def test_errors():
    from torch._subclasses.fake_tensor import FakeTensorMode

    for args, message in errors():

        def refuses(given, message=message):
            with pytest.raises(RuntimeError) as error:
                torch.ops.recurra._linear_step(**given)
            # After torch's own prefix; what torch adds begins on a new line.
            assert message in str(error.value).splitlines()[0], str(error.value)
            assert str(error.value).splitlines()[0].endswith(message), str(error.value)

        refuses(args)
        with pytest.raises(RuntimeError, match="linear_step: "):
            linear_step(**args)
        with FakeTensorMode() as mode:
            refuses(replaced(args, lambda k, v, mode=mode: mode.from_tensor(v)))
        refuses(replaced(args, lambda k, v: v.to("meta")))


def test_it_refuses_gradients_by_name():
    args = make(Draw(13), 2, 5, 4, torch.float32)
    for name in args:
        learning = {**args, name: args[name].clone().requires_grad_()}
        for call in (linear_step, torch.ops.recurra._linear_step):
            with pytest.raises(RuntimeError) as error:
                call(**learning)
            assert (
                "recurra: linear_step has no gradient; use torch.nn.functional.linear, or call it "
                "under torch.no_grad()" in str(error.value)
            )
            for without in (torch.no_grad, torch.inference_mode):
                with without():
                    assert same_bits(call(**learning), linear_step(**args))
    # Nothing is written: what was saved for a backward may still be used.
    leaf = args["x"].clone().requires_grad_()
    y = leaf * args["x"]
    versions = [v._version for v in args.values()]
    linear_step(**args)
    assert [v._version for v in args.values()] == versions
    y.sum().backward()


def test_forward_mode_and_functorch_do_not_lose_tangents():
    args = make(Draw(15), 2, 5, 4, torch.float32)

    def call(x):
        return linear_step(x, args["weight"], args["bias"])

    with torch.no_grad(), pytest.raises(RuntimeError, match="linear_step"):
        torch.func.jvp(call, (args["x"],), (args["x"],))
    with pytest.raises(RuntimeError, match="linear_step"):
        torch.func.grad(lambda x: call(x).sum())(args["x"])


@every_dtype
def test_opcheck_and_compile(dtype):
    op = torch.ops.recurra._linear_step.default
    draw = Draw(17)
    for B, bias in ((1, True), (3, False)):
        args = make(draw, B, 5, 20, dtype, parameter_dtypes(dtype)[-1], bias)
        torch.library.opcheck(op, tuple(args.values()))
        flipped = replaced(args, lambda k, v: laid_out(v, "transposed"))
        torch.library.opcheck(op, tuple(flipped.values()))
        torch._dynamo.reset()
        compiled = torch.compile(linear_step, backend="aot_eager", fullgraph=True)
        learning = replaced(args, lambda k, v: v.clone().requires_grad_())
        for without in (torch.no_grad, torch.inference_mode):
            with without():
                assert same_bits(compiled(**learning), linear_step(**args))
