"""What is true of every op: loops over the table in opdb.py."""

from __future__ import annotations

import itertools

import pytest
import torch
from opdb import OPS
from support import (
    LAYOUTS,
    NIGHTLY,
    Draw,
    assert_right,
    assert_same,
    assert_within,
    bits,
    cotangents,
    describe,
    evaluate,
    everything,
    gradients_in_pieces,
    is_index,
    isa,
    isas,
    laid_out,
    narrowed,
    oracle,
    replaced,
    same_bits,
    tensors,
    threads,
)

from recurra._check import state_dtype

every_op = pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
every_dtype = pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str
)
TIER = "nightly" if NIGHTLY else "quick"
REPEATS = 200 if NIGHTLY else 20


# ---- right ------------------------------------------------------------------------------------


@every_op
@every_dtype
def test_within_the_derived_bound(op, dtype):
    for args in op.samples(dtype, TIER):
        assert_right(op, args)


def _float64_function(op, args):
    """A function of the differentiable inputs alone, and those."""
    names = [k for k in op.differentiable if args.get(k) is not None]
    given = {k: v for k, v in args.items() if k not in names}

    def function(*inputs):
        return op.function(**given, **dict(zip(names, inputs, strict=True)))

    return function, [args[k].detach().clone().requires_grad_() for k in names]


def _with_and_without_state(op):
    for packed in (False, True):
        for args in itertools.islice(op.samples(torch.float64, "small", packed), 4):
            yield args


@every_op
def test_gradcheck(op):
    for args in _with_and_without_state(op):
        function, inputs = _float64_function(op, args)
        assert torch.autograd.gradcheck(function, inputs), describe(args)


@every_op
def test_second_order(op):
    for args in _with_and_without_state(op):
        function, inputs = _float64_function(op, args)
        if op.second_order:
            assert torch.autograd.gradgradcheck(function, inputs), describe(args)
            continue
        outputs = function(*inputs)
        first = torch.autograd.grad(outputs, inputs, cotangents(outputs), create_graph=True)
        with pytest.raises(RuntimeError) as error:
            torch.autograd.grad([g.sum() for g in first], inputs, allow_unused=True)
        assert f"recurra: second derivative of {op.name} is not implemented" in str(error.value)


@every_op
def test_second_order_where_only_one_output_is_used(op):
    if not op.second_order:
        pytest.skip("second order raises by name")
    for args in itertools.islice(op.samples(torch.float64, "small"), 4):
        function, inputs = _float64_function(op, args)
        for i in range(2):
            assert torch.autograd.gradgradcheck(lambda *x, i=i: function(*x)[i], inputs)


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


def _lengths(op, draw_seed=3):
    """The same options at five lengths."""
    for T in (5, 9, 17, 33, 6):
        args = op.make(Draw(draw_seed), 2, T, 4, torch.float32, False)
        yield {k: v for k, v in args.items() if v is not None}


@every_op
def test_compile_full_graph_with_at_most_one_recompile(op):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda args: op.function(**args), backend=counter, fullgraph=True)
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
    compiled = torch.compile(lambda args: op.function(**args), fullgraph=True, dynamic=True)
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
        return sum(y.float().square().sum() for y in op.function(**{op.lead: x}, **others))

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


@every_op
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


# ---- same -------------------------------------------------------------------------------------


def _layout_samples(op, dtype):
    draw = Draw(11)
    for i, (B, T, D) in enumerate(((2, 5, 3), (3, 33, 17), (2, 70, 100), (1, 40, 16))):
        yield op.make(draw, B, T, D, dtype, i == 3)


@every_op
@every_dtype
def test_layouts_equal_contiguous(op, dtype):
    """Values and gradients to the bit, and in the memory order of their input."""
    names = list(LAYOUTS)
    for args in _layout_samples(op, dtype):
        for turn in range(2 * len(names)):
            # First every argument in one layout, then all in different ones.
            def layout(k, turn=turn):
                mixed = turn >= len(names)
                return names[(turn + (len(k) + 5 * ord(k[0]) if mixed else 0)) % len(names)]

            strided = replaced(args, lambda k, v: laid_out(v, layout(k)))
            plain = replaced(strided, lambda k, v: v.clone(memory_format=torch.contiguous_format))
            cots = [laid_out(c, layout("c")) for c in cotangents(op.function(**plain))]
            context = f"{describe(args)} in {[layout(k) for k in args]}"
            outputs, grads, _ = evaluate(op, strided, cots)
            want, want_grads, _ = evaluate(op, plain, [c.clone() for c in cots])
            assert_same(list(enumerate(outputs)), list(enumerate(want)), context)
            assert_same(list(grads.items()), list(want_grads.items()), context)
            order = torch.empty_like(strided[op.lead]).stride()
            assert outputs[0].stride() == order, context
            for k, g in grads.items():
                assert g.stride() == torch.empty_like(strided[k]).stride(), f"{k}, {context}"


def _broad_samples(op, dtype):
    draw = Draw(13)
    cases = ((3, 33, 17, 0), (2, 130, 100, 0), (1, 65, 31, 1), (2, 9, 300, 0))
    for B, T, D, packed in cases:
        yield op.make(draw, B, T, D, dtype, bool(packed))


@every_op
@every_dtype
def test_instruction_sets_give_the_same_bits(op, dtype):
    for args in _broad_samples(op, dtype):
        with isa("scalar"):
            want = everything(op, args)
        for name in isas():
            with isa(name):
                assert_same(everything(op, args), want, f"{name}, {describe(args)}")


@every_op
@every_dtype
def test_thread_counts_and_repetition_give_the_same_bits(op, dtype):
    for args in _broad_samples(op, dtype):
        with threads(1):
            want = everything(op, args)
        for count in (1, 2, 3, 8):
            with threads(count):
                assert_same(everything(op, args), want, f"{count} threads, {describe(args)}")


def _fixed(op, args):
    """The sample with a state given, which splitting needs."""
    if args[_state(op)] is None:
        last = op.function(**args)[-1]
        args = {**args, _state(op): torch.zeros_like(last)}
    return args


def _state(op):
    return "h0"


@every_op
@every_dtype
def test_split_calls_equal_the_whole(op, dtype):
    draw = Draw(17)
    for _ in range(REPEATS):
        B, T, D = draw.choice((1, 3)), draw.rng.randint(0, 70), draw.choice((1, 3, 16, 20))
        args = _fixed(op, op.make(draw, B, T, D, dtype, False))
        T1 = draw.rng.randint(0, T)
        spans = [(0, T1), (T1, T)]
        if args.get("reverse"):
            spans.reverse()
        outputs, grads, cots = evaluate(op, args)
        pieces, state = [], None
        for begin, end in spans:
            piece = narrowed(op, args, begin, end)
            leaves = replaced(piece, lambda k, v: v.detach().requires_grad_(k in op.differentiable))
            if state is not None:
                leaves[_state(op)] = state
            y, state = op.function(**leaves)
            pieces.append((begin, leaves, y))
        ordered = sorted(pieces, key=lambda p: p[0])
        context = f"split at {T1} of {describe(args)}"
        got = [torch.cat([y for _, _, y in ordered], 1), state]
        assert_same(list(enumerate(got)), list(enumerate(outputs)), context)

        if state_dtype(dtype) != dtype:
            continue  # 16-bit states are rounded in y and whole in h_last: equal in bound only
        first = pieces[0][1]
        names = gradients_in_pieces(op, args)
        leaves = [first[_state(op)]] + [p[1][k] for k in names for p in ordered]
        got = torch.autograd.grad(
            [torch.cat([y for _, _, y in ordered], 1), state],
            leaves,
            cots,
            allow_unused=True,
            materialize_grads=True,
        )
        joined = {_state(op): got[0]}
        for i, k in enumerate(names):
            joined[k] = torch.cat(got[1 + 2 * i : 3 + 2 * i], 1)
        if op.split_gradients == "bits":
            want = [(k, grads[k]) for k in joined]
            assert_same(list(joined.items()), want, context)
            continue
        _, exact = oracle(op, args, cots)
        _, errors = op.model(dtype, cots, **args)
        for k, g in joined.items():
            assert_within(g, exact[k], errors[k], f"{k}, {context}")


@every_op
@every_dtype
def test_packed_sequences_equal_separate_calls(op, dtype):
    draw = Draw(19)
    for _ in range(REPEATS):
        T, D = draw.rng.randint(2, 60), draw.choice((1, 3, 16, 20))
        args = _fixed(op, op.make(draw, 1, T, D, dtype, True))
        outputs, grads, cots = evaluate(op, args)
        ends = args["cu_seqlens"].tolist()
        want, want_grads = [[], []], {k: [] for k in [*gradients_in_pieces(op, args), _state(op)]}
        for n, (begin, end) in enumerate(itertools.pairwise(ends)):
            alone = narrowed(op, {**args, "cu_seqlens": None}, begin, end)
            alone[_state(op)] = args[_state(op)][n : n + 1]
            y, g, _ = evaluate(op, alone, [cots[0][:, begin:end], cots[1][n : n + 1]])
            for i in range(2):
                want[i].append(y[i])
            for k, pieces in want_grads.items():
                pieces.append(g[k])
        context = f"{describe(args)}"
        joined = [torch.cat(want[0], 1), torch.cat(want[1], 0)]
        assert_same(list(enumerate(outputs)), list(enumerate(joined)), context)
        for k, pieces in want_grads.items():
            whole = torch.cat(pieces, 0 if k == _state(op) else 1)
            assert same_bits(grads[k], whole), f"gradient of {k}, {context}"


@every_op
@every_dtype
def test_steps_equal_the_whole(op, dtype):
    draw = Draw(23)
    for _ in range(REPEATS):
        B, T, D = draw.choice((1, 3)), draw.rng.randint(0, 12), draw.choice((1, 3, 16, 20, 300))
        args = {**_fixed(op, op.make(draw, B, T, D, dtype, False)), "cu_seqlens": None}
        y, last = op.function(**args)
        h = args[_state(op)].clone()
        seen = []
        order = reversed(range(T)) if args.get("reverse") else range(T)
        for t in order:
            seen.append(op.step(h, **_step_arguments(op, args, t)))
        if args.get("reverse"):
            seen.reverse()
        context = describe(args)
        got = torch.stack(seen, 1) if seen else torch.empty_like(y)
        assert same_bits(got, y), context
        assert same_bits(h, last), context


def _step_arguments(op, args, t):
    """The arguments of the step op for step t."""

    def at(name, x):
        where = op.layout(name, x).find("T") if isinstance(x, torch.Tensor) else -1
        return x if where < 0 else x.select(where, 0 if x.shape[where] == 1 else t)

    given = {k: at(k, args[k]) for k in op.step_inputs if args.get(k) is not None}
    return {**given, **{k: args[k] for k in op.step_options}}


@every_op
@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
def test_slots(op, index):
    draw = Draw(29)
    for dtype in op.dtypes:
        args = _fixed(op, op.make(draw, 3, 1, 20, dtype, False))
        like = args[_state(op)]
        states = draw.normal(5, *like.shape[1:], dtype=like.dtype)
        given = _step_arguments(op, args, 0)
        alone = torch.stack([states[4], states[0], states[2]])
        before = states.clone()
        want = op.step(alone, **given)
        got = op.step(states, **given, slots=torch.tensor([4, -1, 2], dtype=index))
        assert same_bits(got[[0, 2]], want[[0, 2]])
        assert not got[1].any(), "a skipped row must return zeros"
        before[4], before[2] = alone[0], alone[2]
        assert same_bits(states, before), "states that no row names must stay"
        for bad, message in (
            ([4, 2, 4], "slots must not repeat a state, got 4 more than once"),
            ([0, 5, 1], "slots must be less than the number of states of h, 5, got 5 at index 1"),
        ):
            with pytest.raises(RuntimeError) as error:
                op.step(states, **given, slots=torch.tensor(bad, dtype=index))
            assert f"{op.name}_step: {message}" in str(error.value)
            assert same_bits(states, before), "a refused call must change nothing"
        with pytest.raises(RuntimeError) as error:
            op.step(states, **given)
        assert "h must have as many states as there are rows, 3" in str(error.value)


@every_op
def test_step_refuses_gradients_by_name(op):
    args = _fixed(op, op.make(Draw(31), 2, 1, 4, torch.float32, False))
    given = _step_arguments(op, args, 0)
    for name in [k for k in given if k in op.differentiable]:
        learning = {**given, name: given[name].detach().requires_grad_()}
        h = args[_state(op)].clone()
        with pytest.raises(RuntimeError) as error:
            op.step(h, **learning)
        assert f"recurra: {op.name}_step has no gradient; use {op.name} over" in str(error.value)
        with torch.no_grad():
            op.step(h, **learning)


@every_op
def test_step_layouts_equal_contiguous(op):
    draw = Draw(37)
    for dtype in op.dtypes:
        for layout in LAYOUTS:
            args = _fixed(op, op.make(draw, 3, 1, 20, dtype, False))
            given = replaced(_step_arguments(op, args, 0), lambda k, v: laid_out(v, layout))
            plain = replaced(given, lambda k, v: v.clone(memory_format=torch.contiguous_format))
            # The state is written, so it may be strided but not overlap itself.
            overlaps = layout in ("expanded", "overlapping")
            strided = laid_out(args[_state(op)], "contiguous" if overlaps else layout)
            state = strided.clone(memory_format=torch.contiguous_format)
            got, want = op.step(strided, **given), op.step(state, **plain)
            assert same_bits(got, want) and same_bits(strided, state), f"{layout} {describe(args)}"


# ---- IEEE -------------------------------------------------------------------------------------


def _reached(letters, shape, b, t, c, after, dtype=torch.bool):
    """Which elements of a tensor with these dimensions may depend on batch b, time t (and what
    comes after or before) and channel c; None stands for all."""
    mask = torch.ones(shape, dtype=dtype)
    for n, letter in enumerate(letters):
        index = torch.arange(shape[n]).view([-1 if i == n else 1 for i in range(len(shape))])
        if shape[n] == 1 and letter in "BTD":
            continue
        if letter in "BS" and b is not None:
            mask &= index == b
        elif letter == "T" and t is not None:
            mask &= index >= t if after else index <= t
        elif letter == "D" and c is not None:
            mask &= index == c
    return mask


def _specials(dtype):
    info = torch.finfo(dtype)
    smallest = info.tiny * info.eps
    return [float("nan"), float("inf"), -float("inf"), -0.0, smallest, info.max]


@every_op
@every_dtype
def test_special_values_stay_where_they_belong(op, dtype):
    draw = Draw(41)
    for turn in range(4):
        B, T, D = 2, 37, 19
        args = op.make(draw, B, T, D, dtype, False)
        after = not args.get("reverse")
        outputs, grads, cots = evaluate(op, args)
        sites = list(itertools.product((0, T // 2, T - 1), (0, D - 1)))
        special = _specials(dtype)
        names = [k for k in op.activations if args.get(k) is not None]
        for i, (name, (t, c)) in enumerate(itertools.product(names, sites)):
            value = special[(i + turn) % len(special)]
            x, letters = args[name].clone(), op.layout(name, args[name])
            at = {"B": 1, "T": t, "D": c}
            x[tuple(min(at.get(k, 0), n - 1) for k, n in zip(letters, x.shape, strict=True))] = (
                value
            )
            given = {**args, name: x}
            context = f"{value} in {name} at t = {t}, c = {c}; {describe(args)}"

            def seen(axis, index, x=x, letters=letters):
                where = letters.find(axis)
                return index if where >= 0 and x.shape[where] > 1 else None

            reach = [seen("B", 1), seen("T", t), seen("D", c)]
            got = op.function(**given)
            same_type = op.reference(**given)
            for letters_out, y, before, want in zip(
                op.outputs, got, outputs, same_type, strict=True
            ):
                outside = ~_reached(letters_out, y.shape, *reach, after)
                assert torch.equal(bits(y)[outside], bits(before)[outside]), f"forward: {context}"
                if not value == special[-1]:
                    assert torch.equal(y.isnan(), want.isnan()), f"NaN pattern: {context}"
                    assert torch.equal(y.isinf(), want.isinf()), f"Inf pattern: {context}"
        for i, (t, c) in enumerate(sites):
            value = special[(i + turn) % len(special)]
            loud = cots[0].clone()
            loud[1, t, c] = value
            _, got, _ = evaluate(op, args, [loud, cots[1]])
            for k, g in got.items():
                outside = ~_reached(op.layout(k, args[k]), g.shape, 1, t, c, not after)
                context = f"backward: {value} in the cotangent at t = {t}, c = {c}; gradient of {k}"
                assert torch.equal(bits(g)[outside], bits(grads[k])[outside]), context


# ---- bad input --------------------------------------------------------------------------------


def _error_calls(op):
    base, errors = op.errors()
    assert len(errors) >= 8
    for error in errors:
        changes = dict(error.changes)
        half, batch = changes.pop("half", None), changes.pop("B", None)
        args = {**base, **changes}
        if half:  # all activations in 16 bits
            args = {k: v.to(half) if k in op.activations else v for k, v in args.items()}
        if batch:  # the activations of one batch row, as packed sequences want
            args = {
                k: v[:batch] if k in op.activations and k not in changes and v is not None else v
                for k, v in args.items()
            }
        yield args, error


def _refuses(op, args, message):
    with pytest.raises(RuntimeError) as error:
        op.function(**args)
    assert message in str(error.value), f"{describe(args)}: {error.value}"


@every_op
def test_errors_on_the_cpu(op):
    for args, error in _error_calls(op):
        _refuses(op, args, error.message)
        learning = replaced(
            args,
            lambda k, v: v if is_index(v) else v.detach().requires_grad_(),
        )
        _refuses(op, learning, error.message)


@every_op
def test_errors_on_fake_and_meta_tensors(op):
    from torch._subclasses.fake_tensor import FakeTensorMode

    for args, error in _error_calls(op):
        if error.of_values:
            continue
        with FakeTensorMode() as mode:
            _refuses(op, replaced(args, lambda k, v: mode.from_tensor(v)), error.message)
        _refuses(op, replaced(args, lambda k, v: v.to("meta")), error.message)


@every_op
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_errors_on_cuda(op):
    for args, error in _error_calls(op):
        if not error.of_values:
            _refuses(op, replaced(args, lambda k, v: v.cuda()), error.message)


@every_op
def test_a_mixed_call_names_both_devices(op):
    args = op.make(Draw(3), 2, 3, 4, torch.float32, False)
    other = (
        next(k for k in op.activations if k != op.lead and args.get(k) is not None)
        if len(op.activations) > 1
        else op.differentiable[1]
    )
    args[other] = args[other].to("meta")
    _refuses(op, args, f"{op.name}: {other} must be on the device of {op.lead}, cpu, got another")
