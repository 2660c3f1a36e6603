"""Reads and writes stay inside the tensors, whatever their place, size and strides.

Inputs lie flush against pages that no one may touch, so that a read past either end kills the
process at once; it is a child process. The states that a step op writes in place lie there too.
The other outputs are allocated by torch and cannot be placed: writes past them are found by
AddressSanitizer, which the nightly tier runs this suite under.
"""

from __future__ import annotations

import mmap

import pytest
import torch

from opdb import OPS
from support import (
    Draw,
    assert_same,
    cotangents,
    describe,
    everything,
    far_apart,
    far_inputs,
    replaced,
    run_python,
    step_arguments,
    with_state,
)

every_op = pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)

GUARDED = """
import itertools
import torch
from opdb import OPS
from guard import guarded
from support import DTYPES, ISAS, Draw, assert_same, cotangents, describe, evaluate, isa, replaced
from support import step_arguments, with_state

op = next(op for op in OPS if op.name == NAME)
SHAPES = [(2, 5, 3), (1, 33, 17), (3, 1, 16), (1, 70, 1), (2, 16, 31), (1, 130, 33), (1, 3, 130)]

def outputs_and_gradients(args, cots, place):
    # What the op keeps for its backward moves against the guard as well.
    moved = replaced(args, lambda k, v: place(v))
    with torch.autograd.graph.saved_tensors_hooks(place, lambda x: x):
        y, grads, _ = evaluate(op, moved, [place(c) for c in cots])
    return [*enumerate(y), *grads.items()]

count = 0
for dtype, (n, shape), packed in itertools.product(DTYPES, enumerate(SHAPES), (False, True)):
    for layout in ("plain", "time first")[n % 2 :][: 1 if dtype.itemsize > 2 else 2]:
        draw = Draw(n)
        args = op.make(draw, 1 if packed else shape[0], *shape[1:], dtype, packed)
        if layout == "time first":
            flip = lambda x: x.mT.contiguous().mT if x.dim() > 2 else x
            args = replaced(args, lambda k, v: flip(v))
        cots = cotangents(op.function(**args))
        with isa("scalar"):
            want = outputs_and_gradients(args, cots, lambda x: x.detach())
        for name, end in itertools.product(ISAS, (False, True)):
            print(name, "end" if end else "begin", layout, describe(args), flush=True)
            with isa(name):
                got = outputs_and_gradients(args, cots, lambda x: guarded(x.detach(), end))
            assert_same(got, want, describe(args))
            count += 1
    if packed:
        continue
    args = with_state(op, op.make(Draw(n), shape[0], 1, shape[2], dtype, False))
    given = step_arguments(op, args, 0)
    for name, end, slotted in itertools.product(ISAS, (False, True), (False, True)):
        print(name, "step", slotted, describe(args), flush=True)
        slots = {"slots": torch.arange(shape[0]).flip(0)} if slotted else {}
        state = args["h0"].clone()
        want = op.step(state, **given, **slots)
        with isa(name):
            place = lambda x: guarded(x.detach(), end)
            moved = place(args["h0"])
            got = op.step(moved, **replaced({**given, **slots}, lambda k, v: place(v)))
        assert_same([(0, got), (1, moved)], [(0, want), (1, state)], describe(args))
        count += 1
print("cases", count)
"""


@every_op
def test_guard_pages(op):
    printed = run_python(f"NAME = {op.name!r}\n" + GUARDED, timeout=300)
    assert int(printed.split()[-1]) >= 300


def test_the_guard_kills_a_reader_past_either_end():
    for end, offset in ((True, 4), (False, -4)):
        code = f"""
        import ctypes, torch
        from guard import guarded
        x = guarded(torch.arange(5, dtype=torch.float32), {end})
        assert x.tolist() == [0, 1, 2, 3, 4]
        at = x.data_ptr() + ({offset} + 16 if {end} else {offset})
        print("alive", flush=True)
        ctypes.c_float.from_address(at).value
        print("unharmed", flush=True)
        """
        with pytest.raises(AssertionError, match="exit status -11") as error:
            run_python(code)
        assert "alive" in str(error.value) and "unharmed" not in str(error.value)


def _reserve(count: int, dtype: torch.dtype) -> torch.Tensor:
    """Address space for that many elements, of which only touched pages cost memory."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    space = mmap.mmap(-1, count * dtype.itemsize, flags=flags)
    return torch.frombuffer(space, dtype=dtype, count=count)


def _far(x: torch.Tensor, axis: int) -> torch.Tensor:
    """The tensor with more than 2^31 elements between neighbours along an axis."""
    return far_apart(x, axis, 2**31 + 64, _reserve)


@every_op
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("axis", "BTD")
def test_strides_beyond_2_to_the_31(op, dtype, axis):
    """Every input and cotangent with a huge stride along B, T or D equals its compact copy."""
    for seed in range(3):
        args = op.make(Draw(seed), 2, 3, 3, dtype, False)
        far = far_inputs(op, axis, _far)
        cots = cotangents(op.function(**args))
        want = everything(op, args, cots)
        got = everything(op, replaced(args, far), [_far(cots[0], "BTD".index(axis)), cots[1]])
        assert_same(got, want, f"{axis}, {describe(args)}")
        # Each tensor alone, so that no error hides behind another.
        for name in op.differentiable:
            if args.get(name) is not None:
                one = {**args, name: far(name, args[name])}
                assert_same(everything(op, one, cots), want, f"{axis} of {name}, {describe(args)}")


@every_op
def test_step_states_beyond_2_to_the_31(op):
    args = with_state(op, op.make(Draw(5), 3, 1, 5, torch.float32, False))
    given = step_arguments(op, args, 0)
    state = args["h0"]
    far = _far(state, 0)
    slots = torch.tensor([2, -1, 1])
    got, want = op.step(far, **given, slots=slots), op.step(state, **given, slots=slots)
    assert_same([(0, got), (1, far)], [(0, want), (1, state)], describe(args))


@every_op
def test_nothing_uninitialised_is_read(op):
    """Under torch.use_deterministic_algorithms every new tensor starts as NaN."""
    cases = [
        op.make(Draw(n), B, T, D, dtype, packed)
        for dtype in op.dtypes
        for n, (B, T, D, packed) in enumerate(
            [(2, 5, 3, 0), (3, 33, 17, 0), (1, 70, 31, 1), (2, 0, 3, 0), (2, 3, 0, 0), (0, 3, 2, 0)]
        )
    ]
    want = [everything(op, args) for args in cases]
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        for args, expected in zip(cases, want, strict=True):
            assert_same(everything(op, args), expected, describe(args))
    finally:
        torch.use_deterministic_algorithms(False)
