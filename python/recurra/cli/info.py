"""``recurra info``."""

from __future__ import annotations

import argparse

from recurra.cli import _common


def add_to(commands: argparse._SubParsersAction) -> None:
    _common.add_command(
        commands,
        "info",
        run,
        help="version, instruction set, threads, CUDA, which library loaded or why not",
        description="Prints what is installed, loaded and in use, or why not.",
    )


def run(args: argparse.Namespace) -> int:
    from recurra import info

    return info.main()
