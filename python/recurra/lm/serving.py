"""Serving a language model to many requests that come and go: continuous batching.

A worked example, as the layers of vLLM or SGLang do it, short enough to be read in one go. The
states of all requests lie in one pool, a row each, its slot. A request waits for a slot, its prompt
is read in chunks beside those of others, and then it is one row of the batch that decodes, until it
ends and its slot is another's. :meth:`Engine.step` does one round of all that (docs/serving.md).
"""

from __future__ import annotations

import operator
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from recurra.lm.model import LM, LMState

_INTEGERS = {torch.int8, torch.int16, torch.int32, torch.int64}
_INTEGERS |= {torch.uint8, torch.uint16, torch.uint32, torch.uint64}


def _count(name: str, value: int) -> int:
    try:
        count = operator.index(value)
    except TypeError:
        raise ValueError(f"Engine: {name} must be an integer, got {value!r}") from None
    if count < 1:
        raise ValueError(f"Engine: {name} must be at least 1, got {count}")
    return count


@dataclass(eq=False)
class Request:
    """A prompt on its way.

    Attributes:
        prompt: its tokens, (T,), on the device of the model.
        max_tokens: after how many new ones it ends.
        tokens: the new ones so far.
        slot: the row of the pool that holds its state; None where it has none.
        read: how much of the prompt the state has seen.
        done: whether it ended.
    """

    prompt: Tensor
    max_tokens: int
    tokens: list[int] = field(default_factory=list)
    slot: int | None = None
    read: int = 0
    done: bool = False


class Engine:
    """Runs requests together, each with the tokens that it would have alone.

    Tokens are the most likely ones. What a request writes does not depend on what runs beside it
    but for the rounding of matrix products while prompts are read.

    Args:
        model: every mixer of it must step in slots, ``slotted``.
        slots: requests that have a state at a time; the rows of the batch that decodes.
        prefill_tokens: tokens of prompts that are read between two steps of decoding, so that those
            who are written to do not wait long for those who are read.
        max_length: tokens that a prompt and what follows it may have together.

    Raises:
        ValueError: a number is out of range, a mixer does not step in slots, or the states do not
            fit this machine's memory.
    """

    def __init__(
        self, model: LM, *, slots: int = 16, prefill_tokens: int = 512, max_length: int = 1 << 20
    ):
        slots = _count("slots", slots)
        self.prefill_tokens = _count("prefill_tokens", prefill_tokens)
        self.max_length = _count("max_length", max_length)
        for part in model.stateful():
            if not part.slotted:
                raise ValueError(
                    f"Engine: {type(part).__name__} does not step in slots; use LM.generate, which "
                    "decodes prompts that come together"
                )
        self.model = model
        self.waiting: deque[Request] = deque()
        self.reading: list[Request] = []
        self.writing: list[Request] = []
        with torch.inference_mode():
            self.pool: LMState = model.initial_state(slots)
            self.fresh: LMState = model.initial_state(1)
        self.free = list(range(slots))
        # What the decoding step reads and writes lies at the same place in every round. The row
        # beyond the last slot is for the rows of the batch that hold no request.
        zeros = model.embeddings.weight.new_zeros
        self.last = zeros(slots + 1, dtype=torch.int64)  # the last token of each slot
        self.rows = zeros(slots, dtype=torch.int64) - 1  # the slot of each row of the batch
        self.next = zeros(slots, dtype=torch.int64)  # what each row wrote
        self.decode = self._captured() if self.last.is_cuda else self._decode

    # ---- requests ---------------------------------------------------------------------------

    def submit(self, prompt: Sequence[int] | Tensor, *, max_tokens: int = 256) -> Request:
        """Takes a request, which waits until a slot is free; returns what :meth:`step` fills.

        Raises:
            ValueError: the prompt is not one dimension of integers, is empty, has a token that is
                not in the vocabulary or is longer than ``max_length`` with what follows it, or
                ``max_tokens`` is not an integer of at least 1.
        """
        if isinstance(prompt, str | bytes):
            raise ValueError(
                f"Engine: the prompt must be integers in a row, got {type(prompt).__name__}; a "
                "model of bytes takes list(b'text')"
            )
        if not isinstance(prompt, Tensor) and isinstance(prompt, Sequence) and not len(prompt):
            raise ValueError("Engine: the prompt must hold at least one token")
        try:
            tokens = torch.as_tensor(prompt)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"Engine: the prompt must be integers in a row: {error}") from None
        if tokens.dim() != 1 or tokens.dtype not in _INTEGERS:
            raise ValueError(
                "Engine: the prompt must be integers in a row, got shape "
                f"{tuple(tokens.shape)} and dtype {tokens.dtype}"
            )
        if not len(tokens):
            raise ValueError("Engine: the prompt must hold at least one token")
        # A copy: the request lives longer than the call, and the caller's tensor is the caller's.
        tokens = tokens.to(self.last.device, torch.int64, copy=True)
        vocab = self.model.config.vocab_size
        if tokens.min() < 0 or tokens.max() >= vocab:
            raise ValueError(f"Engine: the tokens of the prompt must be from 0 to {vocab - 1}")
        max_tokens = _count("max_tokens", max_tokens)
        if len(tokens) + max_tokens > self.max_length:
            raise ValueError(
                f"Engine: the prompt and max_tokens must be at most {self.max_length} together, "
                f"got {len(tokens)} and {max_tokens}"
            )
        request = Request(tokens, max_tokens)
        self.waiting.append(request)
        return request

    def cancel(self, request: Request) -> None:
        """Ends a request wherever it is; nothing happens to one that ended."""
        for line in (self.waiting, self.reading, self.writing):
            if request in line:
                line.remove(request)
                self._end(request)

    @property
    def busy(self) -> bool:
        """Whether there is any request that did not end."""
        return bool(self.waiting or self.reading or self.writing)

    @torch.inference_mode()
    def step(self) -> list[Request]:
        """One round: slots for those who wait, a chunk of prompts, a token for all who write.

        Returns:
            The requests that have one more token or came to their end token, each once, and may be
            ``done``.
        """
        while self.waiting and self.free:
            self._admit(self.waiting.popleft())
        running = list(self.writing)  # whoever is read to the end in this round has its token
        return self._read() + self._write(running)

    def run(self) -> None:
        """Steps until there is nothing more to do."""
        while self.busy:
            self.step()

    # ---- a round ----------------------------------------------------------------------------

    def _admit(self, request: Request) -> None:
        request.slot = self.free.pop()
        for part, fresh in zip(self.pool, self.fresh, strict=True):
            for x, first in zip(part, fresh, strict=True):
                x[request.slot] = first[0]
        self.reading.append(request)

    def _read(self) -> list[Request]:
        """The next chunk of each prompt until there are ``prefill_tokens``, packed into one row."""
        budget, chunk, pieces = self.prefill_tokens, [], []
        for request in self.reading:
            piece = request.prompt[request.read : request.read + budget]
            if not len(piece):
                break
            chunk.append(request)
            pieces.append(piece)
            budget -= len(piece)
        if not chunk:
            return []
        device = self.last.device
        slots = torch.tensor([request.slot for request in chunk], device=device)
        ends = torch.tensor([0, *map(len, pieces)]).cumsum(0).to(device)
        before = [type(part)(*(x[slots] for x in part)) for part in self.pool]
        logits, after = self.model(torch.cat(pieces)[None], before, cu_seqlens=ends, last_only=True)
        for part, new in zip(self.pool, after, strict=True):
            for x, y in zip(part, new, strict=True):
                x[slots] = y
        self.last[slots] = chosen = logits[:, 0].argmax(-1)
        told: list[Request] = []
        for request, piece, token in zip(chunk, pieces, chosen.tolist(), strict=True):
            request.read += len(piece)
            if request.read == len(request.prompt):
                self.reading.remove(request)
                self._tell(request, token)
                told.append(request)
                if not request.done:
                    self.writing.append(request)
        return told

    def _write(self, running: list[Request]) -> list[Request]:
        """The next token of each, in a batch of always the same size."""
        if not running:
            return []
        slots = [request.slot for request in running]
        self.rows.copy_(torch.tensor(slots + [-1] * (len(self.rows) - len(slots))))
        self.decode()
        for request, token in zip(running, self.next[: len(running)].tolist(), strict=True):
            self._tell(request, token)
        self.writing = [request for request in self.writing if not request.done]
        return running

    def _tell(self, request: Request, token: int) -> None:
        ended = token in self.model.config.eos_token_ids
        if not ended:
            request.tokens.append(token)
        if ended or len(request.tokens) >= request.max_tokens:
            self._end(request)

    def _end(self, request: Request) -> None:
        request.done = True
        if request.slot is not None:
            self.free.append(request.slot)
            request.slot = None

    # ---- what a CUDA graph holds ------------------------------------------------------------

    def _decode(self) -> None:
        """One token for each row. Shapes are fixed, what is read and written stays where it is, and
        nothing waits for the device: rows without a request have slot -1, which the ops skip."""
        where = self.rows.masked_fill(self.rows < 0, len(self.last) - 1)
        logits = self.model.step(self.last.index_select(0, where), self.pool, self.rows)
        self.next.copy_(logits.argmax(-1))
        self.last.index_copy_(0, where, self.next)

    @torch.inference_mode()
    def _captured(self):
        """The same as a CUDA graph. All rows are empty still, so that no state changes."""
        beside = torch.cuda.Stream()
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):
            self._decode()  # what libraries set up at their first call
        torch.cuda.current_stream().wait_stream(beside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._decode()
        return graph.replay
