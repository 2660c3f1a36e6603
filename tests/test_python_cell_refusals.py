"""What recurra.Cell refuses: wrong declarations, found by trying the step, and wrong arguments."""

from __future__ import annotations

import pytest
import torch

import recurra
from python_cells import ELMAN, GRU, OSCILLATOR, elman, gru, sample
from recurra import reference


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
        ({"output": 1}, "output must be one of h0, its number from 0 or None, got 1"),
        ({"output": "c"}, "output must be one of h0, its number from 0 or None, got 'c'"),
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
