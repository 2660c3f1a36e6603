"""The command line."""

from __future__ import annotations

import argparse
import sys

from recurra.cli import bench, compare, diag, evaluate, generate, info, train

_COMMANDS = (info, bench, train, compare, generate, evaluate, diag)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="recurra", description="Compiled kernels for recurrent sequence models."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in _COMMANDS:
        command.add_to(commands)
    return parser


def _sentence(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror}"
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns its exit status.

    Args:
        argv: the arguments; None for those of this process, which `bench` may then start anew.
    """
    args = _parser().parse_args(argv)
    args.own_process = argv is None
    try:
        return args.run(args)
    except BrokenPipeError:
        return 0
    except KeyboardInterrupt:
        print(f"recurra {args.command}: interrupted", file=sys.stderr)
        return 130
    except AssertionError as error:
        print(f"recurra {args.command}: wrong result: {error}", file=sys.stderr)
    except MemoryError:
        print(f"recurra {args.command}: not enough memory", file=sys.stderr)
    except (OSError, RuntimeError, ValueError, IndexError, ImportError) as error:
        print(f"recurra {args.command}: {_sentence(error)}", file=sys.stderr)
    return 1
