"""``recurra eval``."""

from __future__ import annotations

import argparse

from recurra.cli import _common

_EPILOG = """\
    The text is read once, from the first token to the last, with the state carried all the way,
    in memory that does not depend on its length.

    examples
      recurra eval runs/first --data book.txt
      recurra eval mamba-130m-hf --data 'corpus/*.txt' --dtype bf16
"""


def add_to(commands: argparse._SubParsersAction) -> None:
    parser = _common.add_command(
        commands,
        "eval",
        run,
        _EPILOG,
        help="bits per byte of a text under a trained model",
        description="Measures how well a trained model predicts a text.",
    )
    _common.add_model_options(parser)
    _common.add_data_option(parser)
    add = parser.add_argument
    add("--chunk", type=int, default=1024, metavar="N", help="tokens at once; default: %(default)s")
    add("--max-tokens", type=int, metavar="N", help="read only so many")


def run(args: argparse.Namespace) -> int:
    from recurra.train.data import open_text
    from recurra.train.evaluate import evaluate

    _common.check_at_least_one(args, "chunk", "max_tokens")
    _common.set_threads(args)
    text = open_text(args.data)
    model, tokenizer = _common.load(args.model, args.dtype, args.tokenizer)
    result = evaluate(model, tokenizer, text, chunk=args.chunk, max_tokens=args.max_tokens)
    print(
        f"{result.bits_per_byte:.4f} bits per byte, perplexity {result.perplexity:.4g} per token, "
        f"{result.tokens:,} tokens, {result.bytes:,} bytes, "
        f"{result.tokens_per_second:,.0f} tokens/s"
    )
    return 0
