"""``recurra diag``."""

from __future__ import annotations

import argparse
import textwrap

from recurra.cli import _common
from recurra.diag import adding, bias, copy, newton
from recurra.diag.sequence import Diagnostic
from recurra.diag.tasks import TASKS

_EPILOG = """\
    examples
      recurra diag newton --cell paragru      when Newton's method converges
      recurra diag copy --algo rtrl           memory learned online, and what truncation costs
      recurra diag adding --cell lem
      recurra diag parity --mixer hgrn        gates that may be negative, and the same that may not
      recurra diag s3 --min-acc 0.99          exit status 1 when that is missed
      recurra diag NAME --help
"""
_DIAGNOSTICS = {"newton": newton, "copy": copy, "adding": adding, "bias": bias}
_DIAGNOSTICS |= {name: Diagnostic(name, task) for name, task in TASKS.items()}


def add_to(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "diag",
        help="small experiments with a picture: convergence, memory tasks",
        description="Runs a small experiment and draws it.",
        epilog=textwrap.dedent(_EPILOG),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = parser.add_subparsers(dest="diagnostic", required=True, metavar="NAME")
    for name, module in _DIAGNOSTICS.items():
        each = _common.add_command(
            names, name, _run, module.EPILOG, help=module.HELP, description=module.HELP
        )
        each.set_defaults(experiment=module.run)
        module.add_options(each)
        _common.add_threads_option(each)


def _run(args: argparse.Namespace) -> int:
    _common.check_can_be_written(args.picture)
    return args.experiment(args)
