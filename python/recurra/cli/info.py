"""``recurra info``."""

from __future__ import annotations

import argparse


def add_to(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "info",
        help="version, instruction set, threads, CUDA, which library loaded or why not",
        description="Prints what is installed, loaded and in use, or why not.",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from recurra import info

    return info.main()
