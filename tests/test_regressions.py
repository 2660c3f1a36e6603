"""Mistakes that were made once."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import textwrap

import pytest
import torch

import recurra
from recurra.jit.compile import compiler
from support import ROOT

STEPS = {
    "linear_scan_step": lambda h: recurra.linear_scan_step(h, torch.ones(2, 3), torch.ones(2, 3)),
    "causal_conv1d_step": lambda h: recurra.causal_conv1d_step(
        h[:, None], torch.ones(2, 3), torch.ones(3, 2)
    ),
    "selective_scan_step": lambda h: recurra.selective_scan_step(
        h[..., None],
        torch.ones(2, 3),
        torch.ones(2, 3),
        -torch.ones(3, 1),
        torch.ones(2, 1),
        torch.ones(2, 1),
    ),
}


@pytest.mark.parametrize("name", STEPS)
def test_a_step_tells_autograd_that_it_wrote_the_state(name):
    w = torch.ones(2, 3, requires_grad=True)
    h = torch.ones(2, 3)
    y = w * h
    with torch.no_grad():
        STEPS[name](h)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("name", STEPS)
def test_a_step_refuses_an_expanded_state(name):
    with pytest.raises(RuntimeError, match="h is written in place and must not be expanded"):
        STEPS[name](torch.zeros(1, 3).expand(2, 3))


def test_autocast_does_not_count_complex_activations():
    u, delta = torch.randn(2, 1, 5, 4)
    A = torch.complex(-torch.rand(4, 3), torch.randn(4, 3))
    B, C = torch.randn(2, 1, 5, 3, dtype=torch.complex64)
    with torch.autocast("cpu", torch.bfloat16):
        y, _ = recurra.selective_scan(u, delta, A, B, C)
    assert y.dtype == torch.float32


def test_one_tensor_as_two_arguments_is_checked_as_both():
    for device in ("cpu", "meta"):
        x = torch.zeros(2, 3, dtype=torch.bfloat16, device=device)
        with pytest.raises(RuntimeError, match="h must have dtype float32 where b has bfloat16"):
            recurra.linear_scan_step(x, x, x)


def test_a_transposed_layout_is_named():
    x, weight = torch.zeros(2, 7, 100), torch.zeros(7, 4)
    for device in ("cpu", "meta"):
        with pytest.raises(RuntimeError, match=r"pass x\.swapaxes\(1, 2\)"):
            recurra.causal_conv1d(x.to(device), weight.to(device))


def test_running_out_of_memory_in_a_thread_is_an_exception():
    """An allocation that fails inside the parallel region reaches the caller."""
    program = """
        import resource, torch, recurra
        torch.set_num_threads(2)
        recurra.linear_scan(torch.ones(2, 4, 64), torch.ones(2, 4, 64))  # starts the threads
        # Two tasks; results of 128 MiB, but 330 MiB of scratch for each task.
        x, weight = torch.zeros(2, 3, 16), torch.zeros(16, 1).expand(16, 1 << 20)
        limit = (int(open("/proc/self/statm").read().split()[0]) << 12) + (300 << 20)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        try:
            recurra.causal_conv1d(x, weight)
        except (RuntimeError, MemoryError) as error:
            print(type(error).__name__)
        print(recurra.linear_scan(torch.ones(1, 4, 2), torch.ones(1, 4, 2))[1].sum().item())
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT / "tests",
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() in (["RuntimeError", "8.0"], ["MemoryError", "8.0"]), done.stdout


def needs(*modules: str):
    return pytest.mark.skipif(
        not all(map(importlib.util.find_spec, modules)),
        reason=f"{' or '.join(modules)} is not installed",
    )


@pytest.mark.parametrize(
    "page, least",
    [
        ("README.md", 2),
        ("docs/language_models.md", 1),
        ("docs/mamba_ssm.md", 2),
        ("docs/transformers.md", 2),
        ("docs/serving.md", 1),
        pytest.param("docs/numpy.md", 1, marks=needs("recurra._native")),
        pytest.param("docs/jax.md", 1, marks=needs("jax", "recurra._native")),
        pytest.param("docs/onnx.md", 2, marks=needs("onnxscript", "onnxruntime")),
        pytest.param(
            "docs/jit.md", 2, marks=pytest.mark.skipif(compiler() is None, reason="no C++ compiler")
        ),
    ],
)
def test_what_a_page_shows_runs_as_it_stands(page, least, tmp_path, monkeypatch):
    monkeypatch.setenv("RECURRA_JIT_CACHE", str(tmp_path / "cells"))
    text = (ROOT / page).read_text()
    blocks = [part.split("```")[0] for part in text.split("```python\n")[1:]]
    assert len(blocks) >= least
    names = {"__name__": "page"}
    for block in blocks:
        exec(compile(block, page, "exec"), names)
    recurra.uninstall()  # what some of them install
