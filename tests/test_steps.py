"""The step ops against the whole-sequence ops. Loops over opdb.py."""

from __future__ import annotations

import pytest
import torch

import recurra
from opdb import VARIANTS
from support import (
    DTYPES,
    LAYOUTS,
    REPEATS,
    Draw,
    describe,
    laid_out,
    replaced,
    same_bits,
    step_arguments,
    with_state,
)

every_op = pytest.mark.parametrize("op", VARIANTS, ids=lambda op: op.label)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@every_op
@every_dtype
def test_steps_equal_the_whole(op, dtype):
    draw = Draw(23)
    for _ in range(REPEATS):
        B, T, D = draw.choice((1, 3)), draw.rng.randint(0, 12), draw.choice((1, 3, 16, 20, 300))
        args = with_state(op, op.make(draw, B, T, D, dtype, False))
        args = {k: v for k, v in args.items() if k not in op.not_in_steps}
        y, last = op.function(**args)
        h = args[op.state].clone()
        seen = []
        order = reversed(range(T)) if args.get("reverse") else range(T)
        for t in order:
            seen.append(op.step(h, **step_arguments(op, args, t)))
        if args.get("reverse"):
            seen.reverse()
        context = describe(args)
        got = torch.stack(seen, 1) if seen else torch.empty_like(y)
        assert same_bits(got, y), context
        assert same_bits(h, last), context


@every_op
@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
def test_slots(op, index):
    draw = Draw(29)
    for dtype in op.dtypes:
        args = with_state(op, op.make(draw, 3, 1, 20, dtype, False))
        like = args[op.state]
        states = draw.normal(5, *like.shape[1:], dtype=like.dtype)
        given = step_arguments(op, args, 0)
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
def test_an_expanded_state_is_refused_where_it_has_elements(op):
    """By real tensors and by those without memory."""
    for rows, channels in ((3, 4), (3, 0)):
        args = with_state(op, op.make(Draw(31), rows, 1, channels, torch.float32, False))
        given = step_arguments(op, args, 0)
        for device in ("cpu", "meta"):
            h = args[op.state].clone().to(device)
            there = replaced(given, lambda k, v, device=device: v.to(device))
            expanded = h[:1].expand_as(h)
            if h.numel() == 0:
                op.step(expanded, **there)
            else:
                message = "h is written in place and must not be expanded, got stride 0 in dim"
                with pytest.raises(RuntimeError, match=f"{op.name}_step: {message}ension 0"):
                    op.step(expanded, **there)


@every_op
def test_step_refuses_gradients_by_name(op):
    args = with_state(op, op.make(Draw(31), 2, 1, 4, torch.float32, False))
    given = step_arguments(op, args, 0)
    for name in [k for k in given if k in op.differentiable]:
        learning = {**given, name: given[name].detach().requires_grad_()}
        h = args[op.state].clone()
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
            args = with_state(op, op.make(draw, 3, 1, 20, dtype, False))
            given = step_arguments(op, args, 0)
            given = replaced(given, lambda k, v, layout=layout: laid_out(v, layout))
            plain = replaced(given, lambda k, v: v.clone(memory_format=torch.contiguous_format))
            # The state is written, so it may be strided but not overlap itself.
            overlaps = layout in ("expanded", "overlapping")
            strided = laid_out(args[op.state], "contiguous" if overlaps else layout)
            state = strided.clone(memory_format=torch.contiguous_format)
            got, want = op.step(strided, **given), op.step(state, **plain)
            assert same_bits(got, want) and same_bits(strided, state), f"{layout} {describe(args)}"


def _compiles(op, backend: str) -> None:
    for seed in range(4):  # some of them complex
        draw = Draw(seed)
        args = with_state(op, op.make(draw, 3, 1, 20, torch.float32, False))
        state, given = args[op.state], step_arguments(op, args, 0)
        torch.compiler.reset()
        compiled = torch.compile(op.step, backend=backend, fullgraph=True)
        for slots in (None, torch.tensor([4, -1, 2])):
            h = state if slots is None else draw.normal(5, *state.shape[1:], dtype=state.dtype)
            h, want = h.clone(), h.clone()
            y = compiled(h, **given, slots=slots)
            assert same_bits(y, op.step(want, **given, slots=slots)), describe(args)
            assert same_bits(h, want), describe(args)


@every_op
def test_steps_compile(op):
    _compiles(op, "aot_eager")


@every_op
@pytest.mark.slow
def test_inductor_compiles_steps(op):
    _compiles(op, "inductor")


@pytest.mark.parametrize("slots", [None, [4, -1, 2]], ids=["rows", "slots"])
def test_the_functional_step_of_complex_states(slots):
    draw, states = Draw(0), 3 if slots is None else 5
    h, a, b = (draw.normal(n, 20, dtype=torch.complex64) for n in (states, 3, 3))
    slots = None if slots is None else torch.tensor(slots)
    functional = torch.ops.recurra._linear_scan_step_functional.default
    before, want = h.clone(), h.clone()
    y = recurra.linear_scan_step(want, a, b, slots=slots)
    new, got = functional(h, a, b, slots=slots)
    if slots is not None:
        want = want[slots.clamp(min=0)]
    assert same_bits(got, y) and same_bits(new, want) and same_bits(h, before)
    torch.library.opcheck(functional, (h, a, b), {"slots": slots})
    with pytest.raises(RuntimeError, match="linear_scan_step has no gradient; use linear_scan ov"):
        functional(h, a, b.requires_grad_(), slots=slots)


def test_a_compiled_step_of_complex_states_of_which_there_are_none():
    a, b = torch.randn(2, 3, 20, dtype=torch.complex64)
    step = torch.compile(recurra.linear_scan_step, backend="aot_eager", fullgraph=True)
    y = step(a[:0].clone(), a, b, slots=torch.tensor([-1, -1, -1]))
    assert y.shape == b.shape and not y.any()
