"""``recurra info``: what is installed, loaded and in use, or why not."""

from __future__ import annotations

import importlib.util
import os
import platform

import torch

import recurra
from recurra import _library


def _cuda() -> str:
    # Neither line starts the driver: torch without CUDA never asks, and is_available only counts.
    if torch.version.cuda is None:
        return "this torch has no CUDA"
    if not torch.cuda.is_available():
        return f"{torch.version.cuda} in torch, no device"
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return f"{torch.version.cuda} in torch, {', '.join(names)}"


def _native() -> tuple[str, object | None]:
    if importlib.util.find_spec("recurra._native") is None:
        return "not built: pybind11 was missing when recurra was built", None
    try:
        from recurra import _native
    except ImportError as error:
        return f"not loaded: {error}", None
    return _native.__file__, _native


def _isa(native) -> str:
    text = torch.ops.recurra._isa()
    cap = os.environ.get("RECURRA_ISA")
    if native is not None:
        features = native.cpu_features()
        text += f", best of this machine {features['best']}"
    return text + (f", RECURRA_ISA={cap}" if cap else ", RECURRA_ISA not set")


def _headers() -> str:
    try:
        return recurra.include_path()
    except FileNotFoundError as error:
        return str(error)


def lines() -> list[tuple[str, str]]:
    """The table of ``recurra info`` as (name, value) pairs."""
    where, native = _native()
    status = _library.status()
    table = [
        ("recurra", f"{recurra.__version__} in {os.path.dirname(recurra.__file__)}"),
        ("torch", torch.__version__),
        ("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        ("instruction set", _isa(native)),
        ("threads", str(torch.ops.recurra._threads())),
        ("cuda", _cuda()),
        ("cpu library", status["cpu"]),
        ("cuda library", status["cuda"]),
        ("numpy module", where),
        ("c++ headers", _headers()),
    ]
    if native is not None:
        flags = native.cpu_features()["flags"]
        found = ", ".join(name for name, there in flags.items() if there) or "none"
        table.insert(4, ("cpu flags", found))
    return table


def main() -> int:
    """Prints the table."""
    for name, value in lines():
        print(f"{name:16}  {value}")
    return 0
