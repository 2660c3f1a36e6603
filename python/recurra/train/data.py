"""Text as a long row of tokens that is read where it is needed."""

from __future__ import annotations

import bisect
import errno
import functools
import glob
import hashlib
import importlib.util
import itertools
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from recurra import _files
from recurra.lm.tokenizer import JsonTokenizer, Tokenizer

# Files that are mapped at the same time.
_OPEN_FILES = 64
# Text is tokenized in pieces of about so many bytes, cut at a line where there is one.
_PIECE = 1 << 20


class Tokens(Protocol):
    """A row of tokens: its length, and any part of it as int64."""

    def __len__(self) -> int: ...

    def read(self, start: int, count: int) -> np.ndarray: ...


class Bytes:
    """Files one behind the other, memory-mapped; a token is a byte."""

    def __init__(self, parts: Sequence[Path | bytes]):
        self._parts = list(parts)
        sizes = [len(p) if isinstance(p, bytes) else p.stat().st_size for p in self._parts]
        self._ends = list(itertools.accumulate(sizes))
        self._map = functools.lru_cache(_OPEN_FILES)(self._open)

    def _open(self, i: int) -> np.ndarray:
        part = self._parts[i]
        size = self._ends[i] - (self._ends[i - 1] if i else 0)
        if isinstance(part, bytes):
            return np.frombuffer(part, np.uint8)
        # Reading a map beyond the end of its file would end the process.
        if (now := part.stat().st_size) != size:
            raise OSError(errno.EIO, f"has changed from {size} to {now} bytes", str(part))
        return np.memmap(part, np.uint8, mode="r") if size else np.empty(0, np.uint8)

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """Start and end of every file."""
        return zip([0, *self._ends], self._ends)  # noqa: B905  (one is longer on purpose)

    def read(self, start: int, count: int) -> np.ndarray:
        out = np.empty(count, np.int64)
        filled = 0
        i = bisect.bisect_right(self._ends, start)
        while filled < count:
            begin = self._ends[i - 1] if i else 0
            at = start + filled - begin
            piece = self._map(i)[at : at + count - filled]
            out[filled : filled + len(piece)] = piece
            filled += len(piece)
            i += 1
        return out


class TokenFile:
    """Tokens that a tokenizer made, memory-mapped."""

    def __init__(self, path: Path, dtype: np.dtype):
        self._tokens = (
            np.memmap(path, dtype, mode="r") if path.stat().st_size else np.empty(0, dtype)
        )

    def __len__(self) -> int:
        return len(self._tokens)

    def read(self, start: int, count: int) -> np.ndarray:
        return self._tokens[start : start + count].astype(np.int64)


class Part:
    """A part of a row of tokens."""

    def __init__(self, tokens: Tokens, start: int, stop: int):
        self._tokens, self._start, self._stop = tokens, start, stop

    def __len__(self) -> int:
        return self._stop - self._start

    def read(self, start: int, count: int) -> np.ndarray:
        return self._tokens.read(self._start + start, count)


# ---- where text comes from ----------------------------------------------------------------------


def embedded() -> Bytes:
    """Text that every machine with Python has: the help topics of the standard library, then its
    sources."""
    parts: list[Path | bytes] = []
    # Some distributions leave it out.
    if importlib.util.find_spec("pydoc_data") and importlib.util.find_spec("pydoc_data.topics"):
        topics = importlib.import_module("pydoc_data.topics").topics
        parts.append("\n\n".join(topics.values()).encode())
    root = Path(sysconfig.get_paths()["stdlib"])
    left_out = {"site-packages", "dist-packages", "test", "tests", "pydoc_data", "idlelib"}
    sources = [
        path
        for path in sorted(root.rglob("*.py"))
        if not left_out & set(path.relative_to(root).parts) and path.stat().st_size
    ]
    if not parts and not sources:
        raise FileNotFoundError(
            errno.ENOENT, "no sources of the standard library; name files with --data", str(root)
        )
    return Bytes([*parts, *sources])


def _looks_like_text(path: Path) -> bool:
    with open(path, "rb") as file:
        return b"\0" not in file.read(8192)


def find_files(names: Sequence[str]) -> list[Path]:
    """Files by name, all text files below a folder, or those that a pattern matches.

    Raises:
        FileNotFoundError: a name matches nothing.
    """
    found: list[Path] = []
    for name in names:
        path = Path(name).expanduser()
        if path.is_dir():
            below = [
                p
                for p in sorted(path.rglob("*"))
                if p.is_file()
                and not any(part.startswith(".") for part in p.relative_to(path).parts)
                and _looks_like_text(p)
            ]
            if not below:
                raise FileNotFoundError(errno.ENOENT, "no text files in the folder", name)
            found += below
        elif path.exists():
            found.append(path)
        else:
            matches = sorted(glob.glob(str(path), recursive=True))
            files = [Path(match) for match in matches if Path(match).is_file()]
            if not files:
                raise FileNotFoundError(errno.ENOENT, "no such file", name)
            found += files
    return found


def open_text(names: Sequence[str]) -> Bytes:
    """The bytes of files, folders and patterns; the embedded text where none are named.

    Raises:
        FileNotFoundError: a name matches nothing.
        ValueError: there is no text in any of them.
    """
    text = Bytes(find_files(names)) if names else embedded()
    if not len(text):
        raise ValueError(f"{', '.join(names)}: is empty")
    return text


# ---- tokens and their parts ---------------------------------------------------------------------


def _pieces(text: Bytes, start: int, stop: int) -> Iterator[bytes]:
    while start < stop:
        piece = text.read(start, min(_PIECE, stop - start)).astype(np.uint8).tobytes()
        if start + len(piece) < stop:
            cut = piece.rfind(b"\n") + 1
            if not cut:  # not within a character
                cut = len(piece) - next((n for n in range(1, 5) if piece[-n] & 0xC0 != 0x80), 0)
            piece = piece[: cut or len(piece)]
        yield piece
        start += len(piece)


def _token_dtype(tokenizer: Tokenizer) -> np.dtype:
    return np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)


def tokenize(
    text: Bytes, start: int, stop: int, tokenizer: Tokenizer, end: int | None, path: Path
) -> TokenFile:
    """Writes the tokens of a part of a text to a file, a token ``end`` behind every file."""
    dtype = _token_dtype(tokenizer)
    with open(path, "wb") as file:
        for begin, finish in text:
            begin, finish = max(begin, start), min(finish, stop)
            for piece in _pieces(text, begin, finish):
                tokens = tokenizer.encode(piece.decode("utf-8", errors="replace"))
                file.write(np.asarray(tokens, dtype).tobytes())
            if begin < finish and end is not None:
                file.write(np.asarray([end], dtype).tobytes())
    return TokenFile(path, dtype)


def _sample(tokens: Tokens, cut: int = 0) -> str:
    """A digest of the length, a place and tokens here and there."""
    digest = hashlib.sha256(f"{len(tokens)} {cut}\n".encode())
    count = min(4096, len(tokens))
    for place in np.linspace(0, len(tokens) - count, 64).astype(int):
        digest.update(tokens.read(int(place), count).tobytes())
    return digest.hexdigest()


class Corpus:
    """Tokens to train on and tokens to validate on.

    Args:
        text: the bytes.
        tokenizer: makes tokens of them.
        end: the token between files, for tokenizers that have one.
        held_out: bytes to validate on, instead of the end of ``text``.
        fraction: of the text to validate on, at most 4 MiB.
        folder: for the token files of a tokenizer that is not bytes. Must be there.
        make: whether to write the token files, or read those that another process wrote.

    Attributes:
        train, valid: the tokens.
        valid_bytes: the bytes that ``valid`` is made of.
    """

    def __init__(
        self,
        text: Bytes,
        tokenizer: Tokenizer,
        *,
        end: int | None = None,
        held_out: Bytes | None = None,
        fraction: float = 0.05,
        folder: Path | None = None,
        make: bool = True,
    ):
        cut = len(text)
        if held_out is None:
            cut -= min(int(fraction * len(text)), 4 << 20)
        self.valid_bytes = len(held_out) if held_out is not None else len(text) - cut
        self.tokenizer, self.end = tokenizer, end
        valid_text, valid_start = (held_out, 0) if held_out is not None else (text, cut)
        if not isinstance(tokenizer, JsonTokenizer):
            self.train: Tokens = Part(text, 0, cut)
            self.valid: Tokens = Part(valid_text, valid_start, len(valid_text))
            return
        parts = {"train": (text, 0, cut), "valid": (valid_text, valid_start, len(valid_text))}
        if make:
            # A run that goes on need not tokenize again what lies there.
            made_of = {
                "tokenizer": hashlib.sha256(tokenizer.path.read_bytes()).hexdigest(),
                "end": end,
                "text": [_sample(text, cut), _sample(valid_text, valid_start)],
            }
            about = folder / "about.json"
            files = [folder / f"{name}.bin" for name in parts]
            if not (about.is_file() and _files.read_json(about) == made_of):
                about.unlink(missing_ok=True)
                for path, part in zip(files, parts.values(), strict=True):
                    # Another process may have mapped the tokens of before.
                    _files.replace(path, functools.partial(tokenize, *part, tokenizer, end))
                _files.replace(about, lambda path: _files.write_json(path, made_of))
        self.train, self.valid = (
            TokenFile(folder / f"{name}.bin", _token_dtype(tokenizer)) for name in parts
        )

    def check(self, length: int) -> None:
        """Raises ValueError where the text is too short for sequences of ``length``."""
        for tokens, what in ((self.train, "train"), (self.valid, "validate")):
            if len(tokens) < length + 1:
                raise ValueError(
                    f"the text to {what} on has {len(tokens)} tokens, sequences of {length} need "
                    f"at least {length + 1}"
                )

    @property
    def bytes_per_token(self) -> float:
        """Bytes of a token of the text to validate on, on average."""
        return self.valid_bytes / max(len(self.valid), 1)

    def fingerprint(self) -> str:
        """The same for the same text, without reading all of it."""
        return _sample(self.train) + _sample(self.valid)


# ---- batches ------------------------------------------------------------------------------------


class Batches:
    """Which part of the text a step trains on: a function of the step and the seed alone, so that
    a run that is resumed, or spread over other processes, sees the same.

    Args:
        tokens: the text.
        batch: sequences of a step.
        length: tokens of a sequence.
        seed: of the random places.
        carry: the text is cut into ``batch`` parts, and each sequence goes on in its part.
    """

    def __init__(self, tokens: Tokens, batch: int, length: int, seed: int, carry: bool):
        self._tokens, self._batch, self._length = tokens, batch, length
        self._seed, self._carry = seed, carry
        self._stride = len(tokens) // batch
        if carry and self._stride < length + 1:
            raise ValueError(
                f"the text to train on has {len(tokens)} tokens, {batch} parts of it with "
                f"sequences of {length} need at least {batch * (length + 1)}"
            )
        self._per_pass = max((self._stride - 1) // length, 1)

    def begins(self, step: int) -> bool:
        """Whether the sequences of a step, counted from 1, begin without a state."""
        return not self._carry or (step - 1) % self._per_pass == 0

    def get(self, step: int, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Inputs and targets, (len(rows), length) each, of some sequences of a step."""
        if self._carry:
            at = (step - 1) % self._per_pass * self._length
            starts = [row * self._stride + at for row in range(self._batch)]
        else:
            random = np.random.Generator(np.random.Philox(key=[self._seed, step]))
            places = len(self._tokens) - self._length
            starts = random.integers(0, places, self._batch).tolist()
        read = [self._tokens.read(starts[row], self._length + 1) for row in rows]
        both = torch.from_numpy(np.stack(read))
        return both[:, :-1], both[:, 1:]
