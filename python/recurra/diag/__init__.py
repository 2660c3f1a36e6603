"""Diagnostics: small experiments that end in a table, a picture and an exit status.

Each is a module with ``HELP``, a line; ``EPILOG``, more of them; ``add_options(parser)`` and
``run(args) -> int``. ``recurra.cli.diag`` lists them.
"""

from __future__ import annotations


def cell_info(name: str):
    """What ``recurra.cells()`` says of the cell of --cell; ValueError where there is none."""
    import recurra

    known = recurra.cells()
    if name not in known:
        raise ValueError(f"--cell must be one of {', '.join(known)}, got {name}")
    return known[name]
