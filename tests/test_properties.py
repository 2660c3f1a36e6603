"""Property tests: any shapes, layouts, dtypes and values, and every instruction set agrees to the
bit with the scalar one, and with the oracle within the bound where all numbers are ordinary."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from opdb import OPS
from support import (
    DTYPES,
    LAYOUTS,
    Draw,
    assert_right,
    assert_same,
    cotangents,
    describe,
    everything,
    isa,
    isas,
    laid_out,
    replaced,
    step_arguments,
    threads,
    with_state,
)

every_op = pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)

SPECIALS = ("none", "nan", "inf", "-inf", "-0.0", "smallest", "largest")


@st.composite
def calls(draw):
    return {
        "seed": draw(st.integers(0, 2**32)),
        "shape": draw(st.tuples(st.integers(0, 4), st.integers(0, 90), st.integers(0, 70))),
        "dtype": draw(st.sampled_from(DTYPES)),
        "packed": draw(st.booleans()),
        "layouts": draw(st.lists(st.sampled_from(list(LAYOUTS)), min_size=9, max_size=9)),
        "special": draw(st.sampled_from(SPECIALS)),
        "threads": draw(st.sampled_from((1, 2, 5))),
    }


def _number(special: str, dtype: torch.dtype) -> float:
    info = torch.finfo(dtype)
    known = {"smallest": info.tiny * info.eps, "largest": info.max}
    return known[special] if special in known else float(special)


def _arguments(op, call) -> tuple[dict, list]:
    B, T, D = call["shape"]
    draw = Draw(call["seed"])
    packed = call["packed"]
    args = op.make(draw, 1 if packed else B, T, D, call["dtype"], packed)
    if call["special"] != "none":
        for name in op.activations:
            x = args.get(name)
            if x is not None and x.numel():
                x.view(-1)[draw.rng.randrange(x.numel())] = _number(call["special"], x.dtype)
    layouts = itertools.cycle(call["layouts"])
    args = replaced(args, lambda k, v: laid_out(v, next(layouts)))
    outputs = op.function(**args)
    return args, [laid_out(c, next(layouts)) for c in cotangents(outputs, call["seed"] % 1000)]


@every_op
@given(call=calls())
def test_every_instruction_set_and_thread_count_agrees(op, call):
    args, cots = _arguments(op, call)
    with isa("scalar"), threads(1):
        want = everything(op, args, cots)
    with threads(call["threads"]):
        for name in isas():
            with isa(name):
                assert_same(everything(op, args, cots), want, f"{name}, {call}")


@every_op
@given(call=calls())
def test_any_call_is_within_the_bound(op, call):
    args, _ = _arguments(op, {**call, "special": "none"})
    assert_right(op, args, str(call))


@every_op
@given(call=calls())
def test_any_step_agrees_and_leaves_other_states_alone(op, call):
    B, _, D = call["shape"]
    draw = Draw(call["seed"])
    args = with_state(op, op.make(draw, B, 1, D, call["dtype"], False))
    layouts = itertools.cycle(call["layouts"])
    given_step = replaced(step_arguments(op, args, 0), lambda k, v: laid_out(v, next(layouts)))
    like = args[op.state]
    count = B + draw.rng.randint(0, 3)
    states = draw.normal(count, *like.shape[1:], dtype=like.dtype)
    slots = draw.rng.sample(range(count), B)
    slots = torch.tensor([s if draw.rng.random() < 0.8 else -1 - s for s in slots]).long()
    results = []
    for name in isas():
        with isa(name):
            after = states.clone()
            y = op.step(after, **given_step, slots=slots)
            results.append([("y", y), ("states", after)])
    for result in results[1:]:
        assert_same(result, results[0], str(call))
    idle = torch.ones(count, dtype=torch.bool)
    idle[slots[slots >= 0]] = False
    assert_same([("idle", after[idle])], [("idle", states[idle])], str(call))
    if (slots >= 0).any():
        # The same step on the states of the rows that have one, without slots.
        kept = slots >= 0
        alone = states[slots[kept]]
        rows = {
            k: v[kept] if isinstance(v, torch.Tensor) and _per_row(op, k, args, B) else v
            for k, v in given_step.items()
        }
        y2 = op.step(alone, **rows)
        assert_same(
            [("y", y[kept]), ("states", after[slots[kept]])],
            [("y", y2), ("states", alone)],
            str(call),
        )


def _per_row(op, name, args, B) -> bool:
    letters = op.layout(name, args[name])
    return letters.startswith("B") and args[name].shape[0] == B


@every_op
@given(
    offsets=st.lists(st.integers(-3, 12), max_size=6),
    index=st.sampled_from((torch.int32, torch.int64)),
    seed=st.integers(0, 1000),
)
@example(offsets=[0, 2**31 - 1], index=torch.int32, seed=0)
@example(offsets=[0, 2**40, 8], index=torch.int64, seed=0)
@example(offsets=[0, -(2**63), 8], index=torch.int64, seed=0)
def test_any_offsets_are_right_or_refused(op, offsets, index, seed):
    """Sequences from 0 to T that ascend are taken; everything else is an error, never a crash."""
    T = 8
    args = {**op.make(Draw(seed), 1, T, 5, torch.float32, False), op.state: None}
    args["cu_seqlens"] = torch.tensor(offsets, dtype=index)
    good = len(offsets) > 0 and offsets[0] == 0 and offsets[-1] == T and offsets == sorted(offsets)
    if good:
        everything(op, args)
    else:
        with pytest.raises(RuntimeError, match=f"{op.name}: cu_seqlens must"):
            op.function(**args)


@every_op
@given(
    changes=st.lists(
        st.tuples(st.integers(0, 8), st.integers(0, 3), st.integers(0, 5)), min_size=1, max_size=2
    ),
    dtype=st.sampled_from((*DTYPES, torch.int32, torch.bool, torch.complex64, torch.float32)),
    seed=st.integers(0, 1000),
)
def test_any_wrong_shape_or_dtype_is_right_or_refused_alike(op, changes, dtype, seed):
    """The real op and its fake agree on what is refused, in the same words."""
    args = op.make(Draw(seed), 2, 3, 4, torch.float32, False)
    names = [k for k in op.axes if args.get(k) is not None]
    for which, dim, size in changes:
        name = names[which % len(names)]
        shape = list(args[name].shape)
        shape[dim % len(shape)] = size
        args[name] = torch.zeros(shape).to(dtype if which % 2 else torch.float32)
    outcomes = []
    for device in ("cpu", "meta"):
        try:
            y = op.function(**replaced(args, lambda k, v, device=device: v.to(device)))
            outcomes.append([(x.shape, x.dtype, x.stride()) for x in y])
        except RuntimeError as error:
            assert f"{op.name}: " in str(error), describe(args)
            text = str(error)
            outcomes.append(text[text.index(f"{op.name}: ") :].splitlines()[0])
    assert outcomes[0] == outcomes[1], describe(args)
