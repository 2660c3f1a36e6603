"""``recurra diag copy``: symbols to be remembered for longer than a chunk, learned online."""

from __future__ import annotations

import argparse
import time

from recurra.diag import _picture, check_ranges

HELP = "a memory task learned online: exact RTRL, or backpropagation truncated at the chunk"
EPILOG = """\
    Symbols, then silence, then a cue for each of them in their order. The sequence is fed in
    chunks with an update after each; the silence is several chunks long. RTRL knows what the
    states at the start of a chunk owe to the weights, truncated backpropagation does not. The
    accuracy is that of a thousand fresh sequences, of which nothing is learned.

    examples
      recurra diag copy                       RTRL, stops at 0.995 on what it is fed
      recurra diag copy --algo bptt           the same updates without the sensitivities
      recurra diag copy --min-acc 0.99        exit status 1 when that is missed
"""

_GOAL = 0.995  # a mean over what was fed at which training ends


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--algo", choices=("rtrl", "bptt"), default="rtrl", help="default: %(default)s")
    add("--cell", default="elstm", help="default: %(default)s")
    add("--symbols", type=int, default=3, metavar="N", help="to remember; default: %(default)s")
    add("--delay", type=int, default=30, metavar="T", help="steps; default: %(default)s")
    add("--chunk", type=int, default=5, metavar="L", help="steps; default: %(default)s")
    add("--channels", type=int, default=128, metavar="N", help="default: %(default)s")
    add("--batch", type=int, default=32, metavar="B", help="default: %(default)s")
    add("--lr", type=float, default=3e-3, help="default: %(default)s")
    add("--seconds", type=float, default=160, help="at most; default: %(default)s")
    add("--min-acc", type=float, metavar="A", help="exit with 1 below this accuracy")
    add("--seed", type=int, default=0)
    _picture.add_option(parser, "copy.png")


def sequences(batch: int, symbols: int, delay: int, generator):
    """One-hot inputs (B, T, 4), targets (B, T) that are -1 where nothing is asked, and resets."""
    import torch

    bits = torch.randint(0, 2, (batch, symbols), generator=generator)
    time_ = 2 * symbols + delay
    tokens = torch.full((batch, time_), 2)
    tokens[:, :symbols] = bits
    tokens[:, symbols + delay :] = 3
    target = torch.full((batch, time_), -1)
    target[:, symbols + delay :] = bits
    reset = torch.zeros(batch, time_, dtype=torch.bool)
    reset[:, 0] = True
    return torch.nn.functional.one_hot(tokens, 4).float(), target, reset


def _loss(output, target):
    import torch

    asked = target >= 0
    if not asked.any():
        return output.sum() * 0
    return torch.nn.functional.cross_entropy(output[asked], target[asked])


def _right(output, target) -> tuple[int, int]:
    asked = target >= 0
    return int((output.argmax(-1) == target)[asked].sum()), int(asked.sum())


def run(args: argparse.Namespace) -> int:
    import torch

    from recurra.cli import _common
    from recurra.rtrl import Layer, OnlineLearner

    _common.check_at_least_one(args, "symbols", "delay", "chunk", "channels", "batch")
    check_ranges(args)
    # For arrays this small others only disturb.
    args.threads = 1 if args.threads is None else args.threads
    _common.set_threads(args)
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    layer = Layer(4, args.channels, args.cell, forget_bias=4.0)
    learner = OnlineLearner(
        layer,
        torch.nn.Linear(layer.out_features, 2),
        _loss,
        lambda parameters: torch.optim.Adam(parameters, lr=args.lr),
        clip=1.0,
        algorithm=args.algo,
    )
    print(
        f"{learner!r}\n{args.symbols} symbols of two, {args.delay} steps of silence, chunks of "
        f"{args.chunk}, {args.batch} sequences at a time"
    )
    start = told = time.perf_counter()
    curve, mean = [], 0.5
    while True:
        u, target, reset = sequences(args.batch, args.symbols, args.delay, generator)
        right = asked = 0
        for t in range(0, u.shape[1], args.chunk):
            part = slice(t, t + args.chunk)
            fed = learner.feed(u[:, part], target[:, part], reset[:, part])
            one, all_ = _right(fed.output, target[:, part])
            right, asked = right + one, asked + all_
        mean = 0.98 * mean + 0.02 * right / asked
        now = time.perf_counter()
        curve.append((now - start, mean))
        done = mean >= _GOAL or now - start >= args.seconds
        if done or now - told >= 5:
            told = now
            print(f"{now - start:6.1f} s  {len(curve):>6} batches  accuracy {mean:.3f}", flush=True)
        if done:
            break

    u, target, reset = sequences(1000, args.symbols, args.delay, generator)
    learner.begin(1000)
    right, asked = _right(learner.predict(u, reset), target)
    accuracy = right / asked

    def fill(axes: list) -> None:
        axes[0].plot(*zip(*curve, strict=True), label=args.algo)
        axes[0].axhline(accuracy, linestyle="--", color="gray", label="fresh sequences")
        axes[0].set_xlabel("seconds")
        axes[0].set_ylabel("accuracy")
        axes[0].set_ylim(0.4, 1.02)
        axes[0].legend(loc="lower right")

    print(f"\naccuracy on 1000 fresh sequences: {accuracy:.4f}, {args.algo}")
    print(_picture.draw(args.picture, 1, fill))
    if args.min_acc is not None and not accuracy >= args.min_acc:
        raise ValueError(f"the accuracy is {accuracy:.4f}, --min-acc asks for {args.min_acc:g}")
    return 0
