"""A state that is written in place may share memory neither with itself nor with an input."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
import torch

import recurra
from opdb import VARIANTS
from support import Draw, array_of, replaced, same_bits, step_arguments, with_state

every_op = pytest.mark.parametrize("op", VARIANTS, ids=lambda op: op.label)
SIZE = 400


def places(x) -> list[int]:
    """The bytes of every element, one after another."""
    item, first = x.element_size(), x.storage_offset() * x.element_size()
    starts = (
        first + item * sum(i * s for i, s in zip(index, x.stride(), strict=True))
        for index in itertools.product(*map(range, x.shape))
    )
    return [start + byte for start in starts for byte in range(item)]


def view_of(buffer, shape, rng):
    """A view of the buffer, nested, interleaved or anyhow, somewhere near its start."""
    if rng.random() < 0.5:
        strides = [rng.randint(1, 14) for _ in shape]
    else:
        strides, by = [0] * len(shape), rng.randint(1, 3)
        for n in rng.sample(range(len(shape)), len(shape)):
            strides[n] = by
            by = by * shape[n] + rng.randint(0, 2)
    room = buffer.numel() - sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) - 1
    return buffer.as_strided(shape, strides, rng.randint(0, min(room, 60)))


def refused(call):
    try:
        return None, call()
    except (RuntimeError, ValueError) as error:
        return str(error), None


def steps():
    yield "torch", recurra.linear_scan_step, lambda x: x
    numpy = pytest.importorskip("recurra.numpy")
    yield "numpy", numpy.linear_scan_step, lambda x: x.numpy()


@pytest.mark.parametrize("kind", range(2), ids=("torch", "numpy"))
def test_overlaps_are_those_of_the_elements(kind):
    _, step, given = list(steps())[kind]
    rng, seen = random.Random(3 + kind), {"itself": 0, "a": 0, "b": 0, None: 0}
    for _ in range(4000):
        shape = (rng.randint(1, 4), rng.randint(1, 5))
        buffer = torch.linspace(-1, 1, SIZE)
        narrow = buffer.view(torch.bfloat16)
        dtype = rng.choice((torch.float32, torch.bfloat16))
        source = buffer if dtype == torch.float32 or kind else narrow
        h = view_of(buffer, shape, rng)
        a = view_of(torch.linspace(0, 1, SIZE).to(source.dtype), shape, rng)
        b = view_of(torch.linspace(0, 1, SIZE).to(source.dtype), shape, rng)
        if (where := rng.randrange(4)) < 2:
            one = h if rng.random() < 0.1 and source is buffer else view_of(source, shape, rng)
            a, b = (one, b) if where else (a, one)
        of_h = places(h)
        clash = None
        if len(set(of_h)) < len(of_h):
            clash = "itself"
        else:
            for name, x in (("a", a), ("b", b)):
                shares = x.untyped_storage().data_ptr() == h.untyped_storage().data_ptr()
                aligned = x.dtype == h.dtype and places(x) == of_h
                if clash is None and shares and set(places(x)) & set(of_h) and not aligned:
                    clash = name
        seen[clash] += 1
        state = h.clone()
        want = recurra.linear_scan_step(state, a.clone(), b.clone())
        text, got = refused(lambda h=h, a=a, b=b: step(given(h), given(a), given(b)))
        context = [(x.shape, x.stride(), x.storage_offset(), x.dtype) for x in (h, a, b)]
        assert (text is None) == (clash is None), f"{clash}: {text}: {context}"
        if text is None:
            got = torch.as_tensor(got)
            assert same_bits(got, want) and same_bits(h, state), context
        else:
            assert "linear_scan_step: h is written in place and must not overlap " + clash in text
    assert min(seen.values()) > 100, seen


@every_op
def test_every_input_may_lie_between_the_states_but_not_on_them(op):
    for numpy in (False, True):
        args = with_state(op, op.make(Draw(7), 3, 1, 20, torch.float32, False))
        given = step_arguments(op, args, 0)
        state = args[op.state]
        for name, x in given.items():
            if not isinstance(x, torch.Tensor) or x.dtype != state.dtype:
                continue
            memory = torch.zeros(2 * (state.numel() + x.numel()), dtype=x.dtype)

            def within(like, offset, by, memory=memory):
                strides = [s * by for s in torch.empty(like.shape).stride()]
                return memory.as_strided(like.shape, strides, offset).copy_(like)

            def run(h, moved, name=name, given=given, numpy=numpy):
                if not numpy:
                    return op.step(h, **{**given, name: moved})
                module = pytest.importorskip("recurra.numpy")
                there = replaced({**given, name: moved}, lambda k, v: array_of(v))
                return torch.as_tensor(getattr(module, op.name + "_step")(array_of(h), **there))

            fresh = state.clone()
            want = run(fresh, x)
            h, between = within(state, 0, 2), within(x, 1, 2)
            got = run(h, between)
            assert same_bits(got, want) and same_bits(h, fresh), name
            h = within(state, 0, 1)
            on = memory.as_strided(x.shape, torch.empty(x.shape).stride(), state.numel() - 1)
            before = memory.clone()
            message = f"{op.name}_step: h is written in place and must not overlap {name} in memory"
            with pytest.raises((RuntimeError, ValueError), match=message):
                run(h, on)
            assert same_bits(memory, before), "a refused call must change nothing"


# The dimension of the state that is neither rows nor channels, and what is read along with it.
ALIKE = {
    "linear_scan": (None, ("a", "b")),
    "block_scan": (None, ("b",)),
    "causal_conv1d": (1, ("x",)),
    "selective_scan": (2, ("u", "delta")),
    "softmax_scan": (1, ("s", "v")),
    "rnn": (1, ("x",)),
}


@every_op
def test_an_input_may_be_the_state_or_part_of_it(op):
    spare, names = ALIKE[op.name]
    for layout, channels in itertools.product(range(2), (1, 20, 300)):
        args = with_state(op, op.make(Draw(9), 3, 1, channels, torch.float32, False))
        given = step_arguments(op, args, 0)
        for name in names:
            x, h = given[name], args[op.state].clone()
            if layout:  # each dimension where another was
                h = h.mT.contiguous().mT
            count = 1 if spare is None or x.dim() < h.dim() else x.shape[spare]
            for k in range(1 if spare is None else h.shape[spare] - count + 1):
                if spare is None:
                    view = h
                else:
                    view = h.narrow(spare, k, count) if x.dim() == h.dim() else h.select(spare, k)
                if view.dtype != x.dtype or view.shape[0] != h.shape[0]:
                    continue
                there = {**given, name: view}
                apart = h.clone()
                slots = torch.arange(h.shape[0])
                with pytest.raises(RuntimeError, match=f"must not overlap {name} in memory"):
                    op.step(h, **there, slots=slots)
                want = op.step(apart, **{**given, name: view.clone()})
                assert same_bits(op.step(h, **there), want), (name, k)
                assert same_bits(h, apart), (name, k)


@every_op
def test_an_overlapping_state_is_refused(op):
    args = with_state(op, op.make(Draw(11), 3, 1, 20, torch.float32, False))
    given, shape = step_arguments(op, args, 0), args[op.state].shape
    h = torch.zeros(sum(shape), dtype=args[op.state].dtype).as_strided(shape, (1,) * len(shape))
    with pytest.raises(RuntimeError, match="must not overlap itself in memory, got shape"):
        op.step(h, **given)


@every_op
@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
def test_slots_may_follow_the_state_but_not_lie_on_it(op, index):
    args = with_state(op, op.make(Draw(13), 3, 1, 20, torch.float32, False))
    given, state = step_arguments(op, args, 0), args[op.state]
    size, item = state.numel() * state.element_size(), index.itemsize
    memory = torch.zeros(size + 4 * item, dtype=torch.uint8)
    h = memory[:size].view(state.dtype).view(state.shape).copy_(state)
    fresh = state.clone()
    order = torch.tensor([2, 0, 1], dtype=index)
    want = op.step(fresh, **given, slots=order)
    slots = memory[size:].view(index)[:3].copy_(order)
    assert same_bits(op.step(h, **given, slots=slots), want) and same_bits(h, fresh)
    slots = memory[size - item :].view(index)[:3].copy_(order)
    before = memory.clone()
    with pytest.raises(RuntimeError, match="must not overlap slots in memory"):
        op.step(h, **given, slots=slots)
    with pytest.raises(ValueError, match="must not overlap slots in memory"):
        there = replaced(given, lambda k, v: array_of(v))
        step = getattr(pytest.importorskip("recurra.numpy"), op.name + "_step")
        step(array_of(h), **there, slots=array_of(slots))
    assert same_bits(memory, before), "a refused call must change nothing"


def test_arrays_that_run_backwards():
    rnp = pytest.importorskip("recurra.numpy")
    memory = np.linspace(0, 1, 80, dtype=np.float32)
    a, b = np.full((4, 10), 0.5, np.float32), memory[40:].reshape(4, 10)
    h = memory[:40].reshape(4, 10)[::-1, ::-1]
    want = h * a + b
    assert np.array_equal(rnp.linear_scan_step(h, a, b), want)
    with pytest.raises(ValueError, match="must not overlap b"):
        rnp.linear_scan_step(h, a, memory[39:79].reshape(4, 10))


def test_strides_that_never_meet_in_large_views():
    """Found without going through the elements."""
    memory = torch.zeros(4096, 2, 512)
    a = torch.ones(1, 1)
    recurra.linear_scan_step(memory[:, 0], a, memory[:, 1])
    recurra.linear_scan_step(memory[..., 0], a.expand(4096, 2), memory[..., 511])
    with pytest.raises(RuntimeError, match="must not overlap b"):
        recurra.linear_scan_step(memory[1:, 0], a, memory[:-1, 0])
