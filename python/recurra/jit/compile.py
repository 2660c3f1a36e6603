"""Compilers, and the folder of what they made.

RECURRA_JIT_CACHE names that folder; otherwise it is recurra in XDG_CACHE_HOME or ~/.cache.
"""

from __future__ import annotations

import functools
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import torch

import recurra
from recurra._files import private_folder, read_sealed, write_bytes, write_sealed

# A step on plain numbers.
PLAIN = """
#include "recurra/cells/jacobian.h"
namespace recurra::RECURRA_ISA {
static_assert(decltype(RECURRA_CELL::affine_params)::size >= 0);
void plain(const double* x, const double* h, const double* p, double* out) {
  step<RECURRA_CELL>(x, h, p, out);
}
}
"""
_MOST_SAID = 6000  # characters of a compiler

_lock = threading.RLock()


class CompileError(RuntimeError):
    """The text of a cell does not compile; holds what the compiler said, with the text's lines."""


def _not_kept(error: Exception) -> RuntimeError:
    return RuntimeError(
        f"jit.cell: compiled cells cannot be kept: {error}; RECURRA_JIT_CACHE names another "
        "folder for them"
    )


def folder() -> Path:
    """Where compiled cells are kept.

    Raises:
        RuntimeError: it cannot be made, or others could write there.
    """
    given = os.environ.get("RECURRA_JIT_CACHE")
    base = os.environ.get("XDG_CACHE_HOME", "")
    try:
        if not os.path.isabs(base):  # which the standard says to ignore
            base = Path.home() / ".cache"
        path = Path(given).expanduser().absolute() if given else Path(base) / "recurra"
        return private_folder(path)
    except (OSError, RuntimeError) as error:
        raise _not_kept(error) from None


@functools.cache
def headers() -> str:
    """A hash of all that a program may include."""
    root, whole = Path(recurra.include_path()), hashlib.sha256()
    for path in sorted(path for path in root.rglob("*") if path.is_file()):
        data = path.read_bytes()
        whole.update(f"{path.relative_to(root)} {len(data)}\n".encode())
        whole.update(data)
    return whole.hexdigest()


def cached(suffix: str, parts: list[str], make: Callable[[], bytes]) -> tuple[Path, bytes]:
    """What ``make`` returns, or has returned before for the same parts and headers, and its file.

    The file has its hash behind the data, which neither the loader of libraries nor of cubins
    looks at.

    Raises:
        OSError: it cannot be read or written.
        RuntimeError: there is no folder for it.
    """
    key = hashlib.sha256("\0".join([recurra.__version__, headers(), *parts]).encode()).hexdigest()
    path = folder() / f"{key}{suffix}"
    with _lock:
        data = read_sealed(path)
        if data is None:
            data = make()
            write_sealed(path, data)
    return path, data


# ---- the system's compiler -----------------------------------------------------------------------


@functools.cache
def _identity(command: tuple[str, ...]) -> str:
    try:
        ran = subprocess.run([*command, "--version"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise RuntimeError(f"jit.cell: the compiler {shlex.join(command)}: {error}") from None
    return f"{shlex.join(command)}\n{ran.stdout}"


def compiler() -> tuple[str, ...] | None:
    """The command that CXX names, or c++, g++ or clang++ of the PATH.

    Raises:
        RuntimeError: a quotation in CXX has no end.
    """
    if given := os.environ.get("CXX", "").strip():
        try:
            return tuple(shlex.split(given))
        except ValueError as error:
            raise RuntimeError(f"jit.cell: CXX must be a command, got {given}: {error}") from None
    for name in ("c++", "g++", "clang++"):
        if found := shutil.which(name):
            return (found,)
    return None


@functools.cache
def _flags(isa: str) -> tuple[str, ...]:
    # Written when the package was built, from what its own kernels are compiled with.
    text = (Path(recurra.include_path()) / "recurra" / "simd" / "flags.txt").read_text()
    every = {name: rest for name, *rest in (line.split() for line in text.splitlines())}
    include = recurra.include_path()
    return (
        *("-std=c++20", "-O3", "-DNDEBUG", "-fPIC", "-shared", "-fopenmp", "-fvisibility=hidden"),
        *every[isa],
        *("-w", f"-DRECURRA_ISA={isa}", f"-I{include}", f"-I{include}/recurra"),
    )


def _run(command: list[str], folder: Path) -> str | None:
    """What the compiler says where it fails."""
    try:
        ran = subprocess.run(
            command,
            cwd=folder,
            env={**os.environ, "LC_ALL": "C", "TMPDIR": str(folder)},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
        )
    except OSError as error:
        raise RuntimeError(f"jit.cell: the compiler {command[0]}: {error}") from None
    return None if ran.returncode == 0 else ran.stderr


def compile_error(said: str) -> CompileError:
    """The error with the beginning of what a compiler said."""
    said = said.strip()
    more = "" if len(said) <= _MOST_SAID else "\n..."
    return CompileError(f"jit.cell: source does not compile:\n{said[:_MOST_SAID]}{more}")


def library(program: str, engine: str, text: str) -> Path:
    """A shared library of a cell under an engine, for the instruction set in use.

    Args:
        program: the cell.
        engine: what is compiled behind it.
        text: the lines of the cell, which the compiler quotes in its messages.

    Raises:
        CompileError: it does not compile.
        RuntimeError: there is no compiler, it makes no library, or that cannot be kept.
    """
    command = compiler()
    if command is None:
        raise RuntimeError(
            "jit.cell: a C++ compiler is needed on the CPU and none was found (GCC 11 or later): on"
            " Debian and Ubuntu `apt-get install g++`, or name one in CXX"
        )
    flags = _flags(torch.ops.recurra._isa())

    def make() -> bytes:
        with tempfile.TemporaryDirectory(dir=folder(), prefix=".tmp-") as name:
            within = Path(name)
            write_bytes(within / "program.cpp", (program + engine).encode())
            write_bytes(within / "plain.cpp", (program + PLAIN).encode())
            write_bytes(within / "cell.h", text.encode())
            whole = _run([*command, *flags, "program.cpp", "-o", "cell.so"], within)
            made = within / "cell.so"
            if whole is None and not made.exists():
                raise RuntimeError(f"jit.cell: the compiler {shlex.join(command)} made no library")
            if whole is None:
                return made.read_bytes()
            # What is wrong with a step on plain numbers says so in a few lines.
            plain = _run([*command, *flags, "-fsyntax-only", "plain.cpp"], within)
            raise compile_error(plain or whole)

    parts = ["c++", _identity(command), *flags, program, engine]
    try:
        return cached(".so", parts, make)[0]
    except OSError as error:
        raise _not_kept(error) from None


# ---- NVRTC ---------------------------------------------------------------------------------------

_LEAST_NVRTC = (12, 6)
# Without fma the bits are those of the CPU.
_NVRTC = (
    ("std", "c++20"),
    ("fma", False),
    ("device_as_default_execution_space", True),
    ("use_bundled_headers", False),
    ("define_macro", ("RECURRA_ISA", "cuda")),
    ("disable_warnings", True),
)


def _install() -> str:
    """How to get the packages for the CUDA of this torch."""
    old = (torch.version.cuda or "").startswith("12.")
    return f"pip install 'recurra[{'cuda12' if old else 'cuda'}]'"


def cuda_core():
    """The package of the extra ``cuda``.

    Raises:
        RuntimeError: it is not installed; says what to install.
    """
    try:
        import cuda.core
    except ImportError as error:
        raise RuntimeError(
            f"jit.cell: compiling for CUDA needs the package cuda-core: {_install()} ({error})"
        ) from None
    return cuda.core


def cubin(program: str, arch: str, kernels: tuple[str, ...]) -> tuple[bytes, dict[str, str]]:
    """The machine code of a program for one architecture such as "sm_90".

    Where it cannot be written to the folder it is compiled all the same.

    Args:
        program: what is compiled.
        arch: the architecture.
        kernels: the kernels that are wanted, as C++ names them.

    Returns:
        The cubin, and the names of the kernels in it.

    Raises:
        CompileError: it does not compile.
        RuntimeError: cuda.core or NVRTC is not there, or there is no folder.
    """
    core = cuda_core()
    include = recurra.include_path()
    options = core.ProgramOptions(
        arch=arch, include_path=[include, f"{include}/recurra"], **dict(_NVRTC)
    )

    @functools.cache
    def make() -> bytes:
        try:
            built = core.Program(program, "c++", options).compile(
                "cubin", name_expressions=list(kernels)
            )
        except Exception as error:
            # One class for all that NVRTC says, which cuda.core does not name.
            _, log, said = str(error).partition("compilation log:")
            if not log:
                raise RuntimeError(f"jit.cell: NVRTC: {error}") from None
            raise compile_error(said) from None
        names = [built.symbol_mapping[kernel] for kernel in kernels]
        names = [name.decode() if isinstance(name, bytes) else name for name in names]
        return "\n".join(names).encode() + b"\0" + built.code

    version = f"{core.__version__} {nvrtc_version()}"
    parts = ["nvrtc", version, arch, repr(_NVRTC), *kernels, program]
    try:
        data = cached(".cubin", parts, make)[1]
    except OSError:
        data = make()
    names, _, code = data.partition(b"\0")
    return code, dict(zip(kernels, names.decode().split("\n"), strict=True))


@functools.cache
def nvrtc_version() -> tuple[int, int]:
    """The version of CUDA that NVRTC is of.

    Raises:
        RuntimeError: it is not installed, or is too old.
    """
    try:
        from cuda.bindings import nvrtc

        error, *version = nvrtc.nvrtcVersion()
    except (ImportError, RuntimeError) as error:
        raise RuntimeError(
            f"jit.cell: compiling for CUDA needs NVRTC: {_install()} ({error})"
        ) from None
    least, got = (".".join(map(str, v)) for v in (_LEAST_NVRTC, version))
    if tuple(version) < _LEAST_NVRTC:
        raise RuntimeError(
            f"jit.cell: NVRTC must be that of CUDA {least} or later, got {got}: {_install()}"
        )
    return tuple(version)
