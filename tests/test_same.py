"""The same bits whatever the layout, instruction set, thread count or cut in time; and special
values reach only what depends on them. Loops over opdb.py."""

from __future__ import annotations

import itertools

import pytest
import torch

from opdb import VARIANTS, alternative
from recurra._check import state_dtype
from support import (
    DTYPES,
    LAYOUTS,
    REPEATS,
    Draw,
    assert_same,
    assert_within,
    bits,
    cotangents,
    describe,
    evaluate,
    everything,
    gradients_in_pieces,
    isa,
    isas,
    laid_out,
    narrowed,
    oracle,
    replaced,
    same_bits,
    threads,
    with_state,
)

every_op = pytest.mark.parametrize("op", VARIANTS, ids=lambda op: op.label)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def _layout_samples(op, dtype):
    draw = Draw(11)
    # The last one is longer than any span into which a kernel cuts time.
    shapes = ((2, 5, 3), (3, 33, 17), (2, 70, 100), (1, 40, 16), (2, 1030, 17))
    for i, (B, T, D) in enumerate(shapes):
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
            if outputs[0].shape == strided[op.lead].shape:
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


@every_op
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "offset"])
def test_large_calls_equal_their_rows(op, dtype, layout):
    """Results too large for the caches are written past them; those of single rows are not."""
    B, T, D = 9, 528, 1040 if dtype == torch.bfloat16 else 520
    args = op.make(Draw(5), B, T, D, dtype, False)
    large = replaced(args, lambda k, v: laid_out(v, layout))
    cots = [laid_out(c, layout) for c in cotangents(op.function(**args))]
    outputs, grads, _ = evaluate(op, large, cots)
    for b in (0, B - 1):

        def row(k, x, b=b):
            cut = op.layout(k, x)[:1] in ("B", "S") and x.shape[0] == B
            return x[b : b + 1] if cut else x

        y, g, _ = evaluate(op, replaced(args, row), [c[b : b + 1] for c in cots])
        for i, x in enumerate(y):
            assert same_bits(outputs[i][b : b + 1], x), f"output {i}, {describe(args)}"
        for k, x in g.items():
            # A sum over batch or channels has an order that depends on the shape.
            letters = op.layout(k, args[k])
            if letters[:1] in ("B", "S") and "D" in letters and args[k].shape[0] == B:
                assert same_bits(grads[k][b : b + 1], x), f"gradient of {k}, {describe(args)}"


@every_op
@every_dtype
def test_split_calls_equal_the_whole(op, dtype):
    draw = Draw(17)
    for _ in range(REPEATS):
        B, T, D = draw.choice((1, 3)), draw.rng.randint(0, 70), draw.choice((1, 3, 16, 20))
        args = with_state(op, op.make(draw, B, T, D, dtype, False))
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
                leaves[op.state] = state
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
        leaves = [first[op.state]] + [p[1][k] for k in names for p in ordered]
        got = torch.autograd.grad(
            [torch.cat([y for _, _, y in ordered], 1), state],
            leaves,
            cots,
            allow_unused=True,
            materialize_grads=True,
        )
        joined = {op.state: got[0]}
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
        args = with_state(op, op.make(draw, 1, T, D, dtype, True))
        outputs, grads, cots = evaluate(op, args)
        ends = args["cu_seqlens"].tolist()
        want, want_grads = [[], []], {k: [] for k in [*gradients_in_pieces(op, args), op.state]}
        for n, (begin, end) in enumerate(itertools.pairwise(ends)):
            alone = narrowed(op, {**args, "cu_seqlens": None}, begin, end)
            alone[op.state] = args[op.state][n : n + 1]
            y, g, _ = evaluate(op, alone, [cots[0][:, begin:end], cots[1][n : n + 1]])
            for i in range(2):
                want[i].append(y[i])
            for k, pieces in want_grads.items():
                pieces.append(g[k])
        context = f"{describe(args)}"
        joined = [torch.cat(want[0], 1), torch.cat(want[1], 0)]
        assert_same(list(enumerate(outputs)), list(enumerate(joined)), context)
        for k, pieces in want_grads.items():
            whole = torch.cat(pieces, 0 if k == op.state else 1)
            assert same_bits(grads[k], whole), f"gradient of {k}, {context}"


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
        sites = list(itertools.product((0, T // 2, T - 1), (0, 1, 17, D - 1)))
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
                outside = ~_reached(alternative(letters_out, y), y.shape, *reach, after)
                assert torch.equal(bits(y)[outside], bits(before)[outside]), f"forward: {context}"
                # What the reference makes of it in the same dtype. It may lose more to infinity
                # than the kernel, as silu(-Inf) = -0 shows, but not to NaN.
                context = f"forward: {context}"
                if value != value:
                    assert torch.equal(y.isnan(), want.isnan()), context
                elif value != special[-1]:
                    # Which parts of a product with a complex infinity are NaN is a convention.
                    if not y.is_complex():
                        assert not (y.isnan() & ~want.isnan()).any(), context
                    assert not (~y.isfinite() & want.isfinite()).any(), context
        for i, (t, c) in enumerate(sites):
            value = special[(i + turn) % len(special)]
            loud = cots[0].clone()
            letters = alternative(op.outputs[0], loud)
            loud[tuple({"B": 1, "T": t, "D": c}.get(k, slice(None)) for k in letters)] = value
            _, got, _ = evaluate(op, args, [loud, cots[1]])
            for k, g in got.items():
                outside = ~_reached(op.layout(k, args[k]), g.shape, 1, t, c, not after)
                context = f"backward: {value} in the cotangent at t = {t}, c = {c}; gradient of {k}"
                assert torch.equal(bits(g)[outside], bits(grads[k])[outside]), context
