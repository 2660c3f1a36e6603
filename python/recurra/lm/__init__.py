"""Language models on the mixers of :mod:`recurra.nn`."""

from recurra.lm.config import CONFIGS, LMConfig, gemma_scale
from recurra.lm.generation import Sampling, generate, generate_text
from recurra.lm.model import LM, LMState
from recurra.lm.tokenizer import ByteTokenizer, load_tokenizer

__all__ = [
    "CONFIGS",
    "LM",
    "ByteTokenizer",
    "LMConfig",
    "LMState",
    "Sampling",
    "gemma_scale",
    "generate",
    "generate_text",
    "load_tokenizer",
]
