"""Checkpoints that a crash cannot damage: folders that appear whole or not at all.

A checkpoint is written into a folder with a temporary name, every file and at last manifest.json,
with the sizes and digests of the others, forced to the disk; then the folder is renamed. A reader
takes the newest folder whose manifest holds true, so that a damaged one costs the steps since the
one before it and nothing else.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from recurra import _files
from recurra._files import CheckpointError

FORMAT = 1
MANIFEST = "manifest.json"
LOCK = ".lock"  # of a run
TOKENS = "tokens"  # of a run: what its text was made into
_NAME = re.compile(r"step-([0-9]{8,18})")


def name(step: int) -> str:
    """The name of the checkpoint of a step."""
    return f"step-{step:08d}"


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def _seal(manifest: dict[str, Any]) -> bytes:
    """The text of a manifest, with a digest of itself, so that a flipped bit shows there too."""
    body = {key: manifest[key] for key in sorted(manifest) if key != "sha256"}
    digest = hashlib.sha256(json.dumps(body).encode()).hexdigest()
    return (json.dumps(body | {"sha256": digest}, indent=1) + "\n").encode()


def save(root: Path, step: int, write: Callable[[Path], None], *, keep: int) -> Path:
    """Makes the checkpoint of a step.

    Args:
        root: the folder of the checkpoints; made if it is not there.
        step: the step.
        write: writes the files into a folder and forces each to the disk.
        keep: older checkpoints beyond so many, this one included, are deleted at the end. Those
            of later steps stay: there are some only where the run had to go back before them.

    Returns:
        The folder of the checkpoint.

    Raises:
        OSError: a file could not be written. Nothing that was there before has changed.
    """
    root.mkdir(parents=True, exist_ok=True)
    random = os.urandom(6).hex()
    temporary = root / f"{_files.TEMPORARY}{step}-{os.getpid()}-{random}"
    final = root / name(step)
    temporary.mkdir()
    try:
        write(temporary)
        files = {
            path.name: {"size": path.stat().st_size, "sha256": _digest(path)}
            for path in sorted(temporary.iterdir())
        }
        manifest = {"format": FORMAT, "step": step, "files": files}
        _files.write_bytes(temporary / MANIFEST, _seal(manifest))
        _files.sync(temporary)
        _put(temporary, final)
        _files.sync(root)
    finally:
        # Gone already unless something failed, and then the disk may refuse even this.
        _delete(temporary)
    for old in [path for path in _steps(root) if _step(path) <= step][keep:]:
        with contextlib.suppress(OSError):
            _delete(_aside(old))
    return final


def _aside(folder: Path) -> Path:
    """Renames a checkpoint, so that it is gone at once however long deleting it takes."""
    aside = folder.with_name(f"{_files.TEMPORARY}old-{os.getpid()}-{os.urandom(6).hex()}")
    os.rename(folder, aside)
    return aside


def _put(temporary: Path, final: Path) -> None:
    """Renames a folder, in place of what is there under that name, or leaves that as it is."""
    old: Path | None = None
    while True:
        try:
            os.rename(temporary, final)
            break
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                if old:
                    os.rename(old, final)
                raise
        # The same step saved before, perhaps, if again and again, by a process beside this one.
        _delete(old)
        old = None
        with contextlib.suppress(FileNotFoundError):
            old = _aside(final)
    _delete(old)


def _delete(folder: Path | None) -> None:
    if folder:
        shutil.rmtree(folder, ignore_errors=True)


def _steps(root: Path) -> list[Path]:
    """The folders of checkpoints, the newest first."""
    if not root.is_dir():
        return []
    found = [
        path
        for path in root.iterdir()
        if _NAME.fullmatch(path.name) and path.is_dir() and not path.is_symlink()
    ]
    return sorted(found, key=_step, reverse=True)


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def exists(root: Path) -> bool:
    """Whether there is any checkpoint, whole or not."""
    return bool(_steps(root))


def clean(root: Path) -> None:
    """Deletes what interrupted writers left. Only for a process that knows that no other writes."""
    if root.is_dir():
        for path in root.iterdir():
            if path.name.startswith(_files.TEMPORARY):
                if path.is_dir() and not path.is_symlink():
                    _delete(path)
                else:
                    path.unlink(missing_ok=True)


def verify(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint, if all of it holds true.

    Raises:
        CheckpointError: a file is missing, has another size or other bytes; or the format is one
            that this version does not read.
    """
    path = _own(folder, MANIFEST)
    if not path.is_file():
        raise CheckpointError(f"{folder}: has no {MANIFEST}, so it was never finished")
    manifest = _files.read_json(path)
    version = manifest.get("format")
    if type(version) is int and version > FORMAT:
        raise CheckpointError(
            f"{folder}: has format {_files.shown(version)}, this version of recurra reads up to "
            f"{FORMAT}"
        )
    if not _is_manifest(manifest) or path.read_bytes() != _seal(manifest):
        raise CheckpointError(f"{path}: is damaged")
    for file, wanted in manifest["files"].items():
        where = _own(folder, file)
        if not where.is_file():
            raise CheckpointError(f"{where}: is missing")
        if where.stat().st_size != wanted["size"]:
            raise CheckpointError(
                f"{where}: must have {wanted['size']} bytes, got {where.stat().st_size}"
            )
        if _digest(where) != wanted["sha256"]:
            raise CheckpointError(f"{where}: is damaged: its digest is not that of the manifest")
    return manifest


def _own(folder: Path, file: str) -> Path:
    path = _files.inside(folder, file)
    if path.is_symlink() and path.resolve().parent != folder.resolve():
        raise CheckpointError(f"{path}: is a link that leaves the folder")
    return path


def _is_manifest(value: dict[str, Any]) -> bool:
    """Whether a manifest has the fields that it must have, and no others."""
    step, files = value.get("step"), value.get("files")
    return (
        set(value) == {"format", "step", "files", "sha256"}
        and (type(value["format"]), value["format"]) == (int, FORMAT)
        and type(step) is int
        and 0 <= step < 10**18
        and isinstance(files, dict)
        and all(
            isinstance(file, dict)
            and set(file) == {"size", "sha256"}
            and type(file["size"]) is int
            and type(file["sha256"]) is str
            for file in files.values()
        )
    )


def newest(root: Path, warn: Callable[[str], None] | None = None) -> Path | None:
    """The newest checkpoint that verifies; None where there is none at all.

    Args:
        root: the folder of the checkpoints.
        warn: called with a sentence about every newer one that does not.

    Raises:
        CheckpointError: there are checkpoints, and none of them is whole.
    """
    problems: list[str] = []
    for folder in _steps(root):
        try:
            verify(folder)
        except (CheckpointError, OSError) as error:
            problems.append(str(error))
            continue
        for problem in problems:
            if warn:
                warn(f"{problem}; going back to {folder.name}")
        return folder
    if problems:
        raise CheckpointError(f"no checkpoint in {root} is whole: {problems[0]}")
    return None


@contextlib.contextmanager
def alone(root: Path) -> Iterator[None]:
    """Holds the folder of a run for this process, and clears what one before left unfinished. A run
    that is refused before it begins leaves nothing, not even the folder.

    Raises:
        OSError: another process holds it.
    """
    new = [path for path in (root, *root.absolute().parents) if not path.exists()]
    root.mkdir(parents=True, exist_ok=True)
    before = set(root.iterdir())
    handle = _lock(root)
    try:
        clean(root)
        yield
    finally:
        with contextlib.suppress(OSError):  # others may have found a use for the folder
            own = {root / LOCK, root / TOKENS} - before
            if root / LOCK in own and set(root.iterdir()) - before <= own:
                for path in own:
                    _delete(path) if path.is_dir() else path.unlink(missing_ok=True)
                for path in new:
                    path.rmdir()
        os.close(handle)


def _lock(root: Path) -> int:
    """The open lock of a folder, this process's alone until it is closed."""
    import fcntl

    while True:
        handle = os.open(root / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            raise OSError(errno.EBUSY, "another process is training here", str(root)) from None
        # Whoever held it before may have deleted it since it was opened.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), os.stat(root / LOCK)):
                return handle
        os.close(handle)
