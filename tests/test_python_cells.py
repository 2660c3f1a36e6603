"""Cells in Python: what they compute, their gradients, and which declarations are refused."""

from __future__ import annotations

import re
import runpy
import warnings

import pytest
import torch

import recurra
from opdb import CELLS
from recurra import reference
from support import ROOT, same_bits

ALGORITHMS = ("sequential", "newton", "newton-global")
every_algorithm = pytest.mark.parametrize("algorithm", ALGORITHMS)


# ---- cells of each structure ------------------------------------------------------------------


def gru(x, h, p):
    """Light gated unit: inputs gate, candidate."""
    z = torch.sigmoid(p[0] * h[0] + x[0])
    return ((1 - z) * h[0] + z * torch.tanh(p[1] * h[0] + x[1]))[None]


def oscillator(x, h, p):
    """A damped pendulum, semi-implicit Euler: states angle, speed."""
    angle, speed = h
    stiffness, damping = p
    speed = speed + 0.3 * (x[0] - torch.sin(stiffness * angle) - damping * speed)
    return torch.stack([angle + 0.3 * speed, speed])


def elman(x, h, p):
    """A dense layer: p a dictionary with a matrix and a bias."""
    return torch.tanh(x + h @ p["W"].T + p["b"])


GRU = recurra.Cell(gru, inputs=("gate", "candidate"), params=2)
OSCILLATOR = recurra.Cell(
    oscillator,
    inputs=1,
    states=("angle", "speed"),
    params=("stiffness", "damping"),
    output="angle",
    structure="block",
)
ELMAN = recurra.Cell(elman, inputs=1, structure="dense")
OWN = {"diagonal": GRU, "block": OSCILLATOR, "dense": ELMAN}
every_structure = pytest.mark.parametrize("structure", OWN)


def normal(*shape, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def sample(structure: str, B=2, T=40, N=3, S=None, dtype=torch.float64):
    """x, the tensors of params, how the cell wants them, and h0."""
    cell = OWN[structure]
    x = normal(B, T, len(cell.info.inputs), N, dtype=dtype)
    h0 = normal(S or B, len(cell.info.states), N, dtype=torch.float64, seed=1).to(
        torch.float32 if dtype.itemsize == 2 else dtype
    )
    if structure == "dense":
        leaves = [0.4 * normal(N, N, seed=2), 0.3 * normal(N, seed=3)]
        pack = lambda leaves: dict(zip(("W", "b"), leaves, strict=True))  # noqa: E731
    else:
        leaves = [0.5 * normal(2, N, seed=2)]
        if structure == "block":
            leaves[0].abs_()
        pack = lambda leaves: leaves[0]  # noqa: E731
    return x, [leaf.to(dtype) for leaf in leaves], pack, h0


def loop(cell, x, params, h0, reset=None, cu_seqlens=None):
    """All states and the last ones, by a loop over single steps that autograd records."""
    B, T = x.shape[:2]
    ends = None if cu_seqlens is None else cu_seqlens.tolist()
    spans = [(b, 0, T) for b in range(B)]
    if ends is not None:
        spans = [(0, a, b) for a, b in zip(ends[:-1], ends[1:], strict=True)]
    states, last = [], []
    for s, (b, begin, end) in enumerate(spans):
        h = h0[s]
        for t in range(begin, end):
            if reset is not None and reset[b, t]:
                h = torch.zeros_like(h)
            if cell.structure == "dense":
                h = cell.step(x[b, t], h, params)
            else:
                h = cell.step(x[b, t, :, None], h[:, None], params[:, None])[:, 0]
            states.append(h)
        last.append(h)
    return torch.stack(states).view(B, T, *h0.shape[1:]), torch.stack(last)


def close(got, want, tolerance=1e-12):
    assert (got - want).abs().max() <= tolerance * max(1, want.abs().max())


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


def test_nothing_to_do():
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


# ---- what is refused --------------------------------------------------------------------------


def refused(step, structure="diagonal", *, x=None, params=None, inputs=1, states=1):
    """The sentence with which a step is refused."""
    cell = recurra.Cell(
        step,
        inputs=inputs,
        states=states,
        params=None if structure == "dense" else 1,
        structure=structure,
        name="mine",
    )
    x = torch.zeros(2, 3, inputs, 4) if x is None else x
    params = torch.zeros(1, 4) if params is None else params
    said = []
    for call in (lambda: recurra.rnn(x, params, cell=cell), lambda: cell.check(x, params)):
        with pytest.raises(ValueError) as error:
            call()
        said.append(str(error.value))
    assert said[0] == said[1]
    return said[0].removeprefix("cell mine: step ")


def test_another_result_is_refused_in_one_sentence():
    wanted = "must return a float32 tensor of shape (K, rows, N) = (1, 1, 4), got "
    assert refused(lambda x, h, p: h[0]) == wanted + "float32 of shape (1, 4)"
    assert refused(lambda x, h, p: h.repeat(2, 1, 1)) == wanted + "float32 of shape (2, 1, 4)"
    assert refused(lambda x, h, p: h.double()) == wanted + "float64 of shape (1, 1, 4)"
    assert refused(lambda x, h, p: (h, h)) == wanted + "tuple"
    assert refused(lambda x, h, p: None) == wanted + "NoneType"
    wanted = "must return a float32 tensor of shape (K, N) = (1, 4), got "
    assert refused(lambda x, h, p: h[0], "dense") == wanted + "float32 of shape (4,)"


def turn(x, h, p):
    return torch.tanh(x + p + h + 1e-6 * h.roll(1, -1))


def test_every_narrower_declaration_is_found():
    told = 'step mixes {}, which the structure "{}" that is declared leaves out; the structure '
    states, channels = "the states of a channel", "channels"

    def swap(x, h, p):
        return torch.tanh(h + x + 1e-6 * h.flip(0) * h)

    def both(x, h, p):
        return torch.tanh(x + h.roll(1, -1) + h.flip(0))

    for step, structure, K, what, right in (
        (swap, "diagonal", 2, states, '"block"'),
        (turn, "diagonal", 1, channels, '"dense", of at most K·N = 16'),
        (turn, "block", 1, channels, '"dense", of at most K·N = 16'),
        (both, "diagonal", 2, channels, '"dense", of at most K·N = 16'),
        (both, "block", 2, channels, '"dense", of at most K·N = 16'),
        (lambda x, h, p: h * h.mean(-1, keepdim=True), "block", 2, channels, None),
    ):
        said = "step " + refused(step, structure, states=K)
        assert said.startswith(told.format(what, structure) + "must be ")
        assert right is None or said.endswith("must be " + right)


def test_what_no_structure_allows_is_found():
    rows = "mixes rows, which are the steps of all sequences and must be computed each by itself"
    assert refused(lambda x, h, p: h * p + x.mean(1, keepdim=True)) == rows
    assert refused(lambda x, h, p: (h + 1) * h.norm(dim=1, keepdim=True) + x, "block") == rows
    assert refused(lambda x, h, p: torch.rand_like(h) * h) == (
        "must return the same for the same arguments"
    )
    for structure in ("diagonal", "dense"):
        assert refused(lambda x, h, p: x.mul_(2) + h, structure) == (
            "must leave its arguments as they are"
        )
    weight = torch.ones(4, requires_grad=True)
    said = refused(lambda x, h, p: weight * h + x, x=torch.zeros(2, 3, 1, 4, requires_grad=True))
    assert said.startswith("must take every tensor that requires a gradient from its arguments")


def test_a_right_declaration_passes_at_values_that_are_not_finite():
    x = torch.full((1, 4, 1, 3), float("nan"))
    cell = recurra.Cell(lambda x, h, p: (h - p).log() + x, inputs=1, params=1)
    assert cell.check(x, torch.zeros(1, 3)) == "diagonal"
    assert "mixes channels" in refused(turn, x=torch.full((1, 4, 1, 4), float("nan")))


def test_check_returns_the_narrowest_structure():
    x, (params,), _, h0 = sample("block")
    assert OSCILLATOR.check(x, params, h0) == "block"
    wider = recurra.Cell(gru, inputs=2, params=2, structure="block")
    x, (params,), _, h0 = sample("diagonal")
    assert GRU.check(x, params) == wider.check(x, params, h0) == "diagonal"
    dense = {
        "dense": elman,
        "diagonal": lambda x, h, p: torch.tanh(x + h),
        "block": lambda x, h, p: torch.tanh(x + h.flip(0)),
    }
    x, leaves, pack, _ = sample("dense")
    for right, step in dense.items():
        cell = recurra.Cell(step, inputs=1, states=2 - (right == "dense"), structure="dense")
        assert cell.check(x, pack(leaves)) == right


def test_the_probe_is_made_once_and_leaves_the_generator_alone():
    calls = []

    def step(x, h, p):
        calls.append(h.shape)
        return torch.tanh(p * h + x)

    cell = recurra.Cell(step, inputs=1, params=1)
    x, params = torch.randn(2, 3, 1, 4), torch.ones(1, 4)
    state = torch.random.get_rng_state()
    recurra.rnn(x, params, cell=cell, algorithm="sequential")
    first = len(calls)
    recurra.rnn(x, params, cell=cell, algorithm="sequential")
    assert torch.equal(state, torch.random.get_rng_state())
    assert len(calls) - first == 1 + 3 < first
    with torch.random.fork_rng():
        torch.manual_seed(1)
        before = len(calls)
        recurra.rnn(x.double(), params, cell=cell, algorithm="sequential")
    assert len(calls) - before > 4


def test_the_sentences_of_rnn_are_those_of_the_compiled_op():
    x, params = torch.zeros(2, 3, 1, 4), torch.zeros(1, 4)
    cell = recurra.Cell(
        reference.cells.tanh, inputs=("x",), states=("h",), params=("a",), output="h"
    )
    assert cell.info._replace(affine={}) == recurra.cells()["tanh"]._replace(affine={})
    packed = torch.zeros(1, 3, 1, 4)
    for changes in (
        {"max_passes": 0},
        {"chunk": 0},
        {"algorithm": "deer"},
        {"on_fail": "ignore"},
        {"x": torch.zeros(2, 3, 2, 4)},
        {"x": torch.zeros(2, 3, 4)},
        {"x": x.long()},
        {"params": torch.zeros(2, 4)},
        {"params": torch.zeros(1, 5)},
        {"params": params.double()},
        {"h0": torch.zeros(2, 2, 4)},
        {"h0": torch.zeros(3, 1, 4)},
        {"h0": torch.zeros(2, 1, 4, dtype=torch.float16)},
        {"reset": torch.zeros(2, 4, dtype=torch.bool)},
        {"cu_seqlens": torch.tensor([0, 3])},
        {"x": packed, "cu_seqlens": torch.tensor([0, 2, 1, 3])},
        {"x": packed, "cu_seqlens": torch.tensor([0, 2])},
        {"x": packed, "cu_seqlens": torch.tensor([1, 3])},
    ):
        said = []
        for which in ("tanh", cell):
            with pytest.raises(RuntimeError) as error:
                recurra.rnn(**{"x": x, "params": params, "cell": which} | changes)
            said.append(str(error.value).split("\n")[0])
        assert said[0].endswith(said[1].removeprefix("rnn: ")) and said[1].startswith("rnn: ")


def test_what_a_dense_cell_refuses():
    x = torch.zeros(1, 4, 1, 17)
    for call in (recurra.rnn, lambda x, p, cell: cell.check(x, p)):
        with pytest.raises(
            RuntimeError, match=r"at most 16 states in all, K·N, .* elman, got K = 1"
        ):
            call(x, {"W": torch.zeros(17, 17), "b": torch.zeros(17)}, cell=ELMAN)
    x = x[..., :2]
    with pytest.raises(RuntimeError, match="params must be tensors for the cell elman, got float"):
        recurra.rnn(x, {"W": torch.zeros(2, 2), "b": 0.5}, cell=ELMAN)
    with pytest.raises(RuntimeError, match="params must have dtype float32 where x has float32"):
        recurra.rnn(x, {"W": torch.zeros(2, 2).double(), "b": torch.zeros(2)}, cell=ELMAN)
    none = recurra.Cell(lambda x, h, p: torch.tanh(x + h), inputs=1, structure="dense")
    assert recurra.rnn(x, None, cell=none)[0].shape == (1, 4, 2)
    none = recurra.Cell(lambda x, h, p: torch.tanh(x + h), inputs=1, params=0)
    assert recurra.rnn(x, None, cell=none)[0].shape == (1, 4, 2)


def test_declarations_that_make_no_sense():
    for changes, said in (
        ({"structure": "tridiagonal"}, 'structure must be one of "diagonal", "block", "dense"'),
        ({"output": 1}, "output must be one of h0, got 1"),
        ({"output": "c"}, "output must be one of h0, got 'c'"),
        ({"states": 0}, "states must be at least one"),
        ({"inputs": (1, 2)}, "inputs must be names or their number"),
        ({"params": None}, 'params must be given for the structure "diagonal", got None'),
        ({"structure": "dense"}, "params must not be given .* got 1"),
        ({"step": 3}, "step must be callable, got int"),
    ):
        with pytest.raises(ValueError, match="Cell: " + said):
            recurra.Cell(**{"step": gru, "inputs": 1, "params": 1} | changes)
    with pytest.raises(RuntimeError, match="cell must be a name or a recurra.Cell, got int"):
        recurra.rnn(torch.zeros(1, 1, 1, 1), torch.zeros(1, 1), cell=3)


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
