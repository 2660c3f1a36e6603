"""``recurra diag newton``: how many passes Newton's method takes, and whether it converges."""

from __future__ import annotations

import argparse
import math

from recurra.diag import _picture, cell_info, check_ranges

HELP = "passes of Newton's method against recurrent scale, length and chunk"
EPILOG = """\
    passes of `newton`, multiple shooting, and of `newton-global`, the form of the papers, where
    - says that it did not converge and the sequential result was returned. The exponent is the
    mean logarithm of what a step does to a small difference of states, in nats: below 0 the cell
    forgets, and Newton's method converges in few passes; above, differences grow.

    examples
      recurra diag newton --cell paragru
      recurra diag newton --cell slstm --length 16384 --picture slstm.png
"""

_SCALES = (0.1, 0.5, 0.9, 1.0, 2.0, 4.0, 8.0)


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--cell", default="paragru", help="default: %(default)s")
    add("--channels", type=int, default=16, metavar="N", help="default: %(default)s")
    add("--length", type=int, default=4096, metavar="T", help="default: %(default)s")
    add(
        "--chunk",
        type=int,
        metavar="L",
        help="steps of a stretch of `newton` in the table of scales; default: the op's own choice",
    )
    add("--gate-bias", type=float, default=0.0, help="added to the first input")
    add("--seed", type=int, default=0)
    _picture.add_option(parser, "newton.png")


def exponent(x, params, cell: str, seed: int) -> float:
    """Lyapunov exponent: the mean growth, in nats a step, of a small difference of states."""
    import torch

    import recurra
    from recurra.reference import cells

    info = recurra.cells()[cell]
    step = getattr(cells, cell)
    rows = x.double()[0].unbind(0)
    p = params.double()
    h = torch.zeros(len(info.states), x.shape[3], dtype=torch.float64)
    v = torch.randn(h.shape, dtype=h.dtype, generator=torch.Generator().manual_seed(seed))
    v /= v.norm(dim=0)
    growth, counted = torch.zeros(x.shape[3], dtype=h.dtype), 0
    for row in rows:
        h, v = torch.func.jvp(lambda state, row=row: step(row, state, p), (h,), (v,))
        size = v.norm(dim=0).clamp_min(1e-300)
        growth += size.log().clamp_min(-50)
        counted += 1
        v = v / size
    return float((growth / max(counted, 1)).max())


def _inputs(args: argparse.Namespace, scale: float, length: int):
    import torch

    info = cell_info(args.cell)
    torch.manual_seed(args.seed)
    x = torch.randn(1, length, len(info.inputs), args.channels)
    x[:, :, 0] += args.gate_bias
    params = scale * (2 * torch.rand(len(info.params), args.channels) - 1)
    if "dt" in info.params:  # a step of time, not a weight
        params[info.params.index("dt")] = 0.5
    return x, params


def _passes(x, params, cell: str, algorithm: str, chunk: int | None = None) -> int | None:
    """None where it did not converge."""
    import recurra

    options = {"chunk": chunk} if algorithm == "newton" and chunk else {}
    try:
        out = recurra.rnn(x, params, cell=cell, algorithm=algorithm, on_fail="raise", **options)
    except (RuntimeError, ValueError) as error:
        if "did not converge" not in str(error):
            raise
        return None
    return int(out[2])


def _shown(passes: int | None) -> str:
    return "-" if passes is None else str(passes)


def run(args: argparse.Namespace) -> int:
    from recurra.cli import _common

    _common.check_at_least_one(args, "channels", "length", "chunk")
    check_ranges(args)
    _common.set_threads(args)
    print(f"{args.cell}, {args.channels} channels, T = {args.length}, gate bias {args.gate_bias:g}")
    print(f"{'|a| <=':>8} {'newton':>8} {'newton-global':>14} {'exponent':>10}")
    by_scale = []
    for scale in _SCALES:
        x, params = _inputs(args, scale, args.length)
        shooting = _passes(x, params, args.cell, "newton", args.chunk)
        whole = _passes(x, params, args.cell, "newton-global")
        growth = exponent(x[:, :1024], params, args.cell, args.seed)
        by_scale.append((scale, shooting, whole, growth))
        print(f"{scale:8g} {_shown(shooting):>8} {_shown(whole):>14} {growth:10.3f}", flush=True)

    chunks = [64 * 4**k for k in range(12) if 64 * 4**k < args.length]
    print("\npasses of newton by chunk")
    print(f"{'|a| <=':>8}" + "".join(f"{chunk:>8}" for chunk in chunks))
    by_chunk = {}
    for scale in _SCALES:
        x, params = _inputs(args, scale, args.length)
        row = [_passes(x, params, args.cell, "newton", chunk) for chunk in chunks]
        by_chunk[scale] = row
        print(f"{scale:8g}" + "".join(f"{_shown(n):>8}" for n in row), flush=True)

    lengths = [n for n in (256, 1024, 4096, 16384, 65536) if n <= args.length]
    print("\npasses of newton by T")
    print(f"{'|a| <=':>8}" + "".join(f"{length:>8}" for length in lengths))
    for scale in _SCALES:
        row = [_passes(*_inputs(args, scale, n), args.cell, "newton", args.chunk) for n in lengths]
        print(f"{scale:8g}" + "".join(f"{_shown(n):>8}" for n in row), flush=True)

    def fill(axes: list) -> None:
        left, right = axes
        for place, name in ((1, "newton"), (2, "newton-global")):
            points = [(row[0], row[place] or math.nan) for row in by_scale]
            left.plot(*zip(*points, strict=True), "o-", label=name)
        left.set_xscale("log")
        left.set_xlabel("recurrent weights, largest size")
        left.set_ylabel("passes (missing: did not converge)")
        left.legend(loc="upper left")
        other = left.twinx()
        points = [(row[0], row[3]) for row in by_scale]
        other.plot(*zip(*points, strict=True), "--", color="gray")
        other.axhline(0, color="gray", linewidth=0.5)
        other.set_ylabel("exponent, nats a step (dashed)")
        for scale, row in by_chunk.items():
            values = [math.nan if n is None else n for n in row]
            right.plot(chunks, values, "o-", label=f"|a| <= {scale:g}")
        right.set_xscale("log", base=2)
        right.set_xlabel("steps of a stretch")
        right.set_ylabel("passes of newton")
        right.legend()

    print("\n" + _picture.draw(args.picture, 2, fill))
    return 0
