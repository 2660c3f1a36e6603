"""Loads the op libraries and remembers how that went, for `recurra info`."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import torch
from torch import Tensor

import recurra

_loaded: dict[str, str] = {}
_problems: dict[str, str] = {}
_refusals: list[torch.library.Library] = []
_codes: dict[int, bool] = {}  # by the number of a CUDA device
_CUDA_SWITCH = "RECURRA_CUDA"
_switched_off = os.environ.get(_CUDA_SWITCH) == "0"


def find(name: str) -> Path | None:
    """The path of a file of the package, or None where it was built without it."""
    # An editable install has two folders on the package path: the sources and the build.
    for folder in recurra.__path__:
        path = Path(folder) / name
        if path.exists():
            return path
    return None


def load() -> None:
    """Registers every op of the library with torch."""
    cpu = find("_ops_cpu.so")
    if cpu is None:
        raise ImportError(
            "recurra: the compiled library _ops_cpu.so is missing; install the package with "
            "`pip install .` instead of importing it from the sources"
        )
    torch.ops.load_library(str(cpu))
    _loaded["cpu"] = str(cpu)

    # The CUDA library only adds implementations, so a failure leaves the CPU ops whole. It loads
    # on a torch without CUDA too, but has nothing to serve there.
    cuda = find("_ops_cuda.so")
    if _switched_off:
        _problems["cuda"] = f"not loaded: {_CUDA_SWITCH} is 0"
    elif cuda is None:
        _problems["cuda"] = "not built: no nvcc was found when recurra was built"
    elif torch.version.cuda is None:
        _problems["cuda"] = "not loaded: this torch has no CUDA"
    else:
        try:
            torch.ops.load_library(str(cuda))
            _loaded["cuda"] = str(cuda)
        except OSError as error:
            _problems["cuda"] = f"not loaded: {error}"
    if torch.version.cuda is not None:
        _refusals.append(refuse_on_cuda())


def refuse_on_cuda() -> torch.library.Library:
    """Gives a sentence to CUDA tensors in ops that have no CUDA kernel, instead of torch's page.

    Returns:
        What must be kept as long as the sentences are to be given.
    """
    library = torch.library.Library("recurra", "IMPL", "CUDA")
    on = torch._C._dispatch_get_registrations_for_dispatch_key
    for name in {op for op in on("CPU") if op.startswith("recurra::")} - set(on("CUDA")):
        short = name.removeprefix("recurra::")

        def refuse(*args, short=short, **kwargs):
            if "cuda" in _loaded:
                raise RuntimeError(f"{short}: this op has no CUDA kernel; move the tensors to cpu")
            problem = _problems["cuda"]
            advice = "unset it"
            if _CUDA_SWITCH not in problem:
                advice = (
                    "install a wheel of recurra, or build it where nvcc is on the PATH, with a "
                    "torch that has CUDA"
                )
            raise RuntimeError(
                f"{short}: the tensors are on a CUDA device, but the CUDA library is {problem}; "
                f"{advice}"
            )

        library.impl(short, refuse)
    return library


def served(x: Tensor) -> bool:
    """Whether the compiled ops compute with a tensor where it is; if not, plain torch has to."""
    return x.is_cpu or serves(x.device)


def serves(device: torch.device) -> bool:
    """:func:`served`, of the tensors of a device. Those of "meta" are traced by the same ops."""
    if device.type == "cuda":
        return "cuda" in _loaded and _has_code(device.index)
    return device.type in ("cpu", "meta")


def _has_code(index: int) -> bool:
    """Whether the CUDA library was built for a device. Where none has that number there are only
    fake tensors, and a graph of them is to be one of the ops."""
    if index not in _codes:
        there = torch.cuda.is_available() and index < torch.cuda.device_count()
        _codes[index] = not there or torch.ops.recurra._has_cuda_code(index)
    return _codes[index]


# What torch.compiler.assume_constant_result does, which imports the whole compiler to do it.
_has_code._dynamo_marked_constant = True


def xla_cuda() -> tuple[ctypes.CDLL | None, str]:
    """The ops as custom calls of XLA on CUDA; or None, and why and what to do."""
    if _switched_off:
        return None, f"{_CUDA_SWITCH} is 0: unset it"
    advice = "install a wheel of recurra, build it where nvcc is on the PATH"
    path = find("_xla_cuda.so")
    if path is None:
        return None, f"recurra was built without nvcc: {advice}"
    try:
        return ctypes.CDLL(str(path)), ""
    except OSError as error:
        return None, f"its library cannot be loaded ({error}): {advice}"


def loaded() -> dict[str, str]:
    """The paths of the libraries that are loaded, by device."""
    return _loaded


def library_paths() -> list[str]:
    """Paths of the op libraries that are loaded.

    A C++ program opens them with ``dlopen`` after libtorch and then finds ``recurra::linear_scan``
    and the others in torch's dispatcher. The first one holds all schemas and the CPU kernels; a
    second one, where there is one, the ops on CUDA, whose kernels are in lib/librecurra_cuda.so
    beside it.
    """
    return list(_loaded.values())


def include_path() -> str:
    """The folder to name to a C++20 compiler with ``-I``, for ``recurra/cells/all.h`` and others.

    Cells, the functions and dual numbers that they are made of, and the arguments of the kernels.
    """
    path = find("include")
    if path is None:
        raise FileNotFoundError("recurra: the C++ headers are missing, install the package again")
    return str(path)


def cmake_prefix_path() -> str:
    """The folder to name in CMake's ``CMAKE_PREFIX_PATH``, for ``find_package(recurra)``.

    It has the target ``recurra::recurra``: ``librecurra.so``, the kernels without torch and without
    Python, and the headers of :func:`include_path`.
    """
    path = find("lib/cmake/recurra")
    if path is None:
        raise FileNotFoundError("recurra: the CMake package is missing, install recurra again")
    return str(path.parents[2])


def status() -> dict[str, str]:
    """For each of ``cpu`` and ``cuda``: the path of the loaded library, or why there is none."""
    return {device: _loaded.get(device) or _problems[device] for device in ("cpu", "cuda")}
