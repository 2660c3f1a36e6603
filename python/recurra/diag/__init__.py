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


def check_ranges(args) -> None:
    """Checks what options of diagnostics have in common: --lr, --minutes, --seconds, --min-acc,
    --max-mse and --seed, where they are there.

    Raises:
        ValueError: one that is not a number, or out of range.
    """
    for name in ("minutes", "seconds", "lr"):
        value, most = getattr(args, name, 1.0), 1000.0 if name == "lr" else 1e7
        if not 0 < value <= most:
            raise ValueError(f"--{name} must be positive and at most {most:g}, got {value}")
    accuracy, error = getattr(args, "min_acc", None), getattr(args, "max_mse", None)
    if accuracy is not None and not 0 <= accuracy <= 1:
        raise ValueError(f"--min-acc must be from 0 to 1, got {accuracy}")
    if error is not None and not error >= 0:
        raise ValueError(f"--max-mse must be at least 0, got {error}")
    # Others are made of it by adding to it.
    if not 0 <= args.seed < 1 << 63:
        raise ValueError(f"--seed must be from 0 to 2^63 - 1, got {args.seed}")
