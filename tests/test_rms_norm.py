"""rms_norm: right to its bound, the same bits whatever the rows beside, layout, threads and set."""

from __future__ import annotations

import itertools

import numpy
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from recurra.ops.rms_norm import rms_norm
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

EPS = 1e-5
WIDTHS = (0, 1, 3, 15, 16, 17, 33, 100, 256, 300, 768)
ROWS = ((0,), (1,), (7,), (1000,), (0, 3), (3, 0), (1, 5), (4, 1), (3, 17))
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
forward_op = torch.ops.recurra._rms_norm.default
backward_op = torch.ops.recurra._rms_norm_backward.default


def weight_dtypes(dtype):
    return (dtype,) if dtype == torch.float32 else (dtype, torch.float32)


def make(draw, rows, D, dtype, weights=None):
    return {
        "dy": draw.normal(*rows, D, dtype=dtype),
        "x": (
            draw.normal(*rows, D, dtype=torch.float64)
            * draw.uniform(0.1, 3, *rows, 1, dtype=torch.float64)
        ).to(dtype),
        "weight": draw.normal(D, dtype=weights or dtype),
    }


def everything(dy, x, weight):
    """y, rstd, dx, dweight."""
    y, rstd = forward_op(x, weight, EPS)
    return y, rstd, *backward_op(dy, x, weight, rstd)


def assert_same(got, want, context):
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        assert same_bits(a, b), f"{('y', 'rstd', 'dx', 'dweight')[i]}, {context}"


def samples(dtype):
    draw = Draw(3)
    for i, (rows, D) in enumerate(itertools.product(ROWS, WIDTHS)):
        weights = weight_dtypes(dtype)
        yield make(draw, rows, D, dtype, weights[i % len(weights)])


def wide(x):
    return x.detach().double().numpy().astype(numpy.longdouble)


def gamma(n, u):
    return n * u / (1 - n * u)


@every_dtype
def test_right_to_the_bound(dtype):
    """A mean of D products passes ceil(D / 64) roundings of its sum, 6 of the tree and one of the
    division; all that follows is written beside its bound. Sizes are sums of absolute values, and
    the oracle is the formula in extended precision on the numbers that were stored."""
    u = numpy.longdouble(2.0 ** (-53 if dtype == torch.float64 else -24))

    def check(got: Tensor, exact, error, context):
        assert got.shape == exact.shape, context
        stored = numpy.longdouble(torch.finfo(got.dtype).eps) / 2
        if stored > u:  # rounded once more
            tiny = torch.finfo(got.dtype).tiny * torch.finfo(got.dtype).eps
            error = error + stored * (abs(exact) + error) + tiny
        if dtype == torch.float64:
            error = error * (1 + 2.0**-8)  # extended precision is 2048 times as fine
        assert (abs(wide(got) - exact) <= error).all(), context

    for args in samples(dtype):
        dy, x, w = (wide(args[k]) for k in ("dy", "x", "weight"))
        D = x.shape[-1]
        y, rstd, dx, dweight = everything(**args)
        context = describe(args)
        assert y.dtype == dx.dtype == dtype and dweight.dtype == args["weight"].dtype, context
        assert rstd.dtype == (dtype if dtype.itemsize > 2 else torch.float32), context
        if D == 0:
            assert y.shape == dx.shape == x.shape and dweight.shape == (0,)
            continue
        n = (D + 63) // 64 + 7  # of a mean
        exact_rstd = 1 / numpy.sqrt((x * x).mean(-1) + EPS)
        # eps and its addition, half of all by the root, then the root and the division
        r = gamma(n / 2 + 4, u)
        check(rstd, exact_rstd, r * exact_rstd, f"rstd, {context}")
        scale = exact_rstd[..., None]
        exact = x * scale * w
        check(y, exact, gamma(n / 2 + 6, u) * abs(exact), f"y, {context}")
        # the normalised x has the error of rstd and one rounding
        normal, g = x * scale, dy * w
        e = gamma(n / 2 + 5, u)
        mean = (g * normal).mean(-1, keepdims=True)
        size = abs(g * normal).mean(-1, keepdims=True)
        mean_error = (gamma(n + 1, u) * (1 + e) + e) * size
        inner = g - normal * mean
        product = abs(normal) * ((1 + e) * mean_error + e * abs(mean))
        inner_error = u * abs(g) + product
        inner_error = inner_error + u * (abs(inner) + inner_error)
        outer = gamma(n / 2 + 5, u)
        error = scale * (outer * (abs(inner) + inner_error) + inner_error)
        check(dx, inner * scale, error, f"dx, {context}")
        # a chunk of rows in order, then the chunks
        rows = x[..., 0].size
        each = max(-(-(1 << 14) // D), -(-rows // 64))
        m = min(each, rows) + -(-rows // each)
        terms = (dy * normal).reshape(-1, D)
        error = (gamma(m, u) * (1 + e) + e) * abs(terms).sum(0)
        check(dweight, terms.sum(0), error, f"dweight, {context}")


@every_dtype
def test_it_is_that_of_torch(dtype):
    for args in samples(torch.float64):
        x, weight, dy = (args[k].to(dtype) for k in ("x", "weight", "dy"))
        if x.shape[-1] == 0:
            continue
        x, weight = x.requires_grad_(), weight.requires_grad_()
        y = rms_norm(x, weight, EPS)
        want = functional.rms_norm(x.double(), weight.shape, weight.double(), EPS)
        assert y.shape == x.shape and y.dtype == dtype
        torch.testing.assert_close(y, want.to(dtype))
        got = torch.autograd.grad(y, (x, weight), dy)
        want = torch.autograd.grad(want, (x, weight), dy.double())
        torch.testing.assert_close(got, want, atol=1e-4, rtol=2e-2 if dtype.itemsize == 2 else 1e-4)


def test_gradcheck():
    draw = Draw(4)
    for rows, D in (((3,), 5), ((2, 3), 17), ((1,), 1), ((2,), 70)):
        args = make(draw, rows, D, torch.float64)
        inputs = [args[k].requires_grad_() for k in ("x", "weight")]
        assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, 1e-3), inputs)


@every_dtype
def test_a_row_does_not_depend_on_the_others(dtype):
    for args in samples(dtype):
        if args["x"].numel() == 0:
            continue
        x, dy = (args[k].reshape(-1, args[k].shape[-1]) for k in ("x", "dy"))
        y, rstd, dx, _ = everything(**args)
        y, dx, rstd = y.reshape(x.shape), dx.reshape(x.shape), rstd.reshape(-1)
        for i in {0, 1, 6, 63, 64, len(x) // 2, len(x) - 1} & set(range(len(x))):
            one = slice(i, i + 1)
            got = everything(dy[one], x[one], args["weight"])
            assert_same(got[:3], (y[one], rstd[one], dx[one]), f"row {i} of {describe(args)}")
        flat = everything(dy, x, args["weight"])
        assert_same(flat, (y, rstd, dx, everything(**args)[3]), describe(args))


@every_dtype
def test_instruction_sets_and_threads_give_the_same_bits(dtype):
    draw = Draw(5)
    large = [make(draw, rows, D, dtype) for rows, D in (((3, 100), 259), ((2, 1031), 48))]
    for args in itertools.chain(samples(dtype), large):
        with isa("scalar"), threads(1):
            want = everything(**args)
        for name in isas():
            with isa(name):
                assert_same(everything(**args), want, f"{name}, {describe(args)}")
        for count in (1, 2, 3):
            with threads(count):
                assert_same(everything(**args), want, f"{count} threads, {describe(args)}")


@every_dtype
def test_layouts_equal_contiguous(dtype):
    draw = Draw(7)
    names = list(LAYOUTS)
    for rows, D in (((33,), 48), ((3, 16), 17), ((2, 70), 300), ((9, 1), 5), ((5,), 1)):
        for weights, (turn, name) in itertools.product(weight_dtypes(dtype), enumerate(names)):
            args = make(draw, rows, D, dtype, weights)
            mixed = {"dy": names[turn - 2], "x": name, "weight": names[turn - 1]}
            for layout in (dict.fromkeys(mixed, name), mixed):
                given = replaced(args, lambda k, v, layout=layout: laid_out(v, layout[k]))
                plain = replaced(given, lambda k, v: v.clone(memory_format=torch.contiguous_format))
                got = everything(**given)
                context = f"{layout}, {describe(args)}"
                assert_same(got, everything(**plain), context)
                order = torch.empty_like(given["x"]).stride()
                assert got[0].stride() == got[2].stride() == order, context


@every_dtype
def test_rows_that_are_not_dense(dtype):
    """Channels cut out of wider rows, every other row, time cut out of longer sequences, and a
    rstd whose numbers lie apart."""
    draw = Draw(9)
    for D in (33, 48):
        args = make(draw, (3, 20), D, dtype)
        wider, longer = (draw.normal(3, 45, D + n, dtype=dtype) for n in (5, 0))
        cut = {"dy": wider[:, 1:40:2, 2 : D + 2].copy_(args["dy"]), "weight": args["weight"]}
        cut["x"] = longer[:, 7:27].copy_(args["x"])
        want = everything(**args)
        assert_same(everything(**cut), want, describe(args))
        apart = want[1].new_empty(20, 6)[:, ::2].T.copy_(want[1])
        got = backward_op(cut["dy"], cut["x"], cut["weight"], apart)
        assert_same((*want[:2], *got), want, describe(args))


@every_dtype
def test_special_values_stay_where_they_belong(dtype):
    draw = Draw(11)
    for rows, D in ((3, 17), (40, 300), (1000, 16)):
        args = make(draw, (rows,), D, dtype)
        before = everything(**args)
        for value, name, row, c in itertools.product(
            (float("nan"), float("inf")), ("x", "dy"), (0, rows - 1), (0, D - 1)
        ):
            given = {**args, name: args[name].clone()}
            given[name][row, c] = value
            after = everything(**given)
            context = f"{value} in {name}[{row}, {c}], {describe(args)}"
            others = torch.arange(rows) != row
            for old, new in zip(before[:3], after[:3], strict=True):
                assert torch.equal(bits(new)[others], bits(old)[others]), context
            y, _, dx, dweight = after
            assert y[row].isnan().any() == (name == "x"), context
            if value != value and name == "x":
                assert y[row].isnan().all() and dx[row].isnan().all(), context
                assert dweight.isnan().all(), context
            if name == "dy":
                assert not dx[row].isfinite().any(), context
                assert not dweight[c].isfinite(), context
                rest = torch.arange(D) != c
                assert torch.equal(bits(dweight)[rest], bits(before[3])[rest]), context


def test_guard_pages():
    printed = run_python(
        """
        import itertools
        from guard import guarded
        from support import DTYPES, ISAS, Draw, describe, isa, laid_out, replaced
        from test_rms_norm import assert_same, everything, make, weight_dtypes

        count = 0
        sizes = (((1,), 16), ((3,), 17), ((2, 5), 33), ((20,), 15), ((1, 40), 300), ((7,), 1))
        for dtype, (rows, D), layout in itertools.product(
            DTYPES, sizes, ("contiguous", "transposed")
        ):
            for weights in weight_dtypes(dtype):
                args = make(Draw(1), rows, D, dtype, weights)
                args = replaced(args, lambda k, v: laid_out(v, layout))
                want = everything(**args)
                for name, end in itertools.product(ISAS, (False, True)):
                    print(name, end, layout, describe(args), flush=True)
                    with isa(name):
                        got = everything(**replaced(args, lambda k, v: guarded(v, end)))
                    assert_same(got, want, describe(args))
                    count += 1
        print("cases", count)
        """
    )
    assert int(printed.split()[-1]) >= 300


def test_forked_children_compute_the_same():
    check_forked_children(
        """
        import torch
        from support import Draw
        from test_rms_norm import everything, make

        calls = [make(Draw(n), (n, 400), 515, torch.bfloat16) for n in (1, 3)]

        def compute(call):
            return everything(**call)
        """
    )


def errors():
    x, weight = torch.zeros(2, 3, 4), torch.zeros(4)
    good = {"dy": x, "x": x, "weight": weight, "rstd": x[..., 0]}
    half = {"dy": x.bfloat16(), "x": x.bfloat16()}
    known = "float32, float64, bfloat16 or float16"
    both = (
        ({"x": x[0, 0]}, "x must have shape (B, D) or (B, T, D), got (4,)"),
        ({"x": x[None]}, "x must have shape (B, D) or (B, T, D), got (1, 2, 3, 4)"),
        ({"x": x.int()}, f"x must have dtype {known}, got int32"),
        ({"x": x.cfloat()}, f"x must have dtype {known}, got complex64"),
        ({"weight": weight[:3]}, "weight must have shape (D) with D = 4, got (3,)"),
        ({"weight": x[0]}, "weight must have shape (D) with D = 4, got (3, 4)"),
        (
            {"weight": weight.double()},
            "weight must have dtype float32 where x has float32, got float64",
        ),
        (
            {**half, "weight": weight.half()},
            "weight must have dtype bfloat16 or float32 where x has bfloat16, got float16",
        ),
    )
    for changes, message in both:
        yield {**good, **changes}, f"rms_norm: {message}", f"rms_norm_backward: {message}"
    without = "rstd must have the shape of x, (2, 3, 4), without its last dimension"
    for changes, message in (
        ({"dy": x[0]}, "dy must have the shape of x, (2, 3, 4), got (3, 4)"),
        ({"dy": x[:, :2]}, "dy must have the shape of x, (2, 3, 4), got (2, 2, 4)"),
        ({"dy": x.double()}, "dy must have dtype float32 where x has float32, got float64"),
        ({"rstd": x}, f"{without}, got (2, 3, 4)"),
        ({"rstd": x[0, :2, 0]}, f"{without}, got (2,)"),
        ({"rstd": x[:, 1:, 0]}, f"{without}, got (2, 2)"),
        (
            {**half, "rstd": half["x"][..., 0]},
            "rstd must have dtype float32 where x has bfloat16, got bfloat16",
        ),
    ):
        yield {**good, **changes}, None, f"rms_norm_backward: {message}"


def test_errors():
    from torch._subclasses.fake_tensor import FakeTensorMode

    def refuses(call, message):
        with pytest.raises(RuntimeError) as error:
            call()
        # After torch's own prefix; what torch adds begins on a new line.
        assert str(error.value).splitlines()[0].endswith(message), str(error.value)

    for args, forward_message, backward_message in errors():
        for kind in ("real", "fake", "meta"):
            with FakeTensorMode() as mode:
                fake = mode.from_tensor
            given = replaced(
                args,
                lambda k, v, kind=kind, fake=fake: (
                    fake(v) if kind == "fake" else v.to("meta") if kind == "meta" else v
                ),
            )
            x, weight = given["x"], given["weight"]
            if forward_message:
                refuses(lambda x=x, w=weight: forward_op(x, w, EPS), forward_message)
            if forward_message and kind != "meta":
                refuses(lambda x=x, w=weight: rms_norm(x, w, EPS), forward_message)
            refuses(lambda given=given: backward_op(**given), backward_message)


@every_dtype
def test_the_backward_keeps_x_and_one_number_a_row(dtype):
    args = make(Draw(13), (2, 5), 40, dtype)
    x, weight = (args[k].requires_grad_() for k in ("x", "weight"))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = rms_norm(x, weight, EPS)
    assert [tuple(t.shape) for t in kept] == [(2, 5, 40), (40,), (2, 5)]
    assert kept[0].data_ptr() == x.data_ptr() and kept[1].data_ptr() == weight.data_ptr()
    _, rstd, dx, dweight = everything(args["dy"], x.detach(), weight.detach())
    assert same_bits(kept[2], rstd) and not forward_op(x, weight, EPS)[1].requires_grad
    got = torch.autograd.grad(y, (x, weight), args["dy"])
    assert same_bits(got[0], dx) and same_bits(got[1], dweight)
    for i, leaf in enumerate((x, weight)):  # one alone
        others = [t.detach() for t in (x, weight)]
        others[i] = leaf
        (alone,) = torch.autograd.grad(rms_norm(*others, EPS), leaf, args["dy"])
        assert same_bits(alone, got[i])


def test_second_derivatives_forward_mode_and_functorch_raise_by_name():
    args = make(Draw(15), (2,), 5, torch.float64)
    x, weight = (args[k].requires_grad_() for k in ("x", "weight"))
    y = rms_norm(x, weight, EPS)
    first = torch.autograd.grad(y, (x, weight), args["dy"].requires_grad_(), create_graph=True)
    for gradient, leaf in itertools.product(first, (x, weight, args["dy"])):
        with pytest.raises(
            RuntimeError, match="recurra: second derivative of rms_norm is not implemented"
        ):
            torch.autograd.grad(gradient.sum(), leaf, retain_graph=True)

    def call(x):
        return rms_norm(x, weight, EPS)

    with torch.no_grad(), pytest.raises(RuntimeError, match="derivatives of rms_norm"):
        torch.func.jvp(call, (x,), (x,))
    with pytest.raises(RuntimeError, match="derivatives of rms_norm"):
        torch.func.grad(lambda x: call(x).sum())(x.detach())


@every_dtype
def test_opcheck(dtype):
    draw = Draw(17)
    for rows, layout in itertools.product(((3,), (2, 5)), ("contiguous", "transposed")):
        args = make(draw, rows, 20, dtype, weight_dtypes(dtype)[-1])
        args = replaced(args, lambda k, v, layout=layout: laid_out(v, layout))
        dy, x, weight = args.values()
        learning = [t.clone().requires_grad_() for t in (x, weight)]
        for given in ((x, weight), learning):
            torch.library.opcheck(forward_op, (*given, EPS))
        torch.library.opcheck(backward_op, (dy, x, weight, forward_op(x, weight, EPS)[1]))


@every_dtype
def test_compiled_with_any_number_of_rows(dtype):
    torch._dynamo.reset()
    compiled = torch.compile(rms_norm, backend="aot_eager", fullgraph=True, dynamic=True)
    draw = Draw(19)
    for n in (2, 3, 7, 30):
        args = make(draw, (n, n + 3), 20, dtype, weight_dtypes(dtype)[-1])
        x, weight = (args[k].requires_grad_() for k in ("x", "weight"))
        y, _, dx, dweight = everything(args["dy"], x.detach(), weight.detach())
        with torch.compiler.set_stance("default" if n == 2 else "fail_on_recompile"):
            got = compiled(x, weight, EPS)
        assert same_bits(got, y)
        gradients = torch.autograd.grad(got, (x, weight), args["dy"])
        assert same_bits(gradients[0], dx) and same_bits(gradients[1], dweight)


@every_dtype
def test_autocast_casts_nothing(dtype):
    args = make(Draw(21), (3,), 20, dtype, weight_dtypes(dtype)[-1])
    want = rms_norm(args["x"], args["weight"], EPS)
    with torch.autocast("cpu", torch.bfloat16):
        assert same_bits(rms_norm(args["x"], args["weight"], EPS), want)
