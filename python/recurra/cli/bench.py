"""``recurra bench``."""

from __future__ import annotations

import argparse

from recurra.cli import _common

_BENCH = """\
    Every shape is first verified against float64. Then the op, its transposed and bfloat16
    forms, the machine's own speed and, with --peers, other packages run in turn in this
    process, and the medians are printed with the floor: the least time that this machine needs,
    by its bandwidth and rates measured in the same rounds.

    A case is OP/SHAPE/KIND; any part of a name selects.

    examples
      recurra bench --list
      recurra bench selective_scan --peers
      recurra bench linear_scan/8x2048x1024/forward --repeat 21
      recurra bench --op linear_scan --shape 2x4096x512
      recurra bench --peers --json results.json
      recurra bench --rates
      recurra bench --device cuda --json gpu.json
"""


def _shape(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(size) for size in text.split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"a shape is sizes joined by x, such as 8x512x512x16, got {text}"
        ) from None


def _repeat(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"a positive number is required, got {text}")
    return int(text)


def add_to(commands: argparse._SubParsersAction) -> None:
    bench = _common.add_command(
        commands,
        "bench",
        run,
        _BENCH,
        help="verify, then time the ops beside this machine's floor and their peers",
        description="Times the ops beside the floor of this machine.",
    )
    bench.add_argument("cases", nargs="*", metavar="CASE", help="part of a name; default: all")
    bench.add_argument("--list", action="store_true", help="print the names of the cases")
    bench.add_argument(
        "--op",
        action="append",
        default=[],
        help="only the cases of this op; may be repeated",
    )
    bench.add_argument(
        "--shape",
        type=_shape,
        help="another shape for --op: BxDxLxN, BxTxD or BxDxL; it has no targets",
    )
    bench.add_argument("--peers", action="store_true", help="time numba, jax and torch as well")
    bench.add_argument("--repeat", type=_repeat, default=9, help="rounds, default %(default)s")
    bench.add_argument("--rates", action="store_true", help="first print what the machine can do")
    bench.add_argument(
        "--fresh-memory",
        action="store_true",
        help="let the C library return large blocks to the system, as it does by default",
    )
    bench.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        default="cpu",
        help="cuda: the table of a GPU beside its copy bandwidth; takes --json alone",
    )
    bench.add_argument("--json", metavar="FILE", help="also write the results there")
    bench.add_argument("--check", action="store_true", help="exit with 1 if a target is missed")


def _on_gpu(args: argparse.Namespace) -> int:
    from recurra.bench import cuda, report

    def save(about: dict, cases: list[dict]) -> None:
        if args.json:
            report.write_json(args.json, about, None, cases)

    results = cuda.run(save)
    failed = [c for c in results if "error" in c]
    missed = [c for c in results if c.get("limit") and c["ratio"] > c["limit"]]
    return 1 if failed or (args.check and missed) else 0


def run(args: argparse.Namespace) -> int:
    from recurra.bench import cases, report, timing

    if args.device == "cuda":
        return _on_gpu(args)
    if args.shape:
        if len(args.op) != 1:
            raise ValueError("--shape needs exactly one --op")
        if args.cases:
            raise ValueError("--shape makes its own cases; leave the names out")
        kinds = (cases.FORWARD, cases.BACKWARD)
        chosen = [cases.case(args.op[0], args.shape, kind) for kind in kinds]
    else:
        chosen = cases.select(args.cases, args.op)
    if args.list:
        for case in chosen:
            print(case.name + ("  (not available in this build)" if case.missing else ""))
        return 0

    if args.own_process and not args.fresh_memory:
        timing.restart_for_warm_memory()
    about = report.header(warm=not args.fresh_memory)
    rates = report.print_rates() if args.rates else None
    # The rates alone are a question of their own.
    alone = args.rates and not (args.cases or args.op)
    results = [] if alone else [report.run(case, args.peers, args.repeat) for case in chosen]
    missed = [] if alone else report.summary(results)
    if args.json:
        report.write_json(args.json, about, rates, results)
    return 1 if args.check and missed else 0
