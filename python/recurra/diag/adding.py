"""``recurra diag adding``: the adding problem, a test of memory for real numbers."""

from __future__ import annotations

import argparse
import time

from recurra.diag import _picture, _schedule, cell_info, check_ranges

HELP = "the adding problem: the sum of the two numbers that a marker points at"
EPILOG = """\
    A sequence of numbers, uniform from 0 to 1, beside one of markers, two of which are 1: one in
    the first half, one in the second. The last output must be the sum of the two numbers. Always
    saying 1 has a mean squared error of 1/6. Hochreiter and Schmidhuber 1997, section 5.4.

    examples
      recurra diag adding --cell lem
      recurra diag adding --cell paragru --length 500 --max-mse 0.01
"""

TRIVIAL = 1 / 6


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--cell", default="lem", help="default: %(default)s")
    add("--length", type=int, default=200, metavar="T", help="default: %(default)s")
    add("--channels", type=int, default=64, metavar="N", help="default: %(default)s")
    add("--batch", type=int, default=32, metavar="B", help="default: %(default)s")
    add("--steps", type=int, default=2500, help="of training, at most; default: %(default)s")
    add("--minutes", type=float, default=2.5, help="of training, at most; default: %(default)s")
    add("--lr", type=float, default=5e-3, help="default: %(default)s")
    add("--max-mse", type=float, metavar="X", help="exit with 1 where the error is larger")
    add("--seed", type=int, default=0)
    _picture.add_option(parser, "adding.png")


def samples(batch: int, length: int, generator):
    """Inputs (B, T, 2), numbers and markers, and their sums (B,)."""
    import torch

    numbers = torch.rand(batch, length, generator=generator)
    half = length // 2
    first = torch.randint(0, half, (batch, 1), generator=generator)
    second = torch.randint(half, length, (batch, 1), generator=generator)
    markers = torch.zeros(batch, length).scatter(1, torch.cat([first, second], 1), 1.0)
    return torch.stack([numbers, markers], 2), (numbers * markers).sum(1)


def _model(cell: str, channels: int):
    import torch
    from torch import nn

    import recurra
    from recurra.nn.rnn import init_cell_

    info = cell_info(cell)

    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.inputs = nn.Linear(2, len(info.inputs) * channels)
            self.recurrent = nn.Parameter(torch.empty(len(info.params), channels))
            self.readout = nn.Linear(channels, 1)
            init_cell_(cell, self.recurrent, self.inputs.bias)

        def forward(self, x):
            rows = self.inputs(x).unflatten(-1, (-1, channels))
            y = recurra.rnn(rows, self.recurrent, cell=cell)[0]
            return self.readout(y[:, -1])[:, 0]

    return Reader()


def run(args: argparse.Namespace) -> int:
    import torch
    import torch.nn.functional as F

    from recurra.cli import _common

    _common.check_at_least_one(args, "channels", "batch", "steps")
    check_ranges(args)
    if args.length < 2:
        raise ValueError(f"--length must be at least 2, got {args.length}")
    _common.set_threads(args)
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed + 1)
    model = _model(args.cell, args.channels)
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr)
    held_out = samples(512, args.length, torch.Generator().manual_seed(args.seed + 2))

    def error() -> float:
        with torch.no_grad():
            return F.mse_loss(model(held_out[0]), held_out[1]).item()

    print(f"{args.cell}, T = {args.length}, N = {args.channels}; always saying 1: {TRIVIAL:.4f}")
    start, points = time.monotonic(), [(0, error())]
    seconds, limit = 0.0, 60 * args.minutes
    for step in range(1, args.steps + 1):
        done = _schedule.progress(step - 1, args.steps, seconds, limit)
        optimizer.param_groups[0]["lr"] = args.lr * _schedule.rate(done, warmup=0.0)
        x, want = samples(args.batch, args.length, generator)
        loss = F.mse_loss(model(x), want)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()
        _schedule.check_finite(step, loss.item(), norm)
        optimizer.step()
        optimizer.zero_grad()
        seconds = time.monotonic() - start
        late = seconds > limit and step < args.steps
        if step % 100 == 0 or step == args.steps or late:
            points.append((step, error()))
            print(f"step {step:5}  MSE {points[-1][1]:.5f}  {seconds:6.1f} s", flush=True)
        if late:
            print(f"stopped by --minutes after step {step} of {args.steps}")
            break
    last = points[-1][1]

    def fill(axes: list) -> None:
        axes[0].plot(*zip(*points, strict=True), "o-", markersize=3, label=args.cell)
        axes[0].axhline(TRIVIAL, color="gray", linestyle="--", label="always saying 1")
        axes[0].set_yscale("log")
        axes[0].set_xlabel("step")
        axes[0].set_ylabel(f"mean squared error, T = {args.length}")
        axes[0].legend()

    print(f"MSE {last:.5f}, {last / TRIVIAL:.3f} of the trivial one")
    print(_picture.draw(args.picture, 1, fill))
    if args.max_mse is not None and not last <= args.max_mse:
        raise ValueError(f"the mean squared error must be at most {args.max_mse}, got {last:.5f}")
    return 0
