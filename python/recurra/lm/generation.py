"""Sampling from a language model: batched, streaming, in memory that does not grow."""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from recurra.lm.tokenizer import Tokenizer
from recurra.nn._config import check_fields

if TYPE_CHECKING:
    from recurra.lm.model import LM, LMState

# Prompts are read in chunks of at most so many tokens, all sequences together.
PREFILL_TOKENS = 4096


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; the steps come in the order of the attributes, as in
    transformers.

    Attributes:
        repetition_penalty: divides the positive logits of tokens that occurred before, and
            multiplies the negative ones; 1 changes nothing (Keskar et al., "CTRL", 2019).
        temperature: divides the logits; 0 always takes the largest.
        top_k: only so many most likely tokens; 0 takes all.
        top_p: only the most likely tokens that together have this probability (Holtzman et al.,
            "The curious case of neural text degeneration", 2020).
        seed: of the random numbers; each sequence has its own, so that its text does not depend
            on what else is in the batch. None draws a seed.

    Raises:
        ValueError: a value is out of range.
    """

    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        check_fields(
            self,
            repetition_penalty=(1e-3, 1e3),
            temperature=(0.0, 1e3),
            top_k=(0, 1 << 31),
            top_p=(1e-6, 1.0),
            seed=(0, (1 << 63) - 1),
        )


class _Sampler:
    """Chooses tokens for the rows of a batch."""

    def __init__(self, sampling: Sampling, rows: int, vocab_size: int, device: torch.device):
        self.sampling = sampling
        seed = secrets.randbits(62) if sampling.seed is None else sampling.seed
        self._random = [torch.Generator(device).manual_seed(seed + row) for row in range(rows)]
        self._seen: Tensor | None = None
        if sampling.repetition_penalty != 1:
            self._seen = torch.zeros(rows, vocab_size, dtype=torch.bool, device=device)

    def saw(self, row: int, tokens: Tensor) -> None:
        if self._seen is not None:
            self._seen[row, tokens] = True

    def _penalised(self, logits: Tensor, rows: list[int]) -> Tensor:
        chosen = self.sampling
        if self._seen is not None:
            seen = self._seen[rows]
            scaled = torch.where(
                logits < 0, logits * chosen.repetition_penalty, logits / chosen.repetition_penalty
            )
            logits = torch.where(seen, scaled, logits)
        return logits

    def probabilities(self, logits: Tensor, rows: list[int]) -> Tensor:
        """Of the next tokens, (len(rows), V), for logits of these rows of the batch."""
        chosen = self.sampling
        logits = self._penalised(logits, rows)
        # The largest becomes 0, which no temperature makes infinite.
        logits = (logits - logits.amax(-1, keepdim=True)) / chosen.temperature
        return _probabilities(logits, chosen.top_k, chosen.top_p)

    def choose(self, logits: Tensor, rows: list[int]) -> Tensor:
        """The next tokens, (len(rows),), for logits (len(rows), V) of these rows of the batch."""
        logits = logits.float()
        if self.sampling.temperature == 0:
            tokens = self._penalised(logits, rows).argmax(-1)
        else:
            p = self.probabilities(logits, rows)
            draws = [
                torch.multinomial(p[i], 1, generator=self._random[row])
                for i, row in enumerate(rows)
            ]
            tokens = torch.cat(draws)
        if self._seen is not None:
            self._seen[rows, tokens] = True
        return tokens


def _probabilities(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    if 0 < top_k < logits.shape[-1]:
        least = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    p = logits.softmax(-1)
    if top_p < 1:
        ordered, index = p.sort(-1, descending=True)
        # A token goes when those before it have the probability already.
        gone = ordered.cumsum(-1) - ordered >= top_p
        p = p.scatter(-1, index, ordered.masked_fill(gone, 0))
        p = p / p.sum(-1, keepdim=True)
    return p


def prefill(
    model: LM, prompts: Sequence[Tensor], budget: int = PREFILL_TOKENS
) -> tuple[Tensor, LMState]:
    """Reads prompts of any lengths at once.

    Args:
        model: the model.
        prompts: (T_i,) each, none of them empty.
        budget: tokens that are in memory at once.

    Returns:
        The logits after each prompt, (B, V), and the state of B sequences.
    """
    state = model.initial_state(len(prompts))
    logits: list[Tensor | None] = [None] * len(prompts)
    position = 0
    while rows := [i for i, prompt in enumerate(prompts) if len(prompt) > position]:
        length = max(1, budget // len(rows))
        pieces = [prompts[i][position : position + length] for i in rows]
        ends = torch.tensor([0, *(len(piece) for piece in pieces)]).cumsum(0)
        before = [type(s)(*(x[rows] for x in s)) for s in state]
        packed = torch.cat(pieces)[None]
        # One sequence needs no packing.
        ends = None if len(rows) == 1 else ends.to(packed.device)
        last, after = model(packed, before, cu_seqlens=ends, last_only=True)
        for whole, part in zip(state, after, strict=True):
            for x, y in zip(whole, part, strict=True):
                x[rows] = y
        position += length
        for i, row in zip(rows, last[:, 0], strict=True):
            if len(prompts[i]) <= position:
                logits[i] = row
    return torch.stack(logits), state


@torch.inference_mode()
def generate(
    model: LM,
    prompts: Sequence[Sequence[int] | Tensor],
    *,
    max_tokens: int = 256,
    sampling: Sampling = Sampling(temperature=0.0),
    stop_tokens: Sequence[int] | None = None,
    on_token: Callable[[int, int], bool | None] | None = None,
) -> list[list[int]]:
    """Continues token sequences.

    The memory taken does not depend on how long the sequences get, but for the tokens themselves.

    Args:
        model: the model.
        prompts: sequences of tokens, of any lengths from 1.
        max_tokens: new tokens of each sequence, at most.
        sampling: how tokens are chosen; the most likely ones by default.
        stop_tokens: end a sequence, and are not part of what is returned; the model's
            eos_token_ids when None.
        on_token: called with the number of the sequence and each new token; the sequence ends
            when it returns True.

    Returns:
        The new tokens of each sequence.

    Raises:
        ValueError: a prompt is empty or a token is not in the vocabulary.
    """
    device = model.embeddings.weight.device
    vocab = model.config.vocab_size
    given = [torch.as_tensor(prompt, dtype=torch.int64, device=device) for prompt in prompts]
    for i, prompt in enumerate(given):
        if prompt.dim() != 1 or not len(prompt):
            raise ValueError(f"generate: prompt {i} must hold at least one token")
        if prompt.min() < 0 or prompt.max() >= vocab:
            raise ValueError(f"generate: the tokens of prompt {i} must be from 0 to {vocab - 1}")
    if stop_tokens is None:
        stop_tokens = model.config.eos_token_ids
    out: list[list[int]] = [[] for _ in given]
    if not given or max_tokens < 1:
        return out

    sampler = _Sampler(sampling, len(given), vocab, device)
    for i, prompt in enumerate(given):
        sampler.saw(i, prompt)
    logits, state = prefill(model, given)
    rows = list(range(len(given)))
    for n in range(max_tokens):
        tokens = sampler.choose(logits, rows)
        going = []
        for i, (row, token) in enumerate(zip(rows, tokens.tolist(), strict=True)):
            if token in stop_tokens:
                continue
            out[row].append(token)
            if not (on_token and on_token(row, token)):
                going.append(i)
        if not going or n + 1 == max_tokens:
            break
        if len(going) < len(rows):
            # Sequences that ended cost nothing from here on.
            rows = [rows[i] for i in going]
            tokens = tokens[going]
            state = [type(s)(*(x[going] for x in s)) for s in state]
        logits = model.step(tokens, state)
    return out


class _UntilStop:
    """Passes text on up to the first stop string; keeps back what may be the beginning of one."""

    def __init__(self, stop: Sequence[str]):
        self._stop = [s for s in stop if s]
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """Text that is certain, and whether a stop string came."""
        held = self._held + text
        found = [at for s in self._stop if (at := held.find(s)) >= 0]
        if found:
            self._held = ""
            return held[: min(found)], True
        keep = max(
            (n for s in self._stop for n in range(1, len(s)) if held.endswith(s[:n])), default=0
        )
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep], False

    def flush(self) -> str:
        held, self._held = self._held, ""
        return held


def generate_text(
    model: LM,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    max_tokens: int = 256,
    sampling: Sampling = Sampling(),
    stop: Sequence[str] = (),
    on_text: Callable[[int, str], None] | None = None,
    on_token: Callable[[int, int], None] | None = None,
) -> list[str]:
    """Continues texts.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        prompts: the texts, none of them empty.
        max_tokens: new tokens of each text, at most.
        sampling: how tokens are chosen.
        stop: strings that end a text, and are not part of it.
        on_text: called with the number of the text and what has been added to it, as it comes.
        on_token: called with the number of the text and each new token.

    Returns:
        What was added to each text.

    Raises:
        ValueError: a text is empty.
    """
    filters = [_UntilStop(stop) for _ in prompts]
    pieces: list[list[str]] = [[] for _ in prompts]
    ended = [False] * len(prompts)

    def add(row: int, text: str) -> None:
        if text:
            pieces[row].append(text)
            if on_text:
                on_text(row, text)

    def took(row: int, token: int) -> bool:
        if on_token:
            on_token(row, token)
        text, ended[row] = filters[row].push(decoders[row].push(token))
        add(row, text)
        return ended[row]

    tokens = [tokenizer.encode(prompt) for prompt in prompts]
    decoders = [tokenizer.decoder(encoded) for encoded in tokens]
    for i, encoded in enumerate(tokens):
        if not encoded:
            raise ValueError(f"generate: prompt {i} must hold at least one token")
    generate(model, tokens, max_tokens=max_tokens, sampling=sampling, on_token=took)
    for row, done in enumerate(ended):
        if not done:
            text, done = filters[row].push(decoders[row].flush())
            add(row, text if done else text + filters[row].flush())
    return ["".join(parts) for parts in pieces]
