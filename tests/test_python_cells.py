"""Cells in Python: what they compute, their gradients, and which declarations are refused."""

from __future__ import annotations

import re
import runpy
import warnings

import pytest
import torch

import recurra
from opdb import CELLS
from python_cells import ELMAN, GRU, OSCILLATOR, OWN, close, every_structure, loop, normal, sample
from recurra import reference
from support import ROOT, same_bits

ALGORITHMS = ("sequential", "newton", "newton-global")
every_algorithm = pytest.mark.parametrize("algorithm", ALGORITHMS)


# ---- what they compute ------------------------------------------------------------------------


@every_structure
@every_algorithm
@pytest.mark.parametrize("kind", ["plain", "reset", "packed", "packed and reset"])
def test_states_and_gradients_are_those_of_a_loop(structure, algorithm, kind):
    cell, options = OWN[structure], {}
    packed = "packed" in kind
    if packed:
        options["cu_seqlens"] = torch.tensor([0, 7, 7, 8, 40, 61, 61])
    x, leaves, pack, h0 = sample(structure, *((1, 61) if packed else (3, 40)), S=6 * packed or None)
    if "reset" in kind:
        options["reset"] = normal(*x.shape[:2], seed=5) > 1.2
        options["reset"][0, 0] = True
    results = []
    for run in (
        lambda x, p, h: recurra.rnn(
            x, p, h, cell=cell, algorithm=algorithm, chunk=16, return_states=True, **options
        )[:2],
        lambda x, p, h: loop(cell, x, p, h, **options),
    ):
        own = [t.clone().requires_grad_() for t in (x, h0, *leaves)]
        y, last = run(own[0], pack(own[2:]), own[1])
        loss = (y * normal(*y.shape, seed=7)).sum() + (last * normal(*last.shape, seed=8)).sum()
        results.append((y, last, *torch.autograd.grad(loss, own)))
    for got, want in zip(*results, strict=True):
        close(got.detach(), want.detach(), 1e-11)


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)
def test_the_oracles_are_cells_that_agree_with_the_compiled_ones(cell):
    info = recurra.cells()[cell.name]
    K, N = len(info.states), 3
    mine = recurra.Cell(
        cell.oracle,
        inputs=info.inputs,
        states=info.states,
        params=info.params,
        output=info.output,
        structure="diagonal" if K == 1 else "block",
    )
    assert mine.info._replace(affine={}) == info._replace(affine={})
    x, params, h0 = (
        normal(2, 150, len(info.inputs), N),
        0.5 * normal(len(info.params), N, seed=1),
        normal(2, K, N, seed=2),
    )
    for names, rows in ((info.params, params), (info.states, h0.transpose(0, 1))):
        for name in set(cell.positive) & set(names):
            rows[names.index(name)] = 1
        if "dt" in names:
            rows[names.index("dt")] = 0.3
    reset = normal(2, 150, seed=3) > 2
    results = []
    for which, algorithm in ((cell.name, "sequential"), *((mine, a) for a in ALGORITHMS)):
        own = [t.clone().requires_grad_() for t in (x, params, h0)]
        options = {"algorithm": algorithm, "chunk": 64, "max_passes": 32, "reset": reset}
        y, last, passes, mismatch = recurra.rnn(*own, cell=which, **options)
        assert (passes > 0) == (algorithm != "sequential") and mismatch <= 1e-10
        loss = (y * normal(*y.shape, seed=4)).sum() + last.square().sum()
        results.append((y, last, *torch.autograd.grad(loss, own)))
    for one in results[1:]:
        for got, want in zip(one, results[0], strict=True):
            close(got.detach(), want.detach(), 1e-9)


@every_structure
@pytest.mark.parametrize("algorithm", ["sequential", "newton"])
def test_gradcheck(structure, algorithm):
    x, leaves, pack, h0 = sample(structure, 2, 7, 2)
    tensors = [t.requires_grad_() for t in (x, h0, *leaves)]

    def run(x, h0, *leaves):
        return recurra.rnn(x, pack(leaves), h0, cell=OWN[structure], algorithm=algorithm, chunk=3)[
            :2
        ]

    assert torch.autograd.gradcheck(run, tensors)


@every_structure
def test_a_second_derivative_raises_by_name(structure):
    x, leaves, pack, _ = sample(structure)
    x.requires_grad_()
    y = recurra.rnn(x, pack(leaves), cell=OWN[structure])[0]
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="recurra: second derivative of rnn is not implemented"):
        dx.sum().backward()


def test_gradients_of_some_arguments_alone():
    x, (params,), _, h0 = sample("diagonal")
    whole = [t.clone().requires_grad_() for t in (x, params, h0)]
    y, last, passes, mismatch = recurra.rnn(*whole, cell=GRU)
    assert not passes.requires_grad and not mismatch.requires_grad
    want = torch.autograd.grad(y.sum(), whole)
    for n in range(3):
        some = [t.clone().requires_grad_(i == n) for i, t in enumerate((x, params, h0))]
        (got,) = torch.autograd.grad(recurra.rnn(*some, cell=GRU)[0].sum(), some[n])
        assert same_bits(got, want[n])
    unused = recurra.Cell(lambda x, h, p: torch.tanh(x), inputs=1, params=1)
    p, h = torch.ones(1, 3, requires_grad=True), torch.ones(2, 1, 3, requires_grad=True)
    y = recurra.rnn(torch.randn(2, 5, 1, 3), p, h, cell=unused)[0]
    assert not y.requires_grad or all(g.eq(0).all() for g in torch.autograd.grad(y.sum(), (p, h)))


@every_algorithm
def test_a_missing_state_is_zero_and_pieces_continue(algorithm):
    x, (params,), _, h0 = sample("block")
    options = {"cell": OSCILLATOR, "algorithm": algorithm}
    y, last, *_ = recurra.rnn(x, params, **options)
    zero = recurra.rnn(x, params, torch.zeros_like(h0), **options)
    assert same_bits(y, zero[0]) and same_bits(last, zero[1])
    first, between, *_ = recurra.rnn(x[:, :17], params, **options)
    second, end, *_ = recurra.rnn(x[:, 17:], params, between, **options)
    close(torch.cat([first, second], 1), y)
    close(end, last)


@every_structure
def test_newton_takes_the_passes_of_newton(structure):
    """A Jacobian that was lost would still converge, but step by step."""
    x, leaves, pack, h0 = sample(structure, 1, 300)
    options = {"cell": OWN[structure], "algorithm": "newton-global"}
    _, _, passes, mismatch = recurra.rnn(x, pack(leaves), h0, **options)
    assert 2 <= passes <= 8 and mismatch <= 1e-14 and passes.dtype == torch.int32
    # A reset or an end cuts the linearisation, too, so that more of them take no more passes.
    x, leaves, pack, h0 = sample(structure, 1, 300, S=30)
    ends = torch.arange(0, 301, 10)
    assert recurra.rnn(x, pack(leaves), h0, cu_seqlens=ends, **options)[2] <= 6
    assert (
        recurra.rnn(x, pack(leaves), reset=(torch.arange(300) % 10 == 5)[None], **options)[2] <= 6
    )
    linear = recurra.Cell(lambda x, h, p: p * h + x, inputs=1, params=1)
    x, params = normal(1, 2000, 1, 2), torch.full((1, 2), -0.97, dtype=torch.float64)
    passes = recurra.rnn(x, params, cell=linear, algorithm="newton-global")[2]
    assert passes <= 3


@every_structure
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(structure, dtype):
    cell = OWN[structure]
    x, leaves, pack, h0 = sample(structure, dtype=dtype)
    own = [t.clone().requires_grad_() for t in (x, h0, *leaves)]
    wide = [t.detach().double().requires_grad_() for t in own]
    results = []
    for tensors in (own, wide):
        y, last, *_ = recurra.rnn(
            tensors[0], pack(tensors[2:]), tensors[1], cell=cell, algorithm="newton", chunk=16
        )
        results.append((y, last, *torch.autograd.grad(y.double().sum() + last.sum(), tensors)))
    assert [t.dtype for t in results[0]] == [dtype, h0.dtype, *(t.dtype for t in own)]
    for n, (got, want) in enumerate(zip(*results, strict=True)):
        rounded = torch.finfo(got.dtype).eps
        close(got.detach().double(), want.detach(), 2e-5 if n == 1 else max(2e-5, rounded))
    narrow = recurra.rnn(x, pack([p.float() for p in leaves]), h0, cell=cell)
    assert narrow[0].dtype == dtype and torch.isfinite(narrow[0]).all()


def test_y_takes_the_memory_order_of_x():
    x, (params,), _, _ = sample("block")
    turned = x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    for states in (False, True):
        options = {"cell": OSCILLATOR, "return_states": states}
        plain, y = (recurra.rnn(t, params, **options)[0] for t in (x, turned))
        compiled = recurra.rnn(
            turned, torch.ones(4, 3, dtype=torch.float64), cell="unicornn", return_states=states
        )[0]
        assert y.stride() == compiled.stride() != plain.stride() and same_bits(y, plain)


def test_auto_solves_few_long_channels_and_walks_the_rest():
    params = 0.5 * torch.ones(2, 1)
    assert recurra.rnn(torch.randn(1, 4096, 2, 1), params, cell=GRU)[2] >= 1
    assert recurra.rnn(torch.randn(1, 100, 2, 1), params, cell=GRU)[2] == 0
    assert recurra.rnn(torch.randn(8, 600, 2, 32), params.expand(2, 32), cell=GRU)[2] == 0


def test_what_is_written_to_reset_later_changes_no_gradient():
    x, (params,), _, h0 = sample("diagonal")
    h0.requires_grad_()
    reset = torch.zeros(2, 40, dtype=torch.bool)
    y = recurra.rnn(x, params, h0, cell=GRU, reset=reset)[0]
    reset.fill_(True)
    assert torch.autograd.grad(y.sum(), h0)[0].abs().min() > 0


def test_nothing_to_do():
    none = recurra.rnn(
        torch.zeros(1, 0, 1, 3), torch.zeros(2, 3), cell=OSCILLATOR, cu_seqlens=torch.tensor([0])
    )
    assert none[0].shape == (1, 0, 3) and none[1].shape == (0, 2, 3)
    for B, T, N in ((0, 5, 3), (2, 0, 3), (2, 5, 0)):
        x, h0 = torch.zeros(B, T, 1, N, requires_grad=True), torch.ones(B, 2, N, requires_grad=True)
        for algorithm in ALGORITHMS:
            y, last, passes, _ = recurra.rnn(
                x, torch.zeros(2, N), h0, cell=OSCILLATOR, algorithm=algorithm
            )
            assert y.shape == (B, T, N) and same_bits(last, h0) and passes == 0
            dx, dh0 = torch.autograd.grad(y.sum() + last.sum(), (x, h0))
            assert dx.shape == x.shape and torch.equal(dh0, torch.ones_like(h0))


# ---- what does not converge -------------------------------------------------------------------


@every_structure
@pytest.mark.parametrize("algorithm", ["newton", "newton-global"])
@pytest.mark.parametrize("packed", [False, True])
def test_nan_stays_in_its_row_and_after_its_time(structure, algorithm, packed):
    options = {"cell": OWN[structure], "algorithm": algorithm, "chunk": 16, "return_states": True}
    b, t, until = 1, 21, 40
    if packed:
        options["cu_seqlens"] = torch.tensor([0, 12, 33, 40])
        b, until = 0, 33
    x, leaves, pack, _ = sample(structure, 1 if packed else 2)
    want = recurra.rnn(x, pack(leaves), **options)[0]
    x[b, t, -1, 2] = float("nan")
    y, last, passes, mismatch = recurra.rnn(x, pack(leaves), **options)
    nan = torch.zeros_like(y, dtype=torch.bool)
    nan[b, t:until, :, slice(None) if structure == "dense" else 2] = True
    if structure == "dense":
        nan[b, t, :, :2] = False  # the others read it a step later
    assert torch.equal(y.isnan(), nan)
    assert mismatch.isnan() and passes <= 8  # what is not finite is given up at once
    close(y[~nan], want[~nan])


def wild():
    elman = recurra.Cell(
        reference.cells.tanh, inputs=("x",), states=("h",), params=("a",), name="wild"
    )
    return elman, normal(1, 2048, 1, 2), torch.tensor([[8.0, 0.5]], dtype=torch.float64)


@pytest.mark.parametrize("algorithm", ["newton", "newton-global"])
def test_failures_are_told_where_that_is_asked_for(algorithm):
    cell, x, params = wild()
    options = {"cell": cell, "algorithm": algorithm, "chunk": 1024, "max_passes": 4}
    said = rf"rnn: {algorithm} did not converge for \d of 2 sequences by channels in \d passes, the"
    with pytest.raises(RuntimeError, match=said + r" largest mismatch is [\d.e+-]+$"):
        recurra.rnn(x, params, on_fail="raise", **options)
    with pytest.warns(UserWarning, match=said + ".*; they were computed sequentially$") as told:
        y, last, passes, mismatch = recurra.rnn(x, params, on_fail="warn", **options)
    assert told[0].filename == __file__ and passes == 4 and mismatch > 1e-6
    want = recurra.rnn(x, params, cell=cell, algorithm="sequential")
    assert same_bits(y[..., 0], want[0][..., 0]) and same_bits(last[..., 0], want[1][..., 0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert same_bits(recurra.rnn(x, params, **options)[0], y)


def test_a_channel_that_converges_is_as_it_is_alone():
    cell, x, params = wild()
    x, options = x[:, :512], {"cell": cell, "algorithm": "newton-global"}
    both = recurra.rnn(x, params, **options)
    alone = recurra.rnn(x[..., 1:], params[:, 1:], **options)
    assert same_bits(both[0][..., 1:], alone[0]) and both[2] > alone[2]


@pytest.mark.parametrize("algorithm", ["newton", "newton-global"])
def test_what_overflows_is_what_the_loop_gives(algorithm):
    cell = recurra.Cell(lambda x, h, p: p * h + x, inputs=1, params=1)
    x, params = torch.ones(1, 600, 1, 2), torch.tensor([[3.0, -0.5]])
    y = recurra.rnn(x, params, cell=cell, algorithm=algorithm)[0]
    want = recurra.rnn(x, params, cell=cell, algorithm="sequential")[0]
    assert torch.equal(y[..., 0], want[..., 0]) and want[0, -1, 0].isinf()
    close(y[..., 1], want[..., 1], 1e-6)


def test_gradients_where_newton_failed():
    cell, x, params = wild()
    x, gradients = 5 * x[:, :200], []
    for algorithm in ("newton-global", "sequential"):
        own = [t.clone().requires_grad_() for t in (x, params)]
        y = recurra.rnn(*own, cell=cell, algorithm=algorithm, max_passes=1)[0]
        gradients.append(torch.autograd.grad(y.sum(), own))
    for got, want in zip(*gradients, strict=True):
        close(got, want)


# ---- torch around it --------------------------------------------------------------------------


def test_under_torch_func_it_raises_by_name():
    x, (params,), _, _ = sample("diagonal")

    def loss(x):
        return recurra.rnn(x, params, cell=GRU)[0].sum()

    for call in (
        lambda: torch.func.grad(loss)(x),
        lambda: torch.func.jvp(loss, (x,), (x,)),
        lambda: torch.func.vmap(lambda x: recurra.rnn(x, params, cell=GRU)[0])(x[None]),
    ):
        with pytest.raises(RuntimeError, match="recurra: .*rnn .*not implemented; use torch.auto"):
            call()
    with torch.autograd.forward_ad.dual_level(), pytest.raises(RuntimeError, match="forward-mode"):
        loss(torch.autograd.forward_ad.make_dual(x, x))


def test_autocast_and_inference_mode_change_nothing():
    x, leaves, pack, h0 = sample("dense", dtype=torch.float32)
    own, results = [t.clone().requires_grad_() for t in (x, *leaves)], []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            got = recurra.rnn(own[0], pack(own[1:]), h0, cell=ELMAN, algorithm="newton")
            results.append((*got, *torch.autograd.grad(got[0].sum(), own)))
    want = results[0]
    assert all(same_bits(a, b) for a, b in zip(*results, strict=True))
    with torch.inference_mode():
        got = recurra.rnn(x.clone(), pack(leaves), h0, cell=ELMAN, algorithm="newton")
    assert same_bits(got[0], want[0])


def test_the_examples_of_the_page_run(tmp_path):
    page = (ROOT / "docs/python_cells.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) >= 3
    script = tmp_path / "page.py"
    script.write_text("\n".join(blocks))
    runpy.run_path(str(script))
