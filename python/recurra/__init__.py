"""Compiled kernels for recurrent sequence models, as torch custom ops with autograd."""

from __future__ import annotations

__version__ = "0.1.0"

from recurra import _library

_library.load()

from recurra import reference  # noqa: E402
from recurra._library import library_paths  # noqa: E402
from recurra.ops import *  # noqa: E402, F403
from recurra.ops import __all__ as _ops  # noqa: E402

__all__ = ["__version__", "library_paths", "reference", *_ops]
