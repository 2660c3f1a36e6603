"""How well a model predicts a text."""

from __future__ import annotations

import dataclasses
import math
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from recurra.lm import LM
from recurra.lm.tokenizer import JsonTokenizer, Tokenizer
from recurra.train.data import Bytes, Tokens, tokenize


@dataclasses.dataclass
class Evaluation:
    """Of a text under a model.

    Attributes:
        nats: summed over the predicted tokens, all but the first.
        tokens: that were predicted.
        bytes: of the text that they stand for.
        seconds: taken.
    """

    nats: float
    tokens: int
    bytes: int
    seconds: float

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / self.bytes

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.nats / self.tokens, 700.0))

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


@torch.inference_mode()
def evaluate(
    model: LM,
    tokenizer: Tokenizer,
    text: Bytes,
    *,
    chunk: int = 1024,
    max_tokens: int | None = None,
) -> Evaluation:
    """Reads a text once, the state carried from chunk to chunk.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        text: the bytes.
        chunk: tokens that are read at once.
        max_tokens: read only so many.

    Raises:
        ValueError: there are not even two tokens.
    """
    with tempfile.TemporaryDirectory() as scratch:
        tokens: Tokens = text
        if isinstance(tokenizer, JsonTokenizer):
            path = Path(scratch) / "tokens.bin"
            tokens = tokenize(text, 0, len(text), tokenizer, None, path)
        count = min(len(tokens), max_tokens or len(tokens))
        if count < 2:
            raise ValueError(f"the text has {count} tokens, at least 2 are needed")
        begin = time.perf_counter()
        device = model.embeddings.weight.device
        state, nats = None, 0.0
        for start in range(0, count - 1, chunk):
            piece = torch.from_numpy(tokens.read(start, min(chunk, count - 1 - start) + 1))
            piece = piece[None].to(device)
            logits, state = model(piece[:, :-1], state)
            nats += F.cross_entropy(logits[0].float(), piece[0, 1:], reduction="sum").item()
        seconds = time.perf_counter() - begin
        size = len(text) * (count - 1) / len(tokens)
    return Evaluation(nats, count - 1, round(size), seconds)
