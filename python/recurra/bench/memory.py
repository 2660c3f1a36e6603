"""The memory of a training step of an op, or of a model, measured by the system."""

from __future__ import annotations

import functools
import re
import subprocess
import sys
from pathlib import Path

from recurra.bench.problems import Measured


def case(
    op: str, beside: str, limit: float, shape: tuple[int, ...], with_peers: bool
) -> list[Measured]:
    """Peak memory of forward and backward, results included, over what is there anyway."""
    size, extra = peak_memory(op, shape)
    mebi = 1 / 2**20
    text = (
        f"{extra * mebi:.0f} MiB at the peak, results and gradients included, beside "
        f"{size * mebi:.0f} MiB of {beside}"
    )
    return [Measured(extra / size, f"x the {beside}", limit, text)]


def peak_memory(op: str, shape: tuple[int, ...]) -> tuple[int, int]:
    """Bytes of the inputs, and of the peak beyond them, in a process of its own.

    The peak is that of the resident memory while the forward and backward run: outputs, what
    autograd saves, workspaces, and all gradients, which are held at the end.
    """
    command = [sys.executable, "-m", "recurra.bench.memory", op, *map(str, shape)]
    out = subprocess.run(command, capture_output=True, text=True)
    if out.returncode:
        raise RuntimeError(f"the memory measurement failed: {out.stderr.strip()[-500:]}")
    inputs, extra = map(int, out.stdout.split())
    return inputs, extra


def _status(field: str) -> int:
    text = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(rf"{field}:\s+(\d+) kB", text).group(1))


def _problem(op: str, shape: list[int]):
    """The inputs of an op and its call; a small shape of the same kind."""
    import recurra
    from recurra.bench import cases, rnn

    if op == "rnn":
        call = functools.partial(recurra.rnn, cell="paragru", algorithm="sequential")
        return functools.partial(rnn.inputs, "paragru"), call, [1, 64, 32]
    call = functools.partial(recurra.selective_scan, delta_softplus=True)
    return cases.selective_inputs, call, [1, 32, 64, shape[-1]]


def _measure(op: str, shape: list[int]) -> tuple[int, int]:
    import torch

    make, call, small = _problem(op, shape)

    def step(leaves):
        y = call(**leaves)[0]
        return y, torch.autograd.grad(y, list(leaves.values()), torch.ones_like(y))

    def leaves(shape):
        return {k: v.requires_grad_() for k, v in make(*shape).items()}

    # Threads, libraries and autograd's own memory are there before the clock of memory starts.
    step(leaves(small))
    inputs = leaves(shape)
    size = sum(v.numel() * v.element_size() for v in inputs.values())
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = _status("VmRSS")
    results = step(inputs)
    extra = _status("VmHWM") - before
    if op == "rnn":  # whose output is the state of every step
        size += results[0].numel() * results[0].element_size()
    del results
    return size, extra


def _measure_model(batch: int, length: int) -> int:
    """Bytes at the peak of a step of the tiny model, its parameters and all else included."""
    import torch

    import recurra
    from recurra.bench.models import training_step

    def step(batch, length):
        model = recurra.LM("tiny")
        tokens = torch.randint(0, 256, (batch, length + 1))
        return training_step(model, lambda x: model(x)[0], tokens)

    step(1, 16)()
    before = _status("VmRSS")
    run = step(batch, length)
    Path("/proc/self/clear_refs").write_text("5")
    for _ in range(3):
        run()
    return _status("VmHWM") - before


if __name__ == "__main__":
    name, sizes = sys.argv[1], [int(size) for size in sys.argv[2:]]
    if name == "lm":
        print(_measure_model(*sizes))
    else:
        print(*_measure(name, sizes))
