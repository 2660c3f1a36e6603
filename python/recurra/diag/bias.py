"""``recurra diag bias``: what the gradients of a stack that learns online lack."""

from __future__ import annotations

import argparse

from recurra.diag import _picture, check_ranges

HELP = "bias of the gradients of RTRL in a stack, by depth and chunk"
EPILOG = """\
    The gradient that is accumulated over a stream with weights that rest, against backpropagation
    through all of it, in float64: the relative error |g - g*| / |g*| and the cosine, over all
    parameters of a layer. Layer 0 reads the input. The top layer is exact; one below lacks what
    its past does through the states of the layers above at the start of a chunk, and with a chunk
    as long as the stream it lacks nothing. Under `bptt` stands truncated backpropagation.

    examples
      recurra diag bias
      recurra diag bias --cell paragru --depths 2 --chunks 1 8 64
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--cell", default="elstm", help="default: %(default)s")
    add("--channels", type=int, default=24, metavar="N", help="default: %(default)s")
    add("--length", type=int, default=256, metavar="T", help="default: %(default)s")
    add("--batch", type=int, default=4, metavar="B", help="default: %(default)s")
    add("--depths", type=int, nargs="+", default=[1, 2, 3], metavar="N", help="default: 1 2 3")
    add(
        "--chunks",
        type=int,
        nargs="+",
        default=[1, 4, 16, 64, 256],
        metavar="L",
        help="default: 1 4 16 64 256",
    )
    add("--seed", type=int, default=0)
    _picture.add_option(parser, "bias.png")


def gradients(learner, u, target, chunk: int) -> list:
    """Of every layer, all of its parameters in one row; accumulated over the stream."""
    import torch

    learner.begin(u.shape[0])
    learner.optimizer.zero_grad()
    for t in range(0, u.shape[1], chunk):
        learner.accumulate(u[:, t : t + chunk], target[:, t : t + chunk])
    return [torch.cat([p.grad.flatten() for p in layer.parameters()]) for layer in learner.layers]


def compare(got, want) -> tuple[float, float]:
    """Relative error and cosine."""
    import torch

    error = float((got - want).norm() / want.norm())
    return error, float(torch.nn.functional.cosine_similarity(got, want, dim=0))


def run(args: argparse.Namespace) -> int:
    import torch

    from recurra.cli import _common
    from recurra.rtrl import Layer, OnlineLearner

    _common.check_at_least_one(args, "channels", "length", "batch")
    check_ranges(args)
    for name in ("depths", "chunks"):
        if min(getattr(args, name)) < 1:
            raise ValueError(f"--{name} must be at least 1, got {min(getattr(args, name))}")
    _common.set_threads(args)
    generator = torch.Generator().manual_seed(args.seed)
    inputs = 8
    u = torch.randn(args.batch, args.length, inputs, dtype=torch.float64, generator=generator)
    # What came long ago, so that the past has a say.
    target = (u.cumsum(1) / 4).tanh()

    def loss(output, wanted):
        return (output - wanted).square().sum()

    chunks = sorted({min(chunk, args.length) for chunk in args.chunks})
    print(f"{args.cell}, {args.channels} channels, T = {args.length}: error (cosine) by chunk")
    curves = {}
    for depth in sorted(set(args.depths)):
        torch.manual_seed(args.seed)
        layers, width = [], inputs
        for _ in range(depth):
            layers.append(Layer(width, args.channels, args.cell, dtype=torch.float64))
            width = layers[-1].out_features
        readout = torch.nn.Linear(width, inputs, dtype=torch.float64)
        learners = {
            algo: OnlineLearner(layers, readout, loss, algorithm=algo) for algo in ("rtrl", "bptt")
        }
        want = gradients(learners["bptt"], u, target, args.length)
        found = {
            (algo, chunk): [
                compare(g, w)
                for g, w in zip(gradients(learner, u, target, chunk), want, strict=True)
            ]
            for algo, learner in learners.items()
            for chunk in chunks
        }
        print(f"\n{depth} layer{'s' if depth > 1 else ''}")
        print(f"{'':>14}" + "".join(f"{chunk:>20}" for chunk in chunks))
        for layer in reversed(range(depth)):
            for algo in learners:
                row = [found[algo, chunk][layer] for chunk in chunks]
                name = f"layer {layer}" if algo == "rtrl" else "bptt"
                print(f"{name:>14}" + "".join(f"{_shown(*pair):>20}" for pair in row), flush=True)
                if depth == max(args.depths):
                    curves[f"layer {layer}, {algo}"] = [max(error, 1e-16) for error, _ in row]

    def fill(axes: list) -> None:
        for name, values in curves.items():
            axes[0].plot(chunks, values, "o-" if "rtrl" in name else "x--", label=name)
        axes[0].set_xscale("log", base=2)
        axes[0].set_yscale("log")
        axes[0].set_xlabel("steps of a chunk")
        axes[0].set_ylabel(f"relative error of the gradient, {max(args.depths)} layers")
        axes[0].legend()

    print("\n" + _picture.draw(args.picture, 1, fill))
    return 0


def _shown(error: float, cosine: float) -> str:
    # Rounding is not bias.
    return f"{0 if error < 1e-10 else error:.3g} ({cosine:.4f})"
