"""Files of others, which may be damaged or hostile, and files that must survive a crash."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import importlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# Bytes of a JSON file and of the header of a safetensors file: in memory they become up to 30 times
# as large. Tokenizers have larger files, but do not come this way.
MAX_JSON = 2 << 20
MAX_HEADER = 3 << 20

TEMPORARY = ".tmp-"  # how the names begin of what an interrupted process may leave

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint8: "U8",
    torch.int64: "I64",
}


FLOATS = ("F32", "F64", "BF16", "F16")  # what safetensors calls the dtypes of parameters


class CheckpointError(ValueError):
    """A file of a checkpoint is damaged, incomplete or does not belong where it is."""


def extra(name: str, purpose: str) -> Any:
    """Imports a package that only some of recurra needs.

    Raises:
        RuntimeError: it is not installed; says what to install.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise RuntimeError(
            f"{purpose} needs the package {name.split('.')[0]}: pip install 'recurra[train]'"
        ) from error


def shown(value: object) -> str:
    """The beginning of a value in a message, whatever the value is."""
    try:
        return f"{value!r:.40}"
    except (ValueError, RecursionError):  # an integer of thousands of digits, deep nesting
        return "a value too long to print"


def read_json(path: Path) -> dict[str, Any]:
    """An object from a JSON file.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it is too large or does not hold a JSON object.
    """
    if not path.is_file():
        raise FileNotFoundError(errno.ENOENT, "no such file", str(path))
    size = path.stat().st_size
    if size > MAX_JSON:
        raise CheckpointError(f"{path}: at most {MAX_JSON >> 20} MiB are allowed, got {size} bytes")
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: must hold an object, got {type(value).__name__}")
    return value


def inside(folder: Path, name: object) -> Path:
    """The path of a file that another file names.

    Raises:
        CheckpointError: the name leads out of this very folder.
    """
    if (
        not isinstance(name, str)
        or name != os.path.basename(name)
        or name in ("", ".", "..")
        or "\0" in name
    ):
        raise CheckpointError(f"{folder}: {shown(name)} is not the name of a file in this folder")
    return folder / name


@contextlib.contextmanager
def open_tensors(path: Path) -> Iterator[Any]:
    """A safetensors file, read where it is needed; whatever is wrong with it a CheckpointError."""
    safetensors = extra("safetensors", "reading a checkpoint")
    if not path.is_file():
        raise FileNotFoundError(errno.ENOENT, "no such file", str(path))
    with open(path, "rb") as plain:
        header = int.from_bytes(plain.read(8), "little")
    if header > MAX_HEADER:
        raise CheckpointError(
            f"{path}: is not a safetensors file, or its header is too large: at most "
            f"{MAX_HEADER >> 20} MiB are allowed, got {header} bytes"
        )
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            yield file
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{path}: is not a whole safetensors file: {error}") from None


def tensor_shapes(file: Any) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Dtype, in the words of safetensors, and shape of every tensor of an open file."""
    found = {}
    for name in file.keys():  # noqa: SIM118  (not a dict)
        piece = file.get_slice(name)
        found[name] = piece.get_dtype(), tuple(piece.get_shape())
    return found


def compare(
    where: Path,
    wanted: dict[str, tuple[int, ...]],
    found: dict[str, tuple[str, tuple[int, ...]]],
    dtypes: tuple[str, ...] = FLOATS,
) -> None:
    """Checks names, shapes and dtypes of tensors before any data is read.

    Raises:
        CheckpointError: lists every difference, up to ten.
    """
    problems = [f"{name} is missing" for name in wanted if name not in found]
    problems += [f"{name:.100} is not expected" for name in found if name not in wanted]
    for name, (dtype, shape) in found.items():
        if name in wanted and shape != wanted[name]:
            problems.append(f"{name} must have shape {wanted[name]}, got {shape}")
        if name in wanted and dtype not in dtypes:
            problems.append(f"{name} must have dtype {' or '.join(dtypes)}, got {dtype}")
    if problems:
        more = f", and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise CheckpointError(f"{where}: {'; '.join(problems[:10])}{more}")


# ---- files that survive -------------------------------------------------------------------------


def sync(path: Path) -> None:
    """Waits until a file, or the entries of a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_bytes(path: Path, data: bytes) -> None:
    """Writes a new file and waits until it is on the disk."""
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def write_json(path: Path, value: object) -> None:
    """Writes a new JSON file and waits until it is on the disk."""
    write_bytes(path, (json.dumps(value, indent=1, allow_nan=False) + "\n").encode())


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Writes a new safetensors file and waits until it is on the disk.

    Raises:
        OSError: it cannot be written.
        ValueError: there are too many tensors.
    """
    # Not by the library, which hides the error of the system in a text and makes files that only
    # their owner can read. The widest first, so that every tensor is aligned.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, x in ordered:
        begin, end = end, end + x.nbytes
        header[name] = {
            "dtype": _DTYPES[x.dtype],
            "shape": list(x.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER:  # could not be read
        raise ValueError(f"{path}: {len(tensors)} tensors are too many for one file")
    with open(path, "xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, x in ordered:
            file.write(x.detach().cpu().reshape(-1).view(torch.uint8).numpy())
        file.flush()
        os.fsync(file.fileno())


def replace(path: Path, write: Any) -> None:
    """Writes a file under another name with ``write(path)`` and renames it to ``path``."""
    temporary = path.with_name(f"{TEMPORARY}{path.name}-{os.getpid()}-{os.urandom(4).hex()}")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)


# ---- what was compiled ---------------------------------------------------------------------------


def private_folder(path: Path) -> Path:
    """A folder whose files can be trusted since nobody else can write them; made if need be.

    Raises:
        OSError: it cannot be made.
        PermissionError: it belongs to another user, or others may write there.
    """
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = path.stat()
    if found.st_uid != os.getuid():
        raise PermissionError(errno.EPERM, "the folder belongs to another user", str(path))
    if found.st_mode & 0o022:
        raise PermissionError(errno.EPERM, "other users may write to the folder", str(path))
    return path


def write_sealed(path: Path, data: bytes) -> None:
    """Writes a file so that it is there as a whole or not at all, with its SHA-256 at the end."""
    replace(path, lambda to: write_bytes(to, data + hashlib.sha256(data).digest()))


def read_sealed(path: Path) -> bytes | None:
    """What :func:`write_sealed` wrote; None where there is no such file or it is damaged."""
    try:
        whole = path.read_bytes()
    except FileNotFoundError:
        return None
    data, seal = whole[:-32], whole[-32:]
    return data if hashlib.sha256(data).digest() == seal else None
