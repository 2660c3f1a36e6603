"""Text to tokens and back: bytes, or any tokenizer.json."""

from __future__ import annotations

import codecs
import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

from recurra import _files
from recurra._files import CheckpointError

FILE = "tokenizer.json"
_MAX_FILE = 256 << 20  # bytes; the largest in use have about 35 MB


class Tokenizer(Protocol):
    """What training and generation ask of a tokenizer."""

    vocab_size: int

    def encode(self, text: str) -> list[int]: ...

    def decode(self, tokens: list[int]) -> str: ...

    def decoder(self, before: Sequence[int] = ()) -> StreamDecoder: ...


class StreamDecoder(Protocol):
    """Text from tokens as they come."""

    def push(self, token: int) -> str:
        """The text that is certain after one more token; perhaps none."""

    def flush(self) -> str:
        """What is left at the end."""


class ByteTokenizer:
    """A token is a byte of the UTF-8 text."""

    vocab_size = 256

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8", errors="surrogateescape"))

    def decode(self, tokens: list[int]) -> str:
        return bytes(tokens).decode("utf-8", errors="replace")

    def decoder(self, before: Sequence[int] = ()) -> StreamDecoder:
        return _ByteDecoder()


class _ByteDecoder:
    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        return self._decoder.decode(bytes([token]))

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


class JsonTokenizer:
    """A tokenizer.json of Hugging Face, through the tokenizers library.

    Raises:
        CheckpointError: the file is too large or not a tokenizer.
        RuntimeError: the tokenizers library is not installed.
    """

    def __init__(self, path: Path):
        tokenizers = _files.extra("tokenizers", f"reading {path}")
        size = path.stat().st_size
        if size > _MAX_FILE:
            raise CheckpointError(
                f"{path}: at most {_MAX_FILE >> 20} MiB are allowed, got {size} bytes"
            )
        self.path = path
        with self._errors("is not a tokenizer"):
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
            # Meant for training on single sentences; kept in the file, they would cut every text.
            self._tokenizer.no_truncation()
            self._tokenizer.no_padding()
            tokens = self._tokenizer.get_vocab(with_added_tokens=True).values()
        # Not how many there are: a file may leave numbers out.
        self.vocab_size = max(tokens, default=-1) + 1

    @contextlib.contextmanager
    def _errors(self, what: str) -> Iterator[None]:
        try:
            yield
        except (KeyboardInterrupt, SystemExit, MemoryError):
            raise
        except BaseException as error:  # the library's panics are not even Exceptions
            raise CheckpointError(f"{self.path}: {what}: {error}") from None

    def encode(self, text: str) -> list[int]:
        with self._errors("cannot encode"):
            return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, tokens: list[int]) -> str:
        with self._errors("cannot decode"):
            return self._tokenizer.decode(tokens, skip_special_tokens=True)

    def token_id(self, token: str) -> int | None:
        """The number of a token by its name, such as ``<|endoftext|>``."""
        return self._tokenizer.token_to_id(token)

    def decoder(self, before: Sequence[int] = ()) -> StreamDecoder:
        return _JsonDecoder(self, before)


class _JsonDecoder:
    """Decodes the tokens since the last certain text, with a few before them, which decide about
    spaces: of the text that is continued at first."""

    def __init__(self, tokenizer: JsonTokenizer, before: Sequence[int]):
        self._tokenizer = tokenizer
        self._tokens = list(before[-8:])
        self._known = len(self._tokens)  # tokens whose text has been given out

    def push(self, token: int) -> str:
        self._tokens.append(token)
        before = self._tokenizer.decode(self._tokens[: self._known])
        after = self._tokenizer.decode(self._tokens)
        # A character that is cut off decodes to U+FFFD; the rest of it comes with the next token.
        if after.endswith("\ufffd") and len(self._tokens) - self._known < 8:
            return ""
        new = after[len(before) :]
        self._tokens = self._tokens[self._known :]
        self._known = len(self._tokens)
        return new

    def flush(self) -> str:
        before = self._tokenizer.decode(self._tokens[: self._known])
        after = self._tokenizer.decode(self._tokens)
        self._tokens, self._known = [], 0
        return after[len(before) :]


def load_tokenizer(folder: Path, vocab_size: int) -> Tokenizer:
    """The tokenizer of a checkpoint: its tokenizer.json, or bytes where there is none.

    Raises:
        CheckpointError: there is no tokenizer.json and the model's tokens are not bytes, or it
            has more tokens than the model.
    """
    path = folder / FILE
    if path.is_file():
        tokenizer = JsonTokenizer(path)
        check_vocabulary(tokenizer, vocab_size, path)
        return tokenizer
    if vocab_size != ByteTokenizer.vocab_size:
        raise CheckpointError(
            f"{folder}: has no tokenizer.json, and {vocab_size} tokens are not bytes; name one "
            "with --tokenizer"
        )
    return ByteTokenizer()


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int, where: object) -> None:
    """Raises CheckpointError where a model of ``vocab_size`` tokens does not know all of them."""
    if tokenizer.vocab_size > vocab_size:
        raise CheckpointError(
            f"{where}: has {tokenizer.vocab_size} tokens, the model has {vocab_size}"
        )
