"""Diagnostics: small experiments that end in a table, a picture and an exit status.

Each is a module with ``HELP``, a line; ``EPILOG``, more of them; ``add_options(parser)`` and
``run(args) -> int``. ``recurra.cli.diag`` lists them.
"""
