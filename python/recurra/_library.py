"""Loads the op libraries and remembers how that went, for `recurra info`."""

from __future__ import annotations

from pathlib import Path

import torch

import recurra

_loaded: dict[str, str] = {}
_problems: dict[str, str] = {}


def _find(name: str) -> Path | None:
    # An editable install has two folders on the package path: the sources and the build.
    for folder in recurra.__path__:
        path = Path(folder) / name
        if path.exists():
            return path
    return None


def load() -> None:
    """Registers every op of the library with torch."""
    cpu = _find("_ops_cpu.so")
    if cpu is None:
        raise ImportError(
            "recurra: the compiled library _ops_cpu.so is missing; install the package with "
            "`pip install .` instead of importing it from the sources"
        )
    torch.ops.load_library(str(cpu))
    _loaded["cpu"] = str(cpu)

    # The CUDA library only adds implementations, so a failure leaves the CPU ops whole. It loads
    # on a torch without CUDA too, but has nothing to serve there.
    cuda = _find("_ops_cuda.so")
    if cuda is None:
        _problems["cuda"] = "not built: no nvcc was found when recurra was built"
    elif torch.version.cuda is None:
        _problems["cuda"] = "not loaded: this torch has no CUDA"
    else:
        try:
            torch.ops.load_library(str(cuda))
            _loaded["cuda"] = str(cuda)
        except OSError as error:
            _problems["cuda"] = f"not loaded: {error}"


def library_paths() -> list[str]:
    """Paths of the op libraries that are loaded.

    A C++ program opens them with ``dlopen`` after libtorch and then finds ``recurra::linear_scan``
    and the others in torch's dispatcher. The first one holds all schemas and the CPU kernels; a
    second one, where there is one, the CUDA kernels.
    """
    return list(_loaded.values())


def include_path() -> str:
    """The folder to name to a C++20 compiler with ``-I``, for ``recurra/cells/all.h`` and others.

    Cells, the functions and dual numbers that they are made of, and the arguments of the kernels.
    """
    path = _find("include")
    if path is None:
        raise FileNotFoundError("recurra: the C++ headers are missing, install the package again")
    return str(path)


def status() -> dict[str, str]:
    """For each of ``cpu`` and ``cuda``: the path of the loaded library, or why there is none."""
    return {device: _loaded.get(device) or _problems[device] for device in ("cpu", "cuda")}
