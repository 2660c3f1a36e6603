"""Compiled kernels for recurrent sequence models, as torch custom ops with autograd."""

from __future__ import annotations

__version__ = "0.1.0"

import importlib

from recurra import _library

_library.load()

from recurra import reference  # noqa: E402
from recurra._library import cmake_prefix_path, include_path, library_paths  # noqa: E402
from recurra._status import check_status  # noqa: E402
from recurra.ops import *  # noqa: E402, F403
from recurra.ops import __all__ as _ops  # noqa: E402
from recurra.ops import rtrl_gradient, rtrl_update  # noqa: E402

# After the ops, which they are made of.
from recurra.cell import Cell  # noqa: E402  isort: skip
from recurra import nn, rtrl  # noqa: E402  isort: skip
from recurra.lm import LM  # noqa: E402  isort: skip

from recurra.compat import install, report, uninstall  # noqa: E402  isort: skip


def __getattr__(name: str):
    if name in ("jit", "onnx"):  # with what they need of the system
        return importlib.import_module(f"recurra.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "LM",
    "Cell",
    "__version__",
    "check_status",
    "cmake_prefix_path",
    "include_path",
    "install",
    "library_paths",
    "nn",
    "reference",
    "report",
    "rtrl",
    "rtrl_gradient",
    "rtrl_update",
    "uninstall",
    *_ops,
]
