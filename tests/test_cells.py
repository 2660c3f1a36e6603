"""Every cell: its step is the oracle's, and so is the Jacobian that dual numbers give."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from opdb import CELLS, Cell

native = pytest.importorskip("recurra._native")

CHANNELS = 257
EPS = np.finfo(np.float64).eps


def sample(cell: Cell) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    info = native.cell_info(cell.name)
    rng = np.random.default_rng(0)
    drawn = []
    for kind in ("inputs", "states", "params"):
        rows = cell.scale * rng.standard_normal((len(info[kind]), CHANNELS))
        for row, name in zip(rows, info[kind], strict=True):
            if name in cell.positive:
                row[:] = 0.5 + np.abs(row)
        drawn.append(rows)
    return tuple(drawn)


def oracle(cell: Cell, *arguments: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """The new states (S, n) and their derivatives (S, G + S + P, n), channel by channel."""
    tensors = [torch.from_numpy(a).requires_grad_() for a in arguments]
    states = cell.oracle(*tensors)
    rows = [torch.cat(torch.autograd.grad(s.sum(), tensors, retain_graph=True)) for s in states]
    return states.detach(), torch.stack(rows)


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)
def test_step_and_jacobian_are_the_oracles(cell):
    arguments = sample(cell)
    step, jacobian = native.evaluate_cell(cell.name, *arguments)
    expected, derivative = oracle(cell, *arguments)
    largest = 1.0 + max(np.abs(a).max() for a in arguments)
    assert np.abs(step - expected.numpy()).max() <= cell.ulps * EPS * largest
    # A derivative multiplies by a state or a parameter, so its roundings count once more by them.
    assert np.abs(jacobian - derivative.numpy()).max() <= cell.ulps * EPS * largest**2


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)
def test_the_output_is_a_state(cell):
    info = native.cell_info(cell.name)
    assert info["output"] in info["states"]


def test_an_unknown_cell_or_shape_is_refused():
    x = np.zeros((1, 3))
    with pytest.raises(ValueError, match="evaluate_cell: no cell is named lstn"):
        native.evaluate_cell("lstn", x, x, x)
    with pytest.raises(ValueError, match=r"evaluate_cell: p must have shape \(1, n\)"):
        native.evaluate_cell("tanh", x, x, np.zeros((2, 3)))
