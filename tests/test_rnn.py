"""What is true of rnn alone: its algorithms agree, and what does not converge is not believed."""

from __future__ import annotations

import pytest
import torch

import cell_bounds
import recurra
from opdb import CELLS
from recurra import reference
from support import assert_same, assert_within, evaluate, isa, isas, same_bits, threads

every_cell = pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)


def sample(cell, B: int, T: int, N: int, dtype=torch.float64, scale: float = 0.5, seed: int = 0):
    info = recurra.cells()[cell.name]
    torch.manual_seed(seed)
    x = torch.randn(B, T, len(info.inputs), N, dtype=torch.float64)
    params = scale * torch.randn(len(info.params), N, dtype=torch.float64)
    if "dt" in info.params:
        params[info.params.index("dt")] = 0.3
    for name in set(cell.positive) & set(info.params):
        params[info.params.index(name)].abs_()
    h0 = torch.randn(B, len(info.states), N, dtype=torch.float64)
    for name in set(cell.positive) & set(info.states):
        h0[:, info.states.index(name)] = 1
    return x.to(dtype), params.to(dtype), h0.to(dtype)


def within_bound(cell, x, params, h0, context: str, **options) -> None:
    """Outputs, all states, within the derived bound of the exact ones."""
    y, last, *_ = recurra.rnn(x, params, h0, cell=cell.name, return_states=True, **options)
    wide = [t.double() for t in (x, params, h0)]
    kept = {k: v for k, v in options.items() if k in ("reset", "cu_seqlens")}
    exact = reference.rnn(*wide, cell=cell.name, return_states=True, **kept)
    zeros = [torch.zeros_like(t) for t in exact[:2]]
    model = cell_bounds.rnn(
        x.dtype, zeros, x, params, h0, cell=cell.name, ulps=cell.ulps, return_states=True, **kept
    )[0]
    for name, got, want, bound in zip(("y", "h_last"), (y, last), exact, model, strict=False):
        assert_within(got, want, bound, f"{cell.name} {name} {context}")


@every_cell
@pytest.mark.parametrize("algorithm", ["newton", "newton-global"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_newton_is_within_the_bound_of_the_exact_states(cell, algorithm, dtype):
    for B, T, N, chunk in ((1, 1000, 1, 32), (2, 331, 3, 64), (1, 517, 20, 96), (3, 64, 2, 32)):
        args = sample(cell, B, T, N, dtype)
        options = {"algorithm": algorithm, "chunk": chunk}
        within_bound(cell, *args, f"{(B, T, N, chunk)}", **options)
        reset = torch.rand(B, T) < 0.02
        within_bound(cell, *args, f"{(B, T, N, chunk)} with resets", reset=reset, **options)


@every_cell
def test_newton_gradients_are_those_of_float64_autograd(cell):
    args = sample(cell, 2, 300, 3)
    gradients = []
    for function, algorithm in (
        (recurra.rnn, "newton"),
        (recurra.rnn, "newton-global"),
        (recurra.rnn, "sequential"),
        (reference.rnn, "sequential"),
    ):
        leaves = [a.clone().requires_grad_() for a in args]
        y, last, *_ = function(*leaves, cell=cell.name, algorithm=algorithm, chunk=32)
        loss = (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum() + last.square().sum()
        gradients.append(torch.autograd.grad(loss, leaves))
    *ours, exact = gradients
    for one in ours:
        for g, want in zip(one, exact, strict=True):
            assert (g - want).abs().max() <= 1e-8 * max(1, want.abs().max())


@pytest.mark.parametrize("scale", [4.0, 8.0])
@pytest.mark.parametrize("name", ["tanh", "paragru", "paralstm", "janet"])
def test_large_recurrent_weights_come_out_right(name, scale):
    """Where the iteration does not settle the sequential result is what is returned."""
    (cell,) = (c for c in CELLS if c.name == name)
    for dtype in (torch.float64, torch.float32):
        x, params, h0 = sample(cell, 1, 2048, 4, dtype, scale)
        want = recurra.rnn(x, params, h0, cell=name, algorithm="sequential")
        for algorithm in ("newton", "newton-global"):
            y, last, passes, mismatch = recurra.rnn(
                x, params, h0, cell=name, algorithm=algorithm, chunk=64, max_passes=4
            )
            fell_back = not mismatch <= 1e-6
            if fell_back:
                assert_same([("y", y), ("last", last)], [("y", want[0]), ("last", want[1])], name)
            assert (y - want[0]).abs().max() <= (1e-3 if dtype == torch.float32 else 1e-8)
            assert 1 <= passes <= 4


def test_newton_takes_the_passes_of_newton():
    """Jacobians that were lost would still converge, but pass by pass like a fixed point."""
    (cell,) = (c for c in CELLS if c.name == "paragru")
    x, params, h0 = sample(cell, 1, 2048, 2)
    quick = recurra.rnn(x, params, h0, cell="paragru", algorithm="newton-global")
    assert quick[2] <= 8 and quick[3] <= 1e-14
    x[:, :, 0] -= 6  # a gate so slow that the short runs before the stretches do not find starts
    slow = recurra.rnn(x, params, h0, cell="paragru", algorithm="newton", chunk=64)
    assert 2 <= slow[2] <= 5 and slow[3] <= 1e-13


def test_failures_are_told_where_that_is_asked_for(capfd):
    (cell,) = (c for c in CELLS if c.name == "tanh")
    x, params, h0 = sample(cell, 1, 2048, 2, scale=8.0)
    options = {"cell": "tanh", "algorithm": "newton", "chunk": 32, "max_passes": 1}
    with pytest.raises(RuntimeError, match=r"rnn: newton did not converge for \d of 2 sequences"):
        recurra.rnn(x, params, h0, on_fail="raise", **options)
    y = recurra.rnn(x, params, h0, on_fail="warn", **options)[0]
    assert "Warning: rnn: newton did not converge for" in capfd.readouterr().err
    assert same_bits(y, recurra.rnn(x, params, h0, cell="tanh", algorithm="sequential")[0])
    recurra.rnn(x, params, h0, **options)
    assert "rnn" not in capfd.readouterr().err


def test_failures_are_told_by_compiled_calls(capfd):
    (cell,) = (c for c in CELLS if c.name == "tanh")
    args = sample(cell, 1, 2048, 2, scale=8.0)
    options = {"cell": "tanh", "algorithm": "newton", "chunk": 32, "max_passes": 1}

    def run(on_fail):
        compiled = torch.compile(
            lambda *a: recurra.rnn(*a, on_fail=on_fail, **options)[0] * 2,
            backend="aot_eager",
            fullgraph=True,
        )
        return compiled(*args)

    with pytest.raises(RuntimeError, match=r"rnn: newton did not converge for \d of 2 sequences"):
        run("raise")
    y = run("warn")
    assert "Warning: rnn: newton did not converge for" in capfd.readouterr().err
    assert same_bits(y, run("sequential"))
    assert "rnn" not in capfd.readouterr().err


@pytest.mark.parametrize("algorithm", ["newton", "newton-global"])
def test_nan_stays_in_its_row_and_after_its_time(algorithm):
    (cell,) = (c for c in CELLS if c.name == "paragru")
    x, params, h0 = sample(cell, 2, 640, 3)
    want = recurra.rnn(x, params, h0, cell="paragru", algorithm=algorithm, chunk=32)[0]
    x[1, 300, 1, 2] = float("nan")
    y, _, passes, mismatch = recurra.rnn(
        x, params, h0, cell="paragru", algorithm=algorithm, chunk=32
    )
    nan = torch.zeros_like(y, dtype=torch.bool)
    nan[1, 300:, 2] = True
    assert torch.equal(y.isnan(), nan)
    assert mismatch.isnan() and passes <= 16
    assert torch.allclose(y[~nan], want[~nan], rtol=1e-12, atol=1e-12)


def test_a_mismatch_of_zero_means_the_sequential_bits():
    (cell,) = (c for c in CELLS if c.name == "elstm")
    x, params, h0 = sample(cell, 1, 8192, 2, torch.float32, 0.3)
    y, last, passes, mismatch = recurra.rnn(x, params, h0, cell="elstm", algorithm="newton")
    want = recurra.rnn(x, params, h0, cell="elstm", algorithm="sequential")
    assert mismatch == 0 and passes == 1
    assert_same([("y", y), ("last", last)], [("y", want[0]), ("last", want[1])], "elstm")
    assert want[2] == 0 and want[3] == 0


@every_cell
def test_bits_depend_on_neither_threads_nor_instruction_set(cell):
    args = dict(zip(("x", "params", "h0"), sample(cell, 2, 400, 5, torch.float32), strict=True))

    class Newton:
        differentiable = ("x", "params", "h0")
        axes = dict.fromkeys(differentiable)

        @staticmethod
        def function(**given):
            return recurra.rnn(**given, cell=cell.name, algorithm="newton", chunk=32)[:2]

    seen = []
    for name in isas():
        for count in (1, 2):
            with isa(name), threads(count):
                outputs, grads, _ = evaluate(Newton, args)
                seen.append([*enumerate(outputs), *grads.items()])
    for other in seen[1:]:
        assert_same(other, seen[0], cell.name)


def test_packed_sequences_are_solved_apart():
    (cell,) = (c for c in CELLS if c.name == "paragru")
    ends = torch.tensor([0, 5, 5, 700, 731, 1400])
    x, params, _ = sample(cell, 1, 1400, 2)
    h0 = torch.randn(5, 1, 2, dtype=torch.float64)
    options = {"cell": "paragru", "chunk": 32, "cu_seqlens": ends}
    got = recurra.rnn(x, params, h0, algorithm="newton", **options)
    want = recurra.rnn(x, params, h0, algorithm="sequential", **options)
    for a, b in zip(got[:2], want[:2], strict=True):
        assert torch.allclose(a, b, rtol=1e-13, atol=1e-13)
    assert got[2] >= 1


def test_auto_solves_few_long_channels_and_walks_the_rest():
    long, short = torch.randn(1, 16384, 1, 1), torch.randn(4, 64, 1, 32)
    assert recurra.rnn(long, 0.5 * torch.ones(1, 1), cell="tanh")[2] >= 1
    assert recurra.rnn(short, 0.5 * torch.ones(1, 32), cell="tanh")[2] == 0


@pytest.mark.parametrize("algorithm", ["auto", "newton", "newton-global"])
def test_a_state_that_was_huge_does_not_excuse_a_later_one(algorithm):
    """The update gate is closed but for a little, and the candidate has two stable values: which of
    them is reached is decided long after the state was 1e9."""
    x = torch.tensor([-4.0, 4.0, -0.05]).view(1, 1, 3, 1).expand(1, 8192, 3, 1)
    params = torch.tensor([[0.0], [0.0], [4.0]])
    for size in (1e7, 1e9, -1e9):
        h0 = torch.full((1, 1, 1), size)
        want = recurra.rnn(x, params, h0, cell="paragru", algorithm="sequential")[0]
        y, _, passes, _ = recurra.rnn(x, params, h0, cell="paragru", algorithm=algorithm)
        assert passes > 0
        torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("algorithm", ["newton", "newton-global"])
def test_what_is_not_finite_is_told(algorithm):
    def run(x, params, reset=None):
        both = {}
        for name in ("sequential", algorithm):
            both[name] = recurra.rnn(x, params, cell="tanh", algorithm=name, chunk=64, reset=reset)
        want, got = both["sequential"][0], both[algorithm][0]
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6, equal_nan=True)
        return both[algorithm][3]

    x = torch.full((1, 1029, 1, 1), 0.1)
    x[0, -2] = torch.nan  # behind the last whole chunk
    assert run(x, torch.full((1, 1), 0.5)).isnan()
    # Newton over the whole sequence overflows here, before a reset that hides it.
    for n in (40, 50, 59, 80):
        reset = torch.zeros(1, n + 3, dtype=torch.bool)
        reset[0, n] = True
        x = torch.full((1, n + 3, 1, 1), 1e-3)
        run(x, torch.full((1, 1), 8.0), reset)
