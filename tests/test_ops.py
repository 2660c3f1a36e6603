"""What is true of every op: right, at home in torch, clear about bad input. Loops over opdb.py."""

from __future__ import annotations

import itertools

import pytest
import torch

from bounds import double
from opdb import OPS, VARIANTS
from support import (
    DTYPES,
    LAYOUTS,
    NIGHTLY,
    Draw,
    assert_right,
    assert_same,
    cotangents,
    describe,
    error_calls,
    evaluate,
    is_index,
    laid_out,
    replaced,
    same_bits,
    tensors,
)

every_op = pytest.mark.parametrize("op", VARIANTS, ids=lambda op: op.label)
# What is said of dtypes and of bad input is the same for every variant.
every_table_op = pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
TIER = "nightly" if NIGHTLY else "quick"


# ---- right ------------------------------------------------------------------------------------


@every_op
@every_dtype
def test_within_the_derived_bound(op, dtype):
    # 16-bit storage changes loads and stores alone: half of the shapes each.
    half = {torch.bfloat16: 0, torch.float16: 1}.get(dtype)
    for i, args in enumerate(op.samples(dtype, TIER)):
        if half in (None, (i + i // 20) % 2) or NIGHTLY:
            assert_right(op, args)


def _float64_function(op, args):
    """A function of the differentiable inputs alone, and those."""
    args = replaced(args, lambda k, v: double(v))
    names = [k for k in op.differentiable if args.get(k) is not None]
    given = {k: v for k, v in args.items() if k not in names}

    def function(*inputs):
        return op.function(**given, **dict(zip(names, inputs, strict=True)))

    return function, [args[k].detach().clone().requires_grad_() for k in names]


def _packed_and_not(op):
    for packed in (False, True):
        yield from op.samples(torch.float64, "small", packed)


@every_op
def test_gradcheck(op):
    for args in _packed_and_not(op):
        function, inputs = _float64_function(op, args)
        assert torch.autograd.gradcheck(function, inputs), describe(args)


@every_op
def test_second_order(op):
    for args in _packed_and_not(op):
        function, inputs = _float64_function(op, args)
        if op.second_order:
            assert torch.autograd.gradgradcheck(function, inputs), describe(args)
            continue
        outputs = function(*inputs)
        first = torch.autograd.grad(outputs, inputs, cotangents(outputs), create_graph=True)
        with pytest.raises(RuntimeError) as error:
            torch.autograd.grad(first, inputs, cotangents(first), allow_unused=True)
        assert f"recurra: second derivative of {op.name} is not implemented" in str(error.value)


@every_op
def test_second_order_where_only_one_output_is_used(op):
    if not op.second_order:
        pytest.skip("second order raises by name")
    for args in itertools.islice(op.samples(torch.float64, "small"), 4):
        function, inputs = _float64_function(op, args)
        for i in range(2):
            assert torch.autograd.gradgradcheck(lambda *x, f=function, i=i: f(*x)[i], inputs)


@every_op
@every_dtype
def test_zero_cotangents_and_partial_gradients(op, dtype):
    """A gradient does not depend on which others are asked for, and an unused output is zero."""
    for args in itertools.islice(op.samples(dtype, "small"), 3):
        outputs, grads, cots = evaluate(op, args)
        for name in grads:
            alone = replaced(args, lambda k, v: v.detach())
            alone[name].requires_grad_()
            got = torch.autograd.grad(op.function(**alone), alone[name], cots)[0]
            assert same_bits(got, grads[name]), f"{name} alone, {describe(args)}"
        leaves = replaced(args, lambda k, v: v.detach())
        for name in grads:
            leaves[name].requires_grad_()
        for i in range(len(outputs)):
            wanted = [c if i == j else torch.zeros_like(c) for j, c in enumerate(cots)]
            inputs = [leaves[name] for name in grads]
            got = torch.autograd.grad(op.function(**leaves)[i], inputs, cots[i])
            for name, x, y in zip(grads, got, evaluate(op, args, wanted)[1].values(), strict=True):
                # Adding an explicit zero may only turn -0 into 0.
                assert torch.equal(x, y), f"{name} from output {i}, {describe(args)}"


# ---- torch ------------------------------------------------------------------------------------


@every_op
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(op, requires_grad):
    for dtype, packed in ((torch.float32, False), (torch.bfloat16, True), (torch.float64, False)):
        for args in itertools.islice(op.samples(dtype, "small", packed), 2):
            leaves = replaced(
                args,
                lambda k, v: v.detach().requires_grad_(requires_grad and k in op.differentiable),
            )
            torch.library.opcheck(op.overload, *_positional(op, leaves))


def _positional(op, args):
    """The arguments as the dispatcher takes them: positional, then keyword-only."""
    positional, keywords = [], {}
    for argument in op.overload._schema.arguments:
        if argument.kwarg_only:
            keywords[argument.name] = args.get(argument.name, argument.default_value)
        else:
            positional.append(args.get(argument.name))
    return tuple(positional), keywords


@every_op
@pytest.mark.parametrize("layout", LAYOUTS)
def test_fake_tensors_agree_in_every_layout(op, layout):
    """Shape, dtype and strides of outputs and gradients, which opcheck sees for plain tensors."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    def described(x):
        def strides(v):  # along one element a stride means nothing
            return [s for s, n in zip(v.stride(), v.shape, strict=True) if n > 1]

        return [(k, v.shape, v.dtype, strides(v)) for k, v in x]

    for args in op.samples(torch.bfloat16, "small"):
        strided = replaced(args, lambda k, v: laid_out(v, layout))
        cots = cotangents(op.function(**args))
        want, want_grads, _ = evaluate(op, strided, cots)
        with FakeTensorMode() as mode:
            fake = replaced(strided, lambda k, v, mode=mode: mode.from_tensor(v))
            got, grads, _ = evaluate(op, fake, [mode.from_tensor(c) for c in cots])
        context = f"{layout}: {describe(args)}"
        assert described(enumerate(got)) == described(enumerate(want)), context
        assert described(grads.items()) == described(want_grads.items()), context


def _lengths(op, draw_seed=3):
    """The same options at five lengths."""
    for T in (5, 9, 17, 33, 6):
        args = op.make(Draw(draw_seed), 2, T, 4, torch.float32, False)
        yield {k: v for k, v in args.items() if v is not None}


@every_op
def test_compile_full_graph_with_at_most_one_recompile(op):
    import torch._dynamo.testing

    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    function = op.function
    compiled = torch.compile(lambda args: function(**args), backend=counter, fullgraph=True)
    for args in _lengths(op):
        leaves = replaced(args, lambda k, v: v.detach().requires_grad_(k in op.differentiable))
        outputs = compiled(leaves)
        cots = cotangents(outputs)
        names = [k for k in leaves if k in op.differentiable]
        grads = torch.autograd.grad(outputs, [leaves[k] for k in names], cots)
        want, want_grads, _ = evaluate(op, args, cots)
        assert_same(list(enumerate(outputs)), list(enumerate(want)), describe(args))
        got = list(zip(names, grads, strict=True))
        assert_same(got, [(k, want_grads[k]) for k in names], describe(args))
    assert counter.frame_count <= 2


@every_op
@pytest.mark.slow
def test_compile_inductor(op):
    torch._dynamo.reset()
    function = op.function
    compiled = torch.compile(lambda args: function(**args), fullgraph=True, dynamic=True)
    for args in _lengths(op):
        outputs = compiled(args)
        assert_same(list(enumerate(outputs)), list(enumerate(op.function(**args))), describe(args))


@every_op
def test_export_with_dynamic_length(op):
    calls = list(_lengths(op))

    class Module(torch.nn.Module):
        def forward(self, *inputs):
            given = {k: v for k, v in calls[0].items() if not isinstance(v, torch.Tensor)}
            return op.function(**given, **dict(zip(tensors(calls[0]), inputs, strict=True)))

    T = torch.export.Dim("T", min=2, max=4096)
    spec = tuple(
        {op.layout(k, x).index("T"): T} if "T" in op.layout(k, x) and x.shape[1] > 1 else {}
        for k, x in tensors(calls[0]).items()
    )
    program = torch.export.export(
        Module(), tuple(tensors(calls[0]).values()), dynamic_shapes=(spec,)
    )
    for args in calls:
        got = program.module()(*tensors(args).values())
        assert_same(list(enumerate(got)), list(enumerate(op.function(**args))), describe(args))


@every_op
def test_torch_func(op):
    args = op.make(Draw(3), 2, 5, 3, torch.float32, False)
    lead, others = args[op.lead], {k: v for k, v in args.items() if k != op.lead}

    def loss(x):
        outputs = op.function(**{op.lead: x}, **others)
        return sum((y * y.conj()).real.float().sum() for y in outputs)

    def check(transform, want, run):
        if op.func[transform] == "right":
            torch.testing.assert_close(run(), want())
        else:
            with pytest.raises(RuntimeError, match=f"recurra: .*{op.name} under .*not implemented"):
                run()

    def gradient():
        x = lead.clone().requires_grad_()
        return torch.autograd.grad(loss(x), x)[0]

    check("grad", gradient, lambda: torch.func.grad(loss)(lead))
    tangent = torch.ones_like(lead)
    check("jvp", lambda: (gradient() * tangent).sum(), lambda: _jvp(loss, lead, tangent))
    check("jvp", lambda: (gradient() * tangent).sum(), lambda: _dual(loss, lead, tangent))
    many = torch.stack([lead, 2 * lead])
    check(
        "vmap",
        lambda: torch.stack([loss(x) for x in many]),
        lambda: torch.func.vmap(loss)(many),
    )


def _jvp(function, x, tangent):
    return torch.func.jvp(function, (x,), (tangent,))[1]


def _dual(function, x, tangent):
    with torch.autograd.forward_ad.dual_level():
        y = function(torch.autograd.forward_ad.make_dual(x.clone().requires_grad_(), tangent))
        return torch.autograd.forward_ad.unpack_dual(y).tangent


@every_table_op
def test_autocast(op):
    def with_dtypes(args, dtypes):
        return replaced(args, lambda k, v: v.to(dtypes.get(k, v.dtype)))

    for lower in (torch.bfloat16, torch.float16):
        for args in itertools.islice(op.samples(torch.float32, "small"), 4):
            given = [k for k in op.activations if args.get(k) is not None]
            agreed = op.function(**with_dtypes(args, dict.fromkeys(given, lower)))
            for odd in given:
                mixed = with_dtypes(args, {odd: lower})
                with torch.autocast("cpu", dtype=lower):
                    got = op.function(**mixed)
                assert_same(list(enumerate(got)), list(enumerate(agreed)), describe(mixed))
            with torch.autocast("cpu", dtype=lower):
                got = op.function(**args)
            assert_same(list(enumerate(got)), list(enumerate(op.function(**args))), "agreeing")


# ---- bad input --------------------------------------------------------------------------------


def _refuses(op, args, message):
    with pytest.raises(RuntimeError) as error:
        op.function(**args)
    assert message in str(error.value), f"{describe(args)}: {error.value}"


@every_table_op
def test_errors_on_the_cpu(op):
    for args, error in error_calls(op):
        _refuses(op, args, error.message)
        learning = replaced(
            args,
            lambda k, v: v if is_index(v) else v.detach().requires_grad_(),
        )
        _refuses(op, learning, error.message)


@every_table_op
def test_errors_on_fake_and_meta_tensors(op):
    from torch._subclasses.fake_tensor import FakeTensorMode

    for args, error in error_calls(op):
        if error.of_values:
            continue
        with FakeTensorMode() as mode:
            _refuses(op, replaced(args, lambda k, v: mode.from_tensor(v)), error.message)
        _refuses(op, replaced(args, lambda k, v: v.to("meta")), error.message)


@every_table_op
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_errors_on_cuda(op):
    for args, error in error_calls(op):
        if not error.of_values:
            _refuses(op, replaced(args, lambda k, v: v.cuda()), error.message)


@every_table_op
def test_a_mixed_call_names_both_devices(op):
    args = op.make(Draw(3), 2, 3, 4, torch.float32, False)
    other = (
        next(k for k in op.activations if k != op.lead and args.get(k) is not None)
        if len(op.activations) > 1
        else op.differentiable[1]
    )
    args[other] = args[other].to("meta")
    _refuses(op, args, f"{op.name}: {other} must be on the device of {op.lead}, cpu, got another")
